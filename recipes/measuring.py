"""The metrics of `evaluate.py`, each a dictionary of its scores and of their bootstrap intervals."""

import copy
import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm

from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.data.icon_records import describe
from hf_mm.evaluation.image_quality import clip_scores, frechet_distance, sampling_distance
from hf_mm.evaluation.intervals import bootstrap_interval, mean_interval
from hf_mm.evaluation.scene_accuracy import chance_accuracy
from hf_mm.evaluation.text_quality import cider_scores, likelihood, token_log_probs
from hf_mm.evaluation.zero_shot import zero_shot_accuracy
from hf_mm.loading import find_checkpoint
from scoring import score_pictures


INCEPTION = "inception"
NUM_REFERENCES = 5  # captions of a picture, as COCO has (arXiv 1504.00325, Sec. 2)
NUM_FOR_CHANCE = 200  # scenes, each held against every other
NUM_RESAMPLES = 200  # where a score takes long; ends of intervals are then a little rough


def measure_scenes(
    pictures: Sequence[np.ndarray], truth: Sequence[np.ndarray], scenes: list[str], glyph_set: str
) -> dict[str, Any]:
    """Scores drawn pictures by kind of scene and, as checks of the ruler, true pictures and shuffled prompts."""
    shuffled = score_pictures(pictures, scenes[1:] + scenes[:1], glyph_set)["overall"]
    return {
        "drawn": score_pictures(pictures, scenes, glyph_set),
        "true_pictures": score_pictures(truth, scenes, glyph_set)["overall"],
        "shuffled_prompts": {**shuffled, "chance": chance_accuracy(scenes[:NUM_FOR_CHANCE])},
    }


def write_captions(pipe: Any, rows: Any, batch_size: int) -> list[str]:
    """Has a model describe the pictures of rows."""
    captions: list[str] = []
    for start in tqdm(range(0, len(rows), batch_size), desc="caption"):
        captions += pipe.caption(rows[start : start + batch_size]["image"])
    if len(captions) != len(rows):
        raise ValueError(f"{len(rows)} pictures gave {len(captions)} captions. Need one of each.")
    return captions


def measure_captions(captions: Sequence[str], rows: Any) -> dict[str, Any]:
    """Share of captions of single objects that name the right glyph, and the right colour."""
    objects = [json.loads(scene)["objects"][0] for scene in rows["scene"]]
    verdicts = {
        f"{part}_named": [item[part] in caption.split() for item, caption in zip(objects, captions, strict=True)]
        for part in ("glyph", "color")
    }
    shares: dict[str, Any] = {name: float(np.mean(hits)) for name, hits in verdicts.items()}
    return {**shares, "intervals": {name: mean_interval(hits) for name, hits in verdicts.items()}}


def measure_cider(captions: Sequence[str], rows: Any) -> dict[str, Any]:
    """CIDEr against several wordings of the record of each scene."""
    references = [
        [describe(json.loads(scene), random.Random(wording)) for wording in range(NUM_REFERENCES)]
        for scene in rows["scene"]
    ]
    scores = cider_scores(captions, references)
    return {"cider": float(scores.mean()), "intervals": {"cider": mean_interval(scores)}}


