"""The training loop: one page that turns batches into optimizer steps.

Knows batches of tensors, a model that returns `.loss`, and the number of targets in a batch. Does not know
modalities, data, or what is done every so many steps.
"""

import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, tqdm
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from .history import append_history, draw_loss_curves, read_history, truncate_history
from .optimization import TrainingParts, trainable_parameters
from .recipe import TrainingRecipe
from .trackers import log_to_trackers


Batch = dict[str, torch.Tensor]
STOP_SIGNALS = ("SIGINT", "SIGTERM")
STOP_REASONS = (*STOP_SIGNALS, "max_train_seconds")


@dataclass
class TrainingProgress:
    """How far a run has come, and the sums since its last log entry; saved with each checkpoint."""

    step: int = 0
    num_seen: dict[str, int] = field(default_factory=dict)
    interval_sums: dict[str, float] = field(default_factory=dict)
    interval_counts: dict[str, int] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the fields from what `state_dict` returned."""
        self.__init__(**state)  # type: ignore[misc]

    def advance(self, values: Mapping[str, float], num_seen: Mapping[str, int]) -> None:
        """Counts one step, with what it measured and how many targets it saw, by the names of `count_targets`."""
        self.step += 1
        for name, value in values.items():
            self.add(name, value)
        for name, count in num_seen.items():
            name = name.replace("_in_batch", "_seen")
            self.num_seen[name] = self.num_seen.get(name, 0) + count

    def add(self, name: str, value: float) -> None:
        """Adds a value to the mean that the next log entry shows."""
        self.interval_sums[name] = self.interval_sums.get(name, 0.0) + value
        self.interval_counts[name] = self.interval_counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        """Returns the means since the last call and starts anew."""
        means = {name: total / self.interval_counts[name] for name, total in self.interval_sums.items()}
        self.interval_sums, self.interval_counts = {}, {}
        return means


def train(
    accelerator: Accelerator,
    parts: TrainingParts,
    batches: Iterator[Batch],
    recipe: TrainingRecipe,
    *,
    count_targets: Callable[[Batch], Mapping[str, torch.Tensor]],
    save: Callable[[int], Any],
    progress: TrainingProgress,
    every: Sequence[tuple[int | None, Callable[[int], Any]]] = (),
    loss_parts: Sequence[str] = ("text_loss", "image_loss"),
) -> Literal["max_steps", "max_train_seconds"]:
    """Runs the optimizer steps `progress.step + 1 .. recipe.max_steps`.

    The gradient of a step is that of one big batch, however its rows are spread over micro-batches and processes: the
    model divides its sums by the counts of the whole step, and the loss is scaled to undo the averaging of
    accelerate and of data parallelism. A checkpoint is saved every `save_steps` and at the end, whatever ends it.
    Each log entry is also a line of `history.jsonl` in the output folder, drawn into `loss_curves.png` at the end.

    Args:
        accelerator (`Accelerator`): From `build_accelerator`.
        parts (`TrainingParts`): From `prepare_training`. The model's `forward` takes the keys of a batch and those of
            `count_targets`, and returns a `ModelOutput` (or another dataclass) with `.loss`: in other objects data
            parallelism does not find the tensors.
        batches (`Iterator[dict[str, torch.Tensor]]`): Endless; its first batch belongs to step `progress.step + 1`.
            Each process has its own share, `gradient_accumulation_steps` batches per step. Of one with a `state_dict`,
            as a stream's, a batch that fails is the next one again.
        recipe (`TrainingRecipe`): The run.
        count_targets (`Callable`): Gives the denominators of a batch's losses as integer tensors by name, e.g.
            `{"num_items_in_batch": ...}`.
        save (`Callable[[int], Any]`): Saves a checkpoint of the step it is given. Called by all processes.
        progress (`TrainingProgress`): Where to start; advanced as training goes.
        every (`Sequence[tuple[int | None, Callable]]`): Pairs of a period in steps and an action that takes the step.
            Called by all processes; None as period switches an action off.
        loss_parts (`Sequence[str]`): Fields of the output to log; a part that is None in a step is left out of the
            mean. They must add up in the same way as the loss.

    Returns:
        `"max_steps"` or `"max_train_seconds"`: What ended training.

    Raises:
        FloatingPointError: If loss or gradient is not finite. The batch is saved, and a checkpoint of the step before
            it, so that the same command meets it again; `read_window` reads it.
        RuntimeError: If a process that prepares batches died.
        SystemExit: After SIGTERM or Ctrl-C: the step is finished and a checkpoint saved. A second Ctrl-C ends at once.

    """
    history_path = Path(recipe.output_dir) / "history.jsonl"
    if accelerator.is_main_process:
        history_path.parent.mkdir(parents=True, exist_ok=True)
        truncate_history(history_path, progress.step)
    deadline = time.monotonic() + (recipe.max_train_seconds or math.inf)
    stop, saved_step = None, progress.step
    parts.model.train()
    bar = tqdm(total=recipe.max_steps, initial=progress.step, desc="train", dynamic_ncols=True)
    with bar, _noticed_signals() as received, _explained_worker_faults(recipe):
        while progress.step < recipe.max_steps and stop is None:
            began = time.monotonic()
            place = batches.state_dict() if isinstance(batches, Stateful) else None
            window = [next(batches) for _ in range(recipe.gradient_accumulation_steps)]
            flags = [*(int(name in received) for name in STOP_SIGNALS), int(began > deadline)]
            try:
                stop = _take_step(accelerator, parts, window, recipe, progress, count_targets, loss_parts, flags)
            except FloatingPointError:
                if saved_step != progress.step:  # with which the same command meets the same batch at once
                    if isinstance(batches, Stateful):
                        batches.load_state_dict(place)
                    save(progress.step)
                raise
            progress.add("step_seconds", time.monotonic() - began)
            bar.update()
            if progress.step % recipe.logging_steps == 0:
                entry = progress.take_means() | progress.num_seen
                bar.set_postfix(loss=f"{entry['loss']:.4g}")
                _log(accelerator, entry, progress.step, history_path)
            _run_actions(accelerator, parts.model, every, progress.step)
            if progress.step % recipe.save_steps == 0:
                save(progress.step)
                saved_step = progress.step
    if saved_step != progress.step:
        save(progress.step)
    if accelerator.is_main_process:
        draw_loss_curves(read_history(history_path), history_path.with_name("loss_curves.png"))
    if stop in STOP_SIGNALS:
        accelerator.print(
            f"Stopped by {stop} after step {progress.step} of {recipe.max_steps}; the checkpoint is in "
            f"{recipe.output_dir}. The same command goes on from there."
        )
        raise SystemExit(128 + signal.Signals[stop])
    return "max_steps" if progress.step == recipe.max_steps else "max_train_seconds"


def _take_step(
    accelerator: Accelerator,
    parts: TrainingParts,
    window: list[Batch],
    recipe: TrainingRecipe,
    progress: TrainingProgress,
    count_targets: Callable[[Batch], Mapping[str, torch.Tensor]],
    loss_parts: Sequence[str],
    flags: Sequence[int],
) -> str | None:
    """Does one optimizer step and records it; returns why training has to stop, agreed between all processes."""
    window = [send_to_device(batch, accelerator.device, non_blocking=True) for batch in window]
    counts = _sum_counts(accelerator, [count_targets(batch) for batch in window])
    denominators = {name: count.clamp(min=1) for name, count in counts.items()}
    sums = _accumulate_gradients(accelerator, parts.model, window, denominators, loss_parts)
    trainable = trainable_parameters(parts.model)
    grad_norm = accelerator.clip_grad_norm_(trainable, recipe.max_grad_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()

    # The only point where the host waits for the device, and the only exchange of what was measured.
    shared = torch.cat([sums, torch.tensor(flags, dtype=sums.dtype, device=sums.device)])
    shared = accelerator.reduce(shared, "sum")
    numbers = torch.cat([shared, grad_norm.detach().float().view(1), torch.stack([*counts.values()]).float()]).tolist()
    values = _name_values(numbers, loss_parts) | {"grad_norm": numbers[len(shared)]}
    has_scaler = accelerator.scaler is not None  # which skips steps with too large gradients by itself
    if not math.isfinite(values["loss"]) or not (has_scaler or math.isfinite(values["grad_norm"])):
        _refuse(accelerator, values, window, progress.step + 1, recipe)

    parts.optimizer.step()
    parts.optimizer.zero_grad()
    values["learning_rate"] = parts.lr_scheduler.get_last_lr()[0]
    if not accelerator.optimizer_step_was_skipped:
        parts.lr_scheduler.step()
    if parts.ema is not None:
        parts.ema.step(trainable)
    progress.advance(values, {name: int(count) for name, count in zip(counts, numbers[-len(counts) :], strict=True)})
    raised = numbers[len(sums) : len(shared)]
    return next((reason for reason, flag in zip(STOP_REASONS, raised, strict=True) if flag), None)


def _sum_counts(accelerator: Accelerator, counts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Adds the target counts of a step over its micro-batches and all processes."""
    names = list(counts[0])
    per_batch = torch.stack([torch.stack([count[name].to(accelerator.device) for name in names]) for count in counts])
    return dict(zip(names, accelerator.reduce(per_batch.sum(dim=0), "sum").unbind(), strict=True))


