"""How CM3Leon decodes: images drawn code by code, text and images in one answer.

Everything goes through the library's own `generate`, its streams through `guidance_cm3leon.py`. The first mixin serves
any decoder over text and image codes, the second is CM3Leon's. They know ids, not strings or pictures; what is done to
the scores is in `logits_cm3leon.py`.
"""

# Axes: S streams, B rows, R rows drawn (B times images per prompt), L sequence, N codes of an image.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeAlias

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers.cache_utils import Cache
from transformers.configuration_utils import get_head_shapes
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .guidance_cm3leon import GuidedGenerationMixin, pad_left, stack_streams
from .layout_cm3leon import places_in_image
from .logits_cm3leon import (
    CodeSampling,
    CodesLogitsProcessor,
    DrawTokenLogitsProcessor,
    EndTurnLogitsProcessor,
    ForbidTokensLogitsProcessor,
    GivenTokensLogitsProcessor,
    ImageSpan,
    ImageSpanLogitsProcessor,
)


Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None

# Copies of the scores that a step holds beside the streams' own: folded, warped, sorted, summed up.
SCORE_COPIES = 6


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device, without what other programs hold."""
    if device.type in ("cuda", "xpu"):
        unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return torch.accelerator.get_memory_info(device)[0] + unused
    return psutil.virtual_memory().available


def draw_noise(num_prompts: int, num_rows: int, length: int, generator: Generators, device: torch.device) -> Any:
    """Draws all the noise of a drawing, so that each row's depends on its own generator alone.

    Args:
        num_prompts (`int`): Prompts.
        num_rows (`int`): Rows drawn, a multiple of the prompts.
        length (`int`): Tokens of each row.
        generator (`torch.Generator` or a list of one per prompt or per row, *optional*): Source of the noise.
        device (`torch.device`): Where to put it.

    Returns:
        `torch.FloatTensor` of shape `(num_rows, length)`: uniform in [0, 1).

    Raises:
        ValueError: If the list has another length.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand((num_rows, length), generator=generator, device=source).to(device)
    if len(generator) not in (num_prompts, num_rows):
        raise ValueError(
            f"`generator` is a list of {len(generator)}; this drawing needs one for each of {num_prompts} prompts or "
            f"of {num_rows} pictures."
        )
    share = num_rows // len(generator)
    noise = [torch.rand((share, length), generator=one, device=one.device).to(device) for one in generator]
    return torch.cat(noise)


