"""Rows mapped to Arrow files, one a shard, and the manifest that says what made them.

A shard is written elsewhere and renamed when whole, so whatever is found under its name is whole, and a run that was
cut off goes on with the missing ones. Knows files and rows, not what is in them.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from .fingerprints import digest_file


MANIFEST = "manifest.json"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def claim_folder(folder: Path, manifest: Mapping[str, Any], contents: str, notes: Mapping[str, Any] = {}) -> None:  # noqa: B006
    """Writes the manifest of a folder, or refuses a folder that has a different one.

    Args:
        folder (`Path`): Made where it is missing.
        manifest (`Mapping`): What made the contents, in JSON types.
        contents (`str`): What they are, for the message: "images encoded".
        notes (`Mapping`): Written beside it, and not compared.

    Raises:
        ValueError: If the folder holds what was made otherwise, or its manifest is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted, path = json.loads(json.dumps(manifest)), folder / MANIFEST
    there = read_manifest(folder)
    if there is not None:
        different = {key: (there.get(key), wanted[key]) for key in wanted if there.get(key) != wanted[key]}
        if different:
            changes = "; ".join(f"`{key}` was {old}, now {new}" for key, (old, new) in different.items())
            raise ValueError(f"`output_dir`={str(folder)!r} holds {contents} otherwise: {changes}. Use another.")
        return
    write_json(path, {**wanted, **notes})


def read_manifest(name: str | os.PathLike) -> dict[str, Any] | None:
    """Reads what made the rows of a folder; None where the name is of another source.

    Raises:
        ValueError: If it is damaged.
    """
    path = Path(name) / MANIFEST
    if not path.exists():
        return None
    if (manifest := read_json(path)) is None:
        raise ValueError(f"{path} is damaged, so nobody knows what made {name}. Delete that folder and make it anew.")
    return manifest


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file; None where there is none, or no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, and folders for it, so that it is there whole or not at all; many may write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a process that was killed
        left.unlink(missing_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    while True:
        draft.write_text(json.dumps(content, indent=2), encoding="utf-8")
        try:
            draft.replace(path)
        except FileNotFoundError:  # another process took it for one that was left
            continue
        return


def shard_path(folder: Path, shard: int, num_shards: int) -> Path:
    """Names the file of a shard."""
    return folder / f"shard-{shard:05d}-of-{num_shards:05d}.arrow"


def first_row(num_rows: int, shard: int, num_shards: int) -> int:
    """Returns the number of the first row of a shard, the larger ones being first; at `num_shards`, of all rows."""
    return num_rows // num_shards * shard + min(shard, num_rows % num_shards)


def _map_shard(
    rows: Dataset,
    function: Callable[..., Mapping[str, Any]],
    features: Features,
    folder: Path,
    shard: int,
    num_shards: int,
    *,
    batch_size: int,
    remove_columns: str | list[str],
    verb: str,
) -> Path:
    """Maps one run of rows into a draft folder, then renames the finished file.

    Args:
        rows (`Dataset`): All of them.
        function (`Callable`): Takes a batch and the numbers of its rows among all.
        features (`Features`): Of what it returns and of the columns that stay.
        folder (`Path`): For the file.
        shard (`int`): Which run.
        num_shards (`int`): Of how many.
        batch_size (`int`): Rows of a batch.
        remove_columns (`str` or `list[str]`): Columns that do not stay.
        verb (`str`): What is done, for the progress bar.

    Returns:
        `Path`: The file.
    """
    path = shard_path(folder, shard, num_shards)
    draft = folder / f"draft-{shard:05d}"
    shutil.rmtree(draft, ignore_errors=True)  # left by a run that was cut off
    draft.mkdir()
    start = first_row(len(rows), shard, num_shards)
    with _explained_disk_errors(path, draft):
        rows.shard(num_shards, shard, contiguous=True).map(
            lambda batch, numbers: function(batch, [start + number for number in numbers]),
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            remove_columns=remove_columns,
            features=features,
            cache_file_name=str(draft / path.name),
            load_from_cache_file=False,
            # Else the function is pickled to be hashed. It is part of the file, so the same whenever that is made.
            new_fingerprint=f"{digest_file(folder / MANIFEST)}-{shard:05d}",
            desc=f"{verb} shard {shard + 1} of {num_shards}",
        )
    (draft / path.name).replace(path)
    shutil.rmtree(draft)
    return path


@contextmanager
def _explained_disk_errors(path: Path, draft: Path) -> Iterator[None]:
    """Says that the disk is full where it is, which datasets hides behind the errors of its clean-up."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
                shutil.rmtree(draft, ignore_errors=True)
                told = f"{cause.strerror}. Make room, and the same command goes on"
                raise OSError(cause.errno, told, str(path)) from error
            cause = cause.__cause__ or cause.__context__
        raise


def map_shards(
    rows: Dataset,
    function: Callable[..., Mapping[str, Any]],
    features: Features,
    folder: Path,
    num_shards: int,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    **fields: Any,
) -> None:
    """Maps the shards of one process, each with its checksum; those that are there whole stay as they are.

    Args:
        rows (`Dataset`): The same in every process.
        function (`Callable`): Takes a batch and the numbers of its rows among all.
        features (`Features`): Of what it returns and of the columns that stay.
        folder (`Path`): For the files; its manifest is there.
        num_shards (`int`): Files to write.
        process_index (`int`, defaults to 0): Writes shards `process_index, process_index + num_processes, ...`.
        num_processes (`int`, defaults to 1): How many there are.
        fields: `batch_size`, `remove_columns` as in `Dataset.map`; `verb`, what is done, for the progress bar.
    """
    for shard in range(process_index, num_shards, num_processes):
        if not is_intact(shard_path(folder, shard, num_shards)):
            write_checksum(_map_shard(rows, function, features, folder, shard, num_shards, **fields))


def shard_paths(folder: Path, num_shards: int) -> list[Path]:
    """Returns the files of all shards.

    Raises:
        ValueError: If some are missing.
    """
    paths = [shard_path(folder, shard, num_shards) for shard in range(num_shards)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(paths)} shards, the first {missing[0]}. "
            "Run the same command again to finish it."
        )
    return paths


def open_shards(folder: Path, num_shards: int) -> Dataset:
    """Opens all shards by memory map, one behind the other; sizes are compared with the checksums.

    Raises:
        ValueError: If some are missing or cut off.
    """
    paths = shard_paths(folder, num_shards)
    for path in paths:
        read_checksum(path)
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def measure_file(path: Path) -> dict[str, Any]:
    """Measures size and digest of a file."""
    return {"num_bytes": path.stat().st_size, "blake2b": digest_file(path)}


def write_checksum(path: Path) -> None:
    """Writes size and digest of a finished file beside it."""
    write_json(path.with_suffix(".json"), measure_file(path))


def is_intact(path: Path) -> bool:
    """Whether a file is there with its checksum, and its bytes are those that were written."""
    return path.exists() and read_json(path.with_suffix(".json")) == measure_file(path)


def read_checksum(path: Path) -> str:
    """Reads the digest of a finished file; its size is compared, its bytes are not read.

    Raises:
        ValueError: If there is no checksum or the size is another.
    """
    wanted = read_json(path.with_suffix(".json"))
    if wanted is None or wanted.get("num_bytes") != path.stat().st_size:
        raise ValueError(f"{path} is not as it was written. Run the same command again: it makes such shards anew.")
    return wanted["blake2b"]
