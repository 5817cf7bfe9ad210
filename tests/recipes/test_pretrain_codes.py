import json
import math
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, VQModel
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

from building import ModelArguments, build_model, load_config
from hf_mm.data.image_encoding import read_manifest
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.training.checkpoint import list_checkpoints
from hf_mm.training.patch_autoencoder import build_patch_autoencoder


NUM_CODES = 23
PACKED = {"window_length": 220, "ema_decay": 0.9, "mean_spans": 1.5}
CHAMELEON = {"decoder_block": "chameleon", "objective": "causal", "hidden_act": "silu", "tie_word_embeddings": False,
             "image_positions": "grid", "z_loss_weight": 0.01, "initializer_range": 0.02}  # fmt: skip


def test_a_run_on_codes_leaves_a_folder_that_every_door_opens(run, entries, codes, tmp_path, capsys):
    folder = run(max_steps=4, save_steps=2, sample_steps=2, eval_steps=2, eval_dataset_split="validation",
                 num_eval_documents=5, ema_decay=0.9, **codes)  # fmt: skip
    for name in ("samples.png", "loss_curves.png", "samples/step-000002.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 16
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert "Step 2, held-out rows: text_loss " in (shown := capsys.readouterr().out) and "image_loss" in shown
    log = entries(folder)
    assert log[4]["num_image_items_seen"] == 4 * 4 * 16 < log[4]["num_items_seen"]

    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.vocab_size == len(processor.tokenizer) and model.config.image_vocab_size == NUM_CODES
    before = VQModel.from_pretrained(codes["image_tokenizer_name"], use_safetensors=True).state_dict()
    for name, weight in model.image_tokenizer.state_dict().items():
        assert torch.equal(weight, before[name]), name
    first = DiffusionPipeline.from_pretrained(folder)("a red star", generator=torch.Generator().manual_seed(1))
    second = pipeline("text-to-image", model=str(folder))("a red star", generator=torch.Generator().manual_seed(1))
    assert first.images[0].size == (16, 16) and first.images[0].tobytes() == second.tobytes()


@pytest.mark.parametrize(
    "num_workers", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["no workers", "two workers"]
)
def test_a_killed_run_on_codes_resumes_with_the_losses_of_the_uninterrupted_one(
    num_workers, run, make_command, entries, child_environment, codes, tmp_path
):
    settings = {**PACKED, **codes, "max_steps": 60, "save_steps": 3, "dataloader_num_workers": num_workers}
    whole = entries(run("whole", **settings))
    kill_after = random.Random(num_workers).randint(5, 40)
    history = tmp_path / "cut" / "history.jsonl"
    with (tmp_path / "errors").open("w") as errors:
        child = subprocess.Popen(
            make_command(1, "cut", **settings), env=child_environment, stdout=errors, stderr=errors
        )
        deadline = time.monotonic() + 300
        while child.poll() is None and time.monotonic() < deadline:
            if history.exists() and history.read_bytes().count(b"\n") >= kill_after:
                break
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL, (tmp_path / "errors").read_text()
    reached = max(entries(tmp_path / "cut"))
    assert kill_after <= reached < 60

    assert entries(run("cut", **settings)) == whole


def test_accumulated_half_batches_of_codes_equal_one_batch(run, entries, codes):
    whole = entries(run("whole", per_device_train_batch_size=8, max_steps=4, **codes))
    halves = entries(run("halves", gradient_accumulation_steps=2, max_steps=4, **codes))
    for name in ("loss", "text_loss", "image_loss", "grad_norm"):
        apart = [abs(whole[step][name] / halves[step][name] - 1) for step in sorted(whole)]
        assert max(apart[:2]) < 1e-6 and max(apart) < 1e-4, name
    for name in ("num_items_seen", "num_image_items_seen"):
        assert [entry[name] for entry in whole.values()] == [entry[name] for entry in halves.values()]


def test_a_finished_model_of_codes_trains_further(run, entries, codes):
    first = run("first", **codes)
    further = {**codes, "config_name": None, "image_tokenizer_name": None, "model_name_or_path": first}
    folder = run("second", learning_rate=1e-9, **further)
    before, after = (AutoModelForMultimodalLM.from_pretrained(path) for path in (first, folder))
    torch.testing.assert_close(before.lm_head.weight, after.lm_head.weight, rtol=0, atol=1e-6)
    assert entries(folder)[1]["loss"] < entries(first)[1]["loss"]


def test_text_only_rows_are_mixed_in(run, entries, codes, tmp_path):
    (tmp_path / "texts").mkdir()
    texts = {"text": ["one two three four. " * 60, "short", "an <eoss> in it"]}
    Dataset.from_dict(texts).to_parquet(tmp_path / "texts" / "train.parquet")
    folder = run(max_steps=6, text_dataset_name=tmp_path / "texts", window_length=150, **codes)
    assert "Text-only rows: 2; 1 dropped" in (folder / "README.md").read_text()
    assert 0 < entries(folder)[6]["num_image_items_seen"] < 6 * 4 * 16


def test_a_model_reads_the_words_of_tasks_before_it_is_tuned_on_them(run, entries, codes):
    asked = ["vqa@icon_scenes:shapes", "edit@icon_scenes:shapes"]
    folder = run(max_steps=4, text_sources=asked, tokenizer_sources=asked, text_token_share=0.6, **codes)
    card = (folder / "README.md").read_text()
    assert "Text-only rows: 12500; 0 dropped" in card and "`vqa@icon_scenes:shapes`" in card
    assert 0 < entries(folder)[4]["num_image_items_seen"] < 4 * 4 * 16
    with pytest.raises(ValueError, match="`text_dataset_name`='me/texts' and `text_sources`=.*Give one"):
        run(text_sources=asked, text_dataset_name="me/texts", **codes)


def test_the_chameleon_baseline_goes_from_codes_to_a_folder_that_draws_and_captions(run, entries, codes, tmp_path):
    model = json.loads(Path(codes["config_name"]).read_text()) | CHAMELEON
    (tmp_path / "chameleon.json").write_text(json.dumps(model))
    chameleon = {**codes, "config_name": tmp_path / "chameleon.json", "max_spans": None}
    folder = run("chameleon", max_steps=12, warmup_steps=1, learning_rate=3e-3, window_length=120, **chameleon)
    log = entries(folder)
    assert log[12]["image_loss"] < log[1]["image_loss"] and log[12]["text_loss"] < log[1]["text_loss"]
    mean = log[1]["loss"] - 0.01 * math.log(len(AutoProcessor.from_pretrained(folder).tokenizer)) ** 2
    low, high = sorted((log[1]["text_loss"], log[1]["image_loss"]))
    assert low < mean < high  # the first scores are nearly 0, whose z-loss is known

    pipe = DiffusionPipeline.from_pretrained(folder)
    assert {type(layer).__name__ for layer in pipe.model.model.layers} == {"ChameleonSwinDecoderLayer"}
    assert (pipe.model.config.objective, pipe.processor.objective) == ("causal", "causal")
    image = pipe("a red star", guidance_scale=2.0, generator=torch.Generator().manual_seed(1)).images[0]
    assert image.size == (16, 16) and len(pipe.caption([image, image], max_new_tokens=5)) == 2
    with pytest.raises(ValueError, match="`objective`='causal'.*cannot fill in"):
        pipe.infill_caption(image, "a ___ star")
    with pytest.raises(ValueError, match="`mean_spans`=1.5, but the model has `objective`='causal'"):
        run("other", **{**chameleon, "mean_spans": 1.5})


def test_a_model_that_fills_in_becomes_causal_where_the_recipe_says_so(run, codes):
    first = run("first", **codes)
    further = {**codes, "config_name": None, "image_tokenizer_name": None, "model_name_or_path": first}
    with pytest.raises(ValueError, match="`max_spans`=5, but the model has `objective`='causal'"):
        run("spans", config_overrides="objective=causal", **further)
    further["max_spans"] = None  # documents without spans have no most of them
    folder = run("second", config_overrides="objective=causal", caption_dropout=0.3, **further)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.processor.unconditional_prompt() == [pipe.model.config.eos_token_id]


def test_rows_without_codes_are_refused_with_the_way_to_make_them(run, codes):
    with pytest.raises(ValueError, match="'icon_scenes:shapes' has no column `codes`.*recipes/encode_images.py"):
        run(**{**codes, "dataset_name": "icon_scenes:shapes"})
    with pytest.raises(ValueError, match="'icon_scenes:icons' has no column `codes`"):
        run(**codes, eval_dataset_name="icon_scenes:icons", eval_dataset_split="validation")


def test_codes_are_refused_by_a_model_that_does_not_read_them(run, codes):
    with pytest.raises(ValueError, match="holds codes, and the model reads pixels or latents"):
        run(dataset_name=codes["dataset_name"])


def test_rows_of_another_image_tokenizer_than_the_models_are_refused(run, codes, encode, save_vq, tmp_path):
    other = save_vq("other", seed=1)
    with pytest.raises(ValueError, match="encoded with another image tokenizer than the model's, .*vq.*'weights'"):
        run(**{**codes, "image_tokenizer_name": other})
    with pytest.raises(ValueError, match="model has none to draw with. Name it as `image_tokenizer_name`"):
        run(**{**codes, "image_tokenizer_name": None, "config_overrides": "image_size=16"})
    held_out = encode("held_out", other)
    assert "weights" in read_manifest(held_out)["encoder"] and read_manifest("icon_scenes:shapes") is None
    with pytest.raises(ValueError, match="held_out' was encoded with another image tokenizer"):
        run(**codes, eval_dataset_name=held_out, eval_dataset_split="train")


def test_embeddings_of_codes_are_what_these_show_and_stay_it(run, codes, encode, tmp_path):
    vq = build_patch_autoencoder(4, 16, NUM_CODES)
    patches = torch.rand(NUM_CODES, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    patches[1] = patches[0] + 0.01
    vq.quantize.embedding.weight.data = patches
    VQModel.from_config(vq.config).save_pretrained(tmp_path / "trained")  # of the same shape, but not of patches
    with pytest.raises(ValueError, match="whose codes are patches of pixels"):
        run("wrong", **{**codes, "image_tokenizer_name": tmp_path / "trained"}, trains_code_embeddings=False)
    vq.save_pretrained(tmp_path / "patches")
    arguments = ModelArguments(
        config_name=str(codes["config_name"]),
        image_tokenizer_name=str(tmp_path / "patches"),
        trains_code_embeddings=False,
    )
    config, tokenizer = load_config(arguments), train_text_tokenizer(["a red star"], vocab_size=300)
    model, _ = build_model(arguments, config, tokenizer)
    ids = model.config.image_token_ids
    embeddings = model.get_input_embeddings().weight[ids.start : ids.stop]
    distances = torch.cdist(embeddings, embeddings).fill_diagonal_(9.0)
    assert distances[0].argmin() == 1 and distances[0, 1] < 0.2 * distances[0, 2:].min()
    assert embeddings.std().item() == pytest.approx(0.2, rel=0.1)

    codes |= {
        "image_tokenizer_name": tmp_path / "patches",
        "dataset_name": encode("patch_codes", tmp_path / "patches"),
    }
    first = run("first", seed=3, trains_code_embeddings=False, **codes)
    further = {**codes, "config_name": None, "image_tokenizer_name": None, "model_name_or_path": first}
    second = run("second", trains_code_embeddings=False, learning_rate=0.1, **further)
    before, after = (AutoModelForMultimodalLM.from_pretrained(folder) for folder in (first, second))
    is_same = (before.get_input_embeddings().weight == after.get_input_embeddings().weight).all(1)
    ids = after.config.image_token_ids
    assert is_same[ids.start : ids.stop].all() and not is_same[: ids.start].all()
    embeddings = after.get_input_embeddings().weight[ids.start : ids.stop]
    distances = torch.cdist(embeddings, embeddings).fill_diagonal_(9.0)
    assert distances[0].argmin() == 1 and distances[0, 1] < 0.2 * distances[0, 2:].min()


def test_embeddings_of_codes_need_patches_and_a_model_of_codes(run, codes, latents):
    with pytest.raises(ValueError, match="`trains_code_embeddings`=False needs .* whose codes .*make_patch_codes.py"):
        run("wrong", **codes, trains_code_embeddings=False)
    with pytest.raises(ValueError, match="is for models that read codes, and a Transfusion.* reads latents"):
        run("wrong", **latents, trains_code_embeddings=False)


def test_a_window_without_room_for_spans_is_refused(run, codes):
    with pytest.raises(ValueError, match="`window_length`=34 .* has no room for a picture and a caption"):
        run(**codes, window_length=34)
    with pytest.raises(ValueError, match="`max_spans`=16 is more than `num_sentinel_tokens`=5"):
        run(**{**codes, "max_spans": 16})
