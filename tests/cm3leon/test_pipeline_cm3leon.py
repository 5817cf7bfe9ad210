import copy

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import ModelOutput
from transformers.tokenization_utils_base import BatchEncoding

from hf_mm.cm3leon import CM3LeonPipeline, CodeSampling, generation_cm3leon
from hf_mm.data.cm3_masking import CM3Masking, mask_document, move_spans


@pytest.fixture
def make_pipeline(make_model, make_processor):
    def make(**fields):
        components = {name: fields.pop(name) for name in ("reranker", "reranker_processor") if name in fields}
        model = make_model(**fields)
        pipe = CM3LeonPipeline(model, make_processor(model.config), **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def codes_of(pipe, *args, **kwargs):
    return pipe(*args, output_type="codes", **kwargs).images


def test_a_prompt_gives_a_picture_and_a_list_a_list(make_pipeline):
    pipe = make_pipeline()
    assert [image.size for image in pipe("a red star").images] == [(8, 8)]
    assert [image.size for image in pipe(["a red star", "kite"]).images] == [(8, 8)] * 2
    assert len(pipe(["a red star", "kite"], num_images_per_prompt=3).images) == 6
    (images,) = pipe("kite", return_dict=False)
    assert len(images) == 1


def test_every_output_type_shows_the_same_drawing(make_pipeline):
    pipe = make_pipeline()
    pil, array, tensor, codes = (
        pipe("kite", output_type=name, generator=seeded(0)).images for name in ("pil", "np", "pt", "codes")
    )
    assert array.shape == (1, 8, 8, 3) and tensor.shape == (1, 3, 8, 8) and codes.shape == (1, 16)
    np.testing.assert_allclose(array, tensor.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(np.asarray(pil[0]), (array[0] * 255).round())
    assert 0 <= codes.min() and codes.max() < pipe.model.config.image_vocab_size
    pixels = pipe.model.decode_image_tokens(codes + pipe.model.config.first_image_token_id)
    torch.testing.assert_close(tensor, (pixels / 2 + 0.5).clamp(0, 1))


def test_the_drawing_is_the_models_behind_the_prompt_of_the_paper(make_pipeline):
    pipe = make_pipeline()
    tokenizer, config = pipe.processor.tokenizer, pipe.model.config
    text = tokenizer("a red star", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[config.eos_token_id, *text, config.break_token_id]])
    uncond = torch.tensor([[[config.eos_token_id, config.first_sentinel_token_id, config.break_token_id]]])
    expected = pipe.model.draw_images(
        ids, negative_input_ids=uncond, sampling=CodeSampling(guidance_scale=4.0, top_p=0.7), generator=seeded(3)
    )
    drawn = codes_of(pipe, "a red star", guidance_scale=4.0, top_p=0.7, generator=seeded(3))
    assert torch.equal(drawn, expected - config.first_image_token_id)
    default = codes_of(pipe, "a red star", generator=seeded(3))
    scale = config.drawing_guidance_scale
    assert torch.equal(default, codes_of(pipe, "a red star", guidance_scale=scale, generator=seeded(3)))
    assert not torch.equal(default, codes_of(pipe, "a red star", guidance_scale=1, generator=seeded(3)))
    config.drawing_temperature = 0.1
    cold = codes_of(pipe, "a red star", generator=seeded(3))
    assert torch.equal(cold, codes_of(pipe, "a red star", temperature=0.1, generator=seeded(3)))
    assert torch.equal(default, codes_of(pipe, "a red star", temperature=1.0, generator=seeded(3)))
    assert not torch.equal(default, cold)


def test_a_generator_per_prompt_draws_the_same_whatever_the_batch(make_pipeline):
    pipe = make_pipeline()
    prompts = ["kite", "a red star on a white background", ""]
    together = codes_of(pipe, prompts, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(3)])
    for number, prompt in enumerate(prompts):
        alone = codes_of(pipe, prompt, num_images_per_prompt=2, generator=[seeded(number)])
        assert torch.equal(alone, together[2 * number : 2 * number + 2])
    assert torch.equal(codes_of(pipe, prompts[0], generator=seeded(0)), together[:1])
    assert not torch.equal(together[:1], codes_of(pipe, prompts[0], generator=seeded(5)))


