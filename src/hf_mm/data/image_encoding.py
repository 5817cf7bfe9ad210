"""Encodes the images of pair rows once, with a frozen encoder, into a memory-mapped dataset.

The encoder is a callable from pixels to named arrays, so no model is known here. A folder of results holds one Arrow
file a shard and `manifest.json`, which says what made them; a run that was cut off goes on with the missing ones.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Features, Image, List, Value

from .fingerprints import digest_rows
from .formats import ImageError, RowError, center_crop_resize, open_image
from .shards import MANIFEST, claim_folder, map_shards, open_shards, read_manifest


__all__ = ["MANIFEST", "Encoder", "encode_rows", "load_encoded", "raw_pixels", "read_manifest"]


# Axes: B batch, H height, W width.
Encoder = Callable[[torch.Tensor], Mapping[str, torch.Tensor | np.ndarray]]


def raw_pixels(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encodes nothing: for models that see pixels, the pixels under their column name.

    Args:
        images (`torch.ByteTensor` of shape `(batch_size, 3, height, width)`): RGB, 0 to 255.

    Returns:
        `dict[str, torch.Tensor]`: `{"pixels": images}`.
    """
    return {"pixels": images}


def encode_rows(
    rows: Dataset,
    encode: Encoder,
    *,
    image_size: int | tuple[int, int],
    output_dir: str | os.PathLike,
    encoder_config: Mapping[str, Any],
    batch_size: int = 64,
    stride: int = 1,
    num_shards: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> Path:
    """Crops, resizes and encodes every image and writes the rows with arrays in the place of `image`.

    Process `p` writes shards `p, p + num_processes, ...` and skips those that are there, so the same call, in as many
    processes as one likes, also finishes what was begun. Run it in all of them before [`load_encoded`].

    Args:
        rows (`Dataset`): With a column `image`, the same in every process; prepared, so that every image can be read.
        encode (`Callable`): Turns a uint8 tensor of shape `(batch_size, 3, height, width)` into arrays with the batch
            as first axis and one type, such as `{"latent_mean": ..., "latent_std": ...}` or [`raw_pixels`].
        image_size (`int` or `tuple[int, int]`): Side in px, or `(height, width)`; pictures are cut at the centre.
        output_dir (`str` or `os.PathLike`): Folder for the shards.
        encoder_config (`Mapping`): What identifies the encoder (its name, revision, scale), in JSON types. A folder
            made with another is refused.
        batch_size (`int`): Images per call of `encode`.
        stride (`int`): Number of px that one position of the model covers; `image_size` must be a multiple.
        num_shards (`int`): Files to write, at most one per row.
        process_index (`int`): Number of this process.
        num_processes (`int`): How many there are.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If a size does not fit, or the folder holds rows made otherwise.
        RowError: If an image cannot be read.
    """
    size = _check_size(image_size, stride)
    if not 1 <= num_shards <= len(rows):
        raise ValueError(f"`num_shards`={num_shards} must be at least 1 and at most the number of rows, {len(rows)}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index`={process_index} must be at least 0 and below {num_processes=}.")
    if "image" not in rows.column_names:
        raise ValueError(f"`rows` has no column `image` to encode. Columns here: {rows.column_names}.")
    if rows.features["image"] != Image(decode=False):
        rows = rows.cast_column("image", Image(decode=False))  # opened and checked one by one
    batch_encoder = _BatchEncoder(encode, size)
    columns = _array_features(batch_encoder({"image": rows[:1]["image"]}, [0]))
    manifest = {
        "image_size": list(size),
        "stride": stride,
        "encoder": dict(encoder_config),
        "columns": {name: repr(feature) for name, feature in columns.items()},
        "num_rows": len(rows),
        "num_shards": num_shards,
        "rows_digest": digest_rows(rows),
    }
    folder = Path(output_dir)
    claim_folder(folder, manifest, "images encoded")
    features = Features({name: kind for name, kind in rows.features.items() if name != "image"} | columns)
    map_shards(
        rows,
        batch_encoder,
        features,
        folder,
        num_shards,
        process_index=process_index,
        num_processes=num_processes,
        batch_size=batch_size,
        remove_columns="image",
        verb="Encoding",
    )
    if process_index == 0:
        print(f"Encoded images of {len(rows)} rows are in {folder} ({num_shards} shards).")
    return folder


def load_encoded(output_dir: str | os.PathLike) -> Dataset:
    """Opens encoded rows by memory map; arrays come as NumPy in the type they were stored in, the rest as Python.

    Of each shard the size is compared with its checksum, and no row is read. Reading a batch of rows at once costs
    little more than reading one.

    Args:
        output_dir (`str` or `os.PathLike`): Folder that [`encode_rows`] wrote.

    Returns:
        `Dataset`: The rows in their order.

    Raises:
        ValueError: If the folder is no such folder, or shards are missing or cut off.
    """
    folder = Path(output_dir)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"`output_dir`={str(folder)!r} has no {MANIFEST}, so it holds no encoded images.")
    rows = open_shards(folder, manifest["num_shards"])
    names = list(manifest["columns"])
    return rows.with_format(
        "numpy", columns=names, output_all_columns=True, dtype=_array_dtype(rows.features[names[0]])
    )


