"""Refusals of what no model can read, alike in both families: texts, messages, numbers, pictures, checkpoints."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from fuzzing.models import build_pipelines
from hf_mm.cm3leon import CM3LeonImageProcessor
from hf_mm.data.caption_text import clean_words
from hf_mm.data.formats import open_image
from hf_mm.loading import load_pipeline
from hf_mm.transfusion import TransfusionImageProcessor


FAMILIES = ["transfusion", "cm3leon"]
HALF = "a \ud83d star"


@pytest.fixture(scope="module")
def pipelines():
    return build_pipelines()


@pytest.fixture
def folder(pipelines, family, tmp_path):
    pipelines[family].save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(pipelines, family):
    return pipelines[family]


@pytest.mark.parametrize(
    ("text", "match"),
    [(HALF, "lone surrogate"), ([], "at least one"), (7, "`text`=7"), (["a", None], r"`text`\[1\]=None")],
)
def test_a_processor_refuses_what_is_no_text(pipe, text, match):
    with pytest.raises(ValueError, match=match):
        pipe.processor(text=text)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a", "list of parts"),
        (["a"], r"`content`\[0\]='a'"),
        ([{"text": "a"}], "with a `type`"),
        ([{"type": "text", "text": None}], r"`content`\[0\], `text`=None"),
        ([{"type": "text", "text": HALF}], "lone surrogate"),
        ([{"type": "image", "size": "ab", "codes": "ab"}], "size.*latent pixels|codes.*entries"),
        ([{"type": "image", "size": [8.0, 8], "codes": [0.5] * 16}], "size.*latent pixels|whole numbers"),
        ([{"type": "image", "size": None, "codes": [[1], 2]}], "size.*latent pixels|different lengths"),
    ],
)
def test_a_document_refuses_parts_that_are_none(pipe, content, match):
    with pytest.raises(ValueError, match=match):
        pipe.processor.encode_document(content)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "list of messages"),
        ([], "no message"),
        ([3], "list of messages"),
        ([{"role": "user", "content": 3}], "Message 0 has the `content` 3"),
        ([{"role": "user", "content": ["a"]}], "Message 0 has the `content`"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], "`type`"),
        ([{"role": "user", "content": [{"type": "text", "text": False}]}], "`text`=False"),
        ([{"role": "user", "content": HALF}], "lone surrogate"),
    ],
)
def test_a_conversation_refuses_messages_that_are_none(pipe, messages, match):
    with pytest.raises(ValueError, match=match):
        pipe.processor.apply_chat_template(messages, tokenize=True)
    with pytest.raises(ValueError, match=match):
        pipe.chat(messages)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": "8"}, "`height`='8'"),
        ({"width": 8.5}, "`width`=8.5"),
        ({"num_images_per_prompt": [1]}, "`num_images_per_prompt`"),
        ({"guidance_scale": "3"}, "`guidance_scale`='3'"),
        ({"image_guidance_scale": [1]}, "`image_guidance_scale`"),
        ({"generator": 7}, "`generator`=7"),
    ],
)
def test_a_drawing_refuses_arguments_of_the_wrong_type(pipe, options, match):
    with pytest.raises(ValueError, match=match):
        pipe("a red star", **options)


def test_writing_refuses_texts_and_lengths_that_are_none(pipe):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="`prompt`=3"):
        pipe.caption(picture, 3)
    with pytest.raises(ValueError, match="`image` 0"):
        pipe.caption([])
    for write in (lambda: pipe.caption(picture, max_new_tokens="3"), lambda: pipe.interleave("a", max_new_tokens="3")):
        with pytest.raises(ValueError, match="`max_new_tokens`='3'"):
            write()


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (Image.new("RGB", (0, 5)), "zero-sized"),
        (Image.new("F", (5, 5)), "floats"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "flat list of images"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.full((8, 8, 3), "a"), "whole numbers or floats"),
        ([], "empty"),
    ],
)
def test_an_image_processor_refuses_what_is_no_picture(pipe, image, match):
    with pytest.raises(ValueError, match=match):
        pipe.processor.image_processor(image, return_tensors="pt")


def test_a_damaged_file_is_refused_by_its_name(pipe, tmp_path):
    path = tmp_path / "cut.tiff"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ValueError, match="cut.tiff"):
        pipe.processor.image_processor(str(path), return_tensors="pt")


@pytest.mark.parametrize("mode", ["I;16", "La", "RGBa", "LA", "P", "CMYK", "1"])
def test_pictures_of_every_mode_look_as_in_training(pipe, mode):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    if mode == "I;16":
        picture = Image.fromarray(values)
    elif mode in ("La", "RGBa"):
        picture = Image.fromarray((values // 257).astype(np.uint8)).convert(mode.upper()).convert(mode)
    else:
        picture = Image.fromarray((values // 257).astype(np.uint8)).convert(mode)
    prepared = pipe.processor.image_processor(picture, return_tensors="np")["pixel_values"][0]
    standard = open_image(picture if mode not in ("La", "RGBa") else picture.convert(mode.upper()))
    assert np.abs((prepared + 1) * 127.5 - np.asarray(standard).transpose(2, 0, 1)).max() < 1.01


@pytest.mark.parametrize("processor", [CM3LeonImageProcessor, TransfusionImageProcessor])
@pytest.mark.parametrize("size", [(50_000, 2), (2, 50_000)])
def test_a_very_long_picture_costs_no_more_than_its_middle(processor, size):
    import tracemalloc

    picture = Image.new("RGB", size, "red")
    tracemalloc.start()
    try:
        pixels = processor()(picture, return_tensors="np")["pixel_values"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pixels.shape == (1, 3, 256, 256)
    assert peak < 2**28  # resized whole it would be 256 x 6,400,000 pixels


def test_a_checkpoint_with_damaged_weights_is_refused_by_name(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"{folder.name}.*SafetensorError"):
        AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_checkpoint_with_weights_of_other_shapes_is_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    save_file({**weights, name: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"{folder.name}.*other shapes"):
        AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_checkpoint_without_one_of_its_shards_is_refused_by_name(folder):
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    with pytest.raises(OSError, match=folder.name):
        AutoModelForMultimodalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [("[]", "damaged"), ("{", "damaged"), ('{"_class_name": "X", "model": 3}', "library, class")],
)
def test_a_pipeline_with_a_damaged_index_is_refused_by_name(folder, text, match):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(OSError, match=f"model_index.json.*{match}"):
        load_pipeline(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("family", ["transfusion"])
def test_a_scheduler_of_an_unknown_kind_is_refused_by_the_checkpoints_name(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": 0}))
    with pytest.raises(OSError, match="cannot be loaded.*0 is not implemented"):
        load_pipeline(str(folder), trust_remote_code=False)


def test_a_number_of_layers_without_end_is_refused_at_once(folder, family):
    config = json.loads((folder / "config.json").read_text())
    (config if family == "cm3leon" else config["text_config"])["num_hidden_layers"] = 2**30
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="num_hidden_layers.*at most"):
        AutoModelForMultimodalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, 3, [], ["a"]])
def test_an_image_tokenizer_without_its_levels_is_refused(family, value, pipelines):
    field = {"transfusion": "vae_config", "cm3leon": "vq_config"}[family]
    config = pipelines[family].model.config.to_dict()
    config[field] = {"scaling_factor": 1.0, "num_vq_embeddings": 23, "block_out_channels": value}
    with pytest.raises(Exception, match=f"{field}.*block_out_channels"):
        type(pipelines[family].model.config).from_dict(config)


def test_pictures_in_one_array_are_refused(pipe):
    for use in (lambda pictures: pipe("a", image=pictures), pipe.caption):
        with pytest.raises(ValueError, match="pictures|images"):
            use(np.zeros((3, 8, 8, 3), np.uint8))


def test_a_whole_number_is_no_truth_value_and_a_large_one_no_overflow(pipelines):
    with pytest.raises(ValueError, match="`num_images_per_prompt`=True"):
        pipelines["cm3leon"]("a", num_images_per_prompt=True)
    assert pipelines["cm3leon"]("a", guidance_scale=10**30).images[0].size == (8, 8)


def test_missing_words_are_left_out_of_captions():
    assert clean_words(["star", None, "kite"], []) == (["star", "kite"], set())
