"""The glyphs, names and colours that icon scenes are made of.

Shapes and words come from the solid style of Font Awesome Free (package `fontawesomefree`: font under SIL OFL 1.1,
icons under CC BY 4.0; brand icons are never read). A glyph is named by the English word that captions use; the icon it
is drawn from may have another name. This file knows nothing of scenes, captions or datasets.
"""

import functools
import importlib.resources
import importlib.resources.abc
import io
import json

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont


# Chosen by pairwise overlap: no two of these silhouettes share more than 0.80 of their joint area (circle and square).
SHAPES = ("star", "circle", "square", "heart", "moon", "bolt", "cloud", "key")
ICONS = SHAPES + (
    "house", "tree", "car", "truck", "bicycle", "plane", "rocket", "sailboat", "anchor", "umbrella",
    "cat", "dog", "horse", "crow", "dove", "frog", "fish", "spider", "bug", "paw", "bone", "feather",
    "leaf", "clover", "sun", "snowflake", "droplet", "mountain", "carrot", "apple", "burger",
    "bed", "chair", "couch", "cup", "bell", "lightbulb", "camera", "phone", "guitar",
    "hammer", "wrench", "pencil", "gear", "magnet", "lock", "crown", "gem",
    "gift", "trophy", "flag", "envelope", "shirt", "ghost", "skull", "hand",
)  # fmt: skip
GLYPH_SETS = {"shapes": SHAPES, "icons": ICONS}

OBJECT_COLORS = {
    "red": (215, 20, 45),
    "orange": (245, 115, 0),
    "yellow": (255, 215, 0),
    "green": (30, 150, 60),
    "blue": (30, 80, 230),
    "purple": (125, 40, 165),
    "pink": (255, 105, 190),
    "black": (15, 15, 15),
}
BACKGROUND_COLORS = {
    "white": (255, 255, 255),
    "light gray": (200, 200, 200),
    "cream": (250, 235, 200),
    "black": (15, 15, 15),
}

_ICON_NAMES = {"apple": "apple-whole", "cup": "mug-saucer"}  # words whose icon has another name
_PLURALS = {"leaf": "leaves", "fish": "fish", "couch": "couches"}
_COLOR_WORDS = {*OBJECT_COLORS, "white", "gray", "brown", "gold"}
_OUTLINE_PX = 512  # glyphs are rasterised once at this size and area-averaged down from it


def _package_folder() -> importlib.resources.abc.Traversable:
    try:
        return importlib.resources.files("fontawesomefree") / "static" / "fontawesomefree"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Icon scenes need the package `fontawesomefree`. Install it with `pip install 'hf_mm[icons]'`."
        ) from error


@functools.cache
def _metadata() -> dict:
    icons = json.loads((_package_folder() / "metadata" / "icons.json").read_text(encoding="utf-8"))
    return {word: icons[_ICON_NAMES.get(word, word)] for word in ICONS}


@functools.cache
def _categories() -> dict[str, tuple[str, ...]]:
    text = (_package_folder() / "metadata" / "categories.yml").read_text(encoding="utf-8")
    categories = yaml.safe_load(text).values()
    return {
        word: tuple(entry["label"] for entry in categories if _ICON_NAMES.get(word, word) in entry["icons"])
        for word in ICONS
    }


def _check_glyph(glyph: str) -> None:
    if glyph not in ICONS:
        raise ValueError(f"`glyph`={glyph!r} is not a known glyph. Choose one of {sorted(ICONS)}.")


def plural(glyph: str) -> str:
    """Gives the word for several of a glyph, e.g. `"leaves"` for `"leaf"`."""
    return _PLURALS.get(glyph, f"{glyph}s")


@functools.cache
def glyph_search_terms(glyph: str) -> tuple[str, ...]:
    """Lists the words Font Awesome finds this glyph by, without its own name and without words of colour.

    Terms such as "black heart" are left out because the scene gives the glyph a colour of its own.

    Args:
        glyph (`str`): One of `ICONS`.

    Returns:
        `tuple[str, ...]`: lower-case words or short phrases, in the package's order.

    Raises:
        ValueError: If the glyph is unknown.

    """
    _check_glyph(glyph)
    terms = dict.fromkeys(" ".join(str(term).lower().split()) for term in _metadata()[glyph]["search"]["terms"])
    return tuple(term for term in terms if term != glyph and _COLOR_WORDS.isdisjoint(term.split()))


@functools.cache
def glyph_categories(glyph: str) -> tuple[str, ...]:
    """Lists the labels of the Font Awesome categories that hold this glyph, e.g. `("Shapes", ...)`.

    Args:
        glyph (`str`): One of `ICONS`.

    Returns:
        `tuple[str, ...]`: labels in the package's order; empty for a glyph the package puts in no category.

    Raises:
        ValueError: If the glyph is unknown.

    """
    _check_glyph(glyph)
    return _categories()[glyph]


@functools.cache
def _solid_font() -> ImageFont.FreeTypeFont:
    font = (_package_folder() / "webfonts" / "fa-solid-900.ttf").read_bytes()
    return ImageFont.truetype(io.BytesIO(font), _OUTLINE_PX)


@functools.cache
def _outline(glyph: str) -> Image.Image:
    """Rasterises a glyph at `_OUTLINE_PX` and crops it to its ink."""
    canvas = Image.new("L", (2 * _OUTLINE_PX, 2 * _OUTLINE_PX))
    character = chr(int(_metadata()[glyph]["unicode"], 16))
    ImageDraw.Draw(canvas).text((_OUTLINE_PX, _OUTLINE_PX), character, font=_solid_font(), fill=255, anchor="mm")
    return canvas.crop(canvas.getbbox())


@functools.lru_cache(maxsize=8192)
def render_glyph(glyph: str, size_px: int) -> np.ndarray:
    """Draws a glyph's coverage mask, cropped to its ink, with the longer side `size_px` long.

    Masks are cached and must not be written to (the array refuses it).

    Args:
        glyph (`str`): One of `ICONS`.
        size_px (`int`): Longer side in pixels, at least 1.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8: coverage in 0..255; every edge row and column holds some ink.

    Raises:
        ValueError: If the glyph is unknown or the size is below 1.

    """
    _check_glyph(glyph)
    if size_px < 1:
        raise ValueError(f"`size_px`={size_px} must be at least 1.")
    outline = _outline(glyph)
    scale = size_px / max(outline.size)
    width, height = (max(1, round(side * scale)) for side in outline.size)
    small = outline.resize((width, height), Image.Resampling.BOX)
    mask = np.asarray(small.crop(small.getbbox()))
    mask.flags.writeable = False
    return mask
