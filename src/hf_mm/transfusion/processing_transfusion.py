"""Text and images to `input_ids` and `pixel_values` for Transfusion, and back; the only place that lays sequences out.

A document is `<s> ... </s>` with each image as `<boi> patches <eoi>` where it stands among the text. Knows strings,
ids and pictures; what the model makes of them, and the noise, are elsewhere.
"""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BatchFeature
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .conversation_transfusion import CHAT_TEMPLATE, ConversationMixin, check_parts, check_text
from .image_processing_transfusion import TransfusionImageProcessor
from .loading_transfusion import refuse_damaged


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "boi_token", "eoi_token", "image_token")
PART_TYPES = ("text", "image", "end_of_turn")


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


class TransfusionProcessor(ConversationMixin):
    """Prepares inputs of [`TransfusionForConditionalGeneration`] and reads its outputs.

    Args:
        image_processor ([`TransfusionImageProcessor`]): Knows the picture size and the grid of patches.
        tokenizer (`PreTrainedTokenizerFast`):
            Has the tokens `bos`, `eos`, `pad` and the extra special tokens `boi_token`, `eoi_token`, `image_token`.
        chat_template (`str`, *optional*): Of conversations; the default lays them out as training does.
        edit_template (`str`, *optional*):
            How a pipeline lays out the prompt of a drawing that reads a picture, a text with `<image>` and `{prompt}`,
            such as `"Edit first image following the instruction<image>{prompt}"`. Defaults to `"<image>{prompt}"`.

    Raises:
        ValueError: If `edit_template` lacks one of its two places, or the tokenizer lacks one of the special tokens.

    Source: Transfusion (arXiv 2408.11039), section 3 (data representation).
    """

    def __init__(
        self,
        image_processor: TransfusionImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        edit_template: str | None = None,
    ) -> None:
        present = {**tokenizer.special_tokens_map}
        if missing := [name for name in SPECIAL_TOKENS if not present.get(name)]:
            raise ValueError(
                f"`tokenizer` lacks the special tokens {missing}. Train one with recipes/train_text_tokenizer.py, or "
                "pass `extra_special_tokens={'boi_token': '<boi>', 'eoi_token': '<eoi>', 'image_token': '<image>'}`."
            )
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.edit_template = edit_template or self.image_token + "{prompt}"
        if [self.edit_template.count(place) for place in (self.image_token, "{prompt}")] != [1, 1]:
            raise ValueError(
                f"`edit_template`={edit_template!r} must have one {self.image_token!r} and one '{{prompt}}', such as "
                f"'Edit first image following the instruction{self.image_token}{{prompt}}'."
            )
        self._reserved = [present[name] for name in SPECIAL_TOKENS if name != "image_token"]
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
    ) -> "TransfusionProcessor":
        """Builds the processor that fits a model's picture size and patches.

        Args:
            config ([`TransfusionConfig`]): Of the model.
            tokenizer (`PreTrainedTokenizerFast`): With the image tokens.
            chat_template (`str`, *optional*): As above.
        """
        image_processor = TransfusionImageProcessor(
            size={"shortest_edge": config.image_size},
            crop_size={"height": config.image_size, "width": config.image_size},
            vae_stride=config.vae_stride,
            patch_size=config.patch_size,
        )
        return cls(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Encodes prompts and pictures; `<image>` in a prompt stands for the next picture.

        Args:
            images (`ImageInput`, *optional*): Pictures, in the order of their places.
            text (`str` or `list[str]`, *optional*): Prompts; without any, each picture is one.
            kwargs: Those of the library's processors, such as `padding` and `return_tensors`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and, with pictures, `pixel_values` and `image_sizes`.

        Raises:
            ValueError: If a prompt is no text or spells a special token, or places and pictures are not as many.
        """
        # The beginning of a document is laid out here; a text model's tokenizer must not add another.
        kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Refuses text that spells a special token; `<image>` alone is meant, and stands for a picture."""
        super().validate_inputs(images=images, text=text, **kwargs)
        for index, sample in enumerate(text or []):
            self._refuse_reserved(f"`text`[{index}]", sample)

    def _refuse_reserved(self, field: str, text: str) -> None:
        """Refuses literal special tokens in `text`."""
        for token in self._reserved:
            if token in text:
                raise ValueError(f"{field}={text!r} contains the special token {token!r}. Write it differently.")

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
        """Expands the pictures, then opens every prompt with the beginning of a document."""
        text, offsets = super().get_text_with_replacements(text, *replacements, **kwargs)
        return [self.tokenizer.bos_token + sample for sample in text], offsets

    def num_patches(self, height: int, width: int) -> int:
        """Patches of an image of `height` by `width` latent pixels."""
        return height * width // self.image_processor.patch_size**2

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
        """Tokens that a picture of the default size takes in a sequence, its two delimiters included."""
        crop, stride = self.image_processor.crop_size, self.image_processor.vae_stride
        return self.num_patches(crop["height"] // stride, crop["width"] // stride) + 2

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Returns the tokens that stand for one picture."""
        if "image_sizes" in image_inputs:
            height, width = image_inputs["image_sizes"][image_idx]
        else:
            stride = self.image_processor.vae_stride
            height, width = (side // stride for side in image_inputs["pixel_values"][image_idx].shape[-2:])
        patches = self.image_token * self.num_patches(int(height), int(width))
        return f"{self.tokenizer.boi_token}{patches}{self.tokenizer.eoi_token}"

    def encode_document(self, content: list[dict[str, Any]]) -> dict[str, list[int]]:
        """Lays a training document out.

        Args:
            content (`list[dict]`):
                Parts in order: `{"type": "text", "text": str}`, `{"type": "image", "size": (height, width)}` in
                latent pixels, or `{"type": "end_of_turn"}`, which writes `</s>` behind all turns of a conversation
                but the last. Texts and images may have `is_answer`, True on what the model is to answer; a space
                between a text and its answer then belongs to the answer, as to the word it stands before.

        Returns:
            `dict`: `input_ids` and `labels`. The image-opening token is a target, for the model decides where to draw;
            the closing one and the patches are not. Where a part has `is_answer` also `answer_mask`: 1 on the text of
            answers, on the image-opening token and the patches of theirs, and on the `</s>` that ends one.

        Raises:
            ValueError: If a text spells a special token, an image is no multiple of the patch size, or a part has no
                known type.
        """
        check_parts(content)
        tokenizer = self.tokenizer
        input_ids, labels, answer_mask = [tokenizer.bos_token_id], [-100], [0]
        is_answer = 0
        if content and content[-1]["type"] == "end_of_turn":
            content = content[:-1]  # the end of the document is the end of its last turn
        for part in give_spaces_to_answers(content):
            ids, targets = self._encode_part(part)
            if part["type"] != "end_of_turn":
                is_answer = int(bool(part.get("is_answer")))
            input_ids += ids
            labels += targets
            answer_mask += [is_answer and int(token != tokenizer.eoi_token_id) for token in ids]
        document = {"input_ids": [*input_ids, tokenizer.eos_token_id], "labels": [*labels, tokenizer.eos_token_id]}
        if any(part.get("is_answer") is not None for part in content):
            document["answer_mask"] = [*answer_mask, is_answer]
        return document

    def _encode_part(self, part: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of one part of a document, and which of them are targets."""
        tokenizer = self.tokenizer
        if part["type"] == "text":
            self._refuse_reserved("`text`", part["text"])
            if self.image_token in part["text"]:
                raise ValueError(f"`text`={part['text']!r} contains the special token {self.image_token!r}.")
            ids = tokenizer(part["text"], add_special_tokens=False)["input_ids"]
            return ids, ids
        if part["type"] == "image":
            length = self._count_patches(part.get("size"))
            ids = [tokenizer.boi_token_id, *[self.image_token_id] * length, tokenizer.eoi_token_id]
            return ids, [tokenizer.boi_token_id, *[-100] * (length + 1)]
        if part["type"] == "end_of_turn":
            return [tokenizer.eos_token_id], [tokenizer.eos_token_id]
        raise ValueError(f"`type`={part['type']!r} of a document part is not one of {PART_TYPES}.")

    def _count_patches(self, size: Any) -> int:
        """Patches of an image, refusing one that its patches do not fill."""
        side = self.image_processor.patch_size
        if (
            not isinstance(size, Sequence)
            or len(size) != 2
            or not all(isinstance(length, Integral) for length in size)
        ):
            raise ValueError(f"`size`={size!r} of a document part must be (height, width) in latent pixels.")
        height, width = map(int, size)
        if height % side or width % side or min(height, width) < 1:
            raise ValueError(
                f"`size`={(height, width)} of a document part must be multiples of the patch size {side}."
            )
        return self.num_patches(height, width)

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


__all__ = ["TransfusionProcessor"]
