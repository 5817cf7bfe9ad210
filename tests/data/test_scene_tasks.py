"""Tasks on icon scenes: rows for every slot, exact by their records, and nothing held out in training."""

import collections
import itertools
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from hf_mm.data.icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, ICONS, OBJECT_COLORS
from hf_mm.data.icon_records import is_held_out, sample_scene
from hf_mm.data.icon_scenes import draw, scene_masks
from hf_mm.data.scene_controls import CONTROL_KINDS, draw_control, draw_letters, glyph_color, render_letters
from hf_mm.data.scene_edits import EDIT_KINDS
from hf_mm.data.scene_questions import QUESTION_KINDS, REASONING_KINDS
from hf_mm.data.scene_tasks import (
    SCENE_TASKS,
    SLOTS,
    draw_task_row,
    scene_task_dataset,
    task_features,
    task_kinds,
)
from hf_mm.data.scene_words import PLACES, place_of, size_of


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
EVERY_EDIT = dict.fromkeys(EDIT_KINDS, 1.0)
EVERY_QUESTION = dict.fromkeys(QUESTION_KINDS, 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def rows(task, num, **options):
    return [draw_task_row(task, index, **options) for index in range(num)]


def record(row, column="scene"):
    return json.loads(row[column])


def looks(scene):
    if scene["kind"] == "write":
        return {(scene["text"], scene["color"], scene["background"])}
    return {(item["glyph"], item["color"], scene["background"]) for item in scene["objects"]}


def texts(row):
    return " ".join(value for slot, value in row.items() if isinstance(value, str) and slot not in NOT_WORDS)


def said(message):
    """The role, words and pixels of a message."""
    return message["role"], [part["text"] or part["image"].tobytes() for part in message["content"]]


NOT_WORDS = ("scene", "input_scene", "edit")


@pytest.mark.parametrize("task", SCENE_TASKS)
def test_rows_have_their_slots_and_keep_pictures_and_words_as_drawn(task):
    dataset = scene_task_dataset(task, 5, size_px=37, glyph_set="icons", split="validation", seed=3)
    assert dataset.column_names == [*SLOTS[task], "scene"]
    assert dataset.features == task_features(task)
    assert str(dataset.split) == "validation"
    for index, row in enumerate(dataset):
        drawn = draw_task_row(task, index, 3, size_px=37, glyph_set="icons", split="validation")
        for slot, value in row.items():
            if slot == "messages":
                assert [said(message) for message in value] == [said(message) for message in drawn[slot]]
            elif slot.endswith("image"):
                assert value.size == (37, 37) and value.mode == "RGB"
                assert value.tobytes() == drawn[slot].tobytes()
            else:
                assert value == drawn[slot] and len(value) > 0


@pytest.mark.parametrize("task", SCENE_TASKS)
def test_rows_depend_on_index_seed_and_split_and_on_nothing_else(task):
    base = rows(task, 25)
    assert base == rows(task, 25)
    for other in (rows(task, 25, seed=1), rows(task, 25, split="validation"), rows(task, 26)[1:]):
        assert sum(one["scene"] == two["scene"] for one, two in zip(base, other, strict=True)) <= 3


def test_more_rows_or_processes_begin_with_the_same_rows():
    few, many = scene_task_dataset("vqa", 3), scene_task_dataset("vqa", 300, num_proc=2)
    assert many[:3]["question"] == few[:]["question"] and len(many) == 300
    assert many[299]["question"] == draw_task_row("vqa", 299)["question"]


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("task", SCENE_TASKS)
def test_training_shows_no_held_out_look_and_validation_targets_show_no_other(task, glyph_set):
    num = 150
    kinds = {"edit": EVERY_EDIT, "vqa": EVERY_QUESTION}.get(task)
    for row in rows(task, num, glyph_set=glyph_set, kinds=kinds):
        scenes = [record(row), *([record(row, "input_scene")] if task in ("edit", "chat") else [])]
        assert not any(is_held_out(*look) for scene in scenes for look in looks(scene))
    for row in rows(task, num, glyph_set=glyph_set, kinds=kinds, split="validation"):
        assert all(is_held_out(*look) for look in looks(record(row)))


@pytest.mark.parametrize("task", ("edit", "vqa", "reasoning"))
def test_training_words_name_no_held_out_look_of_the_picture(task):
    things = {"strawberry": "red", "pumpkin": "orange", "banana": "yellow", "grass": "green", "sky": "blue",
              "eggplant": "purple", "flamingo": "pink", "coal": "black"}  # fmt: skip
    for row in rows(task, 1200):
        scene = record(row)
        if len(scene["objects"]) > 1:
            continue
        words = re.sub(r"[,.?()]", " ", texts(row)).replace("light gray", "gray").split()
        (item,) = scene["objects"]
        named = {"gray": "light gray"}
        glyphs = {item["glyph"], *(word for word in words if word in GLYPH_SETS["shapes"])}
        colors = {item["color"], *(things.get(word, word) for word in words)} & set(OBJECT_COLORS)
        grounds = {scene["background"], *(named.get(word, word) for word in words)} & set(BACKGROUND_COLORS)
        # One thing other than what is shown is named at a time; the word black may be either colour.
        for look in [
            *((glyph, item["color"], scene["background"]) for glyph in glyphs),
            *((item["glyph"], color, scene["background"]) for color in colors if color != "black"),
            *((item["glyph"], item["color"], ground) for ground in grounds if ground != "black"),
        ]:
            assert not is_held_out(*look), texts(row)


def attributes(scene):
    """What an edit may change, one entry each."""
    found = {"background": scene["background"]}
    for number, item in enumerate(scene["objects"]):
        found |= {(number, field): item[field] for field in ("glyph", "color", "size")}
        found[number, "place"] = (item["x"], item["y"])
    return found


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind, glyph_set):
    for row in rows("edit", 60, glyph_set=glyph_set, kinds={kind: 1}):
        before, after, edit = record(row, "input_scene"), record(row), record(row, "edit")
        assert edit["kind"] == kind
        assert draw(before, 32).tobytes() == row["input_image"].tobytes()
        assert draw(after, 32).tobytes() == row["image"].tobytes() != row["input_image"].tobytes()
        if kind in ("add", "remove"):
            fuller, barer = (after, before) if kind == "add" else (before, after)
            (kept,) = (item for number, item in enumerate(fuller["objects"]) if number != edit["object"])
            (left,) = barer["objects"]
            assert {**kept, "place": "", "size_name": ""} == {**left, "place": "", "size_name": ""}
            assert fuller["background"] == barer["background"]
            continue
        one, two = attributes(before), attributes(after)
        changed = {name for name in one if one[name] != two[name]}
        field = {"move": "place"}.get(kind, kind)
        assert changed == {"background" if kind == "background" else (edit["object"], field)}
        value = after["background"] if kind == "background" else None
        if kind != "background":
            value = after["objects"][edit["object"]][{"size": "size_name", "move": "place"}.get(kind, kind)]
        assert edit["value"] == value


