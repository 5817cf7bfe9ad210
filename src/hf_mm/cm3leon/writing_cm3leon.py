"""Text that a CM3Leon model writes: captions, documents with pictures in between, turns of a conversation.

Knows layouts and the model's own writing; how codes are drawn and shown, the pipeline knows.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList


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


class WritingMixin:
    """How [`CM3LeonPipeline`] writes."""

    @torch.no_grad()
    def caption(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str] = "",
        max_new_tokens: int = 64,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Describes pictures, or continues `prompt` about them.

        Fills in the text in front of the picture, or, with a causal model, writes the text behind it.

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Pictures to read.
            prompt (`str` or a list of one per picture, defaults to `""`):
                How the text begins, or a question: `"Question: what is it? Answer:"`. What a template has behind the
                answer is left out; `infill_caption` takes it.
            max_new_tokens (`int`, defaults to 64): Tokens to write at most, and never more than the context has room.
            generate_kwargs: Any of the library's `generate`, such as `do_sample`, `num_beams`.

        Returns:
            `list[str]`: one text per picture.

        Raises:
            ValueError: If the prompts are a list, and not as many as the pictures.

        Source: CM3Leon (arXiv 2309.02591), section 3.3 and figure 9.
        """
        images = image if isinstance(image, list) else [image]
        prompts = self._list_prompts(prompt, len(images))
        codes = self._read_codes(images)
        rows = [self.processor.caption_prompt(*pair) for pair in zip(prompts, codes, strict=True)]
        return [text.strip() for text in self._decode_text(self._write(rows, max_new_tokens, **generate_kwargs))]

    def _write(self, rows: list[list[int]], max_new_tokens: int, **generate_kwargs: Any) -> list[list[int]]:
        """Ids of text that the model writes behind rows of ids, up to the end of the span."""
        check_numbers({"max_new_tokens": max_new_tokens}, Integral, "a whole number")
        ids, mask = self._pad(rows)
        max_new_tokens = min(max_new_tokens, self.model.num_free_positions(mask))
        sequences = self.model.generate(
            ids, attention_mask=mask, generation_mode="text", max_new_tokens=max_new_tokens, **generate_kwargs
        )
        return sequences[:, ids.shape[1] :].tolist()

    @staticmethod
    def _list_prompts(prompt: Any, num_images: int, name: str = "prompt") -> list[str]:
        """Lists the texts of pictures, one for each; refuses what is none, or not as many."""
        prompts = [prompt] * num_images if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"`{name}`={prompt!r} must be a string or a list of strings.")
        if not num_images or len(prompts) != num_images:
            raise ValueError(f"`{name}` has {len(prompts)} entries and `image` {num_images}; give one per picture.")
        return prompts

    def _decode_text(self, rows: list[list[int]]) -> list[str]:
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @torch.no_grad()
    def interleave(
        self,
        prompt: str | list[str],
        image: list[Image.Image] | None = None,
        max_images: int = 4,
        max_new_tokens: int = 256,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        sampling: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> list[list[str | Image.Image]]:
        """Continues prompts with text and pictures, as the model decides, until it ends.

        Args:
            prompt (`str` or `list[str]`): How the documents begin; `<image>` stands for an entry of `image`.
            image (`list[PIL.Image.Image]`, *optional*): Pictures of the prompts, in order.
            max_images (`int`, defaults to 4): Pictures per document at most.
            max_new_tokens (`int`, defaults to 256): Text tokens between two pictures at most, as far as the context
                has room; no picture begins that would not fit.
            guidance_scale (`float`, *optional*): As in drawing.
            generator (`torch.Generator`, *optional*): As in drawing.
            sampling (`dict`, *optional*): Further fields of `CodeSampling`, for the pictures.
            generate_kwargs: Any of the library's `generate`, for the text.

        Returns:
            `list[list[str | PIL.Image.Image]]`: for each prompt what was added, in order.
        """
        check_numbers({"max_images": max_images, "max_new_tokens": max_new_tokens}, Integral, "a whole number")
        inputs = self.processor(
            text=[prompt] if isinstance(prompt, str) else prompt, images=image, padding=True, return_tensors="pt"
        )
        documents = self.model.generate_interleaved(
            **inputs.to(self._execution_device),
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            draw_kwargs={"sampling": self._sampling(guidance_scale, **(sampling or {})), "generator": generator},
            **generate_kwargs,
        )
        return [[part for part in map(self._show_part, parts) if part != ""] for parts in documents]

    @torch.no_grad()
    def chat(
        self,
        messages: list[dict[str, Any]],
        max_images: int = 1,
        max_new_tokens: int = 256,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        sampling: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Answers a conversation with text, a picture or both, as the model decides, to the end of its turn.

        A turn ends with the document, or where a text would follow another part, which is the user's next message.

        Args:
            messages (`list[dict]`):
                The turns so far, each with `role` (`"user"`, `"assistant"` or `"system"`) and `content`: a text, or
                parts `{"type": "text", "text": str}` and `{"type": "image", "image": PIL.Image.Image}`.
            max_images (`int`, defaults to 1): Pictures in the answer at most.
            max_new_tokens (`int`, defaults to 256): Text tokens at most, as far as the context has room.
            guidance_scale (`float`, *optional*): As in drawing; leads away from the unconditional prompt.
            generator (`torch.Generator`, *optional*): As in drawing.
            sampling (`dict`, *optional*): Further fields of `CodeSampling`, for pictures.
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
        given = generate_kwargs.pop("logits_processor", None) or []
        (parts,) = self.model.generate_interleaved(
            **inputs.to(self._execution_device),
            logits_processor=LogitsProcessorList([*given, self.model.end_of_turn(inputs["input_ids"])]),
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            draw_kwargs={"sampling": self._sampling(guidance_scale, **(sampling or {})), "generator": generator},
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
        return self._decode(part - self.model.config.first_image_token_id, "pil")[0]


__all__ = ["WritingMixin"]
