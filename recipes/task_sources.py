"""The sources of instruction tuning: tasks on named datasets or embedded scenes, conversations, and rehearsed pairs.

Rows are opened and checked, their pictures encoded once with the model's own image tokenizer, into the run's folder.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, Features, Image, concatenate_datasets
from diffusers import AutoencoderKL, VQModel

from building import find_image_tokenizer
from encode_images import CodeEncoder, LatentEncoder
from hf_mm.data.documents import DocumentLimit
from hf_mm.data.fingerprints import digest_encoder
from hf_mm.data.image_encoding import Encoder, encode_rows, load_encoded, raw_pixels
from hf_mm.data.scene_tasks import scene_task_dataset
from hf_mm.data.sources import EMBEDDED
from hf_mm.data.task_documents import TaskSourceRows
from hf_mm.data.tasks import (
    SOURCES,
    TASKS,
    Task,
    conversation_parts,
    fill_template,
    fitting_templates,
    load_messages,
    load_task_rows,
    write_objects,
)


CHAT = "chat"
NUM_SHARDS = 8
NUM_TEXT_SCENES = 500  # of each task, for a tokenizer
NUM_TEXT_ROW_SCENES = 2500  # of each task, for a model to read


@dataclass
class SourceArguments:
    """What is tuned on. Each source is read as rows of its task, and its pictures are encoded once."""

    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "A name of the table of tasks (instruct_pix2pix, vqa_v2, ...), or task@dataset: edit@my/edits, "
            "vqa@icon_scenes:shapes, chat@my/conversations."
        },
    )
    source_shares: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Shares of the sources in what is read; none: alike. Each source is read at most 3 and at least "
            "0.3 times as often as by its rows (CM3Leon, Sec. 4)."
        },
    )
    clips_shares: bool = field(default=True, metadata={"help": "Whether shares are held within these bounds."})
    num_task_scenes: int = field(default=20_000, metadata={"help": "Rows of a task on embedded scenes."})
    rehearsal_share: float = field(
        default=0.2, metadata={"help": "Share of pairs of pretraining, `dataset_name`; 0: none."}
    )
    num_eval_rows: int = field(default=64, metadata={"help": "Held-out rows of each source."})

    def __post_init__(self) -> None:
        """Refuses what names nothing."""
        if not self.sources:
            raise ValueError("`sources` is empty. Name a source or more, such as edit@icon_scenes:shapes.")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"`sources`={self.sources} has an entry twice. Give it a larger share instead.")
        if self.source_shares and len(self.source_shares) != len(self.sources):
            raise ValueError(
                f"`source_shares` has {len(self.source_shares)} entries and `sources` {len(self.sources)}."
            )
        if not 0 <= self.rehearsal_share < 1:
            raise ValueError(f"`rehearsal_share`={self.rehearsal_share} must be at least 0 and below 1.")


class OpenedSource(NamedTuple):
    """Rows of a source with their pictures; `task` is None for conversations."""

    name: str
    task: Task | None
    rows: Dataset
    held_out: Dataset


class PictureEncoder(NamedTuple):
    """How a model's pictures are encoded: the encoder, its stride in pixels, and what identifies it."""

    encode: Encoder
    stride: int
    identity: dict[str, Any]

    @classmethod
    def of(cls, model: Any, accelerator: Accelerator) -> "PictureEncoder":
        """Takes the model's own image tokenizer; models without see pixels."""
        tokenizer = find_image_tokenizer(model)
        if tokenizer is None:
            return cls(raw_pixels, 1, {"image_tokenizer_name": None})
        identity = {"image_tokenizer_name": "the model's", "weights": digest_encoder(tokenizer)}
        stride = 2 ** (len(tokenizer.config.block_out_channels) - 1)
        if isinstance(tokenizer, VQModel):
            return cls(CodeEncoder(tokenizer, accelerator.device), stride, identity)
        assert isinstance(tokenizer, AutoencoderKL)
        return cls(LatentEncoder(tokenizer, accelerator.device), stride, identity)