def meaning(scene):
    objects = [(item["glyph"], item["color"], size_of(item), place_of(item)) for item in scene["objects"]]
    return scene["background"], *objects


def test_instruction_and_input_fix_the_target():
    meant = {}
    for row in rows("edit", 4000, kinds=EVERY_EDIT):
        asked = (*meaning(record(row, "input_scene")), row["instruction"])
        target = meaning(record(row))
        assert meant.setdefault(asked, target) == target
    assert len(meant) < 4000


def test_instructions_are_worded_in_several_ways():
    for kind in EDIT_KINDS:
        wordings = {
            " ".join(word for word in row["instruction"].split() if word in WORDS)
            for row in rows("edit", 150, kinds={kind: 1})
        }
        assert len(wordings) >= 3, kind


WORDS = set(
    "make change paint turn replace put use add remove take delete keep move it the into to with of away only color size".split()
)


def test_places_are_those_of_captions():
    for index in range(300):
        scene = sample_scene(index, glyph_set="icons", kinds={"single_object": 1})
        (item,) = scene["objects"]
        assert np.abs(np.subtract(PLACES[item["place"]], (item["x"], item["y"]))).max() <= 0.0201
        assert place_of(item) == (item["place"] or "in the center")
        assert size_of(item) == item["size_name"]


