"""The ruler itself: right on true pictures, near chance on shuffled prompts, and honest about what is missing."""

import numpy as np
import pytest
from PIL import ImageFilter

from hf_mm.data.icon_scenes import (
    BACKGROUND_COLORS,
    GLYPH_SETS,
    KINDS,
    OBJECT_COLORS,
    draw,
    render_glyph,
    sample_scene,
)
from hf_mm.evaluation.scene_accuracy import (
    chance_accuracy,
    find_objects,
    relations_between,
    scene_accuracy,
    score_scene,
)


def names(glyph_set):
    return {
        "glyphs": GLYPH_SETS[glyph_set],
        "colors": OBJECT_COLORS,
        "backgrounds": BACKGROUND_COLORS,
        "render_glyph": render_glyph,
    }


def sample(num, glyph_set="shapes", kinds=KINDS):
    return [sample_scene(index, 1, glyph_set=glyph_set, kinds=dict.fromkeys(kinds, 1)) for index in range(num)]


def pictures(scenes, size_px):
    return [np.asarray(draw(scene, size_px)) for scene in scenes]


def scene_of(*objects, kind="two_object", background="white", relation=None):
    items = [
        {"glyph": glyph, "color": color, "x": x, "y": y, "size": 0.34}
        for (glyph, color), (x, y) in zip(objects, ((0.26, 0.3), (0.74, 0.3), (0.26, 0.74)), strict=False)
    ]
    return {"kind": kind, "background": background, "relation": relation, "objects": items}


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
@pytest.mark.parametrize("size_px", (32, 64, 101))
def test_true_pictures_are_right(glyph_set, size_px):
    scenes = sample(70, glyph_set)
    accuracy = scene_accuracy(pictures(scenes, size_px), scenes, **names(glyph_set))
    assert accuracy.keys() == {"overall", *KINDS}
    for rates in accuracy.values():
        assert min(rates[rate] for rate in rates["intervals"]) >= 0.99
        assert len(rates["intervals"]) == 5 and all(low <= 1 == high for low, high in rates["intervals"].values())


def test_found_boxes_lie_on_the_drawn_ones():
    scene = scene_of(("star", "red"), ("heart", "blue"))
    for size_px, slack in ((32, 1), (64, 1), (128, 3)):
        found = {
            item["glyph"]: item["box"]
            for item in score_scene(*pictures([scene], size_px), scene, **names("shapes"))["objects"]
        }
        for item in scene["objects"]:
            centre = np.array(found[item["glyph"]]).reshape(2, 2).mean(0)
            assert np.abs(centre - np.array([item["x"], item["y"]]) * size_px).max() <= slack


@pytest.mark.parametrize("size_px", (32, 64))
@pytest.mark.parametrize("spoil", ("noise", "blur 0.5", "blur 1", "blur 0.5 and noise"))
def test_mild_noise_and_blur_change_little(size_px, spoil):
    rng = np.random.default_rng(0)
    scenes = sample(70)
    drawn = [draw(scene, size_px) for scene in scenes]
    if "blur" in spoil:
        drawn = [image.filter(ImageFilter.GaussianBlur(float(spoil.split()[1]))) for image in drawn]
    spoiled = [np.asarray(image) for image in drawn]
    if "noise" in spoil:
        spoiled = [np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8) for image in spoiled]
    assert scene_accuracy(spoiled, scenes, **names("shapes"))["overall"]["strict_correct"] >= 0.97


def test_shuffled_prompts_score_at_chance():
    scenes = sample(150, kinds=("single_object", "counting"))
    shuffled = scenes[1:] + scenes[:1]
    chance = chance_accuracy(scenes)
    assert 0 < chance < 0.05
    accuracy = scene_accuracy(pictures(scenes, 32), shuffled, **names("shapes"))
    assert accuracy["overall"]["scene_correct"] <= chance + 0.05


def verdicts(drawn, asked):
    return score_scene(*pictures([drawn], 48), asked, **names("shapes"))


def test_wrong_color_and_wrong_glyph_are_told_apart():
    asked = scene_of(("star", "red"), kind="single_object")
    wrong_color = verdicts(scene_of(("star", "blue")), asked)
    assert (wrong_color["glyph_correct"], wrong_color["color_correct"], wrong_color["scene_correct"]) == (1, 0, 0)
    wrong_glyph = verdicts(scene_of(("moon", "red")), asked)
    assert (wrong_glyph["glyph_correct"], wrong_glyph["color_correct"], wrong_glyph["scene_correct"]) == (0, 1, 0)