class Inception:
    """The network of FID, of torchmetrics: uint8 pictures to features (N, 2048).

    Args:
        device (`torch.device`): Where it works.
    """

    def __init__(self, device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.network, self.device = FrechetInceptionDistance().inception.to(device), device

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Encodes pictures of one size."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        return self.network(pixels.to(self.device)).cpu().numpy()


def open_network(name: str, device: torch.device) -> Any:
    """Gives what turns pictures into features: `Inception`, or the CLIP that ships, of a folder or of the Hub."""
    return Inception(device) if name == INCEPTION else ClipEncoder.from_pretrained(find_checkpoint(name), device)


def in_batches(encode: Callable[[Any], np.ndarray], items: Sequence[Any], batch_size: int) -> np.ndarray:
    """Encodes many things, a few at a time: (N, D)."""
    parts = range(0, len(items), batch_size)
    return np.concatenate([encode(items[start : start + batch_size]) for start in parts])


def encode_pictures(network: Any, pictures: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Encodes many pictures, a few at a time: (N, D)."""
    return in_batches(network.encode_images, [Image.fromarray(picture) for picture in pictures], batch_size)


def measure_fid(
    network: Any, pictures: Sequence[np.ndarray], truth: Sequence[np.ndarray], batch_size: int
) -> dict[str, Any]:
    """Fréchet distance to the true pictures of the same prompts, and beside it that of their own halves."""
    drawn, true = (encode_pictures(network, of_one, batch_size) for of_one in (pictures, truth))
    scores = {
        "fid": frechet_distance(true, drawn),
        "true_halves": sampling_distance(true),
        "num_features": true.shape[1],
        "num_images": len(true),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the rank: said once is enough
        interval = bootstrap_interval(
            lambda index: frechet_distance(true[index], drawn[index]), len(true), num_resamples=NUM_RESAMPLES
        )
    return {**scores, "intervals": {"fid": interval}}


def measure_clip_score(
    encoder: ClipEncoder,
    pictures: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    prompts: list[str],
    batch_size: int,
) -> dict[str, Any]:
    """CLIP score of drawn pictures and, as checks of the ruler, of true pictures and of shuffled prompts."""
    texts = in_batches(encoder.encode_texts, prompts, batch_size)
    drawn, true = (encode_pictures(encoder, of_one, batch_size) for of_one in (pictures, truth))
    scores = {
        "clip_score": clip_scores(drawn, texts),
        "true_pictures": clip_scores(true, texts),
        "shuffled_prompts": clip_scores(drawn, np.roll(texts, 1, axis=0)),
    }
    means: dict[str, Any] = {name: float(values.mean()) for name, values in scores.items()}
    return {**means, "intervals": {name: mean_interval(values) for name, values in scores.items()}}


def read_texts(name: str, column: str, split: str) -> list[str]:
    """Reads texts from a file (`.txt`: all of it one text; `.json`, `.jsonl`, `.csv`, `.parquet`) or a Hub dataset."""
    kind = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}.get(
        name.split(".")[-1]
    )
    if kind is None:
        rows = datasets.load_dataset(name, split=split)
    else:
        fields = {"sample_by": "document"} if kind == "text" else {}
        rows = datasets.load_dataset(kind, data_files=name, split="train", **fields)
    if column not in rows.column_names:
        raise ValueError(f"`text_column`={column!r} is not in {name}, which has {rows.column_names}.")
    return [text for text in rows[column] if text]


def measure_perplexity(pipe: Any, texts: Sequence[str], stride: int | None) -> dict[str, Any]:
    """Perplexity and bits per byte of texts, each as a document of its own.

    What closes a document is not counted, since it is no part of the text.

    Args:
        pipe (`DiffusionPipeline`): Of either family.
        texts (`Sequence[str]`): At least one.
        stride (`int`, *optional*): New tokens of a window of long texts; half of the model's context if left out.

    Returns:
        `dict`: `perplexity`, `bits_per_byte`, `num_tokens` and intervals, for which texts are drawn.
    """
    model = pipe.model.eval()

    def next_log_probs(ids: Sequence[int]) -> np.ndarray:
        row = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].cpu().numpy()

    window = model.config.get_text_config().max_position_embeddings
    sums, counts = [], []
    for text in tqdm(texts, desc="read"):
        ids = pipe.processor.encode_document([{"type": "text", "text": text}])["input_ids"][:-1]
        scores = token_log_probs(next_log_probs, ids, window=window, stride=stride or window // 2)
        sums.append(scores.sum())
        counts.append(len(scores))
    log_probs, num_tokens, num_bytes = (
        np.array(sums),
        np.array(counts),
        np.array([len(text.encode()) for text in texts]),
    )
    totals = {
        "perplexity": lambda index: float(np.exp(-log_probs[index].sum() / num_tokens[index].sum())),
        "bits_per_byte": lambda index: float(-log_probs[index].sum() / np.log(2) / num_bytes[index].sum()),
    }
    intervals = {name: bootstrap_interval(total, len(texts)) for name, total in totals.items()}
    return {**likelihood(log_probs, num_tokens, texts), "num_texts": len(texts), "intervals": intervals}


def measure_zero_shot(pipe: Any, tasks: Sequence[str], **fields: Any) -> Mapping[str, Any]:
    """Accuracy on text tasks; questions begin with the token that documents of the model begin with."""
    tokenizer = copy.deepcopy(pipe.processor.tokenizer)
    first = pipe.processor.encode_document([{"type": "text", "text": "x"}])["input_ids"][0]
    begin = tokenizer.convert_ids_to_tokens(first)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, first)]
    )
    return zero_shot_accuracy(pipe.model, tokenizer, tasks, **fields)
