"""Checkpoints of a run: saved whole or not at all, found again, and resumed exactly.

Knows files, an `Accelerator`, and the parts of a run. Does not know what is trained, on which data.

A checkpoint `checkpoint-N` holds what accelerate saves (weights as safetensors, optimizer, random states), the moving
average as `ema.safetensors`, schedule and progress, and `checkpoint.json`: the step, the recipe, and the size and
digest of every file. It is written under another name and renamed at the end, so a crash leaves at most a folder that
ends in `.tmp`, which the next launch removes. Before one is resumed all its bytes are compared with their digests.
Nothing that is read back can run code: all pickles are loaded as weights only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from .loop import TrainingProgress
from .optimization import TrainingParts
from .recipe import TrainingRecipe
from .trackers import start_trackers


MANIFEST_NAME = "checkpoint.json"
STATE_NAME = "training_state.pt"
DATA_NAME = "data_{}.json"  # of each process
# Fields that may change between launches: they move no weight. Batch and accumulation are compared as one product.
FREE_FIELDS = frozenset(
    "output_dir per_device_train_batch_size gradient_accumulation_steps logging_steps save_steps save_total_limit "
    "eval_steps sample_steps resume_from_checkpoint push_to_hub hub_private_repo hub_revision report_to "
    "max_train_seconds gradient_checkpointing torch_compile attn_implementation dataloader_num_workers".split()
)


def is_complete(folder: str | Path) -> bool:
    """Tells whether a folder is a whole checkpoint: its manifest is intact, and every file has its size.

    Args:
        folder (`str` or `Path`): A folder as `Checkpoints.save` writes it.

    Returns:
        `bool`: False also where the folder does not exist.

    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    return manifest is not None and all(_has_size(folder / name, note) for name, note in manifest["files"].items())


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists the whole checkpoints of a run, oldest step first.

    Args:
        output_dir (`str` or `Path`): The run's folder.

    Returns:
        `list[Path]`: Folders `checkpoint-N`; half-written and damaged ones are left out.

    """
    return [path for path in _list_folders(output_dir) if is_complete(path)]


def _list_folders(output_dir: str | Path) -> list[Path]:
    found = (path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


class Checkpoints:
    """Saves and resumes one run.

    Args:
        accelerator (`Accelerator`): Holds the prepared model and optimizer.
        parts (`TrainingParts`): From `prepare_training`.
        progress (`TrainingProgress`): The loop's progress, set by `resume`.
        recipe (`TrainingRecipe`): The run.
        identity (`Mapping[str, Any]`, *optional*): Further fields that decide what is trained on what, such as
            `asdict(model_recipe) | asdict(data_recipe)`. A checkpoint with other values is refused.
        data (`Any`, *optional*): What knows where this process's data stands, by `state_dict` in JSON types and
            `load_state_dict`; none where that follows from the step.

    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: TrainingParts,
        progress: TrainingProgress,
        recipe: TrainingRecipe,
        identity: Mapping[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        """Keeps the parts; touches no file."""
        self.data = data
        self.accelerator, self.parts, self.progress, self.recipe = accelerator, parts, progress, recipe
        self.output_dir = Path(recipe.output_dir)
        rows_per_step = (
            recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
        )
        fixed = {name: value for name, value in asdict(recipe).items() if name not in FREE_FIELDS}
        fixed["mixed_precision"] = accelerator.mixed_precision
        # Through JSON and back, so that a saved recipe and a new one compare alike.
        self.identity = json.loads(
            json.dumps({**fixed, "rows_per_step": rows_per_step, **(identity or {})}, default=str)
        )
        accelerator.register_save_state_pre_hook(_name_weights_without_wrappers)
        accelerator.register_load_state_pre_hook(_load_weights_without_wrappers)

    def save(self, step: int) -> None:
        """Writes `checkpoint-<step>` whole or not at all, then drops the oldest beyond `save_total_limit`.

        To be called by all processes. A checkpoint of the same step is replaced.

        Args:
            step (`int`): The step that the weights have reached.

        Raises:
            OSError: If it cannot be written, as on a full disk. What was written of it is removed, and earlier
                checkpoints stay.

        """
        final = self.output_dir / f"checkpoint-{step}"
        partial = final.with_name(final.name + ".tmp")
        with self._whole_or_nothing(final, partial):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self._save_ema(partial)
            if self.data is not None:
                path = partial / DATA_NAME.format(self.accelerator.process_index)
                path.write_text(json.dumps(self.data.state_dict()), encoding="utf-8")
            if self.accelerator.is_main_process:
                self._save_state(partial)
            self.accelerator.wait_for_everyone()  # every process has written its files
            files = self._describe_files(partial)
            if self.accelerator.is_main_process:
                _seal(partial, {"step": step, "identity": self.identity, "files": files})
                _replace_folder(partial, final)
        if self.accelerator.is_main_process:
            self._prune()
        self.accelerator.wait_for_everyone()  # nobody reads before the folder has its name

    @contextmanager
    def _whole_or_nothing(self, final: Path, partial: Path) -> Iterator[None]:
        """Removes what was written where the rest cannot be, and says so; the writers raise errors of three kinds."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            whole = list_checkpoints(self.output_dir)
            kept = f"{whole[-1]} is whole, and the same command goes on from there" if whole else "None was before it"
            raise OSError(
                f"{final} could not be written: {' '.join(str(error).split())}. {kept}. If the disk is full make "
                "room for one checkpoint more than `save_total_limit`, or lower that."
            ) from error

    def resume(self) -> int:
        """Loads the checkpoint that `resume_from_checkpoint` names, if any, and starts the trackers of the run.

        Returns:
            `int`: The step reached, 0 for a fresh start. The first batch wanted belongs to the step after it.

        Raises:
            ValueError: If the checkpoint named is damaged or belongs to another run, if all there are are damaged, or
                if the folder holds later checkpoints than the one resumed, which a next launch would mistake for this
                run's. The trackers are not started then.

        """
        step = self._load()
        start_trackers(self.accelerator, vars(self.recipe))
        return step

    def _load(self) -> int:
        if self.accelerator.is_main_process:
            for leftover in self.output_dir.glob("checkpoint-*.tmp"):  # of a launch that was killed
                shutil.rmtree(leftover)
        folder = self._choose()
        step = 0 if folder is None else _step_of(folder)
        if later := [path.name for path in list_checkpoints(self.output_dir) if _step_of(path) > step]:
            raise ValueError(
                f"`resume_from_checkpoint`={self.recipe.resume_from_checkpoint} starts after step {step}, but "
                f"{self.output_dir} holds {', '.join(later)}. Delete them, or choose another `output_dir`."
            )
        if folder is None:
            return 0
        self._check_identity(folder)
        self.accelerator.load_state(str(folder))
        state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        self.progress.load_state_dict(state["progress"])
        self.parts.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self._load_ema(folder, state["ema_step"])
        if self.data is not None:
            path = folder / DATA_NAME.format(min(self.accelerator.process_index, _count_data(folder) - 1))
            self.data.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        if self.accelerator.is_main_process:
            self._prune()  # which a launch that was killed right after saving did not come to
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"Resumed from {folder}.")
        return step

    def _choose(self) -> Path | None:
        choice = self.recipe.resume_from_checkpoint
        if choice == "none":
            return None
        if choice == "auto":
            return self._find_newest()
        if damage := self._find_damage(Path(choice)):
            raise ValueError(
                f"`resume_from_checkpoint`={choice} is no whole checkpoint: {damage}. "
                f"Whole ones in {self.output_dir}: {[path.name for path in list_checkpoints(self.output_dir)]}."
            )
        return Path(choice)

    def _find_newest(self) -> Path | None:
        """Returns the newest checkpoint without damage, after setting aside those that are newer."""
        damaged: dict[Path, str] = {}
        newest = None
        for folder in reversed(_list_folders(self.output_dir)):
            if (damage := self._find_damage(folder)) is None:
                newest = folder
                break
            damaged[folder] = damage
        if newest is None and damaged:
            listed = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
            raise ValueError(
                f"{self.output_dir} holds no whole checkpoint ({listed}). Restore one, or delete them to start anew."
            )
        for folder, damage in damaged.items():
            aside = folder.with_name(f"{folder.name}.damaged")
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            self.accelerator.print(f"{folder} is damaged ({damage}): going back to {newest}. It is kept as {aside}.")
        self.accelerator.wait_for_everyone()
        return newest

    def _describe_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Measures the files of a folder, each process its share, which takes a second for a gigabyte."""
        (names,) = broadcast_object_list([sorted(_list_files(folder))])
        return dict(gather_object([(name, _describe(folder / name)) for name in self._share(names)]))

    def _find_damage(self, folder: Path) -> str | None:
        """Compares all bytes with what was written, each process its share; says what differs, the same to all."""
        manifest = _read_manifest(folder)
        if manifest is None:
            differs = [MANIFEST_NAME]
        else:
            files = manifest["files"]
            differs = [name for name in self._share(sorted(files)) if not _is_intact(folder / name, files[name])]
        found = gather_object(differs)
        return f"{found[0]} is missing or not as it was written" if found else None

    def _share(self, names: list[str]) -> list[str]:
        return names[self.accelerator.process_index :: self.accelerator.num_processes]

    def _check_identity(self, folder: Path) -> None:
        saved = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["identity"]
        # A field that did not exist when the run began is as it was, while it is empty.
        given = {name for name, value in self.identity.items() if value not in (None, [])}
        names = sorted(saved.keys() | given)
        changed = {name: (saved.get(name), self.identity.get(name)) for name in names}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        if "max_steps" in changed:
            old, new = changed.pop("max_steps")
            if self.recipe.lr_scheduler_type != "constant_with_warmup":
                self.accelerator.print(
                    f"`max_steps` was {old} and is {new}: from here on the {self.recipe.lr_scheduler_type} schedule "
                    "is the new one's, so the learning rate jumps."
                )
        if changed:
            listed = "; ".join(f"`{name}` was {old!r} and is {new!r}" for name, (old, new) in changed.items())
            raise ValueError(
                f"{folder} belongs to another run: {listed}. Set the fields back, choose another `output_dir`, or "
                "start anew there with `resume_from_checkpoint`=none."
            )

    def _save_state(self, folder: Path) -> None:
        ema = self.parts.ema
        state = {
            "progress": self.progress.state_dict(),
            "lr_scheduler": self.parts.lr_scheduler.state_dict(),
            "ema_step": None if ema is None else ema.optimization_step,
        }
        torch.save(state, folder / STATE_NAME)

    def _ema_file(self, folder: Path, index: int) -> Path:
        """Names the file of this process's share: everything, or its shards where the weights are sharded."""
        return folder / ("ema.safetensors" if index == 0 else f"ema_{index}.safetensors")

    def _save_ema(self, folder: Path) -> None:
        if self.parts.ema is None:
            return
        shadow = self.parts.ema.shadow_params
        is_sharded = isinstance(shadow[0], DTensor)
        if is_sharded or self.accelerator.is_main_process:
            tensors = {str(number): _local(tensor).contiguous() for number, tensor in enumerate(shadow)}
            save_file(tensors, self._ema_file(folder, self.accelerator.process_index))

    def _load_ema(self, folder: Path, ema_step: int | None) -> None:
        if self.parts.ema is None or ema_step is None:
            return
        shadow = self.parts.ema.shadow_params
        index = self.accelerator.process_index if isinstance(shadow[0], DTensor) else 0
        saved = load_file(self._ema_file(folder, index))
        for number, tensor in enumerate(shadow):
            _local(tensor).copy_(saved[str(number)])
        self.parts.ema.optimization_step = ema_step

    def _prune(self) -> None:
        limit = self.recipe.save_total_limit
        for folder in list_checkpoints(self.output_dir)[: -limit if limit else 0]:
            doomed = folder.with_name(folder.name + ".tmp")  # a crash while deleting must not leave half a checkpoint
            folder.rename(doomed)
            shutil.rmtree(doomed)


def _count_data(folder: Path) -> int:
    return len(list(folder.glob(DATA_NAME.format("*"))))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _name_weights_without_wrappers(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
    """Strips the prefix of `DistributedDataParallel`, so that another number of processes can load the weights."""
    for model, state in zip(models, weights, strict=False):  # accelerate passes no weights where it shards them
        if model is not extract_model_from_parallel(model):
            for name in list(state):
                state[name.removeprefix("module.")] = state.pop(name)


def _load_weights_without_wrappers(models: list[nn.Module], input_dir: str) -> None:
    """Loads the weights into the bare models, and takes the models off the list of what accelerate still loads."""
    for number, model in enumerate(models):
        name = "model.safetensors" if number == 0 else f"model_{number}.safetensors"
        load_model(extract_model_from_parallel(model), Path(input_dir) / name)
    models.clear()


def _list_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"num_bytes": path.stat().st_size, "blake2b": digest}


def _has_size(path: Path, note: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == note["num_bytes"]


def _is_intact(path: Path, note: Mapping[str, Any]) -> bool:
    return _has_size(path, note) and _describe(path) == note


def _digest_manifest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest; None where there is none, or it is not as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return manifest if manifest.pop("blake2b") == _digest_manifest(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Flushes every file to disk and writes the manifest that makes the folder a checkpoint."""
    manifest = {**content, "blake2b": _digest_manifest(content)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in _list_files(folder):
        _flush(folder / name)
    _flush(folder)


def _replace_folder(source: Path, target: Path) -> None:
    if target.exists():
        old = target.with_name(target.name + ".old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
