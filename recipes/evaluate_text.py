"""Measures how well a model predicts held-out captions: nats a caption, perplexity a token, bits a byte.

python recipes/evaluate_text.py --model_name_or_path runs/transfusion_tiny --output_dir runs/transfusion_tiny/text

Captions stand alone, as in front of their pictures. What closes a document is not counted, so that families whose
captions are followed by other tokens compare; nats a caption also compare between text tokenizers.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

import hf_mm  # noqa: F401  (registers the families)
from hf_mm.data.icon_scenes import icon_scenes_dataset
from hf_mm.training.recipe import parse_recipe


@dataclass
class TextEvaluation:
    """The model, and whose captions it predicts."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint, a folder or a Hub id."})
    glyph_set: str = field(default="shapes", metadata={"help": "shapes or icons."})
    kinds: list[str] = field(default_factory=lambda: ["single_object"], metadata={"help": "Kinds of scene."})
    num_scenes: int = field(default=512, metadata={"help": "Held-out scenes."})
    batch_size: int = field(default=64, metadata={"help": "Captions read at once."})
    seed: int = field(default=0, metadata={"help": "Of the scenes."})
    output_dir: str = field(default="runs/text_evaluation", metadata={"help": "For scores.json."})


@torch.inference_mode()
def sum_log_probabilities(model: Any, documents: Sequence[Sequence[int]], batch_size: int) -> float:
    """Adds up the log-probabilities of all tokens but the first of each document.

    Args:
        model (`PreTrainedModel`): Predicts the next token.
        documents (`Sequence[Sequence[int]]`): Ids.
        batch_size (`int`): Documents read at once.

    Returns:
        `float`: in nats, at most 0.
    """
    total = 0.0
    for start in tqdm(range(0, len(documents), batch_size), desc="read"):
        ids = [torch.tensor(document) for document in documents[start : start + batch_size]]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        logits = model(input_ids=input_ids, attention_mask=mask.to(model.device)).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        total += (chosen * mask[:, 1:].to(model.device)).double().sum().item()
    return total


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Reads the captions and saves the scores."""
    (recipe,) = parse_recipe(TextEvaluation, argv=argv)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = AutoModelForMultimodalLM.from_pretrained(recipe.model_name_or_path).to(device).eval()
    processor = AutoProcessor.from_pretrained(recipe.model_name_or_path)
    rows = icon_scenes_dataset(
        recipe.num_scenes,
        glyph_set=recipe.glyph_set,
        size_px=model.config.image_size,
        split="validation",
        seed=recipe.seed,
        kinds=dict.fromkeys(recipe.kinds, 1.0),
    )
    captions = list(rows["description"])
    encoded = [processor.encode_document([{"type": "text", "text": text}])["input_ids"] for text in captions]
    documents = [ids[:-1] for ids in encoded]  # the last closes the document
    nats = -sum_log_probabilities(model, documents, recipe.batch_size)
    num_tokens = sum(len(document) - 1 for document in documents)
    num_bytes = sum(len(text.encode()) for text in captions)
    scores = {
        "nats_per_caption": nats / len(captions),
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"recipe": vars(recipe), **scores}, indent=2)
    (folder / "scores.json").write_text(text, encoding="utf-8")
    print(text)
    return scores


if __name__ == "__main__":
    main()