def _accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    window: Sequence[Batch],
    denominators: Mapping[str, torch.Tensor],
    loss_parts: Sequence[str],
) -> torch.Tensor:
    """Runs the micro-batches of a step; returns this process's sums of the loss, its parts, and whether each came."""
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps  # both divide: see `train`
    sums = torch.zeros(1 + 2 * len(loss_parts), device=accelerator.device)
    for batch in window:
        with accelerator.accumulate(model):
            output = model(**batch, **denominators)
            accelerator.backward(output.loss * scale)
            sums[0] += output.loss.detach()
            for number, name in enumerate(loss_parts):
                part = getattr(output, name)
                if part is not None:
                    sums[1 + 2 * number] += part.detach()
                    sums[2 + 2 * number] += 1
    return sums


def _name_values(numbers: Sequence[float], loss_parts: Sequence[str]) -> dict[str, float]:
    values = {"loss": numbers[0]}
    for number, name in enumerate(loss_parts):
        if numbers[2 + 2 * number]:
            values[name] = numbers[1 + 2 * number]
    return values


def _refuse(
    accelerator: Accelerator, values: Mapping[str, float], window: Sequence[Batch], step: int, recipe: TrainingRecipe
) -> None:
    """Saves this process's part of a batch that gave no finite loss or gradient, and stops."""
    path = Path(recipe.output_dir) / f"non_finite_step_{step}_process_{accelerator.process_index}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous().clone()
        for number, batch in enumerate(window)
        for name, tensor in batch.items()
    }
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial)
    partial.replace(path)
    raise FloatingPointError(
        f"At step {step} the loss is {values['loss']} and the gradient norm {values['grad_norm']}. The batch is in "
        f"{path}; the weights are those after step {step - 1}, in checkpoint-{step - 1}. Inspect the batch, or lower "
        f"`learning_rate`={recipe.learning_rate}."
    )


