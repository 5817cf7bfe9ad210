"""Documents to batches: documents become windows, their images one tensor.

A batch's keys are the argument names of the models' `forward`. Knows tokens and tensors; what they mean is elsewhere.
"""

# Axes: B windows, L positions, N images of all windows in reading order, C channels, H and W in latent pixels.

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from .packing import pack_windows
from .training_documents import Document


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
    """Collates documents into windows; positions restart with each document, and padding is documents of its own.

    Args:
        documents (`Sequence[Document]`): From [`NoisedDocuments`] or [`CodeDocuments`].
        pad_token_id (`int`): Fills what is left of a window.
        window_length (`int`, *optional*): Packs documents into windows of that length; without it each document is a
            window, as long as the longest.
        image_key (`str`, defaults to `"latents"`): `"pixel_values"` for pictures that the model encodes itself.

    Returns:
        `dict`: `input_ids`, `labels`, `position_ids` of shape `(B, L)` and, where documents have images beside their
        tokens, the images, `noise`, `timesteps`, if sizes differ `image_sizes`, and of tasks `clean_images`.

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
        positions[row, start:] = np.arange(length - start) % max(lengths)  # a model may have no more positions
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    batch = {name: torch.from_numpy(values) for name, values in batch.items()}
    ordered = [documents[index] for window in windows for index in window if "images" in documents[index]]
    if images := [image for document in ordered for image in document["images"]]:
        batch[image_key], sizes = stack_images(images)
        batch["noise"], latent_sizes = stack_images([noise for document in ordered for noise in document["noise"]])
        batch["timesteps"] = torch.cat([document["timesteps"] for document in ordered])
        if sizes is not None and latent_sizes is not None:
            batch["image_sizes"] = latent_sizes
        if any("clean_images" in document for document in ordered):
            clean = [document.get("clean_images", [False] * len(document["images"])) for document in ordered]
            batch["clean_images"] = torch.tensor([is_clean for of_document in clean for is_clean in of_document])
    return batch


def build_collator(
    pad_token_id: int, window_length: int | None, image_key: str
) -> Callable[[Sequence[Document]], dict[str, torch.Tensor]]:
    """Returns `collate_documents` with its arguments set, as a picklable function for a `DataLoader`."""
    return partial(collate_documents, pad_token_id=pad_token_id, window_length=window_length, image_key=image_key)
