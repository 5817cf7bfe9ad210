"""How Transfusion draws: denoising behind a cached prefix, all streams of guidance in one batch.

It knows ids, latents and schedulers, not strings or pictures, and writes no text.
"""

# Axes: B rows, R rows drawn (B times images per prompt), L prefix length, P patches, C latent channels, H, W latent.

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from transformers.cache_utils import Cache, DynamicCache

from .caches_transfusion import join_caches, with_image_room
from .noise_transfusion import build_scheduler, check_scheduler, set_timesteps
from .places_transfusion import add_places, grid_places


StepCallback = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def fold_streams(predictions: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """Guides away from what is predicted with less known: `p0 + sum of (scale_i - 1) * (p_i - p_(i+1))`.

    With an unconditional stream alone that is `u + s (c - u)`; with a stream `i` that has the picture but not the text
    it is `u + s_I (i - u) + s_T (c - i)`, of `scales=(s_T, s_I)`.

    Args:
        predictions (`list[torch.Tensor]`): Of the streams, from the one with all known to the one with least.
        scales (`list[float]`): Between each two; 1 is off.

    Returns:
        `torch.Tensor`: of the shape of each.

    Source: CM3Leon (arXiv 2309.02591), section 4.2, takes the form with two scales from InstructPix2Pix. Differs:
    Transfusion edits without guidance of the picture.
    """
    folded = predictions[0]
    for scale, upper, lower in zip(scales, predictions, predictions[1:], strict=False):
        folded = folded + (float(scale) - 1) * (upper - lower)  # an int may be beyond what a tensor takes
    return folded


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device, without what other programs hold."""
    if device.type in ("cuda", "xpu"):
        unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return torch.accelerator.get_memory_info(device)[0] + unused
    return psutil.virtual_memory().available


def check_room(cache: DynamicCache, num_images_per_prompt: int) -> None:
    """Refuses more images than memory holds, by what all their copies of a cache take.

    Raises:
        ValueError: If it does not suffice; it says how many images fit.
    """
    free = free_memory(cache.layers[0].keys.device)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if num_images_per_prompt * size > free:
        raise ValueError(
            f"`num_images_per_prompt`={num_images_per_prompt} needs {num_images_per_prompt * size / 2**30:.2f} GiB to "
            f"keep what was read of the prompts; {free / 2**30:.2f} GiB are free, so fewer than {free // size} fit."
        )


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Running positions of the kept tokens of `attention_mask`, 0 on padding in front."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class DrawingMixin:
    """Draws images behind prompts; mixed into the model, whose parts it uses."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    model: Any

    def default_scheduler(self) -> SchedulerMixin:
        """Builds the scheduler that fits what this model predicts."""
        return build_scheduler(self.config)

    def decode_image_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes what `generate(generation_mode="image")` returned.

        Args:
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): Scaled latents.

        Returns:
            `torch.FloatTensor` of shape `(num_images, 3, height, width)` in [-1, 1].
        """
        return self.model.decode_latents(latents)

    @torch.no_grad()
    def predict_noise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        past_key_values: Cache,
        attention_mask: Any,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Runs one denoising step's forward over the image block, which the cache keeps or overwrites by its kind.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`): Noised images, one a row.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): How noisy they are.
            past_key_values (`Cache`): The prefix, up to and including the image-opening token.
            attention_mask: From `image_mask`.
            position_ids (`torch.LongTensor`): From `image_mask`.

        Returns:
            `torch.FloatTensor` of the shape of `latents`: the prediction, in the sense of `config.prediction_type`.
        """
        patches, skips = self.model.patch_in(latents.to(self.dtype), timesteps)
        hidden = self.model.language_model(
            inputs_embeds=patches,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        ).last_hidden_state
        return self.model.patch_out(hidden, timesteps, skips, tuple(latents.shape[-2:]))

    def image_mask(
        self, prefix_mask: torch.Tensor, past_key_values: Cache, grid: tuple[int, int]
    ) -> tuple[Any, torch.Tensor]:
        """Mask and positions of an image block behind a prefix, the same for all its denoising steps.

        Args:
            prefix_mask (`torch.Tensor` of shape `(batch_size, past_length)`): 0 on padding.
            past_key_values (`Cache`): The prefix.
            grid (`tuple[int, int]`): Rows and columns of patches.

        Returns:
            The mask, in the form of the attention in use, and positions of shape `(batch_size, num_patches)`, with the
            places of patches `(3, batch_size, num_patches)` where attention is rotated by them.
        """
        num_patches = math.prod(grid)
        full = F.pad(prefix_mask, (0, num_patches), value=1)
        position_ids = positions_from_mask(full)[:, -num_patches:]
        block_ids = torch.zeros_like(position_ids)
        shape_only = torch.empty((*position_ids.shape, 0), dtype=self.dtype, device=full.device)
        mask = self.model.create_masks(shape_only, full, past_key_values, position_ids, block_ids)
        if self.config.patch_positions == "rotary":
            is_image = torch.ones_like(position_ids, dtype=torch.bool)
            places = grid_places(*grid).to(is_image.device, non_blocking=True).repeat(1, len(position_ids))
            position_ids = add_places(position_ids, is_image, places)
        return mask, position_ids

    @apply_forward_hook  # offloaded weights are brought back by `forward` alone
    @torch.no_grad()
    def draw_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        **draw_kwargs: Any,
    ) -> torch.Tensor:
        """Draws images behind prompts: the prefix is read once, then each denoising step runs the image block alone.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts, padded on the left; the image-opening token is added where it is missing.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 on padding.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*): Images to read.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): Their sizes in latent pixels.
            negative_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
                The same prompts without their instruction, with the same images, padded on the left: the stream that
                guidance by the text leads away from. Without them that is the unconditional one.
            negative_attention_mask (`torch.Tensor` of the same shape, *optional*): 0 on their padding.
            num_images_per_prompt (`int`, defaults to 1): Images drawn from each prompt, sharing its prefix.
            draw_kwargs: `height`, `width`, `num_inference_steps`, `guidance_scale`, `image_guidance_scale`,
                `scheduler`, `generator`, `latents`, `callback`, `should_stop`: see `denoise`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size * num_images_per_prompt, channels, height, width)`: latents.

        Raises:
            ValueError: If an argument is out of range.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt`={num_images_per_prompt} must be at least 1.")
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        prefix = self._read_prompts(input_ids, attention_mask, num_images_per_prompt, **images)
        scales = self._text_scale(draw_kwargs.get("guidance_scale")), draw_kwargs.get("image_guidance_scale", 1.0)
        if negative_input_ids is None or scales == (1, 1):
            return self.denoise(*prefix, **draw_kwargs)
        textless = self._read_prompts(negative_input_ids, negative_attention_mask, num_images_per_prompt, **images)
        return self.denoise(*prefix, textless=textless, **draw_kwargs)

    def _text_scale(self, guidance_scale: float | None) -> float:
        """Guidance asked for, or the model's."""
        return self.config.drawing_guidance_scale if guidance_scale is None else guidance_scale

    def _read_prompts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_images_per_prompt: int, **images: Any
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Reads prompts up to the image-opening token and repeats them for each image."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_open = input_ids[:, -1] == self.config.boi_token_id
        if bool(is_open.any()) and not bool(is_open.all()):
            raise ValueError(
                "`input_ids`: some prompts end in the image-opening token and some do not; add it to all."
            )
        if not bool(is_open.all()):
            input_ids = F.pad(input_ids, (0, 1), value=self.config.boi_token_id)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        cache = self._read(input_ids, attention_mask, **images)
        if num_images_per_prompt > 1:
            check_room(cache, num_images_per_prompt)
            cache.batch_repeat_interleave(num_images_per_prompt)
            attention_mask = attention_mask.repeat_interleave(num_images_per_prompt, 0)
        return cache, attention_mask

    def _read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **images: Any) -> DynamicCache:
        """Reads a prefix into a new cache."""
        cache = DynamicCache(config=self.config.text_config)
        self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            past_key_values=cache,
            use_cache=True,
            **images,
        )
        return cache

    @torch.no_grad()
    def denoise(
        self,
        past_key_values: DynamicCache,
        attention_mask: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = 1.0,
        textless: tuple[DynamicCache, torch.Tensor] | None = None,
        scheduler: SchedulerMixin | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        callback: StepCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Denoises one image per row of a cached prefix; the cache is left as it was.

        Guidance adds one unconditional row, `<bos> <boi>`, per image to the same batch, so that a step is one forward.
        With `textless` the text is followed by leading away from that, and the unconditional row is there only for
        `image_guidance_scale`.

        Args:
            past_key_values (`DynamicCache`): The prefix, ending in the image-opening token.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length)`): 0 on padding.
            height (`int`, *optional*): Pixels; defaults to `config.image_size`.
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, *optional*): Defaults to `config.num_inference_steps`.
            guidance_scale (`float`, *optional*): Defaults to `config.drawing_guidance_scale`; 1 is off.
            image_guidance_scale (`float`, defaults to 1.0):
                How closely to follow the images of the prefix; 1 is off, another needs `textless`.
            textless (`tuple[DynamicCache, torch.Tensor]`, *optional*):
                The prefixes with their images but without their instruction, and their mask.
            scheduler (`SchedulerMixin`, *optional*): Defaults to the one that fits the prediction type.
            generator (`torch.Generator` or a list of one per row, *optional*): Source of the noise.
            latents (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`, *optional*): Initial noise.
            callback (`Callable`, *optional*): Called as `callback(step, timestep, latents)`, returns the latents.
            should_stop (`Callable`, *optional*): Asked after each step whether to leave the images as they stand.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, channels, height / vae_stride, width / vae_stride)`.

        Raises:
            ValueError: If an argument is out of range or the scheduler does not fit the model.

        Source: Transfusion, section 3 (inference). Differs: the unconditional prompt is ours; `<bos> <boi>` is what
        training with dropped captions shows.
        """
        scales = self._text_scale(guidance_scale), image_guidance_scale
        num_steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scheduler = self.default_scheduler() if scheduler is None else copy.deepcopy(scheduler)
        check_scheduler(scheduler, self.config)
        shape = self._latent_shape(len(attention_mask), height, width)
        self._check_drawing(scales, textless is not None, num_steps, scheduler, latents, shape, generator)
        device = attention_mask.device
        set_timesteps(scheduler, num_steps, torch.device("cpu"))  # it asks for their values, and no step may wait
        is_flow = self.config.prediction_type == "flow_prediction"
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device) if is_flow else latents.to(device) * scheduler.init_noise_sigma
        scheduler_step = scheduler.step
        if "generator" in inspect.signature(scheduler.step).parameters:  # those that draw no noise do not take it
            scheduler_step = partial(scheduler.step, generator=generator)

        num_streams, cache, prefix_mask = self._join_streams(past_key_values, attention_mask, textless, scales)
        grid = self._grid(shape)
        block_cache = with_image_room(cache, math.prod(grid))
        mask, position_ids = self.image_mask(prefix_mask, block_cache, grid)
        for step, (timestep, time) in enumerate(zip(scheduler.timesteps, scheduler.timesteps.to(device), strict=True)):
            inputs = latents if is_flow else scheduler.scale_model_input(latents, timestep)
            inputs = torch.cat([inputs] * num_streams)
            predictions = self.predict_noise(inputs, time.expand(len(inputs)), block_cache, mask, position_ids).float()
            prediction = fold_streams(predictions.chunk(num_streams), scales)
            latents = scheduler_step(prediction, timestep, latents, return_dict=False)[0]
            if callback is not None:
                latents = callback(step, timestep, latents)
            if should_stop is not None and should_stop():
                break
        return latents

    def _latent_shape(self, rows: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Shape of the latents of a picture of `height` by `width` pixels; refuses sizes off the stride."""
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.config.image_size if side is None else side
            stride = self.config.image_stride
            if side < stride or side % stride:
                nearest = max(side // stride, 1) * stride
                raise ValueError(f"`{name}`={side} must be a multiple of {stride} pixels. Try {nearest}.")
            sides.append(side // self.config.vae_stride)
        return rows, self.config.latent_channels, sides[0], sides[1]

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches of latents of `shape`."""
        return shape[-2] // self.config.patch_size, shape[-1] // self.config.patch_size

    @staticmethod
    def _check_drawing(
        scales: tuple[float, float],
        has_textless: bool,
        num_steps: int,
        scheduler: SchedulerMixin,
        latents: torch.Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> None:
        """Refuses arguments of a drawing that are out of range, before any work."""
        for name, scale in zip(("guidance_scale", "image_guidance_scale"), scales, strict=True):
            if not 1 <= scale <= torch.finfo(torch.float32).max:
                raise ValueError(f"`{name}`={scale} is below 1 or not finite. Use 1 to switch guidance off.")
        if scales[1] != 1 and not has_textless:
            raise ValueError(f"`image_guidance_scale`={scales[1]} needs an image to follow, and prompts without text.")
        limit = scheduler.config.num_train_timesteps
        if not 1 <= num_steps <= limit:
            raise ValueError(f"`num_inference_steps`={num_steps} must lie between 1 and {limit}.")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; this drawing needs {shape}.")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)}; this drawing needs one for each of {shape[0]}."
            )

    def _join_streams(
        self,
        cache: DynamicCache,
        prefix_mask: torch.Tensor,
        textless: tuple[DynamicCache, torch.Tensor] | None,
        scales: tuple[float, float],
    ) -> tuple[int, DynamicCache, torch.Tensor]:
        """Adds to the rows those of the other streams, one stream behind the other; the unconditional is read once."""
        caches, masks = [cache], [prefix_mask]
        if textless is not None and scales != (1, 1):
            caches.append(textless[0])
            masks.append(textless[1])
        if scales[1] != 1 or (scales[0] != 1 and textless is None):
            rows, config = len(prefix_mask), self.config
            prompt = torch.tensor([[config.text_config.bos_token_id, config.boi_token_id]], device=prefix_mask.device)
            uncond = self._read(prompt, torch.ones_like(prompt))
            uncond.batch_repeat_interleave(rows)
            caches.append(uncond)
            masks.append(prefix_mask.new_ones(rows, prompt.shape[1]))
        if len(caches) == 1:
            return 1, cache, prefix_mask
        length = max(mask.shape[1] for mask in masks)
        joined = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        return len(caches), join_caches(caches), joined


__all__ = ["DrawingMixin", "positions_from_mask"]
