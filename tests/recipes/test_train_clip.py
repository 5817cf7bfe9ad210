import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, pipeline

import encode_images
import train_clip
from clip_report import change_one_word
from hf_mm.cm3leon import CM3LeonPipeline
from hf_mm.data.captioned_pictures import PairCollator
from hf_mm.data.icon_glyphs import OBJECT_COLORS
from hf_mm.data.icon_records import sample_scene, scene_key
from hf_mm.data.text_tokenizer import end_captions
from hf_mm.training.history import read_history


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
MICRO_RUN = (
    "--num_scenes 37 --max_steps 4 --warmup_steps 1 --per_device_train_batch_size 5 --num_eval_documents 11 "
    "--logging_steps 1 --eval_steps 2 --sample_steps 4 --report_to none --mixed_precision no --vocab_size 300"
).split()
MICRO_MODEL = {
    "model_type": "clip",
    "projection_dim": 11,
    "text_config": {
        "vocab_size": 301,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 13,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 300,
    },
    "vision_config": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(MICRO_MODEL))
    return path


@pytest.fixture
def run(tmp_path, model_file):
    def train(*words: str, folder: str = "run") -> Path:
        argv = [f"--config={CONFIGS / 'clip_tiny.yaml'}", f"--config_name={model_file}", *MICRO_RUN]
        return train_clip.main([*argv, f"--output_dir={tmp_path / folder}", *words])

    return train


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in e.items() if k != "step_seconds"} for e in read_history(folder / "history.jsonl")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return CLIPModel.from_pretrained(folder).state_dict()


