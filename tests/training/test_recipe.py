from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch

from hf_mm.training.recipe import TrainingRecipe, parse_recipe, resolve_mixed_precision


@dataclass
class DataFields:
    dataset: str
    image_size_px: int = 64
    mirrored: bool = True
    ratios: list[float] = field(default_factory=lambda: [0.5])
    caption_column: str | None = "text"
    limit: int | None = None
    layout: Literal["caption", "image"] = "caption"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_file_fills_fields_and_the_command_line_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: scenes\nlearning_rate: 3e-4\nmax_steps: 70\nmirrored: false\nratios: [1, 2e-1]\n")
    training, data = parse_recipe(TrainingRecipe, DataFields, argv=["--config", path, "--max_steps", "90"])
    assert (training.learning_rate, training.max_steps) == (3e-4, 90)
    assert data == DataFields("scenes", mirrored=False, ratios=[1.0, 0.2])
    assert all(isinstance(ratio, float) for ratio in data.ratios)


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_both_forms_of_the_config_flag(tmp_path: Path, form: list[str]) -> None:
    path = write(tmp_path, "dataset: scenes\n")
    (data,) = parse_recipe(DataFields, argv=[word.format(path) for word in form])
    assert data == DataFields("scenes")


def test_every_kind_of_field_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: scenes\ncaption_column: caption\nlimit: 5\nmirrored: true\n")
    words = ["--caption_column=none", "--limit", "null", "--no_mirrored", "--ratios", "0.1", "0.7", "--layout=image"]
    (data,) = parse_recipe(DataFields, argv=["--config", path, *words])
    assert data == DataFields("scenes", 64, False, [0.1, 0.7], None, None, "image")
    (data,) = parse_recipe(DataFields, argv=["--config", path, "--mirrored", "false", "--ratios"])
    assert data.mirrored is False and data.ratios == []


def test_empty_values_mean_none_where_allowed(tmp_path: Path) -> None:
    (data,) = parse_recipe(DataFields, argv=["--config", write(tmp_path, "dataset: x\ncaption_column: null\n")])
    assert data.caption_column is None
    with pytest.raises(ValueError, match="`image_size_px` is empty"):
        parse_recipe(DataFields, argv=["--config", write(tmp_path, "dataset: x\nimage_size_px:\n")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: x\nlearning_rte: 1\n", r"`learning_rte` \(did you mean `learning_rate`.*Known keys: adam_beta1"),
        ("dataset: x\nmax_steps: many\n", "`max_steps`='many' is no int"),
        ("dataset: x\nmax_steps: 1.5\n", "`max_steps`=1.5 is no int"),
        ("dataset: x\nmax_steps: yes\n", "`max_steps`=True was read as a boolean"),
        ("dataset: x\nmixed_precision: no\n", "`mixed_precision`=False was read as a boolean.*quotes"),
        ("dataset: x\nlayout: sideways\n", "`layout`='sideways' is not one of caption, image"),
        ("dataset: [x, y]\n", "`dataset`=.* is nested"),
        ("- 1\n", "holds a list"),
        ("dataset: x\nlearning_rate: -1\n", "`learning_rate`=-1.0 must be above 0"),
        ("dataset: x\nwarmup_steps: 1000\n", "`warmup_steps`=1000 leaves nothing of `max_steps`=1000. Try 100"),
        ("dataset: x\nmin_learning_rate: 1\n", "`min_learning_rate`=1.0 is above `learning_rate`=0.0003"),
        ("dataset: x\nema_decay: 1\n", "`ema_decay`=1.0 must be at least 0 and below 1"),
        (
            "dataset: x\nmin_learning_rate: 1e-5\nlr_scheduler_type: constant_with_warmup\n",
            "needs .*=cosine or linear",
        ),
    ],
)
def test_bad_recipes_are_refused_by_name_and_value(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(TrainingRecipe, DataFields, argv=["--config", write(tmp_path, text)])


def test_unknown_flags_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`image_size` \(did you mean `image_size_px`\?\)"):
        parse_recipe(DataFields, argv=["--dataset=x", "--image_size", "3"])
    with pytest.raises(ValueError, match="is no file"):
        parse_recipe(DataFields, argv=["--dataset=x", "--config", str(tmp_path / "absent.yaml")])


def test_a_required_field_must_come_from_somewhere(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_recipe(DataFields, argv=[])
    assert "--dataset" in capsys.readouterr().err


def test_auto_precision_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for has_amx, expected in [(False, "no"), (True, "bf16")]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert resolve_mixed_precision("auto", "cpu") == expected
    assert resolve_mixed_precision("bf16", "cpu") == "bf16"
    with pytest.raises(ValueError, match="`mixed_precision`=fp16 needs a GPU"):
        resolve_mixed_precision("fp16", "cpu")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"a: b: c", b"\tx: 1", b"!!python/object/apply:os.getcwd []", b"[" * 900]
)
def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "broken.yaml").write_bytes(text)
    with pytest.raises(ValueError, match="broken.yaml is no YAML"):
        parse_recipe(TrainingRecipe, argv=["--config", str(tmp_path / "broken.yaml")])


@pytest.mark.parametrize("field", ["seed", "report_to"])
def test_lists_without_end_are_refused_in_a_few_words(tmp_path: Path, field: str) -> None:
    lists = ", ".join(f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefghij"))
    with pytest.raises(ValueError, match=f"`{field}`=.* is nested") as caught:
        parse_recipe(TrainingRecipe, argv=["--config", write(tmp_path, f"{field}: [&a [x, x], {lists}]")])
    assert len(str(caught.value)) < 500
