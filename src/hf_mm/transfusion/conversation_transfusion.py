"""Conversations as Transfusion reads them: the turns of users and answers, laid out as one document.

Knows messages and pictures; how parts become ids is the processor's `encode_document`, as in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessorMixin, TextKwargs


ROLES = ("system", "user", "assistant")

# What a conversation looks like as a string: its texts and `<image>` one behind the other, and a turn ends as a
# document does, with `</s>`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in content %}{{ image_token if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endgeneration %}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% else %}"
    "{% for part in content %}{{ image_token if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def check_text(text: Any, field: str) -> None:
    """Refuses what no tokenizer reads: what is no string, and half characters (lone surrogates).

    Args:
        text (`str`): A text.
        field (`str`): What an error names.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"{field}={text!r} is a {type(text).__name__}; give a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} has {text[error.start]!r} at place {error.start}, half of a character (a lone surrogate). "
            "Decode the bytes that the text came from as UTF-8."
        ) from error


def check_parts(content: Any) -> None:
    """Refuses what is no list of parts, each with its type, and texts that no tokenizer reads.

    Args:
        content (`list[dict]`): Parts of a document.

    Raises:
        ValueError: Naming the first part that is none.
    """
    if not isinstance(content, list | tuple):
        raise ValueError(f"`content`={content!r} must be a list of parts, such as {{'type': 'text', 'text': 'a'}}.")
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f"`content`[{number}]={part!r} must be a part with a `type`, such as 'text' or 'image'.")
        if part["type"] == "text":
            check_text(part.get("text"), f"`content`[{number}], `text`")


def check_messages(messages: Any) -> None:
    """Refuses what is no list of messages.

    Args:
        messages (`list[dict]`): A conversation.

    Raises:
        ValueError: Naming what is none.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"`conversation`={messages!r} must be a list of messages, {{'role', 'content'}}.")
    for number, message in enumerate(messages):
        parts = message.get("content")
        if not isinstance(parts, str | list | tuple | None) or (
            not isinstance(parts, str | None) and not all(isinstance(part, Mapping) for part in parts)
        ):
            raise ValueError(f"Message {number} has the `content` {parts!r}; give a text, or a list of parts.")


def list_conversations(conversation: Any) -> list[Sequence[Mapping[str, Any]]]:
    """Lists the conversations of a batch, or the only one.

    Args:
        conversation (`list[dict]` or a list of such lists): Messages.

    Returns:
        `list[list[dict]]`: one or more.

    Raises:
        ValueError: If it is no list of messages.
    """
    batch = conversation
    if isinstance(conversation, Sequence) and conversation and isinstance(conversation[0], Mapping):
        batch = [conversation]
    for messages in batch if isinstance(batch, list | tuple) else [batch]:
        check_messages(messages)
    if not batch:
        raise ValueError("The conversation has no message.")
    return list(batch)


def list_parts(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Lists the parts of a message.

    Args:
        message (`dict`): With `role` and `content`, a text or a list of parts.
        where (`str`): What an error names.

    Returns:
        `list[dict]`: `{"type": "text", "text": str}` and `{"type": "image", "image": Any}`, the latter a picture, or
        its address or path.

    Raises:
        ValueError: If the role or the type of a part is unknown, or a part lacks what it is of.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} has the `role` {role!r}, which is not one of {ROLES}.")
    if isinstance(content, str):
        check_text(content, f"{where}, `content`")
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"{where} has the `content` {content!r}; give a text, or a list of parts.")
    parts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        names = {"text": ("text",), "image": ("image", "url", "path")}.get(kind if isinstance(kind, str) else "")
        if names is None:
            raise ValueError(f"{where}, part {number}: `type`={kind!r} is not one of 'text', 'image'.")
        given = [part[name] for name in names if part.get(name) is not None]
        if not given:
            raise ValueError(f"{where}, part {number}, has no `{names[0]}`. Messages bring their texts and pictures.")
        if kind == "text":
            check_text(given[0], f"{where}, part {number}, `text`")
        parts.append({"type": kind, names[0]: given[0]})
    return parts


def conversation_content(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns a conversation into the parts of one document.

    Args:
        messages (`list[dict]`): In order, each with `role` (`"system"`, `"user"` or `"assistant"`) and `content`, a
            text or parts `{"type": "text", "text": str}` and `{"type": "image", "image": PIL.Image.Image}`.

    Returns:
        `list[dict]`: parts with `is_answer`, True on the assistant's, and `{"type": "end_of_turn"}` behind each of its
        messages but a last one. Where the assistant is next, the text in front of its answer ends in no space.

    Raises:
        ValueError: If there is no message, or one does not fit; it says which.

    Example:
        >>> conversation_content([{"role": "user", "content": "hello "}, {"role": "assistant", "content": "hi"}])
        [{'type': 'text', 'text': 'hello ', 'is_answer': False}, {'type': 'text', 'text': 'hi', 'is_answer': True}]

    """
    check_messages(messages)
    if not messages:
        raise ValueError("The conversation has no message.")
    content: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        parts = list_parts(message, f"Message {number}")
        is_answer = message["role"] == "assistant"
        content += [{**part, "is_answer": is_answer} for part in parts]
        if is_answer and number < len(messages) - 1:
            content.append({"type": "end_of_turn"})
    if messages[-1]["role"] != "assistant" and content and content[-1]["type"] == "text":
        content[-1]["text"] = content[-1]["text"].rstrip(" ")
    return content


