import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image as PILImage
from transformers import CLIPModel, CLIPProcessor

from hf_mm.data.clip_encoder import ClipEncoder, VectorError, document_vectors, drop_tokens
from hf_mm.data.formats import load_rows, open_image
from hf_mm.data.image_encoding import encode_rows, raw_pixels
from hf_mm.data.retrieval_vectors import DocumentVectors, VectorFolder, embed_rows


disable_progress_bars()
NUM_ROWS = 11


def png(seed: int) -> dict:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (13 + seed, 17, 3), dtype=np.uint8)
    PILImage.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pair_rows(num_rows: int = NUM_ROWS) -> Dataset:
    texts = [
        f"{number} red stars and a {color} box" for number, color in zip(range(num_rows), "abcdefghijk", strict=True)
    ]
    return Dataset.from_dict({"image": [png(number) for number in range(num_rows)], "text": texts})


@pytest.fixture(scope="module")
def encoder(clip_dir: Path) -> ClipEncoder:
    return ClipEncoder.from_pretrained(str(clip_dir))


def embed(rows: Dataset, encoder: ClipEncoder, folder: Path, **options: object) -> Path:
    return embed_rows(rows, encoder, folder, **{"query_dropout": 0.2, "batch_size": 3, "num_shards": 3} | options)


def load(folder: Path) -> dict:
    return VectorFolder.open(folder).load()[:]


def test_vectors_are_those_of_the_model_averaged_and_scaled(
    encoder: ClipEncoder, clip_dir: Path, tmp_path: Path
) -> None:
    rows = pair_rows()
    found = load(embed(rows, encoder, tmp_path, query_dropout=0.0))
    model, processor = CLIPModel.from_pretrained(clip_dir).eval(), CLIPProcessor.from_pretrained(clip_dir)
    pictures = [open_image(image) for image in rows["image"]]
    inputs = processor(text=rows["text"][:], images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    text, image = (torch.nn.functional.normalize(part, dim=-1) for part in (output.text_embeds, output.image_embeds))
    assert np.allclose(found["text_query"], text, atol=2e-3) and np.allclose(found["image_query"], image, atol=2e-3)
    wanted = torch.nn.functional.normalize((text + image) / 2, dim=-1)
    assert np.allclose(found["vector"], wanted, atol=2e-3) and found["vector"].dtype == np.float32
    assert float((text @ text.T).min()) < 0.99 and float((image @ image.T).min()) < 0.99  # inputs are told apart


def test_a_document_of_one_modality_has_the_vector_of_that_one(encoder: ClipEncoder, tmp_path: Path) -> None:
    rows = pair_rows()
    pairs = load(embed(rows, encoder, tmp_path / "pairs", query_dropout=0.0))
    images, texts = rows["image"][:], rows["text"][:]
    images[3], texts[5] = None, None
    some = load(
        embed(Dataset.from_dict({"image": images, "text": texts}), encoder, tmp_path / "some", query_dropout=0.0)
    )
    assert np.allclose(some["vector"][3], pairs["text_query"][3], atol=2e-3)
    assert np.allclose(some["vector"][5], pairs["image_query"][5], atol=2e-3)
    assert not some["image_query"][3].any() and not some["text_query"][5].any()
    assert np.flatnonzero(~np.array(some["has_image"])).tolist() == [3]
    assert np.flatnonzero(~np.array(some["has_text"])).tolist() == [5]
    only = load(embed(rows.remove_columns("image"), encoder, tmp_path / "only", query_dropout=None))
    assert np.allclose(only["vector"], pairs["text_query"], atol=2e-3) and "text_query" not in only


def test_documents_and_parts_of_captions_are_found_by_all_their_text(encoder: ClipEncoder, tmp_path: Path) -> None:
    image = png(1)
    content = [{"type": "text", "text": "a red", "image": None}, {"type": "image", "text": None, "image": image},
               {"type": "text", "text": "star", "image": None}]  # fmt: skip
    document = load(embed(Dataset.from_dict({"content": [content]}), encoder, tmp_path / "a", num_shards=1))
    pair = load(
        embed(Dataset.from_dict({"image": [image], "text": ["a red star"]}), encoder, tmp_path / "b", num_shards=1)
    )
    assert np.allclose(document["vector"], pair["vector"], atol=2e-3)
    parts = {"description": ["a red star", ""], "keywords": [["b"], ["two", "boxes"]]}
    found = load(embed(Dataset.from_dict(parts), encoder, tmp_path / "c", num_shards=1))
    assert np.allclose(found["vector"], encoder.encode_texts(["a red star", "two, boxes"]), atol=2e-3)


def test_mean_is_scaled_so_that_a_row_scores_one_with_itself() -> None:
    rng = np.random.default_rng(0)
    text, image = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in rng.normal(size=(2, 7, 19)))
    every = np.ones(7, dtype=bool)
    vectors = document_vectors(text, image, every, every, [""] * 7)
    assert np.allclose((vectors * vectors).sum(axis=1), 1)