def test_an_empty_prompt_draws_like_no_guidance_at_all(make_pipeline):
    pipe = make_pipeline()
    drawn = [codes_of(pipe, "", guidance_scale=scale, generator=seeded(0)) for scale in (1, 3)]
    assert torch.equal(*drawn)


def test_settings_of_drawing_reach_the_model(make_pipeline):
    pipe = make_pipeline()
    draw = lambda **settings: codes_of(pipe, "kite", generator=seeded(0), **settings)  # noqa: E731
    greedy = draw(do_sample=False)
    assert torch.equal(draw(top_k=1), greedy) and torch.equal(draw(top_p=1e-6), greedy)
    contrastive = {"decoding": "contrastive", "contrastive_k": 3, "contrastive_alpha": 0.2}
    variants = [
        draw(),
        draw(temperature=5.0),
        draw(**contrastive),
        draw(**contrastive, amateur_temperature=0.2),
        greedy,
    ]
    assert len({tuple(codes[0].tolist()) for codes in variants}) == 5
    assert torch.equal(draw(cache_implementation="static"), draw())


def test_half_of_a_mix_is_either_way(make_pipeline):
    pipe = make_pipeline()
    settings = {"top_p": 0.6, "num_images_per_prompt": 4}
    contrast = {"contrastive_k": 3, "contrastive_alpha": 0.2}
    mixed, top_p, contrastive = (
        codes_of(pipe, ["kite"], **own, **settings, generator=[seeded(seed) for seed in range(4)])
        for own in ({"decoding": "mixed", **contrast}, {}, {"decoding": "contrastive", **contrast})
    )
    assert torch.equal(mixed, torch.cat([top_p[:2], contrastive[2:]]))


def test_a_picture_before_the_prompt_changes_the_drawing(make_pipeline, picture):
    pipe = make_pipeline()
    plain, first, second = (
        codes_of(pipe, "kite", generator=seeded(0), **images)
        for images in ({}, {"image": picture(0)}, {"image": picture(1)})
    )
    assert not torch.equal(plain, first) and not torch.equal(first, second)
    batch = codes_of(pipe, ["kite"] * 2, image=[picture(1), picture(0)], generator=[seeded(0), seeded(0)])
    assert torch.equal(batch, torch.cat([second, first]))


def test_the_streams_of_editing_are_the_document_with_less_and_less_known(make_pipeline, picture):
    pipe = make_pipeline()
    config, seen = pipe.model.config, []
    draw = pipe.model.draw_images
    pipe.model.draw_images = lambda *args, **kwargs: seen.append((args, kwargs)) or draw(*args, **kwargs)
    pipe("kite", image=picture(0), guidance_scale=3.0, image_guidance_scale=1.5)
    codes_of(pipe, "kite", image=picture(0), guidance_scale=3.0, image_guidance_scale=1.0)
    codes_of(pipe, "", image=picture(0), guidance_scale=1.0)
    codes_of(pipe, "kite", image=picture(0), guidance_scale=3.0)
    eos, unknown, opening = config.eos_token_id, config.first_sentinel_token_id, config.break_token_id
    image = [code + config.first_image_token_id for code in pipe._read_codes([picture(0)])[0]]
    text = pipe.processor.tokenizer("kite", add_special_tokens=False)["input_ids"]
    (ids, _), kwargs = seen[0]
    assert ids.tolist() == [[eos, *image, opening, *text, opening]]
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(kwargs["negative_input_ids"][0], kwargs["negative_attention_mask"][0], strict=True)
    ]
    textless = [eos, *image, opening]
    assert rows == [textless, [eos, unknown, opening]]
    assert seen[1][1]["negative_input_ids"].tolist() == [[textless]]
    assert seen[2][0][0].tolist() == [textless] and "negative_input_ids" not in seen[2][1]
    assert seen[3][1]["sampling"] == kwargs["sampling"]  # following the picture too is what happens unasked
    pipe.model.draw_images = draw


