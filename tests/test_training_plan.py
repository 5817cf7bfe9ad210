"""The plan of a training run: its counts against real models, its memory against what real steps allocate."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForMultimodalLM
from typer.testing import CliRunner

from hf_mm.cli import app
from hf_mm.cm3leon import CM3LeonConfig
from hf_mm.evaluation.scaling import count_flops
from hf_mm.meta_step import build_meta_model, fill_windows, measure_activations, measure_flops
from hf_mm.training_plan import PlanArguments, open_plan, plan_training
from hf_mm.transfusion import TransfusionConfig


ROOT = Path(__file__).parents[1]
MODELS = ROOT / "recipes" / "configs" / "models"
RECIPES = ROOT / "recipes" / "configs"
TEXT = {"model_type": "llama", "vocab_size": 211, "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 256}  # fmt: skip


def small_config(kind: str):
    if kind in ("codes", "chameleon"):
        fields = {"decoder_block": kind, "hidden_act": "silu", "tie_word_embeddings": False, "z_loss_weight": 1e-5}
        return CM3LeonConfig(
            **fields if kind == "chameleon" else {},
            vocab_size=211, image_vocab_size=64, first_image_token_id=100, break_token_id=164, eoss_token_id=165,
            image_token_id=5, num_sentinel_tokens=8, first_sentinel_token_id=170, hidden_size=96, num_hidden_layers=3,
            num_attention_heads=6, max_position_embeddings=256, image_size=64,
        )  # fmt: skip
    fields = {"patch_layer": "unet", "unet_block_out_channels": [32, 64], "patch_size": 2, "image_size": 16}
    fields = {"patch_layer": "linear", "patch_size": 4, "image_size": 32} if kind == "linear" else fields
    return TransfusionConfig(text_config=TEXT, boi_token_id=3, eoi_token_id=4, image_token_id=5, **fields)


def allocated_peak(config, num_windows: int, *, gradient_checkpointing: bool) -> int:
    """Peak of what the allocator gave out during a forward and backward pass of real tensors, beside what lay there."""
    model = AutoModelForMultimodalLM.from_config(config).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batch = fill_windows(config, num_windows, 256)
    batch = {
        name: torch.rand(value.shape).to(value.dtype) if value.is_meta else value for name, value in batch.items()
    }
    batch["attention_mask"][...] = torch.ones(256, 256).tril().bool()
    for _ in range(2):  # the second pass adds to gradients that are there, as in the middle of a step
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(**batch, use_cache=False).loss.backward()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["linear", "unet", "codes", "chameleon"])
def test_activations_are_those_that_a_real_step_allocates(kind, gradient_checkpointing):
    config = small_config(kind)
    options = {"gradient_checkpointing": gradient_checkpointing}
    planned = measure_activations(build_meta_model(config), 5, 256, **options)
    allocated = allocated_peak(config, 5, **options)
    print(f"{kind} {options}: planned {planned}, allocated {allocated}: {planned / allocated - 1:+.1%}")
    assert planned == pytest.approx(allocated, rel=0.1)


@pytest.mark.parametrize("kind", ["linear", "codes", "chameleon"])
def test_flops_are_those_that_a_real_step_runs(kind):
    config = small_config(kind)
    planned = measure_flops(build_meta_model(config), 256, count_flops)
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation="eager").train()
    batch = fill_windows(config, 1, 256)
    batch["attention_mask"] = torch.zeros(1, 1, 256, 256)
    batch = {name: torch.rand(value.shape) if value.is_meta else value for name, value in batch.items()}
    assert planned == count_flops(lambda: model(**batch, use_cache=False).loss.backward())


def plan(kind: str, **options):
    name = str({"codes": MODELS / "cm3leon_tiny.json"}.get(kind, MODELS / "transfusion_tiny.json"))
    return plan_training(open_plan(name), PlanArguments(**options), count_flops)


def test_low_precision_needs_less_for_activations_and_more_for_copies_of_weights():
    config = small_config("codes")
    full, low = (
        measure_activations(build_meta_model(config), 8, 256, autocast_dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    assert low < full
    weights = sum(weight.numel() for weight in build_meta_model(config).parameters())
    slim, copied = (
        measure_activations(model, 1, 8, autocast_dtype=torch.bfloat16)
        for model in (build_meta_model(config).bfloat16(), build_meta_model(config))
    )
    assert copied > slim + 1.5 * weights


def test_sharding_divides_what_lies_there_and_gathers_what_is_at_work():
    one, many, whole = (
        plan("codes", num_gpus=1),
        plan("codes", num_gpus=16),
        plan("codes", num_gpus=16, sharding="ddp"),
    )
    for part in ("weights", "gradients", "optimizer"):
        assert many["memory"][part] == one["memory"][part] // 16
        assert whole["memory"][part] == one["memory"][part]
    assert one["memory"]["weights"] == 4 * one["parameters"]["total"]
    assert many["memory"]["gathered"] == one["memory"]["gathered"] > 0
    assert "gathered" not in whole["memory"]


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    options = {"gpu_memory_gib": 0.3, "window_length": 128}
    largest = plan("linear", **options)["memory"]["largest_micro_batch_size"]
    assert largest > 3
    at_it, beyond = (plan("linear", micro_batch_size=largest + more, **options)["memory"] for more in (0, 1))
    assert at_it["fits"] and not beyond["fits"]
    nothing = plan("linear", gpu_memory_gib=0.001)["memory"]
    assert not nothing["fits"] and nothing["largest_micro_batch_size"] == 0


def test_time_and_data_follow_from_the_tokens():
    options = {
        "num_gpus": 7,
        "micro_batch_size": 3,
        "window_length": 100,
        "tokens_per_step": 5000,
        "token_budget": 1e9,
    }
    facts = plan("linear", **options)
    assert facts["layout"]["gradient_accumulation_steps"] == 3 and facts["step"]["tokens"] == 6300
    assert facts["run"]["steps"] == math.ceil(1e9 / 6300)
    rate = 7 * 0.5 * 989e12
    assert facts["run"]["days"] * 86_400 == pytest.approx(facts["run"]["flops"] / rate)
    assert facts["run"]["flops"] == pytest.approx(facts["flops_per_token"]["counted"] * 1e9, rel=1e-3)
    assert facts["data"]["images"] * 64 == pytest.approx(0.5e9)
    assert facts["data"]["bytes_per_image"] == 3 * 32 * 32 * 4  # as latents: mean and deviation in float16
    failures = facts["failures"]
    half = failures["save_interval_minutes"] / 2
    assert failures["minutes_lost_per_failure"] == pytest.approx(half + 10)
    slower = plan("linear", **options, utilisation=0.25)
    assert slower["run"]["days"] == pytest.approx(2 * facts["run"]["days"])
    assert slower["failures"]["expected"] == pytest.approx(2 * failures["expected"])


@pytest.mark.parametrize(
    "path", sorted(MODELS.glob("*_*b.json")) + sorted(MODELS.glob("*m.json")), ids=lambda p: p.stem
)
def test_models_of_the_papers_are_their_presets(path):
    family, _, size = path.stem.partition("_")
    config = open_plan(str(path)).config
    preset = type(config).from_preset(size.upper())
    given, wanted = config.to_dict(), preset.to_dict()
    for name in ("vae_config", "vq_config"):
        assert (given.pop(name, None) is None) is (f"{name}" not in path.read_text())
        wanted.pop(name, None)
    assert given == wanted and positions(config) == {"transfusion": 256, "cm3leon": 1024}[family]


def positions(config) -> int:
    return (
        config.tokens_per_image if config.model_type == "cm3leon" else (config.image_size // config.image_stride) ** 2
    )


def info(*words):
    return CliRunner().invoke(app, ["info", *map(str, words)])


def test_the_command_plans_recipes_files_and_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's model is found beside it
    recipe = RECIPES / "transfusion_0.16b_pretrain.yaml"
    told = info(recipe, "--plan", "--num-gpus", 8, "--token-budget", 5e11, "--json")
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["layout"]["window_length"] == 4096 and not facts["layout"]["gradient_checkpointing"]
    assert 0.16e9 < facts["parameters"]["trained"] < 0.17e9 < facts["parameters"]["total"]
    assert facts["data"]["bytes_per_image"] == 8 * 32 * 32 * 4
    spelled = info("--plan", "--gradient-checkpointing", "--window-length", 64)
    assert spelled.exit_code == 0, spelled.output
    assert "layers computed again; 1 x 64 tokens" in spelled.stdout and "fits" in spelled.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", 3], "--num-gpus is of a plan. Add --plan"),
        (["--plan", "--num-gpus", 0], "`num_gpus`=0 must be a number above 0"),
        (["--plan", "--utilisation", 1.5], "`utilisation`=1.5 is a share of the peak"),
        (["--plan", "--sharding", "zero"], "`sharding`='zero' must be one of fsdp2, ddp"),
        (["--plan", "--window-length", 9999], "`window_length`=9999: the model has 320 positions"),
        (["nowhere.yaml", "--plan"], "nowhere.yaml is no file here"),
        ([RECIPES / "vae_256px.yaml", "--plan"], "names no model"),
        ([MODELS / "clip_tiny.json", "--plan"], "`model_type`='clip' must be one of cm3leon, transfusion"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(words, message):
    result = info(*words)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*b_pretrain.yaml")) + sorted(RECIPES.glob("*0m_pretrain.yaml")),
                         ids=lambda path: path.stem)  # fmt: skip
def test_every_size_of_the_papers_fits_eight_gpus(recipe):
    facts = plan_training(open_plan(str(recipe)), PlanArguments(token_budget=1e12), count_flops)
    assert facts["memory"]["fits"] and facts["flops_per_token"]["counted"] > 0.9 * facts["flops_per_token"]["six_n"]
