import io
import json
import re
import tarfile

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from transformers import AutoProcessor

import building
import encode_images
import pretrain
import train_text_tokenizer
from building import DocumentBatches, ModelArguments, build_model, load_config
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.cm3_masking import SpanArguments
from hf_mm.data.documents import DocumentLimit, load_texts
from hf_mm.data.mixing import DocumentArguments, SampleKey, StepSampler
from hf_mm.data.sources import DatasetArguments, open_rows
from hf_mm.data.text_tokenizer import SPECIAL_TOKENS, load_text_tokenizer
from hf_mm.data.text_tokenizer import train_text_tokenizer as fit_text_tokenizer


CAPTIONS = [f"{number} {color} {shape}s" for number, (color, shape) in enumerate(
    [("red", "star"), ("blue", "moon"), ("green", "kite"), ("white", "boat"), ("black", "cube"), ("pink", "ring"), ("grey", "drop")]
)]  # fmt: skip
LONG = "".join(map(chr, np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 400)))  # no words to have tokens of


def draw(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (21, 17, 3), dtype=np.uint8))


def encode(picture: PILImage.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def make_pairs(**columns: list) -> Dataset:
    return Dataset.from_dict({"image": [draw(seed) for seed in range(len(CAPTIONS))], "text": CAPTIONS, **columns})


def report_of(folder) -> dict:
    return json.loads((folder / "caption_report.json").read_text())


def test_an_image_folder_trains(run, entries, tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = []
    for number, caption in enumerate(CAPTIONS):
        draw(number).save(tmp_path / "pictures" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": caption}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    folder = run(dataset_name=tmp_path / "pictures", text_column="caption")
    assert len(entries(folder)) == 2 and report_of(folder)["num_rows_out"] == len(CAPTIONS)


def test_a_webdataset_trains(run, entries, tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for number, caption in enumerate(CAPTIONS):
            for suffix, data in {"png": encode(draw(number)), "txt": caption.encode()}.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    folder = run(dataset_name=tmp_path / "shard-*.tar", image_column="png", text_column="txt")
    assert len(entries(folder)) == 2 and report_of(folder)["num_rows_out"] == len(CAPTIONS)


def test_rows_of_parquet_are_filtered_and_the_drops_reported(run, entries, tmp_path):
    captions = [*CAPTIONS[:4], "a <boi> token", " ".join(f"w{number}" for number in range(60)), ""]
    pairs = make_pairs(title=captions, people=[False, None, True, False, False, False, False]).remove_columns("text")
    pairs.to_parquet(tmp_path / "pairs.parquet")
    words = {"dataset_name": tmp_path / "pairs.parquet", "text_column": "title", "has_people_column": "people"}
    folder = run(people="exclude", report_to="none", **words)
    report = report_of(folder)
    assert report["dropped"] == {"people": 2, "special_token": 1, "too_long": 1, "empty_caption": 1}
    assert report["num_rows_out"] == 2 and "on 2 rows" in (folder / "README.md").read_text()
    assert "| special_token | 1 |" in (folder / "README.md").read_text()
    assert report_of(run("everybody", **words))["num_rows_out"] == 4

    with pytest.raises(ValueError, match="`text_column`='caption' is not there. Columns here: .*'title'"):
        run("wrong", dataset_name=tmp_path / "pairs.parquet", text_column="caption")
    with pytest.raises(ValueError, match="`people` needs the column `has_people`"):
        run("nobody", dataset_name=tmp_path / "pairs.parquet", text_column="title", people="only")


def test_the_report_is_written_where_nothing_was_yet(run, tmp_path):
    make_pairs().to_parquet(tmp_path / "pairs.parquet")
    tokenizer = train_text_tokenizer.main(["--num_scenes", "30", "--output_dir", str(tmp_path / "tokenizer")])
    folder = run(dataset_name=tmp_path / "pairs.parquet", tokenizer_name=tokenizer)
    assert report_of(folder)["num_rows_in"] == len(CAPTIONS)
    assert not (folder / "text_tokenizer").exists()


def test_a_damaged_picture_among_the_rows_is_named(run, tmp_path):
    pictures = [{"bytes": encode(draw(seed)), "path": None} for seed in range(len(CAPTIONS))]
    pictures[3]["bytes"] = pictures[3]["bytes"][:-100]
    rows = Dataset.from_dict({"image": pictures, "text": CAPTIONS})
    rows.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(
        ValueError, match="1 of 7 images are unreadable, more than `max_unreadable_share`=0.01. First: 3"
    ):
        run(dataset_name=tmp_path / "pairs.parquet")
    folder = run(dataset_name=tmp_path / "pairs.parquet", max_unreadable_share=0.2)
    assert report_of(folder)["dropped"] == {"unreadable_image": 1}


def test_a_source_without_rows_held_out_gives_up_some_of_its_own(run, tmp_path):
    make_pairs().to_parquet(tmp_path / "pairs.parquet")
    tokenizer = fit_text_tokenizer(CAPTIONS, 300)
    data = DatasetArguments(dataset_name=str(tmp_path / "pairs.parquet"))
    extra = pretrain.PretrainArguments(eval_dataset_split="validation")
    size = {"image_size": 16, "seed": 0}
    rows = pretrain.prepare_run_rows(
        open_rows(data, **size),
        tokenizer,
        DocumentLimit(70, 18, tokenizer),
        data,
        CaptionArguments(),
        extra,
        None,
        size,
        tmp_path / "run",
    )
    trained, held_out = set(rows.pairs["text"]), set(rows.held_out["text"])
    assert len(held_out) == 1 and not trained & held_out and trained | held_out == set(CAPTIONS)


def test_text_only_rows_are_mixed_in_and_long_ones_cut(run, entries, tmp_path):
    (tmp_path / "texts").mkdir()
    texts = ["one two three four. " * 60, "short", "", "with an <image> in it", "middling " * 9]
    Dataset.from_dict({"prose": texts}).to_parquet(tmp_path / "texts" / "train.parquet")
    make_pairs().to_parquet(tmp_path / "pairs.parquet")
    source = {"dataset_name": tmp_path / "pairs.parquet", "text_dataset_name": tmp_path / "texts"}
    folder = run(text_dataset_column="prose", max_steps=6, image_first_share=1, **source)
    assert "Text-only rows: 3; 2 dropped" in (folder / "README.md").read_text()
    assert 0 < entries(folder)[6]["num_images_seen"] < 6 * 4
    folder = run("some", text_dataset_column="prose", text_dataset_split="train[1:3]", max_steps=2, **source)
    assert "Text-only rows: 1; 1 dropped" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="`text_dataset_column`='text' is not there. Columns here: .'prose'"):
        run("wrong", **source)


@pytest.fixture
def documents(tmp_path, make_words):
    """Batches of documents of the micro model, and its longest sequence."""
    make_words()
    arguments = ModelArguments(config_name=str(tmp_path / "model.json"))
    train_text_tokenizer.main(
        ["--num_scenes", "30", "--vocab_size", "300", "--output_dir", str(tmp_path / "tokenizer")]
    )
    config = load_config(arguments)
    model, processor = build_model(arguments, config, load_text_tokenizer(tmp_path / "tokenizer"))
    forms = {"description": 1.0}
    batches = DocumentBatches(model, processor, DocumentArguments(image_first_share=0), SpanArguments(), forms)
    return batches, config.text_config.max_position_embeddings


def test_stretches_of_a_long_text_cover_it_all_and_predict_nothing_before_them(documents, tmp_path):
    batches, longest = documents
    Dataset.from_dict({"text": ["".join(f"{number} " for number in range(60))]}).to_parquet(tmp_path / "text.parquet")
    texts, _ = load_texts(tmp_path / "text.parquet")
    rows = batches.documents(Dataset.from_dict({}), text_rows=texts, seed=0)
    seen, full = set(), rows.processor.encode_document([{"type": "text", "text": texts[0]["text"]}])["input_ids"]
    for number in range(200):
        [stretch] = rows.__getitems__([SampleKey(number, 1, 0)])
        assert len(stretch["input_ids"]) == longest and stretch["labels"][0] == -100
        assert stretch["labels"][1:] == stretch["input_ids"][1:] and stretch["images"] == []
        start = next(s for s in range(len(full)) if full[s : s + longest] == stretch["input_ids"])
        seen |= set(range(start, start + longest))
    assert seen == set(range(len(full)))


def test_lengths_are_measured_over_all_rows(documents, monkeypatch):
    monkeypatch.setattr(building, "NUM_MEASURED", 4)
    batches, _ = documents
    short, long = (Dataset.from_dict({"text": [text] * 20}) for text in ("a star", "a star and a moon and a heart"))
    both = concatenate_datasets([short, long])  # one source behind the other
    means = [batches.mean_tokens(short, rows, 1) for rows in (short, long, both)]
    assert means[0] < means[2] == (means[0] + means[1]) / 2


def test_a_caption_that_slips_through_is_refused_and_not_trained_on(documents):
    batches, longest = documents
    rows = batches.documents(Dataset.from_dict({"image": [draw(0)], "text": ["!?" * longest]}), seed=0)
    with pytest.raises(ValueError, match=rf"Row 0: its document has \d+ tokens, more than the {longest} of a window"):
        rows.__getitems__([SampleKey(0, 0, 0)])


def make_documents(texts: list[str], path) -> None:
    """Rows of a text, two pictures and a text."""
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    rows = [
        [{"type": "text", "text": text}, *({"type": "image", "image": draw(seed + shift)} for shift in (0, 50)), {"type": "text", "text": "end"}]
        for seed, text in enumerate(texts)
    ]  # fmt: skip
    rows = [[{"text": None, "image": None, **part} for part in content] for content in rows]
    Dataset.from_dict({"content": rows}, features=Features({"content": List(part)})).to_parquet(path)


def test_documents_longer_than_a_window_are_dropped_and_counted(run, tmp_path):
    make_documents([*CAPTIONS[:4], LONG], tmp_path / "documents.parquet")
    folder = run(dataset_name=tmp_path / "documents.parquet", window_length=150, max_steps=3)
    assert report_of(folder)["dropped"] == {"too_long": 1}
    assert report_of(folder)["examples"]["too_long"][0].startswith("4 (")


def test_captions_of_encoded_pictures_that_are_too_long_are_dropped_and_counted(run, tmp_path):
    captions = [*CAPTIONS[:-1], LONG]
    make_pairs(text=captions, has_people=[True, *[False] * (len(captions) - 1)]).to_parquet(tmp_path / "pairs.parquet")
    encode_images.main(
        ["--dataset_name", str(tmp_path / "pairs.parquet"), "--image_size", "16", "--num_shards", "2",
         "--output_dir", str(tmp_path / "encoded")]
    )  # fmt: skip
    folder = run(dataset_name=tmp_path / "encoded", max_steps=3)
    assert report_of(folder)["dropped"] == {"too_long": 1}
    assert report_of(folder)["num_rows_out"] == len(captions) - 1
    folder = run("people", dataset_name=tmp_path / "encoded", people="exclude", tokenizer_name=folder)
    assert report_of(folder)["dropped"] == {"people": 1, "too_long": 1}


def test_documents_with_two_pictures_train(run, entries, tmp_path):
    make_documents([*CAPTIONS[:4], "an </s> end"], tmp_path / "documents.parquet")
    folder = run(dataset_name=tmp_path / "documents.parquet", window_length=150, max_steps=3)
    assert entries(folder)[3]["num_images_seen"] == 3 * 4 * 2
    assert report_of(folder)["dropped"] == {"special_token": 1} and report_of(folder)["num_rows_out"] == 4
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert len(tokenizer) > 256 + len(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="`people` and `min_aesthetic_score` filter pairs"):
        run("people", dataset_name=tmp_path / "documents.parquet", people="exclude")


def test_a_window_without_room_for_a_picture_is_refused(run):
    with pytest.raises(
        ValueError, match="`window_length`=20 .* has no room for a picture and a caption. Raise it by at least 1"
    ):
        run(window_length=20)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_together_draw_the_samples_of_one(num_processes):
    sizes = {"num_text_rows": 5, "text_document_share": 0.3, "first_step": 2}
    whole = iter(StepSampler(7, 6, 3, **sizes))
    shares = [
        iter(StepSampler(7, 6 // num_processes, 3, process_index=index, num_processes=num_processes, **sizes))
        for index in range(num_processes)
    ]
    for _ in range(9):
        assert next(whole) == [key for share in shares for key in next(share)]


def test_every_row_comes_once_an_epoch_and_heavy_rows_more_often():
    sampler = StepSampler(11, 5, 0)
    assert sorted(sampler.key(number).row for number in range(11, 22)) == list(range(11))
    assert [sampler.key(number).row for number in range(11)] != [sampler.key(number).row for number in range(11, 22)]
    light, heavy = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.1, 0.9])
    weighted = StepSampler(3, 5, 0, weights=(light, heavy), final_step=20)
    rows = [weighted.key(number).row for number in range(200)]
    assert set(rows[:100]) == {0, 1} and set(rows[100:]) == {1, 2} and rows[100:].count(2) > 75


def test_shown_help_names_every_field(capsys):
    import pretrain

    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    shown = capsys.readouterr().out
    for name in ("dataset_name", "people", "window_length", "ema_decay", "image_tokenizer_name"):
        assert re.search(rf"--{name}\b", shown)