def test_edits_are_laid_out_by_the_template_with_and_without_their_prompt(make_pipeline, picture):
    pipe, seen = make_pipeline(), []
    draw, processor = pipe.model.draw_images, pipe.processor
    processor.edit_template = "red<image>{prompt}"
    pipe.model.draw_images = lambda *args, **kwargs: seen.append((args, kwargs)) or draw(*args, **kwargs)
    for prompt in ("kite", "star<image>kite"):
        pipe(prompt, image=picture(0), guidance_scale=3.0)
    pipe.model.draw_images = draw
    target = {"type": "image", "codes": pipe._read_codes([picture(0)])[0]}
    red, star, kite = ({"type": "text", "text": text} for text in ("red", "star", "kite"))
    layouts = ([red, target, kite], [red, target]), ([star, target, kite], [star, target])
    for ((ids, _), kwargs), layout in zip(seen, layouts, strict=True):
        negative_ids = kwargs["negative_input_ids"][0, 0][kwargs["negative_attention_mask"][0, 0].bool()]
        for drawn, parts in zip((ids[0], negative_ids), layout, strict=True):
            # What training draws a picture behind, its instruction kept or dropped.
            document = processor.encode_document([*parts, {**target, "is_answer": True}])
            assert drawn.tolist() == document["input_ids"][: document["answer_mask"].index(1)]


@pytest.mark.parametrize(("prompt", "has_image"), [("a<image>b", False), ("<image>a<image>", True)])
def test_a_prompt_has_a_place_for_each_picture(make_pipeline, picture, prompt, has_image):
    with pytest.raises(ValueError, match="prompt.*<image>.*`image`"):
        make_pipeline()(prompt, image=picture() if has_image else None)


def test_a_callback_shows_the_picture_as_it_forms(make_pipeline):
    pipe, seen = make_pipeline(), []

    def callback(pipeline, step, timestep, given):
        seen.append((step, timestep, pipeline.guidance_scale, pipeline.do_classifier_free_guidance, given["codes"]))

    codes = codes_of(pipe, "kite", guidance_scale=2.0, callback_on_step_end=callback, num_images_per_prompt=2)
    assert [entry[:4] for entry in seen] == [
        (row, 4 * row + 4, 2.0, True) for row in range(4)
    ] and pipe.num_timesteps == 4
    assert all(torch.equal(entry[4], codes[:, : 4 * row + 4]) for row, entry in enumerate(seen))
    halves = pipe.preview(seen[1][4], "pt")
    assert (halves[:, :, 4:] == 0.5).all() and (halves[:, :, :4] != 0.5).any()
    whole = pipe.preview(codes, "pt")
    assert torch.equal(whole, pipe._decode(codes, "pt")) and len(pipe.preview(codes)) == 2


def test_an_interrupted_drawing_stays_as_it_stands(make_pipeline):
    pipe = make_pipeline()

    def callback(pipeline, step, timestep, given):
        pipeline._interrupt = step == 1

    codes = codes_of(pipe, "kite", callback_on_step_end=callback)
    assert codes.shape == (1, 8)
    (image,) = pipe("kite", callback_on_step_end=callback).images
    assert (np.asarray(image)[4:] == 128).all()
    assert codes_of(pipe, "kite").shape == (1, 16) and not pipe.interrupt


class RankByMean(torch.nn.Module):
    """Stands for a CLIP: scores a picture by its mean against the length of the text."""

    device = torch.device("cpu")

    def forward(self, pixel_values, lengths):
        means = pixel_values.flatten(1).mean(-1)
        return ModelOutput(logits_per_image=means[:, None] * lengths[None])


def read_for_ranking(text, images, **kwargs):
    pixels = torch.stack([torch.from_numpy(np.array(image)).float() for image in images])
    lengths = torch.tensor([1.0 if len(prompt) > 5 else -1.0 for prompt in text])
    return BatchEncoding({"pixel_values": pixels, "lengths": lengths})


