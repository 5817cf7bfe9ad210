"""Measures the index of retrieval: neighbours found of the true ones, time of both searches, memory of the build.

python benchmarks/retrieval.py --num_rows 200000 --output retrieval.json
python benchmarks/retrieval.py --num_rows 200000 --kind gaussian
python benchmarks/retrieval.py --num_rows 1000000 --num_queries 500

Vectors are made, not read, so that anyone has the same ones. `clustered` has what vectors of captioned pictures are
known to have: a mean far from zero (two random vectors have a cosine of about 0.5), topics of unequal size (4,096, by
Zipf's law), and within a topic a spread that falls off along the axes (as 1 / rank). `gaussian` is noise without any
structure, the worst there is to search and nothing that an encoder gives. Queries are new draws, in no index. The
index is built in a process of its own, whose peak of resident memory is reported, mapped files included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import faiss
import numpy as np
from datasets import Dataset, Features, List, Value

from hf_mm.data.retrieval_index import COLUMN, build_index, choose_factory, open_index
from hf_mm.data.retrieval_vectors import VectorFolder
from hf_mm.data.shards import claim_folder, map_shards
from timing import benchmark_parser, describe, tell


NUM_TOPICS = 4096
NUM_NEIGHBORS = 4  # recall is counted among so many
ROWS_PER_SHARD = 25_000


class MadeVectors:
    """Unit vectors by their numbers, the same at every call.

    Args:
        kind (`str`): `"clustered"` or `"gaussian"`.
        dimension (`int`): Length of a vector.
    """

    def __init__(self, kind: str, dimension: int) -> None:
        rng = np.random.default_rng(0)
        self.is_clustered, self.dimension = kind == "clustered", dimension
        self.axes = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0].astype(np.float32)
        ranks = np.arange(1, dimension + 1)
        self.spread = (ranks**-0.5 / np.sqrt((1 / ranks).sum())).astype(np.float32)  # squares add up to 1
        self.mean = rng.normal(size=dimension).astype(np.float32) / np.sqrt(dimension)
        topics = rng.normal(size=(NUM_TOPICS, dimension)) * self.spread
        self.topics = topics.astype(np.float32) @ self.axes.T
        weights = 1 / np.arange(1, NUM_TOPICS + 1)
        self.weights = weights / weights.sum()

    def __call__(self, block: int, num_rows: int) -> np.ndarray:
        """Makes `num_rows` vectors of a block."""
        rng = np.random.default_rng((1, block))
        noise = rng.normal(size=(num_rows, self.dimension)).astype(np.float32)
        if self.is_clustered:
            own = (noise * self.spread) @ self.axes.T
            noise = self.mean + 0.8 * self.topics[rng.choice(NUM_TOPICS, num_rows, p=self.weights)] + 0.6 * own
        return noise / np.linalg.norm(noise, axis=1, keepdims=True)


def write_vectors(folder: Path, made: MadeVectors, kind: str, num_rows: int) -> None:
    """Writes a folder of vectors as `embed_rows` would."""
    num_shards = -(-num_rows // ROWS_PER_SHARD)
    manifest = {"encoder": kind, "dimension": made.dimension, "num_rows": num_rows, "num_shards": num_shards}
    claim_folder(folder, manifest, "vectors made")
    features = Features({COLUMN: List(Value("float16"), length=made.dimension)})
    rows = Dataset.from_dict({"number": range(num_rows)})
    map_shards(
        rows,
        lambda batch, numbers: {COLUMN: made(numbers[0], len(numbers)).astype(np.float16)},
        features,
        folder,
        num_shards,
        batch_size=5000,
        remove_columns="number",
        verb="Making",
    )


def build_apart(vectors_dir: Path, index_dir: Path, factory: str) -> dict[str, float]:
    """Builds the index in another process; returns its seconds and its peak of memory."""
    command = [sys.executable, __file__, "--build", str(vectors_dir), str(index_dir), factory]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])  # FAISS prints too


def build_here(vectors_dir: str, index_dir: str, factory: str) -> None:
    """Builds the index and prints what it took."""
    before = read_peak_gib()
    start = time.perf_counter()
    build_index(VectorFolder.open(vectors_dir), index_dir, factory=factory)
    seconds = time.perf_counter() - start
    print(json.dumps({"build_seconds": seconds, "peak_gib": read_peak_gib(), "gib_before": before}))


def read_peak_gib() -> float:
    """Reads the largest resident memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def search_exactly(vectors: VectorFolder, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Finds the true neighbours; returns their scores, numbers, and the seconds that took, without reading vectors."""
    num_shards = vectors.manifest["num_shards"]
    best_scores = np.full((len(queries), NUM_NEIGHBORS), -np.inf, dtype=np.float32)
    best, seconds, start = np.full((len(queries), NUM_NEIGHBORS), -1), 0.0, 0
    for shard in range(num_shards):
        index = faiss.IndexFlatIP(vectors.manifest["dimension"])
        index.add(vectors.load(shard)[:][COLUMN])
        before = time.perf_counter()
        scores, rows = index.search(queries, NUM_NEIGHBORS)
        seconds += time.perf_counter() - before
        scores, rows = np.hstack([best_scores, scores]), np.hstack([best, rows + start])
        order = np.argsort(-scores, axis=1)[:, :NUM_NEIGHBORS]
        best_scores, best = (np.take_along_axis(values, order, axis=1) for values in (scores, rows))
        start += index.ntotal
    return best_scores, best, seconds


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes vectors, builds, searches both ways and compares."""
    result = describe(arguments, (faiss, datasets, np))
    factory = arguments.factory or choose_factory(arguments.num_rows)
    made = MadeVectors(arguments.kind, arguments.dimension)
    write_vectors(folder / "vectors", made, arguments.kind, arguments.num_rows)
    built = build_apart(folder / "vectors", folder / f"index-{factory.replace(',', '-')}", factory)
    vectors = VectorFolder.open(folder / "vectors")
    memory = open_index(folder / f"index-{factory.replace(',', '-')}", vectors)
    queries = made(2**31, arguments.num_queries)
    memory.search_batch(COLUMN, queries[:8], NUM_NEIGHBORS)  # opens what is mapped
    start = time.perf_counter()
    _, found = memory.search_batch(COLUMN, queries, NUM_NEIGHBORS)
    seconds = time.perf_counter() - start
    scores, wanted, exact_seconds = search_exactly(vectors, queries)
    hits = [len(set(mine) & set(true)) for mine, true in zip(found.tolist(), wanted.tolist(), strict=True)]
    pairs = made(7, 2000) @ made(8, 2000).T
    return result | {
        "factory": factory,
        f"recall_at_{NUM_NEIGHBORS}": round(sum(hits) / wanted.size, 4),
        "milliseconds_per_query": round(1e3 * seconds / len(queries), 3),
        "exact_milliseconds_per_query": round(1e3 * exact_seconds / len(queries), 3),
        "times_faster_than_exact": round(exact_seconds / seconds, 2),
        **{name: round(value, 2) for name, value in built.items()},
        "index_gib": round(sum(path.stat().st_size for path in folder.glob("index-*/index.*")) / 2**30, 2),
        "mean_cosine_of_neighbors": round(float(scores.mean()), 3),
        "mean_cosine_of_any_two": round(float(pairs.mean()), 3),
        "threads": faiss.omp_get_max_threads(),
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_threads=None, num_repeats=None)
    parser.add_argument("--kind", choices=("clustered", "gaussian"), default="clustered")
    parser.add_argument("--num_rows", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--num_queries", type=int, default=2000)
    parser.add_argument("--factory", help="Index as FAISS names it; none: the default for so many rows.")
    parser.add_argument("--folder", type=Path, help="Keeps vectors and index here; none: a temporary folder.")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        return build_here(*arguments.build)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.folder or Path(temporary))
    tell(result, arguments.output)


if __name__ == "__main__":
    main()
