"""The demo as a Space of the Hub: a folder with the page's script, what it needs, and its front matter.

Knows files; which of a checkpoint's folder are shared, the caller says.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData


MODEL_DIR = "model"
APP = '''"""The page of this Space: `hf-mm demo`."""

from hf_mm.cli import build_demo


demo = build_demo({arguments})

if __name__ == "__main__":
    demo.launch()
'''


def write_space(
    folder: Path,
    model: str | None,
    examples: Sequence[str],
    trust_remote_code: bool,
    list_files: Callable[[str], list[str]],
) -> None:
    """Writes a folder that is a Space; a checkpoint's folder is copied into it, a Hub id is named.

    Args:
        folder (`Path`): Where to; made if missing.
        model (`str`, *optional*): Folder or Hub id; none: the checkpoint that ships with the package.
        examples (`Sequence[str]`): Prompts of one click; empty: those of the page.
        trust_remote_code (`bool`): Whether the Space runs code of the checkpoint.
        list_files (`Callable`): Lists what is shared of a checkpoint's folder.

    Raises:
        ValueError: If the folder holds something, the checkpoint's holds no pipeline, or `list_files` refuses it.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--space-dir {folder} is not empty. Name a new folder.")
    arguments: dict[str, Any] = {}
    if model is not None and Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise ValueError(f"--model {model} holds no pipeline: it has no model_index.json.")
        copy_files(Path(model), list_files(model), folder / MODEL_DIR)
        arguments["model"] = MODEL_DIR
    elif model is not None:
        arguments["model"] = model
    if examples:
        arguments["examples"] = list(examples)
    if trust_remote_code:
        arguments["trust_remote_code"] = True
    folder.mkdir(parents=True, exist_ok=True)
    spelled = ", ".join(f"{name}={_spell(value)}" for name, value in arguments.items())
    (folder / "app.py").write_text(APP.format(arguments=spelled), encoding="utf-8")
    (folder / "requirements.txt").write_text(f"hf_mm[demo]=={version('hf_mm')}\n", encoding="utf-8")
    write_card(folder / "README.md", model)


def copy_files(source: Path, names: Sequence[str], target: Path) -> None:
    """Copies some files of a folder into another."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_card(path: Path, model: str | None) -> None:
    """Writes the Space's card, whose front matter tells the Hub how to run it."""
    title = "hf_mm" if model is None else Path(model).name
    hub_id = None if model is None or Path(model).is_dir() else model
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=version("gradio"),
        app_file="app.py",
        license="apache-2.0",
        models=[hub_id] if hub_id else None,
        emoji="🎨",
        colorFrom="blue",
        colorTo="red",
    )
    text = f"# {title}\n\nDraws pictures from text, captions and edits them, and talks about them.\n"
    SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)


def _spell(value: Any) -> str:
    """Spells an argument as the formatter would: strings in double quotes."""
    return str(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)