def open_source(spec: str, arguments: SourceArguments, image_size: int, seed: int) -> OpenedSource:
    """Opens the rows of a source, and sets some aside.

    Args:
        spec (`str`): As in `sources`.
        arguments (`SourceArguments`): Numbers of rows.
        image_size (`int`): Pixels at which embedded scenes are drawn.
        seed (`int`): Of embedded scenes, and of what is set aside.

    Raises:
        ValueError: If the source names no task, or its rows do not fit it.
    """
    name, _, dataset_name = spec.partition("@")
    drawn = {"glyph_set": dataset_name.removeprefix(EMBEDDED), "size_px": image_size, "seed": seed}
    if not dataset_name:
        if name not in SOURCES:
            raise ValueError(f"`sources`: {name!r} is unknown. Write task@dataset, or one of {sorted(SOURCES)}.")
        task = TASKS[SOURCES[name].task]
        return _set_aside(spec, task, load_task_rows(name), arguments.num_eval_rows, seed)
    if name != CHAT and name not in TASKS:
        raise ValueError(f"`sources`: {spec!r} names the task {name!r}. Choose one of {[*sorted(TASKS), CHAT]}.")
    task = TASKS.get(name)  # none for conversations
    if not dataset_name.startswith(EMBEDDED):
        rows = load_messages(dataset_name) if task is None else load_task_rows(name, dataset_name=dataset_name)
        return _set_aside(spec, task, rows, arguments.num_eval_rows, seed)
    return OpenedSource(
        spec,
        task,
        write_objects(scene_task_dataset(name, arguments.num_task_scenes, split="train", **drawn)),
        scene_task_dataset(name, arguments.num_eval_rows, split="validation", **drawn),
    )


def load_task_texts(specs: Sequence[str], image_size: int, seed: int) -> Dataset:
    """Loads the texts of documents of tuning as text-only rows: the language that tasks are asked in, no task.

    Args:
        specs (`list[str]`): Sources.
        image_size (`int`): Pixels of pictures, which boxes are told in proportion to.
        seed (`int`): Of embedded scenes.
    """
    texts = iterate_task_texts(specs, image_size, seed, num_scenes=NUM_TEXT_ROW_SCENES)
    return Dataset.from_dict({"text": [text.strip() for text in texts]})


def iterate_task_texts(
    specs: Sequence[str], image_size: int, seed: int, *, num_scenes: int = NUM_TEXT_SCENES
) -> Iterator[str]:
    """Yields the texts of documents of tuning, for a text tokenizer to learn from.

    Args:
        specs (`list[str]`): Sources.
        image_size (`int`): Pixels of pictures, which boxes are told in proportion to.
        seed (`int`): Of embedded scenes.
        num_scenes (`int`): Of each task that draws them.
    """
    arguments = SourceArguments(sources=list(specs), num_task_scenes=num_scenes) if specs else None
    for spec in specs:
        source = open_source(spec, arguments, image_size, seed)
        slots = [name for name, kind in source.rows.features.items() if not isinstance(kind, Image)]
        for row in source.rows if source.task is None else source.rows.select_columns(slots):
            for parts in list_documents(source.task, row):
                for kind, segment in itertools.groupby(parts, key=itemgetter("type")):
                    if kind == "text":
                        yield "".join(part["text"] for part in segment)


