"""How well tasks are done: held-out rows answered by the pipeline, scored where scenes are exact, and shown."""

import json
from collections.abc import Callable, Sequence
from functools import partial
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
from hf_mm.training.trackers import log_to_trackers
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


def find_pictures(contents: Sequence[Sequence[dict[str, Any]]], rows: Dataset) -> list[np.ndarray]:
    """Takes the first picture of each answer; what has none counts as black."""
    sizes = [last_picture(row["messages"]).size for row in rows]
    drawn = [[part["image"] for part in content if part["type"] == "image"] for content in contents]
    return [np.asarray((found or [Image.new("RGB", size)])[0]) for found, size in zip(drawn, sizes, strict=True)]


def last_picture(messages: Sequence[dict[str, Any]]) -> Image.Image | None:
    """Finds the last picture of a conversation."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    return open_image(pictures[-1]) if pictures else None


SCORERS: dict[str, Scorer] = {
    "edit": lambda pictures, rows, ruler: edit_success(
        pictures, rows["input_scene"], rows["scene"], rows["edit"], **ruler
    ),
    "chat": lambda contents, rows, ruler: edit_success(
        find_pictures(contents, rows), rows["input_scene"], rows["scene"], rows["edit"], **ruler
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


def converse(pipe: Any, rows: Dataset, seed: int) -> list[list[dict[str, Any]]]:
    """Has a pipeline give the last answer of conversations: the content of its message for each."""
    answers = []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(seed + number)
        answers.append(pipe.chat(row["messages"][:-1], generator=generator)["content"])
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
        self.sources = [source for source in sources if source.task is None or source.task.name != "text"]
        self.folder = run_report.output_dir / "tasks"

    def report(self, step: int) -> None:
        """Answers, scores and shows; to be called by all processes."""
        with self.run_report.pipeline() as pipe:
            if pipe is None:
                return
            answers = {source.name: self._answer(pipe, source, step) for source in self.sources}
        scores = {source.name: score(source, answers[source.name]) for source in self.sources}
        self._save_gallery(answers, step)
        logged = {f"tasks/{name}/{rate}": value for name, rates in scores.items() for rate, value in rates.items()}
        log_to_trackers(self.run_report.accelerator, logged, step)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step-{step:06d}.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
        table = tabulate(self.folder)
        (self.run_report.output_dir / "tasks.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\nStep {step}: tasks in {self.folder}.")

    def _answer(self, pipe: Any, source: OpenedSource, step: int) -> list[Any]:
        """Answers the held-out rows of a source and saves a grid of the first ones."""
        if source.task is None:
            answers = converse(pipe, source.held_out, self.seed)
        else:
            answers = answer(pipe, source.task, write_objects(source.held_out), self.seed)
        cells = self._show(source, answers, self.num_samples, with_target=True)
        if cells:
            per_example = max(1, len(cells) // min(len(answers), self.num_samples))
            name = source.name.replace("@", "-").replace("/", "-").replace(":", "-")
            path = self.folder / f"{name}-{step:06d}.png"
            num_columns = NUM_COLUMNS // per_example * per_example
            save_captioned_grid(
                [cell[0] for cell in cells], [cell[1] for cell in cells], path, num_columns=num_columns
            )
        return answers

    def _save_gallery(self, answers: dict[str, list[Any]], step: int) -> None:
        """Saves one grid of all sources, a row of inputs and answers of each that has as many."""
        cells: list[tuple[Image.Image, str]] = []
        for source in self.sources:
            row = self._show(source, answers[source.name], NUM_COLUMNS, with_target=False)[:NUM_COLUMNS]
            cells += row if len(row) == NUM_COLUMNS else []
        if cells:
            path = self.folder / f"gallery-{step:06d}.png"
            save_captioned_grid(
                [cell[0] for cell in cells], [cell[1] for cell in cells], path, num_columns=NUM_COLUMNS
            )

    @staticmethod
    def _show(
        source: OpenedSource, answers: Sequence[Any], num_examples: int, *, with_target: bool
    ) -> list[tuple[Image.Image, str]]:
        """Lists pictures with their words of the first rows of a source."""
        first = source.held_out.select(range(min(num_examples, len(answers))))
        pairs = zip(first if source.task is None else write_objects(first), answers, strict=False)
        show = show_conversation if source.task is None else partial(show_example, source.task)
        return [cell for row, given in pairs for cell in show(row, given, with_target=with_target)]


def score(source: OpenedSource, answers: Sequence[Any]) -> dict[str, float]:
    """Scores the answers to held-out rows where their scenes are exact; nothing of other sources."""
    rows, name = source.held_out, "chat" if source.task is None else source.task.name
    if "scene" not in rows.column_names or name not in SCORERS:
        return {}
    glyph_set = json.loads(rows[0]["scene"])["glyph_set"]
    ruler = {
        "glyphs": GLYPH_SETS[glyph_set],
        "colors": OBJECT_COLORS,
        "backgrounds": BACKGROUND_COLORS,
        "render_glyph": render_glyph,
    }
    return SCORERS[name](answers, rows, ruler)


def show_example(task: Task, row: dict[str, Any], given: Any, *, with_target: bool) -> list[tuple[Image.Image, str]]:
    """Shows an answered row: what was given, what came, and what was asked for, each with its words.

    Args:
        task ([`Task`]): The task.
        row (`dict`): With pictures.
        given (`np.ndarray` or `str`): The answer.
        with_target (`bool`): Whether to show the picture asked for beside the one drawn.

    Returns:
        `list[tuple[PIL.Image.Image, str]]`: pictures with their captions; a written answer has one picture.
    """
    words, picture = ask(task, row)
    if task.answer not in IMAGE_SLOTS:
        return [] if picture is None else [(picture, f"{words} -> {given}")]
    shown = (Image.fromarray(given), f"drawn: {words}" if picture is None else "drawn")
    cells = [shown] if picture is None else [(picture, words.replace("<image>", " ").strip()), shown]
    return [*cells, (open_image(row[task.answer]), "asked for")] if with_target else cells


def show_conversation(
    row: dict[str, Any], given: Sequence[dict[str, Any]], *, with_target: bool
) -> list[tuple[Image.Image, str]]:
    """Shows the end of a conversation as `show_example` does: the last picture, what was said then, and the answer."""
    before, content = row["messages"][:-1], row["messages"][-2]["content"]
    said = content if isinstance(content, str) else " ".join(part["text"] for part in content if part["text"])
    written = " ".join(part["text"] for part in given if part["type"] == "text")
    picture, drawn = last_picture(before), last_picture([{"content": given}])
    cells = [] if picture is None else [(picture, said if drawn else f"{said} -> {written}")]
    cells += [] if drawn is None else [(drawn, f"drawn: {written}" if written else "drawn")]
    wanted = last_picture(row["messages"][-1:])
    return [*cells, (wanted, "asked for")] if with_target and wanted is not None else cells


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
