"""A run keeps a Hub repo up to date without waiting for it, and a lost Hub costs no training."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from hub_server import File, Repo
from huggingface_hub import ModelCard
from micro_run import MICRO_MODEL, MICRO_RUN

import pretrain
import pretrain_stream
import sft
import train_clip
import train_image_tokenizer
from hf_mm.training.recipe import TrainingRecipe
from pushing import PUSHED, HubPush


NAME = "me/run"
ROOT = Path(__file__).parents[2]
PARTS = {  # what models are made with, each in a run of moments: its recipe, words, weights, and what is measured
    "vae_tiny": (train_image_tokenizer, "--num_scale_images 8 --sample_steps 4", "diffusion_pytorch_model", None),
    "vq_tiny": (
        train_image_tokenizer,
        "--num_scale_images 8 --sample_steps 4 --quantization_start_step 0 --last_code_revival_step 2",
        "diffusion_pytorch_model",
        "codebook_usage.json",
    ),
    "clip_tiny": (
        train_clip,
        f"--config_name {ROOT}/recipes/configs/models/clip_tiny.json --num_eval_documents 8 --vocab_size 300",
        "model",
        "retrieval.json",
    ),
}


@pytest.fixture
def exported(make_folder):
    return make_folder("transfusion")


@pytest.fixture
def make_push(hub, exported, tmp_path, monkeypatch):
    """Pushes of a run whose model never changes but for a number that is counted up; and the number."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    numbers = []

    def export(folder):
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        numbers.append(len(numbers))
        (folder / "number.txt").write_text(str(numbers[-1]))

    def make(**fields):
        recipe = TrainingRecipe(output_dir=str(tmp_path / "run"), max_steps=9, save_steps=3, **fields)
        push = HubPush(Accelerator(cpu=True), recipe)
        return push, push.every(export), numbers

    return make


def wait(push):
    push._sender.join(timeout=60)
    assert not push._sender.is_alive()


def test_a_save_is_uploaded_in_the_background_as_a_whole_model(hub, make_push, capsys):
    push, (period, push_step), _ = make_push(push_to_hub=NAME, hub_private_repo=True, hub_revision="v1")
    assert period == 3
    push_step(3)
    wait(push)
    files = hub.files(NAME, "v1")
    assert {"model.safetensors", "model/from_root.py", "README.md", "number.txt"} <= files.keys()
    assert hub.repos[NAME].private and hub.repos[NAME].find("v1").message == "Step 3 of 9"
    assert "Step 3 is uploaded" in capsys.readouterr().out


def test_there_are_never_two_uploads_at_a_time_and_none_at_the_last_step(hub, make_push):
    push, (_, push_step), numbers = make_push(push_to_hub=NAME)
    with hub.lock:  # no answer comes
        push_step(3)
        push_step(6)
        assert push._sender.is_alive() and numbers == [0]
    wait(push)
    push_step(9)  # the finished model follows
    assert numbers == [0]
    push_step(6)
    wait(push)
    assert hub.files(NAME)["number.txt"] == b"1"


def test_a_lost_hub_only_warns_and_the_next_save_tries_again(hub, make_push, capsys):
    push, (_, push_step), _ = make_push(push_to_hub=NAME)
    hub.refused = {"/commit/": 503}
    push_step(3)
    wait(push)
    assert "Step 3 is not uploaded; the next save tries again." in capsys.readouterr().out
    hub.refused = {}
    push_step(6)
    wait(push)
    assert hub.files(NAME)["number.txt"] == b"1"


def test_a_disk_without_room_for_the_export_only_warns(hub, make_push, capsys):
    push, (_, push_step), _ = make_push(push_to_hub=NAME)

    def fail(folder):
        raise OSError(28, "No space left on device")

    push.every(fail)[1](3)
    assert "Step 3 is not exported to be uploaded; the next save tries again. [Errno 28]" in capsys.readouterr().out
    push_step(6)
    wait(push)
    assert hub.files(NAME)["number.txt"] == b"0"


