"""What training and drawing of Transfusion are timed against: `transfusion-pytorch`, and a DiT of diffusers.

All models read the same sequences: 32 text tokens, then 64 patches of 12 numbers. One of ours has the peer's trunk
(layers, width, heads, width of the feed-forward layers), one the peer's number of parameters, of which more than half
condition each of its layers on the timestep. The DiT has that number too, and a class in the place of a text.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration
from timing import DTYPES, Clock, benchmark_parser, count_parameters, judge


VOCAB_SIZE = 2048
PROMPT_LENGTH = 32
SIDE = 8  # patches along each side of an image
CHANNELS = 3
PATCH_SIZE = 2
HEAD_DIM = 64
GUIDANCE_SCALE = 3.0
NUM_CLASSES = 1000  # of ImageNet, which the DiT was made for; one more class is for no class
OURS = ("same_trunk", "same_parameters")


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


def build_peer(hidden_size: int, num_layers: int) -> nn.Module:
    """Builds the peer as its README does, but for Euler's method: one evaluation of the model a step, as ours."""
    from transfusion_pytorch import Transfusion  # here, so that `--help` does without

    return Transfusion(
        num_text_tokens=VOCAB_SIZE,
        dim_latent=CHANNELS * PATCH_SIZE**2,
        modality_default_shape=(SIDE, SIDE),
        odeint_kwargs={"method": "euler"},
        transformer={"dim": hidden_size, "depth": num_layers, "dim_head": HEAD_DIM, "heads": hidden_size // HEAD_DIM},
    )


def build_dit(hidden_size: int, num_layers: int) -> DiTTransformer2DModel:
    """Builds a DiT that draws pictures of the same patches."""
    return DiTTransformer2DModel(
        num_attention_heads=hidden_size // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        num_layers=num_layers,
        sample_size=PATCH_SIZE * SIDE,
        patch_size=PATCH_SIZE,
        num_embeds_ada_norm=NUM_CLASSES,
    )


def nearest_width(build: Callable[[int], nn.Module], num_parameters: int) -> int:
    """Finds the width, in whole heads, at which a model comes nearest to a number of parameters."""

    def distance(width: int) -> int:
        with torch.device("meta"):
            return abs(count_parameters(build(width)) - num_parameters)

    width = HEAD_DIM
    while distance(width + HEAD_DIM) < distance(width):
        width += HEAD_DIM
    return width


def build_all(hidden_size: int, num_layers: int) -> dict[str, nn.Module]:
    """Builds the peer, ours with its trunk, and ours with its number of parameters."""
    peer = build_peer(hidden_size, num_layers)
    wide = nearest_width(
        lambda width: build_ours(width, num_layers, round(width * 8 / 3)), num_parameters=count_parameters(peer)
    )
    return {
        "peer": peer,
        # The peer's gated feed-forward layers are 4 * 2 / 3 as wide as its trunk.
        "same_trunk": build_ours(hidden_size, num_layers, int(hidden_size * 8 / 3)),
        "same_parameters": build_ours(wide, num_layers, round(wide * 8 / 3)),
    }


def summarise(clock: Clock, targets: dict[str, float]) -> dict[str, Any]:
    """Sets ours beside the peer, and each model beside its floor, with the targets.

    Args:
        clock (`Clock`): Of deeds by the names of the models, and of their floors, such as `"peer_floor"`; of ours with
            the least they can do too, such as `"same_trunk_least"`.
        targets (`dict[str, float]`): `same_trunk` and `same_parameters`, how many times faster than the peer at
            least, and `over_floor`, how many times the floor at most.
    """
    models = [name for name in clock if f"{name}_floor" in clock]
    return {
        "milliseconds": clock.milliseconds(),
        "times_faster_than_peer": {name: judge(clock.ratio("peer", name), at_least=targets[name]) for name in OURS},
        "times_its_floor": {
            name: judge(ratio, at_most=targets["over_floor"]) if name in OURS else ratio
            for name, ratio in ((name, clock.ratio(name, f"{name}_floor")) for name in models)
        },
        "least_times_its_floor": {name: clock.ratio(f"{name}_least", f"{name}_floor") for name in OURS},
    }


def common_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser of the sizes of the peer and of how it is measured."""
    parser = benchmark_parser(description)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16: autocast; in drawing the peer's alone."
    )
    parser.add_argument(
        "--torch_compile", action="store_true", help="Compiles ours; peers and floors stay as they are."
    )
    parser.add_argument("--profile", action="store_true", help="Shows where the time of ours goes.")
    return parser
