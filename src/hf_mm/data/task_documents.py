"""Rows of many tasks under one numbering, and what a row's document holds: its template, filled, pictures in place.

Knows rows, templates and arrays; neither tokens nor a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .cm3_masking import refuse_unread
from .formats import RowError
from .task_templates import Task, answer_last, conversation_parts, fill_template, fitting_templates


TASK = "task"
Part = dict[str, Any]


@dataclass
class TaskArguments:
    """How documents of tasks are laid out and trained on."""

    train_on_inputs: bool = field(
        default=True, metadata={"help": "Whether questions and inputs are targets too, as in both papers."}
    )
    answer_masking_share: float = field(
        default=0.5,
        metadata={
            "help": "Models of codes: share of documents whose written answer is masked whole and whose drawn answer "
            "stands last; the others are masked at random, as in pretraining. Causal documents all end with it. Ours."
        },
    )
    instruction_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of drawn answers to a picture that leave out the words, for guidance by the picture alone."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        for name in ("answer_masking_share", "instruction_dropout"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}`={vars(self)[name]} must be in [0, 1].")


@dataclass
class TaskSourceRows:
    """Rows of one source, their pictures encoded.

    Args:
        name (`str`): Of the source.
        rows (`Dataset`): Text slots of a task, or `messages`, or captions of pairs.
        pictures (`Dataset`, *optional*): The encoded pictures of all rows.
        places (`Mapping[str, np.ndarray]`): For each picture slot the number of each row's picture; of conversations
            under `messages` the number of each row's first.
        task ([`Task`], *optional*): None for conversations and for the pairs of pretraining.
    """

    name: str
    rows: Dataset
    pictures: Dataset | None
    places: Mapping[str, np.ndarray]
    task: Task | None = None

    def read(self, number: int) -> dict[str, Any]:
        """Returns a row with the arrays of its pictures."""
        row = dict(self.rows[number])
        if "messages" in self.places:
            return {TASK: None, "messages": self._fill_messages(row["messages"], int(self.places["messages"][number]))}
        pictures = {slot: self._picture(int(places[number])) for slot, places in self.places.items()}
        if self.task is None:  # a pair: its picture is the row's, unless rows were encoded before the run
            return row | pictures.get("image", {})
        return row | pictures | {TASK: self.task}

    def _picture(self, place: int) -> dict[str, Any]:
        """Returns the arrays of a picture."""
        if self.pictures is None:
            raise ValueError(f"Source {self.name!r} has no encoded pictures.")
        return dict(self.pictures[place])

    def _fill_messages(self, messages: Sequence[Mapping[str, Any]], place: int) -> list[dict[str, Any]]:
        """Puts the arrays of pictures into the parts of a conversation."""
        filled = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            of_message: list[Part] = []
            for part in parts:
                if part["type"] == "image":
                    of_message.append({"type": "image", "image": self._picture(place)})
                    place += 1
                else:
                    of_message.append({"type": "text", "text": part["text"]})
            filled.append({"role": message["role"], "content": of_message})
        return filled


class TaskRows:
    """Rows of all sources under one numbering, first source first.

    Args:
        sources (`Sequence[TaskSourceRows]`): At least one.
    """

    def __init__(self, sources: Sequence[TaskSourceRows]) -> None:
        if not sources:
            raise ValueError("`sources` is empty. Name at least one.")
        self.sources = list(sources)
        self.ends = np.cumsum([len(source.rows) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of all sources, and of their encoded pictures."""
        parts = [part for source in self.sources for part in (source.rows, source.pictures) if part is not None]
        return sorted({name for part in parts for name in part.column_names})

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns a row with the arrays of its pictures, and its task."""
        source = int(np.searchsorted(self.ends, number, side="right"))
        start = 0 if source == 0 else int(self.ends[source - 1])
        return self.sources[source].read(number - start)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several rows."""
        return [self[number] for number in numbers]

    def weights(self, shares: Mapping[str, float]) -> np.ndarray:
        """Spreads the share of each source evenly over its rows: an array of a weight for each row."""
        return np.concatenate(
            [np.full(len(source.rows), shares[source.name] / len(source.rows)) for source in self.sources]
        )


@dataclass
class TaskContent:
    """Fills a template of a row's task, drawn with the sample's generator.

    Args:
        arguments ([`TaskArguments`]): Dropout.
        puts_answer_last (`bool`): Whether the answer follows what it answers, for models that read causally, or
            stands where the template has it.
    """

    arguments: TaskArguments
    puts_answer_last: bool

    @classmethod
    def for_objective(cls, arguments: TaskArguments, objective: str | None) -> "TaskContent":
        """Lays documents out for an objective.

        Args:
            arguments ([`TaskArguments`]): Of the recipe.
            objective (`str`, *optional*): `"cm3"` or `"causal"`; none for models that read no codes.

        Raises:
            ValueError: If answers are to be masked in documents without spans.
        """
        refuse_unread(arguments, {"answer_masking_share": TaskArguments.answer_masking_share}, objective)
        return cls(arguments, puts_answer_last=objective != "cm3")

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> list[Part]:
        """Returns the parts of a document, pictures with their arrays."""
        if row[TASK] is None:
            return [self._place(part, part) for part in conversation_parts(row["messages"])]
        task: Task = row[TASK]
        templates = fitting_templates(task, row)
        if not templates:
            raise RowError(f"A row of task {task.name!r} fills none of its templates: {task.slots()}.")
        template = templates[int(torch.randint(len(templates), (1,), generator=generator))]
        draw = torch.rand((), generator=generator)
        parts = fill_template(task, row, template)
        if draw < self.arguments.instruction_dropout and task.draws_from_picture:
            parts = drop_words(parts)
        if self.puts_answer_last:
            parts = answer_last(parts)
        return [self._place(part, {"image": row[part["slot"]]} if part["type"] == "image" else {}) for part in parts]

    @staticmethod
    def _place(part: Part, held: Mapping[str, Any]) -> Part:
        """Puts a picture's arrays into its part."""
        if part["type"] != "image":
            return dict(part)
        return {"type": "image", "is_answer": part["is_answer"], **held["image"]}


def drop_words(parts: Sequence[Part]) -> list[Part]:
    """Leaves out the words between the first picture and the answer, so that the picture alone is followed."""
    first = next(number for number, part in enumerate(parts) if part["type"] == "image")
    return [part for number, part in enumerate(parts) if number <= first or part["type"] == "image"]
