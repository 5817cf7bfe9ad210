"""Scores a model on held-out icon scenes: pictures drawn from unseen prompts, and captions of pictures.

python recipes/evaluate.py --model_name_or_path runs/transfusion_tiny --output_dir runs/transfusion_tiny/evaluation

The scores also go into the card of a folder. Beside them stand those of the true pictures and of shuffled prompts,
which say how far the ruler can be trusted.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult
from PIL import Image
from tqdm.auto import tqdm

from hf_mm.cards import add_eval_results
from hf_mm.data.icon_scenes import icon_scenes_dataset
from hf_mm.training.recipe import parse_recipe
from hf_mm.training.samples import save_captioned_grid
from scoring import draw_scenes, load_pipeline, score_pictures


@dataclass
class EvaluationRecipe:
    """The model, and what it is asked."""

    model_name_or_path: str = field(default="runs/transfusion_tiny", metadata={"help": "Folder or Hub id."})
    glyph_set: str = field(default="shapes", metadata={"help": "shapes or icons."})
    kinds: list[str] = field(default_factory=lambda: ["single_object"], metadata={"help": "Kinds of scene."})
    num_scenes: int = field(default=256, metadata={"help": "Held-out scenes."})
    guidance_scale: float | None = field(default=None, metadata={"help": "None: the model's."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Of models that denoise; none: the model's."}
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures drawn at once."})
    seed: int = field(default=0, metadata={"help": "Of scenes and noise."})
    num_captions: int = field(default=128, metadata={"help": "Pictures to caption; 0: none."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "For scores and pictures."})


def score_captions(pipe: DiffusionPipeline, rows: Any, recipe: EvaluationRecipe) -> dict[str, float]:
    """Share of captions of single objects that name the right glyph, and the right colour."""
    named = {"glyph": 0, "color": 0}
    for start in tqdm(range(0, len(rows), recipe.batch_size), desc="caption"):
        batch = rows[start : start + recipe.batch_size]
        for caption, scene in zip(pipe.caption(batch["image"]), batch["scene"], strict=True):
            truth = json.loads(scene)["objects"][0]
            words = caption.split()
            for part in named:
                named[part] += truth[part] in words
    return {f"{part}_named": count / len(rows) for part, count in named.items()}


def list_results(scores: Mapping[str, Any], recipe: EvaluationRecipe) -> list[EvalResult]:
    """Spells scores as the Hub does in a card: of drawn pictures by kind of scene, and of captions.

    Args:
        scores (`Mapping`): As `scores.json` has them.
        recipe ([`EvaluationRecipe`]): What was asked.

    Returns:
        `list[EvalResult]`: shares from 0 to 1.
    """

    def result(task: str, config: str, data: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=task,
            dataset_type=f"icon_scenes:{recipe.glyph_set}",
            dataset_name=f"held-out scenes of {recipe.glyph_set}, {data}",
            dataset_config=config,  # by which cards tell data apart
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=name.replace("_", " "),
            metric_value=value,
        )

    drawn = [
        result("text-to-image", kind, f"{kind.replace('_', ' ')} ({rates['num_images']})", name, rates[name])
        for kind, rates in scores["drawn"].items()
        for name in ("scene_correct", "glyph_correct", "color_correct")
    ]
    captions = scores.get("captions", {}).items()
    asked = f"captions of single objects ({recipe.num_captions})"
    return drawn + [result("image-to-text", "single_object", asked, name, value) for name, value in captions]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, scores, captions, and saves a grid and the scores."""
    (recipe,) = parse_recipe(EvaluationRecipe, argv=argv)
    pipe = load_pipeline(recipe.model_name_or_path)
    rows = icon_scenes_dataset(
        recipe.num_scenes,
        glyph_set=recipe.glyph_set,
        size_px=pipe.model.config.image_size,
        split="validation",
        seed=recipe.seed,
        kinds=dict.fromkeys(recipe.kinds, 1.0),
    )
    prompts, scenes = list(rows["description"]), list(rows["scene"])
    drawing = {"guidance_scale": recipe.guidance_scale, "num_inference_steps": recipe.num_inference_steps}
    pictures = draw_scenes(pipe, prompts, seed=recipe.seed, batch_size=recipe.batch_size, **drawing)
    truth = [np.asarray(image) for image in rows["image"]]
    scores: dict[str, Any] = {
        "drawn": score_pictures(pictures, scenes, recipe.glyph_set),
        "true_pictures": score_pictures(truth, scenes, recipe.glyph_set)["overall"],
        "shuffled_prompts": score_pictures(pictures, scenes[1:] + scenes[:1], recipe.glyph_set)["overall"],
    }
    if recipe.num_captions:
        single = icon_scenes_dataset(
            recipe.num_captions,
            glyph_set=recipe.glyph_set,
            size_px=pipe.model.config.image_size,
            split="validation",
            seed=recipe.seed,
            kinds={"single_object": 1.0},
        )
        scores["captions"] = score_captions(pipe, single, recipe)
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "scores.json").write_text(json.dumps({"recipe": vars(recipe), **scores}, indent=2), encoding="utf-8")
    if Path(recipe.model_name_or_path).is_dir():
        note = f"`recipes/evaluate.py {shlex.join(sys.argv[1:] if argv is None else argv)}`"
        add_eval_results(recipe.model_name_or_path, list_results(scores, recipe), note=note)
    shown = [Image.fromarray(picture) for picture in pictures[:24]]
    save_captioned_grid(shown, prompts[:24], output_dir / "grid.png")
    print(json.dumps({name: value for name, value in scores.items()}, indent=2))
    print(f"Scores and grid are in {output_dir}.")
    return scores


if __name__ == "__main__":
    main()
