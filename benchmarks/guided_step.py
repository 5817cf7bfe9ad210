"""Times one guided denoising step behind a short and a long prompt: its cost should hardly depend on the prompt.

python benchmarks/guided_step.py --output guided_step.json

A step is one forward of two rows (conditional, unconditional) over 64 patches behind the cached prefix, plus the
scheduler's. Prompts are measured in turn, so that a change of the machine's speed meets all of them alike. Beside the
wall clock stands the processor time of all threads, which other programs on the machine disturb less.
"""

import argparse
import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

import diffusers
import torch
import transformers

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration


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


def summarise(seconds: dict[int, list[float]]) -> dict[str, object]:
    """Gives medians and fastest steps in milliseconds, and the ratio of the medians, longest to shortest prompt."""
    medians = {length: statistics.median(values) for length, values in seconds.items()}
    return {
        "milliseconds_per_step": {str(length): round(1000 * value, 3) for length, value in medians.items()},
        "fastest_milliseconds": {str(length): round(1000 * min(values), 3) for length, values in seconds.items()},
        "ratio": round(medians[max(medians)] / medians[min(medians)], 4),
    }


def measure(num_threads: int, num_repeats: int, num_steps: int) -> dict[str, object]:
    """Measures every prompt length in turn and returns what was found, and on what."""
    torch.manual_seed(0)
    torch.set_num_threads(num_threads)
    model = build_model()
    prompts = {length: torch.randint(6, 2048, (1, length)) for length in PROMPT_LENGTHS}
    times: dict[int, list[tuple[float, float]]] = {length: [] for length in PROMPT_LENGTHS}
    for prompt in prompts.values():
        step_times(model, prompt, num_steps)  # warms up
    for _ in range(num_repeats):
        for length, prompt in prompts.items():
            times[length] += step_times(model, prompt, num_steps)
    return {
        "wall_clock": summarise({length: [wall for wall, _ in values] for length, values in times.items()}),
        "processor": summarise({length: [processor for _, processor in values] for length, values in times.items()}),
        "num_steps_timed": len(times[PROMPT_LENGTHS[0]]),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "rows": 2,
        "patches": IMAGE_SIZE**2 // model.config.patch_size**2,
        "attention": model.config.text_config._attn_implementation,
        "num_threads": num_threads,
        "machine": f"{platform.machine()}, {platform.system()}, {platform.processor() or 'unknown processor'}",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--num_repeats", type=int, default=20)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.num_threads, arguments.num_repeats, arguments.num_steps)
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
