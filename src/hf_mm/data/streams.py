"""Rows of a stream for one process: each its own, in blocks of a new order, resumed to the exact next row.

The shuffle buffer of `datasets` forgets on resuming what it held. Here rows are read in blocks; a place in the stream
is where its block begins and how much of it is done, so a block is read again, and nothing is lost or seen twice.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from .mixing import SampleKey


class ShuffledStream:
    """Rows of one process without end, with the numbers of their samples.

    Args:
        rows (`IterableDataset`): The same in every process.
        seed (`int`): Of the order.
        block_size (`int`): Rows that are held at a time, and put in a new order.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): All processes.

    Raises:
        ValueError: If a block is empty.
    """

    def __init__(
        self, rows: IterableDataset, seed: int, block_size: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if block_size < 1:
            raise ValueError(f"`block_size`={block_size} must be at least 1. 1 keeps the order.")
        self.rows = split_dataset_by_node(rows, process_index, num_processes)
        self.seed, self.block_size = seed, block_size
        self.process_index, self.num_processes = process_index, num_processes
        self._place: dict[str, Any] = {"epoch": 0, "block": 0, "rows": None, "num_done": 0, "num_samples": 0}

    def state_dict(self) -> dict[str, Any]:
        """Returns the place behind the row that came last, in JSON types."""
        return {**self._place, "num_processes": self.num_processes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a place that `state_dict` returned, before the first row is taken.

        Raises:
            ValueError: If it is of another number of processes, whose shares were others.
        """
        if state["num_processes"] != self.num_processes:
            raise ValueError(
                f"This stream was shared by {state['num_processes']} processes and is now by {self.num_processes}. "
                "Go on with as many."
            )
        self._place = {name: state[name] for name in self._place}

    def __iter__(self) -> Iterator[tuple[SampleKey, dict[str, Any]]]:
        place = self._place
        while True:
            self.rows.set_epoch(place["epoch"])
            if place["rows"] is not None:
                self.rows.load_state_dict(place["rows"])
            reader, is_empty = iter(self.rows), place["block"] == 0
            while block := self._read_block(reader, place):
                is_empty = False
                yield from self._give_block(block, place)
            if is_empty:
                raise ValueError(
                    f"Process {self.process_index} of {self.num_processes} has no rows: the stream has too few."
                )
            place |= {"epoch": place["epoch"] + 1, "block": 0, "rows": None, "num_done": 0}

    def _read_block(self, reader: Iterator[dict[str, Any]], place: dict[str, Any]) -> list[dict[str, Any]]:
        """Reads the next block, having noted where it begins."""
        begin = place["rows"] if place["num_done"] else self.rows.state_dict()
        place["rows"] = begin if place["block"] or place["num_done"] else None
        return list(itertools.islice(reader, self.block_size))

    def _give_block(
        self, block: list[dict[str, Any]], place: dict[str, Any]
    ) -> Iterator[tuple[SampleKey, dict[str, Any]]]:
        """Gives what is left of a block in its order."""
        rng = np.random.default_rng((self.seed, self.process_index, place["epoch"], place["block"]))
        for index in rng.permutation(len(block))[place["num_done"] :]:
            number = place["num_samples"] * self.num_processes + self.process_index
            place |= {"num_done": place["num_done"] + 1, "num_samples": place["num_samples"] + 1}
            yield SampleKey(number, 0, number), block[index]
        place |= {"block": place["block"] + 1, "num_done": 0}


class _Producer(torch.utils.data.IterableDataset):
    """Batches, each with the place behind it, so that a place is right however far a worker is ahead."""

    def __init__(
        self,
        stream: ShuffledStream,
        build: Callable[[dict[str, Any], SampleKey], dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        batch_size: int,
    ) -> None:
        self.stream, self.build, self.collate, self.batch_size = stream, build, collate, batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        reader = iter(self.stream)
        while True:
            documents = [self.build(row, key) for key, row in itertools.islice(reader, self.batch_size)]
            yield self.collate(documents), self.stream.state_dict()


class StreamedBatches:
    """Batches of documents of a stream, in this process or in one worker beside it.

    Args:
        stream ([`ShuffledStream`]): Of this process.
        build (`Callable`): Makes the document of a row and its sample key: `TrainingDocuments.build`.
        collate (`Callable`): Makes a batch of documents.
        batch_size (`int`): Documents of a batch.
        num_workers (`int`, defaults to 0): 0 or 1.

    Raises:
        ValueError: If there are more workers: they would share out the rows anew.
    """

    def __init__(
        self,
        stream: ShuffledStream,
        build: Callable[[dict[str, Any], SampleKey], dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        if num_workers > 1:
            raise ValueError(f"`dataloader_num_workers`={num_workers}: a stream is read by 0 or 1 a process.")
        self.stream, self.producer = stream, _Producer(stream, build, collate, batch_size)
        self.num_workers = num_workers
        self._place = stream.state_dict()
        self._batches: Iterator[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the place behind the batch that came last."""
        return self._place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a place, before the first batch is taken."""
        self.stream.load_state_dict(state)
        self._place = dict(state)

    def __iter__(self) -> "StreamedBatches":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            loader = torch.utils.data.DataLoader(
                self.producer,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # of its own, so that starting workers draws nothing from the global one
            )
            self._batches = iter(loader)
        batch, self._place = next(self._batches)
        return batch


def _as_it_is(value: Any) -> Any:  # noqa: ANN401
    return value
