import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CONFIG_MAPPING

import evaluate
import evaluate_decoding
import evaluate_retrieval
import grid
import pretrain
import reproduce
import scaling
import sft
import training_cost
from hf_mm.training.recipe import parse_recipe


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs" / "reproductions").glob("*.yaml"))
FIELDS = {
    "pretrain.py": pretrain.ARGUMENTS,
    "sft.py": sft.ARGUMENTS,
    "evaluate.py": (evaluate.EvaluationRecipe,),
    "evaluate_decoding.py": (evaluate_decoding.DecodingEvaluation,),
    "evaluate_retrieval.py": (evaluate_retrieval.RetrievalEvaluation,),
}
COST = {
    "num_parameters": 1000,
    "counted_flops_per_step": 2e6,
    "theoretical_flops_per_step": 3e6,
    "num_tokens_per_step": 500.0,
    "num_images_per_step": 16.0,
}


class Scripts:
    """Stands in for the recipes' scripts: notes what is run, and scores what a function says of a model's folder."""

    def __init__(self, score=lambda model, words: 0.5) -> None:
        self.score, self.run, self.broken = score, [], ""

    def __call__(self, words: list[str], log: Path, num_parallel: int) -> None:
        self.run.append(list(words))
        if self.broken and self.broken in shlex.join(words):
            raise RuntimeError(f"broken: {words[0]}")
        flags = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
        if words[0].startswith("evaluate"):
            folder = Path(flags["--output_dir"])
            folder.mkdir(parents=True)
            score = self.score(flags["--model_name_or_path"], words)
            text = json.dumps({"recipe": {"seed": 3}, "drawn": {"right": score, "many": [7, True]}})
            (folder / "scores.json").write_text(text)

    def names(self) -> list[str]:
        return [words[0] for words in self.run]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid, "measure_cost", lambda words, folder: COST)
    scripts = Scripts()
    monkeypatch.setattr(grid, "run_script", scripts)
    return scripts


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, object]:
    return {
        "name": "tried",
        "claim": "It works.",
        "common": "--config recipes/configs/transfusion_tiny_pretrain.yaml",
        "variants": ["plain: --noise_cap none", "wide: model.text_config.hidden_size=64 model.patch_layer=unet"],
        "evaluations": ["drawn: evaluate.py --num_scenes 256"],
        "comparisons": ["drawn.right: wide > plain"],
        "train_flops": [2e8],
        "seeds": [4, 5, 6],
        "output_dir": str(tmp_path / "runs"),
        "results_dir": str(tmp_path / "results"),
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_reproduction_names_its_paper_its_command_and_what_there_is(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind = scaling.ScalingArguments if config.stem == "scaling" else grid.GridArguments
    script = "scaling" if config.stem == "scaling" else "reproduce"
    head = config.read_text().partition("\nname:")[0]
    assert re.search(r"^# .*arXiv \d{4}\.\d{5}", head)
    assert f"# python recipes/{script}.py --config recipes/configs/reproductions/{config.name}" in head
    (asked,) = parse_recipe(kind, argv=["--config", str(config)])
    assert asked.name == config.stem and asked.comparisons and len(asked.seeds) == 3
    variants = {
        name: grid.parse_variant(text, asked.common) for text in asked.variants for name in [text.split(":")[0]]
    }
    for variant in variants.values():
        if variant.checkpoint is None:
            _, used = grid.read_command(Path(variant.config))
            parse_recipe(*FIELDS[Path(used).name], argv=list(variant.words))
            assert variant.steps or asked.train_steps or asked.train_flops
        if variant.edits:
            model = training_cost.edit_model(variant.config, variant.edits)
            CONFIG_MAPPING[model["model_type"]].from_dict(model).validate_architecture()
    scripts = [shlex.split(text.partition(": ")[2])[0] for text in [*asked.evaluations, *asked.prepare]]
    assert all((ROOT / "recipes" / name).is_file() for name in scripts if name.endswith(".py"))
    for text in asked.evaluations:
        script, *words = shlex.split(text.partition(": ")[2].replace("{seed}", "1"))
        if script in FIELDS:
            parse_recipe(*FIELDS[script], argv=[*words, "--model_name_or_path", "x", "--output_dir", "y"])
    evaluations = {text.partition(": ")[0] for text in asked.evaluations}
    for comparison in asked.comparisons:
        _, claim = grid.split_name(comparison, "comparisons")
        for term in re.split(r" [<>-] ", claim):
            found = reproduce.OPERAND.fullmatch(term)
            assert found["variant"] in variants and found["evaluation"] in {None, *evaluations}


def test_experiments_share_the_models_that_are_alike(tmp_path, scripts):
    folders: dict[str, set[Path]] = {}
    for config in CONFIGS:
        kind = scaling.ScalingArguments if config.stem == "scaling" else grid.GridArguments
        (asked,) = parse_recipe(kind, argv=["--config", str(config), "--output_dir", str(tmp_path)])
        for cell in grid.plan_cells(asked):
            if cell.variant.checkpoint is None:
                folders.setdefault(f"{config.stem}/{cell.variant.name}", set()).add(cell.folder)
    plain = folders["attention/linear-both-ways"]
    for name in ("patch_size/linear-4", "sizes/linear-128", "noise_cap/uncapped", "guidance/linear"):
        assert folders[name] == plain, name
    assert folders["patch_size/unet-4"] == folders["sizes/unet-128"] == folders["attention/unet-both-ways"]
    assert folders["decoding/cm3"] == folders["cm3_objective/cm3"]
    page = (ROOT / "docs" / "reproductions.md").read_text()
    assert f"{len(set.union(*folders.values()))} trainings" in page


def test_each_cell_is_trained_and_scored_once(tmp_path, fields, scripts, write_recipe):
    words = write_recipe(fields)
    scripts.broken = "--seed 1005"
    with pytest.raises(RuntimeError, match="2 of 6 cells failed"):
        reproduce.main(words)
    assert scripts.names().count("pretrain.py") == 6 and scripts.names().count("evaluate.py") == 6
    assert len(grid.read_rows(tmp_path / "results" / "tried.jsonl")) == 4
    scripts.broken, scripts.run = "", []
    reproduce.main(words)
    assert scripts.names() == ["evaluate.py"] * 2
    scripts.run = []
    reproduce.main(words)
    assert not scripts.run


def test_an_interrupt_starts_no_further_cell(tmp_path, fields, scripts, monkeypatch, write_recipe):
    def interrupt(words: list[str], log: Path, num_parallel: int) -> None:
        scripts.run.append(words)
        if len(scripts.run) > 1:
            time.sleep(2)  # as long as a training takes, at least
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "run_script", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(write_recipe(fields))
    assert len(scripts.run) <= 2


def test_a_grid_that_is_ended_ends_what_it_runs(tmp_path, fields, write_recipe):
    """In a process of its own, whose script would sleep for long and says when it was told to end."""
    (tmp_path / "evaluate.py").write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit((here / 'ended').write_text('yes')))\n"
        "(here / 'began').touch()\n"
        "time.sleep(60)\n"
    )
    given = {**fields, "common": "", "variants": [f"given: checkpoint={tmp_path}"]}
    code = (
        "import pathlib, sys, grid, reproduce\n"
        f"grid.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "reproduce.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *write_recipe(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
    assert (tmp_path / "ended").read_text() == "yes" and process.returncode != 0


def test_another_experiment_shares_what_is_trained_alike(tmp_path, fields, scripts, write_recipe):
    reproduce.main(write_recipe(fields))
    scripts.run = []
    other = {**fields, "name": "other", "variants": ["same: --noise_cap none", "new: --noise_cap 300"]}
    reproduce.main(write_recipe({**other, "comparisons": ["drawn.right: same > new"]}))
    assert scripts.names().count("pretrain.py") == 3
    assert all("300" in run for run in scripts.run if run[0] == "pretrain.py")


def test_a_budget_of_flops_buys_as_many_steps_as_were_counted(tmp_path, fields, scripts, write_recipe):
    reproduce.main(write_recipe(fields))
    trained = [run for run in scripts.run if run[0] == "pretrain.py"]
    assert all(run[run.index("--max_steps") + 1] == "100" for run in trained)  # 2e8 of 2e6 a step
    assert sorted({run[run.index("--seed") + 1] for run in trained}) == ["4", "5", "6"]
    row = grid.read_rows(tmp_path / "results" / "tried.jsonl")[0]
    assert row["counted_flops"] == 2e8 and row["theoretical_flops"] == 3e8 and row["num_images"] == 1600
    assert row["train_command"].startswith("python recipes/pretrain.py --config")
    assert row["scores"] == {"drawn.right": 0.5, "drawn.many.0": 7.0}  # numbers alone, and none of the recipe's


def test_a_variant_changes_the_model_by_its_file(tmp_path, fields, scripts, write_recipe):
    reproduce.main(write_recipe(fields))
    trained = next(run for run in reversed(scripts.run) if run[0] == "pretrain.py")
    model = json.loads(Path(trained[trained.index("--config_name") + 1]).read_text())
    assert model["text_config"]["hidden_size"] == 64 and model["patch_layer"] == "unet"
    assert model["text_config"]["num_hidden_layers"] == 4  # of the recipe's own file


def test_a_quick_look_is_small_and_leaves_the_results_alone(tmp_path, fields, scripts, write_recipe):
    fields["evaluations"] = ["drawn: evaluate.py --metrics scenes cider --num_scenes 256 --num_captions 9"]
    fields["comparisons"] += ["cider.cider: wide > plain"]
    assert reproduce.main([*write_recipe(fields), "--quick"]) == "undecided"
    trained = [run for run in scripts.run if run[0] == "pretrain.py"]
    assert len(trained) == 2 and all(run[run.index("--max_steps") + 1] == "8" for run in trained)
    scored = next(run for run in scripts.run if run[0] == "evaluate.py")
    assert scored[1:7] == ["--metrics", "scenes", "--num_scenes", "16", "--num_captions", "9"]
    assert (tmp_path / "runs" / "quick" / "tried.md").exists() and not (tmp_path / "results").exists()


def test_checkpoints_are_scored_without_training_and_files_of_training_are_read(
    tmp_path, fields, scripts, write_recipe
):
    (tmp_path / "model" / "tasks").mkdir(parents=True)
    for step, score in (("000000", 0.1), ("000600", 0.7)):
        (tmp_path / "model" / "tasks" / f"step-{step}.json").write_text(json.dumps({"edit@x:y": {"right": score}}))
    given = {
        **fields,
        "common": "",
        "variants": [f"given: checkpoint={tmp_path / 'model'}"],
        "evaluations": ["before: tasks/step-000000.json", "after: tasks/step-*.json"],
        "comparisons": ["edit@x:y.right: given/after > given/before"],
    }
    assert reproduce.main(write_recipe(given)) == "holds"
    assert not scripts.run
    with pytest.raises(ValueError, match="takes no words of training"):
        reproduce.main(write_recipe({**given, "common": "--noise_cap none"}))


def test_what_must_be_there_first_is_made_once(tmp_path, fields, scripts, write_recipe):
    there = tmp_path / "there"
    there.touch()
    wanted = [f"{there}: encode_images.py --a", f"{tmp_path / 'missing'}: train_clip.py --b 'c d'"]
    reproduce.main(write_recipe({**fields, "prepare": wanted}))
    assert scripts.run[0] == ["train_clip.py", "--b", "c d"] and "encode_images.py" not in scripts.names()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_flops": []}, "has no budget"),
        ({"train_steps": [3]}, "both given"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"variants": ["plain"]}, "Write `name: words`"),
        ({"variants": ["a: --x 1", "a: --x 2"]}, r"\['a'\] twice"),
        ({"common": "", "variants": ["a: --noise_cap none"]}, "names no `--config`"),
        ({"num_parallel": 0}, "`num_parallel`=0"),
        ({"comparisons": ["drawn.right: wide plain"]}, "Write `metric: A > B`"),
        ({"comparisons": ["drawn.wrong: wide > plain"]}, "has no score 'drawn.wrong'"),
    ],
)
def test_a_grid_that_says_nothing_is_refused(tmp_path, fields, scripts, change, match, write_recipe):
    with pytest.raises(ValueError, match=match):
        reproduce.main(write_recipe({**fields, **change}))


