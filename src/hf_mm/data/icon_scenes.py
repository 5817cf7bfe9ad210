"""Pictures of coloured icons with exact captions: an unlimited dataset that needs no download.

Every row is a pure function of `(index, seed, size_px, glyph_set, split)` and the mix of kinds, so it does not depend
on how many processes draw it. What a scene holds, and which prompts are held out, is said in `icon_records.py`.

This file knows nothing of models, tokenizers or training captions.
"""

import json
import random
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from PIL import Image

from .icon_glyphs import (
    BACKGROUND_COLORS,
    GLYPH_SETS,
    OBJECT_COLORS,
    glyph_categories,
    glyph_search_terms,
    render_glyph,
)
from .icon_records import (
    DEFAULT_KINDS,
    KINDS,
    SPLITS,
    check_choice,
    check_exact_share,
    describe,
    is_held_out,
    kind_weights,
    sample_scene,
)


__all__ = [
    "BACKGROUND_COLORS",
    "DEFAULT_KINDS",
    "GLYPH_SETS",
    "KINDS",
    "OBJECT_COLORS",
    "SPLITS",
    "describe",
    "draw",
    "draw_scene",
    "icon_scenes_dataset",
    "icon_scenes_stream",
    "is_held_out",
    "render_glyph",
    "sample_scene",
    "scene_features",
    "scene_masks",
]

MIN_SIZE_PX = 16
_ROWS_PER_SHARD = 256


def _check_size(size_px: int) -> None:
    if size_px < MIN_SIZE_PX:
        raise ValueError(f"`size_px`={size_px} is too small for the glyphs to show. Use at least {MIN_SIZE_PX}.")


def _keywords(scene: Mapping[str, Any], rng: random.Random) -> list[str]:
    """Glyph names, colours and up to three search terms of each glyph, without repeats."""
    words = [word for item in scene["objects"] for word in (item["glyph"], item["color"])]
    for glyph in dict.fromkeys(item["glyph"] for item in scene["objects"]):
        terms = glyph_search_terms(glyph)
        words += rng.sample(terms, min(3, len(terms)))
    return list(dict.fromkeys(words))


def _place_objects(scene: Mapping[str, Any], size_px: int) -> list[tuple[np.ndarray, int, int]]:
    """Gives each object's mask with the column and row of its top left pixel."""
    placed = []
    for item in scene["objects"]:
        # Rounded down, so that objects with a gap of at least one pixel in the record never touch in the picture.
        mask = render_glyph(item["glyph"], max(1, int(item["size"] * size_px)))
        height, width = mask.shape
        left = int(item["x"] * size_px - width / 2 + 0.5)
        top = int(item["y"] * size_px - height / 2 + 0.5)
        placed.append((mask, min(max(left, 0), size_px - width), min(max(top, 0), size_px - height)))
    return placed


def _paint(scene: Mapping[str, Any], placed: list[tuple[np.ndarray, int, int]], size_px: int) -> Image.Image:
    background = np.array(BACKGROUND_COLORS[scene["background"]], dtype=np.int32)
    canvas = np.empty((size_px, size_px, 3), dtype=np.uint8)
    canvas[:] = background
    for item, (mask, left, top) in zip(scene["objects"], placed, strict=True):
        contrast = np.array(OBJECT_COLORS[item["color"]], dtype=np.int32) - background
        painted = background + (mask[:, :, None] * contrast + 127) // 255
        canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = painted
    return Image.fromarray(canvas)


def draw(scene: Mapping[str, Any] | str, size_px: int) -> Image.Image:
    """Draws a scene record at any size.

    Args:
        scene (`Mapping` or `str`): Record from `sample_scene`, or the JSON string of a row's `scene` column.
        size_px (`int`): Side of the square picture in pixels, at least `MIN_SIZE_PX`.

    Returns:
        `PIL.Image.Image`: RGB picture of `(size_px, size_px)`.

    Raises:
        ValueError: If the picture is too small.

    """
    _check_size(size_px)
    record = json.loads(scene) if isinstance(scene, str) else scene
    return _paint(record, _place_objects(record, size_px), size_px)


def scene_masks(scene: Mapping[str, Any] | str, size_px: int) -> np.ndarray:
    """Draws the segmentation of a scene.

    Args:
        scene (`Mapping` or `str`): Record from `sample_scene`, or the JSON string of a row's `scene` column.
        size_px (`int`): Side of the square picture in pixels, at least `MIN_SIZE_PX`.

    Returns:
        `np.ndarray` of shape `(objects, size_px, size_px)`, uint8: each object's coverage in 0..255. No pixel is
        covered by two objects.

    Raises:
        ValueError: If the picture is too small.

    """
    _check_size(size_px)
    record = json.loads(scene) if isinstance(scene, str) else scene
    return _paste_masks(_place_objects(record, size_px), size_px)


