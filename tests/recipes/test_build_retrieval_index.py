import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import disable_progress_bars

import build_retrieval_index
import encode_images
from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.data.image_encoding import load_encoded, read_manifest
from hf_mm.data.neighbors import open_neighbors, with_neighbors
from hf_mm.data.retrieval import Retriever
from hf_mm.data.retrieval_vectors import VectorFolder


disable_progress_bars()
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "build_retrieval_index.py"
NUM_SCENES = 43
LOOSE = ("--max_relevance", "0.9999", "--max_similarity", "0.9999")  # random weights find much alike


def arguments(clip_dir: Path, output_dir: Path, *more: object) -> list[str]:
    fixed = ["--num_scenes", NUM_SCENES, "--image_size", 17, "--clip_name", clip_dir, "--output_dir", output_dir]
    return [str(word) for word in [*fixed, "--num_shards", 3, "--batch_size", 5, *LOOSE, *more]]


def test_neighbours_are_a_column_beside_encoded_images(
    clip_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = build_retrieval_index.main(arguments(clip_dir, tmp_path / "out"))
    assert (
        f"Neighbours of {NUM_SCENES} rows among {NUM_SCENES} are in {folder / 'neighbors'}." in capsys.readouterr().out
    )
    words = ["--num_scenes", str(NUM_SCENES), "--image_size", "17", "--output_dir", str(tmp_path / "pixels")]
    rows = load_encoded(encode_images.main(words))
    digest = read_manifest(tmp_path / "pixels")["rows_digest"]
    joined = with_neighbors(rows, folder / "neighbors", rows_digest=digest, memory=rows, memory_digest=digest)
    for number, row in enumerate(joined):
        assert len(row["neighbor_ids"]) == 4 and number not in row["neighbor_ids"]
    retriever = Retriever(folder, rows, ClipEncoder.from_pretrained(str(clip_dir)), memory_digest=digest)
    found = retriever.retrieve(texts=["a red star"], num_retrieved=1)
    assert found.rows[0][0]["pixels"].shape == (3, 17, 17)
    build_retrieval_index.main(arguments(clip_dir, tmp_path / "out"))  # finds all done


def test_a_memory_bank_of_its_own_gives_numbers_in_it(clip_dir: Path, tmp_path: Path) -> None:
    memory = ("--memory_name", "icon_scenes:shapes", "--memory_split", "validation", "--memory_num_scenes", 61)
    folder = build_retrieval_index.main(arguments(clip_dir, tmp_path / "out", *memory))
    found = open_neighbors(folder / "neighbors")
    assert len(found) == NUM_SCENES and 43 <= max(max(ids) for ids in found["neighbor_ids"][:]) < 61
    assert VectorFolder.open(folder / "memory").manifest["query_dropout"] is None
    assert VectorFolder.open(folder / "queries").manifest["num_rows"] == NUM_SCENES


def test_a_memory_bank_too_small_and_encoded_rows_are_refused(clip_dir: Path, tmp_path: Path) -> None:
    memory = ("--memory_name", "icon_scenes:shapes", "--memory_num_scenes", 4)
    with pytest.raises(ValueError, match="The memory bank has 4 rows; 4 neighbours need at least 5"):
        build_retrieval_index.main(arguments(clip_dir, tmp_path / "out", *memory))
    words = ["--num_scenes", "5", "--image_size", "17", "--num_shards", "1", "--output_dir", str(tmp_path / "pixels")]
    encode_images.main(words)
    with pytest.raises(ValueError, match="The rows hold encoded images, and vectors are made of pictures"):
        build_retrieval_index.main(arguments(clip_dir, tmp_path / "two", "--dataset_name", tmp_path / "pixels"))


def test_another_dropout_or_other_rows_in_the_same_folder_are_refused(clip_dir: Path, tmp_path: Path) -> None:
    build_retrieval_index.main(arguments(clip_dir, tmp_path / "out"))
    with pytest.raises(ValueError, match="holds vectors made otherwise: `query_dropout` was 0.2, now 0.1"):
        build_retrieval_index.main(arguments(clip_dir, tmp_path / "out", "--query_dropout", 0.1))
    with pytest.raises(ValueError, match="holds vectors made otherwise: `rows_digest` was"):
        build_retrieval_index.main(arguments(clip_dir, tmp_path / "out", "--seed", 1))
    with pytest.raises(ValueError, match="holds neighbours found otherwise: `strategy` was"):
        build_retrieval_index.main(arguments(clip_dir, tmp_path / "out", "--max_relevance", 0.99))


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_find_what_one_does(clip_dir: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ("--index_factory", "IVF3,SQ8")
    result = subprocess.run(
        [*launcher, str(RECIPE), *arguments(clip_dir, tmp_path / "two", *more)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    build_retrieval_index.main(arguments(clip_dir, tmp_path / "one", *more))
    one, two = (open_neighbors(tmp_path / name / "neighbors")["neighbor_ids"][:] for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_a_killed_run_goes_on_without_redoing_finished_shards(clip_dir: Path, tmp_path: Path) -> None:
    words = arguments(clip_dir, tmp_path / "out", "--num_shards", NUM_SCENES, "--batch_size", 1)
    process = subprocess.Popen([sys.executable, str(RECIPE), *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    finished: list[Path] = []
    while len(finished) < 5:
        assert process.poll() is None
        time.sleep(0.01)
        finished = list((tmp_path / "out" / "memory").glob("shard-*.json"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.with_suffix(".arrow").stat().st_mtime_ns for path in finished}
    folder = build_retrieval_index.main(words)
    assert all(path.with_suffix(".arrow").stat().st_mtime_ns == time for path, time in before.items())
    whole = build_retrieval_index.main(arguments(clip_dir, tmp_path / "whole", "--batch_size", 1))
    one, two = (open_neighbors(path / "neighbors")["neighbor_ids"][:] for path in (folder, whole))
    assert one == two
