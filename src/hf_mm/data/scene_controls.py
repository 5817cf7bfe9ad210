"""Control pictures of icon scenes, exact because they come from the scenes' masks, and pictures of letters.

What real pictures need a detector for is computed here from what was drawn: outlines, soft edges, a segmentation, a
depth, normals, a scribble. `pose` is a stand-in: icons have no joints, so it shows the horizontal and the vertical
axis of each object, crossing in its centre of mass.

This file knows masks and scene records, neither tasks nor datasets.
"""

import colorsys
import functools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .icon_glyphs import BACKGROUND_COLORS, ICONS, OBJECT_COLORS
from .icon_scenes import scene_masks


CONTROL_KINDS = ("canny", "segmentation", "hed", "pose", "depth", "normals", "scribble")
MAX_LETTERS = 3
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_FAR_GRAY, _NEAREST_GRAY = 40, 250
_AXIS_COLORS = ((255, 85, 0), (0, 170, 255))  # horizontal, vertical
_RELIEF = 3.0  # steepness of the relief that normals are taken from
_GOLDEN_RATIO = 0.618034
_SATURATIONS = (1.0, 0.75, 0.5)
_JITTER = 0.035  # swing of a scribble's lines, as a fraction of the picture
_FONT_PX = 256  # letters are rasterised once at this size and area-averaged down from it
_TEXT_WIDTH, _TEXT_HEIGHT = 0.84, 0.6  # room for letters, as fractions of the picture
_NO_INK = (0, 0, 0, 0)

Draw = Callable[[np.ndarray, Mapping[str, Any], random.Random], np.ndarray]


def _outline(mask: np.ndarray) -> np.ndarray:
    """Marks the pixels (height, width) of a mask that have a neighbour outside, the frame included."""
    solid = np.pad(mask > 127, 1)
    inner = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
    return solid[1:-1, 1:-1] & ~inner


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    """Blurs coverage in 0..255 and gives it in 0..1."""
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64) / 255


def _white_on_black(lines: np.ndarray) -> np.ndarray:
    """Makes an RGB picture of values in 0..1."""
    return np.repeat((lines * 255 + 0.5).astype(np.uint8)[:, :, None], 3, axis=2)