def _paste_masks(placed: list[tuple[np.ndarray, int, int]], size_px: int) -> np.ndarray:
    masks = np.zeros((len(placed), size_px, size_px), dtype=np.uint8)
    for layer, (mask, left, top) in zip(masks, placed, strict=True):
        layer[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return masks


def draw_scene(
    index: int,
    seed: int = 0,
    size_px: int = 64,
    glyph_set: str = "shapes",
    split: str = "train",
    *,
    kinds: Mapping[str, float] | None = None,
    exact_share: float = 0.0,
    with_masks: bool = False,
) -> dict[str, Any]:
    """Draws one row of the dataset, a pure function of its arguments.

    Args:
        index (`int`): Number of the row, at least 0.
        seed (`int`): Another seed gives another dataset with the same held-out combinations.
        size_px (`int`): Side of the square picture in pixels, at least `MIN_SIZE_PX`.
        glyph_set (`str`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        split (`str`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`, *optional*): Weight of each kind of scene; see `sample_scene`.
        exact_share (`float`, defaults to 0.0): Share of scenes without small shifts; see `sample_scene`.
        with_masks (`bool`): Adds the column `masks`, as from `scene_masks`.

    Returns:
        `dict`: `image` (RGB), `description`, `keywords`, `categories`, `boxes` (each with `label`, `color` and `box`,
        the pixels `[x0, y0, x1, y1]` with x1 and y1 exclusive) and `scene`, the record as a JSON string.

    Raises:
        ValueError: If an argument is out of range or unknown.

    """
    _check_size(size_px)
    scene = sample_scene(index, seed, glyph_set=glyph_set, split=split, kinds=kinds, exact_share=exact_share)
    placed = _place_objects(scene, size_px)
    wording_rng = random.Random(f"words|{glyph_set}|{split}|{seed}|{index}")
    labels = [label for item in scene["objects"] for label in glyph_categories(item["glyph"])]
    boxes = [(left, top, left + mask.shape[1], top + mask.shape[0]) for mask, left, top in placed]
    row = {
        "image": _paint(scene, placed, size_px),
        "description": describe(scene, wording_rng),
        "keywords": _keywords(scene, wording_rng),
        "categories": list(dict.fromkeys(labels)),
        "boxes": [
            {"label": item["glyph"], "color": item["color"], "box": list(box)}
            for item, box in zip(scene["objects"], boxes, strict=True)
        ],
        "scene": json.dumps(scene),
    }
    if with_masks:
        row["masks"] = _paste_masks(placed, size_px)
    return row


def scene_features(size_px: int, with_masks: bool = False) -> datasets.Features:
    """Gives the column types of the rows that `draw_scene` draws at this size."""
    columns: dict[str, Any] = {
        "image": datasets.Image(),
        "description": datasets.Value("string"),
        "keywords": datasets.List(datasets.Value("string")),
        "categories": datasets.List(datasets.Value("string")),
        "boxes": datasets.List(
            {
                "label": datasets.Value("string"),
                "color": datasets.Value("string"),
                "box": datasets.List(datasets.Value("int32"), length=4),
            }
        ),
        "scene": datasets.Value("string"),
    }
    if with_masks:
        columns["masks"] = datasets.Array3D(shape=(None, size_px, size_px), dtype="uint8")
    return datasets.Features(columns)


def _generate_rows(
    row_ranges: list[tuple[int, int]],
    seed: int,
    size_px: int,
    glyph_set: str,
    split: str,
    kinds: Mapping[str, float],
    exact_share: float,
    with_masks: bool,
) -> Iterator[dict[str, Any]]:
    for start, stop in row_ranges:
        for index in range(start, stop):
            yield draw_scene(
                index, seed, size_px, glyph_set, split, kinds=kinds, exact_share=exact_share, with_masks=with_masks
            )


def _generator_options(
    num_rows: int,
    num_shards: int,
    *,
    glyph_set: str,
    size_px: int,
    split: str,
    seed: int,
    kinds: Mapping[str, float] | None,
    exact_share: float,
    with_masks: bool,
) -> dict[str, Any]:
    """Checks the arguments that both datasets share and cuts the rows into shards of nearly one length."""
    if num_rows < 1:
        raise ValueError(f"`num_rows`={num_rows} must be at least 1.")
    if num_shards < 1:
        raise ValueError(f"`num_shards`={num_shards} must be at least 1.")
    _check_size(size_px)
    check_choice("split", split, SPLITS)
    check_exact_share(exact_share)
    shards = min(num_shards, num_rows)
    edges = [shard * num_rows // shards for shard in range(shards + 1)]
    return {
        "row_ranges": list(zip(edges[:-1], edges[1:], strict=True)),
        "seed": seed,
        "size_px": size_px,
        "glyph_set": glyph_set,
        "split": split,
        "kinds": kind_weights(kinds, glyph_set),
        "exact_share": exact_share,
        "with_masks": with_masks,
    }


def _drawing_version() -> str:
    """Hashes what the pictures depend on beside the arguments, so that a cached dataset is never a stale one."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("icon_*.py"))]
    return Hasher.hash([sources, version("fontawesomefree"), version("pillow")])


def icon_scenes_dataset(
    num_rows: int,
    *,
    glyph_set: str = "shapes",
    size_px: int = 64,
    split: str = "train",
    seed: int = 0,
    kinds: Mapping[str, float] | None = None,
    exact_share: float = 0.0,
    with_masks: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Draws a map-style dataset, cached on disk by `datasets`; row `i` is `draw_scene(i, ...)`.

    Args:
        num_rows (`int`): Number of rows, at least 1.
        glyph_set (`str`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        size_px (`int`): Side of the square pictures in pixels, at least `MIN_SIZE_PX`.
        split (`str`): `"train"` or `"validation"`.
        seed (`int`): Another seed gives another dataset with the same held-out combinations.
        kinds (`Mapping[str, float]`, *optional*): Weight of each kind of scene; see `sample_scene`.
        exact_share (`float`, defaults to 0.0): Share of scenes without small shifts; see `sample_scene`.
        with_masks (`bool`): Adds the column `masks`.
        num_proc (`int`, *optional*): Number of drawing processes. The rows do not depend on it.

    Returns:
        `datasets.Dataset`: columns as in `scene_features`.

    Raises:
        ValueError: If an argument is out of range or unknown.

    """
    options = _generator_options(
        num_rows,
        -(-num_rows // _ROWS_PER_SHARD),
        glyph_set=glyph_set,
        size_px=size_px,
        split=split,
        seed=seed,
        kinds=kinds,
        exact_share=exact_share,
        with_masks=with_masks,
    )
    return datasets.Dataset.from_generator(
        _generate_rows,
        features=scene_features(size_px, with_masks),
        gen_kwargs=options,
        num_proc=num_proc,
        split=datasets.NamedSplit(split),
        fingerprint=Hasher.hash([options, _drawing_version()]),
    )


def icon_scenes_stream(
    num_rows: int,
    *,
    glyph_set: str = "shapes",
    size_px: int = 64,
    split: str = "train",
    seed: int = 0,
    kinds: Mapping[str, float] | None = None,
    exact_share: float = 0.0,
    with_masks: bool = False,
    num_shards: int = 64,
) -> datasets.IterableDataset:
    """Draws the same rows as `icon_scenes_dataset` while they are read, storing nothing.

    The rows are cut into `num_shards` runs, which `datasets.distributed.split_dataset_by_node` and the workers of a
    `DataLoader` share out; one reader alone gets them in order. Rows cost nothing until drawn, so `num_rows` may be
    as large as a run could ever read.

    Args:
        num_rows (`int`): Number of rows, at least 1.
        glyph_set (`str`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        size_px (`int`): Side of the square pictures in pixels, at least `MIN_SIZE_PX`.
        split (`str`): `"train"` or `"validation"`.
        seed (`int`): Another seed gives another dataset with the same held-out combinations.
        kinds (`Mapping[str, float]`, *optional*): Weight of each kind of scene; see `sample_scene`.
        exact_share (`float`, defaults to 0.0): Share of scenes without small shifts; see `sample_scene`.
        with_masks (`bool`): Adds the column `masks`.
        num_shards (`int`):
            Number of runs; a multiple of (processes x workers) keeps every reader equally busy. At most `num_rows`.

    Returns:
        `datasets.IterableDataset`: columns as in `scene_features`.

    Raises:
        ValueError: If an argument is out of range or unknown.

    """
    options = _generator_options(
        num_rows,
        num_shards,
        glyph_set=glyph_set,
        size_px=size_px,
        split=split,
        seed=seed,
        kinds=kinds,
        exact_share=exact_share,
        with_masks=with_masks,
    )
    return datasets.IterableDataset.from_generator(
        _generate_rows,
        features=scene_features(size_px, with_masks),
        gen_kwargs=options,
        split=datasets.NamedSplit(split),
    )
