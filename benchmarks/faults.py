"""Kills the recipes again and again with SIGKILL, goes on with the same command, and compares the end by bytes.

python benchmarks/faults.py --kills 100 --output faults.json
python benchmarks/faults.py --kinds index --kills 20 --seed 7
python benchmarks/faults.py --kinds encode --replay 7   # the kills of one run, told one by one

Four kinds of work run as users run them, on toy sizes: pretraining, encoding of images, building of an index, and
publishing, to a Hub on loopback. Each is run once undisturbed, and once more to see that it always ends alike. Then
runs are launched and killed, up to `--kills_per_run` times each, until one ends; whatever it leaves, each file of it,
must be what the undisturbed run left. Half of the kills come at a random moment of the undisturbed run's length, which
is how files are hit while libraries write them; the other half at a random one of its file operations (a file opened
for writing, renamed, removed; a folder made; a connection), between which a moment by the clock hardly falls.

Libraries are imported once, and every launch is a fork of that process, so that a launch takes the seconds of its work
alone. What is not compared: seconds and minutes that a run took, in its history and its card. What is left out of
publishing: the start of a process that loads the model without hf_mm, which writes nothing and takes half a minute.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
REPO = "me/model"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "socket.connect"}
TIMES = re.compile(rb'"step_seconds": [\d.e-]+|^.*\b(?:minutes|hours)\b.*$', re.MULTILINE)
CAPTIONS = ["a red star on a white background", "two blue boxes left of a green moon", "an orange kite"]


@dataclass(frozen=True)
class Work:
    """One kind of work: a recipe and its command line; folders are named from where it is launched."""

    recipe: str
    words: str


WORK = {
    "train": Work(
        "pretrain",
        "--config_name ../inputs/model.json --num_scenes 23 --vocab_size 300 --max_steps 60 --save_steps 4 "
        "--per_device_train_batch_size 4 --learning_rate 0.01 --logging_steps 1 --mixed_precision no --report_to none "
        "--num_samples 2 --sample_steps 20 --ema_decay 0.9 --output_dir run",
    ),
    "encode": Work(
        "encode_images",
        "--num_scenes 43 --image_size 16 --num_shards 7 --batch_size 2 --image_tokenizer_name ../inputs/vae "
        "--output_dir run",
    ),
    "index": Work(
        "build_retrieval_index",
        "--num_scenes 43 --image_size 17 --num_shards 5 --batch_size 4 --clip_name ../inputs/clip "
        "--index_factory IVF3,SQ8 --max_relevance 0.9999 --max_similarity 0.9999 --output_dir run",
    ),
    "publish": Work("publish", f"--model_name_or_path ../inputs/model --repo_id {REPO}"),
}


@dataclass(frozen=True)
class Kill:
    """When a launch is killed: after seconds, or at an operation on files by its number."""

    seconds: float | None = None
    operation: int | None = None


@dataclass
class Count:
    """What came of the runs of one kind."""

    seconds_undisturbed: float = 0.0
    num_operations: int = 0
    num_kills: int = 0
    num_launches: int = 0
    num_runs: int = 0
    faults: list[str] = field(default_factory=list)


class Operations:
    """Counts a process's operations on files and connections, and kills it at one of them."""

    def __init__(self, last: int | None) -> None:
        self.number, self.last = 0, last

    def __call__(self, event: str, arguments: tuple) -> None:
        """Is told every event that Python audits."""
        if event == "open":
            mode, flags = arguments[1:]
            if not (set(mode or "") & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in CHANGES:
            return
        if self.number == self.last:
            os.write(2, f"\nkilled at operation {self.number}: {event} {arguments[0]!r}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.number += 1


def fork(work: Callable[[], Any], folder: Path, last_operation: int | None = None) -> int:
    """Starts work in a process of its own, in a folder beside which it writes what it says; returns its number."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    number = os.fork()
    if number:
        with suppress(ProcessLookupError):  # it has ended already
            os.setpgid(number, number)  # on both sides, so that it can be killed at once
        return number
    status = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        operations = Operations(last_operation)
        sys.addaudithook(operations)
        work()
        folder.with_suffix(".count").write_text(str(operations.number))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(number: int, seconds: float | None = None) -> int | None:
    """Waits for a process, at most so long; returns its exit code, None where it was killed."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.killpg(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return None


def launch(kind: str, folder: Path, kill: Kill = Kill()) -> bool:  # noqa: B008
    """Launches a kind of work in a folder; returns whether it ended, False where it was killed."""
    main, words = import_module(WORK[kind].recipe).main, WORK[kind].words.split()
    status = wait(fork(lambda: main(words), folder, kill.operation), kill.seconds)
    if status:
        raise RuntimeError(f"{kind} does not go on:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    return status == 0


def serve(pipe: Any) -> None:
    """Keeps a Hub on loopback, tells what it holds when asked, and then forgets it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer

    os.dup2(os.open(Path(os.environ["HF_HOME"]).with_name("hub.log"), os.O_WRONLY | os.O_CREAT), 2)

    with HubServer() as server:
        pipe.send(server.environment(os.environ["HF_HOME"]))
        while pipe.recv() == "tell":
            with server.lock:
                repos = {
                    f"{name}@{commit.message}-{number}": {
                        path: hashlib.sha256(server.read(file)).hexdigest() for path, file in commit.files.items()
                    }
                    for name, repo in server.repos.items()
                    for number, commit in enumerate(repo.commits.values())
                }
                server.repos.clear()
                server.large.clear()
            pipe.send(repos)


def read_folder(folder: Path) -> dict[str, str]:
    """Digests all that a run left, but for the time it took."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    digests = {}
    for path in paths:
        content = path.read_bytes()
        if path.name in ("history.jsonl", "README.md"):
            content = TIMES.sub(b"", content)
        digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return digests


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Says what differs."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            yield f"{name} is left over"
        elif name not in found:
            yield f"{name} is missing"
        elif found[name] != wanted[name]:
            yield f"{name} differs"


def make_inputs(folder: Path) -> None:
    """Makes the toy models that the recipes read."""
    import torch
    from diffusers import AutoencoderKL
    from micro_run import MICRO_MODEL
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from hf_mm.data.text_tokenizer import end_captions, train_text_tokenizer

    (folder / "model.json").write_text(json.dumps(MICRO_MODEL))
    torch.manual_seed(0)
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 6), norm_num_groups=2, latent_channels=3, scaling_factor=None, **sides)
    vae.save_pretrained(folder / "vae")
    tokenizer = end_captions(train_text_tokenizer(CAPTIONS * 2, vocab_size=311), 29)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 29}
    vision = {**tower, "image_size": 12, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=19))
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    clip.save_pretrained(folder / "clip")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder / "clip")