def test_the_end_publishes_what_is_finished_and_says_where_or_how_to_try_again(hub, make_push, exported, not_checked):
    push, (_, push_step), _ = make_push(push_to_hub=NAME)
    shutil.copytree(exported, push.recipe.output_dir)
    push_step(6)
    hub.refused = {"/commit/": 503}
    with pytest.raises(SystemExit, match="recipes/publish.py --model_name_or_path .*run --repo_id me/run"):
        push.finish()
    hub.refused = {}
    assert push.finish() == f"{hub.url}/{NAME}/commit/{hub.repos[NAME].branches['main']}"
    assert not push.folder.exists()


def test_what_would_be_refused_at_the_end_is_refused_at_the_start(hub, make_push, monkeypatch):
    hub.repos[NAME] = Repo(NAME, private=False)
    hub.repos[NAME].commit("main", "other", {"data.csv": File(b"1,2", 3)})
    with pytest.raises(ValueError, match="holds something else"):
        make_push(push_to_hub=NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match="hf auth login"):
        make_push(push_to_hub="me/new")


@pytest.mark.parametrize("recipe", [pretrain, pretrain_stream, sft, train_clip, train_image_tokenizer])
def test_the_hub_is_asked_before_a_run_prepares_anything(recipe, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    words = f"--output_dir {tmp_path}/run --push_to_hub me/new --dataset_name {tmp_path}/nowhere --max_steps 1"
    model = "--config_name nowhere.json" if recipe is not train_image_tokenizer else ""
    model = "--model_name_or_path nowhere --sources edit@icon_scenes:shapes" if recipe is sft else model
    with pytest.raises(PermissionError, match="hf auth login"):
        recipe.main([*words.split(), *model.split()])


def test_without_a_repo_nothing_is_asked(hub, make_push):
    push, (period, _), numbers = make_push()
    assert period is None and push.finish() is None
    assert not hub.requests and not numbers


def test_training_pushes_on_its_way_and_at_its_end(hub, tmp_path, not_checked, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "model.json").write_text(json.dumps(MICRO_MODEL))
    fields = {**MICRO_RUN, "config_name": tmp_path / "model.json", "output_dir": tmp_path / "run"}
    fields |= {"max_steps": 3, "save_steps": 2, "push_to_hub": NAME}
    folder = pretrain.main([word for name, value in fields.items() for word in (f"--{name}", str(value))])
    messages = [commit.message for commit in hub.repos[NAME].commits.values()]
    assert messages == ["initial commit", "Step 2 of 3", "Upload model"]
    files = hub.files(NAME)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"samples.png", "loss_curves.png"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint", PUSHED))]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "hf_mm" and f'model="{NAME}"' in card.text and "seed 0" in card.text
    assert f"Uploaded: {hub.url}/{NAME}/commit/" in capsys.readouterr().out


@pytest.mark.parametrize("name", PARTS)
def test_tokenizers_and_clips_are_pushed_on_the_way_too_and_are_trained_as_without(name, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe, words, weights, measured = PARTS[name]
    words += " --num_scenes 24 --max_steps 4 --save_steps 2 --warmup_steps 1 --per_device_train_batch_size 3"
    words = f"--config {ROOT}/recipes/configs/{name}.yaml {words} --report_to none --logging_steps 1".split()
    plain = recipe.main([*words, "--output_dir", str(tmp_path / "plain")])
    seen = {}
    waiting = HubPush._send

    def send(push, step):
        waiting(push, step)
        seen[step] = hub.files(NAME)

    monkeypatch.setattr(HubPush, "_send", send)
    folder = recipe.main([*words, "--output_dir", str(tmp_path / "pushed"), "--push_to_hub", NAME])
    messages = [commit.message for commit in hub.repos[NAME].commits.values()]
    assert messages == ["initial commit", "Step 2 of 4", "Upload model"]
    way, end = seen[2], hub.files(NAME)
    assert "2 steps" in way["README.md"].decode() and "4 steps" in end["README.md"].decode()
    assert {"config.json", "loss_curves.png", *([measured] if measured else [])} <= way.keys() <= end.keys()
    assert way[f"{weights}.safetensors"] != end[f"{weights}.safetensors"]
    assert end[f"{weights}.safetensors"] == (plain / f"{weights}.safetensors").read_bytes()
    assert end[f"{weights}.safetensors"] == (folder / f"{weights}.safetensors").read_bytes()
