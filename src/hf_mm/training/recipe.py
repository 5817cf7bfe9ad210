"""Recipes: the fields of a training run, read from one flat YAML file and the command line.

Knows the fields that every training run shares and how to turn them into an `Accelerator`. Does not know models,
data, or what a step does.
"""

import argparse
import dataclasses
import difflib
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from transformers import HfArgumentParser


SHORTENED = reprlib.Repr()  # a list of lists that are the same is small as YAML, and may be without end as text
SHORTENED.maxlevel = 2


def parse_recipe(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Reads the fields of several dataclasses from a flat YAML file and the command line.

    `--config file.yaml` (or `--config=file.yaml`) fills the fields; every field can be overridden as
    `--field_name value`. `none` sets an optional field back to None, and no value empties a list. Values of the file
    pass through the same conversion as those of the command line, because YAML reads `3e-4` as a string.

    Args:
        dataclass_types (`type`): Dataclasses whose field names do not overlap, usually one per concern.
        argv (`Sequence[str]`, *optional*): Arguments to read instead of `sys.argv[1:]`.

    Returns:
        `tuple`: One instance per dataclass, in the order given.

    Raises:
        ValueError: If a key is unknown (the message lists close matches and the known keys), or a value of the file
            cannot be converted.
        SystemExit: If the command line itself is malformed, as `argparse` does.

    """
    parser = HfArgumentParser(list(dataclass_types), allow_abbrev=False)  # type: ignore[arg-type]
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first action of a field; `--no_x` of a boolean comes second
        action.help = (action.help or "").replace("%", "%%")  # argparse formats help with %
        action.nargs = "*" if action.nargs == "+" else action.nargs  # a list of a file can be emptied
    parser.add_argument("--config", metavar="FILE.yaml", help="Flat YAML file with values for the fields below.")
    optional_fields = _allow_none(dataclass_types, actions)
    actions.pop("help")

    file_flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_flag.add_argument("--config", type=Path)
    known, rest = file_flag.parse_known_args(argv)
    if known.config is not None:
        for name, value in _read_recipe_file(known.config, actions).items():
            if value is None and name not in optional_fields:
                raise ValueError(f"{known.config}: `{name}` is empty, but the field needs a value.")
            converted = _convert(value, actions[name], where=str(known.config))
            for action in parser._actions:
                if action.dest == name:
                    action.default, action.required = converted, False

    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        raise ValueError(_describe_unknown("command line", [_flag_name(word) for word in unknown], actions))
    values = vars(namespace)
    return tuple(_build(kind, values) for kind in dataclass_types)


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**{item.name: values[item.name] for item in dataclasses.fields(kind) if item.init})


def _flag_name(word: str) -> str:
    return word.split("=")[0].lstrip("-").replace("-", "_") if word.startswith("--") else word


def _read_recipe_file(path: Path, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"`--config`={path} is no file. Give the path of a recipe YAML, e.g. under recipes/configs/.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, a date that is none, brackets without end
        raise ValueError(f"{path} is no YAML: {error}. A recipe is flat YAML of `field: value` lines.") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds a {type(recipe).__name__}. A recipe is flat YAML of `field: value` lines.")
    if unknown := [str(key) for key in recipe if key not in actions]:
        raise ValueError(_describe_unknown(str(path), unknown, actions))
    return recipe


def _describe_unknown(where: str, unknown: Sequence[str], actions: Mapping[str, argparse.Action]) -> str:
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, list(actions), n=3)
        meant = " or ".join(f"`{match}`" for match in close)
        hints.append(f"`{name}`" + (f" (did you mean {meant}?)" if close else ""))
    return f"{where}: unknown keys {', '.join(hints)}. Known keys: {', '.join(sorted(actions))}."


def _allow_none(dataclass_types: Sequence[type], actions: Mapping[str, argparse.Action]) -> set[str]:
    """Lets the word `none` mean None for fields typed `X | None`; returns their names."""
    optional = set()
    for kind in dataclass_types:
        for name, hint in get_type_hints(kind).items():
            if name in actions and type(None) in get_args(hint):
                optional.add(name)
                actions[name].type = _none_or(actions[name].type)
    return optional


def _none_or(convert: Any) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    converted.__name__ = str(getattr(convert, "__name__", convert))  # argparse names the type in its messages
    return converted


def _convert(value: Any, action: argparse.Action, *, where: str) -> Any:
    """Passes a YAML value through the conversion that the command line uses for the same field."""
    if value is None:
        return None
    is_list = action.nargs == "*"
    if isinstance(value, dict) or (isinstance(value, list) and not is_list):
        raise ValueError(f"{where}: `{action.dest}`={SHORTENED.repr(value)} is nested. Write one plain value.")
    if is_list:
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) for item in items):
            raise ValueError(
                f"{where}: `{action.dest}`={SHORTENED.repr(value)} is nested. Write a list of plain values."
            )
        return [_convert_one(item, action, where) for item in items]
    return _convert_one(value, action, where)


def _convert_one(value: Any, action: argparse.Action, where: str) -> Any:
    is_bool_field = action.nargs == "?"
    if isinstance(value, bool) and not is_bool_field:
        raise ValueError(
            f"{where}: `{action.dest}`={value} was read as a boolean. YAML takes yes, no, on and off for booleans: "
            "put a word in quotes, or write a number."
        )
    try:
        converted = action.type(str(value)) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", action.type)
        raise ValueError(f"{where}: `{action.dest}`={value!r} is no {kind} ({error}).") from error
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{where}: `{action.dest}`={value!r} is not one of {choices}.")
    return converted


def _described(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingRecipe:
    """The fields that every training run shares; names equal `transformers.TrainingArguments` where one exists.

    The defaults of the optimizer are those of Transfusion (arXiv 2408.11039, Sec. 4.1).
    """

    output_dir: str = _described("runs/default", "Folder for checkpoints, logs, samples and the finished model.")
    max_steps: int = _described(1000, "Number of optimizer steps; also the length of the learning-rate schedule.")
    per_device_train_batch_size: int = _described(8, "Rows in one forward pass on one device.")
    gradient_accumulation_steps: int = _described(1, "Forward passes per optimizer step.")
    learning_rate: float = _described(3e-4, "Peak learning rate.")
    min_learning_rate: float = _described(0.0, "Learning rate at the end of a cosine or linear schedule.")
    warmup_steps: int = _described(0, "Steps of linear warm-up from 0.")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = _described("cosine", "Schedule.")
    weight_decay: float = _described(0.1, "Decoupled weight decay of parameters with two dimensions or more.")
    adam_beta1: float = _described(0.9, "AdamW beta1.")
    adam_beta2: float = _described(0.95, "AdamW beta2.")
    adam_epsilon: float = _described(1e-8, "AdamW epsilon.")
    max_grad_norm: float = _described(1.0, "Gradients are scaled down to this global norm; .inf switches it off.")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _described(
        "auto", "auto: bf16 where the hardware multiplies bf16 fast, else float32."
    )
    ema_decay: float | None = _described(None, "Decay of the moving average of the weights; none switches it off.")
    seed: int = _described(0, "Seed of the initial weights and of the data.")
    logging_steps: int = _described(10, "Steps between log entries; an entry is the mean over these steps.")
    save_steps: int = _described(500, "Steps between checkpoints.")
    save_total_limit: int | None = _described(2, "Newest checkpoints kept; none keeps all.")
    eval_steps: int | None = _described(None, "Steps between evaluations.")
    sample_steps: int | None = _described(None, "Steps between sample pictures.")
    resume_from_checkpoint: str = _described(
        "auto", "auto: the newest complete checkpoint in output_dir, if any; none: start anew; or a folder."
    )
    push_to_hub: str | None = _described(
        None, "Hub repo id, e.g. me/my-model, to upload the model to: at each save, without waiting, and at the end."
    )
    hub_private_repo: bool = _described(False, "Whether a new repo on the Hub is private.")
    hub_revision: str | None = _described(None, "Branch on the Hub, made if missing; none: the main one.")
    report_to: list[str] = _described(["tensorboard"], "Trackers of accelerate; none switches them off.")
    max_train_seconds: float | None = _described(
        None, "Wall-clock budget of this launch: when spent, training stops as if done. The schedule stays by steps."
    )
    gradient_checkpointing: bool = _described(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = _described(False, "Compile the model's forward.")
    attn_implementation: str = _described(
        "auto",
        "Attention of transformers, by name. auto: eager for short bf16 windows on a CPU, else its own.",
    )
    dataloader_num_workers: int = _described(0, "Worker processes that prepare batches.")

    def __post_init__(self) -> None:
        """Refuses values that no run can use."""
        for name in (
            "max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate max_grad_norm "
            "adam_epsilon logging_steps save_steps save_total_limit eval_steps sample_steps max_train_seconds"
        ).split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}`={value} must be above 0.")
        for name in ("min_learning_rate", "warmup_steps", "weight_decay", "dataloader_num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}`={getattr(self, name)} must be 0 or above.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}`={value} must be at least 0 and below 1.")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"`min_learning_rate`={self.min_learning_rate} is above `learning_rate`={self.learning_rate}. "
                "Lower it, or set it to 0."
            )
        if self.min_learning_rate > 0 and self.lr_scheduler_type == "constant_with_warmup":
            raise ValueError(
                f"`min_learning_rate`={self.min_learning_rate} needs `lr_scheduler_type`=cosine or linear, "
                f"not {self.lr_scheduler_type}. Set it to 0, or change the schedule."
            )
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"`warmup_steps`={self.warmup_steps} leaves nothing of `max_steps`={self.max_steps}. "
                f"Try {self.max_steps // 10}."
            )


def resolve_mixed_precision(choice: str, device_type: str) -> str:
    """Turns `auto` into a precision that is fast on this hardware, and refuses one that cannot work.

    Where a CPU has neither AMX nor AVX512-BF16, a bf16 matrix product takes tens of times as long as one in float32.

    Args:
        choice (`str`): `auto`, `no`, `bf16` or `fp16`.
        device_type (`str`): `cpu`, `cuda`, `mps`, ...

    Returns:
        `str`: `no`, `bf16` or `fp16`.

    Raises:
        ValueError: If `fp16` is asked for without a GPU.

    """
    if choice == "fp16" and device_type == "cpu":
        raise ValueError("`mixed_precision`=fp16 needs a GPU, and this run is on the CPU. Use auto, bf16 or no.")
    if choice != "auto":
        return choice
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device_type == "cpu":
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if is_fast else "no"
    return "no"


def _choose_sharded_precision(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keeps in float32, of a sharded run in low precision, what accelerate would round.

    Its policy adds up gradients in the low precision, and rounds the loss and the inputs of `forward`: of timesteps
    bf16 keeps eight bits, so that 999 becomes 1000, one past the last. Models cast inputs to their layers themselves.
    """
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def build_accelerator(recipe: TrainingRecipe) -> Accelerator:
    """Builds the `Accelerator` of a run, and seeds Python, NumPy and torch.

    The number of accumulated micro-batches is the recipe's, whatever the launcher's configuration says. Parameters
    may be without gradient in a step, so that a process whose batch has no images does not block the others. Under
    FSDP2 in low precision the weights are gathered in it; gradients are added up in float32, and inputs not rounded.

    Args:
        recipe (`TrainingRecipe`): The run.

    Returns:
        `Accelerator`: To be closed with `end_training()`.

    """
    set_seed(recipe.seed)
    accelerator = Accelerator(
        mixed_precision=resolve_mixed_precision(recipe.mixed_precision, start_processes().device.type),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.gradient_accumulation_steps,
            adjust_scheduler=False,
            sync_with_dataloader=False,
            # Else each process of a sharded run adds up, in float32, the gradients of all weights.
            sync_each_batch=parse_flag_from_env("ACCELERATE_USE_FSDP"),
        ),
        log_with=[name for name in recipe.report_to if name != "none"] or None,
        project_config=ProjectConfiguration(project_dir=recipe.output_dir, logging_dir=recipe.output_dir),
        # A process whose batch has no images leaves patch layers unused; before its turn a discriminator is, too.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)],
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_fsdp2:
        _choose_sharded_precision(accelerator.state.fsdp_plugin)
    return accelerator


def start_processes() -> PartialState:
    """Joins the processes that a launcher started: on the CPU by `ACCELERATE_USE_CPU`, or where there is nothing else.

    Left to itself accelerate joins processes on a CPU only where it is told to: those of `torchrun` would each take
    itself for the only one, and write into the same folder.

    Returns:
        `PartialState`: of this process. To be ended with `end_processes`, or `end_training` where there are trackers.

    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def end_processes(state: PartialState) -> None:
    """Ends the group of processes, if there are several. To be called by all.

    Gloo's group, when it is freed, waits for its thread and holds the interpreter's lock meanwhile; the thread may
    still want that lock to free what the last barrier left, and then neither goes on. So it gets it before.

    Args:
        state (`PartialState`): Of these processes.
    """
    if state.num_processes > 1:
        time.sleep(0.2)
    state.destroy_process_group()
