"""What a checkpoint is and needs, read from its configuration and from the headers of its weights, never the weights.

Memory is estimated for the weights, the key-value cache and the activations of one picture, as [`drawing_bytes`] says.
Allocators, libraries and the CUDA context come on top, some hundreds of MB on a GPU.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoConfig, PreTrainedConfig


FAMILIES = {"cm3leon": "CM3Leon", "transfusion": "Transfusion"}
# The first prefix that fits names the part of a weight.
PARTS = {
    "lm_head.": "embeddings",
    "model.embed_": "embeddings",
    "model.language_model.embed_tokens.": "embeddings",
    "model.layers.": "transformer",
    "model.norm.": "transformer",
    "model.language_model.": "transformer",
    "model.patch_": "patch layers",
    "model.image_tokenizer.": "image tokenizer",
    "model.vae.": "image tokenizer",
}
PROMPT_TOKENS = 64
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
TASKS = "tasks.md"


def describe_checkpoint(name: str) -> dict[str, Any]:
    """Describes a checkpoint of either family, without its weights.

    Args:
        name (`str`): Folder or Hub id.

    Returns:
        `dict`: `family`, `parameters` (by part, and their total), `tuned_for` (tasks, with the scores that the folder
        tells), `pictures` (pixels and positions), `vocabulary`, `context` (positions), and `memory`: for each dtype
        the bytes to load it and to draw one picture.

    Raises:
        ValueError: If it is of another family, has no weights in safetensors, or is an adapter alone.
        OSError: If there is no such checkpoint, or the Hub cannot be reached.
    """
    try:
        metadata = get_local_safetensors_metadata(name) if Path(name).is_dir() else get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        if adapter := read_text(name, "adapter_config.json"):
            base = json.loads(adapter)["base_model_name_or_path"]
            raise ValueError(f"{name} is an adapter alone, on top of {base}. Ask for that.") from None
        raise ValueError(f"{name} has no weights in safetensors files: no model.safetensors nor its index.") from None
    except (SafetensorsParsingError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} has a damaged file of weights: {error}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{name} lacks a file of weights that its index names: {error}") from error
    config = read_config(name)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} is a {config.model_type}; described are {' and '.join(FAMILIES.values())}.")
    tensors = [tensor for file in metadata.files_metadata.values() for tensor in file.tensors.items()]
    parameters = count_parameters({key: tensor.parameter_count for key, tensor in tensors})
    total = sum(parameters.values())
    text = config.get_text_config()
    return {
        "name": name,
        "family": name_family(config),
        "dtypes": sorted({tensor.dtype for _, tensor in tensors}),
        "parameters": {"total": total, **parameters},
        "tuned_for": read_tasks(read_text(name, TASKS) or ""),
        "pictures": {"size": config.image_size, "positions": positions_per_image(config)},
        "vocabulary": describe_vocabulary(config),
        "context": text.max_position_embeddings,
        "memory": {
            dtype: {"load": total * width, "draw": total * width + drawing_bytes(config, width)}
            for dtype, width in DTYPE_BYTES.items()
        },
    }


def name_family(config: PreTrainedConfig) -> str:
    """Names what kind of model a configuration is of, as a paper does."""
    return "Chameleon" if getattr(config, "decoder_block", None) == "chameleon" else FAMILIES[config.model_type]


def read_config(name: str) -> PreTrainedConfig:
    """Reads the configuration of a checkpoint; refuses one that is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{name} has a damaged config.json ({type(error).__name__}: {error}).") from error


def read_text(name: str, file: str) -> str | None:
    """Reads a small file of a folder or a Hub repo; None where it has none."""
    try:
        path = Path(name) / file if Path(name).is_dir() else Path(hf_hub_download(name, file))
        return path.read_text(encoding="utf-8")
    except (EntryNotFoundError, FileNotFoundError):
        return None


def count_parameters(tensors: Mapping[str, int]) -> dict[str, int]:
    """Adds up the entries of weights by part.

    Args:
        tensors (`Mapping[str, int]`): Entries of each weight.

    Returns:
        `dict[str, int]`: of each part that there is.

    Example:
        >>> count_parameters({"lm_head.weight": 6, "model.embed_tokens.weight": 6, "model.layers.0.mlp.weight": 8})
        {'embeddings': 12, 'transformer': 8}

    """
    parts: dict[str, int] = {}
    for name, count in tensors.items():
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "other")
        parts[part] = parts.get(part, 0) + count
    return parts


def read_tasks(table: str) -> list[dict[str, Any]]:
    r"""Reads the tasks that a model was tuned for from the table that recipes/sft.py writes, with its last scores.

    Args:
        table (`str`): Rows `| task@dataset | score | step 0 | ... |`, or nothing.

    Returns:
        `list[dict]`: of each source its `task`, `dataset` and `scores`, shares from 0 to 1.

    Example:
        >>> read_tasks("| source | score | step 0 | step 9 |\n|---|---|---|---|\n| edit@a | ok | 3.1% | 50.0% |")
        [{'task': 'edit', 'dataset': 'a', 'scores': {'ok': 0.5}}]

    """
    sources: dict[str, dict[str, Any]] = {}
    for line in table.splitlines()[2:]:
        source, score, *steps = (cell.strip() for cell in line.strip().strip("|").split("|"))
        task, _, dataset = source.partition("@")
        entry = sources.setdefault(source, {"task": task, "dataset": dataset, "scores": {}})
        if steps and steps[-1].endswith("%"):
            entry["scores"][score] = round(float(steps[-1].rstrip("%")) / 100, 4)
    return list(sources.values())


