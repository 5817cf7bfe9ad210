import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from hf_mm.transfusion import TransfusionPipeline


DRAWING = {"height": 4, "width": 6, "num_inference_steps": 3}


@pytest.fixture
def make_pipeline(make_model, make_processor):
    def make(**fields):
        model = make_model(**fields)
        pipe = TransfusionPipeline(model, make_processor(model.config), model.default_scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_prompt_gives_a_picture_and_a_list_a_list(make_pipeline):
    pipe = make_pipeline()
    assert [image.size for image in pipe("a red star").images] == [(8, 8)]
    assert [image.size for image in pipe(["a red star", "kite"], **DRAWING).images] == [(6, 4)] * 2
    assert len(pipe(["a red star", "kite"], num_images_per_prompt=3, **DRAWING).images) == 6
    (images,) = pipe("kite", return_dict=False, **DRAWING)
    assert len(images) == 1


def test_every_output_type_shows_the_same_drawing(make_pipeline):
    pipe = make_pipeline()
    pil, array, tensor, latents = (
        pipe("kite", output_type=name, generator=seeded(0), **DRAWING).images for name in ("pil", "np", "pt", "latent")
    )
    assert array.shape == (1, 4, 6, 3) and tensor.shape == latents.shape == (1, 3, 4, 6)
    np.testing.assert_allclose(array, tensor.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(np.asarray(pil[0]), (array[0] * 255).round())
    torch.testing.assert_close(tensor, (latents / 2 + 0.5).clamp(0, 1))


def test_latents_are_decoded_by_the_vae(make_pipeline, tiny_vae):
    pipe = make_pipeline(vae_config=tiny_vae)
    drawing = {"height": 8, "width": 12, "num_inference_steps": 2}
    latents = pipe("kite", output_type="latent", generator=seeded(0), **drawing).images
    assert latents.shape == (1, 5, 4, 6)
    pixels = pipe("kite", output_type="pt", generator=seeded(0), **drawing).images
    expected = pipe.model.vae.decode(latents / 0.7 + 0.3).sample
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1))


