"""What training a CLIP shows: recall on held-out pairs and, of scenes, which of two captions it prefers."""

import json
import random
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import CLIPModel

from hf_mm.data.captioned_pictures import CaptionedPictures, PairCollator
from hf_mm.data.icon_glyphs import GLYPH_SETS, OBJECT_COLORS
from hf_mm.data.icon_records import describe, scene_key
from hf_mm.evaluation.retrieval import retrieval_recall
from hf_mm.training.optimization import TrainingParts, ema_weights, trainable_parameters
from hf_mm.training.samples import save_captioned_grid


def find_labels(rows: Dataset, captions: list[str]) -> list[Hashable]:
    """What each pair is about: its scene where that is known, whatever its wording, else its caption."""
    if "scene" in rows.column_names:
        return [scene_key(json.loads(scene)) for scene in rows["scene"]]
    return list(captions)


def change_one_word(scene: dict[str, Any], attribute: str, rng: random.Random) -> tuple[str, str]:
    """Captions of a scene and of another in which the first object's glyph or colour differs, worded alike.

    Args:
        scene (`dict`): Record of a scene of objects that differ.
        attribute (`str`): `"glyph"` or `"color"`.
        rng (`random.Random`): Picks the other value and the wording.

    Returns:
        `tuple[str, str]`: the right caption and the wrong one.
    """
    choices = {"glyph": GLYPH_SETS[scene["glyph_set"]], "color": OBJECT_COLORS}[attribute]
    taken = {item[attribute] for item in scene["objects"]} | {scene["background"]}
    other = rng.choice([value for value in choices if value not in taken])
    num_alike = len(scene["objects"]) if scene["kind"] == "counting" else 1
    objects = [
        {**item, attribute: other} if number < num_alike else item for number, item in enumerate(scene["objects"])
    ]
    wording = rng.getrandbits(32)
    return describe(scene, random.Random(wording)), describe({**scene, "objects": objects}, random.Random(wording))


@torch.no_grad()
def embed(
    model: CLIPModel, collate: PairCollator, pairs: list[Any], batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds pictures and captions, each `(N, D)` and of length 1."""
    images, texts = [], []
    for start in range(0, len(pairs), batch_size):
        batch = {name: value.to(model.device) for name, value in collate(pairs[start : start + batch_size]).items()}
        batch.pop("caption_ids")
        output = model(**batch)
        images.append(output.image_embeds.float().cpu())
        texts.append(output.text_embeds.float().cpu())
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


class ClipReport:
    """Measures a CLIP on held-out pairs, always with the averaged weights; the main process does.

    Args:
        accelerator (`Accelerator`): Of the run.
        parts (`TrainingParts`): The trainer and its averaged weights.
        model (`CLIPModel`): The model in it.
        collate ([`PairCollator`]): Makes its batches.
        pairs ([`CaptionedPictures`]): Held-out pairs.
        num_pairs (`int`): How many of them.
        output_dir (`Path`): Of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: TrainingParts,
        model: CLIPModel,
        collate: PairCollator,
        pairs: CaptionedPictures,
        num_pairs: int,
        output_dir: Path,
    ) -> None:
        self.accelerator, self.parts, self.model, self.collate = accelerator, parts, model, collate
        self.output_dir = output_dir
        self.rows = pairs.rows.select(range(min(num_pairs, len(pairs.rows))))
        self.read_pairs: Callable[[], list[Any]] = lambda: pairs.first(num_pairs)

    def _averaged(self) -> Any:
        """Puts the averaged weights in place for a `with` block."""
        self.model.eval()
        return ema_weights(self.parts.ema, trainable_parameters(self.parts.model))

    def measure(self) -> dict[str, float]:
        """Measures recall with the weights as they are and, on icon scenes, the choice between two captions."""
        pairs = self.read_pairs()
        images, texts = embed(self.model, self.collate, pairs)
        labels = find_labels(self.rows, [caption for _, caption in pairs])
        measured = retrieval_recall(images @ texts.T, labels)
        if "scene" in self.rows.column_names:
            scenes = [json.loads(scene) for scene in self.rows["scene"]]
            for attribute in ("glyph", "color"):
                measured[f"right_{attribute}_preferred"] = self._choose(images, pairs, scenes, attribute)
        return measured

    def _choose(self, images: np.ndarray, pairs: list[Any], scenes: list[dict[str, Any]], attribute: str) -> float:
        """Share of pictures that are closer to their caption than to one with another glyph or colour."""
        rng = random.Random(0)
        captions = [change_one_word(scene, attribute, rng) for scene in scenes]
        pictures = [picture for picture, _ in pairs]
        similarities = [
            (images * embed(self.model, self.collate, list(zip(pictures, side, strict=True)))[1]).sum(axis=1)
            for side in zip(*captions, strict=True)
        ]
        return float((similarities[0] > similarities[1]).mean())

    def evaluate(self, step: int) -> None:
        """Logs what is measured."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            measured = self.measure()
        self.accelerator.log({f"eval/{name}": value for name, value in measured.items()}, step=step)
        shown = ", ".join(f"{name} {value:.1%}" for name, value in measured.items())
        print(f"\nStep {step}, {len(self.rows)} held-out pairs: {shown}.")

    def draw(self, step: int) -> None:
        """Saves a grid of held-out pictures, each with the held-out caption that the model likes best."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            pairs = self.read_pairs()
            images, texts = embed(self.model, self.collate, pairs)
        best = (images @ texts.T).argmax(axis=1)[:16]
        shown = [pairs[number][0] for number in range(len(best))]
        path = self.output_dir / "samples" / f"step-{step:06d}.png"
        save_captioned_grid(shown, [pairs[number][1] for number in best], path)

    def export(self, processor: Any) -> dict[str, float]:
        """Saves model, processor and what was measured into the output folder; for the main process."""
        with self._averaged():
            measured = self.measure()
            self.model.save_pretrained(self.output_dir)
        processor.save_pretrained(self.output_dir)
        text = json.dumps({**measured, "num_pairs": len(self.rows)}, indent=2)
        (self.output_dir / "retrieval.json").write_text(text, encoding="utf-8")
        return measured
