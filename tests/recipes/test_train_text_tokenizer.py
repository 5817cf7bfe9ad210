from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer

import train_text_tokenizer as recipe


def test_icon_scenes_give_a_tokenizer_that_shortens_their_captions(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text(
        f"dataset_name: icon_scenes:shapes\nnum_scenes: 50\nvocab_size: 307\noutput_dir: {tmp_path / 'out'}\n"
    )
    assert recipe.main([f"--config={config}", "--vocab_size", "293"]) == tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 293
    assert len(tokenizer("a red star on a white background")["input_ids"]) < 24


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_own_captions_give_a_tokenizer(tmp_path: Path, streaming: str) -> None:
    rows = Dataset.from_dict({"image": [Image.new("RGB", (7, 5))] * 3, "caption": ["zebra zebra"] * 3})
    rows.to_parquet(tmp_path / "rows.parquet")
    source = ["--dataset_name", str(tmp_path / "rows.parquet"), "--text_column", "caption", "--streaming", streaming]
    folder = recipe.main([*source, "--output_dir", str(tmp_path / "out")])
    assert len(AutoTokenizer.from_pretrained(folder)("zebra")["input_ids"]) == 1


def test_wrong_column_is_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"image": [Image.new("RGB", (7, 5))], "caption": ["zebra"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"`text_column`='title' is not there. Columns here: \['image', 'caption'\]"):
        recipe.main(["--dataset_name", str(tmp_path / "rows.parquet"), "--text_column", "title"])
