import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, VQModel
from micro_run import MICRO_MODEL, MICRO_RUN
from transformers.utils import logging

import encode_images
import pretrain
from hf_mm.training.history import read_history


ROOT = Path(__file__).parents[2]

NUM_CODES = 23
MICRO_CM3LEON = {
    "model_type": "cm3leon",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 192,
    "initializer_range": 0.05,
    "image_size": 16,
    "image_vocab_size": NUM_CODES,
    "num_sentinel_tokens": 5,
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logging.disable_progress_bar()


@pytest.fixture
def make_words(tmp_path: Path):
    """The command line of a micro run, changed by keyword."""
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MICRO_MODEL))

    def make(folder: str = "run", **fields: object) -> list[str]:
        fields = {"config_name": model, "output_dir": tmp_path / folder, **MICRO_RUN, **fields}
        words = []
        for name, value in fields.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    return make


@pytest.fixture
def run(make_words):
    """Trains in this process; returns the run's folder."""

    def train(folder: str = "run", **fields: object) -> Path:
        return pretrain.main(make_words(folder, **fields))

    return train


@pytest.fixture
def make_command(make_words):
    """The command that trains in processes of its own."""

    def make(num_processes: int, folder: str, **fields: object) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        script = str(ROOT / "recipes" / "pretrain.py")
        return [sys.executable, *(launcher if num_processes > 1 else []), script, *make_words(folder, **fields)]

    return make


@pytest.fixture
def entries():
    """The log of a run by step, without its times."""

    def read(folder: Path) -> dict[int, dict[str, float]]:
        lines = read_history(folder / "history.jsonl")
        return {line.pop("step"): {k: v for k, v in line.items() if k != "step_seconds"} for line in lines}

    return read


@pytest.fixture
def child_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def save_vq(tmp_path: Path):
    """Makes image tokenizers of random weights."""

    def make(name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(2, 4, 4),
            layers_per_block=1,
            latent_channels=3,
            num_vq_embeddings=NUM_CODES,
            norm_num_groups=2,
            sample_size=16,
            mid_block_add_attention=False,
        )
        vq.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def encode(tmp_path: Path):
    """Encodes embedded scenes into a folder."""

    def make(folder: str, tokenizer: Path | None, **fields: object) -> Path:
        fields = {"num_scenes": 23, "image_size": 16, "num_shards": 2, "output_dir": tmp_path / folder, **fields}
        fields |= {} if tokenizer is None else {"image_tokenizer_name": tokenizer}
        return encode_images.main([word for name, value in fields.items() for word in (f"--{name}", str(value))])

    return make


@pytest.fixture
def latents(tmp_path: Path, encode) -> dict[str, object]:
    """The fields of a micro run on latents of a VAE."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 6),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        scaling_factor=0.7,
    )
    vae.save_pretrained(tmp_path / "vae")
    return {"image_tokenizer_name": tmp_path / "vae", "dataset_name": encode("latents", tmp_path / "vae")}


@pytest.fixture
def codes(tmp_path: Path, encode, save_vq) -> dict[str, object]:
    """The fields of a micro run on codes."""
    (tmp_path / "cm3leon.json").write_text(json.dumps(MICRO_CM3LEON))
    tokenizer = save_vq("vq", seed=0)
    return {
        "config_name": tmp_path / "cm3leon.json",
        "image_tokenizer_name": tokenizer,
        "dataset_name": encode("codes", tokenizer),
        "max_spans": 5,
    }


@pytest.fixture
def write_recipe(tmp_path: Path):
    """Writes a recipe of these fields; returns the words that name it."""

    def write(fields: dict[str, object]) -> list[str]:
        path = tmp_path / "tried.yaml"
        path.write_text(yaml.safe_dump(fields))
        return ["--config", str(path)]

    return write
