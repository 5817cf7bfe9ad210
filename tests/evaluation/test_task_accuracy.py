"""The rulers of tasks: true pictures score one, unchanged inputs and shuffled pictures next to nothing."""

import json

import numpy as np
import pytest
from PIL import ImageFilter

from hf_mm.data.icon_scenes import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS, draw, render_glyph, scene_masks
from hf_mm.data.scene_controls import ALPHABET, draw_letters, render_letters
from hf_mm.data.scene_edits import EDIT_KINDS
from hf_mm.data.scene_tasks import draw_task_row
from hf_mm.evaluation.task_accuracy import (
    answer_accuracy,
    box_accuracy,
    box_iou,
    caption_accuracy,
    edit_success,
    expected_masks,
    score_edit,
    structure_adherence,
    writing_accuracy,
)
from hf_mm.evaluation.text_accuracy import normalize_answer, read_caption


SIZES = {"shapes": 32, "icons": 64}


def rows(task, num, glyph_set="shapes", **options):
    return [
        draw_task_row(task, index, 5, glyph_set=glyph_set, size_px=SIZES[glyph_set], **options) for index in range(num)
    ]


def column(table, name):
    return [row[name] for row in table]


def pictures(table, name="image", blur=0.0):
    images = (row[name].filter(ImageFilter.GaussianBlur(blur)) if blur else row[name] for row in table)
    return [np.asarray(image) for image in images]


def words(glyph_set="shapes"):
    return {"glyphs": GLYPH_SETS[glyph_set], "colors": OBJECT_COLORS, "backgrounds": BACKGROUND_COLORS}


def ruler(glyph_set="shapes"):
    return words(glyph_set) | {"render_glyph": render_glyph}


def shifted(values):
    return values[1:] + values[:1]


def score_edits(images, table, glyph_set):
    records = (column(table, name) for name in ("input_scene", "scene", "edit"))
    return edit_success(images, *records, **ruler(glyph_set))


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_true_edits_succeed_and_unchanged_or_other_pictures_do_not(kind, glyph_set):
    table = rows("edit", 24, glyph_set, kinds={kind: 1})
    perfect = {"edit_success": 1.0, "change_made": 1.0, "rest_kept": 1.0}
    assert score_edits(pictures(table), table, glyph_set) == perfect
    assert score_edits(pictures(table, blur=0.6), table, glyph_set)["edit_success"] >= 0.95
    unchanged = score_edits(pictures(table, "input_image"), table, glyph_set)
    assert unchanged == {"edit_success": 0.0, "change_made": 0.0, "rest_kept": 1.0}
    other = score_edits(shifted(pictures(table)), table, glyph_set)
    assert other["edit_success"] == 0.0 and other["change_made"] < 0.7 and other["rest_kept"] < 0.1


def lone(**fields):
    return {"glyph": "star", "color": "red", "x": 0.5, "y": 0.5, "size": 0.56, **fields}


def scene_of(*objects, background="white"):
    return {"kind": "single_object", "background": background, "relation": None, "objects": list(objects)}


def verdict(drawn, asked, before, kind, number=0):
    edit = {"kind": kind, "object": number, "value": None}
    return score_edit(np.asarray(draw(drawn, 48)), before, asked, edit, **ruler())


@pytest.mark.parametrize(
    ("spoiled", "background"),
    [
        ({"glyph": "heart"}, "white"),
        ({}, "cream"),
        ({"x": 0.64}, "white"),
        ({"size": 0.74}, "white"),
    ],
)
def test_what_the_edit_does_not_name_must_stay(spoiled, background):
    before, asked = scene_of(lone()), scene_of(lone(color="blue"))
    drawn = scene_of(lone(**spoiled, color="blue"), background=background)
    seen = verdict(drawn, asked, before, "color")
    assert (seen["change_made"], seen["rest_kept"], seen["edit_success"]) == (True, False, False)


def test_small_shifts_and_sizes_within_a_name_are_kept():
    before, asked = scene_of(lone()), scene_of(lone(color="blue"))
    assert verdict(scene_of(lone(color="blue", x=0.54, size=0.6)), asked, before, "color")["edit_success"]


def test_one_object_too_many_or_too_few_is_not_the_rest_kept():
    pair = [lone(x=0.26, size=0.34), lone(glyph="heart", x=0.74, size=0.34)]
    blue = [pair[0] | {"color": "blue"}, pair[1]]
    third = lone(glyph="moon", y=0.82, size=0.3)
    for drawn in (scene_of(*blue, third), scene_of(blue[0])):
        seen = verdict(drawn, scene_of(*blue), scene_of(*pair), "color")
        assert seen["change_made"] and not seen["rest_kept"]


def test_the_wrong_one_of_two_changed_is_neither_the_change_nor_the_rest():
    pair = [lone(x=0.26, size=0.34), lone(glyph="heart", x=0.74, size=0.34)]
    asked = scene_of(pair[0] | {"color": "blue"}, pair[1])
    wrong = scene_of(pair[0], pair[1] | {"color": "blue"})
    assert verdict(wrong, asked, scene_of(*pair), "color") == dict.fromkeys(
        ("edit_success", "change_made", "rest_kept"), False
    )