@pytest.mark.parametrize(
    ("glyph_set", "number", "least", "most"), [("shapes", 1, 0.4, 0.85), ("icons", 2, 0.28, 0.45)]
)
def test_boxes_enclose_masks_of_objects_anywhere_inside_the_picture(glyph_set, number, least, most):
    centres = []
    for row in rows("boxes", 200, glyph_set=glyph_set, size_px=61):
        masks = scene_masks(row["scene"], 61)
        assert len(row["objects"]) == len(masks) == number
        assert ((masks > 0).sum(0) <= 1).all()
        for mask, entry, item in zip(masks, row["objects"], record(row)["objects"], strict=True):
            ys, xs = np.nonzero(mask)
            x0, y0, x1, y1 = entry["box"]
            assert [x0, y0, x1, y1] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert 0 <= x0 < x1 <= 61 and 0 <= y0 < y1 <= 61
            assert least * 61 - 1 <= max(x1 - x0, y1 - y0) <= most * 61
            assert np.abs([(x0 + x1) / 2 - item["x"] * 61, (y0 + y1) / 2 - item["y"] * 61]).max() <= 1
            assert entry["label"] == item["glyph"] and entry["label"] in row["caption"]
            centres.append((item["x"], item["y"]))
    assert np.std(centres, axis=0).min() > 0.1
    assert not any(word in row["caption"] for word in ("large", "small", "left", "top"))


def test_two_objects_of_a_layout_keep_their_distance():
    for row in rows("boxes", 200, glyph_set="icons", size_px=64):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (entry["box"] for entry in row["objects"])
        assert max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1) >= 0.1 * 64 - 2


def control(kind, scene, size_px=53, seed=0):
    return np.asarray(draw_control(kind, scene, size_px, random.Random(seed))).astype(int)


def placed_scenes(num=25, **options):
    return [record(row) for row in rows("canny", num, **options)]


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_control_pictures_are_of_the_right_size_and_differ_by_scene(kind):
    pictures = [control(kind, scene, 41) for scene in placed_scenes()]
    assert all(picture.shape == (41, 41, 3) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 25


def test_a_canny_line_runs_inside_the_mask_along_its_whole_edge_and_is_one_pixel_wide():
    for scene in placed_scenes(glyph_set="icons"):
        solid = (scene_masks(scene, 53) > 127).any(0)
        lines = control("canny", scene)[:, :, 0] > 0
        outside = np.pad(~solid, 1, constant_values=True)
        beside = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
        assert (lines == (solid & beside)).all() and lines.any()


def test_a_segmentation_has_each_glyph_in_its_own_color_and_black_elsewhere():
    assert len({glyph_color(glyph) for glyph in ICONS}) == len(ICONS)
    for scene in placed_scenes(glyph_set="icons"):
        picture = control("segmentation", scene)
        masks = scene_masks(scene, 53) > 127
        for mask, item in zip(masks, scene["objects"], strict=True):
            assert (picture[mask] == glyph_color(item["glyph"])).all()
        assert (picture[~masks.any(0)] == 0).all()


def test_soft_edges_and_scribbles_lie_near_the_outline_only():
    for scene in placed_scenes(glyph_set="shapes"):
        line = Image.fromarray((control("canny", scene)).astype(np.uint8)).convert("L")
        near = np.asarray(line.resize((53, 53))) > 0
        for _ in range(5):
            near = np.pad(near, 1)
            near = near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:] | near[1:-1, 1:-1]
        for kind in ("hed", "scribble"):
            bright = control(kind, scene)[:, :, 0] > 127
            assert bright.any() and (near | ~bright).mean() > 0.99
    assert len({control("scribble", scene, seed=seed).tobytes() for seed in range(9)}) > 1
    assert len({control("hed", scene, seed=seed).tobytes() for seed in range(9)}) == 1


def test_depth_is_brighter_for_larger_objects_and_darkest_behind():
    shades = []
    for scene in placed_scenes():
        picture, mask = control("depth", scene)[:, :, 0], scene_masks(scene, 53)[0]
        assert len(set(picture[mask == 255])) == 1 and len(set(picture[mask == 0])) == 1
        shades.append((scene["objects"][0]["size"], picture[mask == 255][0]))
        assert picture[mask == 255][0] > picture[mask == 0][0] + 50
    by_size = [shade for _, shade in sorted(shades)]
    assert by_size == sorted(by_size) and by_size[0] < by_size[-1]


