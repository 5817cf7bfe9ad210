"""Conversations about scenes: what their turns say and show, and that they are what tuning reads."""

import json
import random

import numpy as np
import pytest

from hf_mm.data.formats import check_rows
from hf_mm.data.icon_records import is_held_out
from hf_mm.data.icon_scenes import draw
from hf_mm.data.scene_edits import sample_edits
from hf_mm.data.scene_tasks import draw_task_row, scene_task_dataset
from hf_mm.data.task_templates import conversation_parts


KINDS = {"color": 1.0, "glyph": 1.0, "background": 1.0, "size": 1.0}


def kind_of(messages):
    first = [part["type"] for part in messages[0]["content"]]
    if "image" not in first:
        return "drawing"
    return "edits" if messages[1]["content"][0]["type"] == "image" else "description"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_edit_begins_where_the_one_before_ended(split):
    for seed in range(200):
        edits = sample_edits(random.Random(seed), glyph_set="shapes", split=split, kinds=KINDS, num_edits=3)
        assert len(edits) == 3
        for before, after in zip(edits, edits[1:], strict=False):
            assert before["scene"] == after["input_scene"]
        for edit in edits:
            assert edit["input_scene"] != edit["scene"] and edit["instruction"]
        shown = [edits[0]["input_scene"], *(edit["scene"] for edit in edits)]
        held_out = [
            any(is_held_out(item["glyph"], item["color"], scene["background"]) for item in scene["objects"])
            for scene in shown
        ]
        assert held_out[:-2] == [False, False]  # a size changes no combination, so both pictures of its edit are alike
        assert held_out[-1] == (split == "validation")


def test_edits_that_change_the_picture_after_come_last_or_not_at_all():
    with pytest.raises(ValueError, match="kinds.*size.*color.*glyph.*background"):
        sample_edits(random.Random(0), glyph_set="shapes", split="train", kinds={"size": 1.0}, num_edits=2)
    (edit,) = sample_edits(random.Random(0), glyph_set="shapes", split="train", kinds={"size": 1.0}, num_edits=1)
    assert edit["edit"]["kind"] == "size"


def test_conversations_of_all_kinds_end_in_an_edit_of_the_picture_before():
    kinds = set()
    for index in range(60):
        row = draw_task_row("chat", index)
        messages = row["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        kinds.add(kind_of(messages))
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        assert np.array_equal(pictures[-1], draw(json.loads(row["scene"]), 32))
        assert np.array_equal(pictures[-2], draw(json.loads(row["input_scene"]), 32))
        described = json.loads(row["input_scene"])["objects"][0]
        if kind_of(messages) != "edits":
            words = messages[kind_of(messages) == "description"]["content"][0]["text"]
            assert described["glyph"] in words and described["color"] in words
    assert kinds == {"edits", "description", "drawing"}


def test_rows_are_a_function_of_their_number_and_are_conversations_that_tuning_reads():
    rows = scene_task_dataset("chat", 12, seed=3)
    check_rows(rows, "conversation")
    for index, row in enumerate(rows):
        drawn = draw_task_row("chat", index, 3)
        assert {name: row[name] for name in ("scene", "edit")} == {name: drawn[name] for name in ("scene", "edit")}
        parts = [part for part in conversation_parts(row["messages"]) if part["type"] != "end_of_turn"]
        assert parts[-1]["type"] == "image" and parts[-1]["is_answer"] and not parts[0]["is_answer"]
    assert draw_task_row("chat", 0, 4)["scene"] != rows[0]["scene"]


@pytest.mark.parametrize("kind", ["edits", "description", "drawing"])
def test_the_kind_of_conversation_can_be_asked_for(kind):
    for index in range(5):
        assert kind_of(draw_task_row("chat", index, kinds={kind: 1.0})["messages"]) == kind
