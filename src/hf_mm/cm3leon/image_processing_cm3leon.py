"""Pictures to tensors for CM3Leon: crop, resize and scale to [-1, 1], all of the one size the model reads."""

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


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
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return np.array(image.convert("RGB"))

    def _preprocess(
        self,
        images: list[np.ndarray],
        vq_stride: int,
        return_tensors: str | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Runs the library's steps, then refuses pictures of another number of codes."""
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
