"""A frozen CLIP as a bi-encoder: pictures, texts and documents to unit vectors whose inner product is their likeness.

Knows CLIP's two towers, not rows, indexes or what the vectors are for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from transformers import AutoProcessor, CLIPModel

from .fingerprints import digest_text, digest_weights


# Axes: B batch, D dimension of the vectors.
MIN_NORM = 1e-6


class VectorError(ValueError):
    """A vector that cannot be searched; the message names the field and what is wrong with it."""


def unit_vectors(vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Scales vectors to length 1.

    Args:
        vectors (`np.ndarray` of shape `(batch_size, dimension)`): Of any length but zero.
        names (`Sequence[str]`): What each is, for errors, such as "Row 7, column `image`".

    Returns:
        `np.ndarray` of the same shape and type float32.

    Raises:
        VectorError: If one has values that are not finite, or no length.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    for number in np.flatnonzero(~np.isfinite(norms[:, 0]))[:1]:
        raise VectorError(
            f"{names[number]}: its vector has NaN or infinite values. The encoder must give finite ones."
        )
    for number in np.flatnonzero(norms[:, 0] < MIN_NORM)[:1]:
        raise VectorError(f"{names[number]}: its vector has length {norms[number, 0]:.1g}, so it has no direction.")
    return vectors / norms


def document_vectors(
    text_vectors: np.ndarray,
    image_vectors: np.ndarray,
    has_text: np.ndarray,
    has_image: np.ndarray,
    names: Sequence[str],
) -> np.ndarray:
    """Averages the unit vectors of text and image and scales the mean to length 1; one alone stands for itself.

    The mean of two unit vectors at CLIP's usual cosine of 0.3 has a length of 0.8, and an inner product with itself of
    0.65, which a cap of 0.9 on the likeness would never meet; hence the scaling.

    Args:
        text_vectors (`np.ndarray` of shape `(batch_size, dimension)`): Unit vectors; ignored where there is no text.
        image_vectors (`np.ndarray` of shape `(batch_size, dimension)`): Likewise of images.
        has_text (`np.ndarray` of shape `(batch_size,)` and type bool): Which documents have a text.
        has_image (`np.ndarray` of shape `(batch_size,)` and type bool): Which have an image.
        names (`Sequence[str]`): What each is, for errors.

    Returns:
        `np.ndarray` of shape `(batch_size, dimension)` and type float32: unit vectors.

    Raises:
        VectorError: If a document has neither, or text and image cancel.

    Source: CM3Leon (arXiv 2309.02591), section 2.1: the mean of both. Differs: scaled to length 1, see above.
    """
    for number in np.flatnonzero(~has_text & ~has_image)[:1]:
        raise VectorError(f"{names[number]}: it has neither a text nor an image. Leave such rows out.")
    total = np.where(has_text[:, None], text_vectors, 0) + np.where(has_image[:, None], image_vectors, 0)
    return unit_vectors(total, names)


def drop_tokens(ids: Sequence[int], share: float, rng: np.random.Generator) -> list[int]:
    """Leaves out tokens at random, in the mean exactly the share, and always keeps one.

    Args:
        ids (`Sequence[int]`): Tokens of a query, without those that only delimit it.
        share (`float`): Of the tokens to leave out, at least 0 and below 1. A share of a token becomes a chance.
        rng (`np.random.Generator`): Source of the draw.

    Returns:
        `list[int]`: what stays, in its order.

    Source: CM3Leon (arXiv 2309.02591), section 2.1: 20% of the query's tokens.

    Example:
        >>> drop_tokens(range(10), 0.2, np.random.default_rng(0))
        [0, 1, 3, 5, 6, 7, 8, 9]

    """
    num_dropped = min(int(share * len(ids) + rng.random()), len(ids) - 1)
    dropped = set(rng.choice(len(ids), max(num_dropped, 0), replace=False).tolist())
    return [token for place, token in enumerate(ids) if place not in dropped]


class ClipEncoder:
    """Turns pictures and texts into unit vectors of one space.

    Args:
        model (`CLIPModel`): Frozen.
        processor (`CLIPProcessor`): Its processor.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where to encode, in full precision.
        name (`str`, defaults to `"CLIP"`): For messages.
    """

    def __init__(
        self, model: CLIPModel, processor: Any, device: torch.device | str = "cpu", name: str = "CLIP"
    ) -> None:
        self.model, self.processor = model.to(device).float().eval(), processor
        self.device, self.name = torch.device(device), name

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu") -> "ClipEncoder":
        """Loads a CLIP and its processor from a folder or the Hub."""
        return cls(CLIPModel.from_pretrained(name), AutoProcessor.from_pretrained(name), device, name)

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.model.config.projection_dim

    def fingerprint(self) -> str:
        """Hashes what the vectors depend on: weights, vocabulary and the treatment of pictures."""
        vocabulary = sorted(self.processor.tokenizer.get_vocab().items())
        treatment = self.processor.image_processor.to_json_string()
        return digest_text(f"{digest_weights(self.model)} {vocabulary} {treatment}")

    @torch.inference_mode()
    def encode_images(self, images: Sequence[PILImage.Image], names: Sequence[str] | None = None) -> np.ndarray:
        """Encodes RGB pictures to unit vectors (B, D); `names` are for errors."""
        if not images:
            return np.empty((0, self.dimension), dtype=np.float32)
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt").to(self.device)
        vectors = self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        return unit_vectors(vectors.cpu().numpy(), names or [f"`images`[{n}]" for n in range(len(images))])

    @torch.inference_mode()
    def encode_texts(
        self,
        texts: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        dropout: float = 0.0,
        rngs: Sequence[np.random.Generator] = (),
    ) -> np.ndarray:
        """Encodes texts to unit vectors, cut to the tokens that the model has positions for.

        Args:
            texts (`Sequence[str]`): The texts.
            names (`Sequence[str]`, *optional*): What each is, for errors.
            dropout (`float`, defaults to 0): Share of tokens to leave out; needs `rngs`.
            rngs (`Sequence[np.random.Generator]`): One a text.

        Returns:
            `np.ndarray` of shape `(batch_size, dimension)` and type float32.
        """
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        tokenizer = self.processor.tokenizer
        longest = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), truncation=True, max_length=longest, return_special_tokens_mask=True)
        ids = tokens["input_ids"]
        if dropout:
            ids = [
                _drop_words(words, is_special, dropout, rng)
                for words, is_special, rng in zip(ids, tokens["special_tokens_mask"], rngs, strict=True)
            ]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(self.device)
        vectors = self.model.get_text_features(**inputs).pooler_output
        return unit_vectors(vectors.cpu().numpy(), names or [f"`texts`[{n}]" for n in range(len(texts))])


def _drop_words(ids: list[int], is_special: list[int], share: float, rng: np.random.Generator) -> list[int]:
    """Leaves out tokens between those that delimit the text."""
    places = drop_tokens([place for place, special in enumerate(is_special) if not special], share, rng)
    kept = {*places, *(place for place, special in enumerate(is_special) if special)}
    return [token for place, token in enumerate(ids) if place in kept]