def test_the_best_candidates_of_each_prompt_are_kept_best_first(make_pipeline):
    pipe = make_pipeline()
    pipe.register_modules(reranker=RankByMean(), reranker_processor=read_for_ranking)
    prompts = ["kite", "a red star"]
    generators = lambda: [seeded(0), seeded(1)]  # noqa: E731
    every = pipe(prompts, num_images_per_prompt=7, generator=generators(), output_type="pt").images
    best = pipe(prompts, num_images_per_prompt=2, num_candidates=7, generator=generators(), output_type="pt").images
    pictures = (every * 255).round().flatten(1).mean(-1).unflatten(0, (2, 7))
    lowest, highest = pictures[0].argsort()[:2], pictures[1].argsort(descending=True)[:2]
    assert torch.equal(best, every[[*lowest.tolist(), *(7 + highest).tolist()]])


def test_any_clip_ranks_and_travels_with_the_pipeline(make_pipeline, tmp_path, code_tokenizer):
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    text = {"vocab_size": len(code_tokenizer), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 6, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    vision = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 10,
        "patch_size": 5,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=7)).eval()
    tokenizer = copy.deepcopy(code_tokenizer)
    tokenizer.model_max_length = 6
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10}), tokenizer
    )
    pipe = make_pipeline(reranker=clip, reranker_processor=processor)
    prompt = "a red star on a white background " * 3  # longer than the ranker reads
    draw = {"num_candidates": 4, "generator": seeded(0), "output_type": "codes"}
    best = pipe(prompt, **draw).images
    assert best.shape == (1, 16)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.reranker, CLIPModel)
    assert torch.equal(loaded(prompt, **{**draw, "generator": seeded(0)}).images, best)


def test_a_pipeline_is_saved_and_loaded_by_every_door(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    expected = codes_of(pipe, "kite", generator=seeded(0))
    for door in (CM3LeonPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        loaded = door.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, CM3LeonPipeline) and loaded.reranker is None
        assert torch.equal(codes_of(loaded, "kite", generator=seeded(0)), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["kite", 3]}, "prompt"),
        ({"prompt": "a <break> kite"}, "<break>"),
        ({"prompt": "a <image> kite"}, "<image>"),
        ({"prompt": "a <code:3> kite"}, "<code:3>"),
        ({"prompt": "kite " * 300}, "prompt.*positions"),
        ({"height": 16}, "height.*16.*codes.*8 x 8"),
        ({"width": 4}, "width.*4.*codes.*8 x 8"),
        ({"guidance_scale": 0.3}, "guidance_scale.*0.3"),
        ({"image_guidance_scale": 2.0}, "image_guidance_scale.*image"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_candidates": 2, "num_images_per_prompt": 3}, "num_candidates.*2.*3"),
        ({"num_candidates": 2}, "num_candidates.*2.*reranker"),
        ({"output_type": "jpeg"}, "output_type.*jpeg"),
        ({"generator": [torch.Generator()] * 3}, "generator.*3"),
        (
            {"prompt": ["kite", ""], "decoding": "mixed", "contrastive_k": 3, "contrastive_alpha": 0.1},
            "prompt.*empty.*mixed.*top_p",
        ),
        ({"decoding": "contrastive", "contrastive_k": 99, "contrastive_alpha": 0.1}, "contrastive_k.*99.*23"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(make_pipeline, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_pipeline()(**{"prompt": "kite", **arguments})


def test_candidates_beyond_memory_are_refused_with_the_number_that_fits(make_pipeline, monkeypatch):
    pipe = make_pipeline()
    pipe.register_modules(reranker=RankByMean(), reranker_processor=read_for_ranking)
    monkeypatch.setattr(generation_cm3leon, "free_memory", lambda device: 500_000)
    with pytest.raises(ValueError, match=r"num_candidates`=1000 .* \d+ fit"):
        pipe("kite", num_candidates=1000)


def test_one_image_per_prompt_is_asked_for(make_pipeline, picture):
    pipe = make_pipeline()
    for images in (picture(), [picture()]):
        with pytest.raises(ValueError, match="image"):
            pipe(["kite", "star"], image=images)


def test_a_model_without_an_image_tokenizer_gives_codes_only(make_pipeline):
    pipe = make_pipeline(vq_config=None, image_size=32)
    assert codes_of(pipe, "kite").shape == (1, 16)
    with pytest.raises(ValueError, match="image tokenizer"):
        pipe("kite")


def test_models_of_another_family_and_half_a_reranker_are_refused(make_pipeline):
    pipe = make_pipeline()
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=41, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="model.*LlamaForCausalLM"):
        CM3LeonPipeline(llama, pipe.processor)
    with pytest.raises(ValueError, match="reranker_processor"):
        CM3LeonPipeline(pipe.model, pipe.processor, reranker=llama)


def test_captions_describe_each_picture(make_pipeline, picture):
    pipe = make_pipeline()
    together = pipe.caption([picture(0), picture(1)], max_new_tokens=5, do_sample=False)
    assert together == [pipe.caption(picture(seed), max_new_tokens=5, do_sample=False)[0] for seed in (0, 1)]
    assert len(pipe.caption(picture(0), prompt="a red", num_beams=2, num_return_sequences=2, max_new_tokens=3)) == 2


class Write(LogitsProcessor):
    """Writes given words, then ends the span; what it was asked behind is kept."""

    def __init__(self, pipe, *texts):
        tokenizer = pipe.processor.tokenizer
        self.spans = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eoss_token_id] for text in texts
        ]
        self.prompts, self.place = [], 0

    def __call__(self, input_ids, scores):
        if self.place == 0:
            self.prompts.append(input_ids.clone())
        token, self.place = self.spans[0][self.place], self.place + 1
        if self.place == len(self.spans[0]):
            self.spans, self.place = self.spans[1:], 0
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0
        return forced


