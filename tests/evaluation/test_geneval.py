"""GenEval's files: read as published, written as its scorer reads them, summed up as its code does."""

import json
import re

import pytest
from datasets import Dataset
from PIL import Image

from hf_mm.evaluation.geneval import (
    CATEGORIES,
    prompts_from_rows,
    read_prompts,
    read_results,
    summarize_results,
    write_samples,
)


PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}], "prompt": "a photo of three cups"},
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a tie left of a dog"},
]  # fmt: skip


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def test_prompts_come_as_they_are_in_the_file(prompt_file):
    assert read_prompts(str(prompt_file)) == read_prompts(prompt_file.as_uri()) == PROMPTS


def test_prompts_of_a_dataset_lose_the_keys_that_it_filled_with_nothing():
    rows = Dataset.from_list(
        [
            {**prompt, "include": [{**item, "position": None} for item in prompt["include"]]}
            for prompt in reversed(PROMPTS[:2])
        ]
    )
    assert rows[1]["exclude"] is None and rows[0]["include"][0]["position"] is None
    assert prompts_from_rows(rows) == PROMPTS[1::-1]


def read_like_the_scorer(folder):
    """What GenEval's evaluate_images.py opens, in its order of rules."""
    found = []
    for subfolder in sorted(folder.iterdir()):
        if not subfolder.is_dir() or not subfolder.name.isdigit():
            continue
        metadata = json.loads((subfolder / "metadata.jsonl").read_text())
        for path in sorted((subfolder / "samples").iterdir()):
            if re.match(r"\d+\.png", path.name):
                found.append((metadata, Image.open(path).getpixel((0, 0))))
    return found


def test_the_folders_are_what_the_scorer_reads(tmp_path):
    colors = [[(number, place, 9) for place in range(2)] for number in range(3)]
    images = [[Image.new("RGB", (5, 7), color) for color in of_prompt] for of_prompt in colors]
    write_samples(tmp_path, PROMPTS[:2], images[:2])
    write_samples(tmp_path, PROMPTS[2:], images[2:], first=2)
    assert read_like_the_scorer(tmp_path) == [(PROMPTS[n], color) for n in range(3) for color in colors[n]]
    assert (tmp_path / "00002" / "samples" / "0001.png").is_file()


def test_the_overall_score_is_the_mean_of_the_categories(tmp_path):
    rows = [("counting", "a", [1, 0]), ("counting", "b", [0, 0]), ("counting", "c", [1, 1]), ("colors", "d", [1, 1])]
    lines = [{"tag": tag, "prompt": prompt, "correct": bool(hit)} for tag, prompt, hits in rows for hit in hits]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = summarize_results(read_results(tmp_path / "results.jsonl"))
    assert summary["counting"]["correct"] == 0.5 and summary["colors"]["correct"] == 1
    assert summary["overall"] == {"correct": 0.75, "correct_prompts": 0.75, "num_images": 8, "num_prompts": 4}
    low, high = summary["counting"]["interval"]
    assert low == 0 and high == 1  # three prompts say little, although there are six pictures
    assert summary["colors"]["num_prompts"] == 1


def test_bad_input_is_refused_by_name(prompt_file, tmp_path):
    prompt_file.write_text('{"tag": "single_object"}')
    with pytest.raises(ValueError, match="line 1 has no `prompt` and `tag`"):
        read_prompts(str(prompt_file))
    prompt_file.write_text('\n{"tag": "texture", "prompt": "x"}')
    with pytest.raises(ValueError, match=f"line 2: `tag`='texture' is none of {CATEGORIES[0]}"):
        read_prompts(str(prompt_file))
    prompt_file.write_text("a photo of a bench")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_prompts(str(prompt_file))
    prompt_file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(prompt_file))
    with pytest.raises(ValueError, match="3 `prompts` do not go with pictures of 1"):
        write_samples(tmp_path, PROMPTS, [[Image.new("RGB", (2, 2))]])
    with pytest.raises(ValueError, match=r"`images`\[0\] is empty: prompt 'a photo of a bench'"):
        write_samples(tmp_path, PROMPTS[:1], [[]])
    with pytest.raises(ValueError, match="`results` is empty"):
        summarize_results([])
    with pytest.raises(ValueError, match=r"`results`\[0\] lacks correct"):
        summarize_results([{"tag": "colors", "prompt": "x"}])
