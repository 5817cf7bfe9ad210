import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image as PILImage

from hf_mm.data.formats import RowError, center_crop_resize, open_image
from hf_mm.data.image_encoding import encode_rows, load_encoded, raw_pixels


disable_progress_bars()
NUM_ROWS = 11


def encoded(seed: int) -> dict:
    values = np.random.default_rng(seed).integers(0, 256, (13 + seed, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pair_rows() -> Dataset:
    images = [encoded(seed) for seed in range(NUM_ROWS)]
    columns = {"image": images, "text": [f"row {n}" for n in range(NUM_ROWS)], "keywords": [["a", "b"]] * NUM_ROWS}
    return Dataset.from_dict(columns)


class CountingEncoder:
    """Gives two float arrays, counts images, and fails at a given image."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.num_images, self.fail_at = 0, fail_at

    def __call__(self, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        self.num_images += len(images)
        if self.fail_at is not None and self.num_images >= self.fail_at:
            raise KeyboardInterrupt
        halves = images.half() / 256
        return {"latent_mean": halves[:, :2, ::2, ::2], "latent_std": halves[:, 1:, ::2, ::2] + 1}


def encode(rows: Dataset, folder: Path, encoder: object = raw_pixels, **options: object) -> Path:
    options = {"image_size": (8, 12), "batch_size": 3, "num_shards": 3, "encoder_config": {"name": "x"}} | options
    return encode_rows(rows, encoder, output_dir=folder, **options)


def test_raw_pixels_are_the_cropped_pictures_and_other_columns_stay(tmp_path: Path) -> None:
    rows = pair_rows()
    loaded = load_encoded(encode(rows, tmp_path))
    assert loaded.column_names == ["text", "keywords", "pixels"]
    for before, after in zip(rows, loaded, strict=True):
        wanted = np.asarray(center_crop_resize(open_image(before["image"]), (8, 12))).transpose(2, 0, 1)
        assert after["pixels"].dtype == np.uint8 and after["pixels"].shape == (3, 8, 12)
        assert np.array_equal(after["pixels"], wanted)
        assert (after["text"], after["keywords"]) == (before["text"], before["keywords"])


def test_arrays_keep_their_type_and_shape(tmp_path: Path) -> None:
    loaded = load_encoded(encode(pair_rows(), tmp_path, CountingEncoder()))
    pixels = load_encoded(encode(pair_rows(), tmp_path / "raw"))
    batch = loaded[2:7]
    assert batch["latent_mean"].dtype == np.float16 and batch["latent_mean"].shape == (5, 2, 4, 6)
    assert np.array_equal(batch["latent_mean"][3], (pixels[5]["pixels"][:2, ::2, ::2] / 256).astype(np.float16))
    assert torch.from_numpy(loaded[1]["latent_std"]).min() >= 1


def test_arrays_with_one_axis_are_kept(tmp_path: Path) -> None:
    def codes(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"codes": images[:, 0, 0, :5].to(torch.int32)}

    loaded = load_encoded(encode(pair_rows(), tmp_path, codes))
    assert loaded[4]["codes"].shape == (5,) and loaded[4]["codes"].dtype == np.int32


def test_rows_are_mapped_into_memory_not_read(tmp_path: Path) -> None:
    loaded = load_encoded(encode(pair_rows(), tmp_path))
    assert [Path(file["filename"]).name for file in loaded.cache_files] == [
        f"shard-0000{shard}-of-00003.arrow" for shard in range(3)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"] + [
        f"shard-0000{shard}-of-00003.{suffix}" for shard in range(3) for suffix in ("arrow", "json")
    ]


def test_processes_share_the_shards(tmp_path: Path) -> None:
    rows, encoders = pair_rows(), [CountingEncoder(), CountingEncoder()]
    encode(rows, tmp_path / "two", encoders[1], process_index=1, num_processes=2)
    with pytest.raises(ValueError, match="lacks 2 of 3 shards, the first shard-00000-of-00003.arrow. Run"):
        load_encoded(tmp_path / "two")
    encode(rows, tmp_path / "two", encoders[0], process_index=0, num_processes=2)
    encode(rows, tmp_path / "one", CountingEncoder(), num_shards=1)
    assert sum(encoder.num_images for encoder in encoders) == NUM_ROWS + 2  # each process looks at one to learn shapes
    two, one = load_encoded(tmp_path / "two"), load_encoded(tmp_path / "one")
    assert np.array_equal(two[:]["latent_mean"], one[:]["latent_mean"]) and two["text"][:] == one["text"][:]


def test_an_interrupted_run_goes_on_with_the_missing_shards(tmp_path: Path) -> None:
    rows = pair_rows()
    with pytest.raises(KeyboardInterrupt):
        encode(rows, tmp_path, CountingEncoder(fail_at=7))  # one to learn shapes, four in the first shard
    assert [path.name for path in tmp_path.glob("*.arrow")] == ["shard-00000-of-00003.arrow"]
    rest = CountingEncoder()
    loaded = load_encoded(encode(rows, tmp_path, rest))
    assert rest.num_images == 1 + NUM_ROWS - 4
    assert loaded["text"][:] == rows["text"][:]
    nothing = CountingEncoder()
    encode(rows, tmp_path, nothing)
    assert nothing.num_images == 1 and not list(tmp_path.glob("draft*"))


def damage_in_turn(path: Path, written: bytes) -> Iterator[None]:
    """Cuts a file off at several places, then flips one of its bytes."""
    for length in (0, 1, len(written) // 2, len(written) - 8, len(written) - 1):
        path.write_bytes(written[:length])
        yield
    path.write_bytes(written[:1] + bytes([written[1] ^ 1]) + written[2:])
    yield


def test_a_damaged_shard_is_made_anew_as_it_was_and_a_short_one_is_not_read(tmp_path: Path) -> None:
    encode(pair_rows(), tmp_path)
    path = tmp_path / "shard-00001-of-00003.arrow"
    written = path.read_bytes()
    for _ in damage_in_turn(path, written):
        if path.stat().st_size < len(written):
            with pytest.raises(ValueError, match=f"{path.name} is not as it was written. Run the same command again"):
                load_encoded(tmp_path)
        encode(pair_rows(), tmp_path)
        assert path.read_bytes() == written


def test_a_damaged_checksum_costs_its_shard_and_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    encode(pair_rows(), tmp_path)
    note = tmp_path / "shard-00001-of-00003.json"
    written = note.read_bytes()
    for _ in damage_in_turn(note, written):
        encode(pair_rows(), tmp_path)
        assert note.read_bytes() == written
    (tmp_path / "manifest.json").write_text('{"image_size": [8,')
    for use in (lambda: encode(pair_rows(), tmp_path), lambda: load_encoded(tmp_path)):
        with pytest.raises(
            ValueError, match="manifest.json is damaged, so nobody knows what made .* Delete that folder"
        ):
            use()


def test_what_killed_processes_left_of_notes_is_removed_where_these_are_written_again(tmp_path: Path) -> None:
    encode(pair_rows(), tmp_path)
    kept = sorted(tmp_path.iterdir())
    for name in ("manifest.json", "shard-00001-of-00003.json"):
        (tmp_path / name).rename(tmp_path / f"{name}.4711.tmp")
    encode(pair_rows(), tmp_path)
    assert sorted(tmp_path.iterdir()) == kept


def test_a_full_disk_leaves_no_half_shard_and_the_same_call_goes_on(tmp_path: Path) -> None:
    whole = encode(pair_rows(), tmp_path / "whole")
    child = os.fork()  # a process of its own: what wrote to the full disk is left open by datasets
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow beyond that
        try:
            encode(pair_rows(), tmp_path / "cut")
        except OSError as error:
            is_named = error.filename == str(tmp_path / "cut" / "shard-00000-of-00003.arrow")
            os._exit(error.errno if is_named and "the same command goes on" in str(error) else 1)
        finally:
            os._exit(255)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["manifest.json"]
    encode(pair_rows(), tmp_path / "cut")
    both = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, tmp_path / "cut")]
    assert both[0] == both[1]


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_shard(tmp_path: Path) -> None:
    pair_rows().to_parquet(tmp_path / "rows.parquet")
    script = """
import os, sys
from hf_mm.data.formats import load_rows
from hf_mm.data.image_encoding import encode_rows, raw_pixels
calls = []
def encode(images):
    calls.append(len(images))
    if len(calls) == 5: os._exit(9)
    return raw_pixels(images)
encode_rows(load_rows(sys.argv[1]), encode, image_size=8, batch_size=2, num_shards=3, output_dir=sys.argv[2],
            encoder_config={})
"""
    command = [sys.executable, "-c", script, str(tmp_path / "rows.parquet"), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert [path.name for path in (tmp_path / "out").glob("*.arrow")] == ["shard-00000-of-00003.arrow"]
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        load_encoded(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"image_size": 16}, "image_size"),
        ({"num_shards": 2}, "num_shards"),
        ({"encoder_config": {"name": "y"}}, "encoder"),
        ({"encoder": CountingEncoder()}, "columns"),
    ],
)
def test_a_folder_made_otherwise_is_refused(tmp_path: Path, change: dict, name: str) -> None:
    encode(pair_rows(), tmp_path)
    with pytest.raises(ValueError, match=rf"holds images encoded otherwise: .*`{name}` was"):
        encode(pair_rows(), tmp_path, **change)


def test_a_folder_made_from_other_rows_is_refused(tmp_path: Path) -> None:
    rows = pair_rows()
    encode(rows, tmp_path)
    with pytest.raises(ValueError, match="`rows_digest` was"):
        encode(rows.select([*range(NUM_ROWS - 1), 0]), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": (16, 12), "stride": 8},
            r"`image_size`=\(16, 12\): the width 12 must be .* `stride`=8. Try 8.",
        ),
        ({"image_size": 0}, "the height 0"),
        ({"num_shards": 12}, "`num_shards`=12 must be at least 1 and at most the number of rows, 11"),
        ({"process_index": 2, "num_processes": 2}, "`process_index`=2"),
        (
            {"encoder": lambda images: {"a": images, "b": images.half()}},
            "one type, not .*'a': 'uint8', 'b': 'float16'",
        ),
        ({"encoder": lambda images: {"a": images.bfloat16()}}, "`a` as bfloat16"),
        ({"encoder": lambda images: {"a": images[:, 0, 0, 0]}}, "1 to 3 axes"),
        ({"encoder": lambda images: {"a": images[:1]}}, "gave 1 rows of `a` for 3 images"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(pair_rows(), tmp_path, **options)


def test_an_unreadable_image_is_named_by_its_row(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": None} if number == 9 else encoded(number) for number in range(NUM_ROWS)]
    rows = Dataset.from_dict({"image": images, "text": ["a"] * NUM_ROWS})
    with pytest.raises(
        RowError,
        match=r"Row 9, column `image`: `image` is no picture .*JPEG. Drop such rows with `prepare_pairs` first",
    ):
        encode(rows, tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        load_encoded(tmp_path)
