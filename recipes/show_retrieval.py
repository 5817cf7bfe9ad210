"""Shows what is retrieved for prompts, with scores, beside the pictures drawn without and with it: one HTML file.

python recipes/show_retrieval.py --model_name_or_path runs/cm3leon_icons --retrieval_dir runs/retrieval \
    --prompts "a red star" "a blue heart" --nums_retrieved 0 1 2 --output runs/retrieval.html

The pictures of a prompt start from the same noise, so that they differ by what was retrieved alone.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hf_mm.data.retrieval_source import open_retriever
from hf_mm.training.recipe import parse_recipe


STYLE = """
body { font: 14px sans-serif; margin: 2em; color: #222 }
section { border-top: 1px solid #ccc; padding: 1em 0 }
figure { display: inline-block; vertical-align: top; width: 140px; margin: 0 16px 8px 0 }
figure.retrieved { color: #555 }
img { width: 128px; height: 128px; image-rendering: pixelated; border: 1px solid #ccc }
"""


@dataclass
class ShowArguments:
    """What is drawn, what is retrieved from, and where to."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of a CM3Leon."})
    retrieval_dir: str = field(metadata={"help": "The output_dir of build_retrieval_index.py."})
    prompts: list[str] = field(
        default_factory=lambda: ["a red star on a white background", "a blue heart on a yellow background"],
        metadata={"help": "Prompts, a row each."},
    )
    nums_retrieved: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Numbers of documents to draw with, a picture each."}
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "1 is off; none: the model's."})
    seed: int = field(default=0, metadata={"help": "Seed of the first prompt; the next has the next."})
    output: str = field(default="runs/retrieval.html", metadata={"help": "Where to."})


def show_picture(picture: Image.Image | None, caption: str, kind: str) -> str:
    """Spells a picture with its caption, as a figure that holds the PNG itself."""
    shown = ""
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        shown = f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    return f'<figure class="{kind}">{shown}<figcaption>{escape(caption)}</figcaption></figure>'


def show_prompt(prompt: str, drawn: dict[int, Image.Image], facts: Iterable[tuple[dict[str, Any], float, int]]) -> str:
    """Spells a prompt's section: pictures drawn by how many documents, then the documents, their scores and rows."""
    figures = [show_picture(picture, f"drawn with {count} retrieved", "drawn") for count, picture in drawn.items()]
    for rank, (document, score, row) in enumerate(facts, start=1):
        caption = f"{rank}. score {score:.3f}, row {row}: {document['text']}"
        figures.append(show_picture(document.get("image"), caption, "retrieved"))
    return f"<section><h2>{escape(prompt)}</h2>{''.join(figures)}</section>"


def draw(
    pipeline: Any, arguments: ShowArguments, documents: list[list[dict[str, Any]]]
) -> list[dict[int, Image.Image]]:
    """Draws every prompt with every number of its documents."""
    pictures: list[dict[int, Image.Image]] = [{} for _ in arguments.prompts]
    for count in arguments.nums_retrieved:
        seeds = range(arguments.seed, arguments.seed + len(arguments.prompts))
        images = pipeline(
            arguments.prompts,
            retrieved=[found[:count] for found in documents],
            guidance_scale=arguments.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        for of_prompt, image in zip(pictures, images, strict=True):
            of_prompt[count] = image
    return pictures


def main(argv: Sequence[str] | None = None) -> Path:
    """Retrieves, draws and writes the page."""
    (arguments,) = parse_recipe(ShowArguments, argv=argv)
    if not arguments.nums_retrieved or min(arguments.nums_retrieved) < 0:
        raise ValueError(f"`nums_retrieved`={arguments.nums_retrieved} must hold numbers of at least 0.")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    retriever = open_retriever(arguments.retrieval_dir, device)
    found = retriever.retrieve(arguments.prompts, num_retrieved=max(arguments.nums_retrieved))
    pipeline = DiffusionPipeline.from_pretrained(arguments.model_name_or_path).to(device)
    documents = found.documents
    drawn = draw(pipeline, arguments, documents)
    sections = [
        show_prompt(prompt, pictures, zip(*facts, strict=True))
        for prompt, pictures, *facts in zip(arguments.prompts, drawn, documents, found.scores, found.ids, strict=True)
    ]
    title = f"{arguments.model_name_or_path}, retrieving from {arguments.retrieval_dir}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    print(f"The page is in {path}.")
    return path


if __name__ == "__main__":
    main()
