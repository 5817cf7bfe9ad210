"""What training a CLIP shows: recall on held-out pairs and, of scenes, which of two captions it prefers."""

import json
import random
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import EvalResult
from transformers import CLIPModel, CLIPProcessor

from hf_mm.cards import add_eval_results, without_folders, write_card
from hf_mm.data.captioned_pictures import CaptionedPictures
from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.data.icon_glyphs import GLYPH_SETS, OBJECT_COLORS
from hf_mm.data.icon_records import describe, scene_key
from hf_mm.evaluation.retrieval import retrieval_recall
from hf_mm.training.history import draw_loss_curves, read_history
from hf_mm.training.optimization import TrainingParts, ema_weights, trainable_parameters
from hf_mm.training.samples import save_captioned_grid
from hf_mm.training.trackers import log_to_trackers
from reporting import CARDS, card_values, describe_origin


BATCH_SIZE, NUM_SHOWN = 64, 16


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


def in_batches(encode: Callable[[Sequence[Any]], np.ndarray], items: Sequence[Any]) -> np.ndarray:
    """Encodes many pictures or captions, a few at a time; (N, D)."""
    return np.concatenate([encode(items[start : start + BATCH_SIZE]) for start in range(0, len(items), BATCH_SIZE)])


class ClipReport:
    """Measures a CLIP on held-out pairs, always with the averaged weights; the main process does.

    Args:
        accelerator (`Accelerator`): Of the run.
        parts (`TrainingParts`): The trainer and its averaged weights.
        model (`CLIPModel`): The model in it.
        processor (`CLIPProcessor`): Of the model.
        pairs ([`CaptionedPictures`]): Held-out pairs.
        num_pairs (`int`): How many of them.
        output_dir (`Path`): Of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: TrainingParts,
        model: CLIPModel,
        processor: CLIPProcessor,
        pairs: CaptionedPictures,
        num_pairs: int,
        output_dir: Path,
    ) -> None:
        self.accelerator, self.parts, self.model, self.processor = accelerator, parts, model, processor
        self.pairs, self.output_dir = pairs, output_dir
        self.rows = pairs.rows.select(range(min(num_pairs, len(pairs.rows))))

    def _averaged(self) -> Any:
        """Puts the averaged weights in place for a `with` block."""
        self.model.eval()
        return ema_weights(self.parts.ema, trainable_parameters(self.parts.model))

    def _encode(self) -> tuple[ClipEncoder, list[Any], np.ndarray, np.ndarray]:
        """Gives the encoder, the pairs, and the unit vectors of their pictures and captions, each (N, D)."""
        encoder = ClipEncoder(self.model, self.processor, self.accelerator.device)
        pairs = self.pairs.first(len(self.rows))
        pictures, captions = zip(*pairs, strict=True)
        return encoder, pairs, in_batches(encoder.encode_images, pictures), in_batches(encoder.encode_texts, captions)

    def measure(self) -> dict[str, float]:
        """Measures recall with the weights as they are and, on icon scenes, the choice between two captions."""
        encoder, pairs, images, texts = self._encode()
        measured = retrieval_recall(images @ texts.T, find_labels(self.rows, [caption for _, caption in pairs]))
        if "scene" in self.rows.column_names:
            scenes = [json.loads(scene) for scene in self.rows["scene"]]
            for attribute in ("glyph", "color"):
                rng = random.Random(0)
                captions = zip(*(change_one_word(scene, attribute, rng) for scene in scenes), strict=True)
                right, wrong = ((images * in_batches(encoder.encode_texts, side)).sum(axis=1) for side in captions)
                measured[f"right_{attribute}_preferred"] = float((right > wrong).mean())
        return measured

    def evaluate(self, step: int) -> None:
        """Logs what is measured."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            measured = self.measure()
        log_to_trackers(self.accelerator, {f"eval/{name}": value for name, value in measured.items()}, step)
        shown = ", ".join(f"{name} {value:.1%}" for name, value in measured.items())
        print(f"\nStep {step}, {len(self.rows)} held-out pairs: {shown}.")

    def draw(self, step: int) -> None:
        """Saves a grid of held-out pictures, each with the held-out caption that the model likes best."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            _, pairs, images, texts = self._encode()
        best = (images @ texts.T).argmax(axis=1)[:NUM_SHOWN]
        shown = [pairs[number][0] for number in range(len(best))]
        path = self.output_dir / "samples" / f"step-{step:06d}.png"
        save_captioned_grid(shown, [pairs[number][1] for number in best], path)

    def export(self, folder: Path, facts: dict[str, Any], recipe: dict[str, Any], data_report: str) -> str:
        """Saves model, processor, scores and card as they stand into a folder, and says so; for the main process.

        Args:
            folder (`Path`): The output folder at the end; before, another.
            facts (`dict`): Of the run, for the card.
            recipe (`dict`): All fields of the run.
            data_report (`str`): What was read and what was dropped, for the card.

        Returns:
            `str`: where it is, and how good.
        """
        with self._averaged():
            measured = self.measure()
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        draw_loss_curves(read_history(self.output_dir / "history.jsonl"), folder / "loss_curves.png")
        text = json.dumps({**measured, "num_pairs": len(self.rows)}, indent=2)
        (folder / "retrieval.json").write_text(text, encoding="utf-8")
        self._write_card(folder, measured, facts, recipe, data_report)
        told = json.dumps({name: round(value, 3) for name, value in measured.items()})
        return f"The model is in {folder}, with {told} on {len(self.rows)} pairs."

    def _write_card(
        self, folder: Path, measured: dict[str, float], facts: dict[str, Any], recipe: dict[str, Any], data_report: str
    ) -> None:
        data = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
        values = card_values(folder, self.model, facts, recipe, data_report)
        write_card(folder, CARDS / "clip.md", {**data, **describe_origin(recipe)}, values)
        source = without_folders(recipe["dataset_name"])
        shared = {"task_type": "zero-shot-image-classification", "dataset_type": source}
        shared["dataset_name"] = f"{source}, {len(self.rows)} held-out pairs"
        results = [
            EvalResult(**shared, metric_type="accuracy", metric_name=name.replace("_", " "), metric_value=value)
            for name, value in measured.items()
        ]
        add_eval_results(folder, results)
