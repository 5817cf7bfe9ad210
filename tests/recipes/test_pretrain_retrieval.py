import json
from pathlib import Path

import pytest
import yaml
from datasets import disable_progress_bars

import build_retrieval_index
import encode_images
import pretrain
from hf_mm.data.retrieved_documents import RetrievedPairs
from hf_mm.training.checkpoint import MANIFEST_NAME


disable_progress_bars()
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
LOOSE = {"max_relevance": 0.9999, "max_similarity": 0.9999}  # random weights find much alike

FORMS = ("description_keywords", "description_subset", "keywords", "category_description")
SHORT = {"description_weight": 1.0, **{f"{form}_weight": 0.0 for form in FORMS}}


@pytest.fixture
def find(clip_dir, tmp_path):
    """Finds neighbours of embedded scenes; returns their folder."""

    def make(folder, **fields):
        fixed = {"num_scenes": 23, "image_size": 16, "clip_name": clip_dir, "num_shards": 1, **LOOSE}
        fields = {**fixed, "output_dir": tmp_path / folder, **fields}
        words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
        return build_retrieval_index.main(words) / "neighbors"

    return make


@pytest.fixture
def retrieving(codes, find):
    """The fields of a micro run that retrieves."""
    return {**codes, **SHORT, "neighbors_dir": find("retrieval")}


@pytest.fixture
def memories(monkeypatch):
    """The memory banks of the runs."""
    seen = []

    def make(memory, **fields):
        seen.append(memory)
        return RetrievedPairs(memory, **fields)

    monkeypatch.setattr(pretrain, "RetrievedPairs", make)
    return seen


def test_a_run_trains_behind_retrieved_pairs_and_none_of_the_held_out_rows(run, entries, retrieving, memories):
    held_out = {"eval_dataset_split": "validation", "eval_steps": 2, "num_eval_documents": 2}
    folder = run(**retrieving, **held_out, retrieved_counts=[2])
    assert entries(folder)[2]["num_image_items_seen"] == 2 * 4 * 3 * 16
    card = (folder / "README.md").read_text()
    assert "Retrieval: 2.00 pairs in front of each in the mean of 21 documents; 0 of 42 were left out" in card
    (memory,) = memories
    assert len(memory.rows) == 21 and sorted(memory.places.tolist())[:3] == [-1, -1, 0]
    assert [memory.rows[place]["row_number"] for place in range(21)] == [
        number for number in memory.rows["row_number"] if memory.places[number] >= 0
    ]


def test_a_run_that_retrieves_resumes_with_the_losses_of_the_uninterrupted_one(run, entries, retrieving):
    settings = {**retrieving, "lr_scheduler_type": "constant_with_warmup", "save_steps": 2, "window_length": 190}
    whole = entries(run("whole", **settings, max_steps=4))
    run("cut", **settings, max_steps=2)
    assert entries(run("cut", **settings, max_steps=4, dataloader_num_workers=1)) == whole


def test_a_window_too_short_for_all_pairs_leaves_some_out_and_for_none_is_refused(run, retrieving):
    folder = run(**retrieving, retrieved_counts=[2], window_length=110)
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("Retrieval:"))
    left_out, drawn = (int(line.split("; ")[1].split()[place]) for place in (0, 2))
    assert 0 < left_out < drawn == 46
    with pytest.raises(ValueError, match=r"`retrieved_counts`=\[5\]: 6 pairs have at least 115 tokens"):
        run("other", **retrieving, retrieved_counts=[5], window_length=100)


def test_a_memory_of_its_own_and_held_out_rows_with_their_neighbours(run, codes, find, encode, memories, capsys):
    tokenizer = codes["image_tokenizer_name"]
    memory = encode("memory", tokenizer, num_scenes=31, dataset_split="train+validation[:11]")
    asked = {"memory_name": "icon_scenes:shapes", "memory_split": "train+validation[:11]", "memory_num_scenes": 31}
    held_out = encode("held_out", tokenizer, num_scenes=7, dataset_split="validation")
    own, of_held_out = find("own", **asked), find("other", num_scenes=7, dataset_split="validation", **asked)
    fields = {**codes, "neighbors_dir": own, "memory_name": memory, "eval_dataset_name": held_out, "eval_steps": 2}
    fields |= {"eval_dataset_split": "train", "retrieved_counts": [2], "query_caption_dropout": 0.0}
    run("one", **fields)
    run("two", **fields, eval_neighbors_dir=of_held_out)
    one, two = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Step 2, held-out"))
    assert one != two and all(len(bank.rows) == 42 and bank.places is None for bank in memories)
    with pytest.raises(ValueError, match="are of other rows or another memory bank: .*'num_memory_rows'"):
        run("three", **{**fields, "memory_name": None})


def test_neighbours_of_other_rows_and_a_memory_that_does_not_fit_are_refused(run, codes, find, encode, save_vq):
    neighbors = find("retrieval")
    other_rows = encode("rows", codes["image_tokenizer_name"], seed=1)
    with pytest.raises(ValueError, match="are of other rows or another memory bank: .*'rows_digest'"):
        run(**{**codes, "dataset_name": other_rows}, neighbors_dir=neighbors)
    with pytest.raises(ValueError, match="`memory_name`='icon_scenes:shapes' .* is no folder of encoded images"):
        run(**codes, neighbors_dir=neighbors, memory_name="icon_scenes:shapes")
    other = encode("memory", save_vq("other", seed=1))
    with pytest.raises(ValueError, match="`memory_name`='.*memory' was encoded with another image tokenizer"):
        run(**codes, neighbors_dir=neighbors, memory_name=other)


def test_a_memory_without_codes_is_refused_by_name(run, codes, tmp_path):
    words = ["--num_scenes", "23", "--image_size", "16", "--num_shards", "1", "--output_dir", str(tmp_path / "pixels")]
    pixels = encode_images.main(words)
    with pytest.raises(ValueError, match="`memory_name`='.*pixels' has no column `codes`"):
        run(**codes, neighbors_dir=tmp_path, memory_name=pixels)


def test_a_transfusion_model_is_refused_by_name(run, tmp_path):
    with pytest.raises(ValueError, match="`neighbors_dir`='x': a model of type 'transfusion' is trained without"):
        run(neighbors_dir="x")


def test_a_run_without_retrieval_is_not_told_apart_by_its_fields(run, codes):
    folder = run(**codes, save_steps=2)
    identity = json.loads((folder / "checkpoint-2" / MANIFEST_NAME).read_text())["identity"]
    assert "max_spans" in identity and "retrieved_counts" not in identity


def test_the_tiny_recipe_is_that_without_retrieval_and_has_positions_for_all_pairs():
    plain, own = (
        yaml.safe_load((CONFIGS / f"cm3leon_tiny_{name}.yaml").read_text()) for name in ("pretrain", "retrieval")
    )
    added = {"neighbors_dir", "retrieved_counts", "query_caption_dropout"}
    assert own.keys() - plain.keys() == added and plain.keys() <= own.keys()
    assert {name for name in plain if own[name] != plain[name]} == {"output_dir"}
    positions = json.loads((CONFIGS / "models" / "cm3leon_tiny.json").read_text())["max_position_embeddings"]
    longest_caption = 19  # tokens of the text tokenizer that the recipe trains
    num_pairs = max(own["retrieved_counts"]) + 1
    assert num_pairs * (64 + 2 + longest_caption) + 1 + 3 * own["max_spans"] <= positions
    text = (CONFIGS / "cm3leon_tiny_retrieval.yaml").read_text()
    assert f"--output_dir {own['dataset_name']}" in text and f"--output_dir {own['neighbors_dir'][:-10]}" in text
