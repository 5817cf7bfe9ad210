from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

import train_image_tokenizer
from hf_mm.training.history import read_history


CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "vae_tiny.yaml"
MICRO_RUN = (
    "--block_out_channels 8 16 --norm_num_groups 4 --image_size 32 --num_scenes 24 --num_scale_images 8 --max_steps 4 "
    "--warmup_steps 1 --discriminator_start_step 3 --discriminator_channels 8 --sample_steps 2 --report_to none "
    "--per_device_train_batch_size 3 --logging_steps 1 --ema_decay 0.9 --mixed_precision no"
).split()


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
