"""What a forward returns, which position predicts which token, and the inputs that are refused; no weights.

Knows ids, masks and positions of a batch, not what they mean to the model.
"""

# Axes: B rows, L sequence, V vocabulary.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_cm3leon import CM3LeonConfig


@dataclass
class CM3LeonOutput(ModelOutput):
    r"""Loss and predictions of [`CM3LeonForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean cross-entropy of all targets, in nats; weighted, and with the z-loss, where the configuration has it.
        text_loss (`torch.FloatTensor` of shape `()`, *optional*): Mean cross-entropy of the targets that are no image
            codes: text, delimiters and sentinels. 0 where there are none.
        image_loss (`torch.FloatTensor` of shape `()`, *optional*): The same over the image codes.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Next-token scores; left out when training with labels, where only the targets' are computed.
        past_key_values (`Cache`, *optional*): Keys and values of what was read.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Hidden states of each layer.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Attention weights of each layer.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def shift_labels(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Aligns labels with the positions that predict them; none crosses into the next packed document.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 where there is nothing to predict.
        position_ids (`torch.LongTensor` of the same shape, *optional*): Restarts at 0 with each packed document.

    Returns:
        `torch.LongTensor` of the same shape: the next token, -100 where there is none.

    Example:
        >>> shift_labels(torch.tensor([[-100, 5, 6, -100, 7]]), torch.tensor([[0, 1, 2, 0, 1]]))
        tensor([[   5,    6, -100,    7, -100]])

    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if position_ids is not None:
        targets = targets.masked_fill(F.pad(position_ids[:, 1:] == 0, (0, 1)), -100)
    return targets


def running_positions(
    attention_mask: torch.Tensor | None, past_length: int | torch.Tensor, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    """Numbers the new tokens from where the cache ends; padding in front is not counted.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
            0 on padding.
        past_length (`int`): Tokens that the cache holds.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The new tokens.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`, or `(1, sequence_length)` without a mask.
    """
    length = inputs_embeds.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(length, device=inputs_embeds.device)[None] + past_length
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def places_in_image(input_ids: torch.Tensor, config: CM3LeonConfig) -> torch.Tensor:
    """Numbers each code by how many codes stand directly in front of it: in a whole image, its place in raster order.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Documents from their beginning.
        config ([`CM3LeonConfig`]): Tells codes from other ids.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`: -1 for what is no code.
    """
    first = config.first_image_token_id
    is_code = (input_ids >= first) & (input_ids < first + config.image_vocab_size)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_other = torch.where(is_code, -1, index).cummax(-1).values
    return torch.where(is_code, index - last_other - 1, -1)


def find_places(input_ids: torch.Tensor | None, config: CM3LeonConfig, *, goes_on: bool) -> torch.Tensor:
    """Finds the places of codes for a model that needs them and was not told.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): What is read.
        config ([`CM3LeonConfig`]): Tells codes from other ids.
        goes_on (`bool`): Whether they go on from a cache, which does not tell what was read.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`: -1 for what is no code.

    Raises:
        ValueError: If the places cannot be known, or there are more codes in a row than an image has.
    """
    needed = (
        "`image_places`, the place of each code in its image, -1 elsewhere, is needed unless `image_positions` is "
        "'running' where `inputs_embeds` are given, or codes behind a filled cache."
    )
    if input_ids is None:
        raise ValueError(needed)
    places = places_in_image(input_ids, config)
    if goes_on:
        refuse_unless((places < 0).all(), needed)
    refuse_unless(
        (places < config.tokens_per_image).all(),
        f"`input_ids` holds a run of more codes than the {config.tokens_per_image} of an image.",
    )
    return places


def refuse_unless(condition: torch.Tensor, message: str) -> None:
    """Raises a `ValueError` where `condition` is false; in a compiled graph the device raises, with no graph break."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


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
