import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import disable_progress_bars
from PIL import Image

import build_retrieval_index
import evaluate_retrieval


disable_progress_bars()


class Copyist:
    """A pipeline that draws its best document, and without any a white picture."""

    def __init__(self) -> None:
        self.model, self.device = SimpleNamespace(config=SimpleNamespace(image_size=32)), "cpu"
        self.asked: list[tuple[list[str], list[int]]] = []

    def __call__(self, prompts: list[str], *, retrieved: list, generator: list, **kwargs: object):
        self.asked.append((prompts, [len(of_prompt) for of_prompt in retrieved]))
        assert not kwargs
        white = Image.new("RGB", (32, 32), "white")
        return SimpleNamespace(images=[found[0]["image"] if found else white for found in retrieved])


@pytest.fixture
def memory_dir(clip_dir: Path, tmp_path: Path) -> Path:
    words = ["--dataset_name", "icon_scenes:shapes", "--dataset_split", "validation", "--num_scenes", 150]
    words += ["--image_size", 32, "--clip_name", clip_dir, "--num_shards", 1, "--drop_duplicates", False]
    words += ["--max_relevance", 1, "--max_similarity", 1, "--output_dir", tmp_path / "index"]
    return build_retrieval_index.main([str(word) for word in words])


def score(memory_dir: Path, folder: Path, *more: object) -> list[dict]:
    words = ["--model_name_or_path", "x", "--retrieval_dir", memory_dir, "--num_scenes", 11, "--batch_size", 4]
    return evaluate_retrieval.main([str(word) for word in [*words, "--output_dir", folder, *more]])


def test_every_number_of_documents_is_scored_on_the_same_prompts(memory_dir, tmp_path, monkeypatch):
    copyist = Copyist()
    monkeypatch.setattr(evaluate_retrieval, "load_pipeline", lambda name: copyist)
    scores = score(memory_dir, tmp_path / "out", "--seeds", 4, 5, "--nums_retrieved", 0, 2)
    assert [(one["seed"], one["num_retrieved"], one["num_images"]) for one in scores] == [
        (4, 0, 11), (4, 2, 11), (5, 0, 11), (5, 2, 11),
    ]  # fmt: skip
    asked = [prompts for prompts, _ in copyist.asked]
    assert asked[:3] == asked[3:6] != asked[6:9] == asked[9:]
    assert {count for _, counts in copyist.asked for count in counts} == {0, 2}
    assert all(one["scene_correct"] == 0 for one in scores if one["num_retrieved"] == 0)
    table = (tmp_path / "out" / "scores.md").read_text()
    assert table.count("\n") == 2 + 2 * 3 and "| **2** | **mean** |" in table
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"] == scores
    assert (tmp_path / "out" / "grid.png").exists()


def test_matching_documents_are_those_of_one_object_with_the_combination_asked_for():
    def spell(glyph: str, color: str, background: str, num_objects: int = 1) -> str:
        return json.dumps({"background": background, "objects": [{"glyph": glyph, "color": color}] * num_objects})

    memory = [spell("star", "red", "white"), spell("star", "red", "blue"), spell("star", "red", "white", 2)]
    asked = [spell("star", "red", "white")] * 4
    assert evaluate_retrieval.share_matching(memory, [[0, 1], [1, 0], [2], []], asked) == 0.25


def test_a_memory_bank_of_other_rows_is_refused(memory_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_retrieval, "load_pipeline", lambda name: Copyist())
    opened = evaluate_retrieval.open_retriever(memory_dir)
    opened.memory = opened.memory.remove_columns("scene")
    monkeypatch.setattr(evaluate_retrieval, "open_retriever", lambda *_: opened)
    with pytest.raises(ValueError, match="holds no icon scenes"):
        score(memory_dir, tmp_path / "out")
    for words in (["--nums_retrieved", -1], ["--seeds"]):
        with pytest.raises((ValueError, SystemExit)):
            score(memory_dir, tmp_path / "out", *words)