def _draw_canny(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    return _white_on_black(np.any([_outline(mask) for mask in masks], axis=0))


def _draw_hed(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    soft = _blur(masks.max(0), max(0.7, masks.shape[1] / 40))
    edge = np.hypot(*np.gradient(soft))
    return _white_on_black(edge / max(edge.max(), 1e-6))


def glyph_color(glyph: str) -> tuple[int, int, int]:
    """Gives the bright colour that a glyph has in segmentations, a different one for each.

    Args:
        glyph (`str`): One of `ICONS`.

    Returns:
        `tuple[int, int, int]`: RGB.
    """
    number = ICONS.index(glyph)
    # Steps of the golden ratio keep the hues of any first few glyphs as far apart as can be.
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, _SATURATIONS[number % len(_SATURATIONS)], 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_segmentation(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    picture = np.zeros((*masks.shape[1:], 3), dtype=np.uint8)
    for mask, item in zip(masks, scene["objects"], strict=True):
        picture[mask > 127] = glyph_color(item["glyph"])
    return picture


def _draw_depth(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    """Draws near as bright; the larger an object, the nearer it is taken to be."""
    depth = np.full(masks.shape[1:], _FAR_GRAY, dtype=np.float64)
    for mask, item in zip(masks, scene["objects"], strict=True):
        near = _NEAREST_GRAY - (_NEAREST_GRAY - _FAR_GRAY) * (1 - item["size"]) * 0.75
        depth += (near - _FAR_GRAY) * mask / 255
    return _white_on_black(depth / 255)


def _draw_normals(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    relief = _blur(masks.max(0), max(1.0, masks.shape[1] / 24))
    down, right = np.gradient(relief)
    normals = np.stack([-_RELIEF * right, _RELIEF * down, np.full_like(relief, 0.5)], axis=2)  # x right, y up, z out
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    return (127.5 * (normals + 1) + 0.5).astype(np.uint8)


def _draw_pose(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    picture = Image.new("RGB", masks.shape[:0:-1])
    pencil = ImageDraw.Draw(picture)
    for mask in masks:
        rows, columns = np.nonzero(mask > 127)
        row, column = round(rows.mean()), round(columns.mean())
        pencil.line([(columns.min(), row), (columns.max(), row)], fill=_AXIS_COLORS[0])
        pencil.line([(column, rows.min()), (column, rows.max())], fill=_AXIS_COLORS[1])
    return np.asarray(picture)


def _sway(length: int, rng: random.Random) -> np.ndarray:
    """Draws a slow wave of whole pixels, one for each row or column."""
    wave = np.sin(np.arange(length) * (2 * np.pi * rng.uniform(1.5, 3.0) / length) + rng.uniform(0, 2 * np.pi))
    return np.round(wave * _JITTER * length).astype(int)


def _draw_scribble(masks: np.ndarray, scene: Mapping[str, Any], rng: random.Random) -> np.ndarray:
    side = masks.shape[1]
    thickness = max(2, side // 24)
    padded = np.pad(masks.max(0), 1)  # what sways in from outside is empty
    places = np.arange(side)
    across = np.clip(places[None, :] + _sway(side, rng)[:, None], -1, side) + 1
    down = np.clip(places[:, None] + _sway(side, rng)[None, :], -1, side) + 1
    swayed = padded[down, across]
    lines = np.pad(_outline(swayed), (thickness - 1, 0))
    shifts = range(thickness)
    thick = np.any([lines[row : row + side, column : column + side] for row in shifts for column in shifts], axis=0)
    return _white_on_black(thick)


_DRAW: dict[str, Draw] = {
    "canny": _draw_canny,
    "segmentation": _draw_segmentation,
    "hed": _draw_hed,
    "pose": _draw_pose,
    "depth": _draw_depth,
    "normals": _draw_normals,
    "scribble": _draw_scribble,
}


def draw_control(kind: str, scene: Mapping[str, Any] | str, size_px: int, rng: random.Random) -> Image.Image:
    """Draws what a picture of a scene is to be drawn from.

    `canny` is the outline, one pixel wide, `hed` a soft edge, `scribble` a thick outline that sways, all white on
    black; `segmentation` has a flat colour for each glyph; `depth` is brighter the nearer (larger) an object is;
    `normals` are those of a relief of the masks (red right, green up, blue out); `pose` has each object's two axes.

    Args:
        kind (`str`): One of `CONTROL_KINDS`.
        scene (`Mapping` or `str`): Scene record, or the JSON string of it.
        size_px (`int`): Side of the square picture in pixels.
        rng (`random.Random`): Sways the lines of a scribble; the other kinds do not use it.

    Returns:
        `PIL.Image.Image`: RGB picture of `(size_px, size_px)`.

    Raises:
        ValueError: If the kind is unknown or the picture too small.
    """
    if kind not in CONTROL_KINDS:
        raise ValueError(f"`kind`={kind!r} is unknown. Choose one of {list(CONTROL_KINDS)}.")
    record = json.loads(scene) if isinstance(scene, str) else scene
    return Image.fromarray(_DRAW[kind](scene_masks(record, size_px), record, rng))


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_PX)


@functools.lru_cache(maxsize=4096)
def render_letters(text: str, size_px: int) -> np.ndarray:
    """Draws the coverage mask of letters in the middle of a square picture.

    The letters fill the width or the height that letters may have, whichever they reach first.

    Args:
        text (`str`): One to `MAX_LETTERS` capital letters.
        size_px (`int`): Side of the picture in pixels.

    Returns:
        `np.ndarray` of shape `(size_px, size_px)`, uint8: coverage in 0..255; the array refuses to be written to.

    Raises:
        ValueError: If the text is empty, too long, or has anything but capital letters.
    """
    if not 1 <= len(text) <= MAX_LETTERS or set(text) - set(ALPHABET):
        raise ValueError(f"`text`={text!r} must be 1 to {MAX_LETTERS} letters of {ALPHABET}.")
    canvas = Image.new("L", (_FONT_PX * (len(text) + 2), 2 * _FONT_PX))
    ImageDraw.Draw(canvas).text((_FONT_PX, _FONT_PX // 2), text, font=_font(), fill=255)
    ink = canvas.crop(canvas.getbbox() or _NO_INK)
    scale = size_px * min(_TEXT_WIDTH / ink.width, _TEXT_HEIGHT / ink.height)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    picture = Image.new("L", (size_px, size_px))
    picture.paste(ink.resize((width, height), Image.Resampling.BOX), ((size_px - width) // 2, (size_px - height) // 2))
    mask = np.asarray(picture)
    mask.flags.writeable = False
    return mask


def draw_letters(text: str, color: str, background: str, size_px: int) -> Image.Image:
    """Draws letters in PIL's own font.

    Args:
        text (`str`): One to `MAX_LETTERS` capital letters.
        color (`str`): Name of the letters' colour, one of `OBJECT_COLORS`.
        background (`str`): Name of the background's colour, one of `BACKGROUND_COLORS`.
        size_px (`int`): Side of the square picture in pixels.

    Returns:
        `PIL.Image.Image`: RGB picture of `(size_px, size_px)`.

    Raises:
        ValueError: If the text is empty, too long, or has anything but capital letters.
    """
    mask = render_letters(text, size_px).astype(np.int32)[:, :, None]
    ground = np.array(BACKGROUND_COLORS[background], dtype=np.int32)
    contrast = np.array(OBJECT_COLORS[color], dtype=np.int32) - ground
    return Image.fromarray((ground + (mask * contrast + 127) // 255).astype(np.uint8))
