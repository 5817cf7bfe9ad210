"""The commands: publishing says where or, in one line, why not; evaluating puts its scores into the card."""

import pytest
from huggingface_hub import ModelCard

import publish
from evaluate import EvaluationRecipe, list_results
from hf_mm.cards import add_eval_results


def words(folder, **fields):
    fields = {"model_name_or_path": folder, "repo_id": "me/model", **fields}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def test_the_command_publishes_and_says_where(hub, make_folder, not_checked, capsys):
    folder = make_folder("cm3leon")
    address = publish.main([*words(folder, revision="v1", commit_message="First"), "--private"])
    assert capsys.readouterr().out == f"{folder} is published: {address}\n"
    assert hub.repos["me/model"].private and hub.repos["me/model"].find("v1").message == "First"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda hub, folder: (folder / "weights.pt").write_bytes(b""), "Error: .* holds pickled files"),
        (lambda hub, folder: hub.refused.update({"/api/": 503}), "Error: The Hub at .* is in trouble"),
    ],
)
def test_a_failure_is_one_line(break_it, message, hub, make_folder, not_checked):
    folder = make_folder("transfusion")
    break_it(hub, folder)
    with pytest.raises(SystemExit, match=message) as caught:
        publish.main(words(folder))
    assert "\n" not in str(caught.value)


def test_scores_of_an_evaluation_go_into_the_card(tmp_path):
    rates = {"num_images": 7, "scene_correct": 0.875, "glyph_correct": 1.0, "color_correct": 0.5}
    scores = {"drawn": {"overall": rates, "two_objects": rates}, "captions": {"glyph_named": 0.25}}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    add_eval_results(tmp_path, list_results(scores, EvaluationRecipe(glyph_set="icons", num_captions=11)))
    card = ModelCard.load(tmp_path / "README.md")
    found = {(result.task_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert found["text-to-image", "scene correct"] == 0.875 and found["image-to-text", "glyph named"] == 0.25
    assert len(card.data.eval_results) == 7
    assert "| held-out scenes of icons, two objects (7) | scene correct | 87.5% |" in card.text
