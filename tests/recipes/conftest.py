import json
import os
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

import pretrain
from hf_mm.training.history import read_history


ROOT = Path(__file__).parents[2]

MICRO_MODEL = {
    "model_type": "transfusion",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 160,
    },
    "image_size": 16,
    "patch_size": 4,
    "prediction_type": "flow_prediction",
    "timestep_sampling": "logit_normal",
    "num_inference_steps": 2,
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "image_token_id": 5,
}
MICRO_RUN = {
    "num_scenes": 23,
    "vocab_size": 300,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "mixed_precision": "no",
    "report_to": "none",
    "num_samples": 2,
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