@dataclass
class _BatchEncoder:
    """Opens, crops, stacks and encodes a batch."""

    encode: Encoder
    size: tuple[int, int]

    def __call__(self, batch: Mapping[str, list], numbers: list[int]) -> dict[str, np.ndarray]:
        pictures = [self.open(image, number) for image, number in zip(batch["image"], numbers, strict=True)]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        with torch.inference_mode():
            arrays = {name: _to_numpy(name, array) for name, array in self.encode(pixels).items()}
        for name, array in arrays.items():
            if len(array) != len(pictures):
                raise ValueError(f"`encode` gave {len(array)} rows of `{name}` for {len(pictures)} images.")
        return arrays

    def open(self, image: Any, number: int) -> np.ndarray:  # noqa: ANN401
        """Returns uint8 pixels of shape (H, W, 3)."""
        try:
            return np.asarray(center_crop_resize(open_image(image), self.size))
        except ImageError as error:
            raise RowError(
                f"Row {number}, column `image`: {error}. Drop such rows with `prepare_pairs` first."
            ) from error


def _check_size(image_size: int | tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns (height, width), refused if no multiple of the stride."""
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    for name, side in zip(("height", "width"), size, strict=True):
        if side < 1 or side % stride:
            nearest = max(stride, side // stride * stride)
            raise ValueError(
                f"`image_size`={image_size}: the {name} {side} must be a multiple of `stride`={stride}. Try {nearest}."
            )
    return size


def _to_numpy(name: str, array: torch.Tensor | np.ndarray) -> np.ndarray:
    """Moves an encoder's output to NumPy."""
    if isinstance(array, torch.Tensor):
        if array.dtype == torch.bfloat16:
            raise ValueError(f"`encode` gave `{name}` as bfloat16, which Arrow cannot store. Give float16 or float32.")
        array = array.cpu().numpy()
    if not 2 <= array.ndim <= 4:
        raise ValueError(f"`encode` gave `{name}` of shape {array.shape}; a row's array must have 1 to 3 axes.")
    return array


def _array_features(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the column types of encoded arrays."""
    if len({array.dtype for array in arrays.values()}) != 1:
        raise ValueError(
            f"`encode` must give arrays of one type, not { ({n: str(a.dtype) for n, a in arrays.items()}) }."
        )
    features: dict[str, Any] = {}
    for name, array in arrays.items():
        shape, dtype = array.shape[1:], str(array.dtype)
        kinds = {2: Array2D, 3: Array3D}
        features[name] = (
            List(Value(dtype), length=shape[0]) if len(shape) == 1 else kinds[len(shape)](shape=shape, dtype=dtype)
        )
    return features


def _array_dtype(feature: Any) -> str:  # noqa: ANN401
    return feature.feature.dtype if isinstance(feature, List) else feature.dtype
