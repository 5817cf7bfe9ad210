"""GenEval's prompts, the folders that its own scorer reads, and the sums of what a scorer says.

A scorer is whatever says of each picture whether it is right: GenEval's, with its detector, or another. This file
knows files and verdicts; it knows no model and detects nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from .intervals import mean_interval


CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUM_PROMPTS = 553  # of evaluation_metadata.jsonl as published

Prompt = Mapping[str, Any]
Scorer = Callable[[Path], Iterable[Mapping[str, Any]]]


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Reads prompts from a file in the form of GenEval's `evaluation_metadata.jsonl`.

    Args:
        path (`str`): Of this machine, or a URL that fsspec opens, such as `https://` or `hf://datasets/`.

    Returns:
        `list[dict]`: one a line, each with `prompt`, `tag` and what GenEval's scorer looks for, as in the file.

    Raises:
        ValueError: If a line is not JSON, lacks `prompt` or `tag`, or names another category; or there is none.
    """
    with fsspec.open(path, "r", encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(check_prompt(json.loads(line), f"{path}, line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt. Give GenEval's evaluation_metadata.jsonl, or a file like it.")
    return prompts


def prompts_from_rows(rows: Iterable[Mapping[str, Any]], name: str = "rows") -> list[dict[str, Any]]:
    """Reads prompts from the rows of a dataset, which have a value, perhaps `None`, for every key of any row.

    GenEval's scorer asks whether a key is there, so those without a value go.

    Args:
        rows (`Iterable[Mapping]`): Each with `prompt` and `tag`.
        name (`str`, defaults to `"rows"`): For messages.

    Returns:
        `list[dict]`: as from `read_prompts`.

    Raises:
        ValueError: As in `read_prompts`.
    """
    prompts = [check_prompt(_without_nothing(row), f"{name}, row {number}") for number, row in enumerate(rows)]
    if not prompts:
        raise ValueError(f"{name} holds no prompt. Give GenEval's prompts, or rows like them.")
    return prompts


def check_prompt(prompt: Any, where: str) -> dict[str, Any]:
    """Refuses what is no prompt of GenEval.

    Args:
        prompt (`dict`): Record of a prompt.
        where (`str`): For messages.

    Returns:
        `dict`: the record.

    Raises:
        ValueError: If it lacks `prompt` or `tag`, or the tag is none of `CATEGORIES`.
    """
    if not isinstance(prompt, dict) or not prompt.get("prompt") or "tag" not in prompt:
        raise ValueError(f"{where} has no `prompt` and `tag`: {prompt!r}.")
    if prompt["tag"] not in CATEGORIES:
        raise ValueError(f"{where}: `tag`={prompt['tag']!r} is none of {', '.join(CATEGORIES)}.")
    return prompt


def write_samples(
    folder: str | Path, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]], first: int = 0
) -> None:
    """Writes pictures as GenEval's scorer reads them: a numbered folder a prompt, with its record and its pictures.

    Args:
        folder (`str` or `Path`): Made if it is not there.
        prompts (`Sequence[Mapping]`): Their records.
        images (`Sequence[Sequence[PIL.Image.Image]]`): Pictures of each prompt.
        first (`int`, defaults to 0): Number of the first prompt, where they come in parts.

    Raises:
        ValueError: If the numbers differ, or a prompt has no picture.
    """
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} `prompts` do not go with pictures of {len(images)}. Give some of each.")
    for number, (prompt, of_prompt) in enumerate(zip(prompts, images, strict=True), start=first):
        if not of_prompt:
            raise ValueError(f"`images`[{number - first}] is empty: prompt {prompt['prompt']!r} has no picture.")
        samples = Path(folder) / f"{number:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt), encoding="utf-8")
        for place, image in enumerate(of_prompt):
            image.save(samples / f"{place:04d}.png")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Reads what GenEval's scorer wrote: a JSON line a picture, with `tag`, `prompt` and `correct`."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def summarize_results(results: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Sums up verdicts as GenEval does: the share of right pictures of each category, and the mean of the categories.

    Args:
        results (`Iterable[Mapping]`): Of each picture `tag`, `prompt` and `correct`, as GenEval's scorer writes them.
        seed (`int`, defaults to 0): Of the bootstrap, which draws prompts and not pictures, since those of one prompt
            are right or wrong together.

    Returns:
        `dict`: by category `correct`, `num_images`, `num_prompts` and `interval`; and under `overall` the mean of the
        categories there are, `correct_prompts`, the share of prompts with a right picture, and the counts.

    Raises:
        ValueError: If there is no verdict, or one lacks a field.

    Source: GenEval (arXiv 2310.11513), Sec. 4, and the sums of its published code.
    """
    by_prompt: dict[tuple[str, str], list[bool]] = {}
    for number, result in enumerate(results):
        if missing := {"tag", "prompt", "correct"} - result.keys():
            raise ValueError(f"`results`[{number}] lacks {', '.join(sorted(missing))}: {dict(result)!r}.")
        by_prompt.setdefault((result["tag"], result["prompt"]), []).append(bool(result["correct"]))
    if not by_prompt:
        raise ValueError("`results` is empty: the scorer has seen no picture.")
    summary: dict[str, Any] = {}
    for category in dict.fromkeys(tag for tag, _ in by_prompt):
        verdicts = [of_one for (tag, _), of_one in by_prompt.items() if tag == category]
        summary[category] = {
            "correct": float(np.mean([verdict for of_one in verdicts for verdict in of_one])),
            "num_images": sum(map(len, verdicts)),
            "num_prompts": len(verdicts),
            "interval": mean_interval([float(np.mean(of_one)) for of_one in verdicts], seed=seed),
        }
    summary["overall"] = {
        "correct": float(np.mean([of_one["correct"] for of_one in summary.values()])),
        "correct_prompts": float(np.mean([any(of_one) for of_one in by_prompt.values()])),
        "num_images": sum(map(len, by_prompt.values())),
        "num_prompts": len(by_prompt),
    }
    return summary


def _without_nothing(value: Any) -> Any:
    """Leaves out keys without a value, however deep."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value
