"""Scores ways of drawing codes against the number of candidates that a CLIP chooses from, on held-out icon scenes.

python recipes/evaluate_decoding.py --model_name_or_path runs/cm3leon_tiny --reranker_name clip-tiny \
    --output_dir runs/cm3leon_tiny/decoding

The candidates of a way are drawn once; fewer are the first of them. A mix takes the first half of each of two ways, as
the pipeline does with `decoding="mixed"`. With one candidate a mix is its first way.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

from hf_mm.data.icon_scenes import icon_scenes_dataset
from hf_mm.loading import find_checkpoint
from hf_mm.training.recipe import parse_recipe
from scoring import load_pipeline, score_pictures


@dataclass
class DecodingEvaluation:
    """The model, its reranker, and how it draws."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint of a CM3Leon, a folder or a Hub id."})
    reranker_name: str = field(metadata={"help": "CLIP that chooses: the one that ships, a folder or a Hub id."})
    ways: list[str] = field(
        default_factory=lambda: ["temperature: {}"],
        metadata={"help": "Each `name: {...}`, a JSON object of arguments of the pipeline."},
    )
    mixes: list[str] = field(default_factory=list, metadata={"help": "Each `name: way, way`."})
    candidates: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "To choose from."})
    glyph_set: str = field(default="shapes", metadata={"help": "shapes or icons."})
    num_scenes: int = field(default=64, metadata={"help": "Held-out scenes of one object."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at once, with all their candidates."})
    seed: int = field(default=0, metadata={"help": "Of scenes and noise."})
    output_dir: str = field(default="runs/decoding_evaluation", metadata={"help": "For scores.json."})

    def __post_init__(self) -> None:
        """Refuses numbers of candidates that cannot be."""
        if not self.candidates or min(self.candidates) < 1:
            raise ValueError(f"`candidates`={self.candidates} must hold numbers of at least 1.")


def draw_candidates(
    pipe: Any, prompts: list[str], arguments: Mapping[str, Any], recipe: DecodingEvaluation, name: str
) -> list[list[np.ndarray]]:
    """Draws all candidates of each prompt, each from noise of its own."""
    most, drawn = max(recipe.candidates), []
    for start in tqdm(range(0, len(prompts), recipe.batch_size), desc=name):
        part = prompts[start : start + recipe.batch_size]
        numbers = range(start * most, (start + len(part)) * most)
        generators = [torch.Generator().manual_seed(recipe.seed * 1_000_003 + number) for number in numbers]
        images = pipe(part, num_images_per_prompt=most, generator=generators, **arguments).images
        pictures = [np.asarray(image) for image in images]
        drawn += [pictures[place : place + most] for place in range(0, len(pictures), most)]
    return drawn


@torch.inference_mode()
def rank(clip: CLIPModel, processor: CLIPProcessor, prompt: str, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Scores how well pictures fit a prompt."""
    images = [Image.fromarray(picture) for picture in pictures]
    inputs = processor(text=[prompt], images=images, return_tensors="pt", padding=True).to(clip.device)
    return clip(**inputs).logits_per_image[:, 0].float().cpu().numpy()


def choose(drawn: Sequence[Any], fits: Sequence[np.ndarray], chosen_from: Sequence[int]) -> list[np.ndarray]:
    """Takes of each prompt the best of the candidates with these numbers."""
    places = list(chosen_from)
    return [pictures[places[int(fit[places].argmax())]] for pictures, fit in zip(drawn, fits, strict=True)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws, chooses, scores and saves."""
    (recipe,) = parse_recipe(DecodingEvaluation, argv=argv)
    ways = {name.strip(): json.loads(text) for name, _, text in (way.partition(":") for way in recipe.ways)}
    mixes = {name.strip(): text.split(",") for name, _, text in (mix.partition(":") for mix in recipe.mixes)}
    parts = {name: [part.strip() for part in pair] for name, pair in mixes.items()}
    if unknown := sorted({part for pair in parts.values() for part in pair} - ways.keys()):
        raise ValueError(f"`mixes` names {unknown}; `ways` are {sorted(ways)}.")
    pipe = load_pipeline(recipe.model_name_or_path)
    clip = CLIPModel.from_pretrained(find_checkpoint(recipe.reranker_name)).to(pipe.device).eval()
    processor = CLIPProcessor.from_pretrained(find_checkpoint(recipe.reranker_name))
    size = pipe.model.config.image_size
    held_out = {"glyph_set": recipe.glyph_set, "size_px": size, "split": "validation", "seed": recipe.seed}
    rows = icon_scenes_dataset(recipe.num_scenes, **held_out, kinds={"single_object": 1.0})
    prompts, scenes, most = list(rows["description"]), list(rows["scene"]), max(recipe.candidates)
    drawn = {name: draw_candidates(pipe, prompts, arguments, recipe, name) for name, arguments in ways.items()}
    fits = {
        name: [rank(clip, processor, prompt, found) for prompt, found in zip(prompts, pictures, strict=True)]
        for name, pictures in drawn.items()
    }
    for name, (first, second) in parts.items():
        drawn[name] = [one + two for one, two in zip(drawn[first], drawn[second], strict=True)]
        fits[name] = [np.concatenate(pair) for pair in zip(fits[first], fits[second], strict=True)]
    scores: dict[str, Any] = {name: {} for name in drawn}
    for name, found in drawn.items():
        for count in recipe.candidates:
            half = count - count // 2
            numbers = [*range(half), *range(most, most + count // 2)] if name in parts else list(range(count))
            best = choose(found, fits[name], numbers)
            scores[name][str(count)] = score_pictures(best, scenes, recipe.glyph_set)["overall"]
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"recipe": vars(recipe), **scores}, indent=2)
    (folder / "scores.json").write_text(text, encoding="utf-8")
    print(text)
    return scores


if __name__ == "__main__":
    main()
