"""Times guided drawing of Transfusion against `transfusion-pytorch` and against its own matrix products alone.

pip install transfusion-pytorch==0.20.0
python benchmarks/guided_sampling.py --output guided_sampling.json

Both draw one image of 64 patches for each of 4 prompts of 32 tokens, with guidance, in 10 steps of one evaluation each
(Euler's method for the peer), all prompts in one batch. The floor is every linear layer's product, without attention.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial


os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # the peer tells of each sample

import torch
from torch import nn

from transfusion_peers import (
    GUIDANCE_SCALE,
    PROMPT_LENGTH,
    SIDE,
    VOCAB_SIZE,
    build_all,
    common_arguments,
    compare,
    products_alone,
    record_products,
    tell,
)


TARGETS = {"same_trunk": 4.0, "same_parameters": 1.5, "over_floor": 1.35}


def draw_ours(model: nn.Module, prompts: torch.Tensor, num_steps: int) -> None:
    """Draws an image for each prompt."""
    model.draw_images(prompts, num_inference_steps=num_steps, guidance_scale=GUIDANCE_SCALE)


def draw_peer(model: nn.Module, prompts: torch.Tensor, num_steps: int) -> None:
    """The same with the peer; its steps lie between the points it is given, and a length below an image ends it."""
    model.sample_many(
        list(prompts),
        force_modality_at_start=(0, (SIDE, SIDE)),
        modality_steps=num_steps + 1,
        cfg_scale=GUIDANCE_SCALE,
        max_length=SIDE * SIDE - 1,
    )


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Times each model and each floor in turn and returns what was found, and on what."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    models = build_all(arguments.hidden_size, arguments.num_layers)
    prompts = torch.randint(6, VOCAB_SIZE, (arguments.batch_size, PROMPT_LENGTH))
    deeds: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        draw = draw_peer if name == "peer" else draw_ours
        deeds[name] = partial(draw, model.eval(), prompts, arguments.num_inference_steps)
        deeds[f"{name}_floor"] = products_alone(record_products(model, deeds[name]), backward=False)
    result = compare(deeds, models, arguments.num_repeats)
    return result | {"targets": TARGETS, "batch_size": arguments.batch_size}


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
