"""Times captions of pictures against transformers' Janus and Chameleon with decoders of the same size.

python benchmarks/captioning.py --output captioning.json

Each model reads a picture of 144 image tokens and writes 32 tokens, the likeliest each time, as its users call it,
from the pixels on; Janus and Transfusion take the picture as vectors, CM3Leon and Chameleon as codes. The floor of
each is the products of its linear layers alone: those of the picture, then all weights read once for each token.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from code_peers import (
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE,
    JANUS_STRIDE,
    PATCH_SIZE,
    SIDE,
    VQ_STRIDE,
    build_chameleon,
    build_cm3leon,
    build_janus,
    build_transfusion,
    decoder_layers,
)
from timing import (
    Clock,
    benchmark_parser,
    count_parameters,
    describe,
    products_alone,
    profile,
    record_products,
    take_turns,
    tell,
)


NUM_IMAGE_TOKENS = SIDE**2
MAX_POSITIONS = 512
BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "transfusion": build_transfusion,
    "cm3leon": build_cm3leon,
    "janus": build_janus,
    "chameleon": build_chameleon,
}
PIXELS_PER_TOKEN = {"transfusion": PATCH_SIZE, "cm3leon": VQ_STRIDE, "janus": JANUS_STRIDE, "chameleon": VQ_STRIDE}
OURS = ("transfusion", "cm3leon")


def build_prompts(name: str, model: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Lays out a picture for each row as its family does."""
    around = {
        "transfusion": ([BOS, BOI], [EOI]),
        "cm3leon": ([EOS], [model.config.break_token_id]) if name == "cm3leon" else ([], []),
        "janus": ([BOS, BOI], [EOI]),
        "chameleon": ([BOS, BOI], [EOI]),
    }
    before, behind = around[name]
    image_id = model.config.image_token_id if name == "cm3leon" else IMAGE
    row = torch.tensor([*before, *[image_id] * NUM_IMAGE_TOKENS, *behind])
    rows = row.expand(batch_size, -1).contiguous()
    side = SIDE * PIXELS_PER_TOKEN[name]
    pixels = torch.rand(batch_size, 3, side, side) * 2 - 1
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels}


def write_captions(name: str, model: nn.Module, inputs: dict[str, torch.Tensor], num_tokens: int) -> None:
    """Writes a caption for each row."""
    mode = {"cm3leon": {"generation_mode": "text"}, "janus": {"generation_mode": "text"}}.get(name, {})
    sequences = model.generate(
        **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, use_cache=True, **mode
    )
    if (written := sequences.shape[1] - inputs["input_ids"].shape[1]) != num_tokens:
        raise RuntimeError(f"{name} wrote {written} tokens instead of {num_tokens}.")


def summarise(clock: Clock) -> dict[str, Any]:
    """Sets ours beside the peers, and each model beside its floor."""
    peers = [name for name in BUILDERS if name not in OURS]
    return {
        "milliseconds": clock.milliseconds(),
        "times_faster_than": {name: {peer: clock.ratio(peer, name) for peer in peers} for name in OURS},
        "times_its_floor": {name: clock.ratio(name, f"{name}_floor") for name in BUILDERS},
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times each model and each floor in turn and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    sizes = arguments.hidden_size, arguments.num_layers, MAX_POSITIONS
    models = {name: build(*sizes).eval() for name, build in BUILDERS.items()}
    result["decoder_parameters"] = {name: count_parameters(decoder_layers(model)) for name, model in models.items()}
    for batch_size in arguments.batch_sizes:
        deeds: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            inputs = build_prompts(name, model, batch_size)
            deeds[name] = partial(write_captions, name, model, inputs, arguments.num_tokens)
            deeds[f"{name}_floor"] = products_alone(record_products(model, deeds[name]))
        clocks = take_turns(deeds, arguments.num_repeats)
        result[f"batch_of_{batch_size}"] = found = {name: summarise(clock) for name, clock in clocks.items()}
        if arguments.profile:
            found["profile"] = {name: profile(deeds[name]) for name in OURS}
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_repeats=5)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num_tokens", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="Shows where the time of ours goes.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
