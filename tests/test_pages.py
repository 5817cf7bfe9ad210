"""What the pages of documentation tell a reader to type runs as printed, on little data and for a few steps.

Commands are run word for word. Launchers and `python` are stood for by scripts that append what makes a recipe short;
installing and testing is left out.
"""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/train.md", "docs/retrieval.md", "docs/decoding.md", "docs/fine_tune.md")
BRIEF = "--max_steps 2 --warmup_steps 1"
SHORTENED = {
    "pretrain.py": f"{BRIEF} --num_scenes 96",
    "train_image_tokenizer.py": f"{BRIEF} --quantization_start_step 1 --code_revival_steps 1 --num_scenes 96",
    "train_clip.py": f"{BRIEF} --num_scenes 96",
    "sft.py": f"{BRIEF} --num_scenes 96 --num_task_scenes 24 --num_eval_rows 2",
    "encode_images.py": "--num_scenes 96",
    "build_retrieval_index.py": "--num_scenes 96 --memory_num_scenes 96",
    "evaluate.py": "--num_scenes 4 --num_captions 4",
}
LEFT_OUT = ("pip", "pytest")
LAUNCHERS = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run", "python": ""}
STAND_IN = """#!/usr/bin/env bash
case "$*" in
{cases}
*) exec {command} "$@" ;;
esac
"""


def write_stand_ins(folder: Path) -> None:
    """Writes what stands for launchers, and for commands that are left out."""
    folder.mkdir()
    cases = "\n".join(f'*recipes/{name}*) exec {{command}} "$@" {more} ;;' for name, more in SHORTENED.items())
    scripts = {name: "#!/usr/bin/env bash\n" for name in LEFT_OUT}
    for name, module in LAUNCHERS.items():
        command = f"{sys.executable} -m {module}" if module else sys.executable
        scripts[name] = STAND_IN.format(cases=cases.format(command=command), command=command)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it, with pictures of their own."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "benchmarks", "model_cards", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    write_stand_ins(folder / "stand_ins")
    (folder / "my" / "pictures").mkdir(parents=True)
    rows = []
    for number in range(48):
        Image.new("RGB", (40, 36), (5 * number, 90, 255 - 5 * number)).save(folder / f"my/pictures/{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "caption": "a plain picture, the one of number {number}"}}')
    (folder / "my" / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def blocks_of(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(words: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(folder / "stand_ins"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, reader):
    """In the order of the pages: a later one goes on with the models of those before."""
    for block in blocks_of(page, "bash"):
        run(["bash", "-euo", "pipefail", "-c", block], reader)
    run([sys.executable, "-c", "\n".join(blocks_of(page, "python"))], reader)
