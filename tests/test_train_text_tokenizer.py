import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer


RECIPE = Path(__file__).parents[1] / "recipes" / "train_text_tokenizer.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_text_tokenizer", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_icon_scenes_give_a_tokenizer_that_shortens_their_captions(recipe: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text(
        f"dataset_name: icon_scenes:shapes\nnum_scenes: 50\nvocab_size: 307\noutput_dir: {tmp_path / 'out'}\n"
    )
    assert recipe.main([f"--config={config}", "--vocab_size", "293"]) == tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 293
    assert len(tokenizer("a red star on a white background")["input_ids"]) < 24


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_own_captions_give_a_tokenizer(recipe: ModuleType, tmp_path: Path, streaming: str) -> None:
    rows = Dataset.from_dict({"image": [Image.new("RGB", (7, 5))] * 3, "caption": ["zebra zebra"] * 3})
    rows.to_parquet(tmp_path / "rows.parquet")
    source = ["--dataset_name", str(tmp_path / "rows.parquet"), "--text_column", "caption", "--streaming", streaming]
    folder = recipe.main([*source, "--output_dir", str(tmp_path / "out")])
    assert len(AutoTokenizer.from_pretrained(folder)("zebra")["input_ids"]) == 1


def test_wrong_column_is_refused(recipe: ModuleType, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"image": [Image.new("RGB", (7, 5))], "caption": ["zebra"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"`text_column`='title' is not there. Columns here: \['image', 'caption'\]"):
        recipe.main(["--dataset_name", str(tmp_path / "rows.parquet"), "--text_column", "title"])
