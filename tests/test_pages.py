"""What the pages of documentation tell a reader to type runs as printed, on little data and for a few steps.

Commands are run word for word. Launchers, `python` and `hf-mm` are stood for by scripts that append what makes a
command short; installing and testing is left out. What needs machines that a test has not is read by its own parser.
"""

import importlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import save_file

import hf_mm
import pretrain
from hf_mm.training.recipe import parse_recipe


ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/train.md",
    "docs/retrieval.md",
    "docs/decoding.md",
    "docs/fine_tune.md",
    "docs/evaluate.md",
    "docs/share.md",
    "docs/demo.md",
    "docs/scale.md",
    "docs/faults.md",
    "docs/benchmarks.md",
    "docs/reproductions.md",
)
BRIEF = "--max_steps 2 --warmup_steps 1"
SHORTENED = {
    "recipes/pretrain.py": f"{BRIEF} --num_scenes 96",
    "hf-mm train": f"{BRIEF} --num_scenes 96",
    "recipes/train_image_tokenizer.py": f"{BRIEF} --quantization_start_step 1 --code_revival_steps 1 --num_scenes 96",
    "recipes/train_clip.py": f"{BRIEF} --num_scenes 96",
    "recipes/sft.py": f"{BRIEF} --num_scenes 96 --num_task_scenes 24 --num_eval_rows 2",
    "recipes/encode_images.py": "--num_scenes 96",
    "recipes/build_retrieval_index.py": "--num_scenes 96 --memory_num_scenes 96",
    # a model that writes words, without which there is no CIDEr
    "recipes/evaluate.py": "--num_scenes 4 --num_captions 4 --model_name_or_path runs/trained",
    "recipes/evaluate_geneval.py": "--num_images 1 --num_inference_steps 2",
    "recipes/export_checkpoint.py": "--checkpoint runs/mine/checkpoint-2",  # the last of a run of two steps
    "recipes/reproduce.py": "--quick --variants 'linear-causal: model.image_attention=causal'"
    " --common '--config recipes/configs/transfusion_tiny_pretrain.yaml --noise_cap none --num_scenes 96'",
    "benchmarks/faults.py": "--kinds encode --kills 2",
}
LEFT_OUT = ("pip", "pytest")
LAUNCHERS = {
    "accelerate": "-m accelerate.commands.accelerate_cli",
    "torchrun": "-m torch.distributed.run",
    "python": "",
    "hf-mm": str(Path(sys.executable).with_name("hf-mm")),
}
STAND_IN = """#!/usr/bin/env bash
case "{name} $*" in
{cases}
*) exec {command} "$@" ;;
esac
"""
PRINTED = ("docs/scale.md",)  # pages whose blocks of no language are what a command of theirs prints
# Commands that run until they are stopped, and how the last line that they print before they wait begins.
SERVERS = {"hf-mm demo --model cm3leon-tiny": "http://", "python tests/hub_server.py": "export HF_TOKEN="}
# Blocks that are not run, but whose every command is parsed.
NOT_RUN = (
    "recipes/accelerate/one_gpu.yaml",  # a GPU
    "recipes/accelerate/fsdp2_nodes.yaml",  # four machines of eight
    "benchmarks/training_step.py",  # a package that the tests do without; test_benchmarks runs it where there is one
)


def write_stand_ins(folder: Path) -> None:
    """Writes what stands for launchers, and for commands that are left out."""
    folder.mkdir()
    scripts = {name: "#!/usr/bin/env bash\n" for name in LEFT_OUT}
    for name, words in LAUNCHERS.items():
        command = f"{sys.executable} {words}".strip()
        cases = [f'*"{words}"*) exec {command} "$@" {more} ;;' for words, more in SHORTENED.items()]
        scripts[name] = STAND_IN.format(name=name, cases="\n".join(cases), command=command)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


