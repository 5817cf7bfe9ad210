"""Guidance in one forward per token, for any decoder-only class of transformers.

`generate` is the library's own and keeps one row per sequence; only the forward sees the rows of all streams. Knows
ids; what is done to the scores is in `logits_cm3leon.py`.
"""

# Axes: S streams, B rows, L sequence.

from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin, LogitsProcessorList

from .logits_cm3leon import FoldStreamsLogitsProcessor


def pad_left(rows: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Widens ids and their mask to `length` columns by padding in front, whose ids are never read."""
    extra = length - rows.shape[-1]
    return F.pad(rows, (extra, 0)), F.pad(mask, (extra, 0))


def stack_streams(input_ids: torch.Tensor, negative_input_ids: torch.Tensor | None) -> torch.Tensor:
    """Lists the ids of all rows of all streams, which have the answer so far in common.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`): Prompts, and the answer so far behind them.
        negative_input_ids (`torch.LongTensor` of shape `(batch_size, num_streams - 1, prompt_length)`, *optional*):
            Prompts of the other streams, as long as those.

    Returns:
        `torch.LongTensor` of shape `(num_streams * batch_size, length)`: stream by stream.
    """
    if negative_input_ids is None:
        return input_ids
    prompts = negative_input_ids.transpose(0, 1).flatten(0, 1)
    answers = input_ids[:, prompts.shape[1] :].repeat(negative_input_ids.shape[1], 1)
    return torch.cat([input_ids, torch.cat([prompts, answers], -1)])


class GuidedGenerationMixin(GenerationMixin):
    """`generate` with guidance in one forward per token: the streams of all rows are one batch with one cache.

    Goes in front of any decoder-only class of transformers: `class Guided(GuidedGenerationMixin, LlamaForCausalLM)`.
    """

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as the library does; with guidance, both streams in one batch instead of two forwards.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts, padded on the left; also taken as `input_ids`.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
                Unconditional prompts, padded on the left; one row serves all. Without them `guidance_scale` is the
                library's own, which forwards twice.
            negative_prompt_attention_mask (`torch.LongTensor` of the same shape, *optional*): 0 on their padding.
            kwargs: Those of the library's `generate`.

        Returns:
            What the library returns.

        Raises:
            ValueError: If guidance is asked for together with beams.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        scale = kwargs.get("guidance_scale", settings.guidance_scale)
        if negative_prompt_ids is None or scale in (None, 1):
            return super().generate(inputs, **kwargs)
        if (num_beams := kwargs.get("num_beams", settings.num_beams) or 1) != 1:
            raise ValueError(f"`num_beams`={num_beams} must be 1 with guidance: beams would part the streams.")
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids")
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        negative_mask = negative_prompt_attention_mask
        negative_mask = torch.ones_like(negative_prompt_ids) if negative_mask is None else negative_mask
        negative_ids, negative_mask = (
            rows.expand(len(input_ids), -1)[:, None] for rows in (negative_prompt_ids, negative_mask)
        )
        return self._generate_streams(
            input_ids,
            mask,
            negative_ids,
            negative_mask,
            fold=FoldStreamsLogitsProcessor((scale,)),
            **{**kwargs, "guidance_scale": 1.0},
        )

    def _generate_streams(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        negative_input_ids: torch.Tensor,
        negative_attention_mask: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """Generates with further streams, ids and mask of shape `(B, S - 1, L)`, taking all to one length."""
        width = input_ids.shape[1]
        length = max(width, negative_input_ids.shape[-1])
        input_ids, attention_mask = pad_left(input_ids, attention_mask, length)
        negative_input_ids, negative_attention_mask = pad_left(negative_input_ids, negative_attention_mask, length)
        if length > width:
            kwargs |= self._lengthen_limits(kwargs, length - width)
        output = super().generate(
            input_ids,
            attention_mask=attention_mask,
            negative_input_ids=negative_input_ids,
            negative_attention_mask=negative_attention_mask,
            **kwargs,
        )
        if isinstance(output, torch.Tensor):
            return output[:, length - width :]
        output.sequences = output.sequences[:, length - width :]
        return output

    def _lengthen_limits(self, kwargs: dict[str, Any], num_padding: int) -> dict[str, int]:
        """Adds padding in front to the limits that count the prompt, wherever they are set."""
        settings = vars(self.generation_config).copy()
        for given in (vars(kwargs.get("generation_config") or self.generation_config), kwargs):
            settings |= {name: value for name, value in given.items() if value is not None}
        kinds = [kind for kind in ("max", "min") if settings[f"{kind}_new_tokens"] is None]
        limits = {f"{kind}_length": settings[f"{kind}_length"] for kind in kinds}
        return {name: limit + num_padding for name, limit in limits.items() if limit is not None}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        fold: Any = None,
        sole_processors: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        next_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Puts the rows of the other streams below those of the sequences; all have the same answer so far."""
        prepare = super().prepare_inputs_for_generation
        if negative_input_ids is None:
            return prepare(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                next_sequence_length=next_sequence_length,
                **kwargs,
            )
        num_streams = negative_input_ids.shape[1] + 1
        num_new = input_ids.shape[1] - negative_input_ids.shape[-1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        below = negative_attention_mask.transpose(0, 1).flatten(0, 1)  # ((S - 1) * B, L)
        mask = torch.cat([mask, F.pad(below, (0, num_new), value=1)])
        if next_sequence_length is not None and next_sequence_length <= num_new:
            rows = input_ids[:, -next_sequence_length:].repeat(num_streams, 1)
        else:
            rows = stack_streams(input_ids, negative_input_ids)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return prepare(
            rows, attention_mask=mask, position_ids=positions, next_sequence_length=next_sequence_length, **kwargs
        )

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Folds the streams before the library's processors, or takes the only ones that a drawing has."""
        model_kwargs = kwargs.get("model_kwargs") or {}
        if (sole := model_kwargs.get("sole_processors")) is not None:
            return sole
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if (fold := model_kwargs.get("fold")) is not None:
            processors.insert(0, fold)
        return processors


__all__ = ["GuidedGenerationMixin"]
