"""Filling in with CM3Leon: gaps of a caption, or a region of a picture, given what stands on both sides.

A part of the pipeline, whose stages it uses: reading codes, drawing, writing, decoding.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from PIL import Image


# Tokens of the text that the model writes before it draws a region without a prompt: those of a caption.
MAX_TEXT_TOKENS = 64


class InfillingMixin:
    """What [`CM3LeonPipeline`] fills in."""

    @torch.no_grad()
    def infill_caption(
        self,
        image: Image.Image | list[Image.Image],
        text: str | list[str],
        blank: str = "___",
        max_new_tokens: int = 64,
        **generate_kwargs: Any,
    ) -> list[str]:
        """Fills the gaps of texts that stand in front of pictures, given what stands on both sides.

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Pictures to read.
            text (`str` or `list[str]`): The text of each picture, or one for all, with `blank` where it has gaps.
            blank (`str`, defaults to `"___"`): What marks a gap.
            max_new_tokens (`int`, defaults to 64): Tokens to write at most for each gap.
            generate_kwargs: Any of the library's `generate` that returns one sequence per prompt.

        Returns:
            `list[str]`: the whole text of each picture.

        Raises:
            ValueError: If the model is causal, a text has no gap, or there are not as many texts as pictures.
        """
        self.processor.check_fills_in()
        images = image if isinstance(image, list) else [image]
        texts = self._list_prompts(text, len(images), "text")
        if without := [one for one in texts if blank not in one]:
            raise ValueError(f"`text`={without[0]!r} has no gap: write `blank`={blank!r} where it has one.")
        rows, counts = [], []
        for one, codes in zip(texts, self._read_codes(images), strict=True):
            content: list[dict[str, Any]] = []
            for number, piece in enumerate(one.split(blank)):
                # The space in front of a gap belongs to the first word of the gap, as in training.
                known = piece.rstrip(" ") if number < one.count(blank) else piece
                content += [{"type": "mask"}] * (number > 0) + [{"type": "text", "text": known}] * bool(known)
            prompt = self.processor.infill_prompt([*content, {"type": "image", "codes": codes}])
            rows.append(prompt["input_ids"])
            counts.append(len(prompt["span_lengths"]))
        spans = self._write_spans(rows, counts, max_new_tokens, **generate_kwargs)
        return [
            self._fill_gaps(one.split(blank), self._decode_text(gaps)) for one, gaps in zip(texts, spans, strict=True)
        ]

    @staticmethod
    def _fill_gaps(pieces: list[str], gaps: list[str]) -> str:
        """Joins the known pieces of a text by what was written between them, each space once."""
        text = pieces[0]
        for gap, piece in zip(gaps, pieces[1:], strict=True):
            text += (gap.lstrip(" ") if not text or text.endswith(" ") else gap) + piece
        return text

    def _write_spans(
        self, rows: list[list[int]], counts: list[int], max_new_tokens: int, **generate_kwargs: Any
    ) -> list[list[list[int]]]:
        """Writes the missing spans of documents one after the other, all documents at a time."""
        config = self.model.config
        ends = (config.eoss_token_id, config.eos_token_id, config.pad_token_id)
        rows = [list(row) for row in rows]
        spans: list[list[list[int]]] = [[] for _ in rows]
        for number in range(max(counts)):
            open_rows = [index for index, count in enumerate(counts) if count > number]
            written = self._write([rows[index] for index in open_rows], max_new_tokens, **generate_kwargs)
            for index, answer in zip(open_rows, written, strict=True):
                end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
                spans[index].append(answer[:end])
                rows[index] += [*answer[:end], config.eoss_token_id, config.first_sentinel_token_id + number + 1]
        return spans

    @torch.no_grad()
    def infill_region(
        self,
        image: Image.Image | list[Image.Image],
        box: tuple[int, int, int, int],
        prompt: str | list[str] = "",
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **sampling: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws a part of pictures anew, given what stands before and behind it.

        The codes from the first to the last one of the box are one missing span, as in training, where many spans are
        rare; those of them beside the box are put in their places as the drawing reaches them.

        What stands in front of the drawn codes is always a prefix that training makes. With a prompt that is the
        document with this one span missing, up to its sentinel. Without one the text is missing too, and training
        shows the second span only behind the first one: the model first writes the text, then draws. A whole picture
        without a prompt is drawn as by the pipeline itself.

        Guidance needs a stream without the text, and none with the picture's both sides can be made: in training the
        text stands either in its place or in front of the drawn span. Its stream is therefore that of drawing,
        `<eos> <sentinel:0> <break>` and the codes before the span, which training often shows; so guidance follows the
        codes behind the span as it follows the text. The paper has no guidance here, which is the default.

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Pictures.
            box (`tuple[int, int, int, int]`): Left, upper, right and lower edge in pixels of the model's size, as in
                PIL; every code that it touches is drawn.
            prompt (`str` or `list[str]`, defaults to `""`): What the whole picture shows; an empty one leaves it to
                the model.
            guidance_scale (`float`, defaults to 1.0): How closely to follow the prompt and what stands behind the
                region; 1 is off. Pictures without a prompt are not guided.
            num_images_per_prompt (`int`, defaults to 1): As in drawing.
            generator (`torch.Generator` or a list, *optional*): As in drawing.
            output_type (`str`, defaults to `"pil"`): As in drawing.
            return_dict (`bool`, defaults to `True`): As in drawing.
            sampling: Further fields of `CodeSampling`, such as `temperature` and `top_p`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the pictures, those of one prompt side by side.

        Raises:
            ValueError: If the model is causal, or an argument is out of range.
        """
        self.processor.check_fills_in()
        images = image if isinstance(image, list) else [image]
        prompts = self._list_prompts(prompt, len(images))
        if (scale := sampling.get("image_guidance_scale", 1)) != 1:
            raise ValueError(f"`image_guidance_scale`={scale} must be 1 here: the picture is what is filled in.")
        self._check_output_type(output_type)
        config, known = self.model.config, torch.tensor(self._read_codes(images), device=self._execution_device)
        wanted = torch.tensor(self.processor.box_mask(box), device=known.device)
        places = wanted.nonzero().flatten()
        first, stop = int(places[0]), int(places[-1]) + 1
        mask = [first <= place < stop for place in range(len(wanted))]
        rows = self._lay_out_regions(prompts, known.tolist(), mask)
        unconditional = self.processor.unconditional_prompt()
        others = [
            [[*unconditional, *self.processor.encode_codes(codes)[:first]] if text else row]
            for text, codes, row in zip(prompts, known.tolist(), rows, strict=True)
        ]
        given = known[:, first:stop].masked_fill(wanted[first:stop], -1)
        span = replace(
            self.model.image_span,
            tokens_per_image=stop - first,
            opening_token_ids=(config.first_sentinel_token_id, config.first_sentinel_token_id + 1, unconditional[-1]),
        )
        drawn = self._draw(
            rows,
            others,
            self._sampling(guidance_scale, **sampling),
            span=span,
            given_codes=given,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
        )
        codes = known.repeat_interleave(num_images_per_prompt, 0)
        codes[:, first : first + drawn.shape[1]] = drawn
        pictures = self._decode(codes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _lay_out_regions(self, prompts: list[str], codes: list[list[int]], mask: list[bool]) -> list[list[int]]:
        """Ids in front of the missing codes; where the text is unknown, the model writes it."""
        config, unknown = self.model.config, {"type": "mask"}
        pictures = [{"type": "image", "codes": one, "mask": mask} for one in codes]
        rows = []
        for text, picture in zip(prompts, pictures, strict=True):
            if text:
                rows.append(self.processor.infill_prompt([{"type": "text", "text": text}, picture])["input_ids"])
            elif all(mask):  # training leaves one part of every document in its place
                rows.append(self.processor.unconditional_prompt())
            else:
                rows.append(self.processor.infill_prompt([unknown, picture])["input_ids"])
        textless = [index for index, text in enumerate(prompts) if not text and not all(mask)]
        if not textless:
            return rows
        # Two tokens stand between the text and the codes: the end of its span, and the sentinel of theirs.
        room = config.max_position_embeddings - len(rows[textless[0]]) - sum(mask) - 2
        unwritten = [rows[index] for index in textless]
        max_new_tokens = max(1, min(MAX_TEXT_TOKENS, room))
        spans = self._write_spans(unwritten, [1] * len(textless), max_new_tokens, min_new_tokens=1)
        for index, (text_ids,) in zip(textless, spans, strict=True):
            rows[index] = [*rows[index], *text_ids, config.eoss_token_id, config.first_sentinel_token_id + 1]
        return rows


__all__ = ["InfillingMixin"]