def test_recipe_trains_and_a_stopped_run_goes_on_as_the_same_run(run, capsys):
    whole = run()
    for steps in ("--max_train_seconds=1e-9", "--max_train_seconds=none"):
        cut = run(steps, folder="cut")
    assert losses_of(cut) == losses_of(whole) and len(losses_of(whole)) == 4
    first, second = weights_of(whole), weights_of(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    measured = json.loads((whole / "retrieval.json").read_text())
    assert measured["num_pairs"] == 11 and len(measured) == 7
    assert all(0 <= value <= 1 for name, value in measured.items() if name != "num_pairs")
    assert "Step 2, 11 held-out pairs: image_to_text_recall@1" in capsys.readouterr().out
    with Image.open(whole / "samples" / "step-000004.png") as grid:
        assert grid.width > grid.height > 0


def test_folder_is_an_ordinary_repo_of_transformers(run):
    folder = run("--max_steps", "2")
    prompts, pictures = ["a red star", "kite " * 30], [Image.new("RGB", size, "red") for size in ((16, 16), (40, 23))]
    outputs = []
    for door in (CLIPProcessor, AutoProcessor):
        processor = door.from_pretrained(folder)
        inputs = processor(text=prompts, images=pictures, padding=True, truncation=True, return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 3, 16, 16) and inputs["input_ids"].shape == (2, 13)
        outputs.append(CLIPModel.from_pretrained(folder).eval()(**inputs).logits_per_image)
    assert torch.equal(*outputs)
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    scores = classify(pictures[1], candidate_labels=["star", "kite"], hypothesis_template="a {}")
    assert {score["label"] for score in scores} == {"star", "kite"}
    assert sum(score["score"] for score in scores) == pytest.approx(1)


def test_a_caption_is_read_off_its_last_token(run, tokenizer):
    assert tokenizer.eos_token_id == 2  # for which the library looks for the highest id
    folder = run("--max_steps", "2")
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    end = processor.tokenizer.eos_token_id
    assert end == model.config.text_config.eos_token_id == len(processor.tokenizer) - 1 != 2
    inputs = processor.tokenizer(["a star", "a red star on a white background " * 5], padding=True, truncation=True)
    short, long = inputs["input_ids"]
    assert short.count(end) == long.count(end) == 1 and long[-1] == end and len(long) == 13
    assert short[short.index(end) + 1 :] == [processor.tokenizer.pad_token_id] * (12 - short.index(end))

    def embed(ids):
        return model.get_text_features(torch.tensor([ids])).pooler_output

    base, place = embed(short), short.index(end)
    for number in range(len(short)):
        changed = [*short[:number], 77, *short[number + 1 :]]
        if number != place:
            assert torch.equal(embed(changed), base) == (number > place), number


def test_ending_captions_keeps_ids_and_can_be_repeated(tokenizer):
    ending = end_captions(tokenizer, 9)
    plain = tokenizer("a red star", add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id, *plain, len(tokenizer)]
    assert ending("a red star")["input_ids"] == expected == end_captions(ending, 9)("a red star")["input_ids"]
    assert tokenizer("a red star")["input_ids"] == plain and tokenizer.eos_token == "</s>"


def test_equal_captions_have_equal_ids_whatever_stands_beside_them(run):
    collate = PairCollator(CLIPProcessor.from_pretrained(run("--max_steps", "2")))
    red = Image.new("RGB", (16, 16), "red")
    batch = collate([(red, "a star"), (red, "a red star on white"), (red, "a star"), (red, "a moon")])
    ids = batch["caption_ids"].tolist()
    assert ids[0] == ids[2] and len(set(ids)) == 3
    assert collate([(red, "a star")])["caption_ids"].item() == ids[0]
    long = [(red, "kite " * 40), (red, "kite " * 50)]  # equal once they are cut
    assert len(set(collate(long)["caption_ids"].tolist())) == 1


@pytest.fixture
def greys(tmp_path):
    """Grey pictures, captioned by whether they are bright."""
    folder = tmp_path / "greys"
    folder.mkdir()
    lines = []
    for number in range(64):
        level = number * 4
        Image.new("RGB", (19, 17), (level,) * 3).save(folder / f"{number}.png")
        caption = "a bright picture" if level > 127 else "a dark picture"
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_reranking_keeps_the_candidates_that_a_trained_clip_prefers(run, greys, make_cm3leon, make_cm3leon_processor):
    words = f"--dataset_name {greys} --text_column caption --max_steps 40 --learning_rate 0.01 --eval_steps none"
    folder = run(*words.split(), "--sample_steps=none", "--per_device_train_batch_size=16", "--ema_decay=none")
    assert json.loads((folder / "retrieval.json").read_text())["image_to_text_recall@1"] > 0.9
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    model = make_cm3leon()
    pipe = CM3LeonPipeline(model, make_cm3leon_processor(model.config), clip, processor)
    pipe.set_progress_bar_config(disable=True)

    def paint(ids):  # grey of the mean code, stretched: a tokenizer of noise shows nothing that one could name
        codes = (ids - model.config.first_image_token_id).float().mean(-1) / model.config.image_vocab_size
        return (codes * 8 - 4).clamp(-1, 1)[:, None, None, None].expand(-1, 3, 8, 8)

    model.decode_image_tokens = paint
    prompts = ["a bright picture", "a dark picture", "a dark picture " + "of a star " * 9]  # the last one is cut
    draw = {"guidance_scale": 1.0, "temperature": 2.0, "output_type": "pt"}
    generators = [[torch.Generator().manual_seed(number) for number in range(3)] for _ in range(2)]
    every = pipe(prompts, num_images_per_prompt=11, generator=generators[0], **draw).images
    kept = pipe(prompts, num_candidates=11, generator=generators[1], **draw).images
    levels = every.mean((1, 2, 3)).unflatten(0, (3, 11))
    assert (levels.max(1).values > 0.6).all() and (levels.min(1).values < 0.4).all()
    bright, dark, cut = kept.mean((1, 2, 3)).tolist()
    assert bright > 0.6 and dark < 0.4 and cut in levels[2].tolist()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--config_name", "none"], "`model_name_or_path` or `config_name`"),
        (["--config_name", str(CONFIGS / "models" / "cm3leon_tiny.json")], "model type 'cm3leon'. Name a CLIP"),
        (["--per_device_train_batch_size", "1"], "`per_device_train_batch_size`=1 leaves nothing to compare"),
    ],
)
def test_what_cannot_be_trained_is_refused(run, words, match):
    with pytest.raises(ValueError, match=match):
        run(*words)


def test_patches_that_do_not_cover_the_picture_are_refused(run, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**MICRO_MODEL, "vision_config": {**MICRO_MODEL["vision_config"], "image_size": 17}}))
    with pytest.raises(ValueError, match="`image_size`=17 must be a multiple of `patch_size`=8.*Try 16"):
        run("--config_name", str(path))