def read_tensor_type(
    return_tensors: str | None, processor_kwargs: Mapping[str, Any] | None, kwargs: Mapping[str, Any]
) -> str | None:
    """Reads from what `apply_chat_template` was given which tensors to return, and refuses what nothing reads.

    Args:
        return_tensors (`str`, *optional*): `"auto"` for that of `processor_kwargs`, which else may hold none.
        processor_kwargs (`dict`, *optional*): Settings of the processor.
        kwargs (`dict`): Settings of the processor, and variables of the template, which are left alone.

    Returns:
        `str`, *optional*: Such as `"pt"`.

    Raises:
        ValueError: If there is a setting that conversations do not read.
    """
    known = TextKwargs.__annotations__ | ImagesKwargs.__annotations__
    asked = {**(processor_kwargs or {}), **{name: kwargs[name] for name in kwargs if name in known}}
    settings = {name: value for name, value in asked.items() if value is not None}
    tensors = settings.pop("return_tensors", None) if return_tensors == "auto" else return_tensors
    if settings.pop("padding", True) not in (True, "longest") or settings:
        raise ValueError(
            f"`processor_kwargs`: of {asked} conversations read `return_tensors` and `padding=True`, which goes "
            "with it. Leave out the others."
        )
    return tensors


def pad_left(rows: Sequence[Sequence[int]], filler: int) -> list[list[int]]:
    """Fills rows of different lengths up on the left."""
    width = max(map(len, rows))
    return [[filler] * (width - len(row)) + list(row) for row in rows]


class ConversationMixin(ProcessorMixin):
    """What [`TransfusionProcessor`] does with conversations."""

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Lays a conversation out: as ids exactly as in training, else as a string to look at.

        Ids do not come from the string, in which the end of a question and the beginning of its answer would be one
        word: they are those of `encode_document`. A conversation ends where the assistant is to answer, or behind its
        answer. A `chat_template` of one's own is rendered and tokenized as by any processor of transformers.

        Args:
            conversation (`list[dict]` or a list of such lists):
                Messages with `role` and `content`; pictures are parts `{"type": "image", "image": picture}`, or with
                `url` or `path`.
            chat_template (`str`, *optional*): Another template.
            add_generation_prompt (`bool`, defaults to `False`):
                Has no effect: nothing stands between a question and its answer.
            continue_final_message (`bool`, defaults to `False`): Whether to leave the last answer open.
            return_assistant_tokens_mask (`bool`, defaults to `False`):
                Whether to return `assistant_masks`, 1 on what the assistant says and on what ends it.
            tokenize (`bool`, defaults to `False`): Whether to return ids.
            return_tensors (`str`, *optional*): Such as `"pt"`; conversations are then padded on the left.
            return_dict (`bool`, defaults to `False`): Whether to return all inputs of the model, or `input_ids` alone.
            processor_kwargs (`dict`, *optional*): `return_tensors` and `padding=True`, which goes with it.
            kwargs: Likewise; where `tokenize` is false or the template another, those of the library's processors.
                Further ones are variables of the template.

        Returns:
            `str`, `list[list[int]]` or `BatchFeature`.

        Raises:
            ValueError: If a message does not fit or spells a special token, or nothing reads an argument.
        """
        conversations = list_conversations(conversation)
        if not tokenize or (chat_template or self.chat_template) != CHAT_TEMPLATE:
            return super().apply_chat_template(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                tokenize=tokenize,
                return_tensors=return_tensors,
                return_dict=return_dict,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        tensors = read_tensor_type(return_tensors, processor_kwargs, kwargs)
        if continue_final_message and add_generation_prompt:
            raise ValueError("`continue_final_message` and `add_generation_prompt` contradict each other. Give one.")
        inputs = self.encode_conversations(conversations, is_open=continue_final_message, return_tensors=tensors)
        masks = inputs.pop("assistant_masks")
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = masks
        return inputs if return_dict else inputs["input_ids"]

    def encode_conversations(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        is_open: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Encodes conversations up to where the assistant is to answer, or with a finished answer at their end.

        Args:
            conversations (`list[list[dict]]`): See `conversation_content`; pictures may also be addresses or paths.
            is_open (`bool`, defaults to `False`): Whether to leave an answer at the end open, for the model to go on.
            return_tensors (`str`, *optional*): Such as `"pt"`; the rows are then padded on the left.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask`, `assistant_masks` and, with pictures, `pixel_values` and
            `image_sizes`.

        Raises:
            ValueError: If a message does not fit, or spells a special token.
        """
        contents = [conversation_content(messages) for messages in conversations]
        pictures = [part.pop("image") for content in contents for part in content if part["type"] == "image"]
        images: dict[str, Any] = {}
        if pictures:
            images = dict(self.image_processor(self.image_processor.fetch_images(pictures), return_tensors="pt"))
            stride = self.image_processor.vae_stride
            alike = tuple(side // stride for side in images["pixel_values"].shape[-2:])
            sizes = iter(images["image_sizes"].tolist() if "image_sizes" in images else [alike] * len(pictures))
            for part in (part for content in contents for part in content if part["type"] == "image"):
                part["size"] = tuple(next(sizes))
        rows, marks = [], []
        for messages, content in zip(conversations, contents, strict=True):
            document = self.encode_document(content)
            # What closes the document stands behind a finished answer only.
            stop = -1 if is_open or messages[-1]["role"] != "assistant" else None
            rows.append(document["input_ids"][:stop])
            marks.append(document.get("answer_mask", [0] * len(document["input_ids"]))[:stop])
        kept = [[1] * len(row) for row in rows]
        if return_tensors is not None:
            rows = pad_left(rows, self.tokenizer.pad_token_id)
            kept, marks = pad_left(kept, 0), pad_left(marks, 0)
        ids = {"input_ids": rows, "attention_mask": kept, "assistant_masks": marks}
        return BatchFeature({**ids, **images}, tensor_type=return_tensors)


__all__ = ["CHAT_TEMPLATE", "ConversationMixin", "conversation_content"]
