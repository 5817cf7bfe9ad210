"""Rows of every format, changed, for the doors of the data: checks, preparation, tasks, documents, retrieval."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_mm.data.captions import CaptionArguments, prepare_encoded, prepare_pairs, row_weights, sample_caption
from hf_mm.data.cm3_masking import CM3Masking
from hf_mm.data.documents import DocumentLimit, load_texts, prepare_documents, prepare_pictures
from hf_mm.data.formats import ROW_FORMATS, check_columns, check_row, iterate_captions, load_rows
from hf_mm.data.mixing import DocumentArguments, SampleKey
from hf_mm.data.retrieval import as_document
from hf_mm.data.retrieval_vectors import embed_rows
from hf_mm.data.retrieved_documents import MemoryBank, RetrievedPairs
from hf_mm.data.task_boxes import convert_boxes, crop_boxes, format_boxes, parse_boxes
from hf_mm.data.task_documents import TaskArguments, TaskContent
from hf_mm.data.tasks import TASKS, check_task_row, load_messages, load_task_rows
from hf_mm.data.training_documents import CodeDocuments, NoisedDocuments

from .images import encode_picture
from .models import build_pipelines
from .values import NUMBERS, damage, mutate, odd_text, odd_value


SPECIALS = ("<s>", "</s>", "<pad>")


class RowInputs:
    """Draws rows and the door that they are given to.

    Args:
        folder (`Path`): For datasets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "rows"
        self.pipelines = build_pipelines()
        self.tokenizer = self.pipelines["transfusion"].processor.tokenizer
        self.encoder = SimpleNamespace(
            name="fuzz",
            dimension=3,
            fingerprint=lambda: "fuzz",
            encode_texts=self._vectors,
            encode_images=self._vectors,
        )

    @staticmethod
    def _vectors(items: list[Any], *_: Any, **__: Any) -> np.ndarray:
        return np.full((len(items), 3), 3**-0.5, dtype=np.float32)

    def draw(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Returns the name of a door, a call of it, and the input as text."""
        doors = {
            self._check: 0.2,
            self._task: 0.2,
            self._boxes: 0.1,
            self._document: 0.15,
            self._retrieval: 0.1,
            self._prepare: 0.12,
            self._load: 0.1,
            self._file: 0.03,
        }
        (make,) = rng.choices(list(doors), list(doors.values()))
        door, call, value = make(rng)
        return door, call, f"{value!r}"[:800]

    def _picture(self, rng: Random) -> Any:
        """Draws a stored picture, as datasets hold them; mostly whole."""
        return {"bytes": encode_picture(rng), "path": None}

    def _row(self, row_format: str, rng: Random) -> dict[str, Any]:
        """Draws a row of a format, changed or not."""
        row: dict[str, Any]
        if row_format == "pair":
            row = {"image": self._picture(rng), "text": odd_text(rng, 300), "description": odd_text(rng, 60)}
            row |= {"keywords": [odd_text(rng, 20), "star"], "categories": ["icons"], "has_people": rng.random() < 0.5}
            row |= {"aesthetic_score": rng.choice(NUMBERS), "id": rng.randrange(9)}
            for name in rng.sample(list(row), rng.choice((0, 2, 4))):
                del row[name]
        elif row_format == "document":
            part = {"type": "image", "image": self._picture(rng), "text": None}
            row = {
                "content": [{"type": "text", "text": odd_text(rng, 300), "image": None}, part][: rng.choice((0, 1, 2))]
            }
        else:
            content: Any = odd_text(rng, 200)
            if rng.random() < 0.5:
                content = [{"type": "image", "image": self._picture(rng)}, {"type": "text", "text": content}]
            row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": odd_text(rng)}]}
        return mutate(row, rng) if rng.random() < 0.6 else row

    def _task_row(self, name: str, rng: Random) -> dict[str, Any]:
        """Draws a row of a task, changed or not."""
        task, picture = TASKS[name], self._picture(rng)
        slots = {slot for number in range(len(task.templates)) for slot in task.slots(number)}
        row: dict[str, Any] = {}
        for slot in sorted(slots):
            row[slot] = picture if slot in task.image_slots else odd_text(rng, 200)
        if "objects" in row:
            row["objects"] = self._objects(rng)
        return mutate(row, rng) if rng.random() < 0.5 else row

    def _objects(self, rng: Random) -> Any:
        """Draws boxes."""
        objects = [
            {
                "label": odd_text(rng, 30) or "star",
                "box": [rng.choice((0, 1, 2.5, -1, 5, 31, 64, 1e9)) for _ in range(4)],
            }
            for _ in range(rng.choice((0, 1, 2, 9)))
        ]
        return mutate(objects, rng) if rng.random() < 0.5 else objects

    def _check(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        row_format = rng.choice(list(ROW_FORMATS))
        row = self._row(row_format, rng)
        if row_format == "pair" and rng.random() < 0.5:

            def caption() -> None:
                check_row(row, 3, "pair")
                sample_caption(row, torch.Generator())

            return "check_row and sample_caption", caption, row
        return "check_row", lambda: check_row(row, 3, row_format), row

    def _task(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        name = rng.choice(list(TASKS))
        row = self._task_row(name, rng)
        return "check_task_row", lambda: check_task_row(name, row, 3), (name, row)

    def _boxes(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        objects, size = self._objects(rng), rng.choice(((32, 64), (64, 32), (1, 1), (31, 31)))
        kind = rng.random()
        if kind < 0.25:
            return "format_boxes", lambda: format_boxes(objects, size), objects
        if kind < 0.5:
            return "crop_boxes", lambda: crop_boxes(objects, size), objects
        if kind < 0.75:
            members = objects if isinstance(objects, list) else []
            columns = {
                name: [item.get(name) for item in members if isinstance(item, dict)] for name in ("label", "box")
            }
            given = rng.choice((objects, columns, mutate(columns, rng)))
            kinds = {"label_key": "label", "box_key": rng.choice(("box", ["x", "y", "w", "h"]))}
            kinds["box_format"] = rng.choice(("xyxy", "xywh", "fractions"))
            return "convert_boxes", lambda: convert_boxes(given, size, **kinds), (given, kinds)
        text = rng.choice(("star at location (0, 1) -> (2, 3)", odd_text(rng))) + odd_text(rng)
        return "parse_boxes", lambda: parse_boxes(text), text

    def _document(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        """Builds what is trained on of rows that were checked, or encoded."""
        family = rng.choice(("transfusion", "cm3leon"))
        row: dict[str, Any] = {"text": odd_text(rng, 1000) or "x", "codes": list(range(16))}
        if family == "transfusion":
            row["latent_mean"], row["latent_std"] = np.zeros((3, 8, 8)).tolist(), np.ones((3, 8, 8)).tolist()
        if rng.random() < 0.3:
            part = {"type": "image", **{name: row[name] for name in row if name != "text"}}
            row = {"content": [{"type": "text", "text": row["text"]}, part]}
        if rng.random() < 0.3:
            name = rng.choice(("codes", "text") if family == "cm3leon" else ("text",))
            holder = row["content"][name == "codes"] if "content" in row else row
            holder[name] = rng.choice(
                (mutate([holder[name]], rng), odd_text(rng), rng.choice(NUMBERS), [99] * 16, None)
            )
        fields: dict[str, Any] = {"seed": 0, "max_tokens": rng.choice((None, 64))}
        if rng.random() < 0.2:
            arguments = TaskArguments()
            fields["task_content"] = TaskContent(arguments, family == "transfusion")
            row = {"task": TASKS["caption"], "caption": odd_text(rng, 300) or "x", "image": row}
        rows, processor = [row], self.pipelines[family].processor

        def build() -> None:
            documents: Any
            if family == "transfusion":
                documents = NoisedDocuments(
                    rows, processor=processor, image_size=8, latent_shape=(3, 8, 8), arguments=DocumentArguments(),
                    sample_timesteps=self.pipelines[family].model.timestep_sampler(), **fields
                )  # fmt: skip
            else:
                config = self.pipelines[family].model.config
                names = ("break", "eos", "eoss", "first_sentinel")
                ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in names}
                masking = CM3Masking(num_sentinel_tokens=config.num_sentinel_tokens, max_spans=7, **ids)
                documents = CodeDocuments(
                    rows, processor=processor, masking=masking, arguments=DocumentArguments(), **fields
                )
            documents[SampleKey(rng.randrange(9), 0, 0)]

        return f"{family} training document", build, row

    def _retrieval(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        kind = rng.random()
        row = self._row(rng.choice(("pair", "document")), rng)
        row = row if isinstance(row, dict) else {"keywords": row}
        if kind < 0.4:
            row |= {"codes": [1, 2]} if rng.random() < 0.2 else {}
            return "as_document", lambda: as_document(row), row
        if kind < 0.7:
            asking = mutate({"neighbor_ids": [0, 1, 2], "row_number": 1}, rng)
            memory = MemoryBank(Dataset.from_dict({"text": ["a", "b", "c"], "codes": [[1]] * 3}))
            pairs = RetrievedPairs(memory, counts=[0, 1, 2], query_caption_dropout=0.1)
            return "retrieved pairs", lambda: pairs.draw(asking, "Row 3", torch.Generator()), asking
        rows = self._dataset([row], rng)
        if rows is None:
            return "as_document", lambda: as_document(row), row
        shutil.rmtree(self.folder, ignore_errors=True)
        return "embed_rows", lambda: embed_rows(rows, self.encoder, self.folder, query_dropout=None), row

    def _dataset(self, rows: list[dict[str, Any]], rng: Random) -> Dataset | None:
        """Makes a dataset of rows; None where Arrow cannot hold them."""
        try:
            return Dataset.from_list(rows)
        except Exception:  # Arrow raises nearly every type on values that do not fit each other
            return None

    def _rows(self, row_format: str, rng: Random) -> tuple[Dataset, list[dict[str, Any]]]:
        """Draws a dataset of a few rows of a format."""
        for _ in range(20):
            rows = [self._row(row_format, rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
            made = self._dataset(rows, rng)
            if made is not None:
                return made, rows
        return Dataset.from_dict({"text": ["x"]}), [{"text": "x"}]

    def _prepare(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        row_format = rng.choice(("pair", "pair", "document"))
        rows, shown = self._rows(row_format, rng)
        limit = DocumentLimit(64, 18, self.tokenizer)
        share = rng.choice((0.01, 1.0, 1.0))
        if row_format == "document":
            return (
                "prepare_documents",
                lambda: prepare_documents(rows, reserved=SPECIALS, limit=limit, max_unreadable_share=share),
                shown,
            )
        if rng.random() < 0.1:
            return "prepare_pictures", lambda: prepare_pictures(rows, max_unreadable_share=share), shown
        fields: dict[str, Any] = {"max_unreadable_share": share, "max_caption_tokens": rng.choice((None, 5, 40))}
        fields |= {"people": rng.choice(("keep", "drop", "only"))} if rng.random() < 0.3 else {}
        fields |= {"min_aesthetic_score": 0.5} if rng.random() < 0.3 else {}
        fields |= {"near_duplicate_distance": 3} if rng.random() < 0.3 else {}
        if rng.random() < 0.15 and "image" in rows.column_names:
            return (
                "prepare_encoded",
                lambda: prepare_encoded(
                    rows.remove_columns("image"), CaptionArguments(**fields), tokenizer=self.tokenizer
                ),
                shown,
            )

        def prepare() -> None:
            arguments = CaptionArguments(**fields)
            prepared, report = prepare_pairs(rows, arguments, tokenizer=self.tokenizer, reserved=SPECIALS)
            report.to_markdown()
            row_weights(prepared, CaptionArguments(people_oversampling=2.0) if "people" in fields else arguments)
            for row in prepared:
                if not sample_caption(row, torch.Generator()):
                    raise AssertionError("an empty caption was let through")

        return "prepare_pairs", prepare, (fields, shown)

    def _load(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        """Saves rows, and loads them as pairs, documents, conversations, texts or rows of a task."""
        shutil.rmtree(self.folder, ignore_errors=True)
        kind = rng.choice(("pair", "document", "conversation", "task", "task", "text"))
        if kind == "task":
            name = rng.choice(list(TASKS))
            shown = [self._task_row(name, rng) for _ in range(rng.choice((1, 2)))]
            rows = self._dataset(shown, rng)
            if rows is None or name in ("canny", "scribble", "hed", "depth", "normals", "pose", "segmentation"):
                return "check_task_row", lambda: check_task_row(name, shown[0], 3), (name, shown)
            self._save(rows)
            columns = (
                {rng.choice(rows.column_names): odd_text(rng, 20)} if rng.random() < 0.1 and rows.column_names else {}
            )
            share = rng.choice((0.0, 0.9))
            return (
                "load_task_rows",
                lambda: load_task_rows(name, dataset_name=self.folder, columns=columns, max_misfit_share=share),
                (name, columns, shown),
            )
        rows, shown = self._rows("pair" if kind == "text" else kind, rng)
        self._save(rows)
        if kind == "conversation":
            return "load_messages", lambda: load_messages(self.folder, max_misfit_share=rng.choice((0.0, 0.9))), shown
        if kind == "text":
            column = rng.choice(("text", "description", "image", odd_text(rng, 20)))
            return "load_texts", lambda: load_texts(self.folder, column=column, reserved=SPECIALS), (column, shown)
        names = ("image_column", "text_column", "description_column", "keywords_column", "has_people_column")
        options = {name: rng.choice(("text", "image.bytes", "content", "x.y", odd_text(rng, 20))) for name in
                   rng.sample(names, rng.choice((0, 0, 0, 1, 2)))}  # fmt: skip

        def load() -> None:
            for _ in iterate_captions(load_rows(self.folder, **options)):
                pass

        return "load_rows", load, (options, shown)

    def _save(self, rows: Dataset) -> None:
        rows.save_to_disk(self.folder)

    def _file(self, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        """Writes rows as a file of JSON lines, CSV or parquet, damaged or not, and loads it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        ending = rng.choice((".jsonl", ".csv", ".parquet", ".json"))
        path = self.folder / f"rows{ending}"
        rows = [
            {"image": "a.png", "text": odd_text(rng, 60), "n": odd_value(rng, 0)} for _ in range(rng.choice((0, 1, 3)))
        ]
        if ending == ".parquet":
            made = self._dataset(rows, rng) or Dataset.from_dict({"text": ["x"]})
            made.to_parquet(path)
        elif ending == ".csv":
            lines = ["image,text", *(f"{row['image']},{row['text']}" for row in rows)]
            path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        else:
            lines = [json.dumps(row, default=str) for row in rows]
            path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        if rng.random() < 0.5:
            path.write_bytes(damage(path.read_bytes(), rng))

        def load() -> None:
            check_columns(load_rows(path), "pair")

        return f"load_rows {ending}", load, path.read_bytes()[:400]