def _log(accelerator: Accelerator, entry: Mapping[str, float], step: int, history_path: Path) -> None:
    log_to_trackers(accelerator, {f"train/{name}": value for name, value in entry.items()}, step)
    if accelerator.is_main_process:
        append_history(history_path, {"step": step, **entry})


def _run_actions(
    accelerator: Accelerator, model: nn.Module, every: Sequence[tuple[int | None, Callable[[int], Any]]], step: int
) -> None:
    """Runs the actions that are due, without letting their random draws reach the training that follows."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    for period, action in every:
        if period is not None and step % period == 0:
            with torch.random.fork_rng(devices):
                action(step)
            model.train()


def read_window(path: str | Path) -> list[Batch]:
    """Reads the micro-batches that gave no finite loss or gradient, as one process had them.

    Args:
        path (`str` or `Path`): A `non_finite_step_N_process_P.safetensors` of a run.

    Returns:
        `list[dict[str, torch.Tensor]]`: Arguments of the model's `forward`, one dictionary per micro-batch.

    """
    window: dict[int, Batch] = {}
    for key, tensor in load_file(path).items():
        number, _, name = key.partition(".")
        window.setdefault(int(number), {})[name] = tensor
    return [window[number] for number in sorted(window)]


@contextmanager
def _explained_worker_faults(recipe: TrainingRecipe) -> Iterator[None]:
    """Says what to do after a worker of the data loader died, of which torch tells wherever the run is just then."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        raise RuntimeError(
            f"A process that prepares batches died: {str(error).strip()} The same command goes on from the newest "
            f"checkpoint in {recipe.output_dir}. Where memory ran out lower "
            f"`dataloader_num_workers`={recipe.dataloader_num_workers}."
        ) from error


@contextmanager
def _noticed_signals() -> Iterator[list[str]]:
    """Collects the names of the stop signals that arrive; outside the main thread Python delivers none."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def notice(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[signal.Signals(number)])  # a second one has its usual effect

    previous = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
