"""Pictures to tensors for Transfusion: crop, resize and scale to [-1, 1], with the sizes the model's grid allows."""

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


class TransfusionImagesKwargs(ImagesKwargs, total=False):
    """Arguments of [`TransfusionImageProcessor`] beyond the library's.

    vae_stride (`int`): Pixels per latent pixel, 1 for a model on raw pixels.
    patch_size (`int`): Latent pixels per side of a patch.
    """

    vae_stride: int
    patch_size: int


class TransfusionImageProcessor(PilBackend):
    """Prepares pictures: RGB on white, shortest side resized, centre cropped, scaled to [-1, 1].

    With `do_resize=False` and `do_center_crop=False` pictures keep their sizes, which must then be multiples of
    `vae_stride * patch_size`; different sizes are padded to the largest and reported as `image_sizes`.

    Source: Transfusion (arXiv 2408.11039), section 4.1 (centre crop and resize).
    """

    valid_kwargs = TransfusionImagesKwargs
    model_input_names = ["pixel_values", "image_sizes"]

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
    vae_stride = 1
    patch_size = 2

    def __init__(self, **kwargs: Unpack[TransfusionImagesKwargs]) -> None:
        super().__init__(**kwargs)

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
        vae_stride: int,
        patch_size: int,
        return_tensors: str | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Runs the library's steps, then checks sizes against the grid and pads what differs."""
        processed = super()._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]
        stride = vae_stride * patch_size
        sizes = [image.shape[-2:] for image in processed]
        for index, (height, width) in enumerate(sizes):
            if height % stride or width % stride or not (height and width):
                raise ValueError(
                    f"`images`[{index}] is {height} x {width} pixels after preprocessing; both must be multiples of "
                    f"{stride} (VAE factor {vae_stride} x patch size {patch_size}). Change `size` and `crop_size`."
                )
        data: dict[str, object] = {}
        if len(set(sizes)) > 1:
            processed = self.pad(processed)
            data["image_sizes"] = [[height // vae_stride, width // vae_stride] for height, width in sizes]
        data["pixel_values"] = [image.astype(np.float32) for image in processed]
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["TransfusionImageProcessor"]
