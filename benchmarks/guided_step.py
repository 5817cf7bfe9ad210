"""Times one guided denoising step behind a short and a long prompt: its cost should hardly depend on the prompt.

python benchmarks/guided_step.py --output guided_step.json

A step is one forward of two rows (conditional, unconditional) over 64 patches behind the cached prefix, plus the
scheduler's. Prompts are measured in turn, so that a change of the machine's speed meets all of them alike. Beside the
wall clock stands the processor time of all threads, which other programs on the machine disturb less.
"""

import argparse
import time
from itertools import pairwise
from typing import Any

import diffusers
import torch
import transformers

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration
from timing import Clock, benchmark_parser, count_parameters, describe, tell


PROMPT_LENGTHS = (16, 256)
IMAGE_SIZE = 16  # 64 patches of 2 x 2


def build_model() -> TransfusionForConditionalGeneration:
    """Builds a model of about 20M parameters with random weights."""
    text_config = {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 384,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
        "max_position_embeddings": 512,
    }
    config = TransfusionConfig(
        text_config=text_config, image_size=IMAGE_SIZE, boi_token_id=3, eoi_token_id=4, image_token_id=5
    )
    return TransfusionForConditionalGeneration(config).eval()


def step_times(
    model: TransfusionForConditionalGeneration, prompt: torch.Tensor, num_steps: int
) -> list[tuple[float, float]]:
    """Draws one guided picture and returns wall clock and processor seconds of each of its steps but the first."""
    moments = []

    def mark(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        moments.append((time.perf_counter(), time.process_time()))
        return latents

    model.draw_images(prompt, num_inference_steps=num_steps, guidance_scale=3.0, callback=mark)
    return [
        (wall - wall_before, processor - processor_before)
        for (wall_before, processor_before), (wall, processor) in pairwise(moments)
    ]


def summarise(clock: Clock) -> dict[str, Any]:
    """Gives medians and fastest steps in milliseconds, and the ratio of longest to shortest prompt."""
    shortest, longest = map(str, (min(PROMPT_LENGTHS), max(PROMPT_LENGTHS)))
    return {
        "milliseconds_per_step": clock.milliseconds(),
        "fastest_milliseconds": {length: round(1000 * min(seconds), 3) for length, seconds in clock.items()},
        "ratio": clock.ratio(longest, shortest),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every prompt length in turn and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers, diffusers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    model = build_model()
    prompts = {str(length): torch.randint(6, 2048, (1, length)) for length in PROMPT_LENGTHS}
    clocks = {name: Clock({length: [] for length in prompts}) for name in ("wall_clock", "processor")}
    for prompt in prompts.values():
        step_times(model, prompt, arguments.num_steps)  # warms up
    for _ in range(arguments.num_repeats):
        for length, prompt in prompts.items():
            for moment in step_times(model, prompt, arguments.num_steps):
                for clock, seconds in zip(clocks.values(), moment, strict=True):
                    clock[length].append(seconds)
    result |= {name: summarise(clock) for name, clock in clocks.items()}
    return result | {
        "num_parameters": count_parameters(model),
        "rows": 2,
        "patches": IMAGE_SIZE**2 // model.config.patch_size**2,
        "attention": model.config.text_config._attn_implementation,
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_threads=2, num_repeats=20)
    parser.add_argument("--num_steps", type=int, default=10)
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
