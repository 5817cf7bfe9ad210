"""Where the rows of a memory bank come from, noted beside its index, so that the folder alone can be searched again.

Joins the note, the source of rows, the encoder and the index; rows themselves are not copied.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset

from .caption_arguments import CaptionArguments
from .clip_encoder import ClipEncoder
from .retrieval import NEIGHBORS, Retriever
from .retrieval_strategy import RetrievalStrategy
from .shards import MANIFEST, write_json
from .sources import DatasetArguments, open_rows, prepare_rows
from .text_tokenizer import load_text_tokenizer


SOURCE = "source.json"


@dataclass(frozen=True)
class RowSource:
    """All that decides which rows there are, and in what order.

    Args:
        dataset ([`DatasetArguments`]): Source and columns.
        captions ([`CaptionArguments`]): What is dropped.
        image_size (`int`): Pixels at which embedded scenes are drawn.
        seed (`int`): Of embedded scenes.
        tokenizer_name (`str`, *optional*): Text tokenizer that decides with them what is dropped.
    """

    dataset: DatasetArguments
    captions: CaptionArguments
    image_size: int
    seed: int = 0
    tokenizer_name: str | None = None

    def open(self) -> Dataset:
        """Opens the rows as encode_images.py does, with pictures."""
        tokenizer = None if self.tokenizer_name is None else load_text_tokenizer(self.tokenizer_name)
        rows = open_rows(self.dataset, image_size=self.image_size, seed=self.seed)
        return prepare_rows(rows, self.dataset, self.captions, tokenizer)[0]


def note_source(folder: str | os.PathLike, source: RowSource, clip_name: str) -> None:
    """Notes the source of a memory bank and its encoder, by the names given, in the folder of its index.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        source ([`RowSource`]): Of the rows.
        clip_name (`str`): CLIPModel, a folder or a Hub id.
    """
    write_json(Path(folder) / SOURCE, {**asdict(source), "clip_name": clip_name})


def open_retriever(
    folder: str | os.PathLike, device: torch.device | str = "cpu", strategy: RetrievalStrategy | None = None
) -> Retriever:
    """Opens what build_retrieval_index.py wrote: index, rows and encoder.

    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of that recipe.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where prompts are encoded.
        strategy ([`RetrievalStrategy`], *optional*): The rules; those that found the neighbours, unless others
            are given.

    Returns:
        [`Retriever`]: for prompts.

    Raises:
        ValueError: If it is no such folder, not finished, or rows or encoder are others by now.
    """
    path = Path(folder) / SOURCE
    if not path.exists():
        raise ValueError(
            f"{str(folder)!r} is no folder of an index: it has no {SOURCE}. Name the `output_dir` of "
            "recipes/build_retrieval_index.py; the same command again finishes one that was cut off."
        )
    if strategy is None:
        found = json.loads((Path(folder) / NEIGHBORS / MANIFEST).read_text(encoding="utf-8"))
        strategy = RetrievalStrategy(**found["strategy"])
    note = json.loads(path.read_text(encoding="utf-8"))
    encoder = ClipEncoder.from_pretrained(note.pop("clip_name"), device)
    note["dataset"], note["captions"] = DatasetArguments(**note["dataset"]), CaptionArguments(**note["captions"])
    return Retriever(folder, RowSource(**note).open(), encoder, strategy=strategy)