def positions_per_image(config: PreTrainedConfig) -> int:
    """Positions of the transformer that one picture takes: its codes, or its patches."""
    if config.model_type == "cm3leon":
        return config.tokens_per_image
    return (config.image_size // config.image_stride) ** 2


def describe_vocabulary(config: PreTrainedConfig) -> dict[str, int]:
    """Sizes of the vocabulary: all of it, and of CM3Leon the codes and sentinels in it."""
    if config.model_type == "transfusion":
        return {"total": config.text_config.vocab_size}
    return {
        "total": config.vocab_size,
        "codes": config.image_vocab_size,
        "sentinels": config.num_sentinel_tokens,
    }


def drawing_bytes(config: PreTrainedConfig, width: int) -> int:
    """Estimates what drawing one picture behind a prompt of 64 tokens takes beside the weights.

    With S streams (2 where the model's guidance is above 1), L layers, H key-value width and T positions:

    - key-value cache: 2 L H T S entries; T is the prompt, the picture and what stands around it;
    - beside it, the more of two moments: reading the prompt, S x 64 positions of 8 hidden states and 2 feed-forward
      states each, and S scores of the vocabulary in 32 bits; or drawing, the same for a code, or for a picture's
      patches, whose U-Net keeps each level's maps;
    - or, when the cache is gone and if it is more, decoding: 3 maps of the image tokenizer's second level of channels
      at full size.

    Attention is taken to be computed in blocks, without a matrix of T x T. Counted tensor by tensor, drawings of three
    small models took 0.99 to 1.14 times as much.

    Args:
        config (`PreTrainedConfig`): Of the model.
        width (`int`): Bytes of an entry.

    Returns:
        `int`: bytes.
    """
    text = config.get_text_config()
    streams = 2 if config.drawing_guidance_scale > 1 else 1
    picture = positions_per_image(config)
    is_codes = config.model_type == "cm3leon"
    kv_heads = text.num_attention_heads if is_codes else text.num_key_value_heads
    kv_width = text.hidden_size // text.num_attention_heads * kv_heads
    length = min(PROMPT_TOKENS + picture + 3, text.max_position_embeddings)
    cache = 2 * text.num_hidden_layers * kv_width * length * streams * width
    per_position = (8 * text.hidden_size + 2 * text.intermediate_size) * width
    reading = streams * (PROMPT_TOKENS * per_position + 4 * text.vocab_size)
    drawing = streams * (1 if is_codes else picture) * per_position + _unet_bytes(config, streams, width)
    return max(cache + max(reading, drawing), _decoding_bytes(config, width))


def _unet_bytes(config: PreTrainedConfig, streams: int, width: int) -> int:
    """Maps of the U-Net patch layers, where there are some."""
    if config.model_type == "cm3leon" or config.patch_layer != "unet":
        return 0
    side = config.image_size // config.vae_stride
    maps = config.unet_layers_per_block + 2
    levels = enumerate(config.unet_block_out_channels)
    return sum(streams * maps * (side // 2**level) ** 2 * channels * width for level, channels in levels)


def _decoding_bytes(config: PreTrainedConfig, width: int) -> int:
    """Maps of the image tokenizer's decoder at full size; a picture of raw pixels needs itself only."""
    tokenizer = config.vq_config if config.model_type == "cm3leon" else config.vae_config
    channels = 3 if tokenizer is None else max(tokenizer["block_out_channels"][:2])
    return 3 * config.image_size**2 * channels * width


def spell_checkpoint(facts: Mapping[str, Any]) -> str:
    """Spells what [`describe_checkpoint`] found for a terminal.

    Args:
        facts (`Mapping`): From there.

    Returns:
        `str`: some lines.
    """
    parameters = dict(facts["parameters"])
    total = parameters.pop("total")
    parts = ", ".join(f"{part} {spell_count(count)}" for part, count in parameters.items())
    tasks = [_spell_task(task) for task in facts["tuned_for"]]
    vocabulary = dict(facts["vocabulary"])
    kinds = "".join(f", {count} of them {kind}" for kind, count in vocabulary.items() if kind != "total")
    size = facts["pictures"]["size"]
    lines = {
        "model": f"{facts['name']}: {facts['family']}, weights in {', '.join(facts['dtypes'])}",
        "parameters": f"{spell_count(total)}: {parts}",
        "tuned for": ", ".join(tasks) or f"nothing that the folder tells of (it has no {TASKS}): draws and captions",
        "pictures": f"{size} x {size} px, {facts['pictures']['positions']} positions",
        "context": f"{facts['context']} positions",
        "vocabulary": f"{vocabulary['total']}{kinds}",
    }
    memory = {
        f"in {dtype}": f"{spell_bytes(need['load'])} to load, {spell_bytes(need['draw'])} to draw a picture"
        for dtype, need in facts["memory"].items()
    }
    return "\n".join(f"{label:<12}{text}" for label, text in (lines | memory).items())


def _spell_task(task: Mapping[str, Any]) -> str:
    score = next(iter(task["scores"].values()), None)
    return task["task"] if score is None else f"{task['task']} {score:.1%}"


def spell_count(count: int) -> str:
    """Spells a number of parameters: 6.84B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def spell_bytes(count: int) -> str:
    """Spells a number of bytes: 2.97 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"