class Trial:
    """Runs one kind of work, undisturbed and killed.

    Args:
        kind (`str`): Of work.
        scratch (`Path`): Folder for everything.
        hub (`Any`): The pipe to the Hub.
        seed (`int`): Of the kills.
        kills_per_run (`int`): At most so many before a run is let end.
    """

    def __init__(self, kind: str, scratch: Path, hub: Any, seed: int, kills_per_run: int) -> None:
        self.kind, self.scratch, self.hub, self.seed, self.kills_per_run = kind, scratch, hub, seed, kills_per_run
        self.count = Count()
        self.wanted: dict[str, Any] = {}

    def prepare(self) -> None:
        """Runs undisturbed, twice: what differs between these two is no matter of kills."""
        self.forget()
        folder = self.scratch / self.kind
        began = time.monotonic()
        launch(self.kind, folder)
        self.count.seconds_undisturbed = round(time.monotonic() - began, 2)
        self.count.num_operations = int(folder.with_suffix(".count").read_text())
        self.wanted = self.read(folder)
        if self.kind == "train":
            shutil.copytree(folder / "run", self.scratch / "inputs" / "model")
        self.forget()
        launch(self.kind, self.scratch / f"{self.kind}-again")
        self.count.faults += [f"undisturbed: {fault}" for fault in self.compare(self.scratch / f"{self.kind}-again")]

    def forget(self) -> None:
        """Empties the cache of datasets, so that killed runs draw their rows again."""
        shutil.rmtree(self.scratch / "home" / "datasets", ignore_errors=True)
        self.hub.send("tell")
        self.hub.recv()

    def read(self, folder: Path) -> dict[str, Any]:
        """Reads what a run left: its folder, or every commit that the Hub has."""
        if self.kind != "publish":
            return read_folder(folder)
        self.hub.send("tell")
        return self.hub.recv()

    def compare(self, folder: Path) -> list[str]:
        """Says what differs from the undisturbed run."""
        return list(compare(self.read(folder), self.wanted))

    def draw_kills(self, number: int) -> Iterator[Kill]:
        """Draws the kills of a run by its number, the same at every call."""
        rng = random.Random(f"{self.seed}-{self.kind}-{number}")
        for _ in range(self.kills_per_run):
            by_time = Kill(seconds=rng.uniform(0, self.count.seconds_undisturbed))
            by_operation = Kill(operation=rng.randrange(self.count.num_operations))
            yield rng.choice((by_time, by_operation))

    def run(self, number: int, most_kills: int, is_told: bool = False) -> None:
        """Runs until the end, killed on the way, and compares."""
        folder = self.scratch / f"{self.kind}-{number}"
        self.forget()
        ended = False
        for kill, _ in zip(self.draw_kills(number), range(most_kills), strict=False):
            ended = launch(self.kind, folder, kill)
            self.count.num_launches += 1
            self.count.num_kills += not ended
            if is_told:
                print(f"{kill}: {'ended' if ended else 'killed'}", flush=True)
            if ended:
                break
        if not ended:
            launch(self.kind, folder)
            self.count.num_launches += 1
        faults = self.compare(folder)
        self.count.num_runs += 1
        self.count.faults += [f"run {number}: {fault}" for fault in faults]
        if not faults and not is_told:
            shutil.rmtree(folder)


