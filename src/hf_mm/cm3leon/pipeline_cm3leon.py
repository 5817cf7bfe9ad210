"""CM3Leon as a diffusers pipeline: prompts to pictures, pictures to captions, gaps of either filled, both in turn.

Stages only: the model draws and writes, the processor lays documents out. Here is drawing; text is in
`writing_cm3leon.py`, filling in in `infilling_cm3leon.py`, retrieved documents are in `retrieval_cm3leon.py`. Imports
leaf files only, so that it can travel to a Hub repo.
"""

# Axes: B prompts, R pictures drawn (B times candidates), S streams, N codes of a picture.

import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .infilling_cm3leon import InfillingMixin
from .logits_cm3leon import CodeSampling
from .retrieval_cm3leon import DocumentRetriever, RetrievalMixin
from .writing_cm3leon import WritingMixin, check_generator, check_numbers


OUTPUT_TYPES = ("pil", "np", "pt", "codes")
DEFAULT_IMAGE_GUIDANCE_SCALE = 1.5  # with a picture


class CM3LeonPipeline(WritingMixin, InfillingMixin, RetrievalMixin, DiffusionPipeline):
    """Draws, captions, fills in and interleaves with a CM3Leon model.

    Args:
        model ([`CM3LeonForConditionalGeneration`]): The model with its frozen image tokenizer.
        processor ([`CM3LeonProcessor`]): Its processor.
        reranker (`CLIPModel`, *optional*): Chooses among candidates: any model that returns `logits_per_image`.
        reranker_processor (`CLIPProcessor`, *optional*): Its processor.

    Example:
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained(checkpoint)  # doctest: +SKIP
        >>> pipe("a red star on a white background", guidance_scale=3).images[0]  # doctest: +SKIP
        >>> pipe("a red star", retrieved=[[{"text": "a blue star", "image": star}]]).images[0]  # doctest: +SKIP

    """

    model_cpu_offload_seq = "model->reranker"
    _callback_tensor_inputs = ["codes"]
    _optional_components = ["reranker", "reranker_processor"]

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        reranker: PreTrainedModel | None = None,
        reranker_processor: ProcessorMixin | None = None,
    ) -> None:
        super().__init__()
        if model.config.model_type != "cm3leon":
            raise ValueError(f"`model` is a {type(model).__name__}; this pipeline draws with CM3Leon models only.")
        # Code that was exported with a checkpoint before there were two objectives knows of none.
        objective, of_model = (getattr(part, "objective", "cm3") for part in (processor, model.config))
        if objective != of_model:
            raise ValueError(
                f"`processor` has `objective`={objective!r} and `model` {of_model!r}: prompts "
                "would not be those of its training. Load both from one folder."
            )
        if (reranker is None) != (reranker_processor is None):
            raise ValueError("`reranker` and `reranker_processor` belong together: give both or neither.")
        self.register_modules(
            model=model, processor=processor, reranker=reranker, reranker_processor=reranker_processor
        )
        self._guidance_scale = 1.0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Guidance of the drawing in progress; 1 is off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the drawing in progress is guided."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of a drawing that are called back: its rows of codes."""
        return self.processor.image_processor.grid[0]

    @property
    def interrupt(self) -> bool:
        """Set by a callback to leave the picture as it stands."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image] | None,
        height: int | None,
        width: int | None,
        num_images_per_prompt: int,
        num_candidates: int,
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
        self._check_size(height, width)
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt`={num_images_per_prompt} must be at least 1.")
        if num_candidates < num_images_per_prompt:
            raise ValueError(
                f"`num_candidates`={num_candidates} must be at least `num_images_per_prompt`={num_images_per_prompt}, "
                "which are chosen from them."
            )
        if num_candidates > num_images_per_prompt and self.reranker is None:
            raise ValueError(
                f"`num_candidates`={num_candidates} needs a `reranker` to choose {num_images_per_prompt} of them: "
                "load the pipeline with `reranker=` a CLIPModel and `reranker_processor=` its processor."
            )
        self._check_output_type(output_type)
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` holds {unknown}; possible are {self._callback_tensor_inputs}."
            )

    def _check_size(self, height: int | None, width: int | None) -> None:
        """Refuses a size that is not the model's."""
        size, stride = self.model.config.image_size, self.model.config.vq_stride
        for name, side in (("height", height), ("width", width)):
            if side not in (None, size):
                raise ValueError(
                    f"`{name}`={side} gives {side / stride:g} codes along this side; the model draws pictures of "
                    f"{size} x {size} pixels, {self.model.config.tokens_per_image} codes. Leave `{name}` out."
                )

    def _check_output_type(self, output_type: str) -> None:
        """Refuses an unknown form, and pictures where the model draws codes only."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type`={output_type!r} is not one of {OUTPUT_TYPES}.")
        if output_type != "codes":
            self.model.model.require_image_tokenizer()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_candidates: int | None = None,
        image_guidance_scale: float | None = None,
        do_sample: bool = True,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        decoding: str = "top_p",
        contrastive_k: int | None = None,
        contrastive_alpha: float | None = None,
        amateur_temperature: float = 1.0,
        cache_implementation: str | None = None,
        retriever: DocumentRetriever | None = None,
        num_retrieved: int | None = None,
        retrieved: list[list[Mapping[str, Any]]] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["codes"],  # noqa: B006 (diffusers' signature)
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures from prompts.

        Args:
            prompt (`str` or `list[str]`): What to draw, or to do with `image`; an empty one leaves it to the model.
            image (`PIL.Image.Image` or a list of one per prompt, *optional*):
                A picture to read. It stands where the processor's `edit_template` puts it, or where the prompt itself
                has `<image>`: `"Make high quality image from canny edge features<image>a red star"`.
            height (`int`, *optional*): Pixels; the model draws one size only.
            width (`int`, *optional*): Likewise.
            guidance_scale (`float`, *optional*): Defaults to the model's `drawing_guidance_scale`; 1 is off.
            num_images_per_prompt (`int`, defaults to 1): Pictures from each prompt.
            generator (`torch.Generator` or a list of one per prompt or per candidate, *optional*):
                Source of the noise. With a list, what a prompt gives does not depend on the prompts beside it.
            num_candidates (`int`, *optional*):
                Pictures drawn from each prompt, of which the reranker keeps the best `num_images_per_prompt`, best
                first.
            image_guidance_scale (`float`, *optional*):
                How closely to follow `image`, or the documents before the prompt; 1 is off. Defaults to 1.5 with a
                picture, guidance by the text and no contrastive decoding, as in the paper (arXiv 2309.02591, Sec. 4),
                which takes a third stream, and to 1 otherwise. Without it guidance follows the text alone: what stands
                before it, and a template's words of the task, are in both streams.
            do_sample (`bool`, defaults to `True`): Whether to draw codes, or to take the best.
            temperature (`float`, *optional*): Divides the scores. Defaults to the model's `drawing_temperature`.
            top_k (`int`, *optional*): Draws from that many best codes only.
            top_p (`float`, defaults to 1.0): Draws from the fewest best codes that have this probability together.
            decoding (`str`, defaults to `"top_p"`):
                `"top_p"`, `"contrastive"` (CD-K), or `"mixed"`, half of the candidates each.
            contrastive_k (`int`, *optional*): CD-K: rank of the probability that sets the bar.
            contrastive_alpha (`float`, *optional*): CD-K: fraction of that probability that a code must reach.
            amateur_temperature (`float`, defaults to 1.0): CD-K: divides the unconditional logits.
            cache_implementation (`str`, *optional*): As for the library's `generate`, such as `"static"`.
            retriever ([`DocumentRetriever`], *optional*):
                Finds documents for each prompt, such as `hf_mm.data.retrieval.Retriever`. To see what it finds, call
                its `retrieve` and give `documents` of that as `retrieved`.
            num_retrieved (`int`, *optional*):
                Documents for each prompt, as far as the retriever finds them; 2 with a retriever, 0 is off.
            retrieved (`list[list[dict]]`, *optional*):
                Documents given by hand, a list for each prompt: `{"text": str, "image": PIL.Image.Image}`, or `codes`
                from 0 instead of `image`; text or picture may be missing. They stand in front of the prompt in this
                order, a retriever's best first, in both streams of guidance; the unconditional one drops the prompt.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"codes"`, from 0.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each row of codes as `callback(pipe, row, num_codes, {"codes": codes})`, with all
                candidates' codes so far, from 0; `preview` shows them. It may set `pipe._interrupt`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["codes"]`): What it is given.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the pictures, those of one prompt side by side.

        Raises:
            ValueError: If an argument is out of range, the prompt or its documents leave no room for the picture,
                or memory does not hold so many candidates.
        """
        sides = {"height": height, "width": width, "num_images_per_prompt": num_images_per_prompt}
        counts = {"num_candidates": num_candidates, "num_retrieved": num_retrieved}
        check_numbers({**sides, **counts}, Integral, "a whole number")
        check_generator(generator)
        num_candidates = num_images_per_prompt if num_candidates is None else num_candidates
        self.check_inputs(
            prompt, image, height, width, num_images_per_prompt, num_candidates, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        prompts = [prompt] if isinstance(prompt, str) else prompt
        images = None if image is None else image if isinstance(image, list) else [image]
        sampling = self._sampling(
            guidance_scale,
            reads_picture=images is not None,
            image_guidance_scale=image_guidance_scale,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            decoding=decoding,
            contrastive_k=contrastive_k,
            contrastive_alpha=contrastive_alpha,
            amateur_temperature=amateur_temperature,
        )
        if decoding != "top_p" and not all(prompts):
            raise ValueError(
                f"`prompt` is empty and `decoding`={decoding!r}, which compares a drawing with one that follows no "
                "text. Give a text, or use `decoding='top_p'`."
            )
        documents = self._find_documents(prompts, images, retriever, num_retrieved, retrieved)
        if images is None and not any(documents) and (scale := sampling.image_guidance_scale) != 1:
            raise ValueError(f"`image_guidance_scale`={scale} needs an `image` or documents to follow.")
        laid_out = (
            self._lay_out_retrieved(prompts, documents, len(sampling.scales))
            if any(documents)
            else self._lay_out_prompts(prompts, images, sampling)
        )
        codes = self._draw(
            *laid_out,
            sampling,
            num_images_per_prompt=num_candidates,
            generator=generator,
            cache_implementation=cache_implementation,
            callback=callback_on_step_end,
            wants_codes=bool(callback_on_step_end_tensor_inputs),
        )
        if num_candidates > num_images_per_prompt:
            codes = codes[self._rank(prompts, codes)[:, :num_images_per_prompt].flatten()]
        pictures = self._decode(codes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _sampling(
        self,
        guidance_scale: float | None,
        reads_picture: bool = False,
        image_guidance_scale: float | None = None,
        decoding: str = "top_p",
        **fields: Any,
    ) -> CodeSampling:
        """Settings of a drawing, with defaults where none are asked for."""
        config = self.model.config
        scale = config.drawing_guidance_scale if guidance_scale is None else guidance_scale
        if fields.get("temperature") is None:
            fields["temperature"] = config.drawing_temperature
        if image_guidance_scale is None:
            guided = reads_picture and scale > 1 and decoding == "top_p"
            image_guidance_scale = DEFAULT_IMAGE_GUIDANCE_SCALE if guided else 1.0
        self._guidance_scale = scale
        return CodeSampling(
            guidance_scale=scale, image_guidance_scale=image_guidance_scale, decoding=decoding, **fields
        )

    def _lay_out_prompts(
        self, prompts: list[str], images: list[Image.Image] | None, sampling: CodeSampling
    ) -> tuple[list[list[int]], list[list[list[int]]] | None]:
        """Ids of each prompt, and of the other streams where there are pictures to read.

        Those are the unconditional one, and that of guidance by the text: the same layout without the instruction,
        `<eos> TASK <break> IMG <break>`, as training with dropped instructions has it. A part that is empty takes its
        `<break>` along, so none is doubled, and an empty prompt is drawn from that layout itself.
        """
        opening = self.processor.tokenizer.break_token_id
        unconditional = self.processor.unconditional_prompt()
        if images is None:
            rows = [
                [*self.processor.encode_document([{"type": "text", "text": text}])["input_ids"][:-1], opening]
                for text in prompts
            ]
            return [row if text else unconditional for text, row in zip(prompts, rows, strict=True)], None
        rows, others = [], []
        for text, codes in zip(prompts, self._read_codes(images), strict=True):
            textless = self._lay_out_edit(self.processor.textless_prompt(text), codes)
            rows.append(self._lay_out_edit(self.processor.edit_prompt(text), codes))
            others.append([textless, unconditional][: len(sampling.scales)])
        return rows, others

    def _lay_out_edit(self, prompt: str, codes: list[int]) -> list[int]:
        """Ids of a prompt that has a place for a picture, up to where the model draws."""
        before, behind = prompt.split(self.processor.image_token)
        parts = [{"type": "text", "text": before}, {"type": "image", "codes": codes}, {"type": "text", "text": behind}]
        return [*self.processor.encode_document(parts)["input_ids"][:-1], self.processor.tokenizer.break_token_id]

    def _read_codes(self, images: list[Image.Image]) -> list[list[int]]:
        """Codes of pictures, from 0; refuses what is several at once, such as an array of four axes."""
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if len(pixel_values) != len(images):
            raise ValueError(
                f"`image` holds {len(pixel_values)} pictures in {len(images)} entries; give each its own."
            )
        ids = self.model.encode_images(pixel_values.to(self._execution_device))
        return (ids - self.model.config.first_image_token_id).tolist()

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of rows of different lengths, padded on the left."""
        width = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=self._execution_device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        return ids, mask

    def _draw(
        self,
        rows: list[list[int]],
        others: list[list[list[int]]] | None,
        sampling: CodeSampling,
        *,
        callback: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        wants_codes: bool = True,
        **draw_kwargs: Any,
    ) -> torch.Tensor:
        """Draws behind rows of ids and returns codes from 0, of shape `(R, N)`."""
        first, columns = self.model.config.first_image_token_id, self.processor.image_processor.grid[1]
        streams: dict[str, torch.Tensor] = {}
        if others is not None and sampling.scales:
            ids, mask = self._pad([other for streams_of_row in others for other in streams_of_row])
            shape = (len(rows), len(sampling.scales))
            streams = {
                "negative_input_ids": ids.unflatten(0, shape),
                "negative_attention_mask": mask.unflatten(0, shape),
            }
        self._interrupt = False
        with self.progress_bar(total=self.num_timesteps) as progress_bar:

            def step_end(num_codes: int, image_ids: torch.Tensor) -> None:
                if num_codes % columns:
                    return
                if callback is not None:
                    given = {"codes": image_ids - first} if wants_codes else {}
                    callback(self, num_codes // columns - 1, num_codes, given)
                progress_bar.update()

            image_ids = self.model.draw_images(
                *self._pad(rows),
                **streams,
                sampling=sampling,
                callback=step_end,
                should_stop=lambda: self._interrupt,
                **draw_kwargs,
            )
        return image_ids - first

    def _rank(self, prompts: list[str], codes: torch.Tensor) -> torch.Tensor:
        """Indices into `codes` of each prompt's candidates, best first, of shape `(B, candidates)`."""
        inputs = self.reranker_processor(
            text=prompts, images=self._decode(codes, "pil"), padding=True, truncation=True, return_tensors="pt"
        )
        scores = self.reranker(**inputs.to(self.reranker.device)).logits_per_image  # (R, B)
        own = scores.unflatten(0, (len(prompts), -1)).diagonal(dim1=0, dim2=2).T  # (B, candidates)
        order = own.argsort(dim=-1, descending=True, stable=True).to(codes.device)
        starts = torch.arange(0, len(codes), own.shape[1], device=codes.device)
        return order + starts[:, None]

    def preview(self, codes: torch.Tensor, output_type: str = "pil") -> Any:
        """Shows pictures that are not finished; what is not drawn yet is grey.

        Args:
            codes (`torch.LongTensor` of shape `(num_pictures, number)`): The codes so far, from 0, one or more.
            output_type (`str`, defaults to `"pil"`): As in drawing.

        Returns:
            The pictures, in that form.
        """
        return self._decode(codes, output_type)

    def _decode(self, codes: torch.Tensor, output_type: str) -> Any:
        """Turns codes from 0 into the form asked for, grey where a picture has none yet."""
        if output_type == "codes":
            return codes
        rows, columns = self.processor.image_processor.grid
        missing = rows * columns - codes.shape[1]
        whole = torch.cat([codes, codes[:, -1:].expand(-1, missing)], -1)
        pixels = self.model.decode_image_tokens(whole + self.model.config.first_image_token_id)
        if missing:
            drawn = torch.arange(rows * columns, device=pixels.device).view(1, 1, rows, columns) < codes.shape[1]
            stride = pixels.shape[-1] // columns
            pixels = pixels * drawn.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        return self.processor.post_process_images(pixels, output_type)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves one folder for every door: transformers' files at the root, the index and the reranker beside them.

        Args:
            save_directory (`str` or `os.PathLike`): Where to; made if missing.
            kwargs: Passed on to the model's `save_pretrained`, such as `max_shard_size`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self.reranker is not None:
            self.reranker.save_pretrained(os.path.join(save_directory, "reranker"))
            self.reranker_processor.save_pretrained(os.path.join(save_directory, "reranker_processor"))
        self.save_config(save_directory)


__all__ = ["CM3LeonPipeline"]