def write_earlier_work(folder: Path) -> None:
    """Leaves what pages speak of and no block of theirs makes."""
    (folder / "runs" / "mine").mkdir(parents=True)
    shutil.copytree(hf_mm.CHECKPOINTS / "transfusion-tiny", folder / "runs" / "trained")
    # what tuning a CM3Leon comes to; the page of tuning names its recipe in a comment
    (folder / "runs" / "cm3leon_tiny_sft").symlink_to(hf_mm.CHECKPOINTS / "cm3leon-tiny")
    batch = {"0.input_ids": torch.ones(2, 3, dtype=torch.long), "0.latents": torch.full((2, 3, 4, 4), torch.nan)}
    save_file(batch, folder / "runs" / "mine" / "non_finite_step_1234_process_0.safetensors")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it, with pictures of their own."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "benchmarks", "model_cards", "tests", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    write_stand_ins(folder / "stand_ins")
    write_earlier_work(folder)
    (folder / "my" / "pictures").mkdir(parents=True)
    rows = []
    for number in range(48):
        Image.new("RGB", (40, 36), (5 * number, 90, 255 - 5 * number)).save(folder / f"my/pictures/{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "caption": "a plain picture, the one of number {number}"}}')
    (folder / "my" / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def blocks_of(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for written_in, block in blocks if written_in == language]


def names_any(block: str, names: Iterable[str]) -> bool:
    return any(name in block for name in names)


def environment_of(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "stand_ins"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def serve(block: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Runs a block that ends in a server, and stops it in the end; gives what it printed when it began to wait."""
    (last,) = (start for name, start in SERVERS.items() if name in block)
    command = ["bash", "-euo", "pipefail", "-c", block]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                if line.startswith(last):
                    break
            assert lines and lines[-1].startswith(last), f"{block} ended with {process.wait()}"
            yield "".join(lines)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def parse(block: str) -> None:
    """Has each command of a block that is not run read by the parsers of its launcher, its recipe, its benchmark."""
    for line in block.replace("\\\n", " ").splitlines():
        match shlex.split(line, comments=True):
            case ["accelerate", "launch", *words]:
                launch = launch_command_parser().parse_args(words)
                assert load_config_from_file(launch.config_file).num_machines
                assert launch.training_script == "recipes/pretrain.py"
                parse_recipe(*pretrain.ARGUMENTS, argv=launch.training_script_args)
            case ["OMP_NUM_THREADS=1", "python", script, *words]:
                benchmark = importlib.import_module(Path(script).stem)
                with mock.patch.multiple(benchmark, measure=mock.DEFAULT, tell=mock.DEFAULT):
                    with mock.patch.object(sys, "argv", [script, *words]):
                        benchmark.main()
            case words:
                assert words[:2] == ["pip", "install"], f"{line} is not parsed"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, reader, monkeypatch):
    """In the order of the pages: a later one goes on with the models of those before."""
    monkeypatch.chdir(ROOT)  # where what is parsed finds its files
    environment, said = environment_of(reader), ""
    blocks = [block for block in blocks_of(page, "bash") if not names_any(block, NOT_RUN)]
    with ExitStack() as servers:
        for block in (block for block in blocks if names_any(block, SERVERS)):
            told = servers.enter_context(serve(block, reader, environment))
            environment |= dict(re.findall(r"^export (\w+)=(.*)$", told, re.MULTILINE))
            for address in re.findall(r"^http://\S+$", told, re.MULTILINE):
                assert b"gradio" in urllib.request.urlopen(address, timeout=60).read()
        for block in (block for block in blocks if not names_any(block, SERVERS)):
            said += run(["bash", "-euo", "pipefail", "-c", block], reader, environment)
        run([sys.executable, "-c", "\n".join(blocks_of(page, "python"))], reader, environment)
    for block in blocks_of(page, "bash"):
        if names_any(block, NOT_RUN):
            parse(block)
    if page in PRINTED:
        assert all(block in said for block in blocks_of(page, ""))