def test_a_caption_is_asked_for_by_the_infill_prompt_and_ends_with_its_span(make_pipeline, picture):
    pipe = make_pipeline()
    config = pipe.model.config
    write = Write(pipe, "a red star")
    texts = pipe.caption(picture(0), max_new_tokens=64, logits_processor=LogitsProcessorList([write]))
    assert texts == ["a red star"] and not write.spans
    image = [code + config.first_image_token_id for code in pipe._read_codes([picture(0)])[0]]
    eos, unknown = config.eos_token_id, config.first_sentinel_token_id
    assert write.prompts[0].tolist() == [[eos, unknown, config.break_token_id, *image, eos, unknown]]


def test_a_question_is_asked_as_in_training(make_pipeline, picture):
    pipe = make_pipeline()
    write = Write(pipe, " kite", " kite")
    for question in ("Question: a kite? Answer: ", "Question: a kite? Answer:"):
        answer = pipe.caption(picture(0), question, logits_processor=LogitsProcessorList([write]))
        assert answer == ["kite"]
    content = [
        {"type": "text", "text": "Question: a kite? Answer: "},
        {"type": "text", "text": "kite", "is_answer": True},
        {"type": "image", "codes": pipe._read_codes([picture(0)])[0]},
    ]
    document = pipe.processor.encode_document(content)
    break_id, unknown = pipe.model.config.break_token_id, pipe.model.config.first_sentinel_token_id
    marks = [mark * (token != break_id) for token, mark in zip(*list(document.values())[::2], strict=True)]
    first, stop = marks.index(1), len(marks) - marks[::-1].index(1)
    ids = document["input_ids"]
    for prompt in write.prompts:
        assert prompt.tolist() == [[*ids[:first], unknown, *ids[stop:], unknown]]


def test_captions_hold_no_break(make_pipeline, picture):
    pipe = make_pipeline()

    class Favour(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, pipe.model.config.break_token_id] += 50
            return scores

    written = []
    decode = pipe._decode_text
    pipe._decode_text = lambda rows: written.extend(rows) or decode(rows)
    pipe.caption(picture(0), max_new_tokens=5, logits_processor=LogitsProcessorList([Favour()]))
    pipe.infill_caption(picture(0), "a ___", max_new_tokens=5, logits_processor=LogitsProcessorList([Favour()]))
    assert len(written) == 2 and not any(pipe.model.config.break_token_id in row for row in written)