def test_normals_point_outward_at_each_side_and_to_the_viewer_where_flat():
    scene = {**placed_scenes(1)[0], "objects": [{"glyph": "square", "color": "red", "x": 0.5, "y": 0.5, "size": 0.5}]}
    normals = control("normals", scene, 64) / 127.5 - 1
    assert np.abs(np.linalg.norm(normals, axis=2) - 1).max() < 0.02
    assert normals[2, 2, 2] > 0.98 and normals[32, 32, 2] > 0.98
    assert normals[32, 16, 0] < -0.5 < 0.5 < normals[32, 47, 0]  # left faces left, right faces right
    assert normals[16, 32, 1] > 0.5 > -0.5 > normals[47, 32, 1]  # the top faces up


def test_axes_of_a_pose_span_the_mask():
    for scene in placed_scenes():
        ys, xs = np.nonzero(scene_masks(scene, 53)[0] > 127)
        rows_, columns = np.nonzero(control("pose", scene).any(2))
        assert (xs.min(), xs.max(), ys.min(), ys.max()) == (columns.min(), columns.max(), rows_.min(), rows_.max())


def test_letters_are_in_the_named_color_inside_the_picture_and_tell_texts_apart():
    assert len({render_letters(text, 32).tobytes() for text in ("A", "B", "AB", "BA", "ABC", "CBA")}) == 6
    for text in ("I", "W", "MWM"):
        mask, picture = render_letters(text, 47), np.asarray(draw_letters(text, "pink", "cream", 47))
        assert not mask[0].any() and not mask[:, 0].any()
        assert (picture[mask == 0] == BACKGROUND_COLORS["cream"]).all()
        assert (picture[mask == 255] == OBJECT_COLORS["pink"]).all() and (mask == 255).any()
    for row in rows("write", 40):
        assert 1 <= len(row["text"]) <= 3 and row["text"] == record(row)["text"]


def answers_by_question(num, **options):
    counts = collections.defaultdict(collections.Counter)
    for row in rows("vqa", num, **options):
        counts[row["question"]][row["answer"]] += 1
    return counts


def test_answers_cannot_be_guessed_from_the_question():
    counts = answers_by_question(3000)
    guessed = sum(max(answers.values()) for answers in counts.values())
    assert guessed / 3000 < 0.45
    yes_no = [answers for question, answers in counts.items() if question.startswith("is ")]
    shares = sum(answers["yes"] for answers in yes_no) / sum(answers.total() for answers in yes_no)
    assert shares == pytest.approx(0.5, abs=0.06)
    for question in ("how large is it?", "how many objects are there?"):
        assert min(counts[question].values()) / counts[question].total() > 0.3


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_are_true(kind, glyph_set):
    for row in rows("vqa", 60, kinds={kind: 1}, glyph_set=glyph_set):
        scene, answer, question = record(row), row["answer"], row["question"]
        named = [item for item in scene["objects"] if item["glyph"] in question.strip("?").split()]
        item = named[0] if named else scene["objects"][0]
        truth = {
            "color": item["color"],
            "glyph": item["glyph"],
            "background": scene["background"],
            "size": size_of(item),
            "count": {1: "one", 2: "two", 3: "three", 4: "four"}[len(scene["objects"])],
        }
        if kind == "yes_no":
            aspect = "background" if "background" in question else "glyph" if "is it" in question else "color"
            words = question.strip("?").replace("light gray", "light_gray").split()
            assert answer == ("yes" if words[-1] == truth[aspect].replace(" ", "_") else "no")
        elif kind == "relation":
            relation = next(word for word in ("left of", "right of", "above", "below") if word in question)
            (other,) = named
            (asked,) = (item for item in scene["objects"] if item is not other)
            assert answer == asked["glyph"]
            axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[relation]
            assert sign * (asked[axis] - other[axis]) > 0.3
        else:
            assert answer == truth[kind]


