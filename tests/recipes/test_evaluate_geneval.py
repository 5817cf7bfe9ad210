"""GenEval's prompts are drawn once each into the folders of its scorer, and any scorer's verdicts are summed up."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import evaluate_geneval
from hf_mm.text_to_image import build_drawing_pipeline


PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a red star"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "blue"}], "prompt": "two blue boxes"},
]


def score_folder(images):
    """Finds every picture of the first prompt right."""
    for record in sorted(images.glob("*/metadata.jsonl")):
        prompt = json.loads(record.read_text())
        for path in sorted(record.parent.glob("samples/*.png")):
            yield {**prompt, "filename": str(path), "correct": prompt["tag"] == "single_object"}


@pytest.fixture
def words(make_cm3leon, make_cm3leon_processor, tmp_path):
    """The command line of a small run, changed by keyword."""
    model = make_cm3leon()
    build_drawing_pipeline(model, make_cm3leon_processor(model.config)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    fields = {"model_name_or_path": tmp_path / "model", "prompts": tmp_path / "prompts.jsonl", "num_images": 3}

    def make(**changed):
        line = {**fields, "output_dir": tmp_path / "out", **changed}
        return [word for name, value in line.items() for word in (f"--{name}", str(value))]

    return make


def test_pictures_are_drawn_once_then_scored_and_summed_up(words, tmp_path, monkeypatch, capsys):
    assert evaluate_geneval.main(words()) == {}
    assert "2 prompts; GenEval has 553" in capsys.readouterr().out
    pictures = sorted((tmp_path / "out" / "images").glob("*/samples/*.png"))
    assert [f"{path.parts[-3]} {path.name}" for path in pictures] == [
        f"{number:05d} {place:04d}.png" for number in range(2) for place in range(3)
    ]
    seen = set()
    for path in pictures:
        with Image.open(path) as picture:
            seen.add(np.asarray(picture).tobytes())
    assert len(seen) == 6  # from noise of their own
    times = [path.stat().st_mtime_ns for path in pictures]

    monkeypatch.setattr(evaluate_geneval, "load_scorer", lambda name: score_folder)
    summary = evaluate_geneval.main(words(scorer="mine:score"))
    assert [path.stat().st_mtime_ns for path in pictures] == times
    assert summary["single_object"]["correct"] == 1 and summary["colors"]["correct"] == 0
    assert summary["overall"]["correct"] == 0.5
    assert "| GenEval, overall (6) | correct | 50.0% |" in (tmp_path / "out" / "scores.md").read_text()
    assert (
        "| GenEval, colors (3) | correct | 0.0% (0.0% to 0.0%) |" in ModelCard.load(tmp_path / "model/README.md").text
    )

    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, score_folder(tmp_path / "out" / "images"))))
    assert evaluate_geneval.main(words(results=results)) == summary
    results.write_text(results.read_text().split("\n")[0])
    with pytest.raises(ValueError, match="2 `prompts` of `num_images`=3 pictures do not go with 1 scored ones"):
        evaluate_geneval.main(words(results=results))
    with pytest.raises(ValueError, match="holds scores of another configuration: `seed` was 0 and is 5"):
        evaluate_geneval.main(words(seed=5))


def test_bad_fields_are_refused_by_name():
    fields = {"model_name_or_path": "x", "prompts": "y"}
    with pytest.raises(ValueError, match="`num_images`=0"):
        evaluate_geneval.GenEvalRecipe(**fields, num_images=0)
    with pytest.raises(ValueError, match="`scorer` and `results` are given"):
        evaluate_geneval.GenEvalRecipe(**fields, scorer="a:b", results="c")
    with pytest.raises(ValueError, match="`scorer`='json' must read package.module:function"):
        evaluate_geneval.load_scorer("json")
    with pytest.raises(ValueError, match="json has no function 'score'"):
        evaluate_geneval.load_scorer("json:score")
    assert evaluate_geneval.load_scorer("json:loads") is json.loads
