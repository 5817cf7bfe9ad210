"""Sample keys to documents: rows are laid out, images noised or their codes masked, each sample by its own generator.

The processor lays documents out and the model's sampler draws timesteps; both come as arguments, so nothing here
knows a model. What a document holds is what `forward` takes: images and noise, or codes among the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .cm3_masking import CM3Masking, mask_answer, mask_document
from .formats import RowError, center_crop_resize, open_image
from .mixing import DocumentArguments, SampleKey, build_content, sample_generator
from .retrieved_documents import Retrieved, RetrievedPairs
from .task_documents import TASK, TaskArguments, TaskContent


Document = dict[str, Any]
Row = dict[str, Any]
Parts = list[dict[str, Any]]

# Of models that caption what comes first, and draw guided by what has no caption.
CAUSAL_SHARES = {"image_first_share": 0.2, "caption_dropout": 0.1}


class DocumentEncoder(Protocol):
    """What is needed of a processor."""

    def encode_document(self, content: list[dict[str, Any]]) -> dict[str, list[int]]:
        """Lays a document out as `input_ids` and `labels`."""


class TrainingDocuments(torch.utils.data.Dataset[Document], ABC):
    """Builds the document of a sample key; how its images enter is the subclasses'.

    Args:
        rows (`datasets.Dataset`): Pairs or documents.
        processor (`DocumentEncoder`): Lays documents out.
        arguments (`DocumentArguments`): Order, dropout and noise cap.
        seed (`int`): Of all draws.
        text_rows (`datasets.Dataset`, *optional*): Text-only rows, the source 1 of the keys.
        max_tokens (`int`, *optional*): Longer text-only documents give a stretch of that length, drawn anew each time.
            Documents with images are never cut, but refused.
        form_weights (`dict`, *optional*): Chances of the caption forms.
        task_content ([`TaskContent`], *optional*): Fills the templates of rows that have a task.
    """

    def __init__(
        self,
        rows: Any,
        *,
        processor: DocumentEncoder,
        arguments: DocumentArguments,
        seed: int,
        text_rows: Any = None,
        max_tokens: int | None = None,
        form_weights: dict[str, float] | None = None,
        task_content: TaskContent | None = None,
    ) -> None:
        self.sources = (rows, text_rows)
        self.processor, self.arguments, self.seed = processor, arguments, seed
        self.form_weights, self.max_tokens, self.task_content = form_weights, max_tokens, task_content

    def __getitem__(self, key: SampleKey) -> Document:
        """Builds the document of one sample."""
        return self.build(self.sources[key.source][key.row], key)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Document]:
        """Builds the documents of a batch; rows are read together, which costs less."""
        numbers: dict[int, list[int]] = {}
        for key in keys:
            numbers.setdefault(key.source, []).append(key.row)
        rows = {source: iter(self.sources[source].__getitems__(wanted)) for source, wanted in numbers.items()}
        return [self.build(next(rows[key.source]), key) for key in keys]

    def build(self, row: dict[str, Any], key: SampleKey) -> Document:
        """Builds the document of a row that is at hand, as the sample of a key."""
        generator = sample_generator(self.seed, key.number)
        if self.task_content is not None and TASK in row:
            return self._lay_out(row, self.task_content(row, generator), None, key, generator)
        content, max_timestep = build_content(row, self.arguments, generator, self.form_weights)
        return self._lay_out(row, content, max_timestep, key, generator)

    @abstractmethod
    def _lay_out(
        self,
        row: dict[str, Any],
        content: list[dict[str, Any]],
        max_timestep: int | None,
        key: SampleKey,
        generator: torch.Generator,
    ) -> Document:
        """Makes the document of its parts."""

    def _fit(
        self, document: Document, key: SampleKey, generator: torch.Generator, *, has_images: bool, reserved: int = 0
    ) -> Document:
        """Cuts a text that is too long; refuses a document with images that has no room for `reserved` tokens more."""
        length = len(document["input_ids"])
        if self.max_tokens is None or length + (reserved if has_images else 0) <= self.max_tokens:
            return document
        if has_images:
            more = f" and {reserved} more for masked spans" if reserved else ""
            raise RowError(
                f"Row {key.row}: its document has {length} tokens{more}, more than the {self.max_tokens} of a window. "
                "Lower `max_caption_tokens`, or raise `window_length`."
            )
        return cut_text(document, self.max_tokens, generator)


class NoisedDocuments(TrainingDocuments):
    """Documents whose images stand beside the tokens, with the noise and the timesteps they are trained at.

    Args:
        rows (`datasets.Dataset`): Pairs or documents, encoded or not.
        image_size (`int`): Pixels that unencoded pictures are cropped and resized to.
        latent_shape (`tuple[int, int, int]`): Channels, height and width of the noise of such a picture.
        sample_timesteps (`Callable`): `sample_timesteps(num_images, max_timestep=, generator=)` of the model.
        arguments (`DocumentArguments`): Without shares of its own, those of Transfusion.
        fields: Those of [`TrainingDocuments`].

    Source: Transfusion (arXiv 2408.11039), section 4.1, for the 20% of images that come first.
    """

    def __init__(
        self,
        rows: Any,
        *,
        image_size: int,
        latent_shape: tuple[int, int, int],
        sample_timesteps: Callable[..., torch.Tensor],
        arguments: DocumentArguments,
        **fields: Any,
    ) -> None:
        super().__init__(rows, arguments=arguments.with_defaults(**CAUSAL_SHARES), **fields)
        self.image_size, self.latent_shape, self.sample_timesteps = image_size, latent_shape, sample_timesteps

    def _lay_out(
        self,
        row: dict[str, Any],
        content: list[dict[str, Any]],
        max_timestep: int | None,
        key: SampleKey,
        generator: torch.Generator,
    ) -> Document:
        images = [self._read_image(row, part, generator) for part in content if part["type"] == "image"]
        # Pictures that the model's image tokenizer has yet to encode get noise of the shape they will have then.
        is_encoded = "latent_mean" in row or any("latent_mean" in part for part in content)
        has_final_shape = is_encoded or self.latent_shape[1] == self.image_size
        shapes = [tuple(image.shape) if has_final_shape else self.latent_shape for image in images]
        sizes = iter(shapes)
        parts = [{**part, "size": next(sizes)[1:]} if part["type"] == "image" else part for part in content]
        document: Document = dict(self.processor.encode_document(parts))
        if (answer_mask := document.pop("answer_mask", None)) is not None:
            # What is asked about is seen clean, and has no loss: only what answers is drawn, one picture at a time.
            answers = [part["is_answer"] for part in content if part["type"] == "image"]
            document["clean_images"] = see_all_but_one(answers, generator)
            if self.task_content is not None and not self.task_content.arguments.train_on_inputs:
                document["labels"] = keep_answers(document["labels"], answer_mask)
        document = self._fit(document, key, generator, has_images=bool(images))
        document["images"] = images
        document["noise"] = [torch.randn(shape, generator=generator) for shape in shapes]
        document["timesteps"] = self.sample_timesteps(len(images), max_timestep=max_timestep, generator=generator)
        return document

    def _read_image(self, row: dict[str, Any], part: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        """Returns a picture in [-1, 1], or latents from what the encoder saved of it, sampled or their mean."""
        held = {**row, **part}  # a part of a document or a task has a picture of its own
        if "latent_mean" in held:
            mean, std = (
                torch.as_tensor(np.asarray(held[name], dtype=np.float32)) for name in ("latent_mean", "latent_std")
            )
            if not self.arguments.samples_latents:
                return mean
            return mean + std * torch.randn(mean.shape, generator=generator)
        if "pixels" in held:
            pixels = np.asarray(held["pixels"], dtype=np.uint8)
        else:
            picture = open_image(held.get("image"))
            pixels = np.asarray(center_crop_resize(picture, self.image_size)).transpose(2, 0, 1)
        return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


class CodeDocuments(TrainingDocuments):
    """Documents whose images are codes among the tokens, some spans masked and moved to the end.

    Captions are not dropped besides: a masked caption leaves `<eos> <sentinel:0> <break> CODES`, which is the prompt
    of the unconditional stream, and does not lose the caption as a target.

    Without `masking` documents stay as they are, for a causal model. Some captions are then dropped, and some come
    behind their image, as in [`NoisedDocuments`].

    With `retrieval`, pairs of a memory bank stand in front of the row's own:
    `<eos> T1 <break> I1 <break> ... Tq <break> Iq <eos>`. All tokens are targets alike, and every part may be masked.
    The unconditional stream is then `<eos> T1 <break> I1 <break> ... <break> Iq`, so some own captions are left out. A
    document that is too long for its window loses retrieved pairs, the least relevant first; `num_retrieved` and
    `num_left_out` count them.

    Args:
        rows (`datasets.Dataset`): Pairs with `codes`, or documents whose images have `codes`.
        masking (`CM3Masking`, *optional*): Of the spans; `None` for causal documents.
        arguments (`DocumentArguments`): Without shares of its own every caption comes before its image, or, in causal
            documents, those of Transfusion. Behind retrieved pairs a caption is left out for `caption_dropout` or for
            `query_caption_dropout` of the retrieval.
        retrieval ([`RetrievedPairs`], *optional*): What stands in front of rows that have `neighbor_ids`.
        fields: Those of [`TrainingDocuments`].

    A task's written answer is masked whole and follows behind the document; a drawn one stands last as it is. With
    `answer_masking_share` below 1 the other documents of tasks are masked as any.

    Raises:
        ValueError: If `arguments` asks for what belongs to noised images.

    Source: CM3Leon (arXiv 2309.02591), sections 2.1 and 2.2, figures 8 and 9.
    """

    def __init__(
        self,
        rows: Any,
        *,
        masking: CM3Masking | None,
        arguments: DocumentArguments,
        retrieval: RetrievedPairs | None = None,
        **fields: Any,
    ) -> None:
        if arguments.noise_cap is not None:
            raise ValueError(f"`noise_cap`={arguments.noise_cap}: codes are not noised. Leave it out.")
        if masking is not None and arguments.caption_dropout:
            raise ValueError(
                f"`caption_dropout`={arguments.caption_dropout}: documents with codes have masked captions instead. "
                "Leave it out, and set `whole_segment_share`, or train a model with `objective`='causal'."
            )
        shares = {"image_first_share": 0.0, "caption_dropout": 0.0} if masking is not None else CAUSAL_SHARES
        super().__init__(rows, arguments=arguments.with_defaults(**shares), **fields)
        self.masking, self.retrieval = masking, retrieval
        self.max_added_tokens = 0 if masking is None else masking.max_added_tokens

    def _lay_out(
        self,
        row: dict[str, Any],
        content: list[dict[str, Any]],
        max_timestep: int | None,
        key: SampleKey,
        generator: torch.Generator,
    ) -> Document:
        parts = [
            {**part, "codes": find_codes(row, part, key)} if part["type"] == "image" else part for part in content
        ]
        has_images = any(part["type"] == "image" for part in parts)
        drawn = Retrieved()
        if self.retrieval is not None:
            drawn = self.retrieval.draw(row, f"Row {key.row}", generator, self.form_weights)
        document, kept = self._encode(parts, drawn)
        document = self._fit(document, key, generator, has_images=has_images, reserved=self.max_added_tokens)
        if "answer_mask" in document and self.task_content is not None:
            writes = parts[-1]["type"] != "image" or not parts[-1]["is_answer"]
            return self._mask_task(document, generator, self.task_content.arguments, writes)
        masked = self._mask(document, generator)
        if self.retrieval is None:
            return masked
        num_retrieved = len(kept.pairs)
        return {**masked, "num_retrieved": num_retrieved, "num_left_out": len(drawn.pairs) - num_retrieved}

    def _mask(self, document: Document, generator: torch.Generator) -> Document:
        """Moves spans of a document to its end, where there are any; every token but the first is a target."""
        ids = np.asarray(document["input_ids"], dtype=np.int64)
        if self.masking is None:
            return {"input_ids": ids, "labels": np.asarray(document["labels"], dtype=np.int64)}
        ids = mask_document(ids, generator, self.masking, max_length=self.max_tokens)
        return {"input_ids": ids, "labels": np.concatenate([[-100], ids[1:]])}

    def _mask_task(
        self, document: Document, generator: torch.Generator, arguments: TaskArguments, writes: bool
    ) -> Document:
        """Masks a task's written answer whole and leaves a drawn one at the end, or masks it as any document.

        A causal document has either where it is, at the end.
        """
        if self.masking is not None and torch.rand((), generator=generator) >= arguments.answer_masking_share:
            return self._mask(document, generator)
        ids = np.asarray(document["input_ids"], dtype=np.int64)
        is_answer = np.asarray(document["answer_mask"], dtype=bool)
        if writes and self.masking is not None:
            ids, is_answer = mask_answer(ids, is_answer, self.masking)
        labels = np.concatenate([[-100], ids[1:]])
        return {"input_ids": ids, "labels": labels if arguments.train_on_inputs else keep_answers(labels, is_answer)}

    def _encode(self, parts: list[dict[str, Any]], retrieved: Retrieved) -> tuple[Document, Retrieved]:
        """Lays a document out with as many of the retrieved pairs as fit, and says which."""
        while True:
            document = dict(self.processor.encode_document(retrieved.before(parts)))
            length = len(document["input_ids"]) + self.max_added_tokens
            if not retrieved.pairs or self.max_tokens is None or length <= self.max_tokens:
                return document, retrieved
            retrieved = retrieved.without_least_relevant()


def see_all_but_one(answers: Sequence[bool], generator: torch.Generator) -> list[bool]:
    """Draws which of the drawn answers is denoised; all others are seen clean, as a later turn sees them.

    Args:
        answers (`list[bool]`): For each picture whether it is an answer.
        generator (`torch.Generator`): Draws only where there are several.

    Returns:
        `list[bool]`: for each picture whether it is seen clean.
    """
    drawn = [number for number, is_answer in enumerate(answers) if is_answer]
    if len(drawn) > 1:
        drawn = [drawn[int(torch.randint(len(drawn), (1,), generator=generator))]]
    return [number not in drawn for number in range(len(answers))]


def keep_answers(labels: Sequence[int] | np.ndarray, is_answer: Sequence[int] | np.ndarray) -> np.ndarray:
    """Leaves targets on the tokens of answers alone."""
    return np.where(np.asarray(is_answer, dtype=bool), np.asarray(labels), -100)


def find_codes(row: dict[str, Any], part: dict[str, Any], key: SampleKey) -> Any:
    """Returns the codes of an image, which stand with its document's part or with its pair's row."""
    codes = part["codes"] if "codes" in part else row.get("codes")
    if codes is None:
        raise RowError(
            f"Row {key.row}: its image has no `codes`, and the model reads nothing else in training. Encode the "
            "images with recipes/encode_images.py and the model's image tokenizer, and name its folder."
        )
    return codes


def cut_text(document: Document, max_tokens: int, generator: torch.Generator) -> Document:
    """Takes a random stretch of a text that is too long; its first token is no target, for nothing predicts it."""
    excess = len(document["input_ids"]) - max_tokens
    start = int(torch.randint(excess + 1, (1,), generator=generator))
    stretch = {name: values[start : start + max_tokens] for name, values in document.items()}
    stretch["labels"] = [-100, *stretch["labels"][1:]]
    return stretch