def rows(**values: list[float]) -> list[dict[str, object]]:
    """Rows of variants, an entry to each seed; `variant_evaluation` names both."""
    return [
        {"variant": variant, "budget": "", "evaluation": evaluation or "drawn", "seed": seed, "scores": {"m": value}}
        for name, of_seeds in values.items()
        for variant, _, evaluation in [name.partition("_")]
        for seed, value in enumerate(of_seeds)
    ]


def test_verdicts_follow_the_means_over_seeds():
    found = rows(a=[0.9, 0.8, 0.85], b=[0.5, 0.4, 0.45], c=[0.5, 0.9, 0.1])
    asked = ["m: a > b", "m: a < b", "m: b > c", "m: a - b > b - a", "1 - m: a < b"]
    verdicts = [reproduce.weigh(found, text).result.verdict for text in asked]
    assert verdicts == ["holds", "does not hold", "undecided", "holds", "holds"]
    finding = reproduce.weigh(found, "m: a - b > b - a")
    assert (finding.first, finding.second) == pytest.approx((0.4, -0.4))


def test_only_seeds_that_both_have_are_compared():
    found = rows(a=[1, 2, 3], b=[0, 0])
    assert reproduce.weigh(found, "m: a > b").seeds == [0, 1]
    assert reproduce.weigh(found, "m: a > missing") is None
    table, verdict = reproduce.tabulate_findings(found, ["m: a > missing"])
    assert verdict == "not run" and table.endswith("| 0 | not run |")
    assert reproduce.tabulate_findings(found, ["m: a > b", "m: a > missing"])[1] == "undecided"


