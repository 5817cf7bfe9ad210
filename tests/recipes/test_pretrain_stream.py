import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pretrain_stream
from hf_mm.training import loop
from hf_mm.training.checkpoint import list_checkpoints


ROOT = Path(__file__).parents[2]


def same_weights(first: Path, second: Path) -> bool:
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    return all(weight.equal(weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("source", ["scenes", "codes"])
def test_a_stopped_stream_goes_on_to_the_same_weights(make_words, request, source, tmp_path):
    fields = request.getfixturevalue("codes") if source == "codes" else {}
    fields |= {"shuffle_block_size": 5, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}
    whole = pretrain_stream.main(make_words("whole", **fields))
    stopped = pretrain_stream.main(make_words("stopped", **fields))
    assert same_weights(whole, stopped)
    later = list_checkpoints(stopped)[-1]
    later.rename(later.with_name("later"))
    (stopped / "model.safetensors").unlink()
    pretrain_stream.main(make_words("stopped", **fields))
    assert same_weights(whole, stopped)
    first, last = (json.loads((folder / "data_0.json").read_text()) for folder in list_checkpoints(whole))
    assert (first["num_samples"], last["num_samples"]) == (8, 16) and first["rows"] != last["rows"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_fails_is_met_again_by_the_same_command(make_words, num_workers, monkeypatch):
    fields = {"shuffle_block_size": 5, "max_steps": 4, "dataloader_num_workers": num_workers}
    whole = pretrain_stream.main(make_words("whole", **fields))
    take_step, num_steps = loop._take_step, itertools.count(1)

    def fail_at_the_third(*arguments):
        if next(num_steps) == 3:
            raise FloatingPointError("At step 3 the loss is nan")
        return take_step(*arguments)

    monkeypatch.setattr(loop, "_take_step", fail_at_the_third)
    with pytest.raises(FloatingPointError):
        pretrain_stream.main(make_words("failed", **fields))
    assert same_weights(whole, pretrain_stream.main(make_words("failed", **fields)))


def test_what_needs_rows_by_number_is_refused(make_words, tmp_path):
    for field, value in (("eval_dataset_split", "validation"), ("text_dataset_name", "me/texts"),
                         ("text_sources", "vqa_v2"), ("people_oversampling", 2), ("eval_steps", 2),
                         ("eval_dataset_name", "me/others")):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{field}.* needs rows by number"):
            pretrain_stream.main(make_words("run", **{field: value}))
    with pytest.raises(ValueError, match="`window_length`=20 .* has no room for a picture and a caption"):
        pretrain_stream.main(make_words("run", window_length=20))


def test_the_commands_at_its_head_read_the_recipe_and_its_tasks(monkeypatch, tmp_path):
    asked = []

    def note(specs, *arguments):
        asked.append(specs)
        raise KeyboardInterrupt  # nothing is trained

    monkeypatch.setattr(pretrain_stream, "iterate_task_texts", note)
    monkeypatch.chdir(ROOT)
    for command in re.findall(r"^accelerate launch \S+ (.*)$", pretrain_stream.__doc__.replace("\\\n", ""), re.M):
        words = re.sub(r"--(dataset_name|text_column|image_tokenizer_name) \S+", "", command)
        with pytest.raises(KeyboardInterrupt):
            pretrain_stream.main(
                [*words.replace("runs/mine", str(tmp_path)).split(), "--dataset_name=icon_scenes:shapes"]
            )
    assert len(asked) == 2 and all("vqa@icon_scenes:shapes" in specs for specs in asked)


@pytest.mark.slow
def test_two_processes_share_a_stream_and_go_on(make_words, child_environment, tmp_path):
    fields = {"shuffle_block_size": 5, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}

    def train(folder: str) -> Path:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        script = str(ROOT / "recipes" / "pretrain_stream.py")
        done = subprocess.run(
            [*launcher, script, *make_words(folder, **fields)],
            env=child_environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    whole = train("whole")
    places = [json.loads((list_checkpoints(whole)[-1] / f"data_{index}.json").read_text()) for index in (0, 1)]
    assert [place["num_samples"] for place in places] == [16, 16]
    os.rename(whole / "checkpoint-4", whole / "later")
    weights = load_file(whole / "model.safetensors")
    train("whole")
    again = load_file(whole / "model.safetensors")
    assert all(weight.equal(again[name]) for name, weight in weights.items())