def test_gaps_of_a_caption_are_filled_one_after_the_other(make_pipeline, picture):
    pipe = make_pipeline()
    write = Write(pipe, " red", " white background")
    processors = LogitsProcessorList([write])
    texts = pipe.infill_caption(picture(0), "a ___ star on a ___", logits_processor=processors)
    assert texts == ["a red star on a white background"]
    config, tokenizer = pipe.model.config, pipe.processor.tokenizer
    image = [code + config.first_image_token_id for code in pipe._read_codes([picture(0)])[0]]
    first = config.first_sentinel_token_id
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " star on a", " red")]
    document = [
        config.eos_token_id,
        *pieces[0],
        first,
        *pieces[1],
        first + 1,
        config.break_token_id,
        *image,
        config.eos_token_id,
    ]
    assert write.prompts[0].tolist() == [[*document, first]]
    assert write.prompts[1].tolist() == [[*document, first, *pieces[2], config.eoss_token_id, first + 1]]


def test_a_gap_filled_with_what_marks_gaps_is_not_filled_again(make_pipeline, picture):
    pipe = make_pipeline()
    processors = LogitsProcessorList([Write(pipe, " a", " kite")])
    assert pipe.infill_caption(picture(0), "two a or a", blank="a", logits_processor=processors) == ["two a or kite"]


def test_texts_with_different_numbers_of_gaps_are_filled_together(make_pipeline, picture):
    pipe = make_pipeline()
    images, texts = [picture(0), picture(1)], ["a * star *", "*"]
    arguments = {"blank": "*", "max_new_tokens": 4, "do_sample": False}
    together = pipe.infill_caption(images, texts, **arguments)
    assert together == [pipe.infill_caption(*pair, **arguments)[0] for pair in zip(images, texts, strict=True)]
    with pytest.raises(ValueError, match="no gap.*___"):
        pipe.infill_caption(images, "a star")
    with pytest.raises(ValueError, match="text.*1.*2"):
        pipe.infill_caption(images, ["___"])


@pytest.mark.parametrize("prompt", ["", "a red star"])
def test_a_region_is_drawn_anew_and_the_rest_stays(make_pipeline, picture, prompt):
    pipe = make_pipeline()
    known = torch.tensor(pipe._read_codes([picture(0)]))
    drawn = [
        pipe.infill_region(
            picture(0), (2, 2, 6, 5), prompt, generator=seeded(seed), output_type="codes", num_images_per_prompt=3
        ).images
        for seed in (0, 0, 1)
    ]
    inside = torch.tensor(pipe.processor.box_mask((2, 2, 6, 5)))
    assert inside.tolist() == [False] * 5 + [True] * 2 + [False] * 2 + [True] * 2 + [False] * 5
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert all(torch.equal(codes[:, ~inside], known[:, ~inside].expand(3, -1)) for codes in drawn)
    assert (drawn[0][:, inside] != known[:, inside]).any()
    (image,) = pipe.infill_region(picture(0), (0, 0, 8, 8), prompt).images
    assert isinstance(image, Image.Image) and image.size == (8, 8)


def test_a_region_is_drawn_behind_the_document_with_one_span_missing(make_pipeline, picture):
    pipe = make_pipeline()
    config, rows = pipe.model.config, []
    draw = pipe.model.draw_images
    pipe.model.draw_images = lambda *args, **kwargs: rows.append((args, kwargs)) or draw(*args, **kwargs)
    pipe.infill_region([picture(0), picture(1)], (2, 2, 6, 5), ["kite", "kite"], guidance_scale=2.0)
    pipe.infill_region(picture(0), (2, 2, 6, 5), "kite")
    pipe.model.draw_images = draw
    assert "negative_input_ids" not in rows[1][1]  # no guidance unless asked for
    ((ids, _), kwargs), first = rows[0], config.first_sentinel_token_id
    eos, opening = config.eos_token_id, config.break_token_id
    image = [code + config.first_image_token_id for code in pipe._read_codes([picture(0)])[0]]
    text = pipe.processor.tokenizer("kite", add_special_tokens=False)["input_ids"]
    assert ids[0].tolist() == [eos, *text, opening, *image[:5], first, *image[11:], eos, first]
    assert kwargs["negative_input_ids"][0].tolist() == [[eos, first, opening, *image[:5]]]
    codes = [token - config.first_image_token_id for token in image]
    assert kwargs["given_codes"][0].tolist() == [-1, -1, codes[7], codes[8], -1, -1]


