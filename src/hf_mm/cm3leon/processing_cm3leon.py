"""Text and images to `input_ids` and `pixel_values` for CM3Leon, and back; the only place that lays documents out.

A document is `<eos> ... <eos>`, with `<break>` between two parts, each a text or the codes of a picture. What is
unknown is a sentinel in its place, and follows behind the document as `<sentinel:i> ... <eoss>`. A causal model knows
no sentinels: it goes on with what it is given. Knows strings, ids and pictures; which spans are masked in training is
the data's.
"""

import copy
from collections.abc import Sequence
from itertools import dropwhile, groupby, pairwise, takewhile
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration_cm3leon import CODE_TOKEN, OBJECTIVES, SENTINEL_TOKEN, token_range
from .conversation_cm3leon import CHAT_TEMPLATE, ConversationMixin, check_parts, check_text
from .image_processing_cm3leon import CM3LeonImageProcessor
from .loading_cm3leon import refuse_damaged


# Added where a text tokenizer lacks them.
EXTRA_TOKENS = {"break_token": "<break>", "eoss_token": "<eoss>", "image_token": "<image>"}
REQUIRED_TOKENS = ("eos_token", "pad_token", *EXTRA_TOKENS)


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, image_vocab_size: int, num_sentinel_tokens: int
) -> PreTrainedTokenizerFast:
    """Adds to a text tokenizer what CM3Leon's documents need: codes, sentinels, `<break>`, `<eoss>`, `<image>`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of any text model, with tokens for the end and for padding.
        image_vocab_size (`int`): Codes, `<code:0>` and so on.
        num_sentinel_tokens (`int`): Sentinels, `<sentinel:0>` and so on.

    Returns:
        `PreTrainedTokenizerFast`: a copy; ids that it had stay as they are. Pads on the left, adds nothing by itself.

    Raises:
        ValueError: If the tokenizer has no fast form, or lacks the tokens for the end or for padding.
    """
    present = dict(tokenizer.special_tokens_map)
    if missing := [name for name in ("eos_token", "pad_token") if not present.get(name)]:
        raise ValueError(f"`tokenizer` lacks the special tokens {missing}. Set them, such as `pad_token='<pad>'`.")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"`tokenizer` is a {type(tokenizer).__name__}; give a fast tokenizer, of `tokenizers`.")
    named = {
        name: present.pop(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name in present
    }
    extended = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        **named,
        extra_special_tokens={**EXTRA_TOKENS, **present},
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    for spelling, count in ((CODE_TOKEN, image_vocab_size), (SENTINEL_TOKEN, num_sentinel_tokens)):
        extended.add_tokens([spelling.format(number) for number in range(count)], special_tokens=True)
    return extended


def give_spaces_to_answers(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moves the space between a text and its answer to the answer, whose first word it belongs to.

    In front of a picture that is an answer it is left out, so that a prompt never ends in a space.

    Args:
        content (`list[dict]`): Parts of a document; texts may have `is_answer`.

    Returns:
        `list[dict]`: the same parts, those changed copied.

    Example:
        >>> question, answer = {"type": "text", "text": "Answer: "}, {"type": "text", "text": "7", "is_answer": True}
        >>> [part["text"] for part in give_spaces_to_answers([question, answer])]
        ['Answer:', ' 7']

    """
    parts = list(content)
    for index, (part, follower) in enumerate(pairwise(content)):
        if part["type"] == "text" and follower.get("is_answer") and not part.get("is_answer"):
            text = part["text"].rstrip(" ")
            parts[index] = {**part, "text": text}
            if follower["type"] == "text":
                parts[index + 1] = {**follower, "text": part["text"][len(text) :] + follower["text"]}
    return parts


def flat_array(values: Any, field: str) -> np.ndarray:
    """Makes one row of an array of any shape; refuses lists of different lengths."""
    try:
        return np.asarray(values).reshape(-1)
    except ValueError as error:
        raise ValueError(f"{field} is no array, but lists of different lengths or depths. Give one list.") from error


class CM3LeonProcessor(ConversationMixin):
    """Prepares inputs of [`CM3LeonForConditionalGeneration`] and reads its outputs.

    Args:
        image_processor ([`CM3LeonImageProcessor`]): Knows the picture size and the grid of codes.
        tokenizer (`PreTrainedTokenizerFast`): From `extend_tokenizer`.
        chat_template (`str`, *optional*): Of conversations; the default lays them out as training does.
        edit_template (`str`, *optional*):
            How a pipeline lays out the prompt of a drawing that reads a picture, a text with `<image>` and `{prompt}`,
            such as `"Edit first image following the instruction<image>{prompt}"`. Defaults to `"<image>{prompt}"`.
        objective (`str`, defaults to `"cm3"`):
            What the model was trained on, as in [`CM3LeonConfig`]: sets how a caption and a picture without a text are
            asked for, and whether anything can be filled in.

    Raises:
        ValueError: If `edit_template` lacks one of its two places, the tokenizer lacks one of the special tokens, the
            codes or the sentinels, or there is no such objective.

    Source: CM3Leon (arXiv 2309.02591), sections 2.1 and 2.3, figures 8 and 9.
    """

    def __init__(
        self,
        image_processor: CM3LeonImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        edit_template: str | None = None,
        objective: str = "cm3",
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective`={objective!r} must be one of {OBJECTIVES}.")
        self.objective = objective
        present, vocabulary = tokenizer.special_tokens_map, tokenizer.get_vocab()
        missing = [name for name in REQUIRED_TOKENS if not present.get(name)]
        missing += [token for token in (CODE_TOKEN.format(0), SENTINEL_TOKEN.format(0)) if token not in vocabulary]
        if missing:
            raise ValueError(f"`tokenizer` lacks the special tokens {missing}. Give it to `extend_tokenizer` first.")
        self.first_image_token_id, self.image_vocab_size = token_range(vocabulary, CODE_TOKEN)
        self.first_sentinel_token_id, self.num_sentinel_tokens = token_range(vocabulary, SENTINEL_TOKEN)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.edit_template = edit_template or self.image_token + "{prompt}"
        if [self.edit_template.count(place) for place in (self.image_token, "{prompt}")] != [1, 1]:
            raise ValueError(
                f"`edit_template`={edit_template!r} must have one {self.image_token!r} and one '{{prompt}}', such as "
                f"'Edit first image following the instruction{self.image_token}{{prompt}}'."
            )
        self._reserved = {
            index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokenizer.padding_side = "left"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a processor as every one of transformers.

        Raises:
            OSError: If there is none, or its files are damaged.
        """
        with refuse_damaged(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
    ) -> "CM3LeonProcessor":
        """Builds the processor that fits a model's picture size and codebook.

        Args:
            config ([`CM3LeonConfig`]): Of the model.
            tokenizer (`PreTrainedTokenizerBase`): Of text; the other tokens are added where there are none.
            chat_template (`str`, *optional*): As above.

        Raises:
            ValueError: If the tokenizer has another number of codes than the configuration.
        """
        vocabulary = tokenizer.get_vocab()
        if CODE_TOKEN.format(0) not in vocabulary:
            tokenizer = extend_tokenizer(tokenizer, config.image_vocab_size, config.num_sentinel_tokens)
        elif (num_codes := token_range(vocabulary, CODE_TOKEN)[1]) != config.image_vocab_size:
            raise ValueError(
                f"`tokenizer` has {num_codes} codes, but the `image_vocab_size` of `config` is "
                f"{config.image_vocab_size}. Extend the text tokenizer anew with `extend_tokenizer`."
            )
        image_processor = CM3LeonImageProcessor(
            size={"shortest_edge": config.image_size},
            crop_size={"height": config.image_size, "width": config.image_size},
            vq_stride=config.vq_stride,
        )
        return cls(image_processor, tokenizer, chat_template=chat_template, objective=config.objective)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Encodes the beginnings of documents; `<image>` in a prompt stands for the next picture.

        Pictures without a text ask for one: their prompt is that of `caption_prompt`.

        Args:
            images (`ImageInput`, *optional*): Pictures, in the order of their places.
            text (`str` or `list[str]`, *optional*): Prompts; without any, each picture is one.
            kwargs: Those of the library's processors, such as `padding` and `return_tensors`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and, with pictures, `pixel_values`.

        Raises:
            ValueError: If a prompt is no text or spells a special token, or places and pictures are not as many.
        """
        # The beginning of a document is laid out here; a text model's tokenizer must not add another.
        kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Refuses text that spells a special token; `<image>` alone is meant, and stands for a picture."""
        super().validate_inputs(images=images, text=text, **kwargs)
        for index, sample in enumerate(text or []):
            for piece in sample.split(self.image_token):
                self._encode_text(piece, f"`text`[{index}]")

    def _encode_text(self, text: str, field: str = "`text`") -> list[int]:
        """Tokenizes what stands behind a special token, refusing text that spells one."""
        ids = self.tokenizer(self.tokenizer.eos_token + text, add_special_tokens=False)["input_ids"][1:]
        if spelled := self._reserved.keys() & set(ids):
            token = self._reserved[min(spelled)]
            raise ValueError(f"{field}={text!r} contains the special token {token!r}. Write it differently.")
        return ids

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, None, None]:
        """Lists the prompts; pictures without text become prompts of their own."""
        if text is not None:
            samples = [text] if isinstance(text, str) else text
            if not isinstance(samples, list | tuple) or not samples:
                raise ValueError(f"`text`={text!r} must be a string or a list of strings with at least one entry.")
            for index, sample in enumerate(samples):
                check_text(sample, f"`text`[{index}]")
        if text is None and images is not None:
            pictures = images if isinstance(images, list | tuple) else [images]
            text = [
                self.image_token * (len(picture) if isinstance(picture, list | tuple) else 1) for picture in pictures
            ]
        images, text, *_ = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        return images, text, None, None

    def get_text_with_replacements(
        self, text: list[str], *replacements: Any, **kwargs: Any
    ) -> tuple[list[str], list[Any]]:
        """Lays every prompt out, then expands its pictures."""
        return super().get_text_with_replacements([self._lay_out(sample) for sample in text], *replacements, **kwargs)

    def _lay_out(self, prompt: str) -> str:
        """Spells the beginning of a document, `<image>` still standing for a whole picture."""
        delimiter, separator, unknown = self.tokenizer.eos_token, self.tokenizer.break_token, SENTINEL_TOKEN.format(0)
        pieces = prompt.split(self.image_token)
        parts = [pieces[0], *(part for piece in pieces[1:] for part in (self.image_token, piece))]
        ending = ""
        if len(pieces) > 1 and not any(pieces):
            causal = self.objective == "causal"
            parts, ending = (parts, separator) if causal else ([unknown, *parts], delimiter + unknown)
        return delimiter + separator.join(part for part in parts if part) + ending

    def edit_prompt(self, prompt: str) -> str:
        """Lays out the prompt of a drawing that reads a picture, by `edit_template`.

        Args:
            prompt (`str`): What to do with the picture; one that has `<image>` itself stays as it is.
        """
        return prompt if self.image_token in prompt else self.edit_template.replace("{prompt}", prompt)

    def textless_prompt(self, prompt: str) -> str:
        """Lays out the same drawing without its instruction, for guidance; the words of the task stay.

        Args:
            prompt (`str`): As for `edit_prompt`. One that has `<image>` itself is cut behind it.
        """
        if self.image_token not in prompt:
            return self.edit_prompt("")
        return prompt[: prompt.rindex(self.image_token)] + self.image_token

    def tokens_per_image(self) -> int:
        """Tokens that a picture takes in a document, its `<break>` included."""
        return self.codes_per_image() + 1

    def codes_per_image(self) -> int:
        """Codes of a picture."""
        rows, columns = self.image_processor.grid
        return rows * columns

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Returns the placeholders of one picture."""
        return self.image_token * self.codes_per_image()

    def encode_codes(self, codes: Any, field: str = "`codes`") -> list[int]:
        """Turns the codes of a picture into ids of the vocabulary.

        Args:
            codes (`list[int]` or array): One number per place of the grid, row by row, in any shape.
            field (`str`): What an error names.

        Raises:
            ValueError: If they are no whole numbers, more or fewer than a picture has, or not in the codebook.
        """
        values = flat_array(codes, field)
        if len(values) != self.codes_per_image():
            rows, columns = self.image_processor.grid
            raise ValueError(
                f"{field} has {len(values)} entries; a picture has {self.codes_per_image()} codes, {rows} rows of "
                f"{columns}. Encode it at the size of the model's pictures."
            )
        if values.dtype.kind not in "iu":
            raise ValueError(f"{field} must be whole numbers, and they are of the type {values.dtype}.")
        if values.min() < 0 or values.max() >= self.image_vocab_size:
            raise ValueError(
                f"{field} reaches from {values.min()} to {values.max()}; the codebook of this model has "
                f"{self.image_vocab_size} entries, from 0. Encode pictures with the model's own image tokenizer."
            )
        return (values + self.first_image_token_id).tolist()

    def encode_document(self, content: list[dict[str, Any]]) -> dict[str, list[int]]:
        """Lays a training document out: `<eos> PART <break> PART ... <eos>`.

        Args:
            content (`list[dict]`):
                Parts in order: `{"type": "text", "text": str}`, or `{"type": "image", "codes": list[int]}`, the codes
                from 0, row by row, or `{"type": "end_of_turn"}` between two turns of a conversation. An image without
                `codes` becomes placeholders, for `pixel_values`. Texts side by side are one part, unless a turn ends
                between them. Texts and images may have `is_answer`, True on what the model is to answer; a space
                between a text and its answer then belongs to the answer, as to the word it stands before.

        Returns:
            `dict`: `input_ids` and `labels`. Every token but the first is a target. Where a part has `is_answer` also
            `answer_mask`: 1 on the text and the codes of answers, and on the `<break>` or `<eos>` behind a part that
            ends in one.

        Raises:
            ValueError: If a text spells a special token, codes do not fit the model, or a part has no known type.
        """
        parts, _, answers = self._encode_parts(content)
        input_ids = self._join_parts(parts)
        document = {"input_ids": input_ids, "labels": [-100, *input_ids[1:]]}
        if any(part.get("is_answer") is not None for part in content):
            marks = [mark for part_marks in answers for mark in (*part_marks, *part_marks[-1:])]
            document["answer_mask"] = [0, *(marks or [0])]
        return document

    def infill_prompt(self, content: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Lays a document out that is known in part, up to where the model writes what is missing.

        The model goes on with the first missing span, `<eoss>`, then for each other span its sentinel, the span and
        `<eoss>`.

        Args:
            content (`list[dict]`):
                Parts as for `encode_document`, and: `{"type": "mask"}`, an unknown text or an unknown stretch of the
                text beside it; an image with `"mask"`, True on the codes that are unknown (see `box_mask`).

        Returns:
            `dict`: `input_ids`, ending in `<sentinel:0>`, and `span_lengths`: for each span in order the number of
            codes to fill in, `None` where it is text of any length.

        Raises:
            ValueError: If the model is causal, or nothing is missing, or more spans than there are sentinels, or a
                part does not fit.

        Source: CM3Leon, section 3.3 and figure 9. Differs: the `<eos>` of the document stays before the sentinel, as
        in training.
        """
        self.check_fills_in()
        parts, span_lengths, _ = self._encode_parts(content, with_masks=True)
        if not span_lengths:
            raise ValueError("`content` has nothing to fill in: no part of type 'mask' and no image with a `mask`.")
        return {"input_ids": [*self._join_parts(parts), self.first_sentinel_token_id], "span_lengths": span_lengths}

    def check_fills_in(self) -> None:
        """Refuses to fill in for a model that was trained on causal documents.

        Raises:
            ValueError: Naming the objective.
        """
        if self.objective == "causal":
            raise ValueError(
                "`objective`='causal': this model was trained on whole documents and cannot fill in, which needs the "
                "sentinels of a model trained with `objective`='cm3'."
            )

    def caption_prompt(self, text: str, codes: Any) -> list[int]:
        """Lays a picture out up to where the model writes about it.

        Args:
            text (`str`): How the text begins; may be empty.
            codes (`list[int]`): Of the picture, from 0.

        Returns:
            `list[int]`: the document with the rest of the text in front of the picture missing, as `infill_prompt` has
            it; for a causal model `<eos> CODES <break> TEXT`, for its documents of images that come first.

        Raises:
            ValueError: If the text spells a special token, or the codes do not fit.
        """
        text = text.rstrip(" ")  # the space in front of an answer belongs to its first word, as in training
        beginning = [{"type": "text", "text": text}] if text else []
        picture = {"type": "image", "codes": codes}
        if self.objective != "causal":
            return self.infill_prompt([*beginning, {"type": "mask"}, picture])["input_ids"]
        known = self.encode_document([picture, *beginning])["input_ids"][:-1]
        return known if text else [*known, self.tokenizer.break_token_id]

    def unconditional_prompt(self) -> list[int]:
        """Ids of the prompt that asks for a picture of an unknown text: `<eos> <sentinel:0> <break>`.

        For a causal model `<eos>` alone, for a document that opens with an image.
        """
        if self.objective == "causal":
            return [self.tokenizer.eos_token_id]
        return [self.tokenizer.eos_token_id, self.first_sentinel_token_id, self.tokenizer.break_token_id]

    def box_mask(self, box: tuple[int, int, int, int]) -> list[bool]:
        """Marks the codes of a picture that a box touches.

        Args:
            box (`tuple[int, int, int, int]`): Left, upper, right and lower edge in pixels, as in PIL.

        Returns:
            `list[bool]`: row by row, True inside.

        Raises:
            ValueError: If the box is empty or lies outside the picture.
        """
        height, width = self.image_processor.crop_size["height"], self.image_processor.crop_size["width"]
        if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(edge, Integral) for edge in box):
            raise ValueError(f"`box`={box!r} must be (left, upper, right, lower) in whole pixels.")
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(
                f"`box`={box} must be (left, upper, right, lower) within a picture of {width} x {height} pixels, the "
                "size that pictures are brought to."
            )
        left, upper, right, lower = box
        stride = self.image_processor.vq_stride
        mask = np.zeros(self.image_processor.grid, dtype=bool)
        mask[upper // stride : -(-lower // stride), left // stride : -(-right // stride)] = True
        return mask.reshape(-1).tolist()

    def _encode_parts(
        self, content: list[dict[str, Any]], with_masks: bool = False
    ) -> tuple[list[list[int]], list[int | None], list[list[int]]]:
        """Encodes the parts of a document, sentinels for what is missing, which is listed; answers are marked."""
        check_parts(content)
        parts: list[list[int]] = []
        answers: list[list[int]] = []
        span_lengths: list[int | None] = []
        types = ("text", "image", "mask") if with_masks else ("text", "image", "end_of_turn")
        if unknown := [part["type"] for part in content if part["type"] not in types]:
            raise ValueError(f"`type`={unknown[0]!r} of a document part is not one of {types}.")
        segments = {"text": "text", "mask": "text", "image": "image", "end_of_turn": "end_of_turn"}
        for kind, group in groupby(give_spaces_to_answers(content), key=lambda part: segments[part["type"]]):
            if kind == "image":
                for part in group:
                    parts.append(self._encode_image(part, span_lengths))
                    answers.append([int(bool(part.get("is_answer")))] * len(parts[-1]))
            elif kind == "text":
                ids, marks = self._encode_texts(list(group), span_lengths)
                parts += [ids] if ids else []
                answers += [marks] if ids else []
        return parts, span_lengths, answers

    def _encode_texts(
        self, members: list[dict[str, Any]], span_lengths: list[int | None]
    ) -> tuple[list[int], list[int]]:
        """Encodes texts and masks side by side; texts that touch are one text, but for answers, which are marked."""
        ids: list[int] = []
        marks: list[int] = []
        for (kind, is_answer), group in groupby(members, key=lambda part: (part["type"], bool(part.get("is_answer")))):
            if kind == "text":
                ids += self._encode_text("".join(part["text"] for part in group))
            else:
                ids.append(self._next_sentinel(span_lengths, None))
            marks += [int(is_answer)] * (len(ids) - len(marks))
        return ids, marks

    def _encode_image(self, part: dict[str, Any], span_lengths: list[int | None]) -> list[int]:
        """Encodes a picture, every run of missing codes replaced by a sentinel."""
        if "codes" not in part:
            return [self.image_token_id] * self.codes_per_image()
        ids = self.encode_codes(part["codes"])
        if "mask" not in part:
            return ids
        mask = flat_array(part["mask"], "`mask` of an image").astype(bool)
        if len(mask) != len(ids):
            raise ValueError(f"`mask` of an image has {len(mask)} entries; its picture has {len(ids)} codes.")
        kept: list[int] = []
        for is_missing, run in groupby(range(len(ids)), key=lambda index: bool(mask[index])):
            places = list(run)
            kept += (
                [self._next_sentinel(span_lengths, len(places))] if is_missing else [ids[place] for place in places]
            )
        return kept

    def _next_sentinel(self, span_lengths: list[int | None], length: int | None) -> int:
        """Returns the sentinel of one more missing span and notes its length."""
        if len(span_lengths) == self.num_sentinel_tokens:
            raise ValueError(f"`content` misses more spans than there are sentinels, {self.num_sentinel_tokens}.")
        span_lengths.append(length)
        return self.first_sentinel_token_id + len(span_lengths) - 1

    def _join_parts(self, parts: list[list[int]]) -> list[int]:
        """Joins parts by `<break>` and encloses them in the delimiter."""
        input_ids = [self.tokenizer.eos_token_id]
        for number, part in enumerate(parts):
            input_ids += [self.tokenizer.break_token_id, *part] if number else part
        return [*input_ids, self.tokenizer.eos_token_id]

    def fill_in(self, input_ids: Sequence[int], spans: Sequence[Sequence[int]]) -> list[int]:
        """Puts the spans that a model wrote into their places.

        Args:
            input_ids (`list[int]`): From `infill_prompt`.
            spans (`list[list[int]]`): Ids of each span in order, without sentinels and `<eoss>`.

        Returns:
            `list[int]`: the whole document.

        Raises:
            ValueError: If there are more or fewer spans than sentinels.
        """
        document = list(input_ids[:-1])
        sentinels = range(self.first_sentinel_token_id, self.first_sentinel_token_id + self.num_sentinel_tokens)
        if (num_missing := sum(token in sentinels for token in document)) != len(spans):
            raise ValueError(f"`spans` has {len(spans)} entries; `input_ids` misses {num_missing}.")
        filled: list[int] = []
        for token in document:
            filled += spans[token - sentinels.start] if token in sentinels else [token]
        return filled

    def split_document(self, input_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Reads a document that the model wrote, the inverse of `encode_document`.

        Args:
            input_ids (`list[int]`): Up to the `<eos>` that ends it, or as far as it goes.

        Returns:
            `list[dict]`: parts `{"type": "text", "text": str}` and `{"type": "image", "codes": list[int]}` in order.
        """
        tokenizer = self.tokenizer
        eos, pad, separator = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.break_token_id
        ids = list(dropwhile(lambda token: token == pad, input_ids))
        ids = list(takewhile(lambda token: token not in (eos, pad), ids[1:] if ids[:1] == [eos] else ids))
        codes = range(self.first_image_token_id, self.first_image_token_id + self.image_vocab_size)
        parts: list[dict[str, Any]] = []
        for (is_code, is_break), run in groupby(ids, key=lambda token: (token in codes, token == separator)):
            members = list(run)
            if is_code:
                parts.append({"type": "image", "codes": [token - codes.start for token in members]})
            elif not is_break and (text := tokenizer.decode(members, skip_special_tokens=True)):
                parts.append({"type": "text", "text": text})
        return parts

    def post_process_images(self, pixels: torch.Tensor, output_type: str = "pil") -> Any:
        """Turns decoded pictures into the form asked for.

        Args:
            pixels (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): In [-1, 1].
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`, the latter two in [0, 1].

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` of shape `(num_images, height, width, 3)` or `torch.Tensor`.
        """
        return VaeImageProcessor(do_resize=False).postprocess(pixels.float(), output_type=output_type)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image]:
        """Turns what `generate` returned into strings, or with `generation_mode="image"` into pictures."""
        if generation_mode == "image":
            return self.post_process_images(generated_outputs)
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )


__all__ = ["CM3LeonProcessor"]