def test_a_fifth_of_the_tokens_is_dropped_from_text_queries_and_from_nothing_else(
    encoder: ClipEncoder, tmp_path: Path
) -> None:
    rows = pair_rows()
    whole, dropped = (load(embed(rows, encoder, tmp_path / str(share), query_dropout=share)) for share in (0.0, 0.2))
    assert np.array_equal(whole["vector"], dropped["vector"])
    assert np.array_equal(whole["image_query"], dropped["image_query"])
    assert (np.abs(whole["text_query"] - dropped["text_query"]).max(axis=1) > 0.01).all()
    again = load(embed(rows, encoder, tmp_path / "again", batch_size=5, num_shards=1))
    assert np.allclose(again["text_query"], dropped["text_query"], atol=2e-3)
    other = load(embed(rows, encoder, tmp_path / "other", seed=1))
    assert not np.allclose(other["text_query"], dropped["text_query"], atol=0.01)


def test_share_of_dropped_tokens_is_met_for_short_and_long_queries() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 7, 50):
        kept = [drop_tokens(range(length), 0.2, rng) for _ in range(3000)]
        assert all(words == sorted(set(words)) and words for words in kept)
        share = 1 - np.mean([len(words) for words in kept]) / length
        assert share == pytest.approx(0.2 if length > 1 else 0, abs=0.02)
        assert {len(words) for words in kept} <= {
            int(length * 0.8),
            -int(-length * 0.8 // 1),
            max(1, length - length // 5),
        }


def test_long_texts_are_cut_to_the_positions_of_the_model(encoder: ClipEncoder) -> None:
    long = "star " * 200
    assert np.allclose(encoder.encode_texts([long]), encoder.encode_texts([long + "box"]))
    assert np.allclose(encoder.encode_texts(["a box", long])[0], encoder.encode_texts(["a box"])[0], atol=1e-5)


def test_a_row_without_text_and_image_is_refused_by_its_number(encoder: ClipEncoder, tmp_path: Path) -> None:
    rows = pair_rows()
    images, texts = rows["image"][:], rows["text"][:]
    images[7], texts[7] = None, ""
    with pytest.raises(VectorError, match="Row 7: it has neither a text nor an image. Leave such rows out"):
        embed(Dataset.from_dict({"image": images, "text": texts}), encoder, tmp_path)
    images[7] = {"bytes": b"no picture", "path": None}
    with pytest.raises(VectorError, match="Row 7, column `image`: `image` is no picture"):
        embed(Dataset.from_dict({"image": images, "text": texts}), encoder, tmp_path / "unreadable")


@pytest.mark.parametrize(
    ("fill", "message"), [(float("nan"), "NaN or infinite values"), (0.0, "so it has no direction")]
)
@pytest.mark.parametrize("tower", ["visual_projection", "text_projection"])
def test_vectors_without_direction_are_refused(
    clip_dir: Path, tmp_path: Path, fill: float, tower: str, message: str
) -> None:
    broken = ClipEncoder.from_pretrained(str(clip_dir))
    torch.nn.init.constant_(getattr(broken.model, tower).weight, fill)
    column = "image" if tower == "visual_projection" else "text"
    with pytest.raises(VectorError, match=rf"Row 0, column `{column}`: its vector has .*{message}"):
        embed(pair_rows(), broken, tmp_path)


def test_text_and_image_that_cancel_are_refused() -> None:
    vectors = np.eye(3)[:2]
    with pytest.raises(VectorError, match="Row 9: its vector has length 0"):
        document_vectors(
            vectors, vectors * [[1], [-1]], np.array([True] * 2), np.array([True] * 2), ["Row 8", "Row 9"]
        )


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_missing_shards(
    encoder: ClipEncoder, clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = pair_rows(), tmp_path / "out"
    rows.to_parquet(tmp_path / "rows.parquet")
    script = """
import os, sys
from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.data.formats import load_rows
from hf_mm.data.retrieval_vectors import embed_rows
encoder, calls = ClipEncoder.from_pretrained(sys.argv[2]), []
encode = encoder.encode_images
def encode_or_die(*arguments):
    calls.append(1)
    if len(calls) == 4: os._exit(9)
    return encode(*arguments)
encoder.encode_images = encode_or_die
embed_rows(load_rows(sys.argv[1]), encoder, sys.argv[3], query_dropout=0.2, batch_size=3, num_shards=3)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "rows.parquet"), str(clip_dir), str(folder)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert [path.name for path in folder.glob("*.arrow")] == ["shard-00000-of-00003.arrow"]
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        VectorFolder.open(folder)
    rows = load_rows(str(tmp_path / "rows.parquet"))
    encoded = []
    encode = encoder.encode_images
    monkeypatch.setattr(encoder, "encode_images", lambda images, names: encoded.extend(names) or encode(images, names))
    wanted = load(embed(rows, encoder, tmp_path / "whole"))
    del encoded[:]
    assert np.array_equal(load(embed(rows, encoder, folder))["vector"], wanted["vector"])
    assert encoded == [f"Row {number}, column `image`" for number in range(4, NUM_ROWS)]
    damaged = folder / "shard-00001-of-00003.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    del encoded[:]
    assert np.array_equal(load(embed(rows, encoder, folder))["vector"], wanted["vector"])
    assert encoded == [f"Row {number}, column `image`" for number in range(4, 8)] and not list(folder.glob("draft*"))


def test_processes_share_the_shards(encoder: ClipEncoder, tmp_path: Path) -> None:
    for process in range(2):
        embed(pair_rows(), encoder, tmp_path / "two", process_index=process, num_processes=2)
    one, two = VectorFolder.open(embed(pair_rows(), encoder, tmp_path / "one")), VectorFolder.open(tmp_path / "two")
    assert np.array_equal(one.load()[:]["vector"], two.load()[:]["vector"])


def test_vectors_are_taken_by_their_rows(encoder: ClipEncoder, tmp_path: Path) -> None:
    folder = VectorFolder.open(embed(pair_rows(), encoder, tmp_path))
    numbers = np.array([0, 0, 3, 4, 10])  # at the edges of shards, one twice
    taken = DocumentVectors(folder).take(numbers)
    assert taken.dtype == np.float32 and np.array_equal(taken, folder.load()[:]["vector"][numbers])


@pytest.mark.parametrize(
    ("change", "name"),
    [({"query_dropout": 0.3}, "query_dropout"), ({"seed": 5}, "seed"), ({"num_shards": 2}, "num_shards")],
)
def test_a_folder_made_otherwise_is_refused(encoder: ClipEncoder, tmp_path: Path, change: dict, name: str) -> None:
    embed(pair_rows(), encoder, tmp_path)
    with pytest.raises(ValueError, match=rf"holds vectors made otherwise: .*`{name}` was"):
        embed(pair_rows(), encoder, tmp_path, **change)


def test_other_rows_and_other_encoders_are_refused(encoder: ClipEncoder, clip_dir: Path, tmp_path: Path) -> None:
    rows = pair_rows()
    folder = VectorFolder.open(embed(rows, encoder, tmp_path))
    other = ClipEncoder.from_pretrained(str(clip_dir))
    torch.nn.init.ones_(other.model.logit_scale)
    torch.nn.init.normal_(other.model.text_projection.weight)
    with pytest.raises(ValueError, match=r"holds vectors made otherwise: `encoder` was"):
        embed(rows, other, tmp_path)
    with pytest.raises(ValueError, match="Vectors of different encoders cannot be compared"):
        folder.check_encoder(other)
    folder.check_encoder(ClipEncoder.from_pretrained(str(clip_dir)))
    folder.check_rows(pair_rows())
    with pytest.raises(ValueError, match=r"are of other rows than these: \{'num_rows': \(11, 10\)"):
        folder.check_rows(rows.select(range(10)))
    with pytest.raises(ValueError, match="'rows_digest'"):
        folder.check_rows(rows.select([1, 0, *range(2, NUM_ROWS)]))


def test_rows_have_the_digest_that_their_encoded_images_have(encoder: ClipEncoder, tmp_path: Path) -> None:
    rows = pair_rows()
    encode_rows(rows, raw_pixels, image_size=8, output_dir=tmp_path / "pixels", encoder_config={})
    digest = json.loads((tmp_path / "pixels" / "manifest.json").read_text())["rows_digest"]
    folder = VectorFolder.open(embed(rows, encoder, tmp_path / "vectors"))
    assert folder.manifest["rows_digest"] == digest
    folder.check_rows(rows, digest)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"codes": [[1, 2]], "text": ["a"]}, "The rows hold encoded images, and vectors are made of pictures"),
        ({"title": ["a"]}, r"Rows need a column `image`, `text`, `description` or `content`. Columns: \['title'\]"),
    ],
)
def test_rows_that_cannot_be_embedded_are_refused(
    encoder: ClipEncoder, tmp_path: Path, columns: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embed(Dataset.from_dict(columns), encoder, tmp_path)
