"""Transfusion as a diffusers pipeline: prompts to pictures, pictures to captions, and both in one answer.

Stages only: the model draws (`draw_images`, `generate_interleaved`), the processor lays prompts out. Imports no other
file of the family, so that it can travel to a Hub repo alone.
"""

import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_IMAGE_GUIDANCE_SCALE = 1.5  # with a picture


def check_numbers(names: Mapping[str, Any], kind: type, wanted: str) -> None:
    """Refuses arguments that are no numbers of a kind; None stands for a default.

    Raises:
        ValueError: Naming the argument and its value.
    """
    for name, value in names.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"`{name}`={value!r} must be {wanted}.")


def check_generator(generator: Any) -> None:
    """Refuses what is neither a generator nor a list of them.

    Raises:
        ValueError: Naming it.
    """
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator`={generator!r} must be a `torch.Generator` or a list of them.")


def list_prompts(prompt: Any, num_images: int) -> list[str]:
    """Lists the prompts of pictures, one for each.

    Raises:
        ValueError: If they are no strings, or not as many as the pictures.
    """
    prompts = [prompt] * num_images if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt`={prompt!r} must be a string or a list of strings.")
    if not num_images or len(prompts) != num_images:
        raise ValueError(f"`prompt` has {len(prompts)} entries and `image` {num_images}; give one per picture.")
    return prompts


