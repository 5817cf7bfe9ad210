import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_mm.training.checkpoint import is_complete, list_checkpoints
from hf_mm.training.history import read_history
from hf_mm.training.recipe import TrainingRecipe


SCRIPT = Path(__file__).with_name("toy_run.py")
toy_run = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def make_recipe(folder: Path, **fields: object) -> TrainingRecipe:
    settings = dict(
        output_dir=str(folder),
        max_steps=9,
        per_device_train_batch_size=5,
        learning_rate=0.05,
        warmup_steps=2,
        ema_decay=0.9,
        logging_steps=2,
        save_steps=3,
        report_to=["none"],
        mixed_precision="no",
    )
    return TrainingRecipe(**{**settings, **fields})


def run_here(folder: Path, toy: dict | None = None, **fields: object) -> SimpleNamespace:
    _, parts, _ = toy_run.start(make_recipe(folder, **fields), toy_run.ToyRecipe(**{"dropout": 0.3, **(toy or {})}))
    return parts


def losses(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_history(folder / "history.jsonl")}


def assert_same_end(whole: SimpleNamespace, resumed: SimpleNamespace) -> None:
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    for first, second in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(first, second)
    assert whole.ema.optimization_step == resumed.ema.optimization_step


def test_killed_run_resumes_to_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    whole = run_here(tmp_path / "whole")
    settings = {name: value for name, value in vars(make_recipe(tmp_path / "cut")).items() if value is not None}
    words = [f"--{name}={value}" for name, value in {**settings, "report_to": "none"}.items()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words, "--dropout=0.3", "--kill_at_step=8"]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-3", "checkpoint-6"]
    assert max(losses(tmp_path / "cut")) == 8

    assert_same_end(whole, run_here(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_resume_in_the_middle_of_a_log_interval_keeps_its_mean(tmp_path: Path) -> None:
    whole = run_here(tmp_path / "whole")
    run_here(tmp_path / "cut", max_train_seconds=1e-9)  # stops after step 1; entries are means of two steps
    assert_same_end(whole, run_here(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_checkpoint_is_resumed_by_a_fixed_path(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    elsewhere = run_here(tmp_path / "elsewhere", resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_end(run_here(tmp_path / "whole"), elsewhere)


def test_sampling_draws_do_not_change_training(tmp_path: Path) -> None:
    plain = run_here(tmp_path / "plain", max_steps=5)
    recipe, toy = make_recipe(tmp_path / "drawing", max_steps=5), toy_run.ToyRecipe(dropout=0.3)
    _, drawing, _ = toy_run.start(recipe, toy, every=((2, torch.randn),))
    assert_same_end(plain, drawing)


def test_half_written_and_damaged_checkpoints_are_ignored(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    good = tmp_path / "checkpoint-1"
    for name, damage in {
        "checkpoint-2.tmp": lambda folder: None,
        "checkpoint-3": lambda folder: (folder / "checkpoint.json").unlink(),
        "checkpoint-4": lambda folder: os.truncate(folder / "optimizer.bin", 11),
        "checkpoint-5": lambda folder: (folder / "ema.safetensors").unlink(),
        "checkpoint-6": lambda folder: (folder / "checkpoint.json").write_text('{"step": 6'),
    }.items():
        folder = tmp_path / name
        subprocess.run(["cp", "-r", str(good), str(folder)], check=True)
        damage(folder)
    assert list_checkpoints(tmp_path) == [good]
    run_here(tmp_path)
    assert is_complete(tmp_path / "checkpoint-6") and is_complete(tmp_path / "checkpoint-9")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "ema.safetensors", "training_state.pt", "random_states_0.pkl"]
)
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_here(tmp_path / "cut", max_steps=7)  # saved after steps 3, 6 and 7
    path = tmp_path / "cut" / "checkpoint-7" / name
    flip(path, path.stat().st_size // 2)
    assert is_complete(path.parent)
    capsys.readouterr()
    resumed = run_here(tmp_path / "cut", max_steps=7)
    told = capsys.readouterr().out
    assert f"checkpoint-7 is damaged ({name} is missing or not as it was written): going back to" in told
    assert "checkpoint-6. It is kept as" in told and "Resumed from" in told
    assert_same_end(run_here(tmp_path / "whole", max_steps=7), resumed)
    names = {path.name for path in (tmp_path / "cut").glob("checkpoint-*")}
    assert names == {"checkpoint-6", "checkpoint-7", "checkpoint-7.damaged"}
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_any_flipped_byte_of_the_manifest_is_noticed_or_without_effect(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    path = tmp_path / "checkpoint-1" / "checkpoint.json"
    written = path.read_bytes()
    meant = json.loads(written)
    for place in range(0, len(written), 7):
        flip(path, place)
        assert not is_complete(path.parent) or json.loads(path.read_bytes()) == meant, place
        path.write_bytes(written)
    assert is_complete(path.parent)


def test_a_damaged_checkpoint_is_refused_by_name_and_never_silently_replaced_by_a_fresh_start(tmp_path: Path) -> None:
    run_here(tmp_path, max_steps=6)
    flip(tmp_path / "checkpoint-6" / "optimizer.bin", 99)
    with pytest.raises(ValueError, match=r"checkpoint-6 is no whole checkpoint: optimizer.bin is .*'checkpoint-3'"):
        run_here(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="no whole checkpoint .checkpoint-6: optimizer.bin is .*; checkpoint-3: model"
    ):
        run_here(tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_what_a_killed_launch_left_is_removed(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    for name in ("checkpoint-1.old.tmp", "checkpoint-2.tmp"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    run_here(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_too_many_of_a_launch_killed_right_after_saving_is_removed(tmp_path: Path) -> None:
    run_here(tmp_path, save_total_limit=None)
    assert len(list_checkpoints(tmp_path)) == 3
    run_here(tmp_path, save_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("room", [1500, 3000, 9000])
def test_a_full_disk_stops_the_run_and_costs_only_the_steps_since_the_last_checkpoint(
    room: int, tmp_path: Path
) -> None:
    run_here(tmp_path / "cut", max_steps=6, save_steps=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(step: int) -> None:  # no file may grow beyond that
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    recipe = make_recipe(tmp_path / "cut", max_steps=9, logging_steps=100)
    try:
        with pytest.raises(OSError, match=r"checkpoint-9 could not be written: .*checkpoint-6 is whole, and the same"):
            toy_run.start(recipe, toy_run.ToyRecipe(dropout=0.3), every=((9, fill_disk),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cut" / "checkpoint-9.tmp").exists()
    whole = run_here(tmp_path / "whole", max_steps=6, save_steps=6)
    assert_same_end(whole, run_here(tmp_path / "cut", max_steps=6, resume_from_checkpoint="auto"))
    resumed = run_here(tmp_path / "cut", max_steps=9, logging_steps=100)
    assert_same_end(run_here(tmp_path / "whole", max_steps=9, logging_steps=100), resumed)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_here(tmp_path, save_steps=2, save_total_limit=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]
    assert not list(tmp_path.glob("*.tmp"))


def test_weights_are_safetensors_under_the_models_own_names(tmp_path: Path) -> None:
    parts = run_here(tmp_path, max_steps=3)
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == parts.model.state_dict().keys()
    average = load_file(tmp_path / "checkpoint-3" / "ema.safetensors")
    assert len(average) == len(parts.ema.shadow_params)


def test_checkpoint_of_another_run_is_refused_with_the_changed_fields(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9, report_to=["tensorboard"])
    shutil.rmtree(tmp_path / "logs")
    with pytest.raises(ValueError, match="`dropout` was 0.3 and is 0.1; `learning_rate` was 0.05 and is 0.07"):
        run_here(tmp_path, {"dropout": 0.1}, learning_rate=0.07, report_to=["tensorboard"])
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ValueError, match="`rows_per_step` was 5 and is 10"):
        run_here(tmp_path, gradient_accumulation_steps=2)


def test_a_run_from_before_a_field_goes_on_while_that_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    fields = toy_run.start.__globals__["asdict"]
    monkeypatch.setitem(toy_run.start.__globals__, "asdict", lambda toy: {**fields(toy), "names": [], "name": None})
    run_here(tmp_path, max_steps=5)
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-5"
    monkeypatch.setitem(toy_run.start.__globals__, "asdict", lambda toy: {**fields(toy), "names": ["a"]})
    with pytest.raises(ValueError, match=re.escape("`names` was [] and is ['a']")):
        run_here(tmp_path, max_steps=6)


def test_longer_schedule_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    run_here(tmp_path, max_steps=11, logging_steps=1)
    assert "`max_steps` was 9 and is 11" in capsys.readouterr().out


def test_fresh_start_beside_an_earlier_run_is_refused(tmp_path: Path) -> None:
    run_here(tmp_path, max_train_seconds=1e-9)
    with pytest.raises(ValueError, match="holds checkpoint-1"):
        run_here(tmp_path, resume_from_checkpoint="none")
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        run_here(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_finished_run_trains_no_further(tmp_path: Path) -> None:
    first = run_here(tmp_path)
    manifest = json.loads((tmp_path / "checkpoint-9" / "checkpoint.json").read_text())
    assert manifest["step"] == 9
    assert_same_end(first, run_here(tmp_path))
