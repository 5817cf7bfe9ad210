"""Rows to vectors by which they are found and by which they ask, once, in shards on disk.

A folder of vectors holds one Arrow file a shard, each with its checksum, and `manifest.json`, which says of what rows
and by which encoder. Knows rows and an encoder, neither indexes nor rules.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .caption_text import main_text
from .clip_encoder import ClipEncoder, VectorError, document_vectors
from .fingerprints import digest_rows, digest_text
from .formats import TEXT_COLUMNS, ImageError, RowError, check_columns, check_texts, open_image
from .shards import (
    MANIFEST,
    claim_folder,
    map_shards,
    read_checksum,
    read_manifest,
    shard_paths,
)


ASKING_COLUMNS = ("image_query", "text_query")


def embed_rows(
    rows: Dataset,
    encoder: ClipEncoder,
    output_dir: str | os.PathLike,
    *,
    query_dropout: float | None,
    seed: int = 0,
    batch_size: int = 64,
    num_shards: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> Path:
    """Writes for each row the vector it is found by and, if it is to ask, the vectors of its image and of its text.

    Process `p` writes shards `p, p + num_processes, ...` and skips those that are there whole. Vectors are stored in
    half precision, which moves an inner product by less than 0.001.

    Args:
        rows (`Dataset`): Pairs, texts, pictures or documents; the same in every process.
        encoder ([`ClipEncoder`]): Makes the vectors.
        output_dir (`str` or `os.PathLike`): Folder for the shards.
        query_dropout (`float`, *optional*): Share of a text query's tokens to leave out; None: rows that never ask.
        seed (`int`, defaults to 0): Of that draw, together with the number of the row.
        batch_size (`int`, defaults to 64): Rows encoded at once.
        num_shards (`int`, defaults to 1): Files to write, at most one per row.
        process_index (`int`, defaults to 0): Number of this process.
        num_processes (`int`, defaults to 1): How many there are.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the rows do not fit, or the folder holds vectors made otherwise.
        VectorError: If a row has neither text nor image, an unreadable image, or a vector that is zero or not finite.
    """
    rows = _check_rows(rows)
    if not 1 <= num_shards <= len(rows):
        raise ValueError(f"`num_shards`={num_shards} must be at least 1 and at most the number of rows, {len(rows)}.")
    if query_dropout is not None and not 0 <= query_dropout < 1:
        raise ValueError(f"`query_dropout`={query_dropout} must be at least 0 and below 1.")
    names = ["vector", *(ASKING_COLUMNS if query_dropout is not None else ())]
    manifest = {
        "encoder": encoder.fingerprint(),
        "dimension": encoder.dimension,
        "rows_digest": digest_rows(rows),
        "num_rows": len(rows),
        "num_shards": num_shards,
        "query_dropout": query_dropout,
        "seed": seed if query_dropout else None,
    }
    folder = Path(output_dir)
    claim_folder(folder, manifest, "vectors made", {"encoder_name": encoder.name})
    features = Features({name: List(Value("float16"), length=encoder.dimension) for name in names})
    features |= Features({"has_text": Value("bool"), "has_image": Value("bool")})
    embed = _RowEmbedder(encoder, query_dropout, seed)
    map_shards(
        rows,
        embed,
        features,
        folder,
        num_shards,
        process_index=process_index,
        num_processes=num_processes,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        verb="Embedding",
    )
    return folder


@dataclass(frozen=True)
class VectorFolder:
    """Vectors as they lie on disk.

    Args:
        folder (`Path`): Where.
        manifest (`dict`): What they are vectors of.
        fingerprint (`str`): Of the manifest and all shards, for what is built from them.
    """

    folder: Path
    manifest: dict[str, Any]
    fingerprint: str

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "VectorFolder":
        """Opens a finished folder; sizes are compared with the checksums, and no vector is read.

        Raises:
            ValueError: If it is no such folder, or shards are missing or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None or "encoder" not in manifest or "dimension" not in manifest:
            raise ValueError(f"{str(folder)!r} has no {MANIFEST} of vectors. Make them with build_retrieval_index.py.")
        checksums = [read_checksum(path) for path in shard_paths(folder, manifest["num_shards"])]
        return cls(folder, manifest, digest_text(f"{sorted(manifest.items())} {checksums}"))

    def load(self, shard: int | None = None) -> Dataset:
        """Opens all vectors, or those of one shard, by memory map; they come in single precision."""
        paths = shard_paths(self.folder, self.manifest["num_shards"])
        parts = [Dataset.from_file(str(path)) for path in (paths if shard is None else [paths[shard]])]
        rows = concatenate_datasets(parts)
        names = [name for name in ("vector", *ASKING_COLUMNS) if name in rows.column_names]
        return rows.with_format("numpy", columns=names, output_all_columns=True, dtype=np.float32)

    def check_encoder(self, encoder: ClipEncoder) -> None:
        """Refuses an encoder other than the one that made the vectors.

        Raises:
            ValueError: If it is another.
        """
        if (own := encoder.fingerprint()) != self.manifest["encoder"]:
            raise ValueError(
                f"The vectors in {str(self.folder)!r} were made with {self.manifest['encoder_name']!r}, fingerprint "
                f"{self.manifest['encoder']}, and the encoder given is {encoder.name!r}, {own}. Vectors of different "
                "encoders cannot be compared: name that one, or build the index again with this one."
            )

    def check_rows(self, rows: Dataset, encoded_from: str | None = None) -> None:
        """Refuses rows other than those that the vectors were made of.

        Args:
            rows (`Dataset`): The rows with pictures, or with their images encoded.
            encoded_from (`str`, *optional*): Digest of the rows with pictures, where these are encoded ones: the
                `rows_digest` of their folder's manifest.

        Raises:
            ValueError: If they are others.
        """
        digest = digest_rows(_check_rows(rows)) if encoded_from is None else encoded_from
        wanted, given = self.manifest, {"num_rows": len(rows), "rows_digest": digest}
        if different := {key: (wanted[key], value) for key, value in given.items() if wanted[key] != value}:
            raise ValueError(
                f"The vectors in {str(self.folder)!r} are of other rows than these: {different} (there, here). Give "
                "the rows that the index was built from, with the same preparation, or build it again from these."
            )


