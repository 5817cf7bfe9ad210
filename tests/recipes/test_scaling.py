import json
from pathlib import Path

import numpy as np
import pytest

import grid
import scaling


ROOT = Path(__file__).parents[2]
WIDTHS = {"64": 1.0, "128": 4.0}


@pytest.fixture
def fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Two families of which one reaches the other's error with a tenth of its compute; nothing is trained."""
    monkeypatch.chdir(ROOT)

    def cost(words: list[str], folder: Path) -> dict[str, float]:
        model = json.loads(Path(words[words.index("--config_name") + 1]).read_text())
        size = WIDTHS[str(model["text_config"]["hidden_size"])]
        flops = {"counted_flops_per_step": 5 * size, "theoretical_flops_per_step": size}
        return {**flops, "num_parameters": 1000, "num_tokens_per_step": 100.0, "num_images_per_step": 16.0}

    def run(words: list[str], log: Path, num_parallel: int) -> None:
        flags = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
        if words[0] == "evaluate.py":
            cell = Path(flags["--model_name_or_path"])
            model = json.loads((cell.parents[1] / "model.json").read_text())
            steps, seed = int(cell.parent.name.split("-")[0]), int(cell.name.split("-")[1])
            flops = steps * WIDTHS[str(model["text_config"]["hidden_size"])]
            error = (flops * (10 if model["patch_size"] == 2 else 1)) ** -0.3 * np.exp(0.001 * (seed - 1))
            Path(flags["--output_dir"]).mkdir(parents=True)
            (Path(flags["--output_dir"]) / "scores.json").write_text(json.dumps({"right": 1 - error}))

    monkeypatch.setattr(grid, "measure_cost", cost)
    monkeypatch.setattr(grid, "run_script", run)
    sizes = {width: f"model.text_config.hidden_size={width}" for width in WIDTHS}
    return {
        "name": "tried",
        "claim": "Patches need a tenth.",
        "common": "--config recipes/configs/transfusion_tiny_pretrain.yaml",
        "variants": [
            *(f"patches.{width}: {size} model.patch_size=2" for width, size in sizes.items()),
            *(f"codes.{width}: {size} model.patch_size=4" for width, size in sizes.items()),
        ],
        "evaluations": ["drawn: evaluate.py"],
        "comparisons": ["right: patches.128@1000 > codes.128@1000"],
        "metrics": ["1 - right"],
        "baseline": "codes",
        "train_steps": [100, 1000],
        "seeds": [0, 1, 2],
        "output_dir": str(tmp_path / "runs"),
        "results_dir": str(tmp_path / "results"),
    }


def test_a_grid_of_sizes_and_budgets_finds_the_law_and_the_parity_ratio(tmp_path, fields, write_recipe):
    laws = scaling.main(write_recipe(fields))["1 - right"]
    assert laws["patches"].exponent == pytest.approx(-0.3, abs=0.01) == laws["codes"].exponent
    rows = grid.read_rows(tmp_path / "results" / "tried.jsonl")
    assert len(rows) == 2 * 2 * 2 * 3
    points, _ = scaling.collect_points(rows, "1 - right", scaling.ScalingArguments(**fields))
    parity = scaling.relate(laws["patches"], points["codes"])
    assert parity.ratio == pytest.approx(0.1, rel=0.03) and parity.low < parity.ratio < parity.high < 0.12
    page = (tmp_path / "results" / "tried.md").read_text()
    assert "**holds**" in page and "| patches | 12 | -0.300" in page and "0.1 (" in page
    assert (tmp_path / "results" / "tried-0.png").exists() and "tried-0.png" in page


def test_the_axis_may_be_counted_flops(tmp_path, fields, write_recipe):
    laws = scaling.main(write_recipe({**fields, "flops": "counted_flops"}))["1 - right"]
    assert laws["codes"].flops_range == pytest.approx((500, 20_000))


def test_runs_beyond_the_bounds_are_left_out_and_counted(tmp_path, fields, write_recipe):
    laws = scaling.main(write_recipe({**fields, "bounds": ["1 - right <= 0.2"]}))["1 - right"]
    assert laws["codes"].flops_range[0] > 100
    page = (tmp_path / "results" / "tried.md").read_text()
    assert "3 runs left out" in page


def test_a_quick_look_has_too_few_runs_for_a_line(tmp_path, fields, write_recipe):
    assert scaling.main([*write_recipe(fields), "--quick"]) == {"1 - right": {}}
    assert "too few runs for a line" in (tmp_path / "runs" / "quick" / "tried.md").read_text()


def test_a_baseline_that_is_no_family_is_refused(tmp_path, fields, write_recipe):
    with pytest.raises(ValueError, match=r"`baseline`='vq' is none of the families \['codes', 'patches'\]"):
        scaling.main(write_recipe({**fields, "baseline": "vq"}))


def test_bounds_are_the_papers_unless_given():
    bounds = scaling.ScalingArguments(name="x", claim="", variants=["a: b"], evaluations=["c: d"]).bounds
    assert scaling.find_bounds("fid.fid", bounds) == {"at_most": 100}
    assert scaling.find_bounds("cider.cider", bounds) == {"at_least": 0.04}
    assert scaling.find_bounds("drawn.right", bounds) == {}
    assert scaling.find_bounds("fid", ["fid <= 7", "fid >= 0.5"]) == {"at_most": 7, "at_least": 0.5}
    with pytest.raises(ValueError, match="Write `metric >= number`"):
        scaling.find_bounds("fid", ["fid 7"])