def start_hub() -> Any:
    """Starts the Hub in a process of its own, and has this one and its forks talk to no other."""
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    context.Process(target=serve, args=(other,), daemon=True).start()
    os.environ.update(pipe.recv())
    return pipe


def import_recipes(kinds: list[str]) -> None:
    """Imports once what all forks need; runs nothing, for threads do not survive a fork."""
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "tests")]
    for kind in kinds:
        import_module(WORK[kind].recipe)
    hub = import_module("hf_mm.hub")
    hub.check_cold_load = lambda folder: None  # type: ignore[attr-defined]


def report(counts: dict[str, Count], seconds: float) -> str:
    """Says in a table what came of it."""
    lines = [
        "| work | undisturbed | file operations | launches | kills | runs | alike |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, count in counts.items():
        bad = len({fault.split(":")[0] for fault in count.faults if fault.startswith("run")})
        lines.append(
            f"| {kind} | {count.seconds_undisturbed:.1f} s | {count.num_operations} | {count.num_launches} | "
            f"{count.num_kills} | {count.num_runs} | {count.num_runs - bad} |"
        )
    kills, runs = (sum(getattr(count, name) for count in counts.values()) for name in ("num_kills", "num_runs"))
    lines.append(f"\n{kills} kills of {runs} runs in {seconds:.0f} s.")
    lines += [f"{kind}, {fault}" for kind, count in counts.items() for fault in count.faults]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kills the recipes and compares what they come to.")
    parser.add_argument("--kinds", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--kills", type=int, default=100, help="Over all kinds.")
    parser.add_argument("--kills_per_run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="Number of the one run to repeat; its folder is kept.")
    parser.add_argument("--output", type=Path, help="JSON file for the counts.")
    arguments = parser.parse_args(argv)
    if arguments.replay is not None and len(arguments.kinds) != 1:
        parser.error("--replay repeats a run of one kind: name it with --kinds.")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Kills in turn runs of all kinds; returns 1 where one did not end as it should."""
    arguments = parse(argv)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    (scratch / "tmp").mkdir()
    os.environ.update(HF_HOME=str(scratch / "home"), TMPDIR=str(scratch / "tmp"), ACCELERATE_USE_CPU="true")
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    hub = start_hub()
    # The model that is published is the one that training leaves.
    kinds = ["train", *arguments.kinds] if "publish" in arguments.kinds else arguments.kinds
    import_recipes(list(dict.fromkeys(kinds)))
    if wait(fork(lambda: make_inputs(scratch / "inputs"), scratch / "inputs")):
        raise RuntimeError((scratch / "inputs.log").read_text()[-3000:])
    trials = {
        kind: Trial(kind, scratch, hub, arguments.seed, arguments.kills_per_run) for kind in dict.fromkeys(kinds)
    }
    began = time.monotonic()
    for trial in trials.values():
        trial.prepare()
    trials = {kind: trials[kind] for kind in arguments.kinds}
    counts = {kind: trial.count for kind, trial in trials.items()}
    if arguments.replay is not None:
        trials[arguments.kinds[0]].run(arguments.replay, arguments.kills_per_run, is_told=True)
        arguments.kills = 0
    for number in itertools.count():
        missing = arguments.kills - sum(count.num_kills for count in counts.values())
        if missing <= 0:
            break
        kind = min(arguments.kinds, key=lambda kind: counts[kind].num_kills)
        trials[kind].run(number, missing)
        print(f"run {number}, {kind}: {counts[kind].num_kills} kills", file=sys.stderr, flush=True)
    print(f"{platform.platform()}, Python {platform.python_version()}, seed {arguments.seed}\n")
    print(report(counts, time.monotonic() - began))
    if arguments.output is not None:
        told = {"seed": arguments.seed, "counts": {kind: asdict(count) for kind, count in counts.items()}}
        arguments.output.write_text(json.dumps(told, indent=2) + "\n")
    has_faults = any(count.faults for count in counts.values())
    if has_faults or arguments.replay is not None:
        print(f"Folders and logs are kept in {scratch}.")
    else:
        shutil.rmtree(scratch)
    return int(has_faults)


if __name__ == "__main__":
    sys.exit(main())
