"""Drawing with CM3Leon beside retrieved documents, which stand in front of the prompt.

A part of the pipeline, whose stages it uses: reading codes, drawing. Who retrieves, and by what, is not known here.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from PIL import Image


# Documents of a prompt where a retriever is given and no number: Table 1 is best with two.
DEFAULT_NUM_RETRIEVED = 2
DOCUMENT_KEYS = ("text", "image", "codes")


class DocumentRetriever(Protocol):
    """Whatever finds documents for prompts, such as `hf_mm.data.retrieval.Retriever`."""

    def retrieve(self, texts: Sequence[str], *, num_retrieved: int) -> Any:
        """Finds documents.

        Args:
            texts (`Sequence[str]`): Prompts.
            num_retrieved (`int`): How many for each, 1 or more.

        Returns:
            An object whose `documents` is a list for each prompt, best first and perhaps shorter: `{"text": str,
            "image": PIL.Image.Image}` or `{"text": str, "codes": list[int]}`, where one of the two may be missing.
        """
        ...


class RetrievalMixin:
    """How [`CM3LeonPipeline`] lays out prompts with retrieved documents."""

    def _find_documents(
        self,
        prompts: list[str],
        images: list[Image.Image] | None,
        retriever: DocumentRetriever | None,
        num_retrieved: int | None,
        retrieved: list[list[Mapping[str, Any]]] | None,
    ) -> list[list[Mapping[str, Any]]]:
        """Lists each prompt's documents: those given, or those that the retriever finds; none without either.

        Raises:
            ValueError: If both or neither are given where one is needed, or a document is none.
        """
        if retriever is not None and retrieved is not None:
            raise ValueError("`retriever` and `retrieved` are both given: the documents come from one or the other.")
        if num_retrieved is not None and num_retrieved < 0:
            raise ValueError(f"`num_retrieved`={num_retrieved} must be at least 0.")
        if num_retrieved is not None and retrieved is not None:
            raise ValueError(f"`num_retrieved`={num_retrieved} is for a `retriever`; all of `retrieved` are used.")
        if num_retrieved and retriever is None:
            raise ValueError(f"`num_retrieved`={num_retrieved} needs a `retriever` to find them.")
        if retriever is not None:
            wanted = DEFAULT_NUM_RETRIEVED if num_retrieved is None else num_retrieved
            asked = [prompt for prompt in prompts if prompt]  # an empty one asks for nothing
            found = iter(retriever.retrieve(asked, num_retrieved=wanted).documents if wanted and asked else ())
            retrieved = [next(found, []) if prompt else [] for prompt in prompts]
        documents: list[list[Mapping[str, Any]]] = [[] for _ in prompts] if retrieved is None else retrieved
        _check_documents(documents, len(prompts))
        if images is not None and any(documents):
            raise ValueError("`image` and retrieved documents are both given; the model follows one or the other.")
        return documents

    def _lay_out_retrieved(
        self, prompts: list[str], documents: list[list[Mapping[str, Any]]], num_others: int
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of each prompt behind its documents, and of the other streams of guidance.

        A prompt is `<eos> T1 <break> I1 <break> T2 <break> I2 <break> Tq <break>`, documents in the order given, the
        retriever's best first: RA-CM3 numbers them so, and training, which shuffles them, prefers no order. The
        unconditional stream is the same without `Tq <break>`: documents stay in both streams, for it is the text that
        guidance follows, and no sentinel stands for the text. A prompt without documents is as ever, its unconditional
        stream that of `unconditional_prompt`, which is also the last stream where the documents are followed too.

        Raises:
            ValueError: If a prompt leaves no room for the picture.

        Source: CM3Leon (arXiv 2309.02591), section 2.1 and figure 8 (layout); the unconditional stream as in the
        authors' sampling code, for the paper does not spell it.
        """
        tokenizer = self.processor.tokenizer
        rows, others = [], []
        for number, (text, parts) in enumerate(zip(prompts, self._encode_documents(documents), strict=True)):
            known = [tokenizer.eos_token_id, *(token for part in parts for token in part)]
            unknown = self.processor.unconditional_prompt()
            unconditional = known if parts else unknown
            query = [*self._encode_part([{"type": "text", "text": text}]), tokenizer.break_token_id]
            rows.append([*known, *query] if text else unconditional)
            others.append([unconditional, unknown][:num_others])
            self._check_documents_fit(number, list(map(len, parts)), len(rows[-1]))
        return rows, others

    def _encode_documents(self, documents: list[list[Mapping[str, Any]]]) -> list[list[list[int]]]:
        """Ids of every document, its last `<break>` included; each picture is read once, all of them together."""
        flat = [document for of_prompt in documents for document in of_prompt]
        pictures = {id(one["image"]): one["image"] for one in flat if one.get("image") is not None}
        read = self._read_codes(list(pictures.values())) if pictures else []
        codes = dict(zip(pictures, read, strict=True))

        def encode(document: Mapping[str, Any]) -> list[int]:
            text, given = document.get("text"), document.get("codes")
            picture = codes[id(document["image"])] if document.get("image") is not None else given
            content = [{"type": "text", "text": text}] if text else []
            content += [] if picture is None else [{"type": "image", "codes": picture}]
            return [*self._encode_part(content), self.processor.tokenizer.break_token_id]

        return [[encode(document) for document in of_prompt] for of_prompt in documents]

    def _encode_part(self, content: list[dict[str, Any]]) -> list[int]:
        """Ids of a part of a document, without the delimiters around the whole."""
        return self.processor.encode_document(content)["input_ids"][1:-1]

    def _check_documents_fit(self, number: int, lengths: list[int], needed: int) -> None:
        """Refuses documents that leave no room for the picture, and says how many would fit."""
        limit, picture = self.model.config.max_position_embeddings, self.processor.codes_per_image()
        if not lengths or needed + picture <= limit:  # without documents the model itself refuses
            return
        room = limit - picture - (needed - sum(lengths))
        num_fitting = sum(length <= room for length in accumulate(lengths))
        raise ValueError(
            f"`prompt`[{number}] with {len(lengths)} retrieved documents takes {needed} positions and the picture "
            f"{picture}; the model has {limit}. The first {num_fitting} of the documents would fit: ask for no more."
        )


def _check_documents(documents: Any, num_prompts: int) -> None:
    """Refuses what is no list of documents for each prompt."""
    if not isinstance(documents, list) or not all(isinstance(of_prompt, list) for of_prompt in documents):
        raise ValueError("`retrieved` must be a list of documents for each prompt, such as [[{'text': ...}]].")
    if len(documents) != num_prompts:
        raise ValueError(
            f"`retrieved` has {len(documents)} entries; give a list of documents for each of {num_prompts} prompts, "
            "an empty one where there are none."
        )
    for row, of_prompt in enumerate(documents):
        for place, document in enumerate(of_prompt):
            where = f"`retrieved`[{row}][{place}]"
            if not isinstance(document, Mapping):
                raise ValueError(f"{where} is a {type(document).__name__}; give a dict with {DOCUMENT_KEYS}.")
            if unknown := [key for key in document if key not in DOCUMENT_KEYS]:
                raise ValueError(f"{where} has the keys {unknown}; a document has {DOCUMENT_KEYS}.")
            given = {key for key in DOCUMENT_KEYS if document.get(key) is not None}
            if not given or given == {"text"} and not document["text"]:
                raise ValueError(f"{where} has neither text nor picture. Leave it out.")
            if {"image", "codes"} <= given:
                raise ValueError(f"{where} has both `image` and `codes`; give one of them.")


__all__ = ["DocumentRetriever", "RetrievalMixin"]
