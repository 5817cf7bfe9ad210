"""The memory bank of a training run: opened, compared with what its neighbours were found in, and prepared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from building import reads_codes, refuse_unfit_rows
from hf_mm.data.image_encoding import read_manifest
from hf_mm.data.neighbors import with_neighbors
from hf_mm.data.retrieved_documents import ROW_NUMBER, MemoryBank, RetrievalArguments
from hf_mm.data.sources import DatasetArguments, open_rows


@dataclass
class TrainingMemory:
    """The rows that a run retrieves from.

    Args:
        arguments ([`RetrievalArguments`]): With neighbours.
        source ([`DatasetArguments`]): The memory bank, as a source of rows.
        rows (`Dataset`): All of it, with a column `row_number`.
        is_own (`bool`): Whether it is the rows of training.
    """

    arguments: RetrievalArguments
    source: DatasetArguments
    rows: Dataset
    is_own: bool

    @classmethod
    def open(
        cls,
        arguments: RetrievalArguments,
        pairs: Dataset,
        data_args: DatasetArguments,
        model: Any,
        open_size: dict[str, Any],
    ) -> "TrainingMemory | None":
        """Opens the memory bank that a recipe names; None for a recipe without retrieval.

        Args:
            arguments ([`RetrievalArguments`]): Of the recipe.
            pairs (`Dataset`): The rows of training, as opened.
            data_args ([`DatasetArguments`]): Where they are from.
            model (`PreTrainedModel`): To be trained.
            open_size (`dict`): As to `open_rows`.

        Raises:
            ValueError: If the model is of a family without retrieval, or the bank is not one that it can read.
        """
        if arguments.neighbors_dir is None:
            return None
        if not reads_codes(model):
            raise ValueError(
                f"`neighbors_dir`={arguments.neighbors_dir!r}: a model of type {model.config.model_type!r} is trained "
                "without retrieval. Leave it out, or train a model of type 'cm3leon'."
            )
        name = arguments.memory_name or data_args.dataset_name
        field = "memory_name" if arguments.memory_name else "dataset_name"
        if read_manifest(name) is None:
            raise ValueError(
                f"`{field}`={name!r} is to be retrieved from, and is no folder of encoded images. Encode the rows "
                "with recipes/encode_images.py as the neighbours were found, and name that folder."
            )
        source = replace(data_args, dataset_name=name, dataset_split="train") if arguments.memory_name else data_args
        is_own = arguments.memory_name is None
        rows = pairs if is_own else open_rows(source, **open_size)
        refuse_unfit_rows(rows, name, model, field=field)
        return cls(arguments, source, rows.add_column(ROW_NUMBER, np.arange(len(rows))), is_own)

    def join(self, pairs: Dataset, name: str) -> Dataset:
        """Adds their neighbours to the rows of training, as opened."""
        return self._join(self.rows if self.is_own else pairs, name, str(self.arguments.neighbors_dir))

    def join_held_out(self, rows: Dataset, name: str) -> Dataset:
        """Adds their neighbours to held-out rows of a source of their own, if the recipe names any."""
        folder = self.arguments.eval_neighbors_dir
        return rows if folder is None else self._join(rows, name, folder)

    def _join(self, rows: Dataset, name: str, folder: str) -> Dataset:
        manifests = {source: read_manifest(source) for source in (name, self.source.dataset_name)}
        if (manifest := manifests[name]) is None:
            raise ValueError(f"{name!r} has neighbours in {folder!r}, but is no folder that encode_images.py wrote.")
        return with_neighbors(
            rows,
            folder,
            rows_digest=manifest["rows_digest"],
            memory=self.rows,
            memory_digest=manifests[self.source.dataset_name]["rows_digest"],  # type: ignore[index]
        )

    def to_bank(self, pairs: Dataset, prepare: Callable[[Dataset, DatasetArguments], Dataset]) -> MemoryBank:
        """Leaves out of the bank what preparation drops and, where it is the rows of training, what is held out.

        Args:
            pairs (`Dataset`): The rows that are trained on, prepared.
            prepare (`Callable`): Prepares rows of a source.
        """
        return MemoryBank.of_numbered(pairs if self.is_own else prepare(self.rows, self.source), len(self.rows))
