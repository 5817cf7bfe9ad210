import subprocess
import sys
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, disable_progress_bars

from hf_mm.data import retrieval_index
from hf_mm.data.retrieval_index import build_index, choose_factory, open_index
from hf_mm.data.retrieval_vectors import VectorFolder
from hf_mm.data.shards import claim_folder, map_shards


disable_progress_bars()
NUM_ROWS, DIMENSION, NUM_SHARDS = 307, 13, 5
INVERTED = "IVF7,SQ8"


def unit_vectors(seed: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def write_vectors(folder: Path, seed: int = 0) -> VectorFolder:
    """A folder of vectors without an encoder."""
    vectors = unit_vectors(seed)
    manifest = {"encoder": "x", "dimension": DIMENSION, "num_rows": NUM_ROWS, "num_shards": NUM_SHARDS}
    claim_folder(folder, manifest, "vectors made")
    features = Features({"vector": List(Value("float16"), length=DIMENSION)})
    rows = Dataset.from_dict({"number": range(NUM_ROWS)})
    map_shards(
        rows, lambda _, numbers: {"vector": vectors[numbers]}, features, folder, NUM_SHARDS,
        batch_size=50, remove_columns="number", verb="Making",
    )  # fmt: skip
    return VectorFolder.open(folder)


def nearest(index: Dataset, k: int = 5) -> np.ndarray:
    return index.search_batch("vector", unit_vectors(1, 29).astype(np.float32), k).total_indices


def true_nearest(k: int = 5, seed: int = 0) -> np.ndarray:
    products = unit_vectors(1, 29).astype(np.float32) @ unit_vectors(seed).astype(np.float32).T
    return np.argsort(-products, axis=1)[:, :k]


def search_all_lists(index: Dataset) -> None:
    faiss.extract_index_ivf(index.get_index("vector").faiss_index).nprobe = 7


def test_few_rows_are_searched_exactly_and_many_in_twice_their_square_root_of_lists() -> None:
    assert choose_factory(1) == choose_factory(100_000) == "Flat"
    for num_rows in (100_001, 3_000_000, 340_000_000):
        name, code = choose_factory(num_rows).split(",")
        assert code == "SQ8" and 0.7 < int(name.removeprefix("IVF")) / (2 * num_rows**0.5) < 1.42


def test_the_default_index_finds_the_true_neighbours_by_their_row_numbers(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    index = open_index(build_index(vectors, tmp_path / "index"), vectors)
    assert np.array_equal(nearest(index), true_nearest())
    found = index.get_nearest_examples_batch("vector", unit_vectors(1, 29).astype(np.float32), 2).total_examples
    stored = unit_vectors(0)[true_nearest(2)].astype(np.float32)
    assert np.allclose(np.stack([rows["vector"] for rows in found]), stored)


@pytest.mark.parametrize(
    ("factory", "recall"), [(INVERTED, 0.95), ("HNSW8", 0.9), ("PCA11,IVF7,SQ8", 0.5), ("PCA11,Flat", 0.6)]
)
def test_other_indexes_are_built_by_their_factory_string(tmp_path: Path, factory: str, recall: float) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    index = open_index(build_index(vectors, tmp_path / "index", factory=factory), vectors)
    if "IVF" in factory:
        search_all_lists(index)
    hits = [
        len(set(mine) & set(true)) for mine, true in zip(nearest(index).tolist(), true_nearest().tolist(), strict=True)
    ]
    assert sum(hits) >= recall * 29 * 5


@pytest.mark.parametrize("factory", ["Flat", INVERTED])
def test_an_index_is_searched_from_its_file(tmp_path: Path, factory: str) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    index = open_index(build_index(vectors, tmp_path / "index", factory=factory), vectors)
    nearest(index)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("Only Linux says what is mapped.")
    file = "index.faiss" if factory == "Flat" else "index.ivfdata"
    assert str(tmp_path / "index" / file) in mapped.read_text()


def test_an_index_that_was_moved_is_searched(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    build_index(vectors, tmp_path / "index", factory=INVERTED).rename(tmp_path / "moved")
    index = open_index(tmp_path / "moved", vectors)
    search_all_lists(index)
    assert (nearest(index, 1) == true_nearest(1)).mean() > 0.9


def test_three_processes_build_what_one_does(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    one = open_index(build_index(vectors, tmp_path / "one", factory=INVERTED), vectors)
    barrier = threading.Barrier(3, timeout=60)

    def build(process: int) -> None:
        build_index(
            vectors, tmp_path / "three", factory=INVERTED, process_index=process, num_processes=3,
            wait=lambda: barrier.wait() and None,
        )  # fmt: skip

    threads = [threading.Thread(target=build, args=(process,)) for process in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    three = open_index(tmp_path / "three", vectors)
    assert three.get_index("vector").faiss_index.ntotal == NUM_ROWS
    assert np.array_equal(nearest(three), nearest(one))
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        "checksums.json",
        "index.faiss",
        "index.ivfdata",
        "index.json",
    ]


def test_a_killed_build_goes_on_with_the_missing_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    script = """
import os, sys
from hf_mm.data import retrieval_index
from hf_mm.data.retrieval_vectors import VectorFolder
fill, done = retrieval_index._fill, []
def fill_or_die(*arguments):
    if len(done) == 3: os._exit(9)
    done.append(fill(*arguments))
retrieval_index._fill = fill_or_die
retrieval_index.build_index(VectorFolder.open(sys.argv[1]), sys.argv[2], factory="IVF7,SQ8")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "vectors"), str(tmp_path / "index")]
    assert subprocess.run(command, capture_output=True).returncode == 9
    with pytest.raises(ValueError, match="has no finished index. Run build_retrieval_index.py again"):
        open_index(tmp_path / "index", vectors)
    parts = sorted((tmp_path / "index").glob("*-part-*.faiss"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"x")
    filled, fill = [], retrieval_index._fill
    monkeypatch.setattr(retrieval_index, "_fill", lambda *fields: filled.append(fields[2]) or fill(*fields))
    monkeypatch.setattr(retrieval_index, "_train", lambda *_: pytest.fail("trained again"))
    index = open_index(build_index(vectors, tmp_path / "index", factory=INVERTED), vectors)
    assert filled == [1, 3, 4]  # the damaged one and the missing ones
    search_all_lists(index)
    assert (nearest(index, 1) == true_nearest(1)).mean() > 0.9
    build_index(vectors, tmp_path / "index", factory=INVERTED)
    assert filled == [1, 3, 4]


def test_an_index_of_other_vectors_is_refused_and_built_anew(tmp_path: Path) -> None:
    vectors, others = write_vectors(tmp_path / "vectors"), write_vectors(tmp_path / "others", seed=2)
    folder = build_index(vectors, tmp_path / "index")
    with pytest.raises(ValueError, match="was built from vectors of fingerprint .* Build it again from these"):
        open_index(folder, others)
    build_index(others, tmp_path / "index")
    assert np.array_equal(nearest(open_index(folder, others)), true_nearest(seed=2))


@pytest.mark.parametrize("name", ["index.faiss", "index.ivfdata"])
def test_an_index_that_changed_on_disk_is_noticed_and_built_anew(tmp_path: Path, name: str) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    folder = build_index(vectors, tmp_path / "index", factory=INVERTED)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / name).write_bytes(written[name][:-3])
    with pytest.raises(ValueError, match=f"{name} is not as it was written. Run build_retrieval_index.py again"):
        open_index(folder, vectors)
    for damaged in (written[name][:-3], written[name][:-3] + b"x" + written[name][-2:]):
        (folder / name).write_bytes(damaged)
        build_index(vectors, folder, factory=INVERTED)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


def test_parts_that_a_killed_build_left_are_removed(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    folder = build_index(vectors, tmp_path / "index", factory=INVERTED)
    for name in ("0123-part-00001.faiss", "0123-part-00001.json", "0123-trained.faiss"):
        (folder / name).write_bytes(b"")
    build_index(vectors, folder, factory=INVERTED)
    assert not [*folder.glob("0123-*")]


def test_vectors_that_changed_on_disk_are_noticed(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    path = sorted(vectors.folder.glob("*.arrow"))[2]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{path.name} is not as it was written"):
        VectorFolder.open(vectors.folder)
    path.unlink()
    with pytest.raises(ValueError, match="lacks 1 of 5 shards, the first shard-00002-of-00005.arrow"):
        VectorFolder.open(vectors.folder)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flatt", "`index_factory`='Flatt' for vectors of 13 numbers: .* Name an index as FAISS does"),
        ("IVF509,SQ8", "has 509 lists, more than the 307 rows of the memory bank. Leave it out to have 'Flat'"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, factory: str, message: str) -> None:
    vectors = write_vectors(tmp_path / "vectors")
    with pytest.raises(ValueError, match=message):
        build_index(vectors, tmp_path / "index", factory=factory)
