import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage

from hf_mm.data.caption_text import BOILERPLATE_PATTERNS, clean_text, clean_words, remove_boilerplate
from hf_mm.data.captions import (
    CaptionArguments,
    prepare_encoded,
    prepare_pairs,
    row_weights,
    sample_caption,
    weights_at,
)
from hf_mm.data.duplicates import difference_hash, first_occurrences, without_near_duplicates
from hf_mm.data.formats import load_rows, open_image


EMOJI = Path(__file__).parents[3] / "shared" / "data" / "emoji" / "pairs-train.parquet"
PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in BOILERPLATE_PATTERNS]


def encoded(seed: int, width: int = 13, height: int = 11, file_format: str = "PNG") -> dict:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC).save(buffer, file_format)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(**columns: list) -> Dataset:
    length = len(next(iter(columns.values())))
    return Dataset.from_dict({"image": [encoded(seed) for seed in range(length)]} | columns)


def count_words(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
    assert not add_special_tokens
    return {"input_ids": [[0] * len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]}


@pytest.mark.parametrize(
    ("text", "cleaned", "changes"),
    [
        ("a  red\n\tapple ", "a red apple", {"whitespace"}),
        ("RED APPLE ON A TABLE", "red apple on a table", {"casing"}),
        ("NASA", "NASA", set()),
        ("SOS button", "SOS button", set()),
        ("Royalty free stock photo of a dog", "a dog", {"boilerplate"}),
        ("Red apple, vector illustration isolated on white background", "Red apple", {"boilerplate"}),
        ("Cat (stock image), royalty-free. Cute", "Cat. Cute", {"boilerplate"}),
        ("A vector illustration of a bird.", "a bird.", {"boilerplate"}),
        ("Stock photo", "", {"boilerplate"}),
        ("a red star on a white background", "a red star on a white background", set()),
        ("a photo of rolling stock", "a photo of rolling stock", set()),
        ("well-known wine - a glass, half full", "well-known wine - a glass, half full", set()),
    ],
)
def test_text_is_cleaned_and_says_how(text: str, cleaned: str, changes: set[str]) -> None:
    assert clean_text(text, PATTERNS) == (cleaned, changes)


def test_cleaning_twice_changes_nothing_more() -> None:
    once, _ = clean_text("  THE STOCK PHOTO, of   A DOG isolated on white - royalty free ", PATTERNS)
    assert clean_text(once, PATTERNS) == (once, set())


def test_keywords_lose_repetitions_and_boilerplate_but_keep_order() -> None:
    words, changes = clean_words(["dog", "Dog", " puppy", "stock photo", "", "dog"], PATTERNS)
    assert words == ["dog", "puppy"]
    assert changes == {"repeated_words", "whitespace", "boilerplate"}
    assert clean_words("dog, puppy;  hound ,", PATTERNS) == (["dog", "puppy", "hound"], set())


def test_own_boilerplate_replaces_the_default() -> None:
    args = CaptionArguments(boilerplate_patterns=[r"\bphoto \d+\b"])
    assert remove_boilerplate("stock photo 17 of a dog", args.compile_boilerplate()) == "stock of a dog"
    with pytest.raises(ValueError, match=r"`boilerplate_patterns`: '\(' is no regular expression"):
        CaptionArguments(boilerplate_patterns=["("])


@pytest.mark.parametrize(
    "values",
    [
        {"max_unreadable_share": 2.0},
        {"final_share": -0.1},
        {"people_oversampling": 0},
        {"keywords_weight": -1},
        {"people": "maybe"},
        {"near_duplicate_captions": "none"},
        {"max_aspect_ratio": 0.5},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(values: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(values))}`="):
        CaptionArguments(**values)


PARTS = {"description": "a cat", "keywords": ["pet", "fur", "paw"], "categories": ["animals", "nature"]}


def captions(row: dict, number: int = 300, **weights: float) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [sample_caption(row, generator, **({"weights": weights} if weights else {})) for _ in range(number)]


def test_each_form_of_caption_is_what_it_says() -> None:
    assert set(captions(PARTS, description=1)) == {"a cat"}
    assert set(captions(PARTS, description_keywords=1)) == {"a cat, pet, fur, paw"}
    assert set(captions(PARTS, category_description=1)) == {"animals: a cat", "nature: a cat"}
    subsets = set(captions(PARTS, keywords=1))
    assert len(subsets) == 3 + 6 + 6  # every ordered choice of 1, 2 and 3 of 3 keywords
    assert set(captions(PARTS, description_subset=1)) == {f"a cat, {subset}" for subset in subsets}


def test_forms_come_as_often_as_weighted() -> None:
    counts = Counter(captions(PARTS, 2000, description=3, description_keywords=1))
    assert counts["a cat"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_captions_repeat_with_the_generator() -> None:
    assert captions(PARTS) == captions(PARTS)
    assert len(set(captions(PARTS))) > 10


def test_rows_with_fewer_parts_give_what_they_have() -> None:
    assert set(captions({"text": "done", **PARTS})) == {"done"}
    assert set(captions({"description": "a cat"})) == {"a cat"}
    assert set(captions({"description": "", "keywords": ["pet"], "categories": ["animals"]})) == {"pet"}
    assert captions({"description": "", "keywords": ["pet", "fur"]}, 1, description=1) == ["pet, fur"]
    with pytest.raises(ValueError, match=r"unknown caption forms \['title'\]"):
        captions(PARTS, title=1)


def mixed_rows() -> Dataset:
    """Twelve rows: two good ones, and one for every reason to drop."""
    images = [encoded(seed) for seed in range(12)]
    images[3] = {"bytes": images[3]["bytes"][:60], "path": None}
    images[4] = encoded(4, 5, 11)
    images[5] = encoded(5, 53, 11)
    images[10] = encoded(10, file_format="BMP")
    images[11] = encoded(10, file_format="TIFF")
    text = [f"picture {'abcdefghijkl'[number]}" for number in range(12)]
    text[6], text[7], text[8] = " ", "12-34", "one two three four five six"
    text[11] = "PICTURE  K"
    return Dataset.from_dict(
        {
            "image": images,
            "text": text,
            "id": [f"id{number}" for number in range(12)],
            "has_people": [number == 1 for number in range(12)],
            "aesthetic_score": [None if number == 9 else 5.0 - (number == 2) for number in range(12)],
        }
    )


STRICT = CaptionArguments(
    people="exclude",
    min_aesthetic_score=4.5,
    max_caption_tokens=5,
    min_image_px=7,
    max_aspect_ratio=3.0,
    max_unreadable_share=0.2,
)
DROPPED = {
    "people": ["id1"],
    "low_aesthetic_score": ["id2", "id9"],
    "empty_caption": ["id6"],
    "no_letters": ["id7"],
    "too_long": ["id8 (6 tokens)"],
    "too_small": ["id4 (5 x 11 px)"],
    "aspect_ratio": ["id5 (53 x 11 px)"],
    "duplicate": ["id11"],
}


@pytest.mark.parametrize("kind", ["dataset", "processes", "stream"])
def test_every_filter_drops_its_row_and_reports_it(kind: str) -> None:
    rows = mixed_rows()
    if kind == "stream":
        rows = rows.to_iterable_dataset()
    prepared, report = prepare_pairs(rows, STRICT, tokenizer=count_words, num_proc=2 if kind == "processes" else None)
    assert [row["id"] for row in prepared] == ["id0", "id10"]
    assert report.num_rows_in == 12 and report.num_rows_out == 2
    unreadable = report.examples.pop("unreadable_image")
    assert len(unreadable) == 1 and unreadable[0].startswith("id3 (`image` is unreadable or truncated")
    assert report.examples == DROPPED
    assert report.dropped == {name: len(ids) for name, ids in DROPPED.items()} | {"unreadable_image": 1}


def test_report_is_a_table_and_json() -> None:
    _, report = prepare_pairs(mixed_rows(), STRICT, tokenizer=count_words)
    assert json.loads(json.dumps(report.to_dict()))["num_rows_out"] == 2
    table = report.to_markdown()
    assert "| rows in | | 12 |" in table and "| too_small | 1 |" in table
    lefts = [int(line.split("|")[3]) for line in table.splitlines()[2:] if line.startswith("|")]
    assert lefts == sorted(lefts, reverse=True) and lefts[-1] == 2


def test_preparation_leaves_images_as_stored_and_other_columns_alone() -> None:
    rows = rows_of(description=["A  CAT", "a dog"], keywords=["pet, Pet", None], extra=[3, 5])
    prepared, report = prepare_pairs(rows, CaptionArguments())
    assert prepared["description"][:] == ["a cat", "a dog"]
    assert prepared["keywords"][:] == [["pet"], []]
    assert prepared["extra"][:] == [3, 5]
    assert [row["image"]["bytes"] for row in prepared] == [row["image"]["bytes"] for row in rows]
    assert report.changed == {"casing": 1, "whitespace": 1, "repeated_words": 1}


def test_too_many_unreadable_images_stop_with_the_counts() -> None:
    images = [{"bytes": b"x", "path": None} if number == 3 else encoded(number) for number in range(5)]
    rows = Dataset.from_dict({"image": images, "text": ["a", "b", "c", "d", "e"]})
    with pytest.raises(
        ValueError, match=r"1 of 5 images are unreadable, more than `max_unreadable_share`=0.19. First: 3"
    ):
        prepare_pairs(rows, CaptionArguments(max_unreadable_share=0.19))
    assert len(prepare_pairs(rows, CaptionArguments(max_unreadable_share=0.2))[0]) == 4


def test_a_stream_stops_only_once_many_are_unreadable() -> None:
    bad = {"bytes": b"x", "path": None}
    rows = Dataset.from_dict({"image": [bad] * 30, "text": ["a"] * 30}).to_iterable_dataset()
    prepared, report = prepare_pairs(rows, CaptionArguments(max_unreadable_share=0.1))
    assert list(prepared) == [] and report.dropped == {"unreadable_image": 30}
    prepared, _ = prepare_pairs(rows, CaptionArguments(max_unreadable_share=0.02))
    with pytest.raises(ValueError, match="30 of 30 images are unreadable"):
        list(prepared)


def test_nothing_left_is_an_error_with_the_report() -> None:
    with pytest.raises(ValueError, match=r"No row is left:[\s\S]*\| empty_caption \| 2 \|"):
        prepare_pairs(rows_of(text=["", "stock photo"]), CaptionArguments())


def test_filters_that_lack_their_column_are_refused() -> None:
    rows = rows_of(text=["a"])
    with pytest.raises(ValueError, match=r"`people` needs the column `has_people`; name yours.*\['image', 'text'\]"):
        prepare_pairs(rows, CaptionArguments(people="only"))
    with pytest.raises(ValueError, match="`min_aesthetic_score` needs the column `aesthetic_score`"):
        prepare_pairs(rows, CaptionArguments(min_aesthetic_score=1.0))
    with pytest.raises(ValueError, match="`max_caption_tokens`=3 needs `tokenizer`"):
        prepare_pairs(rows, CaptionArguments(max_caption_tokens=3))
    with pytest.raises(ValueError, match="`near_duplicate_distance` needs all rows at once"):
        prepare_pairs(rows.to_iterable_dataset(), CaptionArguments(near_duplicate_distance=3))


def test_unknown_people_stay_only_when_people_do_not_matter() -> None:
    rows = rows_of(text=["a", "b", "c"], has_people=[True, False, None])
    for people, kept in (("keep", ["a", "b", "c"]), ("exclude", ["b"]), ("only", ["a"])):
        assert prepare_pairs(rows, CaptionArguments(people=people))[0]["text"][:] == kept


def test_keywords_are_cut_so_that_every_form_fits() -> None:
    keywords = ["pet", "soft fur", "paw", "tail"]
    rows = rows_of(
        description=["a cat", "one two three four five six seven eight", "", "a dog"],
        keywords=[keywords, keywords, keywords, []],
        categories=[["animals"], [], [], ["a very long name of a category"]],
    )
    prepared, report = prepare_pairs(rows, CaptionArguments(max_caption_tokens=7), tokenizer=count_words)
    assert prepared["keywords"][:] == [["pet", "soft fur"], ["pet", "soft fur", "paw"], []]
    assert prepared["categories"][:] == [["animals"], [], []]
    assert report.dropped == {"too_long": 1} and report.changed == {"keywords_cut": 2, "categories_cut": 1}
    generator = torch.Generator().manual_seed(0)
    for row in prepared:
        drawn = [sample_caption(row, generator) for _ in range(50)]
        assert max(len(ids) for ids in count_words(drawn, False)["input_ids"]) <= 7


def test_same_picture_is_a_duplicate_only_with_the_same_words() -> None:
    images = [encoded(0), encoded(0), encoded(1), encoded(0, file_format="TIFF")]
    rows = Dataset.from_dict({"image": images, "text": ["a cat", "a dog", "a cat", "Cat: a"]})
    assert prepare_pairs(rows, CaptionArguments())[0]["text"][:] == ["a cat", "a dog", "a cat"]
    assert len(prepare_pairs(rows, CaptionArguments(drop_duplicates=False))[0]) == 4


def test_near_duplicates_are_dropped_on_request() -> None:
    images = [encoded(0, 53, 47), encoded(0, 59, 43, "JPEG"), encoded(0, 41, 37), encoded(1, 53, 47)]
    rows = Dataset.from_dict({"image": images, "text": ["a cat", "a cat", "a dog", "a cat"]})
    for captions_, kept in (("same", ["a cat", "a dog", "a cat"]), ("any", ["a cat", "a cat"])):
        args = CaptionArguments(near_duplicate_distance=4, near_duplicate_captions=captions_)
        assert prepare_pairs(rows, args)[0]["text"][:] == kept
    assert len(prepare_pairs(rows, CaptionArguments())[0]) == 4


def test_difference_hash_sees_pictures_not_files() -> None:
    def distance(first: dict, second: dict) -> int:
        return (difference_hash(open_image(first)) ^ difference_hash(open_image(second))).bit_count()

    assert distance(encoded(0, 53, 47), encoded(0, 71, 61, "JPEG")) <= 4
    assert distance(encoded(0, 53, 47), encoded(1, 53, 47)) > 12


@pytest.mark.parametrize("max_distance", [0, 1, 3, 7, 63])
def test_near_duplicates_equal_those_of_comparing_all_with_all(max_distance: int) -> None:
    random = np.random.default_rng(max_distance)
    hashes = random.integers(0, 2**64, 23, dtype=np.uint64)[random.integers(0, 23, 211)]
    for _ in range(4):
        hashes = np.where(
            random.random(211) < 0.5, hashes, hashes ^ np.uint64(1) << random.integers(0, 64, 211).astype(np.uint64)
        )
    groups = random.integers(0, 2, 211)
    kept: list[int] = []
    for row in range(211):
        near = (
            int(hashes[row] ^ hashes[other]).bit_count() <= max_distance
            for other in kept
            if groups[row] == groups[other]
        )
        kept += [] if any(near) else [row]
    assert 1 < len(kept) < 211
    assert np.flatnonzero(without_near_duplicates(hashes, groups, max_distance)).tolist() == kept


def test_near_duplicates_of_many_rows_are_found_fast() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)
    hashes[:20_000] = hashes[20_000:40_000] ^ np.uint64(5)
    hashes[40_000:45_000] = 0  # blank pictures are one bucket
    keep = without_near_duplicates(hashes, np.zeros(50_000), 3)
    assert keep[:20_000].all() and not keep[20_000:40_000].any() and keep[40_000:].sum() == 5001
    with pytest.raises(ValueError, match="`max_distance`=64"):
        without_near_duplicates(hashes, hashes, 64)


def test_first_occurrence_of_each_combination_is_marked() -> None:
    marks = first_occurrences(np.array([3, 3, 5, 3, 5]), np.array([7, 8, 7, 7, 7]))
    assert marks.tolist() == [True, True, True, False, False]


def test_weights_raise_people_always_and_aesthetics_at_the_end() -> None:
    rows = rows_of(
        text=["a", "b", "c", "d"], has_people=[True, False, True, None], aesthetic_score=[6.0, 6.0, 3.0, None]
    )
    args = CaptionArguments(
        people_oversampling=3, high_aesthetic_score=5.5, high_aesthetic_oversampling=2, final_share=0.25
    )
    base, final = row_weights(rows, args)
    assert base.tolist() == pytest.approx([3 / 8, 1 / 8, 3 / 8, 1 / 8])
    assert final.tolist() == pytest.approx([6 / 12, 2 / 12, 3 / 12, 1 / 12])
    assert weights_at(0.74, base, final, args.final_share) is base
    assert weights_at(0.75, base, final, args.final_share) is final
    assert weights_at(1.0, base, final, 0.0) is base


def test_weights_that_lack_a_column_or_a_bar_are_refused() -> None:
    rows = rows_of(text=["a"])
    with pytest.raises(ValueError, match="`people_oversampling` needs the column `has_people`"):
        row_weights(rows, CaptionArguments(people_oversampling=2))
    with pytest.raises(ValueError, match="`high_aesthetic_oversampling` needs the column `aesthetic_score`"):
        row_weights(rows, CaptionArguments(high_aesthetic_oversampling=2))
    with pytest.raises(ValueError, match="needs `high_aesthetic_score`"):
        row_weights(rows_of(text=["a"], aesthetic_score=[1.0]), CaptionArguments(high_aesthetic_oversampling=2))
    with pytest.raises(ValueError, match="`high_aesthetic_score`=6.0 raises nothing while `high_aesthetic_overs"):
        CaptionArguments(high_aesthetic_score=6.0)


@pytest.mark.skipif(not EMOJI.exists(), reason="the emoji pictures are not here")
def test_real_pictures_pass_and_people_are_filtered() -> None:
    rows = load_rows(EMOJI, split="train[:500]")
    everyone, _ = prepare_pairs(rows, CaptionArguments())
    nobody, report = prepare_pairs(rows, CaptionArguments(people="exclude"))
    assert len(everyone) == 500
    assert (
        report.num_rows_out == len(nobody) == 500 - report.dropped["people"] == sum(not p for p in rows["has_people"])
    )


def test_rows_that_spell_a_special_token_are_dropped_and_counted(tmp_path):
    images = [PILImage.new("RGB", (17, 19), color) for color in ("red", "green", "blue")]
    rows = Dataset.from_dict({"image": images, "text": ["a red sheet", "a <boi> sheet", "a blue sheet"]})
    kept, report = prepare_pairs(rows, CaptionArguments(), reserved=["<boi>", "<eoi>"])
    assert list(kept["text"]) == ["a red sheet", "a blue sheet"]
    assert report.dropped == {"special_token": 1}


def test_descriptions_that_are_numbers_are_refused_by_their_row():
    rows = Dataset.from_list([{"text": "a", "description": 1.5}])
    with pytest.raises(ValueError, match="Row 0, column `description`: float, must be a string"):
        prepare_encoded(rows, CaptionArguments())


def test_keywords_that_are_no_words_are_refused_by_their_row():
    rows = Dataset.from_list([{"text": "a", "keywords": [{"name": "red"}]}])
    with pytest.raises(ValueError, match="Row 0, column `keywords`: .* must be a string or a list of strings"):
        prepare_encoded(rows, CaptionArguments())
    kept, _ = prepare_encoded(Dataset.from_list([{"text": "a", "keywords": ["red", None]}]), CaptionArguments())
    assert len(kept) == 1
