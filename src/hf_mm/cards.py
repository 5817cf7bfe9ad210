"""Model cards: filled from templates by the run that made the model, completed before publishing, and given scores.

Knows front matter and Markdown. Does not know how scores come about.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .hub_upload import LIBRARY


UNFILLED = "[More Information Needed]"  # in cards that PEFT and huggingface_hub write
SCORES = "## Evaluation"
HERE = "."  # in examples, until the model has a name on the Hub


def write_card(
    folder: str | Path, template: str | Path, data: Mapping[str, Any], values: Mapping[str, Any]
) -> ModelCard:
    """Fills a template and saves it as the card of a folder.

    Args:
        folder (`str` or `Path`): Of a model.
        template (`str` or `Path`): Jinja template, from `model_cards/`.
        data (`Mapping`): Front matter. The tag by which `publish` knows repos of hf_mm is added.
        values (`Mapping`): What the template's slots are filled with.

    Returns:
        `ModelCard`: as it was saved.
    """
    marked = {**data, "tags": [*data.get("tags", []), *([] if data.get("library_name") == LIBRARY else [LIBRARY])]}
    card = ModelCard.from_template(ModelCardData(**marked), template_path=str(template), **values)
    card.save(Path(folder) / "README.md")
    return card


def without_folders(value: Any) -> Any:
    """Calls absolute paths by their last name, in lists and mappings too: where they lie is no reader's business.

    Example:
        >>> without_folders({"output_dir": "/home/me/runs/mine", "seed": 3})
        {'output_dir': 'mine', 'seed': 3}

    """
    if isinstance(value, Mapping):
        return {name: without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    task, at, place = str(value).rpartition("@")  # as in edit@/home/me/edits
    place = place.removeprefix("file://")
    return f"{task}{at}{Path(place).name}" if Path(place).is_absolute() else value


def spell_command(script: str, argv: Sequence[str]) -> str:
    """Spells the command line of a recipe for a card, absolute paths by their last names.

    Args:
        script (`str`): File name of the recipe.
        argv (`Sequence[str]`): What followed it.

    Returns:
        `str`: such as `recipes/sft.py --seed 3`.
    """
    parts = (word.partition("=") for word in map(str, argv))
    words = ["".join((without_folders(name), equals, without_folders(value))) for name, equals, value in parts]
    return shlex.join([f"recipes/{script}", *words])


def complete_card(folder: Path, **data: Any) -> None:
    """Adds to a card what the Hub needs, and the tag by which `publish` knows the repo again.

    Args:
        folder (`Path`): Of a model. A missing card is written, and the one of PEFT, which says nothing, replaced.
        data: Front matter, where the card has none of that name.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else None
    if card is None or UNFILLED in card.text:
        told = f"Published with `{LIBRARY}`; how it was trained is not noted."
        card = ModelCard(f"---\ntags:\n- {LIBRARY}\n---\n\n{told}\n")
    for name, value in data.items():
        if name == "base_model" or card.data.get(name) is None:
            setattr(card.data, name, value)
    tags = card.data.get("tags") or []
    if LIBRARY not in tags and card.data.get("library_name") != LIBRARY:
        card.data["tags"] = [*tags, LIBRARY]
    card.save(path)


def rename(folder: Path, changes: Mapping[str, str]) -> None:
    """Gives models in the examples of a card the names that they have on the Hub.

    Args:
        folder (`Path`): Of a model, with a card.
        changes (`Mapping[str, str]`): New names by old ones; the model itself is called `HERE` before.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    for old, new in changes.items():
        for before in ("model=", "from_pretrained(", "from_pretrained(base, "):
            text = text.replace(f'{before}"{old}"', f'{before}"{new}"')
    path.write_text(text, encoding="utf-8")


def add_eval_results(folder: str | Path, results: Sequence[EvalResult], note: str = "") -> None:
    """Writes scores into the card of a folder, as eval results of the Hub and as a table; later ones replace earlier.

    Args:
        folder (`str` or `Path`): Of a model; one without a card stays without.
        results (`Sequence[EvalResult]`): The scores, each with a `metric_name`; of type `accuracy` they are shares. A
            card tells data apart by type, configuration and split, not by name.
        note (`str`, *optional*): How they came about, above the table.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() or not results:
        return
    card = ModelCard.load(path)
    kept = {_key_of(result): result for result in card.data.eval_results or []}
    kept |= {_key_of(result): result for result in results}
    card.data.eval_results = list(kept.values())
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.data.metrics = sorted({result.metric_type for result in kept.values()})
    card.text = _replace_section(card.text, f"{note}\n\n{tabulate_results(card.data.eval_results)}".strip())
    card.save(path)


def tabulate_results(results: Sequence[EvalResult]) -> str:
    """Spells scores as a Markdown table: shares as percents, with the `interval` that `metric_args` may hold."""
    lines = ["| data | score | value |", "|---|---|---|"]
    for result in results:
        is_share = result.metric_type == "accuracy" and 0 <= result.metric_value <= 1
        spelling = ".1%" if is_share else ".4g"
        shown = format(result.metric_value, spelling)
        if interval := (result.metric_args or {}).get("interval"):
            shown += f" ({' to '.join(format(end, spelling) for end in interval)})"
        lines.append(f"| {result.dataset_name} | {result.metric_name} | {shown} |")
    return "\n".join(lines)


def _key_of(result: EvalResult) -> tuple[Any, ...]:
    """What two runs of the same evaluation have in common."""
    return *result.unique_identifier, result.metric_type, result.metric_name


def _replace_section(text: str, content: str) -> str:
    """Puts content under the heading of scores: in the place of what was there, or above the limits, or last."""
    section = f"{SCORES}\n\n{content}\n\n"
    before, heading, rest = text.partition(f"{SCORES}\n")
    if heading:
        place = rest.find("\n## ")
        return before + section + (rest[place + 1 :] if place >= 0 else "")
    before, heading, rest = text.partition("## Limits\n")
    return f"{before}{section}{heading}{rest}" if heading else f"{text.rstrip()}\n\n{section}"