def test_an_operand_that_may_be_two_things_is_refused():
    found = rows(a_strong=[1, 2, 3], a_weak=[0, 0.5, 0], b=[0, 0, 0])
    with pytest.raises(ValueError, match=r"may be any evaluation of \['strong', 'weak'\]"):
        reproduce.weigh(found, "m: a > b")
    assert reproduce.weigh(found, "m: a/strong > a/weak").result.difference > 0
    found[0]["scores"]["n"] = 5.0
    assert reproduce.weigh(found, "m: a/strong:n > a/weak").first == 5


def test_pages_of_results_are_what_their_raw_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "reproductions.md").read_text()
    for config in CONFIGS:
        raw = ROOT / "docs" / "reproductions" / f"{config.stem}.jsonl"
        line = next(line for line in page.splitlines() if f"{config.name}`" in line and line.startswith("|"))
        if not raw.exists():
            assert line.rstrip("| ").endswith("not run"), line
            continue
        script = "scaling" if config.stem == "scaling" else "reproduce"
        kind = scaling.ScalingArguments if config.stem == "scaling" else grid.GridArguments
        (asked,) = parse_recipe(kind, argv=["--config", str(config)])
        command = f"{script}.py --config recipes/configs/reproductions/{config.name}"
        results = grid.read_rows(raw)
        assert raw.with_suffix(".md").read_text().startswith(reproduce.spell_page(asked, results, command).rstrip())
        assert line.rstrip("| ").endswith(reproduce.tabulate_findings(results, asked.comparisons)[1]), line