def list_documents(task: Task | None, row: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Lists the documents that a row may become, one for each template that it fits; conversations become one."""
    if task is None:
        return [[part for part in conversation_parts(row["messages"]) if part["type"] != "end_of_turn"]]
    return [fill_template(task, row, number) for number in fitting_templates(task, row)]


def _set_aside(spec: str, task: Task | None, rows: Dataset, num_rows: int, seed: int) -> OpenedSource:
    """Sets rows aside, a tenth of all at most; a single one is on both sides."""
    if len(rows) < 2:
        return OpenedSource(spec, task, rows, rows)
    parts = rows.train_test_split(max(1, min(num_rows, len(rows) // 10)), seed=seed)
    return OpenedSource(spec, task, parts["train"], parts["test"])


def keep_fitting(source: OpenedSource, limit: DocumentLimit) -> Dataset:
    """Leaves out rows whose longest document exceeds a window, and says how many.

    Raises:
        ValueError: If none is left.
    """

    def fits(row: dict[str, Any]) -> bool:
        documents = list_documents(source.task, row)
        return bool(documents) and all(limit.count(parts) + len(parts) <= limit.max_tokens for parts in documents)

    texts = [name for name, kind in source.rows.features.items() if not isinstance(kind, Image)]
    fitting = source.rows.select_columns(texts).map(
        lambda row: {"fits": fits(row)}, remove_columns=texts, desc=f"Measuring {source.name}"
    )
    kept = np.flatnonzero(fitting["fits"])
    if len(kept) == 0:
        raise ValueError(
            f"`sources`: no row of {source.name!r} fits into the {limit.max_tokens} positions of a window "
            "(`window_length`, at most the model's own)."
        )
    if len(kept) < len(source.rows):
        print(f"{source.name}: {len(source.rows) - len(kept)} of {len(source.rows)} rows are too long and left out.")
    return source.rows.select(kept) if len(kept) < len(source.rows) else source.rows


def encode_source(
    name: str,
    task: Task | None,
    rows: Dataset,
    encoder: PictureEncoder,
    image_size: int,
    folder: Path,
    accelerator: Accelerator,
) -> TaskSourceRows:
    """Encodes the pictures of a source, all slots one behind the other, or takes what is there from a run before.

    To be called by all processes, each of which encodes its share.

    Args:
        name (`str`): Of the source.
        task ([`Task`], *optional*): None for conversations and rehearsed pairs.
        rows (`Dataset`): With pictures.
        encoder ([`PictureEncoder`]): Of the model.
        image_size (`int`): Pixels that pictures are cropped and resized to.
        folder (`Path`): For the encoded pictures.
        accelerator (`Accelerator`): Of the run.
    """
    if "messages" in rows.column_names:
        pictures, places = flatten_messages(rows)
    else:
        slots = [column for column, kind in rows.features.items() if isinstance(kind, Image)]
        parts = [
            rows.select_columns([slot]).rename_columns({slot: "image"} if slot != "image" else {}) for slot in slots
        ]
        pictures = concatenate_datasets(parts) if parts else None
        places = {slot: np.arange(len(rows)) + number * len(rows) for number, slot in enumerate(slots)}
        rows = rows.remove_columns(slots)
    if pictures is None or len(pictures) == 0:
        return TaskSourceRows(name, rows, None, places, task)
    encode_rows(
        pictures,
        encoder.encode,
        image_size=image_size,
        output_dir=folder,
        encoder_config=encoder.identity,
        stride=encoder.stride,
        num_shards=min(NUM_SHARDS, len(pictures)),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    return TaskSourceRows(name, rows, load_encoded(folder), places, task)


def flatten_messages(rows: Dataset) -> tuple[Dataset | None, dict[str, np.ndarray]]:
    """Lists the pictures of conversations in order, and where those of each row begin."""

    def take(batch: dict[str, list]) -> dict[str, list]:
        held = [
            part["image"]
            for messages in batch["messages"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        return {"image": held}

    counts = [
        sum(part["type"] == "image" for message in messages for part in message["content"] if isinstance(part, dict))
        for messages in rows["messages"]
    ]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    pictures = rows.map(
        take, batched=True, remove_columns=rows.column_names, features=Features({"image": Image()}), desc="Pictures"
    )
    return pictures, {"messages": starts}


def spell_shares(sources: Sequence[TaskSourceRows], shares: dict[str, float]) -> str:
    """Says as a Markdown table what is read how often."""
    lines = ["| source | rows | share |", "|---|---|---|"]
    lines += [f"| {source.name} | {len(source.rows)} | {shares[source.name]:.1%} |" for source in sources]
    return "\n".join(lines)