def test_a_removal_must_take_the_named_object():
    pair = [lone(x=0.26, size=0.34), lone(glyph="heart", x=0.74, size=0.34)]
    asked = scene_of(pair[1])
    assert verdict(asked, asked, scene_of(*pair), "remove")["edit_success"]
    other = verdict(scene_of(pair[0]), asked, scene_of(*pair), "remove")
    assert not other["change_made"] and not other["rest_kept"]
    empty = verdict(scene_of(), asked, scene_of(*pair), "remove")
    assert empty["change_made"] and not empty["rest_kept"]


def test_an_empty_picture_succeeds_at_nothing():
    for kind in EDIT_KINDS:
        table = rows("edit", 5, "icons", kinds={kind: 1})
        blank = [np.full((64, 64, 3), 255, dtype=np.uint8)] * 5
        assert score_edits(blank, table, "icons")["edit_success"] == 0


@pytest.mark.parametrize("size_px", (32, 53, 64))
def test_expected_masks_are_what_is_drawn(size_px):
    for row in rows("boxes", 40, "icons"):
        expected = expected_masks(row["scene"], size_px, render_glyph)
        assert (expected == (scene_masks(row["scene"], size_px) > 127)).all()


def moved(scene, **fields):
    """Draws a scene with its lone object elsewhere."""
    record = json.loads(scene)
    (item,) = record["objects"]
    return np.asarray(draw({**record, "objects": [item | fields]}, 32))


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
def test_true_layouts_score_one_and_others_little(glyph_set):
    table = rows("boxes", 40, glyph_set)
    asked = (column(table, "scene"), column(table, "objects"))
    true = box_accuracy(pictures(table), *asked, **ruler(glyph_set))
    assert (true["box_accuracy"], true["color_and_box_accuracy"]) == (1, 1) and true["mean_iou"] > 0.95
    assert box_accuracy(pictures(table, blur=0.6), *asked, **ruler(glyph_set))["box_accuracy"] >= 0.97
    assert box_accuracy(shifted(pictures(table)), *asked, **ruler(glyph_set))["box_accuracy"] < 0.15


def test_a_box_needs_its_place_and_its_label_and_the_color_counts_apart():
    table = rows("boxes", 30)
    asked = (column(table, "scene"), column(table, "objects"))
    centred = [moved(scene, x=0.5, y=0.5, size=0.56) for scene in asked[0]]
    scores = box_accuracy(centred, *asked, **ruler())
    assert scores["box_accuracy"] < 0.5 and scores["placement_accuracy"] < 0.5
    renamed = [
        [{**entry, "label": "bolt" if entry["label"] != "bolt" else "key"} for entry in row] for row in asked[1]
    ]
    with pytest.raises(ValueError, match="`boxes` has the label"):
        box_accuracy(pictures(table), asked[0], renamed, **ruler())
    unlike = [moved(row["scene"], glyph="bolt") for row in table if row["objects"][0]["label"] != "bolt"]
    kept = [row for row in table if row["objects"][0]["label"] != "bolt"]
    scores = box_accuracy(unlike, column(kept, "scene"), column(kept, "objects"), **ruler())
    assert scores["box_accuracy"] == scores["mean_iou"] == 0
    assert scores["placement_accuracy"] > 0.5  # another outline in nearly the same box
    recolored = []
    for scene in asked[0]:
        record = json.loads(scene)
        color = next(
            name for name in OBJECT_COLORS if name not in (record["objects"][0]["color"], record["background"])
        )
        recolored.append(moved(scene, color=color))
    scores = box_accuracy(recolored, *asked, **ruler())
    assert scores["box_accuracy"] == 1 and scores["color_and_box_accuracy"] == 0


def test_overlap_of_boxes():
    assert box_iou([0, 0, 4, 3], [0, 0, 4, 3]) == 1
    assert box_iou([0, 0, 4, 3], [4, 0, 8, 3]) == 0
    assert box_iou([0, 0, 2, 7], [0, 0, 2, 14]) == pytest.approx(0.5)


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
def test_true_structure_adheres_and_other_does_not(glyph_set):
    table = rows("scribble", 40, glyph_set)
    scenes = column(table, "scene")
    true = structure_adherence(pictures(table), scenes, **ruler(glyph_set))
    assert true["structure_adherence"] == 1 and true["mask_iou"] > 0.97
    assert structure_adherence(pictures(table, blur=0.6), scenes, **ruler(glyph_set))["structure_adherence"] >= 0.97
    other = structure_adherence(shifted(pictures(table)), scenes, **ruler(glyph_set))
    assert other["structure_adherence"] == 0 and other["mask_iou"] < 0.5