@pytest.mark.parametrize("kind", REASONING_KINDS)
def test_reasoning_offers_the_answer_once_and_explains_it(kind):
    answers = collections.Counter()
    for row in rows("reasoning", 150, kinds={kind: 1}):
        choices = re.split(r" ?\([ABC]\) ", row["choices"])[1:]
        assert choices.count(row["answer"]) == 1 and 2 <= len(set(choices)) == len(choices)
        assert row["explanation"].endswith(".") and row["explanation"].count(".") == 1
        if kind != "extent":
            assert row["answer"] in row["explanation"]
        answers[row["answer"]] += 1
        if kind == "contrast":
            (item,) = record(row)["objects"]
            brightness = sum(OBJECT_COLORS[item["color"]]) - sum(BACKGROUND_COLORS[record(row)["background"]])
            assert (brightness > 0) == (row["answer"] == "lighter")
        if kind == "extent":
            assert (record(row)["objects"][0]["size"] > 2 / 3) == (row["answer"] == "yes")
    assert max(answers.values()) < 0.65 * 150


@pytest.mark.parametrize("task", ("long_caption", "dense_caption"))
def test_long_captions_name_all_objects_with_size_place_and_background(task):
    for row in rows(task, 80, glyph_set="icons"):
        scene = record(row)
        for item in scene["objects"]:
            name = f"{size_of(item)} {item['color']} {item['glyph']} {place_of(item)}"
            assert row["caption"].count(name) >= 1
        assert (
            f"{scene['background']} background" in row["caption"]
            or f"background is {scene['background']}" in row["caption"]
        )


def test_shapes_have_lone_objects_by_default():
    for task, limit in (("edit", 1), ("boxes", 1), ("canny", 1), ("caption", 1), ("vqa", 2)):
        assert max(len(record(row)["objects"]) for row in rows(task, 60)) == limit


def test_weights_choose_kinds():
    assert {record(row, "edit")["kind"] for row in rows("edit", 60, kinds={"size": 1, "glyph": 2})} == {
        "size",
        "glyph",
    }
    assert {len(row["text"]) for row in rows("write", 30, kinds={"two_letters": 1})} == {2}
    assert {len(row["objects"]) for row in rows("boxes", 30, kinds={"two_object": 1})} == {2}
    assert task_kinds("edit", "shapes") == {"color": 0.3, "glyph": 0.3, "background": 0.25, "size": 0.15}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "draw"}, r"`task`='draw' is unknown. Choose one of \['edit'"),
        ({"num_rows": 0}, "`num_rows`=0 must be at least 1"),
        ({"size_px": 8}, "`size_px`=8 is too small"),
        ({"split": "test"}, "`split`='test' is unknown"),
        ({"glyph_set": "letters"}, "`glyph_set`='letters' is unknown"),
        ({"kinds": {"recolor": 1}}, r"`kinds`='recolor' is unknown. Choose one of \['color', 'glyph'"),
        ({"kinds": {"size": -1}}, r"`kinds\['size'\]`=-1 must be at least 0"),
        ({"kinds": {"size": 0}}, "must give some kind a weight above 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    arguments = {"task": "edit", "num_rows": 2, **options}
    with pytest.raises(ValueError, match=message):
        scene_task_dataset(arguments.pop("task"), arguments.pop("num_rows"), **arguments)


def test_bad_rows_letters_and_controls_are_refused_by_name():
    with pytest.raises(ValueError, match="`index`=-1 must be at least 0"):
        draw_task_row("text", -1)
    with pytest.raises(ValueError, match="`text`='ab' must be 1 to 3 letters"):
        render_letters("ab", 32)
    with pytest.raises(ValueError, match="`kind`='mlsd' is unknown"):
        draw_control("mlsd", placed_scenes(1)[0], 32, random.Random(0))


def test_every_pair_of_splits_seeds_and_tasks_draws_scenes_of_its_own():
    streams = {
        (task, seed, split): tuple(row["scene"] for row in rows(task, 6, seed=seed, split=split))
        for task, seed, split in itertools.product(
            ("caption", "long_caption", "text"), (0, 1), ("train", "validation")
        )
    }
    assert len({scenes[0] for scenes in streams.values()}) == len(streams)
