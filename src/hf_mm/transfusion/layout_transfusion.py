"""Where images stand in a sequence, what a forward returns, and the inputs that are refused; no weights.

Knows ids, masks and positions of a batch. The model reads and predicts; this file says what belongs where.
"""

# Axes: B rows, L sequence, N images of all rows in reading order, P patches per image.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class TransfusionModelOutput(BaseModelOutputWithPast):
    r"""Hidden states of text and patches, and what the way up of the images needs.

    Args:
        images (`ImageStates`, *optional*): Bookkeeping of the images read, `None` where there were none.
    """

    images: "ImageStates | None" = None


@dataclass
class TransfusionOutput(ModelOutput):
    r"""Losses and predictions of [`TransfusionForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): `text_loss + diffusion_loss_weight * image_loss`.
        text_loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy of the text targets, in nats.
        image_loss (`torch.FloatTensor` of shape `()`, *optional*): Mean squared error per latent element, then image.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Next-token scores; left out when training with labels, where only the targets' are computed.
        noise_pred (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
            What was predicted of each image, in the sense of `config.prediction_type`.
        past_key_values (`Cache`, *optional*): Keys and values of what was read.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Hidden states of each layer.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Attention weights of each layer.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    noise_pred: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ImageStates:
    """The images of one forward, grouped by size so that each group is one call of the patch layers.

    Args:
        groups (`list[tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]]`):
            For each size: indices of its images, its `(height, width)` in latent pixels, and the skips of the way in.
        timesteps (`torch.Tensor` of shape `(num_images,)`): The timestep each image was read at.
        patch_index (`torch.LongTensor` of shape `(num_patches,)`): Where the patches stand in the flattened batch.
    """

    groups: list[tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]]
    timesteps: torch.Tensor
    patch_index: torch.Tensor

    def lengths(self, patch_size: int) -> list[int]:
        """Patches of each image, in reading order."""
        if len(self.groups) == 1:
            height, width = self.groups[0][1]
            return [height * width // patch_size**2] * len(self.timesteps)
        lengths = [0] * len(self.timesteps)
        for index, (height, width), _ in self.groups:
            for image in index.tolist():
                lengths[image] = height * width // patch_size**2
        return lengths


def image_block_ids(is_image: torch.Tensor) -> torch.Tensor:
    """Numbers the runs of patches in each row, so that two images are never taken for one.

    Args:
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True on patches.

    Returns:
        `torch.LongTensor` of the same shape: the index of the image in its row, -1 on text.

    Example:
        >>> image_block_ids(torch.tensor([[False, True, True, False, True]]))
        tensor([[-1,  0,  0, -1,  1]])

    """
    return torch.where(is_image, image_starts(is_image).cumsum(-1) - 1, -1)


def image_starts(is_image: torch.Tensor) -> torch.Tensor:
    """Marks the first patch of each run of patches in masks of shape `(batch_size, sequence_length)`."""
    return is_image & ~F.pad(is_image, (1, 0))[:, :-1]


def refuse_unless(condition: torch.Tensor, message: str) -> None:
    """Raises a `ValueError` where `condition` is false; in a compiled graph the device raises, with no graph break."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def refuse_off_grid(height: int, width: int, patch_size: int) -> None:
    """Refuses an image that its patches do not fill.

    Raises:
        ValueError: Naming the sides and the patch size.
    """
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image is {height} x {width} latent pixels; both must be multiples of {patch_size}.")


def find_patches(is_image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Finds where the patches of the images stand, asking the device once whether the placeholders are right.

    Args:
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True on placeholders.
        places (`torch.LongTensor` of shape `(2, num_patches)`): Row and column of each patch, as of `patch_places`.

    Returns:
        `torch.LongTensor` of shape `(num_patches,)`: indices into the flattened batch.

    Raises:
        ValueError: If the runs of placeholders are not the images.
    """
    total = places.shape[1]
    # A number told would bind a compiled graph to it.
    number = "" if torch.compiler.is_compiling() else f" {total}"
    wrong_number = f"`input_ids` holds another number of image placeholders than the images'{number} patches."
    if total > is_image.numel():
        raise ValueError(wrong_number)
    # A stable sort finds the patches without asking the device how many there are.
    patch_index = torch.argsort((~is_image).flatten().to(torch.uint8), stable=True)[:total]
    is_first = (places == 0).all(0)
    has_number = is_image.sum() == total
    has_lengths = (image_starts(is_image).flatten()[patch_index] == is_first).all()
    wrong_lengths = "`input_ids`: the runs of image placeholders do not have the lengths of the images, in this order."
    if torch.compiler.is_compiling():
        torch._assert_async(has_number, wrong_number)
        torch._assert_async(has_lengths, wrong_lengths)
    elif not bool(has_number & has_lengths):
        raise ValueError(wrong_lengths if bool(has_number) else wrong_number)
    return patch_index


def refuse_leaky_packing(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, past: Cache | None, use_cache: bool | None
) -> None:
    """Refuses packed documents that the library's masks would let see each other.

    Raises:
        ValueError: If positions restart within a row while a mask or a cache hides that from the library.
    """
    if (
        position_ids is None
        or position_ids.shape[-1] == 1
        or (attention_mask is None and past is None and not use_cache)
    ):
        return
    positions = position_ids
    if attention_mask is not None and attention_mask.ndim == 2:
        positions = torch.where(attention_mask[:, -position_ids.shape[-1] :].bool(), position_ids, -1)
    highest = F.pad(positions.cummax(-1).values[:, :-1], (1, 0), value=-1)  # positions before, padding left aside
    restarts = (positions >= 0) & (positions <= highest)
    refuse_unless(
        ~restarts.any(),
        "`position_ids` restart within a row (packed documents), but `attention_mask`, `past_key_values` or "
        "`use_cache` is given, with which the documents would see each other. Leave them out, with `use_cache=False`.",
    )