class TransfusionPipeline(DiffusionPipeline):
    """Draws, captions and interleaves with a Transfusion model.

    Args:
        model ([`TransfusionForConditionalGeneration`]): The model with its frozen VAE.
        processor ([`TransfusionProcessor`]): Its processor.
        scheduler (`SchedulerMixin`): Any diffusers scheduler that reads what the model predicts: DDPM, DDIM,
            DPM-Solver for `epsilon` and `v_prediction`, the FlowMatch ones for `flow_prediction`.

    Example:
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained(checkpoint)  # doctest: +SKIP
        >>> pipe("a red star on a white background", num_inference_steps=25).images[0]  # doctest: +SKIP

    """

    model_cpu_offload_seq = "model"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if model.config.model_type != "transfusion":
            raise ValueError(f"`model` is a {type(model).__name__}; this pipeline draws with Transfusion models only.")
        self.register_modules(model=model, processor=processor, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._image_guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Guidance of the drawing in progress; 1 is off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the drawing in progress is guided."""
        return self._guidance_scale > 1 or self._image_guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the drawing in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set by a callback to leave the picture as it stands for the remaining steps."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuses what cannot be drawn, before any work.

        Raises:
            ValueError: Naming the argument, its value and what would be right.
        """
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt)
        ):
            raise ValueError(f"`prompt`={prompt!r} must be a string or a list of strings with at least one entry.")
        if image is not None and isinstance(image, list) != isinstance(prompt, list):
            raise ValueError("`image` and `prompt` must be both single or both lists.")
        if isinstance(image, list) and len(image) != len(prompt):
            raise ValueError(
                f"`image` has {len(image)} entries and `prompt` {len(prompt)}; give one image per prompt."
            )
        token = self.processor.image_token
        for text in [prompt] if isinstance(prompt, str) else prompt:
            if (count := text.count(token)) > (image is not None):
                raise ValueError(
                    f"`prompt`={text!r} has {count} {token!r}, places of pictures; `image` gives one to a prompt."
                )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} is not one of {OUTPUT_TYPES}.")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; possible are {self._callback_tensor_inputs}."
            )

    def _encode(self, text: list[str], images: list[Image.Image] | None, num_patches: int) -> dict[str, torch.Tensor]:
        """Encodes prompts, refusing those that leave no room for what follows."""
        inputs = self.processor(text=text, images=images, padding=True, return_tensors="pt")
        limit = self.model.config.text_config.max_position_embeddings
        if (length := inputs["input_ids"].shape[1] + num_patches + 2) > limit:
            raise ValueError(
                f"`prompt` and picture take {length} positions; the model has {limit}. Shorten the prompt."
            )
        return {name: value.to(self._execution_device) for name, value in inputs.items()}

    def _encode_streams(
        self, prompts: list[str], images: list[Image.Image] | None, num_patches: int
    ) -> dict[str, torch.Tensor]:
        """Encodes prompts and, where guidance needs them beside pictures, the same without their instruction."""
        if images is None:
            return self._encode(prompts, None, num_patches)
        inputs = self._encode([self.processor.edit_prompt(text) for text in prompts], images, num_patches)
        if self.do_classifier_free_guidance:
            textless = self._encode([self.processor.textless_prompt(text) for text in prompts], images, num_patches)
            inputs |= {f"negative_{name}": textless[name] for name in ("input_ids", "attention_mask")}
        return inputs

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image_guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures from prompts.

        Args:
            prompt (`str` or `list[str]`): What to draw, or what to do with `image`.
            image (`PIL.Image.Image` or a list of one per prompt, *optional*):
                A picture to read. It stands where the processor's `edit_template` puts it, or where the prompt itself
                has `<image>`: `"Make high quality image from canny edge features<image>a red star"`.
            height (`int`, *optional*): Pixels; defaults to the model's `image_size`.
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, *optional*): Denoising steps; defaults to the model's.
            guidance_scale (`float`, *optional*): Defaults to the model's `drawing_guidance_scale`; 1 is off.
            num_images_per_prompt (`int`, defaults to 1): Pictures from each prompt.
            generator (`torch.Generator` or a list of one per picture, *optional*): Source of the noise.
            latents (`torch.FloatTensor` of shape `(num_pictures, channels, height, width)`, *optional*):
                Initial noise in latent pixels.
            image_guidance_scale (`float`, *optional*):
                How closely to follow `image`; 1 is off. Defaults to 1.5 with a picture and guidance by the text, as in
                CM3Leon (arXiv 2309.02591, Sec. 4), which takes a third stream, and to 1 otherwise. With a picture
                `guidance_scale` leads away from the same prompt without its instruction, whose words of the task stay.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"latents": latents})`; may return changed latents.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): What it is given.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the pictures, those of one prompt side by side.

        Raises:
            ValueError: If an argument is out of range, or the prompt leaves no room for the picture.
        """
        self.check_inputs(prompt, image, output_type, callback_on_step_end_tensor_inputs)
        sides = {"height": height, "width": width}
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        check_numbers({**sides, **counts}, Integral, "a whole number")
        check_numbers(
            {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}, Real, "a number"
        )
        check_numbers({"latents": latents}, torch.Tensor, "a tensor")
        check_generator(generator)
        config = self.model.config
        prompts = [prompt] if isinstance(prompt, str) else prompt
        images = None if image is None else image if isinstance(image, list) else [image]
        if images is None and image_guidance_scale not in (None, 1):
            raise ValueError(f"`image_guidance_scale`={image_guidance_scale} needs an `image` to follow.")
        height = config.image_size if height is None else height
        width = config.image_size if width is None else width
        self._guidance_scale = config.drawing_guidance_scale if guidance_scale is None else guidance_scale
        if image_guidance_scale is None:
            guided = images is not None and self._guidance_scale > 1
            image_guidance_scale = DEFAULT_IMAGE_GUIDANCE_SCALE if guided else 1.0
        self._image_guidance_scale = image_guidance_scale
        inputs = self._encode_streams(prompts, images, height * width // config.image_stride**2)
        self._num_timesteps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self._interrupt = False
        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                if callback_on_step_end is not None:
                    given = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    latents = callback_on_step_end(self, step, timestep, given).get("latents", latents)
                progress_bar.update()
                return latents

            latents = self.model.draw_images(
                **inputs,
                height=height,
                width=width,
                num_inference_steps=self._num_timesteps,
                guidance_scale=self._guidance_scale,
                image_guidance_scale=image_guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                scheduler=self.scheduler,
                generator=generator,
                latents=latents,
                callback=step_end,
                should_stop=lambda: self._interrupt,
            )
        pictures = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Decodes latents to pictures in the form asked for."""
        return self.processor.post_process_images(self.model.decode_image_tokens(latents), output_type)

    @torch.no_grad()
    def caption(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str] = "",
        max_new_tokens: int = 64,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Describes pictures, or continues `prompt` about them.

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Pictures to read, clean.
            prompt (`str` or a list of one per picture, defaults to `""`):
                How the text begins, or a question: `"Question: what is it? Answer:"`.
            max_new_tokens (`int`, defaults to 64): Tokens to write at most, and never more than the context has room.
            generate_kwargs: Any of the library's `generate`, such as `do_sample`, `num_beams`.

        Returns:
            `list[str]`: one text per picture.

        Raises:
            ValueError: If the prompts are a list, and not as many as the pictures.
        """
        images = image if isinstance(image, list) else [image]
        prompts = list_prompts(prompt, len(images))
        check_numbers({"max_new_tokens": max_new_tokens}, Integral, "a whole number")
        # The space in front of an answer belongs to its first word, as in training.
        inputs = self._encode([self.processor.image_token + text.rstrip(" ") for text in prompts], images, 0)
        max_new_tokens = min(max_new_tokens, self.model.num_free_positions(inputs["attention_mask"]))
        sequences = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **generate_kwargs)
        written = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)]

    @torch.no_grad()
    def interleave(
        self,
        prompt: str | list[str],
        image: list[Image.Image] | None = None,
        max_images: int = 4,
        max_new_tokens: int = 256,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        **generate_kwargs: Any,
    ) -> list[list[str | Image.Image]]:
        """Continues prompts with text and pictures, as the model decides, until it ends.

        Args:
            prompt (`str` or `list[str]`): How the documents begin; `<image>` stands for an entry of `image`.
            image (`list[PIL.Image.Image]`, *optional*): Pictures of the prompts, in order.
            max_images (`int`, defaults to 4): Pictures per document at most.
            max_new_tokens (`int`, defaults to 256): Text tokens between two pictures at most, as far as the context
                has room; a document also ends where a picture does not fit any more.
            height (`int`, *optional*): As in drawing, likewise the next four.
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, *optional*): Likewise.
            guidance_scale (`float`, *optional*): Likewise.
            generator (`torch.Generator`, *optional*): Likewise.
            generate_kwargs: Any of the library's `generate`.

        Returns:
            `list[list[str | PIL.Image.Image]]`: for each prompt what was added, in order.
        """
        check_numbers({"max_images": max_images, "max_new_tokens": max_new_tokens}, Integral, "a whole number")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        draw_kwargs = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "scheduler": self.scheduler,
        }
        documents = self.model.generate_interleaved(
            **self._encode(prompts, image, 0),
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            draw_kwargs=draw_kwargs,
            **generate_kwargs,
        )
        return [[part for part in map(self._show_part, parts) if part != ""] for parts in documents]

    @torch.no_grad()
    def chat(
        self,
        messages: list[dict[str, Any]],
        max_images: int = 1,
        max_new_tokens: int = 256,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Answers a conversation with text, a picture or both, as the model decides, to the end of its turn.

        Args:
            messages (`list[dict]`):
                The turns so far, each with `role` (`"user"`, `"assistant"` or `"system"`) and `content`: a text, or
                parts `{"type": "text", "text": str}` and `{"type": "image", "image": PIL.Image.Image}`.
            max_images (`int`, defaults to 1): Pictures in the answer at most.
            max_new_tokens (`int`, defaults to 256): Text tokens at most, as far as the context has room.
            height (`int`, *optional*): As in drawing, likewise the next four.
            width (`int`, *optional*): Likewise.
            num_inference_steps (`int`, *optional*): Likewise.
            guidance_scale (`float`, *optional*): Likewise; leads away from the unconditional prompt.
            generator (`torch.Generator`, *optional*): Likewise.
            generate_kwargs: Any of the library's `generate`, for the text.

        Returns:
            `dict`: the assistant's message, to append to `messages`.

        Raises:
            ValueError: If a message does not fit, the last one is the assistant's, or there is no room for an answer.

        Example:
            >>> messages = [{"role": "user", "content": [{"type": "image", "image": star}]}]  # doctest: +SKIP
            >>> messages += [{"role": "user", "content": "make the star blue"}]  # doctest: +SKIP
            >>> messages += [pipe.chat(messages)]  # doctest: +SKIP

        """
        check_numbers({"max_images": max_images, "max_new_tokens": max_new_tokens}, Integral, "a whole number")
        inputs = self.processor.encode_conversations([messages], return_tensors="pt")
        if messages[-1]["role"] == "assistant":
            raise ValueError("`messages` ends with the assistant's; append the user's next message.")
        inputs.pop("assistant_masks")
        (parts,) = self.model.generate_interleaved(
            **inputs.to(self._execution_device),
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            draw_kwargs={
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "generator": generator,
                "scheduler": self.scheduler,
            },
            **generate_kwargs,
        )
        shown = [part.strip() if isinstance(part, str) else part for part in map(self._show_part, parts)]
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in shown
            if part != ""
        ]
        return {"role": "assistant", "content": content}

    def _show_part(self, part: torch.Tensor) -> str | Image.Image:
        """Turns one part of an interleaved document into a string or a picture."""
        if part.ndim == 1:
            return self.processor.tokenizer.decode(part, skip_special_tokens=True)
        return self._decode(part[None], "pil")[0]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves one folder for every door: transformers' files at the root, `scheduler/` and the index beside them.

        Args:
            save_directory (`str` or `os.PathLike`): Where to; made if missing.
            kwargs: Passed on to the model's `save_pretrained`, such as `max_shard_size`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        self.scheduler.save_pretrained(os.path.join(save_directory, "scheduler"))
        self.save_config(save_directory)


__all__ = ["TransfusionPipeline"]
