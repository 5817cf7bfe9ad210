"""Scores a model on held-out icon scenes: pictures drawn from unseen prompts, captions of pictures, and text.

python recipes/evaluate.py --model_name_or_path runs/transfusion_tiny --output_dir runs/transfusion_tiny/evaluation
python recipes/evaluate.py --model_name_or_path runs/transfusion_tiny --output_dir runs/transfusion_tiny/evaluation \
    --metrics fid clip_score cider perplexity

The scores, each with the interval in which 95% of bootstrap resamples lie, also go into the card of a folder. Beside
them stand those of the true pictures and of shuffled prompts, which say how far the ruler can be trusted. Metrics that
were measured in the same folder before, with the same fields, stay in its table.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation_report import keep_earlier_scores, list_results, write_report
from hf_mm.cards import add_eval_results, spell_command
from hf_mm.data.fingerprints import digest_weights
from hf_mm.data.icon_scenes import icon_scenes_dataset
from hf_mm.evaluation.zero_shot import LLAMA2_SUITE
from hf_mm.training.recipe import parse_recipe
from hf_mm.training.samples import save_captioned_grid
from measuring import (
    measure_captions,
    measure_cider,
    measure_clip_score,
    measure_fid,
    measure_perplexity,
    measure_scenes,
    measure_zero_shot,
    open_network,
    read_texts,
    write_captions,
)
from scoring import draw_scenes, load_pipeline


METRICS = ("scenes", "captions", "fid", "clip_score", "cider", "perplexity", "zero_shot")
DRAWN = {"scenes", "fid", "clip_score"}
WRITTEN = {"captions", "cider"}
QUICK = {"num_scenes": 32, "num_captions": 32, "zero_shot_limit": 32}


@dataclass
class EvaluationRecipe:
    """The model, and what it is asked."""

    model_name_or_path: str = field(default="runs/transfusion_tiny", metadata={"help": "Folder or Hub id."})
    metrics: list[str] = field(default_factory=lambda: ["scenes", "captions"], metadata={"help": ", ".join(METRICS)})
    glyph_set: str = field(default="shapes", metadata={"help": "shapes or icons."})
    kinds: list[str] = field(default_factory=lambda: ["single_object"], metadata={"help": "Kinds of scene."})
    num_scenes: int = field(default=256, metadata={"help": "Held-out scenes, at least 2."})
    guidance_scale: float | None = field(default=None, metadata={"help": "None: the model's."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Of models that denoise; none: the model's."}
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures drawn at once."})
    seed: int = field(default=0, metadata={"help": "Of scenes and noise."})
    num_captions: int = field(default=128, metadata={"help": "Pictures to caption; 0: none."})
    clip_name: str = field(
        default="clip-tiny", metadata={"help": "CLIP of the CLIP score: the one that ships, a folder or a Hub id."}
    )
    fid_network: str | None = field(
        default=None, metadata={"help": "inception, or folder or Hub id of a CLIP; none: clip_name."}
    )
    texts: str | None = field(
        default=None,
        metadata={"help": "Of the perplexity: a file of txt, jsonl or parquet, or a Hub id; none: the prompts."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    text_split: str = field(default="validation", metadata={"help": "Split of a Hub dataset of texts."})
    text_stride: int | None = field(
        default=None, metadata={"help": "New tokens of a window of long texts; none: half of the context."}
    )
    zero_shot_tasks: list[str] = field(
        default_factory=lambda: list(LLAMA2_SUITE), metadata={"help": "Tasks of lm-evaluation-harness."}
    )
    zero_shot_task_dir: str | None = field(default=None, metadata={"help": "Folder with tasks of your own, as YAML."})
    zero_shot_limit: int | None = field(default=None, metadata={"help": "Questions of each task; none: all."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "For scores and pictures."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Drop scores of another configuration."})
    quick: bool = field(default=False, metadata={"help": f"Look whether it runs: {QUICK}, where these are less."})

    def __post_init__(self) -> None:
        """Refuses what cannot be measured, and shortens a quick run."""
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"`metrics` has {unknown}. Known are {', '.join(METRICS)}.")
        if not self.metrics:
            raise ValueError("`metrics` is empty. Name at least one.")
        if self.num_scenes < 2:
            raise ValueError(f"`num_scenes`={self.num_scenes} must be at least 2, to be shuffled.")
        if "fid" in self.metrics and self.num_scenes < 4:
            raise ValueError(f"`num_scenes`={self.num_scenes} must be at least 4 for `fid`, to be halved.")
        if "cider" in self.metrics and self.num_captions < 2:
            raise ValueError(f"`num_captions`={self.num_captions} must be at least 2 for `cider`.")
        for name, most in QUICK.items() if self.quick else ():
            asked = getattr(self, name)
            setattr(self, name, most if asked is None else min(asked, most))


def hold_out(recipe: EvaluationRecipe, size_px: int, num_scenes: int, kinds: Sequence[str]) -> Any:
    """Draws held-out scenes."""
    return icon_scenes_dataset(
        num_scenes,
        glyph_set=recipe.glyph_set,
        size_px=size_px,
        split="validation",
        seed=recipe.seed,
        kinds=dict.fromkeys(kinds, 1.0),
    )


def open_networks(recipe: EvaluationRecipe, device: Any) -> dict[str, Any]:
    """Loads what turns pictures into features, by name."""
    wanted = {"clip_score": ("clip_name", recipe.clip_name)}
    wanted["fid"] = ("fid_network", recipe.fid_network) if recipe.fid_network else wanted["clip_score"]
    networks: dict[str, Any] = {}
    for metric, (field_name, name) in wanted.items():
        if metric in recipe.metrics and name not in networks:
            try:
                networks[name] = open_network(name, device)
            except OSError as error:
                told = f"`{field_name}`={name!r} cannot be loaded: {error}"
                raise ValueError(f"{told} Train one with recipes/train_clip.py, or name one of the Hub.") from error
    return networks


def measure_pictures(pipe: Any, rows: Any, recipe: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    """Draws the scenes, saves a grid, and measures what is asked of the pictures."""
    networks = open_networks(recipe, pipe.device)  # before the long work
    prompts, truth = list(rows["description"]), [np.asarray(image) for image in rows["image"]]
    drawing = {"guidance_scale": recipe.guidance_scale, "num_inference_steps": recipe.num_inference_steps}
    pictures = draw_scenes(pipe, prompts, seed=recipe.seed, batch_size=recipe.batch_size, **drawing)
    save_captioned_grid([Image.fromarray(picture) for picture in pictures[:24]], prompts[:24], folder / "grid.png")
    scores: dict[str, Any] = {}
    if "scenes" in recipe.metrics:
        scores |= measure_scenes(pictures, truth, list(rows["scene"]), recipe.glyph_set)
    if "clip_score" in recipe.metrics:
        found = measure_clip_score(networks[recipe.clip_name], pictures, truth, prompts, recipe.batch_size)
        scores["clip_score"] = {"network": recipe.clip_name, **found}
    if "fid" in recipe.metrics:
        name = recipe.fid_network or recipe.clip_name
        scores["fid"] = {"network": name, **measure_fid(networks[name], pictures, truth, recipe.batch_size)}
    return scores


def measure(pipe: Any, recipe: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    """Measures everything that is asked."""
    asked, size_px = set(recipe.metrics), pipe.model.config.image_size
    rows = hold_out(recipe, size_px, recipe.num_scenes, recipe.kinds)
    scores = measure_pictures(pipe, rows, recipe, folder) if asked & DRAWN else {}
    if asked & WRITTEN and recipe.num_captions:
        single = hold_out(recipe, size_px, recipe.num_captions, ["single_object"])
        captions = write_captions(pipe, single, recipe.batch_size)
        if "captions" in asked:
            scores["captions"] = measure_captions(captions, single)
        if "cider" in asked:
            scores["cider"] = measure_cider(captions, single)
    if "perplexity" in asked:
        name = recipe.texts or f"prompts of {recipe.glyph_set}"
        texts = (
            read_texts(recipe.texts, recipe.text_column, recipe.text_split) if recipe.texts else rows["description"]
        )
        scores["perplexity"] = {"texts": name, **measure_perplexity(pipe, list(texts), recipe.text_stride)}
    if "zero_shot" in asked:
        fields = {"task_dir": recipe.zero_shot_task_dir, "limit": recipe.zero_shot_limit, "seed": recipe.seed}
        scores["zero_shot"] = measure_zero_shot(pipe, recipe.zero_shot_tasks, batch_size=recipe.batch_size, **fields)
    return scores


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, captions, reads, scores, and saves a grid and the scores."""
    (recipe,) = parse_recipe(EvaluationRecipe, argv=argv)
    folder = Path(recipe.output_dir)
    earlier = keep_earlier_scores(folder, recipe)
    pipe = load_pipeline(recipe.model_name_or_path)
    weights = digest_weights(pipe.model)
    if earlier.get("weights") != weights:  # trained again since
        earlier = {}
    scores = {**earlier, "weights": weights, **measure(pipe, recipe, folder)}
    write_report(scores, recipe, folder)
    if Path(recipe.model_name_or_path).is_dir():
        note = f"`{spell_command('evaluate.py', sys.argv[1:] if argv is None else argv)}`"
        add_eval_results(recipe.model_name_or_path, list_results(scores, recipe), note=note)
    print(json.dumps(scores, indent=2))
    print(f"Scores are in {folder}.")
    return scores


if __name__ == "__main__":
    main()