def test_swapped_colors_fail_the_pairing_only():
    asked = scene_of(("star", "red"), ("heart", "blue"), kind="color_attr")
    swapped = verdicts(scene_of(("star", "blue"), ("heart", "red")), asked)
    assert swapped["glyph_correct"] and swapped["color_correct"] and not swapped["scene_correct"]


def test_something_else_in_the_picture_fails_the_strict_rule_only():
    asked = scene_of(("star", "red"), kind="single_object")
    extra = verdicts(scene_of(("star", "red"), ("moon", "green")), asked)
    assert extra["scene_correct"] and not extra["strict_correct"]


def test_one_too_many_fails_counting():
    asked = scene_of(("key", "red"), ("key", "red"), kind="counting")
    assert verdicts(asked, asked)["scene_correct"]
    assert not verdicts(scene_of(("key", "red"), ("key", "red"), ("key", "red")), asked)["scene_correct"]
    assert not verdicts(scene_of(("key", "red")), asked)["scene_correct"]


def test_another_background_fails_the_strict_rule_only():
    asked = scene_of(("star", "red"), kind="single_object")
    gray = verdicts(scene_of(("star", "red"), background="light gray"), asked)
    assert gray["background"] == "light gray"
    assert gray["scene_correct"] and not gray["strict_correct"] and not gray["background_correct"]


def test_the_asked_relation_must_hold():
    objects = (("star", "red"), ("heart", "blue"))
    drawn = scene_of(*objects, kind="position")
    for relation, holds in (("left of", True), ("right of", False), ("above", False)):
        asked = scene_of(*objects, kind="position", relation=relation)
        assert verdicts(drawn, asked)["scene_correct"] is holds


def test_touching_objects_of_two_colors_are_two_objects():
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    picture[20:44, 8:32] = OBJECT_COLORS["red"]
    picture[20:44, 32:56] = OBJECT_COLORS["blue"]
    found = find_objects(picture, glyphs=("square", "star"), colors=OBJECT_COLORS, render_glyph=render_glyph)
    assert sorted((item["glyph"], item["color"]) for item in found) == [("square", "blue"), ("square", "red")]


def test_empty_and_random_pictures_hold_no_glyph():
    options = {"glyphs": GLYPH_SETS["shapes"], "colors": OBJECT_COLORS, "render_glyph": render_glyph}
    assert find_objects(np.full((32, 32, 3), 250, dtype=np.uint8), **options) == []
    static = np.random.default_rng(0).integers(0, 256, (41, 41, 3), dtype=np.uint8)
    assert all(item["glyph"] is None for item in find_objects(static, **options))


def test_an_outline_of_no_glyph_is_not_named():
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    picture[10:54, 28:34] = picture[28:34, 10:54] = OBJECT_COLORS["green"]  # a thin cross
    (item,) = find_objects(picture, glyphs=GLYPH_SETS["shapes"], colors=OBJECT_COLORS, render_glyph=render_glyph)
    assert (item["glyph"], item["color"]) == (None, "green")


def test_relations_follow_the_centres_and_are_empty_when_they_coincide():
    assert relations_between([0, 10, 10, 20], [30, 11, 41, 22]) == {"left of"}
    assert relations_between([30, 11, 41, 22], [0, 10, 10, 20]) == {"right of"}
    assert relations_between([0, 0, 10, 10], [1, 30, 11, 43]) == {"above"}
    assert relations_between([5, 5, 9, 9], [5, 5, 9, 9]) == set()


def test_bad_arguments_are_refused_by_name():
    scenes = sample(2)
    with pytest.raises(ValueError, match=r"1 `images` do not go with 2 `scenes`"):
        scene_accuracy(pictures(scenes[:1], 32), scenes, **names("shapes"))
    with pytest.raises(ValueError, match=r"`image` has shape \(3, 32, 32\) and dtype uint8"):
        score_scene(np.zeros((3, 32, 32), dtype=np.uint8), scenes[0], **names("shapes"))
    with pytest.raises(ValueError, match="`scores` is empty"):
        scene_accuracy([], [], **names("shapes"))
