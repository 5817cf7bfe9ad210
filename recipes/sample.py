"""Draws a grid from a checkpoint: a column a prompt, a row for each guidance scale, number of steps and scheduler.

python recipes/sample.py --prompts "a red star" "a blue heart" --guidance_scales 1 3 5
python recipes/sample.py --model_name_or_path runs/mine --prompts_file prompts.txt --num_inference_steps 10 25 50 \
    --schedulers FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler --output runs/mine/solvers.png

Every row starts from the same noise, so that rows differ by their settings alone. Models of codes have no
scheduler and take no steps: a row for each scale.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from hf_mm.text_to_image import DEFAULT_CHECKPOINT
from hf_mm.training.recipe import parse_recipe
from hf_mm.training.samples import save_captioned_grid


@dataclass
class SampleArguments:
    """What is drawn, with what, and where to."""

    model_name_or_path: str = field(
        default=str(DEFAULT_CHECKPOINT), metadata={"help": "Checkpoint; default: the one that ships with hf_mm."}
    )
    prompts: list[str] = field(
        default_factory=lambda: ["a red star on a white background", "a blue heart on a yellow background"],
        metadata={"help": "Prompts, a column each."},
    )
    prompts_file: str | None = field(default=None, metadata={"help": "Text file with a prompt a line, instead."})
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0], metadata={"help": "1 is off."})
    num_inference_steps: list[int] = field(default_factory=lambda: [25], metadata={"help": "Denoising steps."})
    schedulers: list[str] = field(
        default_factory=list, metadata={"help": "Classes of diffusers; none: the checkpoint's own."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels of a side; none: the model's."})
    seed: int = field(default=0, metadata={"help": "Seed of a row's first picture; the next has the next."})
    output: str = field(default="runs/samples.png", metadata={"help": "Where to."})


def find_scheduler(name: str) -> type:
    """Finds a scheduler class of diffusers by its name."""
    if not name.endswith("Scheduler") or name not in dir(diffusers):
        raise ValueError(f"`schedulers`: {name!r} is no scheduler of diffusers. Try DDIMScheduler.")
    return getattr(diffusers, name)


def main(argv: Sequence[str] | None = None) -> Path:
    """Draws row by row and saves the grid."""
    (arguments,) = parse_recipe(SampleArguments, argv=argv)
    prompts = arguments.prompts
    if arguments.prompts_file is not None:
        lines = Path(arguments.prompts_file).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    kinds = [find_scheduler(name) for name in arguments.schedulers]
    pipeline = DiffusionPipeline.from_pretrained(arguments.model_name_or_path)
    pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    own = pipeline.components.get("scheduler")
    if own is None and kinds:
        raise ValueError(f"`schedulers`={arguments.schedulers}: a {type(pipeline).__name__} has none. Leave them out.")
    images, captions = [], []
    solvers = [None] if own is None else itertools.product(kinds or [type(own)], arguments.num_inference_steps)
    for solver, scale in itertools.product(solvers, arguments.guidance_scales):
        row, steps = f"guidance {scale:g}", {}
        if solver is not None:
            kind, num_steps = solver
            pipeline.scheduler, steps = kind.from_config(own.config), {"num_inference_steps": num_steps}
            row = f"{kind.__name__.removesuffix('Scheduler')}, {num_steps} steps, {row}"
        images += pipeline(
            prompts,
            height=arguments.image_size,
            width=arguments.image_size,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(arguments.seed + number) for number in range(len(prompts))],
            **steps,
        ).images
        captions += [f"{row}: {prompt}" for prompt in prompts]
    path = save_captioned_grid(images, captions, arguments.output, num_columns=len(prompts))
    print(f"The grid is in {path}.")
    return path


if __name__ == "__main__":
    main()
