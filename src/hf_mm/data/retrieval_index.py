"""An index for maximum inner product search over a folder of vectors: built by many processes, searched by memory map.

FAISS indexes, attached to `datasets`. Knows vectors and row numbers, neither what they are vectors of nor what is done
with what is found.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from datasets.utils.logging import tqdm
from faiss.contrib.ondisk import merge_ondisk

from .fingerprints import digest_text
from .retrieval_vectors import VectorFolder
from .shards import first_row, is_intact, measure_file, read_json, write_checksum, write_json


COLUMN = "vector"
INDEX, NOTE, TRAINED = "index.faiss", "index.json", "trained.faiss"
LISTS, CHECKSUMS = "index.ivfdata", "checksums.json"
MAX_FLAT_ROWS = 100_000
PROBED_SHARE = 1 / 16  # ours: of an inverted file's lists; benchmarks/retrieval.py measures the recall it gives
TRAINING_ROWS_PER_LIST = 64  # ours: FAISS warns below 39
MIN_TRAINING_ROWS = 16_384
BATCH_SIZE = 8192


def choose_factory(num_rows: int) -> str:
    """Names the default index for a number of rows, as a factory string of FAISS.

    Up to 100,000 rows are searched exactly (`Flat`). More lie in an inverted file of about twice their square root of
    lists, one byte a number (`SQ8`). Product quantizers (`PQ`) are four to sixteen times smaller and find too few of
    the true neighbours without the vectors themselves to refine by; a graph (`HNSW`) holds them whole in memory.

    Args:
        num_rows (`int`): Rows to search.

    Returns:
        `str`: such as `"Flat"` or `"IVF1024,SQ8"`.

    Example:
        >>> choose_factory(100_000), choose_factory(200_000), choose_factory(1_000_000)
        ('Flat', 'IVF1024,SQ8', 'IVF2048,SQ8')

    """
    if num_rows <= MAX_FLAT_ROWS:
        return "Flat"
    return f"IVF{2 ** round(math.log2(2 * math.sqrt(num_rows)))},SQ8"


def build_index(
    vectors: VectorFolder,
    output_dir: str | os.PathLike,
    *,
    factory: str | None = None,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Builds an index of vectors; the same call finishes what was cut off.

    An inverted file is trained on a sample by the first process, filled by all of them, each its shards of the
    vectors, and joined on disk, so that no process holds more than a shard. Other indexes cannot be joined and are
    built by the first process.

    Args:
        vectors ([`VectorFolder`]): Of the memory bank.
        output_dir (`str` or `os.PathLike`): Folder for the index.
        factory (`str`, *optional*): Factory string of FAISS; none: [`choose_factory`].
        seed (`int`, defaults to 0): Of the sample to train on.
        process_index (`int`, defaults to 0): Number of this process.
        num_processes (`int`, defaults to 1): How many there are.
        wait (`Callable`): Returns once all processes have called it.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If FAISS does not know the factory string, or there are too few vectors for it.
    """
    folder = Path(output_dir)
    factory = factory or choose_factory(vectors.manifest["num_rows"])
    note = {"factory": factory, "vectors": vectors.fingerprint, "num_rows": vectors.manifest["num_rows"]}
    is_built = _is_built(folder, note)
    wait()  # for those that look later than others build
    if is_built:
        if process_index == 0:
            _remove_parts(folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0:
        (folder / NOTE).unlink(missing_ok=True)  # what it tells of is about to be replaced
    index = _make_index(vectors.manifest["dimension"], factory)
    if not _is_inverted_file(index):
        if process_index == 0:
            _build_alone(index, vectors, folder)
    else:
        mark = digest_text(json.dumps([note, seed]))[:8]  # parts of other vectors or lists have other names
        trained = folder / f"{mark}-{TRAINED}"
        if process_index == 0 and not is_intact(trained):
            _train(index, vectors, seed)
            _write(index, trained)
            write_checksum(trained)
        wait()
        num_shards = vectors.manifest["num_shards"]
        parts = [folder / f"{mark}-part-{shard:05d}.faiss" for shard in range(num_shards)]
        for shard in range(process_index, num_shards, num_processes):
            if not is_intact(parts[shard]):
                _fill(trained, vectors, shard, parts[shard])
        wait()
        if process_index == 0:
            _join(trained, parts, folder)
    if process_index == 0:
        written = (path for path in (folder / INDEX, folder / LISTS) if path.exists())
        write_json(folder / CHECKSUMS, {path.name: measure_file(path) for path in written})
        write_json(folder / NOTE, note)
        _remove_parts(folder)
    wait()
    return folder


def open_index(folder: str | os.PathLike, vectors: VectorFolder) -> Dataset:
    """Opens vectors with their index attached, both by memory map where the index allows it.

    Args:
        folder (`str` or `os.PathLike`): That [`build_index`] wrote.
        vectors ([`VectorFolder`]): That it was built from.

    Returns:
        `Dataset`: The vectors; `search_batch("vector", queries, k)` and the like search them.

    Raises:
        ValueError: If there is no finished index, one that was cut off since, or one built from other vectors.
    """
    folder = Path(folder)
    note, checksums = read_json(folder / NOTE), read_json(folder / CHECKSUMS)
    if note is None or checksums is None:
        raise ValueError(f"{str(folder)!r} has no finished index. Run build_retrieval_index.py again to finish it.")
    for name, wanted in checksums.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != wanted["num_bytes"]:
            raise ValueError(f"{path} is not as it was written. Run build_retrieval_index.py again to build it anew.")
    if note["vectors"] != vectors.fingerprint:
        raise ValueError(
            f"The index in {str(folder)!r} was built from vectors of fingerprint {note['vectors']}, and those in "
            f"{str(vectors.folder)!r} have {vectors.fingerprint}. Build it again from these."
        )
    flags = faiss.IO_FLAG_MMAP_IFC if note["factory"] == "Flat" else faiss.IO_FLAG_ONDISK_SAME_DIR
    index = faiss.read_index(str(folder / INDEX), flags)
    rows = vectors.load()
    _attach(index, rows)
    return rows


def _attach(index: Any, rows: Dataset) -> None:
    """Has datasets search with an index that is there; its own reader would copy the index to memory."""
    is_silent = are_progress_bars_disabled()
    disable_progress_bars()  # one that counts to nothing
    rows.add_faiss_index_from_external_arrays(
        np.empty((0, index.d), dtype=np.float32), index_name=COLUMN, custom_index=index
    )
    if not is_silent:
        enable_progress_bars()


def _is_built(folder: Path, note: dict[str, Any]) -> bool:
    """Whether an index of that note is there, and its bytes are those that were written."""
    checksums = read_json(folder / CHECKSUMS)
    if read_json(folder / NOTE) != note or checksums is None:
        return False
    return all(
        (folder / name).exists() and measure_file(folder / name) == wanted for name, wanted in checksums.items()
    )


def _remove_parts(folder: Path) -> None:
    """Removes what an inverted file was joined from."""
    for path in (*folder.glob("*-part-*"), *folder.glob(f"*-{TRAINED.split('.')[0]}.*")):
        path.unlink()


def _make_index(dimension: int, factory: str) -> Any:
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"`index_factory`={factory!r} for vectors of {dimension} numbers: {str(error).splitlines()[0]}. "
            "Name an index as FAISS does, such as 'Flat', 'IVF1024,SQ8' or 'HNSW32'."
        ) from error