class DocumentVectors:
    """Document vectors by their row numbers, read where they lie; the formats of datasets take most of a search.

    Args:
        folder ([`VectorFolder`]): Where.
    """

    def __init__(self, folder: VectorFolder) -> None:
        self.dimension = folder.manifest["dimension"]
        chunks = folder.load().data.column("vector").chunks
        self.chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.dimension) for chunk in chunks]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Reads vectors in single precision, (N, D), of rows whose numbers rise."""
        vectors = np.empty((len(numbers), self.dimension), dtype=np.float32)
        edges = np.searchsorted(numbers, self.starts)
        for place in np.flatnonzero(np.diff(edges)).tolist():
            part = slice(edges[place], edges[place + 1])
            vectors[part] = self.chunks[place][numbers[part] - self.starts[place]]
        return vectors


@dataclass(frozen=True)
class _RowEmbedder:
    """Turns a batch of rows into their vectors."""

    encoder: ClipEncoder
    query_dropout: float | None
    seed: int

    def __call__(self, batch: Mapping[str, list], numbers: list[int]) -> dict[str, np.ndarray]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        texts, images = [find_text(row) for row in rows], [find_image(row) for row in rows]
        has_text, has_image = (
            np.array([bool(text) for text in texts]),
            np.array([value is not None for value in images]),
        )
        names = [f"Row {number}" for number in numbers]
        opened = [_open(value, name) for value, name in zip(images, names, strict=True) if value is not None]
        image_vectors = self._fill(has_image, self.encoder.encode_images(opened, _select(names, has_image, "image")))
        found, found_names = [text for text in texts if text], _select(names, has_text, "text")
        text_vectors = self._fill(has_text, self.encoder.encode_texts(found, found_names))
        columns = {
            "vector": document_vectors(text_vectors, image_vectors, has_text, has_image, names).astype(np.float16),
            "has_text": has_text,
            "has_image": has_image,
        }
        if self.query_dropout is not None:
            rngs = [np.random.default_rng((self.seed, number)) for number in np.array(numbers)[has_text].tolist()]
            asking = self.encoder.encode_texts(found, found_names, dropout=self.query_dropout, rngs=rngs)
            columns["text_query"] = self._fill(has_text, asking).astype(np.float16)
            columns["image_query"] = image_vectors.astype(np.float16)
        return columns

    def _fill(self, is_there: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Puts vectors in the places of their rows, zeros elsewhere."""
        filled = np.zeros((len(is_there), self.encoder.dimension), dtype=np.float32)
        filled[is_there] = vectors
        return filled


def find_text(row: Mapping[str, Any]) -> str:
    """Returns the text that a row is found by: its caption, else its keywords, or all text parts of a document.

    Raises:
        RowError: If a column of text holds something else.
    """
    if row.get("content"):
        return " ".join(part["text"] for part in _parts(row) if part.get("text"))
    check_texts(row, "A row to be found")
    keywords = row.get("keywords") or ""
    return main_text(row) or (keywords if isinstance(keywords, str) else ", ".join(keywords))


def find_image(row: Mapping[str, Any]) -> Any:
    """Returns the picture that a row is found by, None where it has none; of a document, the first."""
    if row.get("content"):
        return next((part["image"] for part in _parts(row) if part.get("image") is not None), None)
    return row.get("image")


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the parts of a document; refuses what is no list of them."""
    parts = row["content"]
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str | None) for part in parts
    ):
        raise RowError(
            f"Column `content`: {parts!r} must be a list of parts, such as {{'type': 'text', 'text': 'a'}}."
        )
    return parts


def _select(names: list[str], is_there: np.ndarray, column: str) -> list[str]:
    return [f"{name}, column `{column}`" for name, there in zip(names, is_there, strict=True) if there]


def _open(value: Any, name: str) -> Any:
    try:
        return open_image(value)
    except ImageError as error:
        raise VectorError(f"{name}, column `image`: {error}. Leave such rows out.") from error


def _check_rows(rows: Dataset) -> Dataset:
    """Returns rows with pictures undecoded, in the form that their digest is taken of; refuses what has neither."""
    columns = set(rows.column_names)
    if "content" in columns:
        return check_columns(rows, "document")
    if "image" in columns and columns & {"text", "description", "keywords"}:
        return check_columns(rows, "pair")
    if columns & {"codes", "latent_mean", "pixels"}:
        raise ValueError(
            "The rows hold encoded images, and vectors are made of pictures. Name the source that they were encoded "
            "from, with the same preparation; the numbers of rows are then the same. "
            f"Columns here: {rows.column_names}."
        )
    if not columns & {"image", *TEXT_COLUMNS}:
        raise ValueError(
            f"Rows need a column `image`, `text`, `description` or `content`. Columns: {rows.column_names}."
        )
    return rows
