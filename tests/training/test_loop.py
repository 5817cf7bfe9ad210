import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, load_model

from hf_mm.training.checkpoint import list_checkpoints
from hf_mm.training.history import read_history
from hf_mm.training.loop import read_window
from hf_mm.training.recipe import TrainingRecipe
from hf_mm.training.trackers import end_training


SCRIPT = Path(__file__).with_name("toy_run.py")
toy_run = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def make_recipe(folder: Path, **fields: object) -> TrainingRecipe:
    settings = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        warmup_steps=2,
        logging_steps=1,
        save_steps=100,
        report_to=["none"],
        mixed_precision="no",
    )
    return TrainingRecipe(**{**settings, **fields})


def run_here(folder: Path, toy: dict | None = None, **fields: object) -> dict[str, torch.Tensor]:
    _, parts, _ = toy_run.start(make_recipe(folder, **fields), toy_run.ToyRecipe(**(toy or {})))
    return parts.model.state_dict()


def launch(folder: Path, num_processes: int = 1, **fields: object) -> subprocess.CompletedProcess:
    settings = dict(vars(make_recipe(folder)), report_to="none")
    settings = {name: value for name, value in settings.items() if value is not None} | fields
    python = [sys.executable]
    if num_processes > 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    words = [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*python, str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_history(folder / "history.jsonl")]


def assert_same_weights(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    whole = run_here(tmp_path / "whole")
    parts = run_here(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_weights(whole, parts, 1e-6)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), abs=1e-6)
    assert len(set(losses(tmp_path / "whole"))) == 6


def test_two_processes_of_which_one_has_no_images_equal_one(tmp_path: Path) -> None:
    toy = {"images_of_even_rows_only": True}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    done = launch(tmp_path / "two", 2, **halves, **toy)
    assert done.returncode == 0, done.stderr
    end = torch.load(tmp_path / "two" / "end.pt")
    assert end["num_processes"] == 2
    assert read_history(tmp_path / "two" / "history.jsonl")[-1]["num_images_seen"] == 24
    assert_same_weights(run_here(tmp_path / "one", toy), end["weights"], 1e-6)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-6)
    middle = str(tmp_path / "two" / "checkpoint-3")
    assert_same_weights(run_here(tmp_path / "resumed", toy, resume_from_checkpoint=middle), end["weights"], 1e-6)


def test_loss_that_is_not_finite_stops_and_saves_the_batch(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="At step 3 the loss is nan"):
        run_here(tmp_path, {"nan_at_step": 3}, gradient_accumulation_steps=2)
    batch = load_file(tmp_path / "non_finite_step_3_process_0.safetensors")
    assert batch["0.images"].isnan().any() and batch["1.input_ids"].shape == (8, toy_run.LENGTH)
    assert len(losses(tmp_path)) == 2


def test_a_batch_without_a_finite_loss_is_met_again_by_the_same_command_and_from_its_file(tmp_path: Path) -> None:
    fields = {"gradient_accumulation_steps": 2, "save_steps": 2, "max_steps": 9}
    with pytest.raises(FloatingPointError, match="weights are those after step 4, in checkpoint-4") as first:
        run_here(tmp_path, {"nan_at_step": 5}, **fields)
    path = tmp_path / "non_finite_step_5_process_0.safetensors"
    saved = path.read_bytes()
    with pytest.raises(FloatingPointError) as again:
        run_here(tmp_path, {"nan_at_step": 5}, **fields)
    assert str(again.value) == str(first.value) and path.read_bytes() == saved and len(losses(tmp_path)) == 4

    model = toy_run.ToyModel()
    load_model(model, tmp_path / "checkpoint-4" / "model.safetensors")
    found = [model(**batch, **toy_run.count_targets(batch)).loss.isnan().item() for batch in read_window(path)]
    assert found == [True, True]


def test_a_checkpoint_of_the_step_before_a_batch_without_a_finite_loss_is_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="in checkpoint-3"):
        run_here(tmp_path, {"nan_at_step": 4})
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]
    whole = run_here(tmp_path / "whole")
    assert_same_weights(whole, run_here(tmp_path), 0)  # once the row is mended
    assert losses(tmp_path) == losses(tmp_path / "whole")


class LostTracker:
    """Fails as one does whose server or disk is gone."""

    name = "lost"

    def __init__(self) -> None:
        self.num_asked = 0

    def log(self, values: dict, step: int) -> None:
        self.num_asked += 1
        raise ConnectionError("no route to host")

    def finish(self) -> None:
        raise OSError(28, "No space left on device")


def test_training_goes_on_without_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost, train = LostTracker(), toy_run.start.__globals__["train"]

    def train_with_lost_tracker(accelerator: Accelerator, *others: Any, **fields: Any) -> Any:
        accelerator.trackers.append(lost)
        return train(accelerator, *others, **fields)

    whole = run_here(tmp_path / "whole")
    monkeypatch.setitem(toy_run.start.__globals__, "train", train_with_lost_tracker)
    accelerator, parts, reason = toy_run.start(make_recipe(tmp_path / "lost"), toy_run.ToyRecipe())
    end_training(accelerator)
    assert reason == "max_steps" and lost.num_asked == 6
    assert_same_weights(whole, parts.model.state_dict(), 0)
    assert losses(tmp_path / "lost") == losses(tmp_path / "whole")
    assert "tracker 'lost' did not take the values of step 6: ConnectionError('no route to host')" in caplog.text
    assert "could not be closed" in caplog.text


def test_sigterm_finishes_the_step_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_here(tmp_path, {"signal_at_step": 3}, max_steps=50)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after step 4 of 50" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_time_budget_stops_and_saves(tmp_path: Path) -> None:
    _, _, reason = toy_run.start(make_recipe(tmp_path, max_train_seconds=1e-9), toy_run.ToyRecipe())
    assert reason == "max_train_seconds"
    assert (tmp_path / "checkpoint-1").is_dir()


def test_log_entries_are_means_over_the_interval(tmp_path: Path) -> None:
    run_here(tmp_path / "each")
    run_here(tmp_path / "thirds", logging_steps=3)
    each = losses(tmp_path / "each")
    assert losses(tmp_path / "thirds") == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])
    last = read_history(tmp_path / "thirds" / "history.jsonl")[-1]
    assert last["loss"] == pytest.approx(last["text_loss"] + last["image_loss"])
    assert {"grad_norm", "learning_rate", "step_seconds", "num_items_seen"} <= last.keys()


def test_loss_curves_are_drawn(tmp_path: Path) -> None:
    run_here(tmp_path)
    with Image.open(tmp_path / "loss_curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 5


def test_history_without_its_last_line_end_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_history(path) == [{"step": 1, "loss": 2.0}]
