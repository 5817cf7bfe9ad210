"""Cards: what the Hub reads in them, who wrote them, and scores that are written in later."""

from pathlib import Path

import pytest
from hub_server import find_faults
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_mm.cards import HERE, add_eval_results, complete_card, rename, spell_command, without_folders, write_card


CARDS = Path(__file__).parents[2] / "model_cards"
FACTS = {
    "command": "recipes/x.py --seed 3",
    "seed": 3,
    "num_processes": 2,
    "hardware": "a processor",
    "device_hours": 0.5,
    "minutes": 15.0,
    "step": 70,
    "num_rows": 23,
    "num_seen": {"num_images_seen": 17},
}
VALUES = {
    "name": "model",
    "place": "me/model",
    "num_parameters": "1,234",
    "facts": FACTS,
    "data": "`icon_scenes:shapes`",
    "caption_report": "| step | dropped |",
    "recipe": '{"seed": 3}',
    "pictures": ["samples.png", "loss_curves.png"],
    "tasks": "| edit | 50% |",
    "kind": "VQModel",
    "measured": "All of its codes in use.",
    "base": "me/base",
}


RUN_PARTS = ("a processor", "0.5 hours", "70 steps", "23 rows", "me/model", "dropped")


def score(value, name="glyph correct", data="held-out scenes (64)"):
    return EvalResult(
        "text-to-image", "icon_scenes:shapes", data, "accuracy", value, dataset_config=data, metric_name=name
    )


@pytest.mark.parametrize("template", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_each_template_says_what_a_run_has_to_say(template, tmp_path):
    card = write_card(tmp_path, template, {"license": "apache-2.0", "library_name": "peft", "tags": ["a"]}, VALUES)
    assert card.data.tags == ["a", "hf_mm"] and card.data.license == "apache-2.0"
    # A checkpoint that is made a model tells of the run what it holds itself, and codes of patches have none.
    whole = () if template.stem in ("checkpoint", "patch_codes") else RUN_PARTS
    for part in (FACTS["command"], "seed 3", *whole):
        assert part in card.text
    assert "icon_scenes:shapes" in card.text and "## Limits" in card.text and "{{" not in card.text
    loaded = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert loaded == card.data.to_dict() and not find_faults(loaded)


def test_what_a_run_does_not_have_is_not_said(tmp_path):
    values = {**VALUES, "pictures": [], "tasks": "", "caption_report": ""}
    text = "".join(write_card(tmp_path, template, {}, values).text for template in CARDS.glob("*.md"))
    assert "![" not in text and "## Tasks" not in text


def test_scores_are_eval_results_of_the_hub_and_a_table_and_later_ones_replace_earlier(tmp_path):
    write_card(tmp_path, CARDS / "pretraining.md", {"library_name": "hf_mm", "license": "apache-2.0"}, VALUES)
    add_eval_results(tmp_path, [score(0.5), score(0.25, data="counting (7)")], note="By a command.")
    add_eval_results(tmp_path, [score(0.875), score(12.5, "perplexity")])
    card = ModelCard.load(tmp_path / "README.md")
    assert not find_faults(card.data.to_dict())
    assert [result.metric_value for result in card.data.eval_results] == [0.875, 12.5, 0.25]
    assert eval_results_to_model_index(card.data.model_name, card.data.eval_results)[0]["name"] == tmp_path.name
    assert card.text.count("## Evaluation") == 1 and "| held-out scenes (64) | glyph correct | 87.5% |" in card.text
    assert "50.0%" not in card.text and "12.5 |" in card.text
    assert card.text.index("## Recipe") < card.text.index("## Evaluation") < card.text.index("## Limits")
    assert card.data.license == "apache-2.0"


def test_examples_get_the_names_of_the_hub_and_nothing_else_does(tmp_path):
    for template in CARDS.glob("*.md"):
        values = {**VALUES, "place": HERE, "base": "runs/base", "recipe": '{"output_dir": "."}'}
        write_card(tmp_path, template, {}, values)
        rename(tmp_path, {HERE: "you/model", "runs/base": "you/base"})
        text = (tmp_path / "README.md").read_text()
        assert '("."' not in text and '="."' not in text and ', ".")' not in text and '{"output_dir": "."}' in text
        assert '"you/model"' in text and (template.stem != "adapter" or 'from_pretrained("you/base", ' in text)


def test_cards_do_not_say_where_folders_lie():
    recipe = {"output_dir": "/home/me/runs/mine", "steps": 3, "none": None,
              "names": ["/data/a", "icon_scenes:shapes", "edit@/data/b", "edit@me/c", "file:///data/d"]}  # fmt: skip
    names = ["a", "icon_scenes:shapes", "edit@b", "edit@me/c", "d"]
    assert without_folders(recipe) == {**recipe, "output_dir": "mine", "names": names}
    argv = ["--model_name_or_path", "/home/me/a model", "--output_dir=/home/me/out", "--config", "recipes/x.yaml"]
    told = "recipes/sft.py --model_name_or_path 'a model' --output_dir=out --config recipes/x.yaml"
    assert spell_command("sft.py", argv) == told


def test_a_folder_without_a_card_gets_none_with_scores(tmp_path):
    add_eval_results(tmp_path, [score(0.5)])
    assert not list(tmp_path.iterdir())


def test_a_card_of_ones_own_stays_and_gets_the_mark(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n")
    for _ in range(2):
        complete_card(tmp_path, library_name="diffusers")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["mine", "hf_mm"] and card.data.license == "mit" and card.data.library_name == "diffusers"
    assert "# Mine" in card.text
