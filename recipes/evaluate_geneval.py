"""Draws GenEval's prompts into the folders that its own scorer reads, and sums up what a scorer says of them.

python recipes/evaluate_geneval.py --model_name_or_path me/my-model --prompts evaluation_metadata.jsonl \
    --output_dir runs/geneval
python evaluation/evaluate_images.py runs/geneval/images --outfile runs/geneval/results.jsonl --model-path DETECTOR
python recipes/evaluate_geneval.py --model_name_or_path me/my-model --prompts evaluation_metadata.jsonl \
    --output_dir runs/geneval --results runs/geneval/results.jsonl

The second command is GenEval's (arXiv 2310.11513), from its repository, which also has the 553 prompts. Instead of it
`--scorer package.module:function` names a function of one's own that is given the folder of pictures and gives, for
each picture, `tag`, `prompt` and `correct`. A run that was stopped goes on where it was.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import EvalResult
from PIL import Image
from tqdm.auto import tqdm

from evaluation_report import draw_shares, keep_earlier_scores
from hf_mm.cards import add_eval_results, spell_command, tabulate_results
from hf_mm.evaluation.geneval import (
    NUM_PROMPTS,
    Scorer,
    prompts_from_rows,
    read_prompts,
    read_results,
    summarize_results,
    write_samples,
)
from hf_mm.training.recipe import parse_recipe
from hf_mm.training.samples import save_captioned_grid
from scoring import load_pipeline


@dataclass
class GenEvalRecipe:
    """The model, the prompts, and who scores."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id."})
    prompts: str = field(
        metadata={"help": "evaluation_metadata.jsonl of GenEval, or a file like it: a path, a URL, or a Hub dataset."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hub dataset of prompts."})
    num_images: int = field(default=4, metadata={"help": "Pictures of each prompt; 4 in GenEval."})
    guidance_scale: float | None = field(default=None, metadata={"help": "None: the model's."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Of models that denoise; none: the model's."}
    )
    seed: int = field(default=0, metadata={"help": "Of the first prompt's noise."})
    scorer: str | None = field(default=None, metadata={"help": "package.module:function that scores the pictures."})
    results: str | None = field(default=None, metadata={"help": "What GenEval's scorer wrote, of this output_dir."})
    output_dir: str = field(default="runs/geneval", metadata={"help": "For pictures and scores."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Go on from another configuration."})

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn or scored."""
        if self.num_images < 1:
            raise ValueError(f"`num_images`={self.num_images} must be at least 1.")
        if self.scorer is not None and self.results is not None:
            raise ValueError("`scorer` and `results` are given. Name one: who scores, or what was scored before.")


def open_prompts(name: str, split: str) -> list[dict[str, Any]]:
    """Reads prompts from a file or URL, or from a Hub dataset."""
    if "://" in name or Path(name).suffix == ".jsonl" or Path(name).is_file():
        return read_prompts(name)
    return prompts_from_rows(datasets.load_dataset(name, split=split), name)


def load_scorer(name: str) -> Scorer:
    """Imports `package.module:function`."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"`scorer`={name!r} must read package.module:function.")
    found = vars(importlib.import_module(module)).get(function)
    if not callable(found):
        raise ValueError(f"`scorer`={name!r}: {module} has no function {function!r}.")
    return found


def draw_prompts(pipe: Any, prompts: Sequence[dict[str, Any]], recipe: GenEvalRecipe, folder: Path) -> None:
    """Draws every prompt that is not drawn yet, each from noise of its own."""
    drawing = {"guidance_scale": recipe.guidance_scale, "num_inference_steps": recipe.num_inference_steps}
    settings = {name: value for name, value in drawing.items() if value is not None}
    for number, prompt in enumerate(tqdm(prompts, desc="draw")):
        if len(list((folder / f"{number:05d}" / "samples").glob("*.png"))) == recipe.num_images:
            continue
        seeds = range(recipe.seed + number * recipe.num_images, recipe.seed + (number + 1) * recipe.num_images)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = pipe([prompt["prompt"]] * recipe.num_images, generator=generators, **settings).images
        if len(drawn) != recipe.num_images:
            raise ValueError(f"`num_images`={recipe.num_images}, but prompt {prompt['prompt']!r} gave {len(drawn)}.")
        write_samples(folder, [prompt], [drawn], first=number)


def list_results(summary: dict[str, Any]) -> list[EvalResult]:
    """Spells shares as the Hub does in a card."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="geneval",
            dataset_name=f"GenEval, {category.replace('_', ' ')} ({of_one['num_images']})",
            dataset_config=category,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="correct",
            metric_value=of_one["correct"],
            metric_args={"interval": list(of_one["interval"]), "confidence": 0.95} if "interval" in of_one else None,
        )
        for category, of_one in summary.items()
    ]


def save_grid(folder: Path, prompts: Sequence[dict[str, Any]], path: Path, num_shown: int = 24) -> None:
    """Saves the first picture of the first prompts."""
    shown = [Image.open(folder / f"{number:05d}/samples/0000.png") for number in range(len(prompts[:num_shown]))]
    save_captioned_grid(shown, [prompt["prompt"] for prompt in prompts[:num_shown]], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, has scored, and saves the sums."""
    (recipe,) = parse_recipe(GenEvalRecipe, argv=argv)
    folder = Path(recipe.output_dir)
    keep_earlier_scores(folder, recipe, free=("scorer", "results"))
    scorer = None if recipe.scorer is None else load_scorer(recipe.scorer)
    prompts = open_prompts(recipe.prompts, recipe.prompts_split)
    if len(prompts) != NUM_PROMPTS:
        print(f"{len(prompts)} prompts; GenEval has {NUM_PROMPTS}, so the scores are not those of its tables.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"recipe": vars(recipe)}, indent=2), encoding="utf-8")
    if recipe.results is None:
        draw_prompts(load_pipeline(recipe.model_name_or_path), prompts, recipe, folder / "images")
        save_grid(folder / "images", prompts, folder / "grid.png")
    if scorer is None and recipe.results is None:
        print(f"Pictures are in {folder / 'images'}. Score them, then give the scorer's file as `--results`.")
        return {}
    results = list(scorer(folder / "images")) if scorer is not None else read_results(recipe.results)
    if len(results) != len(prompts) * recipe.num_images:
        told = f"{len(prompts)} `prompts` of `num_images`={recipe.num_images} pictures"
        raise ValueError(
            f"{told} do not go with {len(results)} scored ones. Score the whole folder, and nothing else."
        )
    summary = summarize_results(results, seed=recipe.seed)
    text = json.dumps({"recipe": vars(recipe), **summary}, indent=2)
    (folder / "scores.json").write_text(text, encoding="utf-8")
    table = tabulate_results(list_results(summary))
    (folder / "scores.md").write_text(table + "\n", encoding="utf-8")
    draw_shares(list_results(summary)).save(folder / "scores.png")
    if Path(recipe.model_name_or_path).is_dir():
        note = f"`{spell_command('evaluate_geneval.py', sys.argv[1:] if argv is None else argv)}`"
        add_eval_results(recipe.model_name_or_path, list_results(summary), note=note)
    print(table)
    return summary


if __name__ == "__main__":
    main()
