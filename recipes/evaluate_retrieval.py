"""Scores one model on held-out icon scenes with 0, 1, 2 ... retrieved documents: a table, a picture and a JSON file.

python recipes/evaluate_retrieval.py --model_name_or_path runs/cm3leon_tiny_retrieval \
    --retrieval_dir runs/retrieval_tiny_sampling --seeds 1 2 3 --output_dir runs/retrieval_evaluation

The prompts show combinations of glyph, colour and background that no training row has; the memory bank has them.
Within a seed, every number of documents gets the same prompts and the same noise. "document matches" is the share of
prompts whose best document shows the combination asked for: what drawing could gain by copying alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_mm.data.icon_scenes import icon_scenes_dataset
from hf_mm.data.retrieval import Retriever
from hf_mm.data.retrieval_source import open_retriever
from hf_mm.training.recipe import parse_recipe
from hf_mm.training.samples import save_captioned_grid
from scoring import draw_scenes, load_pipeline, score_pictures


VERDICTS = ("scene_correct", "color_correct", "glyph_correct", "background_correct")
NUM_SHOWN = 8


@dataclass
class RetrievalEvaluation:
    """The model, its memory bank, and what it is asked."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of a CM3Leon, a folder or a Hub id."})
    retrieval_dir: str = field(metadata={"help": "The output_dir of build_retrieval_index.py."})
    nums_retrieved: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Numbers of documents to draw with."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Of prompts and noise, a row each."})
    glyph_set: str = field(default="shapes", metadata={"help": "shapes or icons."})
    scene_kind: str = field(default="single_object", metadata={"help": "Kind of scene, of one object."})
    num_scenes: int = field(default=256, metadata={"help": "Prompts of a seed."})
    guidance_scale: float | None = field(default=None, metadata={"help": "1 is off; none: the model's."})
    image_guidance_scale: float | None = field(
        default=None, metadata={"help": "How closely to follow the documents, beside the text; none: not at all."}
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures drawn at once."})
    output_dir: str = field(default="runs/retrieval_evaluation", metadata={"help": "For table, scores and picture."})


def looks(scene: Mapping[str, Any]) -> tuple[str, str, str]:
    """The combination that a scene of one object shows."""
    return scene["objects"][0]["glyph"], scene["objects"][0]["color"], scene["background"]


def share_matching(memory_scenes: Sequence[str], ids: Sequence[Sequence[int]], scenes: Sequence[str]) -> float:
    """Share of prompts whose best document is a scene of one object with the combination asked for."""
    best = [json.loads(memory_scenes[of_prompt[0]]) if of_prompt else None for of_prompt in ids]
    pairs = zip(best, map(json.loads, scenes), strict=True)
    return float(
        np.mean([one is not None and len(one["objects"]) == 1 and looks(one) == looks(it) for one, it in pairs])
    )


def score_seed(
    pipe: Any, retriever: Retriever, recipe: RetrievalEvaluation, seed: int
) -> tuple[list[dict[str, Any]], list[Image.Image], list[str]]:
    """Draws the scenes of a seed with every number of documents.

    Returns:
        `tuple[list[dict], list[Image.Image], list[str]]`: scores for each number; the first pictures of each; what
        stands under them.
    """
    size = pipe.model.config.image_size
    scenes_of = {"glyph_set": recipe.glyph_set, "size_px": size, "split": "validation", "seed": seed}
    rows = icon_scenes_dataset(recipe.num_scenes, **scenes_of, kinds={recipe.scene_kind: 1.0})
    prompts, scenes = list(rows["description"]), list(rows["scene"])
    found = retriever.retrieve(prompts, num_retrieved=max(1, *recipe.nums_retrieved))
    matching = share_matching(retriever.memory["scene"], found.ids, scenes)
    scores, shown, captions = [], [], []
    for count in recipe.nums_retrieved:
        documents = [of_prompt[:count] for of_prompt in found.documents]
        pictures = draw_scenes(
            pipe,
            prompts,
            seed=seed * 1_000_003,
            batch_size=recipe.batch_size,
            retrieved=documents,
            verb=f"seed {seed}, {count} documents",
            guidance_scale=recipe.guidance_scale,
            image_guidance_scale=recipe.image_guidance_scale if all(documents) else None,
        )
        verdicts = score_pictures(pictures, scenes, recipe.glyph_set)["overall"]
        scores.append({"seed": seed, "num_retrieved": count, "document_matches": matching, **verdicts})
        shown += [Image.fromarray(picture) for picture in pictures[:NUM_SHOWN]]
        captions += [f"{count} retrieved: {prompt}" for prompt in prompts[:NUM_SHOWN]]
    return scores, shown, captions


def tabulate(scores: Sequence[Mapping[str, Any]]) -> str:
    """Spells the scores as a Markdown table: a row for each seed and number, then the mean over seeds."""
    head = ["retrieved", "seed", "document matches", *(verdict.replace("_correct", "") for verdict in VERDICTS)]
    lines = [head, ["---"] * len(head)]
    for count in dict.fromkeys(score["num_retrieved"] for score in scores):
        of_count = [score for score in scores if score["num_retrieved"] == count]
        columns = ("document_matches", *VERDICTS)
        lines += [[str(count), str(one["seed"]), *(f"{one[name]:.1%}" for name in columns)] for one in of_count]
        means = [np.mean([one[name] for one in of_count]) for name in columns]
        lines.append([f"**{count}**", "**mean**", *(f"**{mean:.1%}**" for mean in means)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Draws, scores, and saves a table, the scores and a picture."""
    (recipe,) = parse_recipe(RetrievalEvaluation, argv=argv)
    if not recipe.nums_retrieved or min(recipe.nums_retrieved) < 0:
        raise ValueError(f"`nums_retrieved`={recipe.nums_retrieved} must hold numbers of at least 0.")
    if not recipe.seeds:
        raise ValueError("`seeds` is empty. Name at least one.")
    pipe = load_pipeline(recipe.model_name_or_path)
    retriever = open_retriever(recipe.retrieval_dir, pipe.device)
    if "scene" not in retriever.memory.column_names:
        raise ValueError(f"`retrieval_dir`={recipe.retrieval_dir!r} holds no icon scenes: its rows have no `scene`.")
    by_seed = [score_seed(pipe, retriever, recipe, seed) for seed in recipe.seeds]
    scores = [score for of_seed, _, _ in by_seed for score in of_seed]
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = tabulate(scores)
    (folder / "scores.md").write_text(table + "\n", encoding="utf-8")
    text = json.dumps({"recipe": vars(recipe), "scores": scores}, indent=2)
    (folder / "scores.json").write_text(text, encoding="utf-8")
    _, shown, captions = by_seed[0]
    save_captioned_grid(shown, captions, folder / "grid.png")
    print(table)
    print(f"Table, scores and grid are in {folder}.")
    return scores


if __name__ == "__main__":
    main()