def test_a_checkpoint_is_trained_further_and_one_with_another_picture_size_refused(run):
    folder = run("--max_steps", "2")
    further = run("--model_name_or_path", str(folder), "--config_name=none", "--max_steps=2", folder="further")
    assert weights_of(further).keys() == weights_of(folder).keys()
    path = folder / "processor_config.json"
    written = json.loads(path.read_text())
    written["image_processor"]["crop_size"] = {"height": 24, "width": 24}
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="processor makes pictures of 24 x 24 px, and its model reads 16 x 16 px"):
        run("--model_name_or_path", str(folder), "--config_name=none", folder="wrong")


def test_rows_that_are_no_pairs_are_refused(run, greys, tmp_path):
    with pytest.raises(ValueError, match="`text_column`='words' is not there. Columns here"):
        run("--dataset_name", str(greys), "--text_column", "words")
    with pytest.raises(ValueError, match="needs a column `text`, `description` or `keywords`.*name yours"):
        run("--dataset_name", str(greys))
    encoded = tmp_path / "encoded"
    encode_images.main(["--num_scenes=5", "--image_size=16", f"--output_dir={encoded}"])
    with pytest.raises(ValueError, match="holds encoded images. Name the source of the pictures themselves"):
        run("--dataset_name", str(encoded))
    Dataset.from_dict({"content": [[{"type": "text", "text": "a star"}]]}).save_to_disk(tmp_path / "documents")
    with pytest.raises(ValueError, match="has no column `image`: a CLIP is trained on pairs"):
        run("--dataset_name", str(tmp_path / "documents"))


def test_a_loss_that_is_no_number_stops_the_run(run, monkeypatch):
    def collate(self, pairs, original=PairCollator.__call__):
        batch = original(self, pairs)
        return {**batch, "pixel_values": batch["pixel_values"] * float("nan")}

    monkeypatch.setattr(PairCollator, "__call__", collate)
    with pytest.raises(FloatingPointError, match="At step 1 the loss is nan"):
        run()


@pytest.mark.parametrize("attribute", ["glyph", "color"])
@pytest.mark.parametrize("glyph_set", ["shapes", "icons"])
def test_the_wrong_caption_differs_in_the_one_thing(attribute, glyph_set):
    for index in range(200):
        scene = sample_scene(index, glyph_set=glyph_set)
        right, wrong = change_one_word(scene, attribute, random.Random(index))
        first, second = (Counter(text.split()) for text in (right, wrong))
        gone, come = (set(words) - {"a", "an"} for words in (first - second, second - first))
        value = scene["objects"][0][attribute]
        known = set(" ".join(OBJECT_COLORS).split())
        assert gone and come and len(gone) <= len(value.split())
        assert (gone | come <= known) == (attribute == "color")


def test_scenes_are_alike_when_one_caption_fits_both():
    keys = {}
    for index in range(3000):
        scene = sample_scene(index, glyph_set="icons", kinds={"two_object": 1, "position": 1, "single_object": 1})
        keys.setdefault(scene_key(scene), []).append(scene)
    for scenes in keys.values():
        assert len({(item["background"], len(item["objects"])) for item in scenes}) == 1
    swapped = sample_scene(5, kinds={"two_object": 1})
    assert scene_key({**swapped, "objects": swapped["objects"][::-1]}) == scene_key(swapped)
    moved = [{**item, "x": 1 - item["x"]} for item in swapped["objects"]]
    assert scene_key({**swapped, "objects": moved}) != scene_key(swapped)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, model_file):
    def launch(folder: str, num_processes: int, rows: int) -> Path:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        script = [str(ROOT / "recipes" / "train_clip.py"), f"--config={CONFIGS / 'clip_tiny.yaml'}"]
        options = [f"--config_name={model_file}", *MICRO_RUN, f"--output_dir={tmp_path / folder}"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        words = [*launcher, *script, *options, f"--per_device_train_batch_size={rows}"]
        result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return tmp_path / folder

    one, two = launch("one", 1, 6), launch("two", 2, 3)
    for first, second in zip(losses_of(one), losses_of(two), strict=True):
        assert second == pytest.approx(first, rel=1e-3)
    np.testing.assert_allclose(weights_of(two)["logit_scale"], weights_of(one)["logit_scale"], rtol=1e-5)
