"""Gives seeded, mostly broken inputs to the doors of the package and counts what is not refused as documented.

python benchmarks/fuzz.py --kinds rows recipes prompts images checkpoints --num_inputs 10000
python benchmarks/fuzz.py --kinds images --seed 0 --index 4711  # one input again, with its traceback

An input is a function of its kind, the seed and its index alone. The command ends with 1 if there are findings.
"""

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: a name that is no folder is not looked up
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import datasets
import diffusers
import torch
import transformers

from fuzzing.checkpoints import CheckpointInputs
from fuzzing.images import ImageInputs
from fuzzing.prompts import PromptInputs
from fuzzing.recipes import RecipeInputs
from fuzzing.rows import RowInputs
from fuzzing.verdicts import Verdict, limit_memory, run_input


KINDS = {
    "rows": RowInputs,
    "recipes": RecipeInputs,
    "prompts": PromptInputs,
    "images": ImageInputs,
    "checkpoints": CheckpointInputs,
}
MAX_SECONDS = 10.0  # of the processor
NUM_SHOWN = 5


@dataclass
class Report:
    """What came of the inputs of a kind."""

    kind: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    doors: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0  # of the processor
    slowest: tuple[float, int] = (0.0, -1)

    def add(self, index: int, verdict: Verdict) -> None:
        """Counts a verdict; findings of one kind of error at one place are one."""
        self.outcomes[verdict.outcome] += 1
        self.doors.setdefault(verdict.door, Counter())[verdict.outcome] += 1
        self.seconds += verdict.seconds
        self.slowest = max(self.slowest, (verdict.seconds, index))
        if verdict.outcome == "finding":
            name = f"{verdict.error.split(':')[0]} at {verdict.place}"
            found = self.findings.setdefault(name, {"example": verdict.error, "door": verdict.door, "indices": []})
            found["indices"].append(index)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is written as JSON."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "kind": self.kind,
            "seed": self.seed,
            "inputs": self.outcomes.total(),
            **{name: self.outcomes[name] for name in ("taken", "refused", "outside", "finding")},
            "seconds": round(self.seconds, 1),
            "slowest": {"seconds": round(self.slowest[0], 2), "index": self.slowest[1]},
            "peak_mib": round(memory),
            "doors": {door: dict(counts) for door, counts in sorted(self.doors.items())},
            "findings": self.findings,
        }

    def to_text(self) -> str:
        """Says it in lines."""
        facts = self.to_dict()
        lines = [
            f"{self.kind}: {facts['inputs']} inputs, {facts['taken']} taken, {facts['refused']} refused, "
            f"{facts['outside']} refused by libraries before, "
            f"{facts['finding']} findings at {len(self.findings)} places; {facts['seconds']} s of the processor, "
            f"slowest {facts['slowest']['seconds']} s, peak {facts['peak_mib']} MiB"
        ]
        for name, found in sorted(self.findings.items(), key=lambda item: -len(item[1]["indices"])):
            lines.append(f"  {len(found['indices'])} x {name} [{found['door']}]")
            lines.append(f"      {found['example'][:200]!r}; indices {found['indices'][:NUM_SHOWN]}")
        return "\n".join(lines)


def run_one(inputs: Any, kind: str, seed: int, index: int) -> Verdict:
    """Draws the input of an index and gives it to its door."""
    rng = Random(f"{kind} {seed} {index}")
    torch.manual_seed(index)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door, call, shown = inputs.draw(rng)
    except Exception as error:  # a fault of this tool, to be seen like any other

        def fail(error: Exception = error) -> None:
            raise error

        door, call, shown = "drawing the input", fail, ""
    return run_input(door, call, shown, MAX_SECONDS)


def fuzz(kind: str, indices: Sequence[int], seed: int = 0) -> Report:
    """Gives inputs of a kind to their doors.

    Args:
        kind (`str`): One of `KINDS`.
        indices (`Sequence[int]`): Which inputs.
        seed (`int`, defaults to 0): Of all of them.
    """
    report = Report(kind, seed)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        inputs = KINDS[kind](Path(folder))
        for index in indices:
            report.add(index, run_one(inputs, kind, seed, index))
    return report


@contextmanager
def quiet() -> Iterator[None]:
    """Switches off what the libraries print about inputs that they refuse, and the cache of prepared rows."""
    libraries = (transformers, diffusers, datasets)
    levels = [library.utils.logging.get_verbosity() for library in libraries]
    for library in libraries:
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    datasets.disable_caching()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.utils.logging.set_verbosity(level)
            library.utils.logging.enable_progress_bar()
        datasets.enable_caching()


def show_one(kind: str, seed: int, index: int) -> int:
    """Runs one input again and prints it with its traceback."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        verdict = run_one(KINDS[kind](Path(folder)), kind, seed, index)
    print(f"{kind} {index}: {verdict.door}\n{verdict.shown}\n{verdict.outcome} {verdict.error}\n{verdict.trace}")
    return int(verdict.outcome == "finding")


def main() -> int:
    """Reads the arguments, runs the inputs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num_inputs", type=int, default=1000, help="Of each kind.")
    parser.add_argument("--start", type=int, default=0, help="Index of the first.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="Run this input alone and show it.")
    parser.add_argument("--memory_gib", type=float, default=8.0, help="An input that needs more fails.")
    parser.add_argument("--output", type=Path, help="JSON file of the reports.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.index is not None:
        return max(show_one(kind, arguments.seed, arguments.index) for kind in arguments.kinds)
    limit_memory(arguments.memory_gib)
    reports = []
    for kind in arguments.kinds:
        start = perf_counter()
        indices = range(arguments.start, arguments.start + arguments.num_inputs)
        reports.append(fuzz(kind, indices, arguments.seed))
        print(f"{reports[-1].to_text()}; {perf_counter() - start:.1f} s in all", flush=True)
    if arguments.output is not None:
        text = json.dumps([report.to_dict() for report in reports], indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(any(report.findings for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
