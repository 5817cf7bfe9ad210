import os
import signal
import sys
from pathlib import Path

import pytest

from hf_mm.recipe_launch import launch, launch_command, read_command


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
HEAD = "# Ours.\n# accelerate launch --num_processes 3 recipes/encode.py --config recipes/configs/other.yaml\n"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_a_script_that_there_is(recipe):
    _, script = read_command(recipe)
    kinds = {"sft": "sft", "clip": "train_clip", "vq": "train_image_tokenizer", "vae": "train_image_tokenizer"}
    kinds["patch"] = "make_patch_codes"
    kind = next((kinds[word] for word in recipe.stem.split("_") if word in kinds), "pretrain")
    assert script == f"recipes/{kind}.py" and (ROOT / script).is_file()


def test_the_last_command_of_the_head_is_run_with_this_file_and_the_overrides(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    (recipes / "configs").mkdir(parents=True)
    (recipes / "accelerate").mkdir()
    for name in ("train.py", "encode.py", "accelerate/big.yaml"):
        (recipes / name).touch()
    mine = recipes / "configs" / "mine.yaml"
    last = "# accelerate launch --config_file recipes/accelerate/big.yaml recipes/train.py --config <this file>\n"
    mine.write_text(HEAD + last + "steps: 3\n# accelerate launch recipes/encode.py --config x\n")
    monkeypatch.chdir(tmp_path.parent)
    command = launch_command(mine, ["--steps", "5"])
    assert command[:4] == [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    assert command[4:] == [
        "--config_file", str(recipes / "accelerate/big.yaml"), str(recipes / "train.py"), "--config", str(mine),
        "--steps", "5",
    ]  # fmt: skip
    hardware = tmp_path / "one_gpu.yaml"
    assert launch_command(mine, accelerate_config=hardware)[4:7] == [
        "--config_file", str(hardware), str(recipes / "train.py")
    ]  # fmt: skip


def test_a_recipe_elsewhere_is_run_by_the_scripts_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(HEAD)
    (tmp_path / "work" / "recipes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="recipes/encode.py, which .*mine.yaml is for, is not here.*repository"):
        launch_command(tmp_path / "mine.yaml")
    (tmp_path / "work" / "recipes" / "encode.py").touch()
    command = launch_command(tmp_path / "mine.yaml")
    assert command[4:7] == ["--num_processes", "3", str(tmp_path / "work" / "recipes" / "encode.py")]


def test_a_recipe_that_names_no_script_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 3\n" + HEAD)
    with pytest.raises(ValueError, match="does not say which script it is for.*# accelerate launch"):
        launch_command(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(3)", 3), ("0", 0), ("os.kill(os.getpid(), 15)", 143)])
def test_the_end_of_the_training_is_the_end_of_the_command(end, code):
    before = signal.getsignal(signal.SIGINT)
    assert launch([sys.executable, "-c", f"import os; {end}"]) == code
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_is_left_to_the_training():
    script = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(0.5); raise SystemExit(7)"
    assert launch([sys.executable, "-c", script]) == 7


@pytest.mark.parametrize("data", [None, b"# \xd5\xff", "folder"])
def test_a_recipe_that_cannot_be_read_is_refused_by_name(tmp_path, data):
    path = tmp_path / "mine.yaml"
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match="mine.yaml is no recipe that can be read"):
        launch_command(path)
