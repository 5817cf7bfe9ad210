"""How scores are shown: as results of a card, as a table, and as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from PIL import Image, ImageDraw

from hf_mm.cards import tabulate_results, without_folders


SHARES = ("scene_correct", "strict_correct", "glyph_correct", "color_correct")
CHECKS = {"true_pictures": "true pictures", "shuffled_prompts": "drawn pictures, shuffled prompts"}
ROW_PX, LABEL_PX, BAR_PX = 18, 520, 400


def list_results(scores: Mapping[str, Any], recipe: Any) -> list[EvalResult]:
    """Spells scores as the Hub does in a card.

    Args:
        scores (`Mapping`): As `scores.json` has them.
        recipe ([`EvaluationRecipe`]): What was asked.

    Returns:
        `list[EvalResult]`: shares from 0 to 1 have the type `accuracy`; intervals are in `metric_args`.
    """
    scores = without_folders(scores)
    scenes = f"held-out scenes of {recipe.glyph_set}"

    def result(task: str, config: str, data: str, name: str, of_one: Mapping[str, Any], kind: str = "accuracy") -> Any:
        interval = of_one.get("intervals", {}).get(name)
        return EvalResult(
            task_type=task,
            dataset_type=f"icon_scenes:{recipe.glyph_set}",
            dataset_name=data,
            dataset_config=config,  # by which cards tell data apart
            dataset_split="validation",
            metric_type=kind,
            metric_name=name.replace("_", " "),
            metric_value=of_one[name],
            metric_args={"interval": list(interval), "confidence": 0.95} if interval else None,
        )

    results = []
    for kind, rates in scores.get("drawn", {}).items():
        data = f"{scenes}, {kind.replace('_', ' ')} ({rates['num_images']})"
        results += [result("text-to-image", kind, data, name, rates) for name in SHARES if name in rates]
    for check, told in CHECKS.items():
        rates = scores.get(check, {})
        results += [
            result("text-to-image", check, f"{scenes}, {told} ({rates['num_images']})", name, rates)
            for name in SHARES[:2]
            if name in rates
        ]
    captions = scores.get("captions", {})
    asked = f"{scenes}, captions of single objects ({recipe.num_captions})"
    results += [
        result("image-to-text", "single_object", asked, name, captions) for name in captions if name != "intervals"
    ]
    if "cider" in scores:
        results.append(result("image-to-text", "single_object", asked, "cider", scores["cider"], "cider"))
    if "fid" in scores:
        data = f"{scenes}, {scores['fid']['num_images']} pictures by {scores['fid']['network']}"
        results.append(result("text-to-image", scores["fid"]["network"], data, "fid", scores["fid"], "fid"))
        halves = {"fid_of_true_halves": scores["fid"]["true_halves"]}
        results.append(result("text-to-image", scores["fid"]["network"], data, "fid_of_true_halves", halves, "fid"))
    if "clip_score" in scores:
        of_one = scores["clip_score"]
        data = f"{scenes}, by {of_one['network']}"
        results.append(result("text-to-image", of_one["network"], data, "clip_score", of_one, "clip_score"))
    if "perplexity" in scores:
        of_one = scores["perplexity"]
        data = f"{of_one['texts']} ({of_one['num_texts']} texts)"
        results += [
            result("text-generation", of_one["texts"], data, name, of_one, name)
            for name in ("perplexity", "bits_per_byte")
        ]
    for task, of_one in scores.get("zero_shot", {}).items():
        told = f"{task} ({of_one['num_questions']})" if task != "mean" else "mean of the tasks"
        rated = {"accuracy": of_one["accuracy"]}
        if "interval" in of_one:
            rated["intervals"] = {"accuracy": of_one["interval"]}
        results.append(result("text-generation", f"zero_shot {task}", f"zero-shot {told}", "accuracy", rated))
    return results


def write_report(scores: Mapping[str, Any], recipe: Any, folder: Path) -> None:
    """Writes `scores.json`, `scores.md` and `scores.png`.

    Args:
        scores (`Mapping`): By metric.
        recipe ([`EvaluationRecipe`]): What was asked.
        folder (`Path`): Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"recipe": vars(recipe), **scores}, indent=2), encoding="utf-8")
    results = list_results(scores, recipe)
    (folder / "scores.md").write_text(tabulate_results(results) + "\n", encoding="utf-8")
    shares = [result for result in results if result.metric_type == "accuracy"]
    if shares:
        draw_shares(shares).save(folder / "scores.png")


def draw_shares(results: Sequence[EvalResult]) -> Image.Image:
    """Draws shares as bars, with a line over the interval of each."""
    picture = Image.new("RGB", (LABEL_PX + BAR_PX + 70, ROW_PX * len(results) + 30), "white")
    pen = ImageDraw.Draw(picture)
    for tick in range(0, 101, 25):
        across = LABEL_PX + BAR_PX * tick / 100
        pen.line([(across, 5), (across, picture.height - 20)], fill="#dddddd")
        pen.text((across - 8, picture.height - 16), f"{tick}%", fill="black")
    for row, result in enumerate(results):
        top = 5 + row * ROW_PX
        pen.text((5, top + 2), f"{result.dataset_name}: {result.metric_name}", fill="black")
        pen.rectangle((LABEL_PX, top + 3, LABEL_PX + BAR_PX * result.metric_value, top + ROW_PX - 4), fill="#8fbbe0")
        low, high = (result.metric_args or {}).get("interval", [result.metric_value] * 2)
        middle = top + ROW_PX // 2
        pen.line([(LABEL_PX + BAR_PX * low, middle), (LABEL_PX + BAR_PX * high, middle)], fill="#1f4e79", width=2)
        pen.text((LABEL_PX + BAR_PX + 20, top + 2), f"{result.metric_value:.1%}", fill="black")
    return picture


def keep_earlier_scores(folder: Path, recipe: Any, free: Sequence[str] = ("metrics",)) -> dict[str, Any]:
    """Reads the scores of other metrics that were measured in a folder before, of the same configuration.

    Args:
        folder (`Path`): Where the scores are to go.
        recipe ([`EvaluationRecipe`]): What is asked now.
        free (`Sequence[str]`, defaults to `("metrics",)`): Fields that may have changed.

    Returns:
        `dict`: by metric, and `weights`, a hash of those that were measured; empty where there are none.

    Raises:
        ValueError: If the folder has scores of another configuration.
    """
    path = folder / "scores.json"
    if not path.is_file() or recipe.overwrite_output_dir:
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    before, now = earlier.pop("recipe", {}), vars(recipe)
    fields = (now.keys() & before.keys()) - {*free, "overwrite_output_dir"}
    changed = {name: (before[name], now[name]) for name in fields if before[name] != now[name]}
    if changed:
        told = ", ".join(f"`{name}` was {old!r} and is {new!r}" for name, (old, new) in sorted(changed.items()))
        raise ValueError(
            f"`output_dir`={str(folder)!r} holds scores of another configuration: {told}. Name another folder, or "
            "pass `--overwrite_output_dir`."
        )
    return earlier
