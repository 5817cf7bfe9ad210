import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from micro_run import MICRO_MODEL
from PIL import Image
from transformers import AutoModelForMultimodalLM

import export_checkpoint
import hf_mm  # noqa: F401
from hf_mm.training.checkpoint import list_checkpoints


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_sharded(make_words, child_environment):
    """Trains in two processes with the sharding of `recipes/accelerate/fsdp2.yaml`."""
    sharding = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in sharding.items()}  # as `accelerate launch` passes it

    def train(folder: str, **fields: object) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *launcher, str(Path(__file__).with_name("sharded_run.py"))]
        done = subprocess.run(
            command + make_words(folder, **fields),
            env={**child_environment, "ACCELERATE_USE_FSDP": "true", **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return train


@pytest.mark.slow
def test_sharded_weights_train_draw_and_export_like_whole_ones(run, run_sharded, entries, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "sample_steps": 2, "eval_steps": 2, "ema_decay": 0.9,
                "eval_dataset_split": "validation", "num_eval_documents": 5}  # fmt: skip
    whole = run("whole", per_device_train_batch_size=8, **settings)
    sharded = tmp_path / "sharded"
    run_sharded("sharded", **settings)

    assert (list_checkpoints(sharded)[-1] / "ema_1.safetensors").exists()  # the weights were sharded
    for name in ("samples.png", "samples/step-000002.png"):
        with Image.open(sharded / name) as picture, Image.open(whole / name) as expected:
            assert picture.size == expected.size
    first, second = (AutoModelForMultimodalLM.from_pretrained(folder) for folder in (whole, sharded))
    for (name, expected), weight in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-3, msg=name)
    names = ("loss", "text_loss", "image_loss", "grad_norm")
    losses = [[line[step][name] for step in (1, 2) for name in names] for line in map(entries, (whole, sharded))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, sharded)]
    assert configs[1]["text_config"].pop("dtype") == configs[1]["dtype"]  # written by loading
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_sharded_bf16_computes_as_one_process_does_and_adds_up_gradients_in_float32(
    run, run_sharded, entries, tmp_path
):
    whole = run("whole", per_device_train_batch_size=8, max_steps=1, mixed_precision="bf16")
    run_sharded("sharded", max_steps=1, mixed_precision="bf16")

    policies = json.loads((tmp_path / "sharded" / "precisions.json").read_text())
    wanted = {"param_dtype": "torch.bfloat16", "reduce_dtype": "torch.float32", "output_dtype": None,
              "cast_forward_inputs": False}  # fmt: skip
    assert len(policies) >= 4 and all(policy == wanted for policy in policies)  # both layers, the last norm, the rest
    one, two = (entries(folder)[1] for folder in (whole, tmp_path / "sharded"))
    # Were latents and timesteps rounded to bf16, the losses would differ by 3e-4 and the norm by 2e-3; were the loss
    # itself, by 1e-3.
    for name in ("loss", "text_loss", "image_loss"):
        assert two[name] == pytest.approx(one[name], rel=2e-5), name
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-4)


@pytest.mark.slow
def test_sharded_bf16_trains_with_an_image_tokenizer_where_one_process_has_no_image(
    run, run_sharded, entries, tmp_path, tiny_vae
):
    (tmp_path / "latents.json").write_text(json.dumps({**MICRO_MODEL, "patch_size": 2, "vae_config": tiny_vae}))
    (tmp_path / "texts").mkdir()
    rows = [json.dumps({"text": f"{number} red stars"}) for number in range(9)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(rows))
    settings = {"config_name": tmp_path / "latents.json", "text_dataset_name": tmp_path / "texts", "max_steps": 3,
                "text_token_share": 0.5, "mixed_precision": "bf16"}  # fmt: skip
    whole = run("whole", per_device_train_batch_size=4, **settings)
    run_sharded("sharded", per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings)
    one, two = map(entries, (whole, tmp_path / "sharded"))
    seen = [entry["num_images_seen"] for entry in one.values()]
    assert seen[:2] == [1, 2] and [entry["num_images_seen"] for entry in two.values()] == seen  # one in four rows
    assert [two[step]["loss"] for step in two] == pytest.approx([one[step]["loss"] for step in one], rel=1e-3)


@pytest.mark.slow
def test_a_sharded_run_goes_on_where_it_stopped(run_sharded, entries, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "ema_decay": 0.9}
    run_sharded("sharded", **settings)
    whole = entries(tmp_path / "sharded")
    for folder in list_checkpoints(tmp_path / "sharded")[1:]:
        folder.rename(folder.with_name("later"))
    run_sharded("sharded", **settings)
    assert entries(tmp_path / "sharded") == whole

    # One command makes one model of the shards, the same that the processes wrote together.
    checkpoint = list_checkpoints(tmp_path / "sharded")[-1]
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir()
    words = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "exported")]
    folders = (tmp_path / "sharded", export_checkpoint.main(words))
    wanted, given = (AutoModelForMultimodalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(given[name], weight) for name, weight in wanted.items())


@pytest.mark.slow
def test_two_machines_train_as_one_does_and_layers_may_be_computed_again(
    run, make_words, child_environment, entries, tmp_path
):
    whole = run("whole", per_device_train_batch_size=8)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    config = ROOT / "recipes" / "accelerate" / "fsdp2_nodes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_machines", "2",
                "--num_processes", "2", "--main_process_port", str(port)]  # fmt: skip
    script = str(Path(__file__).with_name("sharded_run.py"))
    words = make_words("nodes", gradient_checkpointing="true")
    machines = [
        subprocess.Popen(
            [sys.executable, *launcher, "--machine_rank", str(rank), script, *words],
            env=child_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        told = [machine.communicate(timeout=400)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(told)
    names = ("loss", "grad_norm")
    losses = [
        [line[step][name] for step in (1, 2) for name in names] for line in map(entries, (whole, tmp_path / "nodes"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (list_checkpoints(tmp_path / "nodes")[-1] / "pytorch_model_fsdp_0").is_dir()
