"""How well tasks are done: held-out rows answered by the pipeline, scored where scenes are exact, and shown."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from hf_mm.data.formats import open_image
from hf_mm.data.icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS, render_glyph
from hf_mm.data.scene_tasks import CONTROL_KINDS
from hf_mm.data.task_templates import IMAGE_SLOTS, Task, answer_last, fill_template, fitting_templates
from hf_mm.data.tasks import write_objects
from hf_mm.evaluation.task_accuracy import box_accuracy, edit_success, structure_adherence
from hf_mm.evaluation.text_accuracy import answer_accuracy, caption_accuracy
from hf_mm.training.samples import save_captioned_grid
from reporting import RunReport
from task_sources import OpenedSource


NUM_COLUMNS = 8
MAX_ANSWER_TOKENS = 96
Scorer = Callable[[Sequence[Any], Dataset, dict[str, Any]], dict[str, float]]


def _score_structure(pictures: Sequence[Any], rows: Dataset, ruler: dict[str, Any]) -> dict[str, float]:
    return structure_adherence(pictures, rows["scene"], **ruler)


def _score_captions(texts: Sequence[Any], rows: Dataset, ruler: dict[str, Any]) -> dict[str, float]:
    words = {"glyphs": ruler["glyphs"], "colors": ruler["colors"], "backgrounds": ruler["backgrounds"]}
    return caption_accuracy(texts, rows["scene"], **words)


SCORERS: dict[str, Scorer] = {
    "edit": lambda pictures, rows, ruler: edit_success(
        pictures, rows["input_scene"], rows["scene"], rows["edit"], **ruler
    ),
    "boxes": lambda pictures, rows, ruler: box_accuracy(pictures, rows["scene"], rows["objects"], **ruler),
    **dict.fromkeys(CONTROL_KINDS, _score_structure),
    **dict.fromkeys(("caption", "long_caption", "dense_caption"), _score_captions),
    **dict.fromkeys(("vqa", "reasoning"), lambda texts, rows, ruler: answer_accuracy(texts, rows["answer"])),
}


def ask(task: Task, row: dict[str, Any]) -> tuple[str, Image.Image | None]:
    """Writes a row as one would ask for its answer: a prompt, `<image>` where its picture stands, and the picture.

    Args:
        task ([`Task`]): The task.
        row (`dict`): With pictures.

    Returns:
        `tuple[str, PIL.Image.Image or None]`: prompt and picture; for a written answer the prompt has no `<image>`.
    """
    parts = [part for part in fill_template(task, row, fitting_templates(task, row)[0])]
    draws = task.answer in IMAGE_SLOTS
    if not draws:  # what follows the answer is the model's to write
        parts = answer_last(parts)
    asked = [part for part in parts if not part["is_answer"]]
    slots = [part["slot"] for part in asked if part["type"] == "image"]
    words = "".join(("<image>" if draws else "") if part["type"] == "image" else part["text"] for part in asked)
    return words, open_image(row[slots[0]]) if slots else None


def answer(pipe: Any, task: Task, rows: Dataset, seed: int, batch_size: int = 32) -> list[Any]:
    """Has a pipeline answer rows: pictures as arrays, or texts."""
    asked = [ask(task, row) for row in rows]
    answers: list[Any] = []
    for start in range(0, len(asked), batch_size):
        prompts, pictures = (list(part) for part in zip(*asked[start : start + batch_size], strict=True))
        images = None if pictures[0] is None else pictures
        if task.answer in IMAGE_SLOTS:
            noise = [torch.Generator().manual_seed(seed + start + number) for number in range(len(prompts))]
            answers += [np.asarray(image) for image in pipe(prompts, image=images, generator=noise).images]
        elif images is not None:
            answers += pipe.caption(images, prompt=prompts, max_new_tokens=MAX_ANSWER_TOKENS)
    return answers


class TaskReport:
    """Answers held-out rows of each source, scores those of embedded scenes, and keeps a table and grids of all steps.

    Args:
        run_report ([`RunReport`]): Gives the pipeline of the model as it stands.
        sources (`Sequence[OpenedSource]`): With held-out rows.
        num_samples (`int`): Examples in a grid.
        seed (`int`): Of the noise.
    """

    def __init__(self, run_report: RunReport, sources: Sequence[OpenedSource], num_samples: int, seed: int) -> None:
        self.run_report, self.num_samples, self.seed = run_report, num_samples, seed
        self.sources = [source for source in sources if source.task is not None and source.task.name != "text"]
        self.folder = run_report.output_dir / "tasks"

    def report(self, step: int) -> None:
        """Answers, scores and shows; to be called by all processes."""
        with self.run_report.pipeline() as pipe:
            if pipe is None:
                return
            scores = {source.name: self._report_source(pipe, source, step) for source in self.sources}
        logged = {f"tasks/{name}/{rate}": value for name, rates in scores.items() for rate, value in rates.items()}
        self.run_report.accelerator.log(logged, step=step)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step-{step:06d}.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
        table = tabulate(self.folder)
        (self.run_report.output_dir / "tasks.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\nStep {step}: tasks in {self.folder}.")

    def _report_source(self, pipe: Any, source: OpenedSource, step: int) -> dict[str, float]:
        """Answers the held-out rows of a source and saves a grid of the first ones."""
        assert source.task is not None
        rows, name = source.held_out, source.name
        answers = answer(pipe, source.task, write_objects(rows), self.seed)
        path = self.folder / f"{name.replace('@', '-').replace('/', '-').replace(':', '-')}-{step:06d}.png"
        self._save_grid(source.task, rows, answers, path)
        if "scene" not in rows.column_names or source.task.name not in SCORERS:
            return {}
        glyph_set = json.loads(rows[0]["scene"])["glyph_set"]
        ruler = {
            "glyphs": GLYPH_SETS[glyph_set],
            "colors": OBJECT_COLORS,
            "backgrounds": BACKGROUND_COLORS,
            "render_glyph": render_glyph,
        }
        return SCORERS[source.task.name](answers, rows, ruler)

    def _save_grid(self, task: Task, rows: Dataset, answers: Sequence[Any], path: Path) -> None:
        """Shows inputs, answers and what was asked for, an example beside the other."""
        shown, captions = [], []
        first = write_objects(rows.select(range(min(self.num_samples, len(rows)))))
        for row, given in zip(first, answers, strict=False):
            words, picture = ask(task, row)
            if picture is not None:
                shown.append(picture)
                captions.append("given: " + words.replace("<image>", " "))
            if task.answer in IMAGE_SLOTS:
                shown += [Image.fromarray(given), open_image(row[task.answer])]
                captions += ["drawn" if picture is not None else f"drawn: {words}", "asked for"]
            else:
                captions[-1] += f" -> {given}"
        if shown:
            per_example = len(shown) // min(len(answers), len(first))
            save_captioned_grid(shown, captions, path, num_columns=NUM_COLUMNS // per_example * per_example)


def tabulate(folder: Path) -> str:
    """Spells the scores of all steps as a Markdown table, a column for each step."""
    files = sorted(folder.glob("step-*.json"))
    by_step = {int(file.stem.removeprefix("step-")): json.loads(file.read_text(encoding="utf-8")) for file in files}
    rates = dict.fromkeys((name, rate) for scores in by_step.values() for name in scores for rate in scores[name])
    lines = [["source", "score", *(f"step {step}" for step in by_step)], ["---"] * (2 + len(by_step))]
    for name, rate in rates:
        values = [scores.get(name, {}).get(rate) for scores in by_step.values()]
        lines.append([name, rate, *("" if value is None else f"{value:.1%}" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
