"""Icon scenes: the same rows for everyone, captions that fix the picture, and prompts that stay held out."""

import collections
import itertools
import json
import re

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_mm.data.icon_glyphs import glyph_search_terms
from hf_mm.data.icon_scenes import (
    BACKGROUND_COLORS,
    DEFAULT_KINDS,
    GLYPH_SETS,
    KINDS,
    OBJECT_COLORS,
    draw,
    draw_scene,
    icon_scenes_dataset,
    icon_scenes_stream,
    render_glyph,
    sample_scene,
    scene_masks,
)
from hf_mm.data.sources import DatasetArguments, open_rows


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
EVERY_KIND = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def scenes(num, **options):
    return [sample_scene(index, kinds=EVERY_KIND, **options) for index in range(num)]


def looks(scene):
    return {(item["glyph"], item["color"], scene["background"]) for item in scene["objects"]}


def pixels(row):
    return np.asarray(row["image"]).tolist()


def test_a_row_is_a_pure_function_of_its_arguments():
    first = draw_scene(7, 3, 29, "icons", "validation")
    for other in range(20):
        draw_scene(other, 5, 31, "icons")
    again = draw_scene(7, 3, 29, "icons", "validation")
    assert first.pop("image").tobytes() == again.pop("image").tobytes()
    assert first == again


def test_seed_index_and_split_each_change_the_scene():
    base = [sample_scene(index, 0) for index in range(40)]
    for other in (
        [sample_scene(index, 1) for index in range(40)],
        [sample_scene(index + 1, 0) for index in range(40)],
        [sample_scene(index, 0, split="validation") for index in range(40)],
    ):
        assert sum(one["objects"] == two["objects"] for one, two in zip(base, other, strict=True)) == 0


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
def test_no_validation_look_occurs_in_training_whatever_the_seed(glyph_set):
    train = set().union(*(looks(s) for seed in (0, 11) for s in scenes(2000, seed=seed, glyph_set=glyph_set)))
    held = set().union(
        *(looks(s) for seed in (0, 5) for s in scenes(500, seed=seed, glyph_set=glyph_set, split="validation"))
    )
    assert not train & held
    assert {glyph for glyph, _, _ in train} == set(GLYPH_SETS[glyph_set])
    assert {color for _, color, _ in train} == set(OBJECT_COLORS)
    assert {background for _, _, background in train} == set(BACKGROUND_COLORS)


def test_validation_of_shapes_asks_for_every_glyph_and_color():
    held = set().union(*(looks(s) for s in scenes(700, split="validation")))
    assert {glyph for glyph, _, _ in held} == set(GLYPH_SETS["shapes"])
    assert {color for _, color, _ in held} == set(OBJECT_COLORS)


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
def test_equal_captions_mean_equal_scenes_up_to_small_shifts(glyph_set):
    meant = {}
    for index in range(4000):
        row = draw_scene(index, 0, 17, glyph_set, kinds=EVERY_KIND)
        scene = json.loads(row["scene"])
        exact = [(o["glyph"], o["color"], o["size_name"], o["place"]) for o in scene["objects"]]
        meaning = (scene["background"], scene["relation"], exact)
        # Objects of one caption stay within a few hundredths of the picture of each other.
        centres = np.array([(o["x"], o["y"]) for o in scene["objects"]])
        if row["description"] in meant:
            known, known_centres = meant[row["description"]]
            assert known == meaning
            assert np.abs(known_centres - centres).max() <= 0.05
        meant[row["description"]] = (meaning, centres)
    assert len(meant) < 4000


@pytest.mark.parametrize("glyph_set", GLYPH_SETS)
def test_exact_scenes_of_one_caption_are_one_picture(glyph_set):
    drawn = collections.defaultdict(set)
    for index in range(2000):
        row = draw_scene(index, 0, 17, glyph_set, kinds=EVERY_KIND, exact_share=1.0)
        drawn[row["description"]].add(row["image"].tobytes())
    assert len(drawn) < 2000 and {len(pictures) for pictures in drawn.values()} == {1}


def test_scenes_that_are_not_exact_are_those_without_a_share():
    shifted = [scene == plain for scene, plain in zip(scenes(1000, exact_share=0.7), scenes(1000), strict=True)]
    assert 0.25 < sum(shifted) / 1000 < 0.35


@pytest.mark.parametrize("streaming", (False, True))
def test_recipes_draw_the_share_of_exact_scenes_that_they_name(streaming):
    arguments = DatasetArguments(dataset_name="icon_scenes:icons", num_scenes=7, exact_share=1.0)
    rows = list(open_rows(arguments, image_size=16, streaming=streaming))
    assert [json.loads(row["scene"]) for row in rows] == [
        sample_scene(index, glyph_set="icons", exact_share=1.0) for index in range(7)
    ]


