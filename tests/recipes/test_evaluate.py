"""One command measures what it is asked to, says how sure it is, and refuses what does not fit."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import evaluate
import measuring
from hf_mm.evaluation.scene_accuracy import chance_accuracy
from hf_mm.text_to_image import build_drawing_pipeline


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def model_dir(make_model, make_processor, tmp_path):
    """A Transfusion of random weights with a card."""
    model = make_model(image_size=16)
    folder = tmp_path / "model"
    build_drawing_pipeline(model, make_processor(model.config)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    return folder


@pytest.fixture
def words(model_dir, clip_dir, tmp_path):
    """The command line of a small evaluation, changed by keyword."""
    fields = {"model_name_or_path": model_dir, "clip_name": clip_dir, "output_dir": tmp_path / "out"}
    fields |= {"num_scenes": 5, "num_captions": 3, "batch_size": 2}

    def make(*flags, **changed):
        line = [*flags]
        for name, value in {**fields, **changed}.items():
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return line

    return make


@pytest.fixture
def write_task(tmp_path):
    (tmp_path / "tasks").mkdir()
    rows = [{"question": "a red", "choices": ["star", "kite"], "answer": n % 2} for n in range(4)]
    (tmp_path / "tasks" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(rows=tmp_path / "tasks" / "rows.json"))
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness and what it imports
def test_every_metric_comes_with_its_interval_into_json_table_picture_and_card(words, model_dir, write_task, tmp_path):
    line = words(metrics=list(evaluate.METRICS), zero_shot_tasks="words", zero_shot_task_dir=write_task)
    with pytest.warns(UserWarning, match="5 true and 5 drawn samples in 19 feature dimensions"):
        scores = evaluate.main(line)
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert kept["recipe"]["num_scenes"] == 5 and kept["fid"] == {
        **scores["fid"],
        "intervals": {"fid": list(scores["fid"]["intervals"]["fid"])},
    }
    for of_one, name in (
        (scores["drawn"]["single_object"], "strict_correct"),
        (scores["captions"], "glyph_named"),
        (scores["fid"], "fid"),
        (scores["clip_score"], "clip_score"),
        (scores["cider"], "cider"),
        (scores["perplexity"], "perplexity"),
        (scores["perplexity"], "bits_per_byte"),
    ):
        low, high = of_one["intervals"][name]
        assert low <= of_one[name] + 1e-9 and of_one[name] <= high + 1e-9
    assert scores["true_pictures"]["scene_correct"] == 1 > scores["drawn"]["overall"]["scene_correct"]
    assert scores["zero_shot"]["words"]["num_questions"] == 4
    table = (tmp_path / "out" / "scores.md").read_text()
    text = ModelCard.load(model_dir / "README.md").text
    for name in ("strict correct", "glyph named", "fid", "fid of true halves", "clip score", "cider", "bits per byte"):
        assert f"| {name} | " in table and f"| {name} | " in text
    assert str(tmp_path) not in (model_dir / "README.md").read_text()
    assert f"| cider | {scores['cider']['cider']:.4g} (" in table and " to " in table
    with Image.open(tmp_path / "out" / "scores.png") as plot:
        assert plot.width > 900 and len(plot.getcolors(999_999)) > 3
    assert (tmp_path / "out" / "grid.png").is_file()


def test_metrics_are_added_to_a_folder_of_the_same_configuration_and_no_other(words, model_dir, tmp_path):
    evaluate.main(words(metrics="perplexity"))
    scores = evaluate.main(words(metrics="captions"))
    assert {"perplexity", "captions"} <= scores.keys() and "drawn" not in scores
    with pytest.raises(
        ValueError, match=r"`output_dir`=.* holds scores of another configuration: `seed` was 0 and is 3\. "
    ):
        evaluate.main(words(metrics="captions", seed=3))
    scores = evaluate.main(words("--overwrite_output_dir", metrics="captions", seed=3))
    assert "perplexity" not in scores


def test_scores_of_weights_that_have_changed_since_are_dropped(words, model_dir):
    evaluate.main(words(metrics="perplexity"))
    pipe = evaluate.load_pipeline(model_dir)
    with torch.no_grad():
        pipe.model.lm_head.weight.mul_(2)
    pipe.model.save_pretrained(model_dir)
    assert "perplexity" not in evaluate.main(words(metrics="captions"))


def test_the_metrics_of_before_are_the_default_and_their_names_stay(words):
    scores = evaluate.main(words())
    assert {"drawn", "true_pictures", "shuffled_prompts", "captions"} <= scores.keys()
    assert {"num_images", "scene_correct", "glyph_correct", "color_correct"} <= scores["drawn"]["overall"].keys()
    assert {"glyph_named", "color_named"} <= scores["captions"].keys() and "fid" not in scores


@pytest.mark.parametrize("family", ("transfusion", "cm3leon"))
def test_perplexity_is_that_of_a_direct_sum(family, make_model, make_processor, make_cm3leon, make_cm3leon_processor):
    model = make_model() if family == "transfusion" else make_cm3leon()
    processor = (make_processor if family == "transfusion" else make_cm3leon_processor)(model.config)
    pipe = build_drawing_pipeline(model, processor)
    texts = ["a red star", "two blue boxes on a kite " * 20]
    found = measuring.measure_perplexity(pipe, texts[:1], None)
    ids = processor.encode_document([{"type": "text", "text": texts[0]}])["input_ids"][:-1]
    assert processor.tokenizer.decode(ids[1:]).strip() == texts[0]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total = sum(scores[place - 1, ids[place]].item() for place in range(1, len(ids)))
    assert found["perplexity"] == pytest.approx(math.exp(-total / (len(ids) - 1)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / 10, rel=1e-4)
    longer = measuring.measure_perplexity(pipe, texts, 31)  # more tokens than the model has positions for
    long_ids = processor.encode_document([{"type": "text", "text": texts[1]}])["input_ids"][:-1]
    assert len(long_ids) > 128 and longer["num_tokens"] == len(ids) + len(long_ids) - 2


def test_the_ruler_is_checked_beside_the_scores():
    rows = evaluate.hold_out(evaluate.EvaluationRecipe(), 32, 40, ["single_object"])
    truth, scenes = [np.asarray(image) for image in rows["image"]], list(rows["scene"])
    scores = measuring.measure_scenes(truth, truth, scenes, "shapes")
    assert scores["drawn"]["overall"]["strict_correct"] == scores["true_pictures"]["scene_correct"] == 1
    shuffled = scores["shuffled_prompts"]
    assert shuffled["chance"] == chance_accuracy(scenes) and shuffled["scene_correct"] <= shuffled["chance"] + 0.05


def test_texts_come_from_files(tmp_path):
    (tmp_path / "one.txt").write_text("a red star\n\non a kite\n")
    assert measuring.read_texts(str(tmp_path / "one.txt"), "text", "x") == ["a red star\n\non a kite\n"]
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n{"body": ""}\n{"body": "b"}\n')
    assert measuring.read_texts(str(tmp_path / "rows.jsonl"), "body", "x") == ["a", "b"]
    with pytest.raises(ValueError, match=r"`text_column`='text' is not in .*rows.jsonl, which has \['body'\]"):
        measuring.read_texts(str(tmp_path / "rows.jsonl"), "text", "x")


def test_a_quick_run_asks_for_no_more_than_was_asked():
    quick = evaluate.EvaluationRecipe(quick=True, num_scenes=7)
    assert (quick.num_scenes, quick.num_captions, quick.zero_shot_limit) == (7, 32, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["fids"]}, r"`metrics` has \['fids'\]. Known are scenes, "),
        ({"metrics": []}, "`metrics` is empty"),
        ({"num_scenes": 1}, "`num_scenes`=1 must be at least 2"),
        ({"metrics": ["fid"], "num_scenes": 3}, "`num_scenes`=3 must be at least 4 for `fid`"),
        ({"metrics": ["cider"], "num_captions": 1}, "`num_captions`=1 must be at least 2 for `cider`"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_begins(fields, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluationRecipe(**fields)


def test_a_network_that_is_not_there_is_named_by_its_field(tmp_path):
    recipe = evaluate.EvaluationRecipe(metrics=["fid"], fid_network=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="`fid_network`='.*none' cannot be loaded"):
        evaluate.open_networks(recipe, torch.device("cpu"))


class _Short:
    """A pipeline that loses the last of what it should give."""

    def __call__(self, prompts, **settings):
        return type("Output", (), {"images": [Image.new("RGB", (8, 8))] * (len(prompts) - 1)})

    def caption(self, images):
        return ["a red star"] * (len(images) - 1)


def test_fewer_pictures_or_captions_than_asked_for_are_refused():
    with pytest.raises(ValueError, match="3 `prompts` gave 2 pictures"):
        evaluate.draw_scenes(_Short(), ["a", "b", "c"], seed=0, batch_size=8)
    rows = evaluate.hold_out(evaluate.EvaluationRecipe(), 32, 3, ["single_object"])
    with pytest.raises(ValueError, match="3 pictures gave 2 captions"):
        measuring.write_captions(_Short(), rows, 8)
