"""What a training run takes, before it is run: memory of each GPU, FLOPs, days, data, checkpoints and failures.

Parameters are those of the real model on the meta device, activations and FLOPs are counted while that model runs a
step there (`meta_step.py`). The rest is arithmetic on them, all of it here.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checkpoint_info import FAMILIES, count_parameters, name_family, positions_per_image, spell_bytes, spell_count
from .meta_step import IMAGE_SHARE, build_meta_model, measure_activations, measure_flops
from .recipe_launch import find_beside


# Share of a GPU's memory that tensors may take: the rest is for the CUDA context, NCCL and gaps between tensors. Ours.
USABLE_MEMORY = 0.9
# GPU hours between failures of a GPU, its host or its network: 419 in 54 days of 16,384 GPUs. Source: Llama 3 (arXiv
# 2407.21783), section 3.3.4.
FAILURE_GPU_HOURS = 16_384 * 54 * 24 / 419
RESTART_MINUTES = 10.0  # from a failure until steps are taken again: ours
TEXT_BYTES_PER_TOKEN = 4.0  # of English text in a vocabulary of 32,000: ours
CAPTION_TOKENS = 16  # and delimiters, beside the codes of a picture: ours
CODE_BYTES = 4  # as recipes/encode_images.py stores them
LATENT_BYTES = 2 * 2  # mean and standard deviation in float16, likewise

Sharding = Literal["fsdp2", "ddp"]
MixedPrecision = Literal["bf16", "fp16", "no"]


@dataclass
class PlanArguments:
    """The hardware of a run and how it is laid out on it.

    Args:
        num_gpus (`int`, defaults to 8): Data-parallel processes, one to a GPU.
        micro_batch_size (`int`, defaults to 1): Windows in one forward pass on one GPU.
        window_length (`int`, *optional*): Tokens of a window. Defaults to the recipe's, else the model's positions.
        mixed_precision (`str`, *optional*): `"bf16"`, `"fp16"` or `"no"`. Defaults to the recipe's, else bf16.
        gradient_checkpointing (`bool`, *optional*): Defaults to the recipe's, else off.
        sharding (`str`, defaults to `"fsdp2"`): `"fsdp2"`, or `"ddp"` for whole weights on every GPU.
        tokens_per_step (`int`, *optional*): Of all GPUs. Defaults to one micro-batch of each.
        token_budget (`float`, *optional*): Tokens and patches of the whole run.
        utilisation (`float`, defaults to 0.5): Share of the peak at which the counted FLOPs are done.
        peak_tflops (`float`, defaults to 989): Of a GPU. 989 is an H100 SXM in bf16, without sparsity.
        gpu_memory_gib (`float`, defaults to 80): Of a GPU.
        storage_gb_per_second (`float`, defaults to 10): At which a checkpoint is written by all GPUs together.

    Raises:
        ValueError: If a value is out of range.
    """

    num_gpus: int = 8
    micro_batch_size: int = 1
    window_length: int | None = None
    mixed_precision: MixedPrecision | None = None
    gradient_checkpointing: bool | None = None
    sharding: Sharding = "fsdp2"
    tokens_per_step: int | None = None
    token_budget: float | None = None
    utilisation: float = 0.5
    peak_tflops: float = 989.0
    gpu_memory_gib: float = 80.0
    storage_gb_per_second: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values that no run can have."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise ValueError(f"`{item.name}`={value} must be a number above 0.")
        if self.utilisation > 1:
            raise ValueError(f"`utilisation`={self.utilisation} is a share of the peak: at most 1.")
        for name, choices in (("sharding", Sharding), ("mixed_precision", MixedPrecision)):
            if (value := getattr(self, name)) is not None and value not in get_args(choices):
                raise ValueError(f"`{name}`={value!r} must be one of {', '.join(get_args(choices))}.")


@dataclass
class PlannedModel:
    """What is to be trained, and what its recipe says of how.

    Args:
        name (`str`): File, folder or Hub id.
        config (`PreTrainedConfig`): Of the model.
        recipe (`dict`): Fields of the recipe; empty where it was no recipe.
    """

    name: str
    config: PreTrainedConfig
    recipe: dict[str, Any] = field(default_factory=dict)


def open_plan(name: str) -> PlannedModel:
    """Opens what a plan is asked for.

    Args:
        name (`str`): A recipe (`.yaml`), a model's configuration (`.json`), or a folder or Hub id of a checkpoint.

    Returns:
        [`PlannedModel`]

    Raises:
        ValueError: If there is no such file, a recipe names no model, or it is of another family.
        OSError: If there is no such folder or Hub repo.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") and not Path(name).is_file():
        raise ValueError(f"{name} is no file here. Give a recipe, a model's JSON file, or a checkpoint.")
    if Path(name).suffix in (".yaml", ".yml"):
        recipe = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"{name} holds a {type(recipe).__name__}. A recipe is flat YAML of `field: value` lines.")
        return PlannedModel(name, _load_recipe_config(Path(name), recipe), recipe)
    if Path(name).suffix == ".json":
        config = _build_config(json.loads(Path(name).read_text(encoding="utf-8")), name)
    else:
        config = AutoConfig.from_pretrained(name)
    return PlannedModel(name, _check_family(config, name))


