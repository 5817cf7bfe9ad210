"""Pictures to tensors for CM3Leon: crop, resize and scale to [-1, 1], all of the one size the model reads."""

import reprlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


LONGEST = 16  # long sides over short: what is beyond, the centre crop leaves nothing of


def picture_to_rgb(image: Image.Image) -> np.ndarray:
    """Turns a picture of any mode upright, lays transparent parts on white, and scales 16-bit grey to 8 bits.

    Args:
        image (`PIL.Image.Image`): The picture.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: its pixels, from 0 to 255.

    Raises:
        ValueError: If it has no pixels, is unreadable, or its mode has no defined range.
    """
    if image.width * image.height == 0:
        raise ValueError(f"`images` has a zero-sized picture, {image.width} x {image.height} pixels.")
    if image.mode == "F":
        raise ValueError(
            "`images` has a picture of floats, which have no defined range. Give one of 8 bits a channel."
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray(np.round(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly every type on damaged files and metadata
        raise ValueError(
            f"`images` has a picture of mode {image.mode} that cannot be read ({type(error).__name__}: {error}). Save "
            "it anew, as RGB."
        ) from error


def check_array(image: np.ndarray) -> None:
    """Refuses arrays that are no pictures.

    Raises:
        ValueError: If it is not of finite numbers, has no pixels, or neither two nor three axes.
    """
    shown = f"`images` has an array of shape {image.shape} and type {image.dtype}"
    if image.dtype.kind not in "buif":
        raise ValueError(f"{shown}; pictures are of whole numbers or floats.")
    if image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(
            f"{shown}; a picture is (height, width), (height, width, 3) or (3, height, width), not empty."
        )
    if not np.isfinite(image).all():
        raise ValueError(f"{shown} with NaN or infinite entries; pictures are of finite numbers.")


def cut_ends(image: np.ndarray) -> np.ndarray:
    """Cuts the ends of a very long picture, which would be resized at great cost only to be cropped.

    Args:
        image (`np.ndarray` of shape `(channels, height, width)`): The picture.

    Returns:
        `np.ndarray`: its middle, at most 16 times as long as wide.
    """
    height, width = image.shape[-2:]
    longest = LONGEST * min(height, width)
    top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
    return image[..., top : height - top, left : width - left]


class CM3LeonImagesKwargs(ImagesKwargs, total=False):
    """Arguments of [`CM3LeonImageProcessor`] beyond the library's.

    vq_stride (`int`): Pixels per code, along each side.
    """

    vq_stride: int


class CM3LeonImageProcessor(PilBackend):
    """Prepares pictures: RGB on white, shortest side resized, centre cropped, scaled to [-1, 1].

    Every picture has as many codes as the model's image span is long, so all come out at the size of `crop_size`;
    with `do_resize=False` and `do_center_crop=False` they must have it already.

    Source: CM3Leon (arXiv 2309.02591), section 2.1 (256 px, 1024 codes).
    """

    valid_kwargs = CM3LeonImagesKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.LANCZOS
    do_center_crop = True
    crop_size = {"height": 256, "width": 256}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_pad = False
    vq_stride = 8

    def __init__(self, **kwargs: Unpack[CM3LeonImagesKwargs]) -> None:
        super().__init__(**kwargs)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of a picture."""
        return self.crop_size["height"] // self.vq_stride, self.crop_size["width"] // self.vq_stride

    def convert_to_rgb(self, image: np.ndarray | Image.Image, input_data_format: str | None = None) -> np.ndarray:
        """Turns a picture upright and lays transparent parts on white; arrays pass as they are."""
        if not isinstance(image, Image.Image):
            return super().convert_to_rgb(image, input_data_format=input_data_format)
        return picture_to_rgb(image)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens pictures that are named by path or address, refusing what is no picture.

        Raises:
            ValueError: If one cannot be opened; it says why.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        try:
            return super().fetch_images(image_url_or_urls)
        except Exception as error:  # decoders raise nearly every type on damaged files
            raise ValueError(
                f"`images`: {reprlib.repr(image_url_or_urls)} is no picture that can be opened "
                f"({type(error).__name__}: {error}). Give a picture, an array, or the path or address of a file."
            ) from error

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Makes an array of a picture, channels first.

        Raises:
            ValueError: If it has no pixels, or an array has others than finite numbers.
        """
        if not isinstance(image, Image.Image):
            check_array(np.asarray(image))
        return super().process_image(image, *args, **kwargs)

    def _preprocess(
        self,
        images: list[np.ndarray],
        vq_stride: int,
        return_tensors: str | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Runs the library's steps, then refuses pictures of another number of codes."""
        if not images:
            raise ValueError("`images` is empty; give at least one picture.")
        if kwargs.get("do_resize") and kwargs.get("do_center_crop"):
            images = [cut_ends(image) for image in images]
        processed = super()._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]
        wanted = self.crop_size["height"], self.crop_size["width"]
        for index, image in enumerate(processed):
            if (size := tuple(image.shape[-2:])) != wanted:
                raise ValueError(
                    f"`images`[{index}] is {size[0]} x {size[1]} pixels after preprocessing, "
                    f"{size[0] / vq_stride * size[1] / vq_stride:g} codes; the model reads {wanted[0]} x {wanted[1]}, "
                    f"{self.grid[0] * self.grid[1]} codes. Leave `size` and `crop_size` as they were saved."
                )
        data = {"pixel_values": [image.astype(np.float32) for image in processed]}
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["CM3LeonImageProcessor"]