def test_structure_is_of_place_size_and_glyph_but_not_of_color():
    scenes = column(rows("depth", 30), "scene")
    for fields, least, most in (
        ({"x": 0.5, "y": 0.5, "size": 0.56}, 0, 0.2),
        ({"glyph": "key"}, 0, 0.3),
    ):
        scores = structure_adherence([moved(scene, **fields) for scene in scenes], scenes, **ruler())
        assert least <= scores["structure_adherence"] <= most
    black_or_red = [moved(scene, color="red") for scene in scenes]
    assert structure_adherence(black_or_red, scenes, **ruler())["structure_adherence"] == 1


def test_true_writing_is_read_in_any_color_and_other_is_not():
    options = {"render_text": render_letters, "alphabet": ALPHABET}
    table = rows("write", 30)
    texts = column(table, "text")
    assert writing_accuracy(pictures(table), texts, **options) == {"writing_accuracy": 1.0}
    assert writing_accuracy(pictures(table, blur=0.6), texts, **options)["writing_accuracy"] >= 0.95
    assert writing_accuracy(shifted(pictures(table)), texts, **options)["writing_accuracy"] < 0.1
    near = [np.asarray(draw_letters(text, "red", "cream", 32)) for text in ("O", "E", "AC")]
    assert writing_accuracy(near, ["Q", "F", "AG"], **options)["writing_accuracy"] == 0
    blank = [np.zeros((32, 32, 3), dtype=np.uint8)]
    assert writing_accuracy(blank, ["A"], **options)["writing_accuracy"] == 0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A star.", "star"),
        ("The light  Gray", "light gray"),
        ("two", "2"),
        ("3.5 of 1,000", "3.5 of 1000"),
        ("a", "a"),
        ("Yes!", "yes"),
        ("it's", "its"),
    ],
)
def test_answers_are_compared_in_a_normal_form(answer, normal):
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize("task", ("vqa", "reasoning"))
def test_true_answers_score_one_and_shuffled_ones_chance(task):
    truths = column(rows(task, 200), "answer")
    assert answer_accuracy([f" {truth.capitalize()}. " for truth in truths], truths) == {"answer_accuracy": 1.0}
    assert answer_accuracy(shifted(truths), truths)["answer_accuracy"] < 0.25
    assert answer_accuracy([""] * 200, truths)["answer_accuracy"] == 0


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("task", ("caption", "long_caption", "dense_caption"))
def test_true_captions_score_one_and_shuffled_ones_little(task, glyph_set):
    table = rows(task, 150, glyph_set)
    captions, scenes = column(table, "caption"), column(table, "scene")
    assert set(caption_accuracy(captions, scenes, **words(glyph_set)).values()) == {1.0}
    other = caption_accuracy(shifted(captions), scenes, **words(glyph_set))
    assert other["caption_accuracy"] < 0.05
    assert max(other["glyph_correct"], other["color_correct"], other["background_correct"]) < 0.4


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a red star on a cream background", (1, 1, 1, 1)),
        ("A star that is red. The background is cream.", (1, 1, 1, 1)),
        ("on a cream background, a star colored red", (1, 1, 1, 1)),
        ("a blue star on a cream background", (0, 1, 0, 1)),
        ("a red heart on a cream background", (0, 0, 1, 1)),
        ("a red star", (0, 1, 1, 0)),
        ("a red star on a gray background", (0, 1, 1, 0)),
        ("a red star on a cream background on a black background", (0, 1, 1, 0)),
        ("two red stars on a cream background", (0, 0, 0, 1)),
        ("a red star and a red star on a cream background", (0, 0, 0, 1)),
        ("a star on a cream background", (0, 1, 0, 1)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_a_caption_is_right_in_what_it_names(caption, right):
    scene = scene_of(lone(), background="cream")
    scores = caption_accuracy([caption], [scene], **words())
    names = ("caption_accuracy", "glyph_correct", "color_correct", "background_correct")
    assert tuple(scores[name] for name in names) == right


def test_colors_go_with_their_own_glyphs():
    options = words("icons")
    objects, background = read_caption("a red star and two blue leaves left of a key that is pink", **options)
    assert objects == {("star", "red"): 1, ("leaf", "blue"): 2, ("key", "pink"): 1} and background == "white"
    swapped = read_caption("a blue star and a red heart", **options)
    assert swapped != read_caption("a red star and a blue heart", **options)
    objects, background = read_caption("three black fish against a black background", **options)
    assert objects == {("fish", "black"): 3} and background == "black"


def test_bad_arguments_are_refused_by_name():
    row = rows("edit", 1)[0]
    image = np.asarray(row["image"])
    with pytest.raises(ValueError, match=r"Numbers of rows differ: \{'images': 1, 'input_scenes': 1, 'scenes': 2"):
        edit_success([image], [row["input_scene"]], [row["scene"]] * 2, [row["edit"]], **ruler())
    with pytest.raises(ValueError, match=r"\['answers', 'truths'\] are empty"):
        answer_accuracy([], [])
    with pytest.raises(ValueError, match=r"`images` has one of shape \(31, 32, 3\)"):
        structure_adherence([image[1:]], [row["scene"]], **ruler())
    with pytest.raises(ValueError, match="`boxes` has no box in any row"):
        box_accuracy([image], [row["scene"]], [[]], **ruler())