def close_gaps(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves what is kept of each row to its end, in order, and cuts the columns that nobody needs."""
    order = mask.long().argsort(dim=-1, stable=True)
    width = int(mask.sum(-1).max())
    return input_ids.gather(-1, order)[:, -width:], mask.gather(-1, order)[:, -width:]


class BegunImageCriteria(StoppingCriteria):
    """Ends a row as soon as its last token is an image code."""

    def __init__(self, span: ImageSpan) -> None:
        self.span = span

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Marks the rows that have begun an image."""
        return self.span.is_code(input_ids[:, -1])


class FullContextCriteria(StoppingCriteria):
    """Ends the answers of all rows where the positions of the longest one end.

    Args:
        length (`int`): Of the padded rows by then.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


class DrawingProgress(StoppingCriteria):
    """Shows a drawing as it goes on, and ends it when asked to.

    Args:
        prompt_length (`int`): Length of the prompts, padding included.
        callback (`Callable`, *optional*): Called with the number of codes so far and their ids `(num_rows, number)`.
        should_stop (`Callable`, *optional*): Asked after each code whether to leave the images as they stand.
    """

    def __init__(
        self,
        prompt_length: int,
        callback: Callable[[int, torch.Tensor], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.prompt_length = prompt_length
        self.callback = callback
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Calls back, and answers for all rows at once."""
        image_ids = input_ids[:, self.prompt_length :]
        if self.callback is not None:
            self.callback(image_ids.shape[1], image_ids)
        stop = self.should_stop is not None and self.should_stop()
        return torch.full((len(input_ids),), stop, device=input_ids.device)


class ImageGenerationMixin(GuidedGenerationMixin, ABC):
    """Draws images of a fixed number of codes, and writes text with images in between.

    A class that it goes in front of says where its codes are, what it takes for an unknown text, and how pictures of
    a prompt become codes.
    """

    @property
    @abstractmethod
    def image_span(self) -> ImageSpan:
        """Ids and length of this model's images."""

    @property
    @abstractmethod
    def never_written(self) -> list[range]:
        """Ids that stand in prompts only."""

    @abstractmethod
    def unconditional_prompt(self) -> list[int]:
        """Ids behind which an image is drawn that follows no text."""

    @abstractmethod
    def replace_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Puts the codes of pictures where their placeholders stand."""

    @apply_forward_hook  # offloaded weights are brought back by `forward` alone
    @torch.no_grad()
    def draw_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        sampling: CodeSampling | None = None,
        generator: Generators = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        span: ImageSpan | None = None,
        given_codes: torch.Tensor | None = None,
        cache_implementation: str | None = None,
    ) -> torch.LongTensor:
        """Draws images behind prompts, code by code; with guidance all streams run in one forward per code.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts, padded on the left; the token that opens an image is added where it is missing.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 on padding.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*): Images to read.
            negative_input_ids (`torch.LongTensor` of shape `(batch_size, num_streams - 1, length)`, *optional*):
                Prompts of the other streams, padded on the left. Defaults to the unconditional one.
            negative_attention_mask (`torch.Tensor` of the same shape, *optional*): 0 on padding.
            num_images_per_prompt (`int`, defaults to 1): Images drawn from each prompt.
            sampling ([`CodeSampling`], *optional*): How codes are chosen. Defaults to plain sampling.
            generator (`torch.Generator` or a list of one per prompt or per image, *optional*): Source of the noise.
            callback (`Callable`, *optional*): Called after each code with their number and the ids so far.
            should_stop (`Callable`, *optional*): Asked after each code whether to leave the images as they stand.
            span ([`ImageSpan`], *optional*): What to draw, where it is not a whole image.
            given_codes (`torch.LongTensor` of shape `(batch_size, span.tokens_per_image)`, *optional*):
                Codes from 0 that are known, -1 where the model chooses.
            cache_implementation (`str`, *optional*): As for `generate`, such as `"static"`.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_images_per_prompt, tokens_per_image)`: ids, those of one
            prompt side by side; fewer columns where `should_stop` ended it.

        Raises:
            ValueError: If a number is out of range, the prompt leaves no room, or memory does not suffice.
            FloatingPointError: If the model's scores are NaN or infinite.

        Source: CM3Leon (arXiv 2309.02591), section 3.2.
        """
        span = self.image_span if span is None else span
        sampling = CodeSampling() if sampling is None else sampling
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt`={num_images_per_prompt} must be at least 1.")
        input_ids = self.replace_images(input_ids, pixel_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask = self._open_images(input_ids, mask, span)
        streams = self._other_streams(sampling, len(input_ids), negative_input_ids, negative_attention_mask)
        width = max([input_ids.shape[1], *(value.shape[-1] for value in streams.values())])
        longest = max(int(value.sum(-1).max()) for value in (mask, streams.get("negative_attention_mask", mask)))
        self._check_room(longest, width, len(input_ids), num_images_per_prompt, sampling, span)
        input_ids, mask = pad_left(input_ids, mask, width)
        if streams:
            streams = dict(zip(streams, pad_left(*streams.values(), width), strict=True))

        num_prompts, num_rows = len(input_ids), len(input_ids) * num_images_per_prompt
        processors = sampling.processors(num_rows, num_images_per_prompt, input_ids.device)
        if given_codes is not None:
            given_codes = given_codes.repeat_interleave(num_images_per_prompt, 0)
            processors.insert(0, GivenTokensLogitsProcessor(given_codes, width))
        if sampling.do_sample:
            noise = draw_noise(num_prompts, num_rows, span.tokens_per_image, generator, input_ids.device)
            processors.append(DrawTokenLogitsProcessor(noise, width))
        cache: dict[str, Any] = {"cache_implementation": cache_implementation}
        if num_images_per_prompt > 1 and width > 1 and cache_implementation is None:
            cache = {"past_key_values": self._read_prompts(input_ids, mask, num_images_per_prompt, **streams)}
        input_ids, mask = (rows.repeat_interleave(num_images_per_prompt, 0) for rows in (input_ids, mask))
        streams = {name: rows.repeat_interleave(num_images_per_prompt, 0) for name, rows in streams.items()}
        codes_alone = CodesLogitsProcessor(span, processors)
        draw = self._generate_streams if streams else super().generate
        sequences = draw(
            input_ids,
            attention_mask=mask,
            **streams,
            sole_processors=LogitsProcessorList([codes_alone]),
            stopping_criteria=StoppingCriteriaList(
                [DrawingProgress(width, callback, should_stop)] if callback or should_stop else []
            ),
            max_new_tokens=span.tokens_per_image,
            do_sample=False,  # the last processor leaves one code only
            num_beams=1,
            num_return_sequences=1,
            min_new_tokens=0,
            guidance_scale=1.0,
            **cache,
        )
        codes_alone.refuse_unsound()
        return sequences[:, width:]

    def _read_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_images_per_prompt: int,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
    ) -> Cache:
        """Reads the prompts of all streams once for all their images, but for the last token, which draws."""
        mask = attention_mask
        if negative_attention_mask is not None:
            mask = torch.cat([mask, negative_attention_mask.transpose(0, 1).flatten(0, 1)])
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        rows = stack_streams(input_ids, negative_input_ids)
        read = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1], "use_cache": True}
        cache = self.base_model(rows[:, :-1], **read).past_key_values
        cache.batch_repeat_interleave(num_images_per_prompt)
        return cache

    @staticmethod
    def _open_images(
        input_ids: torch.Tensor, mask: torch.Tensor, span: ImageSpan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the token that opens an image, to all prompts or to none."""
        opening = torch.tensor(span.opening_token_ids, device=input_ids.device)
        is_open = torch.isin(input_ids[:, -1], opening)
        if bool(is_open.all()):
            return input_ids, mask
        if bool(is_open.any()):
            raise ValueError(
                "`input_ids`: some prompts end in the image-opening token and some do not; add it to all."
            )
        return F.pad(input_ids, (0, 1), value=span.opening_token_ids[0]), F.pad(mask, (0, 1), value=1)

    def _other_streams(
        self,
        sampling: CodeSampling,
        num_prompts: int,
        negative_input_ids: torch.Tensor | None,
        negative_attention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Prompts of the streams beside the conditional one, as many as the scales need."""
        if not sampling.scales:
            return {}
        if negative_input_ids is None:
            prompt = torch.tensor(self.unconditional_prompt(), device=self.device)
            negative_input_ids = prompt.expand(num_prompts, 1, -1)
        if negative_input_ids.ndim != 3 or negative_input_ids.shape[:2] != (num_prompts, len(sampling.scales)):
            raise ValueError(
                f"`negative_input_ids` has shape {tuple(negative_input_ids.shape)}; this drawing needs "
                f"({num_prompts}, {len(sampling.scales)}, length)."
            )
        if negative_attention_mask is None:
            negative_attention_mask = torch.ones_like(negative_input_ids)
        return {"negative_input_ids": negative_input_ids, "negative_attention_mask": negative_attention_mask}

    def _check_room(
        self,
        longest: int,
        width: int,
        num_prompts: int,
        num_images_per_prompt: int,
        sampling: CodeSampling,
        span: ImageSpan,
    ) -> None:
        """Refuses prompts that leave no room for the image, and more images than memory holds."""
        config = self.config.get_text_config(decoder=True)
        limit = config.max_position_embeddings
        if longest + span.tokens_per_image > limit:
            raise ValueError(
                f"`prompt` takes {longest} positions and the image {span.tokens_per_image}; the model has {limit}. "
                f"Shorten the prompt to {limit - span.tokens_per_image} positions."
            )
        if (k := sampling.contrastive_k or 0) > span.image_vocab_size and sampling.decoding != "top_p":
            raise ValueError(f"`contrastive_k`={k} is beyond the vocabulary of {span.image_vocab_size} codes.")
        num_heads, head_dim = get_head_shapes(config)
        cache = 2 * config.num_hidden_layers * num_heads * head_dim * self.dtype.itemsize
        num_streams = len(sampling.scales) + 1
        scores = torch.float32.itemsize * (num_streams * config.vocab_size + SCORE_COPIES * span.image_vocab_size)
        needed = num_prompts * (num_streams * cache * (width + span.tokens_per_image) + scores)
        free = free_memory(self.device)
        if num_images_per_prompt * needed > free:
            raise ValueError(
                f"`num_candidates`={num_images_per_prompt} for each of {num_prompts} prompts need "
                f"{num_images_per_prompt * needed / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free, so "
                f"{free // needed} fit."
            )

    @apply_forward_hook
    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        max_images: int = 4,
        max_new_tokens: int = 256,
        draw_kwargs: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> list[list[torch.Tensor]]:
        """Writes text and draws an image wherever the model begins one, until every row has ended.

        Rows that begin an image draw it together, with guidance of their own; text goes on behind it.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 on padding.
            pixel_values (`torch.FloatTensor`, *optional*): Images of the prompts, as for `forward`.
            max_images (`int`, defaults to 4): A row ends when it begins one more.
            max_new_tokens (`int`, defaults to 256): Text tokens between two images at most.
            draw_kwargs (`dict`, *optional*): Arguments of `draw_images`.
            generate_kwargs: Those of the library's `generate`, for the text.

        Returns:
            `list[list[torch.Tensor]]`: for each row its parts in order, one-dimensional ids of text or the ids
            `(1, tokens_per_image)` of an image.

        Raises:
            ValueError: If more than one sequence per prompt is asked for, or a prompt leaves no room for an answer.
        """
        for name, only in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
            if (value := generate_kwargs.pop(name, None) or only) != only:
                raise ValueError(
                    f"`{name}`={value} must be {only} here: each prompt has one answer, drawn as it is written."
                )
        span, limit = self.image_span, self.config.get_text_config(decoder=True).max_position_embeddings
        input_ids = self.replace_images(input_ids, pixel_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = generate_kwargs.pop("logits_processor", None) or []
        processors = LogitsProcessorList(
            [*given, ForbidTokensLogitsProcessor(self.never_written), ImageSpanLogitsProcessor(span, limit)]
        )
        stops = [*(generate_kwargs.pop("stopping_criteria", None) or []), BegunImageCriteria(span)]
        settings = generate_kwargs.get("generation_config") or self.generation_config
        ends = torch.as_tensor(generate_kwargs.get("eos_token_id", settings.eos_token_id), device=input_ids.device)
        parts: list[list[torch.Tensor]] = [[] for _ in range(len(input_ids))]
        rows = torch.arange(len(input_ids), device=input_ids.device)
        for num_drawn in range(max_images + 1):
            input_ids, mask = close_gaps(input_ids, mask)
            length, room = input_ids.shape[1], self.num_free_positions(mask)
            sequences = super().generate(
                input_ids,
                attention_mask=mask,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(stops),
                max_new_tokens=min(max_new_tokens, room),
                **generate_kwargs,
            )
            written = sequences[:, length:]
            begins, is_end = span.is_code(written), torch.isin(written, ends)
            kept = (begins | is_end).cumsum(-1) == 0
            for row, text, keep in zip(rows.tolist(), written, kept, strict=True):
                parts[row].append(text[keep])
            draws = begins.any(-1)
            if num_drawn == max_images or not bool(draws.any()):
                break
            rows, mask = rows[draws], torch.cat([mask, kept.to(mask.dtype)], -1)[draws]
            input_ids, mask = close_gaps(sequences[draws], mask)
            images = self.draw_images(input_ids, mask, **(draw_kwargs or {}))
            for row, image in zip(rows.tolist(), images, strict=True):
                parts[row].append(image[None])
            input_ids, mask = torch.cat([input_ids, images], -1), F.pad(mask, (0, images.shape[1]), value=1)
        return parts

    def num_free_positions(self, attention_mask: torch.Tensor) -> int:
        """Counts the positions that the longest row leaves of the model's context.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 on padding.

        Returns:
            `int`: 1 or more.

        Raises:
            ValueError: If none is left.
        """
        limit = self.config.get_text_config(decoder=True).max_position_embeddings
        if (length := int(attention_mask.sum(-1).max())) >= limit:
            raise ValueError(
                f"The prompt takes {length} positions and leaves no room for an answer; the model has "
                f"`max_position_embeddings`={limit}. Shorten it."
            )
        return limit - length


class CM3LeonGenerationMixin(ImageGenerationMixin):
    """`generate` for text, for images, and for both in one answer."""

    @property
    def image_span(self) -> ImageSpan:
        """Ids and length of an image: it may follow `<break>`, and is followed by it or by the end.

        Documents of causal models may open with one.
        """
        config = self.config
        beginnings = (config.eos_token_id,) if config.objective == "causal" else ()
        return ImageSpan(
            first_image_token_id=config.first_image_token_id,
            image_vocab_size=config.image_vocab_size,
            tokens_per_image=config.tokens_per_image,
            opening_token_ids=(config.break_token_id, *beginnings),
            closing_token_ids=(config.break_token_id, config.eos_token_id),
        )

    @property
    def never_written(self) -> list[range]:
        """The placeholder of images, padding, and what belongs to filling in."""
        config = self.config
        singles = config.image_token_id, config.pad_token_id, config.eoss_token_id
        sentinels = range(config.first_sentinel_token_id, config.first_sentinel_token_id + config.num_sentinel_tokens)
        return [sentinels, *(range(token, token + 1) for token in singles)]

    def end_of_turn(self, input_ids: torch.LongTensor) -> EndTurnLogitsProcessor:
        """Ends an answer where the next message of a conversation would begin.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, prompt_length)`): The conversation; a text may follow its last
                picture.
        """
        ends_in_picture = int(input_ids[0, -1]) == self.config.image_token_id
        longest = input_ids.shape[1] + int(ends_in_picture)
        return EndTurnLogitsProcessor(self.image_span, self.config.eos_token_id, longest)

    def unconditional_prompt(self) -> list[int]:
        """Ids of a document whose text is masked, or of a causal one that opens with an image.

        Source: CM3Leon, section 3.2; spelled as its training code does. That of causal models is Chameleon's.
        """
        if self.config.objective == "causal":
            return [self.config.eos_token_id]
        return [self.config.eos_token_id, self.config.first_sentinel_token_id, self.config.break_token_id]

    def replace_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Puts the codes of pictures where their placeholders stand."""
        return input_ids if pixel_values is None else self.model.place_images(input_ids, pixel_values)

    @wraps(ImageGenerationMixin.prepare_inputs_for_generation)  # by whose names the library knows its arguments
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds, behind a cache, the places of codes in their images, where the model wants to know them."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        rows = inputs["input_ids"]
        if self.config.image_positions != "running" and rows is not None and rows.shape[1] < input_ids.shape[1]:
            whole = stack_streams(input_ids, kwargs.get("negative_input_ids"))
            places = places_in_image(whole, self.config)[:, -rows.shape[1] :]
            # Text without a mode may run on with codes beyond an image, which have no place in one.
            inputs["image_places"] = places.masked_fill(places >= self.config.tokens_per_image, -1)
        return inputs

    def create_masks_for_generate(self, config: Any, attention_mask: torch.Tensor | None, **kwargs: Any) -> Any:
        """Leaves the mask to `forward`, which tells padding from packed documents by it; used for static caches."""
        return attention_mask

    @apply_forward_hook
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues documents, or with `generation_mode="image"` draws one image per row.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts, padded on the left; also taken as `input_ids`. Placeholders of `pixel_values` are returned as
                the codes that they stand for.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
                For text with `guidance_scale`: unconditional prompts, see [`GuidedGenerationMixin`].
            negative_prompt_attention_mask (`torch.LongTensor` of the same shape, *optional*): 0 on their padding.
            generation_mode (`str`, *optional*):
                `"text"`: no codes, sentinels or `<break>`, up to the end of the span or of the document. `"image"`:
                see `draw_images`. Without one, whatever the model writes.
            kwargs: Those of [`GuidedGenerationMixin`]'s `generate`; for images, those of `draw_images`, or the fields
                of [`CodeSampling`] with guidance and temperature from the configuration where they are left out.

        Returns:
            What the library returns; for images ids for `decode_image_tokens`.

        Raises:
            ValueError: If there is no such mode, or `sampling` and its fields are both given.
        """
        config = self.config
        input_ids = kwargs.pop("input_ids", inputs)
        if generation_mode == "image":
            return self._generate_images(input_ids, **kwargs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"`generation_mode`={generation_mode!r} is not one of 'text', 'image'.")
        forbidden = [range(config.image_token_id, config.image_token_id + 1)]
        if generation_mode == "text":  # one part of a document, so nothing that ends a part but the end
            between = range(config.break_token_id, config.break_token_id + 1)
            forbidden = [config.image_token_ids, between, *self.never_written]
        given = kwargs.pop("logits_processor", None) or []
        processors = [*given, ForbidTokensLogitsProcessor(forbidden, exceptions=(config.eoss_token_id,))]
        stops = [*(kwargs.pop("stopping_criteria", None) or [])]
        negative = (negative_prompt_ids, negative_prompt_attention_mask)
        if input_ids is not None:
            input_ids = self.replace_images(input_ids, kwargs.pop("pixel_values", None))
            stops.append(self._end_of_context((input_ids, kwargs.get("attention_mask")), negative))
        return super().generate(
            input_ids,
            *negative,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stops),
            **kwargs,
        )

    def _generate_images(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Draws with the fields of [`CodeSampling`] among the arguments, and without those of the library's text."""
        for name in ("generation_config", "max_new_tokens"):  # which the library's pipelines give
            kwargs.pop(name, None)
        if "num_return_sequences" in kwargs:
            raise ValueError("`num_return_sequences` is for text; images take `num_images_per_prompt`.")
        asked = {field.name: kwargs.pop(field.name) for field in fields(CodeSampling) if field.name in kwargs}
        if kwargs.get("sampling") is None:
            config = self.config
            defaults = {"guidance_scale": config.drawing_guidance_scale, "temperature": config.drawing_temperature}
            kwargs["sampling"] = CodeSampling(**{**defaults, **asked})
        elif asked:
            raise ValueError(f"`sampling` is given, and {sorted(asked)} beside it. Put them into `sampling`.")
        return self.draw_images(input_ids, **kwargs)

    def _end_of_context(self, *prompts: tuple[torch.Tensor | None, torch.Tensor | None]) -> FullContextCriteria:
        """Ends text where the context ends for the longest of some prompts, each with its mask."""
        masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in prompts if ids is not None]
        room = min(map(self.num_free_positions, masks))
        return FullContextCriteria(max(mask.shape[1] for mask in masks) + room)


__all__ = ["CM3LeonGenerationMixin", "GuidedGenerationMixin", "ImageGenerationMixin"]
