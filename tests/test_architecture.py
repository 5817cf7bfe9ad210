"""The import rule, what a Hub loader can follow, and the sizes of files and functions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "hf_mm").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FAMILIES = {"cm3leon", "transfusion"}
JOINTS = {"__init__.py", "text_to_image.py", "hub.py", "cli.py"}
# Documentation may be as long as it needs to be: docstrings do not count, nor does a function's signature.
MAX_FILE_LINES = 480
MAX_FUNCTION_LINES = 60


def imports(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (line, level, module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or ""


def siblings(path: Path) -> set[str]:
    return {module for _, level, module in imports(path) if level == 1}


def import_faults(path: Path) -> Iterator[str]:
    """Says what breaks the import rule or cannot be followed by the loaders of remote code."""
    is_joint = path.parent.name == "hf_mm" and path.name in JOINTS
    is_shipped = path.parent.name in FAMILIES and path.name != "__init__.py"
    for line, level, module in imports(path):
        where = f"{path.name}:{line}"
        if level == 0 and module.split(".")[0] == "hf_mm":
            yield f"{where} imports hf_mm by name"
        if level > 1:
            yield f"{where} reaches out of its folder for `{module}`"
        if level == 1 and "." in module and not is_joint:
            yield f"{where} reaches into another folder for `{module}`"
        if level == 1 and not module and not (is_joint and path.name == "__init__.py"):
            yield f"{where} must read `from .file import name`"
        if is_shipped and path.name.startswith("pipeline_") and level == 1:
            if inner := siblings(path.with_name(f"{module}.py")):
                yield f"{where} imports `{module}`, which is no leaf: it imports {sorted(inner)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_file_imports_from_its_own_folder_only(path: Path) -> None:
    assert not list(import_faults(path))


@pytest.mark.parametrize(
    ("place", "line", "fault"),
    [
        ("data/mixing.py", "import hf_mm.training", "imports hf_mm by name"),
        ("data/mixing.py", "from hf_mm import hub", "imports hf_mm by name"),
        ("data/mixing.py", "from ..training import loop", "reaches out of its folder"),
        ("transfusion/modeling_x.py", "from . import noise_x", "must read"),
        ("transfusion/modeling_x.py", "from .layers.deep import f", "into another folder"),
        ("data/mixing.py", "def f():\n    from ..training.loop import train", "reaches out"),
        ("transfusion/pipeline_x.py", "from .modeling_x import X", "no leaf"),
    ],
)
def test_the_import_rule_is_noticed_when_broken(tmp_path: Path, place: str, line: str, fault: str) -> None:
    path = tmp_path / place
    path.parent.mkdir()
    path.with_name("modeling_x.py").write_text("from .patching_x import P")
    path.write_text(line)
    assert [text for text in import_faults(path) if fault in text]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_file_of_a_family_has_no_docstring_line_that_reads_as_an_import(path: Path) -> None:
    lines = [line.strip() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
             for line in (ast.get_docstring(node) or "").splitlines()]  # fmt: skip
    assert not [line for line in lines if line.startswith(("from .", "import "))]


@pytest.mark.parametrize("path", [*SOURCES, *RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if node.body and ast.get_docstring(node) else None
            docstrings += docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            body = node.body[1 if docstring else 0 :]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body:
                length = body[-1].end_lineno - body[0].lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} `{node.name}` has {length} lines"
    assert path.read_text(encoding="utf-8").count("\n") - docstrings <= MAX_FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_file_says_what_it_does(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def definitions(family: str) -> dict[str, str]:
    """Functions and classes of a family's files by name, with no family's name in them."""
    found = {}
    for path in (ROOT / "src" / "hf_mm" / family).glob(f"*_{family}.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = re.sub(family, "family", ast.unparse(node), flags=re.IGNORECASE)
    return found


def test_what_both_families_have_is_the_same():
    """Each family's files travel without the other's, so that they hold copies; a copy changed alone is a fault."""
    ours, theirs = definitions("cm3leon"), definitions("transfusion")
    shared = ours.keys() & theirs.keys() - {"ConversationMixin"}
    assert len(shared) > 15
    assert not {name for name in shared if ours[name] != theirs[name]}