def _load_recipe_config(path: Path, recipe: Mapping[str, Any]) -> PreTrainedConfig:
    """Finds the model of a recipe, as `recipes/building.py` does; an image tokenizer that is not here yet is left."""
    if (checkpoint := recipe.get("model_name_or_path")) is not None:
        config = AutoConfig.from_pretrained(checkpoint)
    elif (file := recipe.get("config_name")) is not None:
        found = find_beside(path, file)
        if found is None:
            raise ValueError(f"{path}: `config_name`={file} is not here, nor beside the recipe.")
        config = _build_config(json.loads(found.read_text(encoding="utf-8")), str(found))
    elif (preset := recipe.get("preset")) is not None:
        config = CONFIG_MAPPING[recipe.get("model_type", "transfusion")].from_preset(preset)
    else:
        raise ValueError(f"{path} names no model: none of `model_name_or_path`, `config_name` and `preset`.")
    if overrides := recipe.get("config_overrides"):
        config.update_from_string(overrides)
    tokenizer = recipe.get("image_tokenizer_name")
    if tokenizer is not None and Path(tokenizer).is_dir():
        config.set_image_tokenizer(tokenizer)
    elif tokenizer is not None and _image_tokenizer_config(config) is None:
        raise ValueError(
            f"{path}: `image_tokenizer_name`={tokenizer} is not here, and the model's file says nothing of it. Plan "
            "with a file of recipes/configs/models/ that does."
        )
    return _check_family(config, str(path))


def _build_config(content: Any, name: str) -> PreTrainedConfig:
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in FAMILIES:
        raise ValueError(f"{name}: `model_type`={model_type!r} must be one of {', '.join(FAMILIES)}.")
    return CONFIG_MAPPING[model_type].from_dict(content)


def _check_family(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} is a {config.model_type}; planned are {' and '.join(FAMILIES.values())}.")
    return config


def _image_tokenizer_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    return config.vq_config if config.model_type == "cm3leon" else config.vae_config


def fill_arguments(arguments: PlanArguments, planned: PlannedModel) -> PlanArguments:
    """Fills what was left out from the recipe, then from the model.

    Args:
        arguments ([`PlanArguments`]): As asked for.
        planned ([`PlannedModel`]): From [`open_plan`].

    Returns:
        [`PlanArguments`]: without None, but for a token budget that nobody gave.

    Raises:
        ValueError: If a window is longer than the model has positions.
    """
    recipe, longest = planned.recipe, planned.config.get_text_config().max_position_embeddings
    chosen = {"window_length": longest, "mixed_precision": "bf16", "gradient_checkpointing": False}
    for name in chosen:
        given = getattr(arguments, name)
        told = recipe.get(name) if recipe.get(name) != "auto" else None
        chosen[name] = given if given is not None else told if told is not None else chosen[name]
    if chosen["window_length"] > longest:
        raise ValueError(f"`window_length`={chosen['window_length']}: the model has {longest} positions. Lower it.")
    filled = replace(arguments, **chosen)
    at_once = filled.num_gpus * filled.micro_batch_size * chosen["window_length"]
    return replace(filled, tokens_per_step=filled.tokens_per_step or at_once)