def _is_inverted_file(index: Any) -> bool:
    """Whether parts of it can be filled apart and joined."""
    is_plain = isinstance(faiss.downcast_index(index), faiss.IndexIVF | faiss.IndexPreTransform)
    return is_plain and faiss.try_extract_index_ivf(index) is not None


def _build_alone(index: Any, vectors: VectorFolder, folder: Path) -> None:
    """Builds through datasets what cannot be built in parts."""
    rows = vectors.load()
    if not index.is_trained:
        _train(index, vectors, 0)
    rows.add_faiss_index(COLUMN, custom_index=index, batch_size=BATCH_SIZE)
    rows.save_faiss_index(COLUMN, folder / f"{INDEX}.draft")
    (folder / f"{INDEX}.draft").replace(folder / INDEX)


def _train(index: Any, vectors: VectorFolder, seed: int) -> None:
    """Trains on a sample, which is all that is held in memory."""
    rows = vectors.load().select_columns(COLUMN)
    ivf = faiss.try_extract_index_ivf(index)
    num_lists = 1 if ivf is None else ivf.nlist
    if num_lists > len(rows):
        raise ValueError(
            f"`index_factory` has {num_lists} lists, more than the {len(rows)} rows of the memory bank. "
            f"Leave it out to have {choose_factory(len(rows))!r}."
        )
    num_rows = min(len(rows), max(TRAINING_ROWS_PER_LIST * num_lists, MIN_TRAINING_ROWS))
    numbers = np.sort(np.random.default_rng(seed).choice(len(rows), num_rows, replace=False))
    sample = np.concatenate([rows[part]["vector"] for part in np.array_split(numbers, math.ceil(num_rows / 8192))])
    if ivf is not None:
        ivf.nprobe = max(1, round(num_lists * PROBED_SHARE))
        ivf.cp.min_points_per_centroid = 1  # small trials; the rule above has more
    index.train(sample)


def _fill(trained: Path, vectors: VectorFolder, shard: int, path: Path) -> None:
    """Adds one shard's vectors under their row numbers."""
    index, rows = faiss.read_index(str(trained)), vectors.load(shard)
    start = first_row(vectors.manifest["num_rows"], shard, vectors.manifest["num_shards"])
    desc = f"Indexing shard {shard + 1} of {vectors.manifest['num_shards']}"
    for first in tqdm(range(0, len(rows), BATCH_SIZE), desc=desc):
        batch = rows[first : first + BATCH_SIZE][COLUMN]
        index.add_with_ids(batch, np.arange(start + first, start + first + len(batch)))
    _write(index, path)
    write_checksum(path)


def _join(trained: Path, parts: list[Path], folder: Path) -> None:
    """Joins the parts on disk, one after the other."""
    lists = folder / LISTS
    lists.unlink(missing_ok=True)  # left by a run that was cut off
    index = faiss.read_index(str(trained))
    merge_ondisk(index, [str(part) for part in parts], str(lists))
    _write(index, folder / INDEX)


def _write(index: Any, path: Path) -> None:
    """Writes an index so that it is there whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    faiss.write_index(index, str(draft))
    draft.replace(path)
