import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

from hf_mm import TextToImagePipeline
from hf_mm.text_to_image import build_drawing_pipeline


DRAWING = {"height": 4, "width": 6, "num_inference_steps": 2}


@pytest.fixture
def drawing(make_model, make_processor):
    model = make_model()
    return pipeline("text-to-image", model=model, processor=make_processor(model.config))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def arrays(images):
    return [np.asarray(image).astype(int) for image in images]


def test_a_string_gives_a_picture_and_a_list_gives_pictures(drawing):
    assert isinstance(drawing, TextToImagePipeline)
    assert drawing("kite").size == (8, 8)
    assert [image.size for image in drawing(["kite", "a red star"], **DRAWING)] == [(6, 4)] * 2
    assert drawing(["kite"], **DRAWING)[0].size == (6, 4)


def test_several_pictures_per_prompt_are_lists(drawing):
    assert len(drawing("kite", num_images_per_prompt=3, **DRAWING)) == 3
    grouped = drawing(["kite", "a red star"], num_images_per_prompt=3, batch_size=2, **DRAWING)
    assert [len(images) for images in grouped] == [3, 3]


def test_a_batch_draws_what_each_prompt_alone_draws(drawing):
    prompts = ["kite", "a red star on a white background", "moon"]
    together = drawing(prompts, batch_size=3, generator=[seeded(seed) for seed in range(3)], **DRAWING)
    for prompt, seed, image in zip(prompts, range(3), together, strict=True):
        alone = drawing(prompt, generator=seeded(seed), **DRAWING)
        assert np.abs(np.subtract(*arrays([image, alone]))).max() <= 1


def test_batches_of_two_cover_an_odd_number_of_prompts(drawing):
    assert len(drawing(["kite", "a red star", "moon"], batch_size=2, **DRAWING)) == 3


def test_arguments_given_at_the_start_hold_for_every_call(make_model, make_processor):
    model = make_model()
    drawing = pipeline("text-to-image", model=model, processor=make_processor(model.config), height=4, width=12)
    assert drawing("kite").size == (12, 4) and drawing("kite", width=6).size == (6, 4)


def test_the_drawing_is_that_of_the_familys_pipeline(drawing):
    pipe = build_drawing_pipeline(drawing.model, drawing.processor)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("kite", generator=seeded(1), **DRAWING).images[0]
    assert np.array_equal(*arrays([drawing("kite", generator=seeded(1), **DRAWING), expected]))


def test_an_unknown_argument_is_refused_by_name(drawing):
    with pytest.raises(TypeError, match="guidance.*height"):
        drawing("kite", guidance=3)


@pytest.mark.parametrize(
    ("prompt", "arguments", "match"),
    [
        ("a <boi>", {}, "<boi>"),
        ("kite", {"height": 5}, "height.*5"),
        ("kite", {"guidance_scale": 0}, "guidance_scale"),
    ],
)
def test_bad_input_is_refused_as_everywhere(drawing, prompt, arguments, match):
    with pytest.raises(ValueError, match=match):
        drawing(prompt, **arguments)


def test_a_model_of_codes_draws_by_the_same_task(make_cm3leon, make_cm3leon_processor):
    model = make_cm3leon()
    drawing = pipeline("text-to-image", model=model, processor=make_cm3leon_processor(model.config))
    assert drawing("kite", top_p=0.9, temperature=2.0).size == (8, 8)
    assert [len(images) for images in drawing(["kite", "star"], num_images_per_prompt=2, batch_size=2)] == [2, 2]
    with pytest.raises(TypeError, match="num_inference_steps.*top_p"):
        drawing("kite", num_inference_steps=3)


def test_an_argument_of_the_other_family_is_refused(drawing):
    with pytest.raises(TypeError, match="top_p.*num_inference_steps"):
        drawing("kite", top_p=0.9)


def test_a_model_that_does_not_draw_is_refused_by_name(drawing):
    config = LlamaConfig(vocab_size=41, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        build_drawing_pipeline(LlamaForCausalLM(config), drawing.processor)
