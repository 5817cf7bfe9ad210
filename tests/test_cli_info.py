"""The commands info, train and demo: what they print, and each way to fail."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_mm
from hf_mm.cli import app


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "configs" / "transfusion_tiny_pretrain.yaml"
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason='the demo needs Gradio: pip install -e ".[demo]"'
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failure(result):
    """The one line that a failed command printed."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_info_tells_a_person_and_a_script_the_same():
    spelled, told = run("info"), run("info", hf_mm.DEFAULT_CHECKPOINT, "--json")
    assert spelled.exit_code == told.exit_code == 0, spelled.output
    facts = json.loads(told.stdout)
    assert facts["family"] == "Transfusion" and facts["parameters"]["total"] > 10**5
    assert f"{facts['context']} positions" in spelled.stdout and ": Transfusion, weights in BF16" in spelled.stdout


@pytest.mark.parametrize("name", sorted(path.parent.name for path in hf_mm.CHECKPOINTS.glob("*/model_index.json")))
def test_what_ships_is_known_by_its_name(name):
    facts = json.loads(run("info", name, "--json").stdout)
    assert facts["name"] == str(hf_mm.CHECKPOINTS / name) and facts["parameters"]["total"] > 10**5
    assert name in run("generate", "--help").stdout


@pytest.mark.parametrize("name", ["runs/nowhere", "me/nowhere"])
def test_info_names_a_checkpoint_that_is_nowhere(name):
    message = failure(run("info", name))
    assert f"MODEL {name} is no folder here, and the Hub has no such model or cannot be reached" in message


def test_info_refuses_a_folder_without_weights(tmp_path):
    assert f"{tmp_path} has no weights in safetensors files" in failure(run("info", tmp_path))


def test_train_shows_its_command_and_takes_overrides():
    result = run("train", RECIPE, "--dry-run", "--json", "--", "--max_steps", 3)
    assert result.exit_code == 0, result.output
    command = json.loads(result.stdout)["command"]
    assert command[0] == sys.executable and command[-3:] == [str(RECIPE), "--max_steps", "3"]
    spelled = run("train", RECIPE, "--dry-run")
    assert spelled.stdout.endswith(f"recipes/pretrain.py --config {RECIPE}\n")


def test_train_ends_as_the_training_does(tmp_path, monkeypatch):
    script = tmp_path / "recipes" / "mine.py"
    script.parent.mkdir()
    script.write_text("import sys\nraise SystemExit(5 if 'bad' in sys.argv else 0)\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# accelerate launch --cpu recipes/mine.py --config <this file>\n")
    for overrides, succeeds in ((["--", "fine"], True), (["--", "bad"], False)):
        result = run("train", recipe, *overrides)
        assert (result.exit_code == 0) is succeeds
        assert result.stdout == "" and "recipes/mine.py --config" in result.stderr


def test_train_refuses_what_is_no_recipe_or_has_no_script_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").write_text("steps: 3\n")
    assert "does not say which script it is for" in failure(run("train", tmp_path / "plain.yaml"))
    (tmp_path / "alone.yaml").write_text("# accelerate launch recipes/pretrain.py --config <this file>\n")
    message = failure(run("train", tmp_path / "alone.yaml"))
    assert "recipes/pretrain.py" in message and "not in the installed package" in message
    assert run("train", tmp_path / "missing.yaml").exit_code == 2


@needs_gradio
def test_demo_writes_a_space(tmp_path):
    space = tmp_path / "space"
    result = run("demo", "--model", "me/mine", "--example", "a fox", "--space-dir", space, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"path": str(space)}
    assert sorted(os.listdir(space)) == ["README.md", "app.py", "requirements.txt"]
    assert "is not empty" in failure(run("demo", "--space-dir", space))
    message = failure(run("demo", "--space-dir", tmp_path / "new", "--retrieval-dir", tmp_path))
    assert "--retrieval-dir: a Space holds no index" in message


@needs_gradio
def test_demo_refuses_what_it_cannot_show(tmp_path):
    assert "--model runs/nowhere is no folder here" in failure(run("demo", "--model", "runs/nowhere"))
    missing = tmp_path / "missing"
    assert f"--retrieval-dir {missing} is no folder" in failure(run("demo", "--retrieval-dir", missing))
    assert "a TransfusionPipeline does not retrieve" in failure(run("demo", "--retrieval-dir", tmp_path))
    assert run("demo", "--port", 0).exit_code == 2


def test_demo_without_gradio_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for options in ([], ["--space-dir", tmp_path / "space"]):
        assert 'pip install "hf_mm[demo]"' in failure(run("demo", *options))


@pytest.mark.parametrize(("command", "number"), [("info", 5), ("train", 3), ("demo", 4)])
def test_help_shows_examples(command, number):
    result = run(command, "--help")
    assert result.exit_code == 0 and result.stdout.count(f"  hf-mm {command}") == number