def plan_training(
    planned: PlannedModel, arguments: PlanArguments, count_flops: Callable[[Callable[[], Any]], int]
) -> dict[str, Any]:
    """Works out what a run takes.

    Args:
        planned ([`PlannedModel`]): From [`open_plan`].
        arguments ([`PlanArguments`]): Hardware and layout.
        count_flops (`Callable`): Counts the FLOPs of a call: [`hf_mm.evaluation.scaling.count_flops`].

    Returns:
        `dict`: `name`, `family`, `parameters`, `layout`, `memory` (bytes of one GPU, by part), `flops_per_token`,
        `step`, `checkpoint`, and with a token budget `run`, `data` and `failures`.

    Raises:
        ValueError: If the window does not fit the model.
    """
    args, config = fill_arguments(arguments, planned), planned.config
    model = build_meta_model(config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    flops = measure_flops(model, int(args.window_length or 0), count_flops) / int(args.window_length or 1)
    has_ema = planned.recipe.get("ema_decay") is not None
    state = trained * (4 + 8 + 4 * has_ema) + (total - trained) * 4
    gpu_tokens_per_second = args.utilisation * args.peak_tflops * 1e12 / flops
    plan: dict[str, Any] = {
        "name": planned.name,
        "family": name_family(config),
        "parameters": {
            "total": total,
            "trained": trained,
            **count_parameters({name: weight.numel() for name, weight in model.named_parameters()}),
        },
        "flops_per_token": {"six_n": 6 * trained, "counted": round(flops)},
        "memory": _plan_memory(model, args, trained, total, has_ema),
    }
    at_once = args.num_gpus * args.micro_batch_size * int(args.window_length or 0)
    accumulation = math.ceil(int(args.tokens_per_step or 0) / at_once)
    tokens = accumulation * at_once
    plan["layout"] = vars(args) | {"gradient_accumulation_steps": accumulation, "has_ema": has_ema}
    plan["step"] = {"tokens": tokens, "seconds": tokens / args.num_gpus / gpu_tokens_per_second}
    plan["step"]["tokens_per_second_per_gpu"] = gpu_tokens_per_second
    plan["checkpoint"] = {"bytes": state, "save_seconds": state / args.storage_gb_per_second / 1e9}
    if args.token_budget is not None:
        plan |= _plan_run(config, args, args.token_budget, flops, plan["step"], plan["checkpoint"]["save_seconds"])
    return plan


def _plan_memory(model: Any, args: PlanArguments, trained: int, total: int, has_ema: bool) -> dict[str, Any]:
    """Adds up the bytes of one GPU: what lies there all the time, and what a forward and backward pass adds.

    Weights, gradients and both moments are float32, an average of the weights too. FSDP2 gathers, in the precision of
    computing: the layer at work and the next one, the buffer that these arrive in, all that is in no layer, and the
    gradients of a layer and of the last group; and in float32 the buffer that gradients leave by.
    """
    shards = args.num_gpus if args.sharding == "fsdp2" else 1
    memory = {"weights": total * 4 // shards, "gradients": trained * 4 // shards, "optimizer": trained * 8 // shards}
    if has_ema:
        memory["average"] = trained * 4 // shards
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision or "no"]
    if args.sharding == "fsdp2":
        width = 4 if dtype is None else 2
        layers = [part for part in model.modules() if type(part).__name__ in type(model)._no_split_modules]
        sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        outside = total - sum(sizes)
        memory["gathered"] = width * (4 * max(sizes) + 2 * outside) + 4 * max(sizes)
        model = model if dtype is None else model.to(dtype)

    def measure(num_windows: int) -> int:
        return measure_activations(
            model,
            num_windows,
            int(args.window_length or 0),
            autocast_dtype=dtype,
            gradient_checkpointing=bool(args.gradient_checkpointing),
        )

    fixed = sum(memory.values())
    memory["activations"] = measure(args.micro_batch_size)
    one, two = measure(1), measure(2)
    room = args.gpu_memory_gib * 2**30 * USABLE_MEMORY
    largest = math.floor((room - fixed - one) / (two - one)) + 1 if room >= fixed + one else 0
    peak = sum(memory.values())
    return {**memory, "total": peak, "fits": peak <= room, "largest_micro_batch_size": largest}


def _plan_run(
    config: PreTrainedConfig,
    args: PlanArguments,
    tokens: float,
    flops: float,
    step: Mapping[str, float],
    save_seconds: float,
) -> dict[str, Any]:
    """Works out days, data and failures of a token budget.

    Checkpoints come as often as loses the least, every `sqrt(2 * save * time between failures)`. Source: Young, A
    first order approximation to the optimum checkpoint interval, 1974.
    """
    seconds = tokens / step["tokens_per_second_per_gpu"] / args.num_gpus
    mean_seconds = FAILURE_GPU_HOURS * 3600 / args.num_gpus
    interval = math.sqrt(2 * save_seconds * mean_seconds)
    lost = interval / 2 + RESTART_MINUTES * 60
    overhead = save_seconds / interval + lost / mean_seconds
    positions = positions_per_image(config)
    is_codes = config.model_type == "cm3leon"
    share = positions / (positions + CAPTION_TOKENS) if is_codes else IMAGE_SHARE
    images = tokens * share / positions
    bytes_per_image = positions * CODE_BYTES
    if not is_codes:
        bytes_per_image = config.latent_channels * (config.image_size // config.vae_stride) ** 2 * LATENT_BYTES
    text_bytes = tokens * (1 - share) * TEXT_BYTES_PER_TOKEN
    return {
        "run": {
            "tokens": tokens,
            "steps": math.ceil(tokens / step["tokens"]),
            "flops": flops * tokens,
            "days": seconds / 86_400,
            "days_with_failures": seconds * (1 + overhead) / 86_400,
            "gpu_hours": seconds * args.num_gpus / 3600,
        },
        "data": {
            "images": images,
            "bytes_per_image": bytes_per_image,
            "image_bytes": images * bytes_per_image,
            "text_bytes": text_bytes,
            "read_bytes_per_second": (images * bytes_per_image + text_bytes) / seconds,
        },
        "failures": {
            "expected": seconds / mean_seconds,
            "hours_between": mean_seconds / 3600,
            "save_interval_minutes": interval / 60,
            "save_steps": max(1, round(interval / step["seconds"])),
            "minutes_lost_per_failure": lost / 60,
            "overhead": overhead,
        },
    }


def spell_plan(plan: Mapping[str, Any]) -> str:
    """Spells a plan for a terminal.

    Args:
        plan (`Mapping`): From [`plan_training`].

    Returns:
        `str`: some lines.
    """
    parameters, memory, layout, step = (plan[name] for name in ("parameters", "memory", "layout", "step"))
    parts = [name for name in memory if name not in ("total", "fits", "largest_micro_batch_size")]
    flops, saved = plan["flops_per_token"], plan["checkpoint"]
    recomputes = "layers computed again" if layout["gradient_checkpointing"] else "activations kept"
    fits = f"fits; at most {memory['largest_micro_batch_size']} windows at once" if memory["fits"] else "DOES NOT FIT"
    lines = {
        "model": f"{plan['name']}: {plan['family']}, {spell_count(parameters['total'])} parameters, "
        f"{spell_count(parameters['trained'])} of them trained",
        "layout": f"{layout['num_gpus']} GPUs, {layout['sharding']}, {layout['mixed_precision']}, {recomputes}; "
        f"{layout['micro_batch_size']} x {layout['window_length']} tokens at once, "
        f"{layout['gradient_accumulation_steps']} times a step",
        "memory": ", ".join(f"{name} {spell_bytes(memory[name])}" for name in parts),
        "": f"{spell_bytes(memory['total'])} of {layout['gpu_memory_gib']:g} GiB on each GPU: {fits}",
        "FLOPs": f"{flops['counted'] / 1e9:.3g}G a token counted, {flops['six_n'] / 1e9:.3g}G by 6ND",
        "step": f"{step['tokens']:,} tokens in {step['seconds']:.3g} s at {layout['utilisation']:.0%} of "
        f"{layout['peak_tflops']:g} TFLOP/s: {step['tokens_per_second_per_gpu']:,.0f} tokens/s on each GPU",
        "checkpoint": f"{spell_bytes(saved['bytes'])}, {saved['save_seconds']:.3g} s to write",
    }
    if "run" in plan:
        lines |= _spell_run(plan["run"], plan["data"], plan["failures"])
    return "\n".join(f"{label:<12}{text}" for label, text in lines.items())


def _spell_run(run: Mapping[str, float], data: Mapping[str, float], failures: Mapping[str, float]) -> dict[str, str]:
    return {
        "run": f"{run['tokens']:.3g} tokens, {run['steps']:,} steps, {run['flops']:.3g} FLOPs: "
        f"{run['days']:.3g} days, {run['gpu_hours']:,.0f} GPU hours; with failures "
        f"{run['days_with_failures']:.3g} days",
        "data": f"{data['images']:.3g} pictures seen, {data['bytes_per_image']:,} bytes each, "
        f"{data['image_bytes'] / 1e12:.3g} TB; text {data['text_bytes'] / 1e12:.3g} TB; "
        f"{data['read_bytes_per_second'] / 1e6:.3g} MB/s",
        "failures": f"{failures['expected']:.3g}, one in {failures['hours_between']:.3g} hours; a checkpoint every "
        f"{failures['save_interval_minutes']:.3g} minutes ({failures['save_steps']:,} steps), "
        f"{failures['minutes_lost_per_failure']:.3g} minutes lost to each, {failures['overhead']:.1%} of the time",
    }