@pytest.mark.parametrize("streaming", (False, True))
def test_recipes_draw_a_kind_as_often_as_they_name_it(streaming):
    arguments = DatasetArguments(
        dataset_name="icon_scenes:icons", num_scenes=400, scene_kinds=["position", "colors", "position", "position"]
    )
    rows = open_rows(arguments, image_size=16, streaming=streaming)
    kinds = collections.Counter(json.loads(row["scene"])["kind"] for row in rows)
    assert kinds.keys() == {"position", "colors"}
    assert kinds["position"] / 400 == pytest.approx(0.75, abs=0.06)


def test_background_goes_unsaid_only_on_white():
    unsaid = collections.Counter()
    for index in range(600):
        row = draw_scene(index, 0, 16)
        background = json.loads(row["scene"])["background"]
        if f"{background} background" not in row["description"]:
            unsaid[background] += 1
    assert set(unsaid) == {"white"}


def test_plain_wording_is_the_most_common():
    descriptions = [draw_scene(index, 0, 16)["description"] for index in range(500)]
    plain = re.compile(r"an? .* on a [a-z ]+ background")
    assert sum(bool(plain.fullmatch(text)) and " of " not in text for text in descriptions) > 250


@pytest.mark.parametrize("size_px", (16, 37, 64))
def test_boxes_enclose_the_masks_exactly_and_objects_never_overlap(size_px):
    for index in range(150):
        row = draw_scene(index, 2, size_px, "icons", kinds=EVERY_KIND)
        masks = scene_masks(row["scene"], size_px)
        assert masks.shape == (len(row["boxes"]), size_px, size_px)
        assert ((masks > 0).sum(0) <= 1).all()
        for mask, entry in zip(masks, row["boxes"], strict=True):
            ys, xs = np.nonzero(mask)
            assert entry["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_pixels_are_background_outside_the_masks_and_object_color_where_fully_covered():
    for index in range(60):
        row = draw_scene(index, 0, 53, "icons", kinds=EVERY_KIND)
        scene, picture = json.loads(row["scene"]), np.asarray(row["image"])
        masks = scene_masks(scene, 53)
        assert (picture[(masks == 0).all(0)] == BACKGROUND_COLORS[scene["background"]]).all()
        for mask, item in zip(masks, scene["objects"], strict=True):
            assert item["color"] != scene["background"]
            assert (mask == 255).any()
            assert (picture[mask == 255] == OBJECT_COLORS[item["color"]]).all()


@pytest.mark.parametrize("size_px", (16, 23, 64, 131))
def test_any_size_on_request_shows_the_same_scene(size_px):
    row = draw_scene(4, 0, 64, "icons")
    assert draw(row["scene"], 64).tobytes() == row["image"].tobytes()
    picture = draw(row["scene"], size_px)
    assert picture.size == (size_px, size_px)
    coverage = (scene_masks(row["scene"], size_px) / 255).mean()
    assert coverage == pytest.approx((scene_masks(row["scene"], 499) / 255).mean(), rel=0.25)


def test_relation_words_are_unambiguous():
    for index in range(200):
        row = draw_scene(index, 0, 64, "icons", kinds={"position": 1})
        relation = json.loads(row["scene"])["relation"]
        assert f" {relation} " in row["description"]
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (entry["box"] for entry in row["boxes"])
        apart = {"left of": ax1 < bx0, "right of": bx1 < ax0, "above": ay1 < by0, "below": by1 < ay0}
        assert [name for name, holds in apart.items() if holds] == [relation]


def test_counts_in_words_are_counts_in_the_picture():
    words = {"two": 2, "three": 3, "four": 4}
    for index in range(100):
        row = draw_scene(index, 0, 16, "icons", kinds={"counting": 1})
        (named,) = (count for word, count in words.items() if re.search(rf"\b{word}\b", row["description"]))
        assert named == len(row["boxes"])
        assert len({(entry["label"], entry["color"]) for entry in row["boxes"]}) == 1


def test_kinds_follow_their_weights():
    counts = collections.Counter(sample_scene(index)["kind"] for index in range(1500))
    assert counts.keys() == DEFAULT_KINDS["shapes"].keys()
    assert counts["single_object"] / 1500 == pytest.approx(DEFAULT_KINDS["shapes"]["single_object"], abs=0.05)
    assert {scene["kind"] for scene in scenes(200)} == set(KINDS)


def test_keywords_name_the_objects_and_never_another_color():
    for index in range(100):
        row = draw_scene(index, 0, 16, "icons")
        asked = {word for entry in row["boxes"] for word in (entry["label"], entry["color"])}
        assert asked <= set(row["keywords"])
        assert set(row["keywords"]) & set(OBJECT_COLORS) <= asked
        assert len(set(row["keywords"])) == len(row["keywords"])
        assert row["categories"]
    assert not set(OBJECT_COLORS) & {word for term in glyph_search_terms("heart") for word in term.split()}


def test_silhouettes_of_shapes_differ():
    def silhouette(glyph):
        canvas, mask = np.zeros((64, 64)), render_glyph(glyph, 64)
        top, left = ((64 - side) // 2 for side in mask.shape)
        canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask / 255
        return canvas

    for one, two in itertools.combinations(map(silhouette, GLYPH_SETS["shapes"]), 2):
        assert np.minimum(one, two).sum() / np.maximum(one, two).sum() < 0.81


def test_map_style_rows_are_the_drawn_rows_whatever_the_number_of_processes(tmp_path, monkeypatch):
    one = icon_scenes_dataset(523, size_px=19, glyph_set="icons", with_masks=True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    two = icon_scenes_dataset(523, size_px=19, glyph_set="icons", with_masks=True, num_proc=2)
    assert one.num_rows == two.num_rows == 523
    assert one.remove_columns("image").to_list() == two.remove_columns("image").to_list()
    for index in (0, 255, 256, 522):
        drawn = draw_scene(index, 0, 19, "icons", with_masks=True)
        assert pixels(one[index]) == pixels(two[index]) == pixels(drawn)
        assert one[index]["boxes"] == drawn["boxes"]
        assert np.array_equal(one[index]["masks"], drawn["masks"])


def test_another_mix_of_kinds_is_not_served_from_the_cache():
    icon_scenes_dataset(5, size_px=16)
    counted = icon_scenes_dataset(5, size_px=16, kinds={"counting": 1})
    assert {json.loads(scene)["kind"] for scene in counted["scene"]} == {"counting"}
    exact = icon_scenes_dataset(5, size_px=16, exact_share=1.0)
    assert {item["x"] for scene in exact["scene"] for item in json.loads(scene)["objects"]} <= {0.26, 0.5, 0.74}


def test_stream_alone_gives_the_rows_in_order():
    stream = icon_scenes_stream(13, size_px=16, num_shards=5)
    assert [row["scene"] for row in stream] == [draw_scene(index, 0, 16)["scene"] for index in range(13)]
    assert stream.column_names == ["image", "description", "keywords", "categories", "boxes", "scene"]


@pytest.mark.parametrize("num_workers", (0, 1, 2))
def test_stream_gives_the_same_set_to_any_number_of_workers(num_workers):
    stream = icon_scenes_stream(23, size_px=16, num_shards=4)
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=lambda row: row["scene"])
    assert sorted(loader) == sorted(draw_scene(index, 0, 16)["scene"] for index in range(23))


def test_nodes_share_the_stream_without_overlap():
    stream = icon_scenes_stream(23, size_px=16, num_shards=6)
    parts = [[row["scene"] for row in split_dataset_by_node(stream, rank, 3)] for rank in range(3)]
    assert min(map(len, parts)) >= 7
    assert sorted(sum(parts, [])) == sorted(draw_scene(index, 0, 16)["scene"] for index in range(23))


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"glyph_set": "emoji"}, ["`glyph_set`='emoji'", "shapes", "icons"]),
        ({"split": "test"}, ["`split`='test'", "train", "validation"]),
        ({"kinds": {"colour": 1}}, ["`kinds`='colour'", "counting"]),
        ({"kinds": {"counting": 0}}, ["`kinds`={'counting': 0}", "above 0"]),
        ({"kinds": {"counting": -1}}, ["-1", "at least 0"]),
        ({"exact_share": 1.5}, ["`exact_share`=1.5", "between 0 and 1"]),
        ({"size_px": 15}, ["`size_px`=15", "16"]),
        ({"num_rows": 0}, ["`num_rows`=0", "at least 1"]),
    ),
)
@pytest.mark.parametrize("build", (icon_scenes_dataset, icon_scenes_stream))
def test_bad_arguments_are_refused_before_anything_is_drawn(build, options, words):
    with pytest.raises(ValueError) as refusal:
        build(**{"num_rows": 3} | options)
    for word in words:
        assert word in str(refusal.value)


def test_unknown_glyph_is_refused_by_name():
    with pytest.raises(ValueError, match="`glyph`='twitter'.*'star'"):
        render_glyph("twitter", 32)
