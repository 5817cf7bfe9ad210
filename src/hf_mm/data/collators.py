"""Training samples to batches: rows become documents with their images and noise, documents become windows.

A batch's keys are the argument names of the models' `forward`. The processor lays documents out and the model's
sampler draws timesteps; both come as arguments, so nothing here knows a model.
"""

# Axes: B windows, L positions, N images of all windows in reading order, C channels, H and W in latent pixels.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .formats import RowError, center_crop_resize, open_image
from .mixing import DocumentArguments, SampleKey, build_content, sample_generator
from .packing import pack_windows


Document = dict[str, Any]


class DocumentEncoder(Protocol):
    """What is needed of a processor."""

    def encode_document(self, content: list[dict[str, Any]]) -> dict[str, list[int]]:
        """Lays a document out as `input_ids` and `labels`."""


class TrainingDocuments(torch.utils.data.Dataset[Document]):
    """Builds the document of a sample key: tokens, images, and the noise each image is trained at.

    Args:
        rows (`datasets.Dataset`): Pairs or documents, encoded or not.
        processor (`DocumentEncoder`): Lays documents out.
        image_size (`int`): Pixels that unencoded pictures are cropped and resized to.
        latent_shape (`tuple[int, int, int]`): Channels, height and width of the noise of such a picture.
        sample_timesteps (`Callable`): `sample_timesteps(num_images, max_timestep=, generator=)` of the model.
        arguments (`DocumentArguments`): Order, dropout and noise cap.
        seed (`int`): Of all draws.
        text_rows (`datasets.Dataset`, *optional*): Text-only rows, the source 1 of the keys.
        max_tokens (`int`, *optional*): Longer text-only documents give a stretch of that length, drawn anew each time.
            Documents with images are never cut, but refused.
        form_weights (`dict`, *optional*): Chances of the caption forms.
    """

    def __init__(
        self,
        rows: Any,
        *,
        processor: DocumentEncoder,
        image_size: int,
        latent_shape: tuple[int, int, int],
        sample_timesteps: Callable[..., torch.Tensor],
        arguments: DocumentArguments,
        seed: int,
        text_rows: Any = None,
        max_tokens: int | None = None,
        form_weights: dict[str, float] | None = None,
    ) -> None:
        self.sources = (rows, text_rows)
        self.processor, self.image_size, self.latent_shape = processor, image_size, latent_shape
        self.sample_timesteps, self.arguments, self.seed = sample_timesteps, arguments, seed
        self.form_weights, self.max_tokens = form_weights, max_tokens

    def __getitem__(self, key: SampleKey) -> Document:
        """Builds the document of one sample."""
        return self._build(self.sources[key.source][key.row], key)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Document]:
        """Builds the documents of a batch; rows are read together, which costs less."""
        numbers: dict[int, list[int]] = {}
        for key in keys:
            numbers.setdefault(key.source, []).append(key.row)
        rows = {source: iter(self.sources[source].__getitems__(wanted)) for source, wanted in numbers.items()}
        return [self._build(next(rows[key.source]), key) for key in keys]

    def _build(self, row: dict[str, Any], key: SampleKey) -> Document:
        """Builds the document of one row."""
        generator = sample_generator(self.seed, key.number)
        content, max_timestep = build_content(row, self.arguments, generator, self.form_weights)
        images = [self._read_image(row, part, generator) for part in content if part["type"] == "image"]
        # Pictures that the model's image tokenizer has yet to encode get noise of the shape they will have then.
        has_final_shape = "latent_mean" in row or self.latent_shape[1] == self.image_size
        shapes = [tuple(image.shape) if has_final_shape else self.latent_shape for image in images]
        sizes = iter(shapes)
        parts = [{**part, "size": next(sizes)[1:]} if part["type"] == "image" else part for part in content]
        document: Document = dict(self.processor.encode_document(parts))
        if self.max_tokens is not None and len(document["input_ids"]) > self.max_tokens:
            if images:
                raise RowError(
                    f"Row {key.row}: its document has {len(document['input_ids'])} tokens, more than the "
                    f"{self.max_tokens} of a window. Lower `max_caption_tokens`, or raise `window_length`."
                )
            document = cut_text(document, self.max_tokens, generator)
        document["images"] = images
        document["noise"] = [torch.randn(shape, generator=generator) for shape in shapes]
        document["timesteps"] = self.sample_timesteps(len(images), max_timestep=max_timestep, generator=generator)
        return document

    def _read_image(self, row: dict[str, Any], part: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        """Returns a picture in [-1, 1], or latents drawn from what the encoder saved of it."""
        if "latent_mean" in row:
            mean, std = (
                torch.as_tensor(np.asarray(row[name], dtype=np.float32)) for name in ("latent_mean", "latent_std")
            )
            return mean + std * torch.randn(mean.shape, generator=generator)
        if "pixels" in row:
            pixels = np.asarray(row["pixels"], dtype=np.uint8)
        else:
            picture = open_image(part.get("image", row.get("image")))
            pixels = np.asarray(center_crop_resize(picture, self.image_size)).transpose(2, 0, 1)
        return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def cut_text(document: Document, max_tokens: int, generator: torch.Generator) -> Document:
    """Takes a random stretch of a text that is too long; its first token is no target, for nothing predicts it."""
    excess = len(document["input_ids"]) - max_tokens
    start = int(torch.randint(excess + 1, (1,), generator=generator))
    stretch = {name: values[start : start + max_tokens] for name, values in document.items()}
    stretch["labels"] = [-100, *stretch["labels"][1:]]
    return stretch


def stack_images(images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stacks images, padding those that are smaller than the largest.

    Returns:
        `torch.Tensor` of shape `(num_images, channels, height, width)`, and sizes `(num_images, 2)` if they differ.
    """
    sizes = [image.shape[-2:] for image in images]
    if len(set(sizes)) == 1:
        return torch.stack(list(images)), None
    height, width = (max(side) for side in zip(*sizes, strict=True))
    padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    return torch.stack(padded), torch.tensor([list(size) for size in sizes])


def collate_documents(
    documents: Sequence[Document], *, pad_token_id: int, window_length: int | None = None, image_key: str = "latents"
) -> dict[str, torch.Tensor]:
    """Collates documents into windows; positions restart with each document, and padding is a document of its own.

    Args:
        documents (`Sequence[Document]`): From [`TrainingDocuments`].
        pad_token_id (`int`): Fills what is left of a window.
        window_length (`int`, *optional*): Packs documents into windows of that length; without it each document is a
            window, as long as the longest.
        image_key (`str`, defaults to `"latents"`): `"pixel_values"` for pictures that the model encodes itself.

    Returns:
        `dict`: `input_ids`, `labels`, `position_ids` of shape `(B, L)` and, where there are images, the images,
        `noise`, `timesteps` and, if sizes differ, `image_sizes`.

    Raises:
        ValueError: If a document is longer than a window.
    """
    lengths = [len(document["input_ids"]) for document in documents]
    windows = [[index] for index in range(len(documents))]
    if window_length is not None:
        windows = pack_windows(lengths, window_length)
    length = window_length or max(lengths)
    ids, labels, positions = np.full((3, len(windows), length), pad_token_id)
    labels[:] = -100
    for row, window in enumerate(windows):
        start = 0
        for index in window:
            stop = start + lengths[index]
            ids[row, start:stop] = documents[index]["input_ids"]
            labels[row, start:stop] = documents[index]["labels"]
            positions[row, start:stop] = np.arange(lengths[index])
            start = stop
        positions[row, start:] = np.arange(length - start)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    batch = {name: torch.from_numpy(values) for name, values in batch.items()}
    ordered = [documents[index] for window in windows for index in window]
    if images := [image for document in ordered for image in document["images"]]:
        batch[image_key], sizes = stack_images(images)
        batch["noise"], latent_sizes = stack_images([noise for document in ordered for noise in document["noise"]])
        batch["timesteps"] = torch.cat([document["timesteps"] for document in ordered])
        if sizes is not None and latent_sizes is not None:
            batch["image_sizes"] = latent_sizes
    return batch


def build_collator(
    pad_token_id: int, window_length: int | None, image_key: str
) -> Callable[[Sequence[Document]], dict[str, torch.Tensor]]:
    """Returns `collate_documents` with its arguments set, as a picklable function for a `DataLoader`."""
    return partial(collate_documents, pad_token_id=pad_token_id, window_length=window_length, image_key=image_key)
