"""What training and drawing of Transfusion are timed against: `transfusion-pytorch`, and the matrix products alone.

All models read the same sequences: 32 text tokens, then 64 patches of 12 numbers. One has the peer's trunk (layers,
width, heads, width of the feed-forward layers), one the peer's number of parameters, of which more than half condition
each of its layers on the timestep.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transfusion_pytorch import Transfusion

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration


VOCAB_SIZE = 2048
PROMPT_LENGTH = 32
SIDE = 8  # patches along each side of an image
CHANNELS = 3
PATCH_SIZE = 2
HEAD_DIM = 64
GUIDANCE_SCALE = 3.0


def build_ours(hidden_size: int, num_layers: int, intermediate_size: int) -> TransfusionForConditionalGeneration:
    """Builds our model, with linear patch layers."""
    text_config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_DIM,
        "max_position_embeddings": 512,
    }
    config = TransfusionConfig(
        text_config=text_config, image_size=PATCH_SIZE * SIDE, boi_token_id=3, eoi_token_id=4, image_token_id=5
    )
    return TransfusionForConditionalGeneration(config)


def build_peer(hidden_size: int, num_layers: int) -> Transfusion:
    """Builds the peer as its README does, but for Euler's method: one evaluation of the model a step, as ours."""
    return Transfusion(
        num_text_tokens=VOCAB_SIZE,
        dim_latent=CHANNELS * PATCH_SIZE**2,
        modality_default_shape=(SIDE, SIDE),
        odeint_kwargs={"method": "euler"},
        transformer={"dim": hidden_size, "depth": num_layers, "dim_head": HEAD_DIM, "heads": hidden_size // HEAD_DIM},
    )


def count_parameters(model: nn.Module) -> int:
    """Counts weights."""
    return sum(weight.numel() for weight in model.parameters())


def width_of(num_parameters: int, num_layers: int) -> int:
    """Finds the width at which our model comes nearest to a number of parameters, in whole heads."""
    # 12 squares of the width a layer, with feed-forward layers 8/3 as wide, and two embeddings.
    sizes = {width: num_layers * 12 * width**2 + 2 * VOCAB_SIZE * width for width in range(HEAD_DIM, 4096, HEAD_DIM)}
    return min(sizes, key=lambda width: abs(sizes[width] - num_parameters))


def build_all(hidden_size: int, num_layers: int) -> dict[str, nn.Module]:
    """Builds the peer, ours with its trunk, and ours with its number of parameters."""
    peer = build_peer(hidden_size, num_layers)
    wide = width_of(count_parameters(peer), num_layers)
    return {
        "peer": peer,
        # The peer's gated feed-forward layers are 4 * 2 / 3 as wide as its trunk.
        "same_trunk": build_ours(hidden_size, num_layers, int(hidden_size * 8 / 3)),
        "same_parameters": build_ours(wide, num_layers, round(wide * 8 / 3)),
    }


def record_products(model: nn.Module, run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """Lists the matrix products of a run: rows, inner and outer width of each linear layer, each time it is called."""
    products = []

    def note(layer: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        products.append((output.numel() // layer.out_features, layer.in_features, layer.out_features))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return products


def products_alone(products: list[tuple[int, int, int]], *, backward: bool) -> Callable[[], None]:
    """Makes a function that computes these products, with both of each one's gradients if asked, and nothing else."""
    sizes = set(products)
    rows = {size: torch.randn(size[0], size[1]) for size in sizes}
    weights = {size: torch.randn(size[2], size[1]) for size in sizes}
    gradients = {size: torch.randn(size[0], size[2]) for size in sizes}

    def run() -> None:
        for size in products:
            torch.mm(rows[size], weights[size].T)
            if backward:
                torch.mm(gradients[size], weights[size])
                torch.mm(gradients[size].T, rows[size])

    return run


def take_turns(deeds: Mapping[str, Callable[[], object]], num_repeats: int) -> dict[str, float]:
    """Times deeds in turn, so that a change of the machine's speed meets all alike; medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in deeds}
    for repeat in range(num_repeats + 1):
        for name, deed in deeds.items():
            start = time.perf_counter()
            deed()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    deeds: Mapping[str, Callable[[], object]], models: Mapping[str, nn.Module], repeats: int
) -> dict[str, Any]:
    """Times what each model does, and each `*_floor`, in turn.

    Args:
        deeds (`Mapping[str, Callable]`): By the names of the models, and of their floors.
        models (`Mapping[str, nn.Module]`): Those of `build_all`.
        repeats (`int`): How often each is timed.

    Returns:
        `dict`: medians, how many times faster than the peer, how many times the floor, and what was measured on.
    """
    seconds = take_turns(deeds, repeats)
    ours = [name for name in models if name != "peer"]
    return {
        "milliseconds": {name: round(1000 * value, 2) for name, value in seconds.items()},
        "times_faster_than_peer": {name: round(seconds["peer"] / seconds[name], 3) for name in ours},
        "times_its_floor": {name: round(seconds[name] / seconds[f"{name}_floor"], 3) for name in models},
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "num_repeats": repeats,
        "num_threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}, {platform.processor() or 'unknown processor'}",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }


def common_arguments(description: str) -> argparse.ArgumentParser:
    """Makes a parser of the sizes of the peer and of how it is measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--num_repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    return parser


def tell(result: Mapping[str, Any], output: Path | None) -> None:
    """Prints a result and writes it, if asked to."""
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
