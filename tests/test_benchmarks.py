"""The benchmarks measure what they say, and each runs from beginning to end on a toy size."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import timing


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
TOY = "--hidden_size 128 --num_layers 1 --num_repeats 1"
TOYS = {
    "captioning": f"{TOY} --num_tokens 3 --batch_sizes 2",
    "cm3_masking": "--num_documents 20 --num_repeats 2",
    "data_parallel": f"{TOY} --num_steps 1 --batch_size 2",
    "guided_sampling": f"{TOY} --batch_size 2 --num_inference_steps 2 --profile",
    "guided_step": "--num_threads 1 --num_repeats 1 --num_steps 2",
    "image_encoding": "--image_size 16 --num_images 4 --batch_size 2 --num_repeats 1",
    "packing": f"{TOY} --window_length 128 --batch_size 1",
    "scene_drawing": "--num_rows 3 --num_repeats 1 --size_px 32",
    "training_step": f"{TOY} --batch_size 2",
}
OF_PEERS = {"guided_sampling", "training_step"}  # need the package transfusion-pytorch


def test_deeds_take_turns_and_the_first_round_is_not_counted():
    order = []
    clocks = timing.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, num_repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in clocks["wall_clock"].items()} == {"a": 2, "b": 2}


def test_processor_time_leaves_out_what_is_slept():
    clocks = timing.take_turns({"asleep": lambda: time.sleep(0.1)}, num_repeats=1)
    assert clocks["wall_clock"].median("asleep") >= 0.1
    assert clocks["processor"].median("asleep") < 0.05


def test_a_ratio_is_of_the_same_round():
    clock = timing.Clock({"slow": [2.0, 40.0, 9.0], "fast": [1.0, 20.0, 30.0]})
    assert clock.ratio("slow", "fast") == 2.0
    assert clock.milliseconds() == {"slow": 9000.0, "fast": 20000.0}


def test_the_products_of_a_run_are_all_its_linear_layers_with_their_rows():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))
    products = timing.record_products(model, lambda: model(torch.randn(2, 11, 5)))
    assert [(tuple(product.weight.shape), product.num_rows) for product in products] == [((7, 5), 22), ((3, 7), 22)]
    assert not any(layer._forward_hooks for layer in model)


def test_the_floor_computes_each_product_and_both_gradients_and_nothing_else():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    floor = timing.products_alone(timing.record_products(model, lambda: model(torch.randn(11, 5))), backward=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        floor()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["aten::mm"] == 6
    assert not {"aten::addmm", "aten::relu", "aten::add", "aten::copy_", "aten::normal_"} & set(calls)


def test_the_floor_reads_each_layer_of_its_own():
    """Layers of one size must not share a weight, which would stay in the processor's cache."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    products = timing.record_products(model, lambda: model(torch.randn(2, 6)))
    assert len({product.weight.data_ptr() for product in products}) == 3


def test_a_target_is_judged_on_its_own_side():
    assert timing.judge(1.4, at_least=1.3) == {"measured": 1.4, "at_least": 1.3, "met": True}
    assert not timing.judge(1.2, at_least=1.3)["met"]
    assert timing.judge(1.2, at_most=1.3)["met"] and not timing.judge(1.4, at_most=1.3)["met"]


def test_the_page_names_every_benchmark():
    text = PAGE.read_text(encoding="utf-8")
    shared = {"timing", "transfusion_peers", "code_peers"}
    missing = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared
    assert not {name for name in missing if f"benchmarks/{name}.py" not in text}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOYS))
def test_a_benchmark_runs_and_writes_what_it_was_measured_on(name, tmp_path, monkeypatch):
    if name in OF_PEERS:
        pytest.importorskip("transfusion_pytorch")
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [name, *TOYS[name].split(), "--output", str(output)])
    importlib.import_module(name).main()
    result = json.loads(output.read_text())
    assert set(result["machine"]) == {"processor", "system", "load_before"}
    assert "python" in result["versions"] and len(result["versions"]) > 1
    assert result["configuration"] and "output" not in result["configuration"]
