import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from PIL import Image as PILImage

from hf_mm.data.clip_encoder import ClipEncoder, VectorError
from hf_mm.data.image_encoding import encode_rows, load_encoded, raw_pixels
from hf_mm.data.neighbors import open_neighbors, with_neighbors
from hf_mm.data.retrieval import (
    NeighborFinder,
    RetrievalStrategy,
    Retriever,
    find_neighbors,
)
from hf_mm.data.retrieval_index import build_index
from hf_mm.data.retrieval_strategy import Queries
from hf_mm.data.retrieval_vectors import VectorFolder, embed_rows
from hf_mm.data.shards import claim_folder, map_shards, read_manifest


disable_progress_bars()
NUM_ROWS, DIMENSION, NUM_SHARDS = 211, 13, 3
STRATEGY = RetrievalStrategy(num_candidates=7, max_candidates=400)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_vectors(
    folder: Path, seed: int = 0, encoder: str = "x", spread: float = 1.0, digest: str | None = None
) -> VectorFolder:
    """Vectors that ask, of rows some of which have no image; a small spread makes them all alike."""
    rng = np.random.default_rng(seed)
    mean = unit(rng.normal(size=DIMENSION))
    text, image = (unit(mean * (1 - spread) + spread * rng.normal(size=(NUM_ROWS, DIMENSION))) for _ in range(2))
    has_image = rng.random(NUM_ROWS) < 0.9
    columns = {
        "vector": unit(text + image * has_image[:, None]),
        "image_query": image * has_image[:, None],
        "text_query": text,
    }
    manifest = {
        "encoder": encoder, "dimension": DIMENSION, "num_rows": NUM_ROWS, "num_shards": NUM_SHARDS,
        "query_dropout": 0.2, "rows_digest": digest or f"rows of {seed}",
    }  # fmt: skip
    claim_folder(folder, manifest, "vectors made", {"encoder_name": encoder})
    features = Features({name: List(Value("float16"), length=DIMENSION) for name in columns})
    features |= Features({"has_text": Value("bool"), "has_image": Value("bool")})

    def take(_: dict, numbers: list[int]) -> dict:
        facts = {"has_text": [True] * len(numbers), "has_image": has_image[numbers]}
        return {name: values[numbers].astype(np.float16) for name, values in columns.items()} | facts

    rows = Dataset.from_dict({"number": range(NUM_ROWS)})
    map_shards(rows, take, features, folder, NUM_SHARDS, batch_size=50, remove_columns="number", verb="Making")
    return VectorFolder.open(folder)


@pytest.fixture
def bank(tmp_path: Path) -> tuple[VectorFolder, Path]:
    vectors = write_vectors(tmp_path / "memory")
    return vectors, build_index(vectors, tmp_path / "index")


def test_neighbours_are_those_of_the_rules_over_the_whole_memory_bank(
    bank: tuple[VectorFolder, Path], tmp_path: Path
) -> None:
    vectors, index = bank
    found = open_neighbors(find_neighbors(vectors, vectors, index, tmp_path / "out", STRATEGY, batch_size=17))
    rows = vectors.load()[:]
    has_both = np.array(rows["has_image"])
    for number in range(NUM_ROWS):
        asks = {True: rows["image_query"][number], False: rows["text_query"][number]}
        ranked = {
            kind: sorted(range(NUM_ROWS), key=lambda r: (not has_both[r], -float(query @ rows["vector"][r])))
            for kind, query in asks.items() if query.any()
        }  # fmt: skip
        chosen: list[int] = []
        places = (True, False, True, False) if True in ranked else (False,) * 4
        for kind in places:
            chosen.append(
                next(
                    row
                    for row in ranked[kind]
                    if row != number
                    and rows["vector"][row] @ rows["vector"][number] <= 0.9
                    and all(rows["vector"][row] @ rows["vector"][other] <= 0.9 for other in chosen)
                    and row not in chosen
                )
            )
        assert set(found[number]["neighbor_ids"]) == set(chosen)
        likeness = rows["vector"][found[number]["neighbor_ids"]] @ rows["vector"][number]
        assert np.allclose(found[number]["neighbor_scores"], likeness, atol=1e-6)
        assert np.all(np.diff(likeness) <= 1e-6)


