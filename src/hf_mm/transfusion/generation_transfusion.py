"""How Transfusion writes: text through the library's own `generate`, and text and images in one answer.

Adds the image mode and the switch at the image-opening token. It knows ids and latents, not strings or pictures.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin

from .drawing_transfusion import DrawingMixin, positions_from_mask
from .noise_transfusion import CLEAN_TIMESTEP


class TransfusionGenerationMixin(DrawingMixin, GenerationMixin):
    """`generate` for text, and for images, and for both in one answer."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats rows for several sequences per prompt, each row taking all of its images along."""
        images = {name: kwargs.pop(name) for name in ("pixel_values", "latents", "image_sizes") if name in kwargs}
        if expand_size > 1 and images:
            is_image = input_ids == self.config.image_token_id
            counts = (is_image & ~F.pad(is_image, (1, 0))[:, :-1]).sum(-1).tolist()
            order = torch.arange(sum(counts), device=input_ids.device).split(counts)
            index = torch.cat([row for row in order for _ in range(expand_size)])
            images = {name: value if value is None else value[index] for name, value in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Drops the images once the cache holds them."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "latents", "image_sizes"):
                inputs.pop(name, None)
        return inputs

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Leaves the mask to `forward`, which knows where the images are; it is used for static caches."""
        return attention_mask

    def generate(self, inputs: torch.Tensor | None = None, generation_mode: str | None = None, **kwargs: Any) -> Any:
        """Writes text, or with `generation_mode="image"` draws one image per row.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts, padded on the left; also taken as `input_ids`.
            generation_mode (`str`, *optional*): `"text"` (the default) or `"image"`.
            kwargs: For text, those of the library's `generate`; for images, those of `draw_images`.

        Returns:
            For text what the library returns; for images latents for `decode_image_tokens`.

        Raises:
            ValueError: If there is no such mode.
        """
        if generation_mode == "image":
            kwargs.pop("generation_config", None)
            kwargs.pop("max_new_tokens", None)
            if "num_return_sequences" in kwargs:
                raise ValueError("`num_return_sequences` is for text; images take `num_images_per_prompt`.")
            input_ids = kwargs.pop("input_ids", inputs)
            return self.draw_images(input_ids, **kwargs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"`generation_mode`={generation_mode!r} is not one of 'text', 'image'.")
        kwargs["suppress_tokens"] = self._suppressed(kwargs, self.config.boi_token_id)
        return super().generate(inputs, **kwargs)

    def _suppressed(self, generate_kwargs: dict[str, Any], *token_ids: int) -> list[int]:
        """Ids that must not be written: the image tokens given and the inner ones, beside what the caller forbids."""
        generation_config = generate_kwargs.get("generation_config") or self.generation_config
        asked = generate_kwargs.get("suppress_tokens") or generation_config.suppress_tokens or []
        return sorted({*asked, *token_ids, self.config.eoi_token_id, self.config.image_token_id})

    def _take_end_tokens(self, generate_kwargs: dict[str, Any]) -> list[int]:
        """Takes the ids that end a text out of the arguments of `generate`; else those that the model goes by."""
        generation_config = generate_kwargs.get("generation_config") or self.generation_config
        asked = generate_kwargs.pop("eos_token_id", None)
        asked = generation_config.eos_token_id if asked is None else asked
        return [] if asked is None else torch.as_tensor(asked).reshape(-1).tolist()

    def num_free_positions(self, attention_mask: torch.Tensor) -> int:
        """Counts the positions that the longest row leaves of the model's context.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 on padding.

        Returns:
            `int`: 1 or more.

        Raises:
            ValueError: If none is left.
        """
        limit, length = self.config.text_config.max_position_embeddings, int(attention_mask.sum(-1).max())
        if length >= limit:
            raise ValueError(
                f"The prompt takes {length} positions and leaves no room for an answer; the model has "
                f"`max_position_embeddings`={limit}. Shorten it."
            )
        return limit - length

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        max_images: int = 4,
        max_new_tokens: int = 256,
        draw_kwargs: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> list[list[torch.Tensor]]:
        """Writes text and draws an image wherever the model opens one, until every row has ended.

        Rows that open an image draw it together; the finished image is written to the cache once, clean, and text
        goes on behind it.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 on padding.
            pixel_values (`torch.FloatTensor`, *optional*): Images of the prompts, as for `forward`.
            image_sizes (`torch.LongTensor`, *optional*): Their sizes in latent pixels.
            max_images (`int`, defaults to 4): A row ends when it opens one more.
            max_new_tokens (`int`, defaults to 256): Text tokens between two images at most. Fewer where the longest
                row reaches `max_position_embeddings`; a row also ends where it opens an image that does not fit.
            draw_kwargs (`dict`, *optional*): Arguments of `denoise`.
            generate_kwargs: Those of the library's `generate`, as for sampling.

        Returns:
            `list[list[torch.Tensor]]`: for each row its parts in order, one-dimensional ids of text or latents
            `(channels, height, width)` of an image.

        Raises:
            ValueError: If more than one sequence per prompt is asked for, or a prompt leaves no room for an answer.

        Source: Transfusion, section 3 (inference).
        """
        for name, only in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
            if (value := generate_kwargs.pop(name, None) or only) != only:
                raise ValueError(
                    f"`{name}`={value} must be {only} here: each prompt has one answer, drawn as it is written."
                )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        draw_kwargs = draw_kwargs or {}
        shape = self._latent_shape(1, draw_kwargs.get("height"), draw_kwargs.get("width"))
        num_patches = math.prod(self._grid(shape))
        boi, eoi = self.config.boi_token_id, self.config.eoi_token_id
        stops = [*self._take_end_tokens(generate_kwargs), boi]
        parts: list[list[torch.Tensor]] = [[] for _ in range(len(input_ids))]
        rows = torch.arange(len(input_ids), device=input_ids.device)
        suppressed = self._suppressed(generate_kwargs)
        generate_kwargs.pop("suppress_tokens", None)
        cache: DynamicCache | None = DynamicCache(config=self.config.text_config)
        images: dict[str, Any] = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        for num_drawn in range(max_images + 1):
            length = input_ids.shape[1]
            output = super().generate(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                eos_token_id=stops,
                suppress_tokens=suppressed,
                max_new_tokens=min(max_new_tokens, self.num_free_positions(attention_mask)),
                return_dict_in_generate=True,
                **images,
                **generate_kwargs,
            )
            images = {}
            input_ids, cache = output.sequences, output.past_key_values
            written = input_ids[:, length:]
            is_stop = torch.isin(written, torch.tensor(stops, device=written.device))
            kept = is_stop.cumsum(-1) - is_stop.long() == 0  # up to and including the first stop
            for row, text, keep in zip(rows.tolist(), written, kept & ~is_stop, strict=True):
                parts[row].append(text[keep])
            attention_mask = torch.cat([attention_mask, kept.to(attention_mask.dtype)], -1)
            has_room = attention_mask.sum(-1) + num_patches + 1 < self.config.text_config.max_position_embeddings
            opens = ((written == boi) & kept).any(-1) & has_room
            if num_drawn == max_images or not bool(opens.any()):
                break
            rows, input_ids, attention_mask = rows[opens], input_ids[opens], attention_mask[opens]
            cache.batch_select_indices(opens.nonzero().flatten())
            self._read_last(input_ids, attention_mask, cache)
            latents = self.denoise(cache, attention_mask, **draw_kwargs)
            for row, image in zip(rows.tolist(), latents, strict=True):
                parts[row].append(image)
            self._write_image(latents, cache, attention_mask)
            placeholders = input_ids.new_full((len(rows), num_patches + 1), self.config.image_token_id)
            placeholders[:, -1] = eoi
            input_ids = torch.cat([input_ids, placeholders], -1)
            attention_mask = F.pad(attention_mask, (0, num_patches + 1), value=1)
        return parts

    def _read_last(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache) -> None:
        """Reads the last token, which `generate` returns without having read it."""
        unread = input_ids.shape[1] - cache.get_seq_length()
        self.model(
            input_ids=input_ids[:, -unread:],
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask)[:, -unread:],
            past_key_values=cache,
            use_cache=True,
        )

    def _write_image(self, latents: torch.Tensor, cache: DynamicCache, attention_mask: torch.Tensor) -> None:
        """Writes finished images to the cache, clean, so that the text behind reads what was drawn."""
        mask, position_ids = self.image_mask(attention_mask, cache, self._grid(latents.shape))
        timesteps = torch.full((len(latents),), CLEAN_TIMESTEP, device=latents.device)
        self.predict_noise(latents, timesteps, cache, mask, position_ids)
