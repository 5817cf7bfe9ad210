import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image

import train_image_tokenizer
from hf_mm.training.history import read_history


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "configs" / "vae_tiny.yaml"
VQ_CONFIG = ROOT / "recipes" / "configs" / "vq_tiny.yaml"
MICRO_RUN = (
    "--block_out_channels 8 16 --norm_num_groups 4 --image_size 32 --num_scenes 24 --num_scale_images 8 --max_steps 4 "
    "--warmup_steps 1 --discriminator_start_step 3 --discriminator_channels 8 --sample_steps 2 --report_to none "
    "--per_device_train_batch_size 3 --logging_steps 1 --ema_decay 0.9 --mixed_precision no"
).split()


# Codes are revived after every second step, and the third step is the discriminator's first.
VQ_RUN = [
    *MICRO_RUN,
    *"--num_vq_embeddings 23 --latent_channels 5 --code_revival_steps 2 --last_code_revival_step 4".split(),
    *"--num_revival_images 6 --layers_per_block 1 --lr_scheduler_type constant_with_warmup".split(),
    *"--quantization_start_step 0".split(),
]


@pytest.fixture
def run(tmp_path):
    def train(*words: str, folder: str = "run") -> Path:
        argv = [f"--config={CONFIG}", f"--output_dir={tmp_path / folder}", *MICRO_RUN, *words]
        return train_image_tokenizer.main(argv)

    return train


def test_recipe_trains_resumes_and_saves_a_tokenizer_with_its_scale(run):
    folder = run("--max_train_seconds", "1e-9")
    assert (folder / "checkpoint-1").is_dir()
    assert run() == folder
    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    assert 0 < vae.config.scaling_factor and vae.config.scaling_factor != 0.18215
    entries = read_history(folder / "history.jsonl")
    assert ["generator_loss" in entry for entry in entries] == [False, False, True, True]
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.width > picture.height > 32
    whole = read_history(run(folder="whole") / "history.jsonl")
    assert [entry["loss"] for entry in entries] == [entry["loss"] for entry in whole]


def test_sizes_must_fit_the_stride_of_the_tokenizer_that_is_trained(run):
    with pytest.raises(ValueError, match="`image_size`=33 must be a multiple of 2, .* Try 32"):
        run("--image_size", "33")
    folder = run("--max_steps", "2")
    with pytest.raises(ValueError, match="`image_size`=35 must be a multiple of 2, .* Try 34"):
        run("--model_name_or_path", str(folder), "--image_size", "35", folder="further")


def test_pictures_need_no_captions(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (37, 41, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{seed}.png")
    source = ["--dataset_name", str(tmp_path / "pictures"), "--max_steps", "2"]
    assert len(read_history(run(*source) / "history.jsonl")) == 2
    with pytest.raises(ValueError, match=r"`image_column`='photo' is not there. Columns here: \['image'\]"):
        run(*source, "--image_column", "photo", folder="wrong")
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 5 images are unreadable"):
        run(*source, folder="damaged")


@pytest.fixture
def run_vq(tmp_path):
    def train(*words: str, folder: str = "run") -> Path:
        return train_image_tokenizer.main(
            [f"--config={VQ_CONFIG}", f"--output_dir={tmp_path / folder}", *VQ_RUN, *words]
        )

    return train


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return VQModel.from_pretrained(folder, use_safetensors=True).state_dict()


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in e.items() if k != "step_seconds"} for e in read_history(folder / "history.jsonl")]