def masking_of(config):
    names = ("break_token_id", "eos_token_id", "eoss_token_id", "first_sentinel_token_id", "num_sentinel_tokens")
    return CM3Masking(**{name: vars(config)[name] for name in names}, max_spans=5, whole_segment_share=0.5)


def test_regions_are_drawn_behind_prefixes_that_training_makes(make_pipeline, picture):
    pipe = make_pipeline()
    config, texts, drawn = pipe.model.config, [], []
    masking, draw, write = masking_of(config), pipe.model.draw_images, pipe._write_spans
    pipe.model.draw_images = lambda *args, **kwargs: drawn.append((args, kwargs)) or draw(*args, **kwargs)
    pipe._write_spans = lambda *args, **kwargs: texts.append(write(*args, **kwargs)) or texts[-1]
    pipe.infill_region([picture(0)] * 2, (2, 2, 6, 5), ["kite", ""], guidance_scale=2.0)
    pipe.infill_region(picture(0), (0, 0, 8, 8))
    pipe.model.draw_images = draw
    image = [code + config.first_image_token_id for code in pipe._read_codes([picture(0)])[0]]
    ((ids, mask), kwargs), ((whole, _), _) = drawn
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    negatives = [
        row[keep.bool()].tolist()
        for row, keep in zip(kwargs["negative_input_ids"][:, 0], kwargs["negative_attention_mask"][:, 0], strict=True)
    ]
    known = pipe.processor.tokenizer("kite", add_special_tokens=False)["input_ids"]
    ((written,),) = texts[0]
    assert written and config.break_token_id not in written
    for text, spans, prefix, negative in (
        (known, slice(1, 2), rows[0], negatives[0]),
        (written, slice(0, 2), rows[1], negatives[1]),
    ):
        document = np.array([config.eos_token_id, *text, config.break_token_id, *image, config.eos_token_id])
        start = len(text) + 2
        places = [(1, len(text) + 1), (start + 5, start + 11)]
        masked = move_spans(document, places[spans], masking).tolist()
        assert masked == [*prefix, *image[5:11], config.eoss_token_id]
        # No other stream where the text is the model's own; else that of the caption alone missing.
        others = prefix if spans.start == 0 else move_spans(document, places[:1], masking).tolist()[: len(negative)]
        assert negative == others and negative[-1] == (prefix[-1] if spans.start == 0 else image[4])
    assert whole.tolist() == [[config.eos_token_id, config.first_sentinel_token_id, config.break_token_id]]


def test_the_text_in_front_of_a_region_is_never_empty(make_pipeline, picture):
    pipe, texts = make_pipeline(), []
    write, end = pipe._write_spans, pipe.model.config.eoss_token_id
    favour = 50 * torch.nn.functional.one_hot(torch.tensor(end), pipe.model.config.vocab_size)
    pipe.model.lm_head.register_forward_hook(lambda module, args, output: output + favour)
    pipe._write_spans = lambda *args, **kwargs: texts.append(write(*args, **kwargs)) or texts[-1]
    pipe.infill_region(picture(0), (2, 2, 6, 5))
    assert [len(span) for ((span,),) in texts] == [1]


def test_training_masks_a_text_together_with_a_region_and_writes_the_text_first(make_config):
    config = make_config()
    masking, codes = masking_of(config), [config.first_image_token_id + place for place in range(16)]
    document = [masking.eos_token_id, 11, 12, masking.break_token_id, *codes, masking.eos_token_id]
    first, found = masking.first_sentinel_token_id, 0
    for seed in range(4000):
        masked = mask_document(document, torch.Generator().manual_seed(seed), masking).tolist()
        if masked[1:3] == [first, masking.break_token_id] and first + 1 in masked:
            tail = masked[masked.index(masking.eos_token_id, 1) + 1 :]
            found += 1
            assert tail[:5] == [first, 11, 12, masking.eoss_token_id, first + 1]
    assert found > 5


