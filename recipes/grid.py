"""Grids of trainings and evaluations, each run once: what recipes/reproduce.py and recipes/scaling.py share.

A grid is variants times budgets times seeds. What is finished is not run again, also for another grid that asks for
the same; a training that was cut goes on from its last checkpoint.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_mm.data.fingerprints import digest_text
from hf_mm.data.shards import write_json
from hf_mm.recipe_launch import read_command
from training_cost import edit_model, measure_cost


HERE = Path(__file__).parent
QUICK_STEPS = 8
QUICK_COUNT = 16
NOT_QUICK = "cider"  # a metric that needs a word, which models of a few steps do not write
NUM_LOG_LINES = 15
RUNNING: set[subprocess.Popen[bytes]] = set()  # what is to end when this process is ended


@dataclass
class GridArguments:
    """What is trained and scored, and where that goes."""

    name: str = field(metadata={"help": "Of the experiment: of its files."})
    claim: str = field(metadata={"help": "What is tested, in a sentence, with the table of the paper."})
    variants: list[str] = field(
        metadata={
            "help": "Each `name: words`. Words are those of the training recipe's command line, or "
            "`checkpoint=FOLDER`, which is not trained; `model.FIELD=VALUE` changes a field of the model's "
            "file, and `steps=N,N` gives the variant budgets of its own."
        }
    )
    evaluations: list[str] = field(
        metadata={
            "help": "Each `name: words`. Words are a script of recipes/ and its fields, `{seed}` standing for the "
            "seed; or the pattern of a JSON file that training leaves in its folder, of which the last counts."
        }
    )
    comparisons: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Each `metric: A > B` or `metric: A < B`, or differences `A - B > C - D`. An operand is "
            "`variant`, with `@budget` or `/evaluation` behind it where there are several, or `:metric`, another one."
        },
    )
    common: str = field(default="", metadata={"help": "Words of every variant."})
    prepare: list[str] = field(
        default_factory=list, metadata={"help": "Each `file: words`: what is run first where that file is missing."}
    )
    train_flops: list[float] = field(
        default_factory=list, metadata={"help": "Budgets by counted training FLOPs, which give the steps."}
    )
    train_steps: list[int] = field(default_factory=list, metadata={"help": "Budgets by steps."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of training and of evaluation."})
    output_dir: str = field(default="runs/reproductions", metadata={"help": "For models; shared between grids."})
    results_dir: str = field(default="docs/reproductions", metadata={"help": "For raw results and tables."})
    num_parallel: int = field(default=1, metadata={"help": "Trainings and evaluations at once."})
    quick: bool = field(
        default=False,
        metadata={"help": "A few steps, pictures and one seed, to see that all runs; results stay in output_dir."},
    )

    def __post_init__(self) -> None:
        """Refuses a grid that says nothing, or twice the same."""
        for name in ("variants", "evaluations", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty. Name at least one.")
        if self.train_flops and self.train_steps:
            raise ValueError("`train_flops` and `train_steps` are both given. A grid has budgets of one kind.")
        if self.num_parallel < 1:
            raise ValueError(f"`num_parallel`={self.num_parallel} must be at least 1.")
        for name in ("variants", "evaluations"):
            names = [split_name(text, name)[0] for text in getattr(self, name)]
            if twice := sorted({one for one in names if names.count(one) > 1}):
                raise ValueError(f"`{name}` has {twice} twice. Give each another name.")
        if self.quick:
            self.seeds = self.seeds[:1]
            self.comparisons = [text for text in self.comparisons if NOT_QUICK not in text]


def split_name(text: str, where: str) -> tuple[str, str]:
    """Splits `name: words`.

    Raises:
        ValueError: If there is no name or nothing behind it.
    """
    name, colon, words = text.partition(": ")
    if not (colon and name.strip() and words.strip()):
        raise ValueError(f"`{where}` has {text!r}. Write `name: words`.")
    return name.strip(), words.strip()


@dataclass(frozen=True)
class Variant:
    """One way of training, or a checkpoint."""

    name: str
    checkpoint: str | None
    words: tuple[str, ...]
    edits: tuple[str, ...]
    steps: tuple[int, ...]

    @property
    def config(self) -> str:
        """The training recipe that the words name.

        Raises:
            ValueError: If they name none.
        """
        if "--config" not in self.words[:-1]:
            raise ValueError(f"`variants`: {self.name!r} names no `--config` to train by, and no `checkpoint=`.")
        return self.words[self.words.index("--config") + 1]


def parse_variant(text: str, common: str) -> Variant:
    """Reads one entry of `variants`.

    Raises:
        ValueError: If it is to be trained and is a checkpoint as well.
    """
    name, rest = split_name(text, "variants")
    words = shlex.split(common) + shlex.split(rest)
    own = {
        prefix: [word for word in words if word.startswith(prefix)] for prefix in ("checkpoint=", "model.", "steps=")
    }
    left = tuple(word for word in words if not word.startswith(tuple(own)))
    checkpoint = own["checkpoint="][-1].partition("=")[2] if own["checkpoint="] else None
    if checkpoint and (left or own["model."]):
        raise ValueError(f"`variants`: {name!r} is a checkpoint, which takes no words of training: {left}.")
    steps = tuple(int(number) for word in own["steps="] for number in word.partition("=")[2].split(","))
    return Variant(name, checkpoint, left, tuple(own["model."]), steps)


@dataclass(frozen=True)
class Cell:
    """A variant with a budget and a seed."""

    variant: Variant
    budget: str
    max_steps: int | None
    cost: Mapping[str, float] | None
    seed: int
    folder: Path


def digest(*parts: Any) -> str:
    """Names what was asked for, in a few letters."""
    return digest_text(json.dumps(parts, sort_keys=True))[:10]


def run_script(words: Sequence[str], log: Path, num_parallel: int) -> None:
    """Runs a script of recipes/ to its end, its output in a file.

    Raises:
        RuntimeError: If it fails; with the last lines of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max((os.cpu_count() or 1) // num_parallel, 1))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    command = [sys.executable, str(HERE / words[0]), *words[1:]]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        RUNNING.add(process)
        code = process.wait()
        RUNNING.discard(process)
    if code:
        said = "\n".join(log.read_text(encoding="utf-8").splitlines()[-NUM_LOG_LINES:])
        raise RuntimeError(f"{spell(words)} ended with {code}. The end of {log}:\n{said}")


def spell(words: Sequence[str]) -> str:
    """The command as it is typed."""
    return f"python recipes/{shlex.join(words)}"


def plan_cells(grid: GridArguments) -> list[Cell]:
    """Lists the cells of a grid, having counted what a step of each costs where its budget is FLOPs."""
    cells: list[Cell] = []
    for text in grid.variants:
        variant = parse_variant(text, grid.common)
        if variant.checkpoint is not None:
            folder = Path(grid.output_dir) / f"{Path(variant.checkpoint).name}-{digest(variant.checkpoint)}"
            cells += [Cell(variant, "", None, None, seed, folder / f"seed-{seed}") for seed in grid.seeds]
            continue
        if not (budgets := variant.steps or (*grid.train_steps, *grid.train_flops)):
            raise ValueError(f"`variants`: {variant.name!r} has no budget. Give `train_flops` or `train_steps`.")
        pretrains = Path(read_command(Path(variant.config))[1]).name == "pretrain.py"
        if variant.edits and not pretrains:
            raise ValueError(f"`variants`: {variant.name!r} goes on from a model, so {variant.edits} change nothing.")
        model = edit_model(variant.config, variant.edits) if pretrains else None
        base = Path(grid.output_dir) / f"{Path(variant.config).stem}-{digest(variant.words, model)}"
        cost = read_cost(variant, model, base, grid) if model is not None else None
        for budget in budgets[:1] if grid.quick else budgets:
            steps = QUICK_STEPS if grid.quick else find_steps(budget, cost, variant)
            folder = base / f"{steps}-steps"
            cells += [Cell(variant, f"{budget:g}", steps, cost, seed, folder / f"seed-{seed}") for seed in grid.seeds]
    return cells


def find_steps(budget: float, cost: Mapping[str, float] | None, variant: Variant) -> int:
    """Steps of a budget: a number of them, or as many as its FLOPs pay for."""
    if isinstance(budget, int):
        return budget
    if cost is None:
        raise ValueError(f"`train_flops` cannot be counted for {variant.config}; give {variant.name!r} `steps=`.")
    return max(round(budget / cost["counted_flops_per_step"]), 2)


def read_cost(variant: Variant, model: Mapping[str, Any], folder: Path, grid: GridArguments) -> dict[str, float]:
    """What a step of pretraining costs, counted once; the model's file comes into the folder too."""
    write_json(folder / "model.json", model)
    if not (folder / "cost.json").exists():
        words = [*variant.words, "--config_name", str(folder / "model.json")]
        write_json(folder / "cost.json", measure_cost(words, text_tokenizer_dir(variant, grid)))
    return json.loads((folder / "cost.json").read_text(encoding="utf-8"))


def text_tokenizer_dir(variant: Variant, grid: GridArguments) -> Path:
    """Where the text tokenizer of all runs on the same rows is, learned from those of the recipe's own seed."""
    return Path(grid.output_dir) / "text_tokenizers" / digest(variant.words)


def training_words(cell: Cell, grid: GridArguments) -> list[str]:
    """The command that trains a cell."""
    _, script = read_command(Path(cell.variant.config))
    words = [Path(script).name, *cell.variant.words]
    if cell.cost is not None:
        words += ["--config_name", str(cell.folder.parents[1] / "model.json")]
        words += ["--tokenizer_name", str(text_tokenizer_dir(cell.variant, grid) / "text_tokenizer")]
        words += ["--eval_steps", "none", "--sample_steps", "none", "--num_samples", "4"]
    else:  # tuning scores its tasks at the end
        words = [*(shrink(words) if grid.quick else words), "--eval_steps", str(cell.max_steps)]
    steps = cell.max_steps or 0
    fields = {
        "max_steps": steps,
        "warmup_steps": steps // 20,
        "save_steps": max(steps // 2, 1),
        "save_total_limit": 1,
        "logging_steps": min(20, steps),
        "seed": cell.seed,
        "output_dir": cell.folder,
    }
    return words + [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


def train_cell(cell: Cell, grid: GridArguments) -> tuple[str, dict[str, Any]]:
    """Trains a cell that is not trained yet; returns its checkpoint, and what is recorded of the training."""
    if cell.variant.checkpoint is not None:
        return cell.variant.checkpoint, {"train_command": None}
    mark = cell.folder / "trained.json"
    if not mark.exists():
        words, began = training_words(cell, grid), time.monotonic()
        run_script(words, cell.folder / "log.txt", grid.num_parallel)
        write_json(mark, {"train_command": spell(words), "seconds_of_last_launch": time.monotonic() - began})
    record = json.loads(mark.read_text(encoding="utf-8"))
    record["max_steps"] = steps = cell.max_steps or 0
    if cell.cost is not None:
        per_step = {name.removesuffix("_per_step"): value for name, value in cell.cost.items() if "_per_step" in name}
        record |= {name: value * steps for name, value in per_step.items()}
        record["num_parameters"] = cell.cost["num_parameters"]
    return str(cell.folder), record


def evaluate_cell(cell: Cell, model: str, evaluation: str, grid: GridArguments) -> dict[str, Any]:
    """Scores a cell by one evaluation, if that is not done yet."""
    name, text = split_name(evaluation, "evaluations")
    first, *words = [word.replace("{seed}", str(cell.seed)) for word in shlex.split(text)]
    if not first.endswith(".py"):
        if not (paths := sorted(Path(model).glob(first))):
            raise ValueError(f"`evaluations`: {name!r} reads {Path(model) / first}, which is not there.")
        return {"evaluation": name, "evaluation_command": None, "scores": read_scores(paths[-1])}
    if "{seed}" not in text:
        words += ["--seed", str(1000 + cell.seed)]  # of scenes and noise, other than those of training
    words = shrink(words) if grid.quick else words
    folder = cell.folder / "evaluations" / f"{name}-{digest(first, words)}"
    command = [first, *words, "--model_name_or_path", model, "--output_dir", str(folder)]
    if not (folder / "done.json").exists():
        run_script(command, folder / "log.txt", grid.num_parallel)
        write_json(folder / "done.json", {"command": spell(command)})
    return {"evaluation": name, "evaluation_command": spell(command), "scores": read_scores(folder / "scores.json")}


def shrink(words: Sequence[str]) -> list[str]:
    """Lowers every number of scenes or captions that is asked for, for a quick look."""
    counts = {place + 1 for place, word in enumerate(words) if word.startswith("--num_")}
    lowered = [str(min(int(word), QUICK_COUNT)) if place in counts else word for place, word in enumerate(words)]
    return [word for word in lowered if word != NOT_QUICK]


def read_scores(path: Path) -> dict[str, float]:
    """Reads the numbers of a JSON file by the names that lead to them, but for the recipe's own and for intervals.

    Those are of one run alone; what is compared here varies between seeds.
    """

    def walk(content: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(content, dict | list):
            items = content.items() if isinstance(content, dict) else enumerate(content)
            for key, value in items:
                if key == "intervals":
                    continue
                yield from walk(value, f"{name}.{key}" if name else str(key))
        elif isinstance(content, int | float) and not isinstance(content, bool):
            yield name, float(content)

    content = json.loads(path.read_text(encoding="utf-8"))
    return dict(walk({key: value for key, value in content.items() if key != "recipe"}, ""))


def run_grid(grid: GridArguments) -> list[dict[str, Any]]:
    """Runs what is missing of a grid and writes one line of raw results for each cell and evaluation.

    Args:
        grid ([`GridArguments`]): The grid.

    Returns:
        `list[dict]`: the rows, by variant, budget, seed and evaluation.

    Raises:
        RuntimeError: If a script fails, after the other cells; rows that are done are in the file.
    """
    for text in grid.prepare:
        target, words = split_name(text, "prepare")
        if not Path(target).exists():
            run_script(shlex.split(words), Path(grid.output_dir) / f"prepare-{digest(text)}.txt", 1)
    cells = plan_cells(grid)

    def run(cell: Cell) -> list[dict[str, Any]] | RuntimeError:
        about = {"experiment": grid.name, "variant": cell.variant.name, "budget": cell.budget, "seed": cell.seed}
        try:
            model, record = train_cell(cell, grid)
            return [about | record | evaluate_cell(cell, model, text, grid) for text in grid.evaluations]
        except RuntimeError as error:
            return error

    pool = ThreadPoolExecutor(grid.num_parallel)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found = list(tqdm(pool.map(run, cells), total=len(cells), desc=grid.name))
    finally:  # interrupted, it starts no further cell, and a training that runs saves where it is
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.terminate()
    rows = [row for of_cell in found if not isinstance(of_cell, RuntimeError) for row in of_cell]
    path = results_path(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if errors := [str(of_cell) for of_cell in found if isinstance(of_cell, RuntimeError)]:
        raise RuntimeError(f"{len(errors)} of {len(cells)} cells failed; the same command goes on.\n" + errors[0])
    return rows


def results_path(grid: GridArguments) -> Path:
    """The file of raw results; of a quick look not among the real ones."""
    folder = Path(grid.output_dir) / "quick" if grid.quick else Path(grid.results_dir)
    return folder / f"{grid.name}.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads raw results; a file that is not there has none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