def test_codes_are_trained_revived_and_reported_and_a_resumed_run_is_the_same_run(run_vq):
    whole = run_vq("--max_steps", "6")
    entries = read_history(whole / "history.jsonl")
    assert ["used_code_share" in entry for entry in entries] == [False, False, True, False, True, False]
    assert all(0 < e["used_code_share"] <= 1 and 1 <= e["code_perplexity"] <= 23 for e in (entries[2], entries[4]))
    assert ["generator_loss" in entry for entry in entries] == [False, False, True, True, True, True]
    usage = json.loads((whole / "codebook_usage.json").read_text())
    assert usage["num_pictures"] == 8 and 0 < usage["used_share"] <= 1 <= usage["perplexity"]
    assert (whole / "reconstructions.png").exists()
    for steps in (2, 3, 6):  # cut after the first revival, and between two
        cut = run_vq("--max_steps", str(steps), "--save_steps", "1", folder="cut")
    assert losses_of(cut) == losses_of(whole)
    first, second = weights_of(cut), weights_of(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_quantization_begins_at_its_step_also_in_a_resumed_run(run_vq):
    words = ["--quantization_start_step", "2", "--local_codes", "false"]  # with them the loss is never 0
    whole = run_vq("--max_steps", "5", *words)
    entries = read_history(whole / "history.jsonl")
    assert [entry["latent_loss"] > 0 for entry in entries] == [False, False, True, True, True]
    assert ["used_code_share" in entry for entry in entries] == [False, False, False, False, True]
    for steps in (2, 5):
        cut = run_vq("--max_steps", str(steps), *words, folder="cut")
    assert losses_of(cut) == losses_of(whole)
    with pytest.raises(ValueError, match="`quantization_start_step`=3 must be a multiple of `code_revival_steps`=2"):
        run_vq("--quantization_start_step", "3", folder="wrong")
    with pytest.raises(ValueError, match="`quantization_start_step`=4 is beyond `max_steps`=2"):
        run_vq("--quantization_start_step", "4", "--max_steps", "2", folder="wrong")


def test_a_trained_codebook_can_be_trained_further(run_vq):
    folder = run_vq("--max_steps", "2")
    further = run_vq("--max_steps", "2", "--model_name_or_path", str(folder), folder="further")
    assert weights_of(further).keys() == weights_of(folder).keys()
    with pytest.raises(ValueError, match="`model_name_or_path`=.* is of class VQModel"):
        run_vq(
            *("--model_name_or_path", str(folder), "--image_tokenizer_class", "AutoencoderKL"),
            *("--local_codes", "false"),
            folder="wrong",
        )


def test_a_codebook_that_is_trained_further_is_not_drawn_anew(run_vq):
    folder = run_vq("--max_steps", "2")
    words = ["--max_steps", "2", "--model_name_or_path", str(folder), "--learning_rate", "1e-6"]
    further = run_vq(*words, "--code_revival_steps", "none", folder="further")
    name = "quantize.embedding.weight"
    torch.testing.assert_close(weights_of(further)[name], weights_of(folder)[name], atol=1e-5, rtol=0)


def test_noise_of_latents_is_scaled_as_the_recipe_says(run):
    folder = str(run("--max_steps", "2"))
    losses = []
    for scale in ("0", "0.5", "1"):
        words = ["--max_steps", "2", "--model_name_or_path", folder, "--latent_noise_scale", scale]
        losses.append(read_history(run(*words, folder=scale) / "history.jsonl")[0]["reconstruction_loss"])
    assert len(set(losses)) == 3


def test_a_decoder_is_trained_alone_and_latents_keep_their_scale(run):
    folder = run("--max_steps", "2")
    words = ["--max_steps", "2", "--trains_decoder_only", "true", "--model_name_or_path"]
    further = run(*words, str(folder), "--latent_noise_scale", "0.5", "--seed", "1", folder="further")
    first, second = (AutoencoderKL.from_pretrained(place, use_safetensors=True) for place in (folder, further))
    assert first.config.scaling_factor == second.config.scaling_factor
    weights = second.state_dict()
    moved = {name for name, weight in first.state_dict().items() if not torch.equal(weight, weights[name])}
    assert moved and {name.partition(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="`trains_decoder_only`=True needs `model_name_or_path`"):
        run("--trains_decoder_only", "true", folder="wrong")
    with pytest.raises(ValueError, match="`latent_noise_scale`=2.0 must be at least 0 and at most 1"):
        run("--latent_noise_scale", "2", folder="wrong")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    with pytest.raises(ValueError, match="has no `scaling_factor`, which models of its latents rely on"):
        run(*words, str(folder), folder="wrong")


def test_a_decoder_is_trained_alone_behind_codes_that_stay(run_vq):
    folder = run_vq("--max_steps", "2")
    alone = ["--model_name_or_path", str(folder), "--trains_decoder_only", "true"]
    further = run_vq("--max_steps", "2", *alone, "--code_revival_steps", "none", "--local_codes", "false", folder="on")
    first, second = weights_of(folder), weights_of(further)
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="`local_codes`=True trains codes"):
        run_vq(*alone, folder="wrong")
    with pytest.raises(ValueError, match="`code_revival_steps`=2 draws codes anew"):
        run_vq(*alone, "--local_codes", "false", folder="wrong")
    with pytest.raises(ValueError, match="`quantization_start_step`=4 would draw all codes of"):
        run_vq(*alone, "--quantization_start_step", "4", folder="wrong")
    with pytest.raises(ValueError, match="`latent_noise_scale`=0.5 is for an AutoencoderKL"):
        run_vq("--latent_noise_scale", "0.5", folder="wrong")


@pytest.mark.slow
def test_two_processes_revive_the_same_codes_as_one(tmp_path):
    def launch(folder: str, num_processes: int, rows: int) -> Path:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        script = [str(ROOT / "recipes" / "train_image_tokenizer.py"), f"--config={VQ_CONFIG}"]
        options = [f"--output_dir={tmp_path / folder}", *VQ_RUN, "--per_device_train_batch_size", str(rows)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, *launcher, *script, *options], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return tmp_path / folder

    one, two = launch("one", 1, 6), launch("two", 2, 3)
    for first, second in zip(losses_of(one), losses_of(two), strict=True):
        assert second == pytest.approx(first, rel=1e-3)
        assert second.get("used_code_share") == first.get("used_code_share")
    first, second = weights_of(one), weights_of(two)
    torch.testing.assert_close(
        second["quantize.embedding.weight"], first["quantize.embedding.weight"], atol=2e-3, rtol=0
    )
