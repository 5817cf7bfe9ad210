"""Pairs to the tensors of a model that compares pictures with captions. Knows rows and a processor, not models."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from .caption_text import sample_caption
from .formats import open_image
from .mixing import SampleKey, sample_generator


Pair = tuple[Image.Image, str]


class CaptionedPictures(torch.utils.data.Dataset[Pair]):
    """Pictures with a caption that is drawn anew for each sample.

    Args:
        rows (`datasets.Dataset`): Pairs.
        form_weights (`dict[str, float]`): Chances of the caption forms, see `sample_caption`.
        seed (`int`): Of the captions.
    """

    def __init__(self, rows: Dataset, form_weights: dict[str, float], seed: int) -> None:
        self.rows, self.form_weights, self.seed = rows, form_weights, seed

    def __getitem__(self, key: SampleKey) -> Pair:
        """Builds one sample."""
        return self._build(self.rows[key.row], key)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Pair]:
        """Builds the samples of a batch; rows are read together, which costs less."""
        rows = self.rows.__getitems__([key.row for key in keys])
        return [self._build(row, key) for row, key in zip(rows, keys, strict=True)]

    def first(self, num_pairs: int) -> list[Pair]:
        """Reads the first pairs, always with the same captions."""
        return self.__getitems__([SampleKey(number, 0, number) for number in range(min(num_pairs, len(self.rows)))])

    def _build(self, row: dict[str, Any], key: SampleKey) -> Pair:
        caption = sample_caption(row, sample_generator(self.seed, key.number), self.form_weights)
        return open_image(row["image"]), caption


class PairCollator:
    """Makes a batch of pairs: what the processor makes of them, and which captions are equal.

    Captions are cut to the length that the tokenizer allows. Those that are equal as tokens have equal `caption_ids`,
    in every process.

    Args:
        processor (`CLIPProcessor`): Of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Builds `pixel_values`, `input_ids`, `attention_mask` and `caption_ids`."""
        pictures, captions = zip(*pairs, strict=True)
        images = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        rows = self.processor.tokenizer(list(captions), truncation=True)["input_ids"]
        ids = [torch.tensor(row) for row in rows]
        pad_token_id = self.processor.tokenizer.pad_token_id
        return {
            "pixel_values": images["pixel_values"],
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "caption_ids": torch.tensor([_digest(row) for row in rows]),
        }


def _digest(ids: Sequence[int]) -> int:
    """Makes one number of token ids, the same in every process."""
    digest = blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
