"""Pictures of every kind, whole and broken, for the doors that take pictures."""

import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_mm import CM3LeonImageProcessor, TransfusionImageProcessor
from hf_mm.data.formats import open_image

from .models import build_pipelines
from .values import damage, odd_text, odd_value


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "La", "RGBa", "RGBX",
         "I;16", "I;16B")  # fmt: skip
FORMATS = {"PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P"),
           "BMP": ("1", "L", "P", "RGB"), "TIFF": ("1", "L", "I;16", "F", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA"),
           "PPM": ("L", "RGB"), "TGA": ("L", "RGBA"), "ICO": ("RGBA",), "JPEG2000": ("L", "RGB", "RGBA")}  # fmt: skip
SIDES = (0, 1, 1, 2, 3, 7, 8, 9, 13, 31, 64)
DTYPES = ("uint8", "uint8", "bool", "int8", "uint16", "int16", "int32", "int64", "uint64", "float16", "float32",
          "float64", "complex64", "object", "U1")  # fmt: skip
ORIENTATION = 0x0112


def draw_picture(rng: Random, modes: tuple[str, ...] = MODES) -> Image.Image:
    """Draws a picture of any mode and size, with what may hang on to one: transparency, EXIF, a palette."""
    mode, width, height = rng.choice(modes), rng.choice(SIDES), rng.choice(SIDES)
    if rng.random() < 0.04:
        width, height = rng.choice(((20_000, 1), (1, 20_000), (3000, 2), (100_000, 0), (1500, 1500)))
    picture = Image.new(mode, (width, height))
    if rng.random() < 0.8 and width * height:
        try:
            picture.frombytes(rng.randbytes(len(picture.tobytes())))
        except (ValueError, SystemError):
            pass  # some modes take no bytes
    if mode == "P" and rng.random() < 0.7:
        picture.putpalette([rng.randrange(256) for _ in range(3 * rng.choice((1, 2, 256)))])
    if rng.random() < 0.2:
        picture.info["transparency"] = rng.choice((0, 255, 300, (1, 2, 3), (1, 2), b"\x00\x80", b"", "x", None))
    if rng.random() < 0.2:
        picture.getexif()[ORIENTATION] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535))
    if rng.random() < 0.05:
        picture.info["exif"] = rng.choice((b"Exif\x00\x00", b"garbage", rng.randbytes(40)))
    return picture


def encode_picture(rng: Random) -> bytes:
    """Draws the bytes of a picture file, maybe animated, with EXIF or a palette; maybe damaged."""
    name = rng.choice(list(FORMATS))
    picture = draw_picture(rng, FORMATS[name])
    picture.info.clear()
    options: dict[str, Any] = {}
    if name in ("GIF", "WEBP", "PNG", "TIFF") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [picture.copy() for _ in range(rng.choice((1, 3)))]}
    if name in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[ORIENTATION] = rng.choice((1, 3, 6, 8, 77))
        options["exif"] = exif
    if picture.mode in ("P", "RGB", "L") and name in ("PNG", "GIF") and rng.random() < 0.3:
        options["transparency"] = rng.choice((0, 5)) if picture.mode != "RGB" else (1, 2, 3)
    file = io.BytesIO()
    try:
        picture.save(file, name, **options)
    except Exception:
        return name.encode()  # what Pillow itself cannot write, such as a picture without pixels
    data = file.getvalue()
    return damage(data, rng) if rng.random() < 0.5 else data


def draw_array(rng: Random) -> np.ndarray:
    """Draws an array of any type, number of axes and values, NaN included."""
    shape = tuple(rng.choice(SIDES) for _ in range(rng.choice((0, 1, 2, 2, 3, 3, 3, 3, 4))))
    if len(shape) == 3 and rng.random() < 0.8:
        shape = (*shape[:2], rng.choice((1, 3, 3, 3, 4, 2, 5))) if rng.random() < 0.7 else (3, *shape[:2])
    dtype = rng.choice(DTYPES)
    noise = np.asarray(np.random.default_rng(rng.randrange(2**32)).random(shape) * rng.choice((1, 2, 255, 1e6)))
    if dtype.startswith("float") and noise.size and rng.random() < 0.4:
        noise.flat[rng.randrange(noise.size)] = rng.choice((np.nan, np.inf, -np.inf, -3.0, 1e30))
    with np.errstate(all="ignore"):
        return np.asarray(noise, dtype=dtype)


def draw_image(rng: Random, folder: Path) -> Any:
    """Draws a picture in any form that a door may be given: object, bytes, path, array, tensor, struct, or none."""
    kind = rng.random()
    if kind < 0.4:
        return draw_picture(rng)
    if kind < 0.6:
        array = draw_array(rng)
        return torch.from_numpy(array) if rng.random() < 0.25 and array.dtype.kind in "bif" else array
    if kind < 0.75:
        return encode_picture(rng)
    if kind < 0.85:
        path = folder / rng.choice(("a.png", "b.jpg", "c"))
        path.write_bytes(encode_picture(rng))
        return rng.choice((path, str(path), folder, str(folder / "missing.png")))
    if kind < 0.95:
        data = encode_picture(rng)
        return rng.choice(({"bytes": data, "path": None}, {"bytes": data}, {"path": None, "bytes": None}, {}))
    return odd_value(rng)


def show_image(value: Any) -> str:
    """Describes a picture in a line."""
    if isinstance(value, Image.Image):
        return f"picture of mode {value.mode}, {value.size}, info {str(value.info)[:80]}"
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    if isinstance(value, list):
        return f"[{', '.join(map(show_image, value))}]"
    return repr(value)[:120]


class ImageInputs:
    """Draws pictures and the door that each is given to.

    Args:
        folder (`Path`): For files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.pipelines = folder, build_pipelines()
        self.processors = {name: [pipe.processor.image_processor] for name, pipe in self.pipelines.items()}
        self.processors["transfusion"].append(TransfusionImageProcessor())  # at 256 px, as models of size have it
        self.processors["cm3leon"].append(CM3LeonImageProcessor())

    def draw(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Returns the name of a door, a call of it, and the input as text."""
        image = draw_image(rng, self.folder)
        family = rng.choice(list(self.pipelines))
        pipeline = self.pipelines[family]
        door, kind = f"{family} image processor", rng.random()
        call: Callable[[], Any]
        if kind < 0.4:
            door, call = "open_image", lambda: open_image(image).tobytes()
        elif kind < 0.75:
            images = [image, draw_picture(rng)] if rng.random() < 0.2 else image
            options = rng.choice(({}, {}, {"do_resize": False}, {"do_resize": False, "do_center_crop": False}))
            processor = self.processors[family][rng.random() < 0.2]
            return door, lambda: self._prepare(processor, images, options), show_image(images)
        elif kind < 0.85:
            text = rng.choice(("<image>a", None, odd_text(rng, 50)))
            door = f"{family} processor"
            call = lambda: pipeline.processor(text=text, images=image, return_tensors="pt")  # noqa: E731
        elif kind < 0.92:
            door, call = f"{family} caption", lambda: pipeline.caption(image, max_new_tokens=1)
        else:
            options = {"num_inference_steps": 1} if family == "transfusion" else {"guidance_scale": 1.0}
            door, call = f"{family} drawing", lambda: pipeline("a red star", image=image, **options)
        return door, call, show_image(image)

    @staticmethod
    def _prepare(processor: Any, images: Any, options: dict[str, Any]) -> None:
        """Prepares pictures, and looks at whether what comes out is what a model reads."""
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(torch.isfinite(pixels).all()):
            raise AssertionError(f"prepared pictures of shape {tuple(pixels.shape)}, or with numbers that are none")
