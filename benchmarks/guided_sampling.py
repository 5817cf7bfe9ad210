"""Times guided drawing of Transfusion against `transfusion-pytorch`, a DiT, and its own matrix products alone.

pip install transfusion-pytorch==0.20.0
python benchmarks/guided_sampling.py --output guided_sampling.json

All draw one image of 64 patches for each of 4 prompts, with guidance, in 10 steps of one evaluation each (Euler's
method for the peer), all prompts in one batch. Prompts are 32 tokens; the DiT of diffusers, with the loop of its own
pipeline, has a class instead and so nothing to read. The floor is every linear layer's product, without attention; the
least that drawing can do adds attention's own products. In bfloat16 the peer is under autocast, since it does not run
with such weights; all others have them.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any


os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # the peer tells of each sample

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler
from torch import nn

from timing import (
    DTYPES,
    attention_alone,
    autocast,
    count_parameters,
    describe,
    one_after_another,
    products_alone,
    profile,
    record_products,
    take_turns,
    tell,
)
from transfusion_peers import (
    CHANNELS,
    GUIDANCE_SCALE,
    NUM_CLASSES,
    OURS,
    PATCH_SIZE,
    PROMPT_LENGTH,
    SIDE,
    VOCAB_SIZE,
    build_all,
    build_dit,
    common_parser,
    nearest_width,
    summarise,
)


TARGETS = {"same_trunk": 4.0, "same_parameters": 1.5, "over_floor": 1.35}


def draw_ours(model: nn.Module, prompts: torch.Tensor, num_steps: int) -> None:
    """Draws an image for each prompt."""
    model.draw_images(prompts, num_inference_steps=num_steps, guidance_scale=GUIDANCE_SCALE)


@torch.no_grad()
def draw_peer(model: nn.Module, prompts: torch.Tensor, num_steps: int) -> None:
    """The same with the peer; its steps lie between the points it is given, and a length below an image ends it."""
    model.sample_many(
        list(prompts),
        force_modality_at_start=(0, (SIDE, SIDE)),
        modality_steps=num_steps + 1,
        cfg_scale=GUIDANCE_SCALE,
        max_length=SIDE * SIDE - 1,
    )


@torch.no_grad()
def draw_dit(model: nn.Module, prompts: torch.Tensor, num_steps: int) -> None:
    """The same with a DiT, step by step as `DiTPipeline` does, up to the latents."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(num_steps)
    labels = torch.cat([prompts[:, 0] % NUM_CLASSES, torch.full((len(prompts),), NUM_CLASSES)])
    latents = torch.randn(len(prompts), CHANNELS, PATCH_SIZE * SIDE, PATCH_SIZE * SIDE, dtype=model.dtype)
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        noise = model(inputs, timestep=timestep.expand(len(inputs)), class_labels=labels).sample
        cond, uncond = noise.chunk(2)
        latents = scheduler.step(uncond + GUIDANCE_SCALE * (cond - uncond), timestep, latents).prev_sample


def draw_autocast(deed: Callable[[], object], dtype: torch.dtype) -> None:
    """Draws in `dtype` with weights that are not."""
    with autocast(dtype):
        deed()


def least_drawing(
    model: nn.Module, floor: Callable[[], object], batch_size: int, num_steps: int, dtype: torch.dtype
) -> Callable:
    """What no drawing of one of our models can leave out; the prompt is not counted."""
    text, num_queries = model.config.text_config, SIDE * SIDE + 2
    shape = (2 * batch_size * text.num_attention_heads, num_queries, text.hidden_size // text.num_attention_heads)
    num_times = text.num_hidden_layers * num_steps
    return one_after_another(floor, attention_alone(shape, PROMPT_LENGTH + num_queries, num_times, dtype=dtype))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times each model and each floor in turn and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers, diffusers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    dtype = DTYPES[arguments.dtype]
    models = build_all(arguments.hidden_size, arguments.num_layers)
    num_parameters = count_parameters(models["peer"])
    width = nearest_width(lambda width: build_dit(width, arguments.num_layers), num_parameters)
    models["dit"] = build_dit(width, arguments.num_layers)
    result["parameters"] = {name: count_parameters(model) for name, model in models.items()}
    prompts = torch.randint(6, VOCAB_SIZE, (arguments.batch_size, PROMPT_LENGTH))
    deeds: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        if name != "peer":  # whose weights must be float32
            model.to(dtype)
        way = {"peer": draw_peer, "dit": draw_dit}.get(name, draw_ours)
        images = partial(way, model.eval(), prompts, arguments.num_inference_steps)
        deeds[name] = partial(draw_autocast, images, dtype) if name == "peer" else images
        deeds[f"{name}_floor"] = products_alone(record_products(model, images), dtype=dtype)
        if name in OURS:
            sizes = arguments.batch_size, arguments.num_inference_steps
            deeds[f"{name}_least"] = least_drawing(model, deeds[f"{name}_floor"], *sizes, dtype)
        if arguments.torch_compile and name in OURS:
            model.model.language_model.compile()
    for name, clock in take_turns(deeds, arguments.num_repeats).items():
        result[name] = summarise(clock, TARGETS)
        result[name]["times_faster_than_dit"] = {name: clock.ratio("dit", name) for name in OURS}
    if arguments.profile:
        result["profile"] = {name: profile(deeds[name]) for name in OURS}
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = common_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