def test_a_region_without_a_prompt_needs_room_for_its_codes_only(make_pipeline, picture):
    pipe = make_pipeline(max_position_embeddings=25)
    codes = pipe.infill_region(picture(0), (2, 2, 6, 5), output_type="codes").images
    assert codes.shape == (1, 16)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"box": (2, 2, 2, 5)}, "box"),
        ({"box": (0, 0, 9, 8)}, "box"),
        ({"prompt": ["kite", "star"]}, "prompt.*2.*1"),
        ({"output_type": "jpeg"}, "jpeg"),
        ({"top_p": 0}, "top_p.*0"),
        ({"image_guidance_scale": 2}, "image_guidance_scale.*2"),
    ],
)
def test_regions_that_cannot_be_drawn_are_refused(make_pipeline, picture, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_pipeline().infill_region(**{"image": picture(0), "box": (2, 2, 6, 5), **arguments})


class BeginImages(LogitsProcessor):
    """Begins an image wherever one may stand, and opens one elsewhere."""

    def __init__(self, config):
        self.config = config

    def __call__(self, input_ids, scores):
        scores[:, self.config.eos_token_id] = -torch.inf
        scores[:, self.config.break_token_id] += 50
        scores[:, self.config.first_image_token_id] += 100
        return scores


def test_interleaved_answers_hold_text_and_pictures(make_pipeline, picture):
    pipe = make_pipeline()
    documents = pipe.interleave(
        ["kite", "a star with <image>"], image=[picture()], max_images=2, max_new_tokens=3, generator=seeded(0),
        sampling={"top_p": 0.9}, guidance_scale=2.0,
        logits_processor=LogitsProcessorList([BeginImages(pipe.model.config)]),
    )  # fmt: skip
    assert len(documents) == 2
    assert all(isinstance(part, str) or part.size == (8, 8) for document in documents for part in document)
    assert [sum(not isinstance(part, str) for part in document) for document in documents] == [2, 2]


class Say(LogitsProcessor):
    """Prefers given ids in turn; what the model must not write it does not."""

    def __init__(self, *token_ids):
        self.token_ids = list(token_ids)

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token_ids.pop(0)] += 1000
        return scores


def test_a_conversation_goes_on_turn_by_turn_with_text_and_pictures(make_pipeline, picture):
    pipe = make_pipeline(max_position_embeddings=160)
    tokenizer, config, seen = pipe.processor.tokenizer, pipe.model.config, []
    generate = pipe.model.generate_interleaved
    pipe.model.generate_interleaved = lambda **kwargs: seen.append(kwargs["input_ids"]) or generate(**kwargs)
    opening, end, code = config.break_token_id, config.eos_token_id, config.first_image_token_id
    words, others = (tokenizer(text)["input_ids"] for text in ("a red star", "kite"))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "kite"}]}
    ]

    def answer(*token_ids):
        say = Say(*token_ids)
        messages.append(pipe.chat(messages, logits_processor=LogitsProcessorList([say]), generator=seeded(0)))
        assert not say.token_ids
        return messages[-1]["content"]

    assert answer(*words, end) == [{"type": "text", "text": "a red star"}]
    messages += [{"role": "user", "content": "make it blue"}]
    assert [part["type"] for part in answer(*others, opening, code, end)] == ["text", "image"]
    # Behind a part a text would be the user's next message: the turn ends there.
    messages += [{"role": "user", "content": "and now?"}]
    assert answer(*words, opening, others[0]) == [{"type": "text", "text": "a red star"}]
    messages += [
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image", "image": picture(1)}]}
    ]
    assert answer(opening, *words, opening, others[0]) == [{"type": "text", "text": "a red star"}]
    for ids, number in zip(seen, (1, 3, 5, 7), strict=True):
        assert ids.tolist() == pipe.processor.apply_chat_template(messages[:number], tokenize=True)
    with pytest.raises(ValueError, match="messages.*assistant"):
        pipe.chat(messages)
