"""The pages of documentation name what is there."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_what_the_papers_are_mapped_to_is_there(file, name):
    folder = ROOT / "tests" if Path(file).name.startswith("test_") else ROOT / "src" / "hf_mm"
    scope = ast.parse((folder / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        (found,) = [node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        scope = found.body


def test_every_row_of_the_papers_has_code_and_a_test():
    rows = re.findall(r"^\| [A-Z].*$", (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        code, test = (cell.strip(" `") for cell in row.split("|")[3:5])
        assert "::" in code and "/test_" in f"/{test}" and "::test_" in test, row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target[0] != "#" and not (page.parent / target.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_configurations_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?<![\w/.])((?:recipes|benchmarks|model_cards|src/hf_mm)/(?!test_)[\w/.-]*\w\.(?:py|yaml|json|md))", text
        )
    )
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]
