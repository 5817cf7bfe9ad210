"""Pictures to tensors, with or without noise: what an image tokenizer is trained on. Knows rows, not models."""

import torch
from datasets import Dataset
from diffusers.image_processor import VaeImageProcessor

from .formats import center_crop_resize, open_image
from .mixing import SampleKey, sample_generator


class TrainingPictures(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Pictures as tensors in [-1, 1]; for a posterior each with noise that its number alone decides.

    Args:
        rows (`datasets.Dataset`): With a column `image`.
        image_size (`int`): Pixels of a side; pictures are cropped and resized.
        latent_shape (`tuple[int, int, int]`, *optional*): Channels, height and width of the noise; none: no noise.
        seed (`int`): Of the noise.
    """

    def __init__(
        self, rows: Dataset, image_size: int, latent_shape: tuple[int, int, int] | None = None, seed: int = 0
    ) -> None:
        self.rows, self.image_size, self.latent_shape, self.seed = rows, image_size, latent_shape, seed
        self.processor = VaeImageProcessor(do_resize=False)

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        """Builds one sample: `pixel_values` and, with a latent shape, `latent_noise`."""
        if self.latent_shape is None:
            return {"pixel_values": self.pixels(key.row)}
        noise = torch.randn(self.latent_shape, generator=sample_generator(self.seed, key.number))
        return {"pixel_values": self.pixels(key.row), "latent_noise": noise}

    def first(self, num_pictures: int) -> torch.Tensor:
        """Reads the first pictures, (N, 3, H, W)."""
        return torch.stack([self.pixels(number) for number in range(min(num_pictures, len(self.rows)))])

    def draw(self, num_pictures: int, generator: torch.Generator) -> torch.Tensor:
        """Draws pictures, (N, 3, H, W), none twice."""
        numbers = torch.randperm(len(self.rows), generator=generator)[:num_pictures]
        return torch.stack([self.pixels(number) for number in numbers.tolist()])

    def pixels(self, number: int) -> torch.Tensor:
        """Reads one picture, (3, H, W)."""
        image = center_crop_resize(open_image(self.rows[number]["image"]), self.image_size)
        return self.processor.preprocess(image)[0]
