"""What Transfusion is trained on: the next token of text, the noise of images, and how many of each there are.

Knows hidden states, targets and the model's last layers; not how the hidden states came about.
"""

# Axes: B rows, L sequence, D hidden, P patches per image.

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .layout_transfusion import ImageStates
from .losses_transfusion import sum_in_pieces
from .noise_transfusion import sample_timesteps


# Scores that the text loss holds at a time, 64 MiB in float32.
MAX_SCORES = 2**24


class ObjectiveMixin:
    """Both losses of [`TransfusionForConditionalGeneration`]. Source: Transfusion (arXiv 2408.11039), section 3."""

    config: Any
    model: Any
    lm_head: Any

    def timestep_sampler(self) -> Callable[..., torch.Tensor]:
        """Returns a picklable function that draws the training timesteps this model is trained at."""
        return partial(
            sample_timesteps,
            prediction_type=self.config.prediction_type,
            timestep_sampling=self.config.timestep_sampling,
            num_train_timesteps=self.config.num_train_timesteps,
        )

    def text_targets(
        self, input_ids: torch.Tensor | None, labels: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Aligns labels with the positions that predict them.

        No target where the input opens an image (the image follows, not text) and none across documents.

        Returns:
            `torch.LongTensor` of shape `(batch_size, sequence_length)`: the next token, -100 where there is none.

        Source: Transfusion, section 3, footnote on BOI.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if input_ids is not None:  # vectors alone open no image
            targets = targets.masked_fill(input_ids == self.config.boi_token_id, -100)
        if position_ids is not None:
            starts = F.pad(position_ids[:, 1:] == 0, (0, 1))
            targets = targets.masked_fill(starts, -100)
        return targets

    def count_targets(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts what the two losses of a batch are means over.

        Summed over micro-batches and processes and given to `forward`, the counts make accumulation and data
        parallelism equal to one big batch.

        Args:
            batch (`dict`): Keyword arguments of `forward`.

        Returns:
            `dict`: `num_items_in_batch`, the text targets, and `num_images_in_batch`, the images to denoise.
        """
        targets = self.text_targets(batch["input_ids"], batch["labels"], batch.get("position_ids"))
        num_images = torch.zeros((), dtype=torch.long, device=targets.device)
        if (latents := batch.get("latents", batch.get("pixel_values"))) is not None:
            clean = batch.get("clean_images")
            num_images += len(latents) if clean is None else (~clean).sum()
        return {"num_items_in_batch": (targets != -100).sum(), "num_images_in_batch": num_images}

    def _text_loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, index: torch.Tensor | None, num_items: Any
    ) -> torch.Tensor:
        """Cross-entropy at the positions of `index`, the only ones whose scores are computed, and not all at once."""
        flat, wanted = hidden.flatten(0, 1), targets.flatten()
        if index is not None:
            flat, wanted = flat[index], wanted[index]
        num_positions = max(1, MAX_SCORES // self.config.text_config.vocab_size)
        weights = [weight for weight in self.lm_head.parameters() if weight.requires_grad]
        (total,) = sum_in_pieces(self._sum_losses, flat, wanted, num_positions, weights)
        return total / ((wanted != -100).sum().clamp(min=1) if num_items is None else num_items)

    def _sum_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
        """Sums the cross-entropy of positions `(number, D)`."""
        return (F.cross_entropy(self.lm_head(hidden).float(), targets, ignore_index=-100, reduction="sum"),)

    def _predict_images(self, hidden: torch.Tensor, images: ImageStates, shape: torch.Size) -> torch.Tensor:
        """Turns the hidden states of the patches into predictions, padded like the latents of `shape`."""
        vectors = hidden.flatten(0, 1)[images.patch_index]  # (sum of P, D)
        if len(images.groups) == 1 and images.groups[0][1] == tuple(shape[-2:]):
            _, size, skips = images.groups[0]
            return self.model.patch_out(vectors.unflatten(0, (shape[0], -1)), images.timesteps, skips, size)
        pieces = vectors.split(images.lengths(self.config.patch_size))
        prediction = hidden.new_zeros(shape)
        for index, (height, width), skips in images.groups:
            group = torch.stack([pieces[image] for image in index.tolist()])
            predicted = self.model.patch_out(group, images.timesteps[index], skips, (height, width))
            prediction[index, :, :height, :width] = predicted.to(prediction.dtype)
        return prediction

    def _image_loss(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        images: ImageStates,
        clean_images: torch.Tensor | None,
        num_images: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Squared error, a mean over each image's own elements, then over the images that were noised."""
        errors = (prediction.float() - target.float()).square()
        per_image = errors.new_zeros(len(errors))
        for index, (height, width), _ in images.groups:
            per_image[index] = errors[index, :, :height, :width].mean((1, 2, 3))
        if clean_images is not None:
            per_image = per_image.masked_fill(clean_images, 0.0)
            num_images = (~clean_images).sum().clamp(min=1) if num_images is None else num_images
        return per_image.sum() / (len(errors) if num_images is None else num_images)