def test_the_same_generator_gives_the_same_picture_and_lists_give_each_its_own(make_pipeline):
    pipe = make_pipeline()
    arguments = {"output_type": "latent", **DRAWING}
    first, again, other = (pipe("kite", generator=seeded(seed), **arguments).images for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    batch = pipe(["a red star", "kite"], generator=[seeded(5), seeded(0)], **arguments).images
    torch.testing.assert_close(batch[1], first[0], rtol=1e-3, atol=1e-3 * float(first.abs().max()))


def test_pictures_of_one_prompt_stand_side_by_side(make_pipeline):
    pipe = make_pipeline()
    arguments = {"output_type": "latent", **DRAWING}
    batch = pipe(
        ["a red star", "kite"], num_images_per_prompt=2, generator=[seeded(seed) for seed in range(4)], **arguments
    ).images
    for prompt, seed in (("a red star", 0), ("a red star", 1), ("kite", 2), ("kite", 3)):
        alone = pipe(prompt, generator=seeded(seed), **arguments).images[0]
        torch.testing.assert_close(batch[seed], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def test_given_latents_are_where_the_drawing_starts(make_pipeline):
    pipe = make_pipeline(prediction_type="flow_prediction")
    noise = torch.randn(1, 3, 4, 6)
    first, again = (pipe("kite", latents=noise, output_type="latent", **DRAWING).images for _ in range(2))
    assert torch.equal(first, again)


def test_callbacks_follow_diffusers(make_pipeline):
    pipe, seen = make_pipeline(), []

    def callback(pipeline, step, timestep, given):
        seen.append((step, pipeline.num_timesteps, pipeline.guidance_scale, pipeline.do_classifier_free_guidance))
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else {}

    latents = pipe("kite", guidance_scale=2.0, callback_on_step_end=callback, output_type="latent", **DRAWING).images
    assert seen == [(0, 3, 2.0, True), (1, 3, 2.0, True), (2, 3, 2.0, True)] and not latents.any()


def test_an_interrupted_drawing_stays_as_it_stands(make_pipeline):
    pipe, kept = make_pipeline(), []

    def callback(pipeline, step, timestep, given):
        kept.append(given["latents"])
        pipeline._interrupt = step == 1
        return given

    latents = pipe("kite", callback_on_step_end=callback, output_type="latent", **DRAWING).images
    assert len(kept) == 2 and torch.equal(latents, kept[1])
    assert len(pipe("kite", **DRAWING).images) == 1 and not pipe.interrupt


def test_a_picture_before_the_prompt_changes_the_drawing(make_pipeline, picture):
    pipe = make_pipeline()
    arguments = {"output_type": "latent", **DRAWING}
    plain, with_first, with_second = (
        pipe("kite", generator=seeded(0), **images, **arguments).images
        for images in ({}, {"image": picture(0)}, {"image": picture(1)})
    )
    assert not torch.allclose(plain, with_first) and not torch.allclose(with_first, with_second)
    batch = pipe(["kite"] * 2, image=[picture(1), picture(0)], generator=[seeded(0), seeded(0)], **arguments).images
    torch.testing.assert_close(batch[0], with_second[0], rtol=1e-3, atol=1e-3 * float(batch.abs().max()))


def test_the_streams_of_editing_are_the_template_with_and_without_its_prompt(make_pipeline, picture):
    pipe, seen = make_pipeline(), []
    pipe.processor.edit_template = "red<image>{prompt}"
    draw = pipe.model.draw_images
    pipe.model.draw_images = lambda **kwargs: seen.append(kwargs) or draw(**kwargs)
    pipe("kite", image=picture(0), guidance_scale=3.0, image_guidance_scale=1.5, **DRAWING)
    pipe("star<image>kite", image=picture(0), guidance_scale=1.0, image_guidance_scale=1.5, **DRAWING)
    pipe("kite", image=picture(0), guidance_scale=1.0, **DRAWING)
    pipe("kite", image=picture(0), guidance_scale=3.0, **DRAWING)
    pipe("kite", guidance_scale=3.0, **DRAWING)
    pipe.model.draw_images = draw
    processor, image = pipe.processor, {"type": "image", "size": (8, 8)}

    def ids_of(*parts):
        return [processor.encode_document([{"type": "text", "text": "red"}, image, *parts])["input_ids"][:-1]]

    kite, star = ({"type": "text", "text": text} for text in ("kite", "star"))
    assert seen[0]["input_ids"].tolist() == ids_of(kite) and seen[0]["negative_input_ids"].tolist() == ids_of()
    assert (seen[0]["guidance_scale"], seen[0]["image_guidance_scale"]) == (3.0, 1.5)
    assert seen[1]["input_ids"].tolist() == [processor.encode_document([star, image, kite])["input_ids"][:-1]]
    assert seen[1]["negative_input_ids"].tolist() == [processor.encode_document([star, image])["input_ids"][:-1]]
    assert "negative_input_ids" not in seen[2]
    assert [drawing["image_guidance_scale"] for drawing in seen] == [1.5, 1.5, 1.0, 1.5, 1.0]


def test_an_empty_instruction_has_no_text_to_follow(make_pipeline, picture):
    pipe = make_pipeline()
    drawn = [
        pipe(
            "",
            picture(0),
            guidance_scale=scale,
            image_guidance_scale=1.0,
            generator=seeded(0),
            output_type="latent",
            **DRAWING,
        ).images
        for scale in (1, 3)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3 * float(drawn[0].abs().max()))


def test_an_empty_prompt_draws_like_no_guidance_at_all(make_pipeline):
    pipe = make_pipeline()
    drawn = [
        pipe("", guidance_scale=scale, generator=seeded(0), output_type="latent", **DRAWING).images for scale in (1, 3)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3 * float(drawn[0].abs().max()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["kite", 3]}, "prompt"),
        ({"prompt": "a <boi> kite"}, "<boi>"),
        ({"prompt": "a <image> kite"}, "(?i)image"),
        ({"prompt": "kite " * 300}, "prompt.*positions"),
        ({"height": 5}, "height.*5"),
        ({"height": 0}, "height.*0"),
        ({"width": 0}, "width.*0"),
        ({"guidance_scale": 0.3}, "guidance_scale.*0.3"),
        ({"image_guidance_scale": 2.0}, "image_guidance_scale.*2.0.*image"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"output_type": "jpeg"}, "output_type.*jpeg"),
        ({"generator": [torch.Generator()] * 3}, "generator.*3"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(make_pipeline, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_pipeline()(**{"prompt": "kite", **DRAWING, **arguments})


def test_one_image_per_prompt_is_asked_for(make_pipeline, picture):
    pipe = make_pipeline()
    for images in (picture(), [picture()]):
        with pytest.raises(ValueError, match="image"):
            pipe(["kite", "star"], image=images)


def test_a_scheduler_for_another_prediction_is_refused(make_pipeline):
    pipe = make_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEuler.*epsilon"):
        pipe("kite", **DRAWING)
    pipe.scheduler = DDIMScheduler.from_config(make_pipeline().scheduler.config)
    assert len(pipe("kite", **DRAWING).images) == 1


def test_a_model_of_another_family_is_refused(make_pipeline):
    pipe = make_pipeline()
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=41, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="model.*LlamaForCausalLM"):
        TransfusionPipeline(llama, pipe.processor, pipe.scheduler)


def test_captions_describe_each_picture(make_pipeline, picture):
    pipe = make_pipeline()
    together = pipe.caption([picture(0), picture(1)], max_new_tokens=5, do_sample=False)
    assert together == [pipe.caption(picture(seed), max_new_tokens=5, do_sample=False)[0] for seed in (0, 1)]
    assert len(pipe.caption(picture(0), prompt="a red", num_beams=2, num_return_sequences=2, max_new_tokens=3)) == 2


def test_a_question_is_asked_as_in_training(make_pipeline, picture):
    pipe, prompts = make_pipeline(), []
    encode = pipe._encode
    pipe._encode = lambda *args: prompts.append(encode(*args)["input_ids"]) or encode(*args)
    for question in ("Question: a kite? Answer: ", "Question: a kite? Answer:"):
        assert len(pipe.caption(picture(0), question, max_new_tokens=2)) == 1
    parts = [{"type": "image", "size": (8, 8)}, {"type": "text", "text": "Question: a kite? Answer: "}]
    answer = {"type": "text", "text": "red", "is_answer": True}
    document = pipe.processor.encode_document([*parts, answer])
    for (ids,) in prompts:
        assert ids.tolist() == document["input_ids"][: len(ids)] and document["answer_mask"].index(1) == len(ids)


def test_captions_end_with_the_context(make_pipeline, picture):
    pipe = make_pipeline(text_config={"max_position_embeddings": 24})
    lengths = []

    def note_length(input_ids, scores):
        lengths.append(input_ids.shape[1] + 1)
        scores[:, pipe.model.config.text_config.eos_token_id] = -torch.inf
        return scores

    pipe.caption([picture(0), picture(1)], max_new_tokens=1000, logits_processor=LogitsProcessorList([note_length]))
    assert max(lengths) == 24


class OpenEveryOther(LogitsProcessor):
    """Opens an image behind every letter that was written."""

    def __init__(self, boi):
        self.boi = boi

    def __call__(self, input_ids, scores):
        follows_image = input_ids[:, -1] == 4
        scores[:, 2] = -torch.inf
        scores[:, self.boi] = torch.where(follows_image, -torch.inf, torch.inf)
        return scores


def test_interleaved_answers_hold_text_and_pictures(make_pipeline, picture):
    pipe = make_pipeline()
    documents = pipe.interleave(
        ["kite", "a star with <image>"], image=[picture()], max_images=2, max_new_tokens=3, height=4, width=6,
        num_inference_steps=2, generator=seeded(0),
        logits_processor=LogitsProcessorList([OpenEveryOther(pipe.model.config.boi_token_id)]),
    )  # fmt: skip
    assert len(documents) == 2
    assert all(isinstance(part, str) or part.size == (6, 4) for document in documents for part in document)
    assert [sum(not isinstance(part, str) for part in document) for document in documents] == [2, 2]


class Write(LogitsProcessor):
    """Writes given ids, those of pictures left out, whatever the model would say."""

    def __init__(self, *token_ids):
        self.token_ids = list(token_ids)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token_ids.pop(0)] = 0
        return forced


def test_a_conversation_goes_on_turn_by_turn_with_text_and_pictures(make_pipeline, picture):
    pipe = make_pipeline(text_config={"max_position_embeddings": 128})
    tokenizer, seen = pipe.processor.tokenizer, []
    generate = pipe.model.generate_interleaved
    pipe.model.generate_interleaved = lambda **kwargs: seen.append(kwargs["input_ids"]) or generate(**kwargs)
    boi, eos = tokenizer.boi_token_id, tokenizer.eos_token_id
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "kite"}]}
    ]
    write = Write(*tokenizer(" a red star")["input_ids"], eos)
    messages += [pipe.chat(messages, logits_processor=LogitsProcessorList([write]))]
    assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "a red star"}]}
    assert not write.token_ids
    messages += [{"role": "user", "content": "make it blue"}]
    drawing = {"num_inference_steps": 2, "generator": seeded(0)}
    write = Write(boi, *tokenizer("kite")["input_ids"], eos)
    messages += [pipe.chat(messages, logits_processor=LogitsProcessorList([write]), **drawing)]
    assert [part["type"] for part in messages[3]["content"]] == ["image", "text"]
    assert messages[3]["content"][0]["image"].size == (8, 8)
    messages += [{"role": "user", "content": "why?"}]
    pipe.chat(messages, max_new_tokens=2)
    for ids, number in zip(seen, (1, 3, 5), strict=True):
        assert ids.tolist() == pipe.processor.apply_chat_template(messages[:number], tokenize=True)
    with pytest.raises(ValueError, match="messages.*assistant"):
        pipe.chat(messages[:2])


def test_an_answer_draws_no_more_pictures_than_allowed(make_pipeline):
    pipe = make_pipeline()
    opening = LogitsProcessorList([OpenEveryOther(pipe.model.config.boi_token_id)])
    answer = pipe.chat(
        [{"role": "user", "content": "kite"}], max_images=2, max_new_tokens=3, logits_processor=opening, **DRAWING
    )
    assert sum(part["type"] == "image" for part in answer["content"]) == 2