def test_where_all_first_candidates_are_too_alike_the_search_goes_deeper(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "memory", spread=0.2)
    finder = NeighborFinder(vectors, build_index(vectors, tmp_path / "index"))
    rows = vectors.load()[:]
    queries = Queries(np.arange(NUM_ROWS), rows["vector"], rows["image_query"], rows["text_query"])
    deep = finder.find(queries, STRATEGY)
    shallow = finder.find(queries, replace(STRATEGY, max_candidates=7))
    assert (shallow.rows < 0).sum() > 2 * (deep.rows < 0).sum()
    assert np.nanmax(deep.relevances) <= 0.9


def test_processes_share_the_shards_and_a_killed_search_goes_on(
    bank: tuple[VectorFolder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, index = bank
    whole = open_neighbors(find_neighbors(vectors, vectors, index, tmp_path / "whole", STRATEGY))
    script = """
import os, sys
from hf_mm.data import retrieval
from hf_mm.data.retrieval_vectors import VectorFolder
find, done = retrieval.NeighborFinder.find, []
def find_or_die(*arguments):
    done.append(1)
    if len(done) == 3: os._exit(9)
    return find(*arguments)
retrieval.NeighborFinder.find = find_or_die
memory = VectorFolder.open(sys.argv[1])
strategy = retrieval.RetrievalStrategy(num_candidates=7, max_candidates=400)
retrieval.find_neighbors(memory, memory, sys.argv[2], sys.argv[3], strategy, batch_size=50)
"""
    command = [sys.executable, "-c", script, *map(str, (vectors.folder, index, tmp_path / "out"))]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert [path.name for path in (tmp_path / "out").glob("*.arrow")] == ["shard-00000-of-00003.arrow"]
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        open_neighbors(tmp_path / "out")
    asked: list[int] = []
    find = NeighborFinder.find
    monkeypatch.setattr(NeighborFinder, "find", lambda *fields: asked.extend(fields[1].rows) or find(*fields))
    for process in range(2):
        find_neighbors(vectors, vectors, index, tmp_path / "out", STRATEGY, process_index=process, num_processes=2)
    assert sorted(asked) == list(range(71, NUM_ROWS))
    assert open_neighbors(tmp_path / "out")["neighbor_ids"][:] == whole["neighbor_ids"][:]


def test_a_row_of_the_memory_bank_does_not_find_itself_in_a_folder_of_another_name(
    bank: tuple[VectorFolder, Path], tmp_path: Path
) -> None:
    memory, index = bank
    same = write_vectors(tmp_path / "queries", encoder="x")
    found = open_neighbors(find_neighbors(same, memory, index, tmp_path / "out", STRATEGY))
    assert all(number not in ids for number, ids in enumerate(found["neighbor_ids"][:]))


def test_a_row_does_not_find_itself_in_another_memory_bank_that_has_it_too(
    bank: tuple[VectorFolder, Path], tmp_path: Path
) -> None:
    memory, index = bank
    others = write_vectors(tmp_path / "queries", digest="of a larger dataset")
    uncapped = replace(STRATEGY, max_relevance=1, max_similarity=1)
    found = open_neighbors(find_neighbors(others, memory, index, tmp_path / "out", uncapped))
    assert all(number not in ids for number, ids in enumerate(found["neighbor_ids"][:]))
    rows = memory.load()[:]
    asking = Queries(np.full(NUM_ROWS, -1), rows["vector"], rows["image_query"], rows["text_query"])
    pools = NeighborFinder(memory, index).find(asking, uncapped).rows  # as a prompt asks, which may find its like
    assert sum(number in pool for number, pool in enumerate(pools)) > 0.7 * NUM_ROWS


def test_vectors_that_do_not_belong_together_are_refused(bank: tuple[VectorFolder, Path], tmp_path: Path) -> None:
    memory, index = bank
    others = write_vectors(tmp_path / "others", seed=1)
    foreign = write_vectors(tmp_path / "foreign", encoder="y")
    with pytest.raises(ValueError, match="were made with 'y' and those in .* with 'x', of other weights"):
        find_neighbors(foreign, memory, index, tmp_path / "out", STRATEGY)
    with pytest.raises(ValueError, match="was built from vectors of fingerprint"):
        find_neighbors(memory, others, index, tmp_path / "out", STRATEGY)
    with pytest.raises(ValueError, match="`query_dropout`=0.1, and the vectors in .* were made with 0.2"):
        find_neighbors(memory, memory, index, tmp_path / "out", replace(STRATEGY, query_dropout=0.1))
    find_neighbors(memory, memory, index, tmp_path / "out", STRATEGY)
    with pytest.raises(ValueError, match="holds neighbours found otherwise: `queries` was"):
        find_neighbors(others, memory, index, tmp_path / "out", STRATEGY)
    with pytest.raises(ValueError, match="holds neighbours found otherwise: `strategy` was"):
        find_neighbors(memory, memory, index, tmp_path / "out", replace(STRATEGY, max_relevance=0.8))


def test_neighbours_join_the_rows_they_were_found_for_and_no_others(
    bank: tuple[VectorFolder, Path], tmp_path: Path
) -> None:
    memory, index = bank
    folder = find_neighbors(memory, memory, index, tmp_path / "out", STRATEGY)
    rows = Dataset.from_dict({"codes": [[n, 1] for n in range(NUM_ROWS)], "text": ["a"] * NUM_ROWS})
    rows = rows.with_format("numpy", columns=["codes"], output_all_columns=True)
    given = {"rows_digest": "rows of 0", "memory": rows, "memory_digest": "rows of 0"}
    joined = with_neighbors(rows, folder, **given)
    assert joined.column_names == ["codes", "text", "neighbor_ids", "neighbor_scores"]
    assert isinstance(joined[5]["codes"], np.ndarray) and joined[5]["text"] == "a"
    assert joined["neighbor_ids"][:] == open_neighbors(folder)["neighbor_ids"][:]
    for change in ({"rows_digest": "z"}, {"memory_digest": "z"}, {"memory": rows.select(range(9))}):
        with pytest.raises(ValueError, match="are of other rows or another memory bank"):
            with_neighbors(rows, folder, **given | change)
    with pytest.raises(ValueError, match="'num_rows': .211, 9."):
        with_neighbors(rows.select(range(9)), folder, **given)
    with pytest.raises(ValueError, match="holds no neighbours. Find them with"):
        open_neighbors(memory.folder)


TEXTS = ["a red star", "two blue boxes", "an orange kite", "a green moon on white", "star star star", "boxes left of a kite",
         "moon"]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(clip_dir: Path) -> ClipEncoder:
    return ClipEncoder.from_pretrained(str(clip_dir))


@pytest.fixture(scope="module")
def small_bank(encoder: ClipEncoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    folder = tmp_path_factory.mktemp("retrieval")
    random = np.random.default_rng(0)
    images = [PILImage.fromarray(random.integers(0, 256, (17, 23, 3), dtype=np.uint8)) for _ in TEXTS]
    rows = Dataset.from_dict({"image": images, "text": TEXTS})
    vectors = VectorFolder.open(embed_rows(rows, encoder, folder / "memory", query_dropout=None))
    build_index(vectors, folder / "index")
    return rows, folder


LOOSE = RetrievalStrategy(max_relevance=1.0, max_similarity=1.0)


def test_documents_are_retrieved_for_texts_images_and_both(
    encoder: ClipEncoder, small_bank: tuple[Dataset, Path]
) -> None:
    rows, folder = small_bank
    retriever = Retriever(folder, rows, encoder, strategy=LOOSE)
    memory = VectorFolder.open(folder / "memory").load()[:]["vector"]
    texts, images = ["a blue star", "boxes"], [rows[3]["image"], rows[5]["image"]]
    by_text, by_image = encoder.encode_texts(texts), encoder.encode_images([image.convert("RGB") for image in images])
    found = retriever.retrieve(texts=texts, num_retrieved=3)
    for number in range(2):
        best = np.argsort(-(memory @ by_text[number]))[:3]
        assert found.ids[number] == best.tolist()
        assert np.allclose(found.scores[number], (memory @ by_text[number])[best], atol=1e-5)
        assert [row["text"] for row in found.rows[number]] == [TEXTS[row] for row in best]
    assert retriever.retrieve(images=images, num_retrieved=1).ids == [[int(np.argmax(memory @ v))] for v in by_image]
    both = retriever.retrieve(texts=texts, images=images, num_retrieved=2)
    for number in range(2):
        first = int(np.argmax(memory @ by_image[number]))
        second = next(row for row in np.argsort(-(memory @ by_text[number])).tolist() if row != first)
        assert set(both.ids[number]) == {first, second}
    mixed = retriever.retrieve(texts=["a blue star", None], images=[None, images[1]], num_retrieved=1)
    assert mixed.ids[0] == found.ids[0][:1] and mixed.ids[1] == [int(np.argmax(memory @ by_image[1]))]
    assert retriever.retrieve(texts=texts, num_retrieved=0) == ([[], []], [[], []], [[], []])


def test_the_cap_holds_for_prompts_too(encoder: ClipEncoder, small_bank: tuple[Dataset, Path]) -> None:
    rows, folder = small_bank
    free, capped = (
        Retriever(folder, rows, encoder, strategy=replace(LOOSE, max_relevance=cap)) for cap in (1.0, 0.999)
    )
    images = rows["image"][:]
    found = [[number in ids for number, ids in enumerate(r.retrieve(TEXTS, images, 2).ids)] for r in (free, capped)]
    assert any(found[0]) and not any(found[1])


def test_rows_come_with_their_codes_where_the_memory_bank_is_encoded(
    encoder: ClipEncoder, small_bank: tuple[Dataset, Path], tmp_path: Path
) -> None:
    rows, folder = small_bank
    encoded = load_encoded(encode_rows(rows, raw_pixels, image_size=8, output_dir=tmp_path, encoder_config={}))
    digest = read_manifest(tmp_path)["rows_digest"]
    retriever = Retriever(folder, encoded, encoder, memory_digest=digest, strategy=LOOSE)
    found = retriever.retrieve(texts=["a blue star"], num_retrieved=2)
    assert [row["text"] for row in found.rows[0]] == [TEXTS[number] for number in found.ids[0]]
    assert all(row["pixels"].shape == (3, 8, 8) for row in found.rows[0])
    with pytest.raises(ValueError, match="are of other rows than these: {'rows_digest'"):
        Retriever(folder, encoded, encoder, memory_digest="another")
    with pytest.raises(ValueError, match="are of other rows than these"):
        Retriever(folder, rows.select([1, 0, 2, 3, 4, 5, 6]), encoder)


def test_prompts_that_cannot_be_retrieved_for_are_refused(
    encoder: ClipEncoder, clip_dir: Path, small_bank: tuple[Dataset, Path]
) -> None:
    rows, folder = small_bank
    retriever = Retriever(folder, rows, encoder)
    with pytest.raises(ValueError, match="`num_retrieved`=7 must be at least 0 and below the 7 rows"):
        retriever.retrieve(["a"], num_retrieved=7)
    with pytest.raises(ValueError, match="Give `texts`, `images` or both"):
        retriever.retrieve()
    with pytest.raises(ValueError, match="`texts` has 2 prompts and `images` 1"):
        retriever.retrieve(["a", "b"], [rows[0]["image"]])
    with pytest.raises(ValueError, match="`texts`='a red star' is one text; give a list"):
        retriever.retrieve("a red star")
    with pytest.raises(VectorError, match="Prompt 1: it has neither a text nor an image"):
        retriever.retrieve(["a", ""])
    other = ClipEncoder.from_pretrained(str(clip_dir))
    torch.nn.init.normal_(other.model.text_projection.weight)
    with pytest.raises(ValueError, match="Vectors of different encoders cannot be compared"):
        Retriever(folder, rows, other)


def test_a_memory_bank_smaller_than_the_pool_is_refused(
    encoder: ClipEncoder, small_bank: tuple[Dataset, Path], tmp_path: Path
) -> None:
    rows, _ = small_bank
    vectors = VectorFolder.open(embed_rows(rows.select(range(4)), encoder, tmp_path / "memory", query_dropout=0.2))
    index = build_index(vectors, tmp_path / "index")
    with pytest.raises(
        ValueError, match="The memory bank has 4 rows; 4 neighbours need at least 5. Give a larger one"
    ):
        find_neighbors(vectors, vectors, index, tmp_path / "out", RetrievalStrategy())