def test_the_best_of_the_first_candidates_is_taken():
    drawn, fits = [["a", "b", "c", "d"]], [np.array([0.1, 0.4, 0.9, 0.2])]
    assert [evaluate_decoding.choose(drawn, fits, range(count)) for count in (1, 2, 3)] == [["a"], ["b"], ["c"]]
    assert evaluate_decoding.choose(drawn, fits, [0, 3]) == ["d"]


def test_a_mix_takes_half_of_each_way(tmp_path, monkeypatch):
    asked = []

    def draw(prompts, *, num_images_per_prompt, generator, shade):
        assert len(generator) == len(prompts) * num_images_per_prompt
        asked.append(shade)
        return SimpleNamespace(images=[Image.new("L", (8, 8), shade + n % 4) for n in range(len(generator))])

    draw.model, draw.device = SimpleNamespace(config=SimpleNamespace(image_size=32)), "cpu"
    fake = SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(to=lambda device: SimpleNamespace(eval=dict)))
    monkeypatch.setattr(evaluate_decoding, "load_pipeline", lambda name: draw)
    monkeypatch.setattr(evaluate_decoding, "CLIPModel", fake)
    monkeypatch.setattr(evaluate_decoding, "CLIPProcessor", fake)
    monkeypatch.setattr(
        evaluate_decoding, "rank", lambda clip, processor, prompt, found: np.array([p.mean() for p in found])
    )
    monkeypatch.setattr(
        evaluate_decoding, "score_pictures", lambda best, *_: {"overall": {"shade": float(best[0].mean())}}
    )
    ways = ['dark: {"shade": 10}', 'light: {"shade": 100}']
    words = ["--model_name_or_path", "x", "--reranker_name", "y", "--output_dir", str(tmp_path), "--num_scenes", "5"]
    words += ["--ways", *ways, "--mixes", "both: dark, light", "--candidates", "1", "2", "4", "--batch_size", "3"]
    scores = evaluate_decoding.main(words)
    assert asked == [10, 10, 100, 100]
    assert [scores["dark"][count]["shade"] for count in ("1", "2", "4")] == [10, 11, 13]
    assert [scores["both"][count]["shade"] for count in ("1", "2", "4")] == [10, 100, 101]
    assert json.loads((tmp_path / "scores.json").read_text())["light"]["4"] == {"shade": 103}
    with pytest.raises(ValueError, match=r"`mixes` names \['grey'\]"):
        evaluate_decoding.main([*words, "--mixes", "both: dark, grey"])


def test_cost_is_counted_on_the_recipes_own_batches(tmp_path, make_words):
    words = make_words("run", per_device_train_batch_size=4)
    cost = training_cost.measure_cost(words, tmp_path / "one")
    twice = training_cost.measure_cost([*words, "--gradient_accumulation_steps", "2"], tmp_path / "one")
    assert cost["num_images_per_step"] == 4 and twice["num_images_per_step"] == 8
    assert cost["num_tokens_per_step"] > 4 * 16  # patches of 16 px pictures, and captions
    six_nd = 6 * cost["num_parameters"] * cost["num_tokens_per_step"]
    assert cost["theoretical_flops_per_step"] == pytest.approx(six_nd)
    assert 0.3 < cost["counted_flops_per_step"] / six_nd < 3
    assert (tmp_path / "one" / "text_tokenizer").is_dir()
