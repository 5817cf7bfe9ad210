import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LogitsProcessor, LogitsProcessorList


BOS, EOS, PAD = 1, 2, 0
HEIGHT, WIDTH, PATCHES = 4, 6, 6
DRAWING = {"height": HEIGHT, "width": WIDTH}


@pytest.fixture
def boi(make_config):
    return make_config().boi_token_id


def left_padded(*rows):
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def naive_prediction(model, prompt, image, time):
    """One prediction over the whole sequence at once, for one row: no cache, no batch, no padding."""
    config, size = model.config, tuple(image.shape[-2:])
    count = size[0] * size[1] // config.patch_size**2
    times = torch.as_tensor(time).reshape(1)
    out = model.model(
        input_ids=torch.tensor([[*prompt, config.boi_token_id, *[config.image_token_id] * count]]),
        latents=image,
        timesteps=times,
        use_cache=False,
    )
    return model.model.patch_out(out.last_hidden_state[:, -count:], times, out.images.groups[0][2], size)


def naive_guided(model, prompt, image, time, scale):
    uncond = naive_prediction(model, [BOS], image, time)
    return uncond + scale * (naive_prediction(model, prompt, image, time) - uncond)


def alpha_bars(num_timesteps=1000):
    values, product = [], 1.0
    for index in range(num_timesteps):
        now, before = (
            math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in (index + 1, index)
        )
        product *= 1 - min(1 - now / before, 0.999)
        values.append(product)
    return values


def naive_ddpm(model, prompt, scale, num_steps, generator):
    """DDPM from the formulas: betas between the kept timesteps, posterior variance, no noise at the end."""
    bars, times = alpha_bars(), [1000 * number // num_steps for number in reversed(range(num_steps))]
    x = torch.randn(1, 3, HEIGHT, WIDTH, generator=generator)
    for time, before in zip(times, [*times[1:], None], strict=True):
        noise = naive_guided(model, prompt, x, time, scale)
        bar, bar_before = bars[time], 1.0 if before is None else bars[before]
        beta = 1 - bar / bar_before
        clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        mean = (
            math.sqrt(bar_before) * beta / (1 - bar) * clean + math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar) * x
        )
        x = mean
        if time > 0:
            x = mean + math.sqrt((1 - bar_before) / (1 - bar) * beta) * torch.randn(x.shape, generator=generator)
    return x


def naive_euler(model, prompt, scale, sigmas, x):
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        x = x + (after - sigma) * naive_guided(model, prompt, x, 1000.0 * sigma, scale)
    return x


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "fields", [{}, {"patch_layer": "unet"}, {"patch_positions": "grid"}, {"patch_positions": "rotary"}]
)
@pytest.mark.parametrize("scale", [1, 2.5])
def test_drawing_equals_ddpm_from_the_formulas_without_a_cache(make_model, fields, scale):
    model = make_model(**fields)
    prompt = [BOS, 11, 12, 13]
    drawn = model.draw_images(
        torch.tensor([prompt]), num_inference_steps=7, guidance_scale=scale, generator=seeded(4), **DRAWING
    )
    close(drawn, naive_ddpm(model, prompt, scale, 7, seeded(4)))


def test_drawing_with_eager_attention_equals_sdpa(make_model):
    drawn = [
        make_model(attn_implementation=name).draw_images(
            torch.tensor([[BOS, 11, 12]]), num_inference_steps=4, generator=seeded(4), **DRAWING
        )
        for name in ("eager", "sdpa")
    ]
    close(*drawn)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("fields", [{}, {"patch_positions": "rotary", "prediction_type": "flow_prediction"}])
def test_a_compiled_step_draws_the_same_and_is_compiled_once(make_model, fields):
    model = make_model(**fields)
    drawing = {"guidance_scale": 3.0, **DRAWING}
    prompt = torch.tensor([[BOS, 11, 12, 13]])
    expected = model.draw_images(prompt, num_inference_steps=6, generator=seeded(0), **drawing)
    counter = CompileCounterWithBackend("aot_eager")
    model.model.language_model.compile(backend=counter)
    model.draw_images(prompt, num_inference_steps=3, generator=seeded(1), **drawing)
    compiled = counter.frame_count
    drawn = model.draw_images(prompt, num_inference_steps=6, generator=seeded(0), **drawing)
    assert counter.frame_count == compiled > 0
    torch.testing.assert_close(drawn, expected)


def test_a_flow_is_integrated_by_euler(make_model):
    model = make_model(prediction_type="flow_prediction")
    noise, prompt = torch.randn(1, 3, HEIGHT, WIDTH), [BOS, 11, 12, 13]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.tolist()
    assert sigmas[0] == 1 and sigmas[-1] == 0
    drawn = model.draw_images(
        torch.tensor([prompt]), num_inference_steps=5, guidance_scale=2.5, latents=noise, **DRAWING
    )
    close(drawn, naive_euler(model, prompt, 2.5, sigmas, noise))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of these schedulers' own
@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
def test_other_schedulers_draw_from_the_same_model(make_model, scheduler_class):
    model = make_model()
    scheduler = scheduler_class.from_config(model.default_scheduler().config)
    drawn = model.draw_images(
        torch.tensor([[BOS, 11]]), num_inference_steps=4, scheduler=scheduler, generator=seeded(4), **DRAWING
    )
    assert drawn.shape == (1, 3, HEIGHT, WIDTH) and drawn.isfinite().all()


def test_ddim_equals_its_formula(make_model):
    model, bars = make_model(), alpha_bars()
    noise = torch.randn(1, 3, HEIGHT, WIDTH)
    scheduler = DDIMScheduler.from_config(model.default_scheduler().config, set_alpha_to_one=True)
    drawn = model.draw_images(
        torch.tensor([[BOS, 11]]),
        num_inference_steps=5,
        guidance_scale=1,
        scheduler=scheduler,
        latents=noise,
        **DRAWING,
    )
    x = noise
    for time in (800, 600, 400, 200, 0):
        predicted = naive_prediction(model, [BOS, 11], x, time)
        before = bars[time - 200] if time else 1.0
        clean = (x - math.sqrt(1 - bars[time]) * predicted) / math.sqrt(bars[time])
        x = math.sqrt(before) * clean + math.sqrt(1 - before) * predicted
    close(drawn, x)


def test_the_schedulers_own_state_is_left_alone(make_model):
    model = make_model()
    scheduler = model.default_scheduler()
    scheduler.set_timesteps(11)
    before = scheduler.timesteps.clone()
    model.draw_images(torch.tensor([[BOS, 11]]), num_inference_steps=4, scheduler=scheduler, **DRAWING)
    assert torch.equal(scheduler.timesteps, before)


def test_a_guided_step_is_one_forward_over_the_image_block_of_both_streams(make_model):
    model, shapes = make_model(), []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    ids, mask = left_padded([BOS, 11, 12], [BOS, 13, 14, 15, 16], [BOS])
    model.draw_images(ids, mask, num_inference_steps=5, guidance_scale=2.5, **DRAWING)
    assert shapes == [(3, 6), (1, 2), *[(6, PATCHES)] * 5]
    shapes.clear()
    model.draw_images(ids, mask, num_inference_steps=5, guidance_scale=1, num_images_per_prompt=2, **DRAWING)
    assert shapes == [(3, 6), *[(6, PATCHES)] * 5]
    hook.remove()


def edit_rows(config, lay_out):
    """Two edits of different lengths, and the same without their instructions, with a word of the task each."""
    rows = [lay_out(config, BOS, 17, (4, 4), 11, 12), lay_out(config, BOS, (4, 4), 13, 14, 15, 16)]
    others = [lay_out(config, BOS, 17, (4, 4)), lay_out(config, BOS, (4, 4))]
    return left_padded(*rows), left_padded(*others)


@pytest.mark.parametrize("scales", [(2.5, 1), (1, 1.5), (2.5, 1.5), (3, 3)])
def test_guided_edits_follow_text_and_picture_each_by_its_scale(make_model, lay_out, scales):
    model = make_model()
    (ids, mask), (negative_ids, negative_mask) = edit_rows(model.config, lay_out)
    pictures, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, HEIGHT, WIDTH)
    alone = {"num_inference_steps": 1, "guidance_scale": 1, "latents": noise, **DRAWING}
    full = model.draw_images(ids, mask, pixel_values=pictures, **alone)
    textless = model.draw_images(negative_ids, negative_mask, pixel_values=pictures, **alone)
    uncond = model.draw_images(torch.full((2, 1), BOS), **alone)
    drawn = model.draw_images(
        ids, mask, pixel_values=pictures, negative_input_ids=negative_ids, negative_attention_mask=negative_mask,
        **{**alone, "guidance_scale": scales[0], "image_guidance_scale": scales[1]},
    )  # fmt: skip
    # One step of DDPM without noise behind it is linear in the prediction.
    close(drawn, uncond + scales[1] * (textless - uncond) + scales[0] * (full - textless))


@pytest.mark.parametrize(("scales", "num_streams"), [((1, 1), 1), ((2.5, 1), 2), ((1, 1.5), 3), ((2.5, 1.5), 3)])
def test_the_streams_of_an_edit_are_one_forward_and_each_is_read_once(make_model, lay_out, scales, num_streams):
    model, shapes = make_model(), []
    (ids, mask), (negative_ids, negative_mask) = edit_rows(model.config, lay_out)
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    model.draw_images(
        ids, mask, pixel_values=torch.rand(2, 3, 4, 4), negative_input_ids=negative_ids, num_images_per_prompt=3,
        negative_attention_mask=negative_mask, num_inference_steps=5, guidance_scale=scales[0],
        image_guidance_scale=scales[1], **DRAWING,
    )  # fmt: skip
    hook.remove()
    read = [(2, ids.shape[1] + 1), (2, negative_ids.shape[1] + 1), (1, 2)][:num_streams]
    assert shapes == [*read, *[(2 * 3 * num_streams, PATCHES)] * 5]


def test_guidance_by_a_picture_needs_one(make_model):
    with pytest.raises(ValueError, match="image_guidance_scale.*1.5.*image"):
        make_model().draw_images(torch.tensor([[BOS, 11]]), image_guidance_scale=1.5, **DRAWING)


def test_guidance_of_one_is_no_guidance(make_model):
    model = make_model(drawing_guidance_scale=1)
    ids = torch.tensor([[BOS, 11, 12]])
    unguided = model.draw_images(ids, num_inference_steps=4, generator=seeded(4), **DRAWING)
    off = model.draw_images(ids, num_inference_steps=4, generator=seeded(4), guidance_scale=1, **DRAWING)
    guided = model.draw_images(ids, num_inference_steps=4, generator=seeded(4), guidance_scale=1.01, **DRAWING)
    assert torch.equal(unguided, off) and not torch.equal(off, guided)


@pytest.mark.parametrize("scale", [1, 2.5])
def test_prompts_of_different_lengths_draw_as_each_alone(make_model, scale):
    model = make_model()
    rows = [[BOS, 11, 12], [BOS, 13, 14, 15, 16, 17], [BOS]]
    ids, mask = left_padded(*rows)
    arguments = {"num_inference_steps": 4, "guidance_scale": scale, **DRAWING}
    together = model.draw_images(ids, mask, generator=[seeded(seed) for seed in (5, 6, 7)], **arguments)
    for row, seed, image in zip(rows, (5, 6, 7), together, strict=True):
        close(image, model.draw_images(torch.tensor([row]), generator=seeded(seed), **arguments)[0])


def test_a_prompt_shorter_than_the_unconditional_one_draws(make_model, boi):
    model = make_model()
    noise = torch.randn(1, 3, HEIGHT, WIDTH)
    drawn = model.draw_images(
        torch.tensor([[boi]]), num_inference_steps=1, guidance_scale=2.5, latents=noise, **DRAWING
    )
    expected = naive_guided(model, [], noise, 0, 2.5)
    bar = alpha_bars()[0]
    close(drawn, (noise - math.sqrt(1 - bar) * expected) / math.sqrt(bar))


def test_several_images_per_prompt_are_those_of_repeated_prompts(make_model):
    model = make_model()
    rows = [[BOS, 11, 12], [BOS, 13, 14, 15]]
    arguments = {"num_inference_steps": 4, **DRAWING}
    ids, mask = left_padded(*rows)
    several = model.draw_images(
        ids, mask, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(4)], **arguments
    )
    ids, mask = left_padded(rows[0], rows[0], rows[1], rows[1])
    close(several, model.draw_images(ids, mask, generator=[seeded(seed) for seed in range(4)], **arguments))


def test_a_prompt_with_images_is_read_before_drawing(make_model, lay_out):
    model = make_model()
    prompt = lay_out(model.config, BOS, (4, 4), 11, (4, 4))
    pictures = torch.rand(2, 3, 4, 4)
    arguments = {"num_inference_steps": 3, "guidance_scale": 1, "latents": torch.randn(1, 3, HEIGHT, WIDTH)}
    drawn = model.draw_images(
        torch.tensor([prompt]), pixel_values=pictures, generator=seeded(1), **arguments, **DRAWING
    )
    pictures[0, 0, 0, 0] += 1
    other = model.draw_images(
        torch.tensor([prompt]), pixel_values=pictures, generator=seeded(1), **arguments, **DRAWING
    )
    assert not torch.allclose(drawn, other)


def test_the_cached_prefix_is_left_as_it_was(make_model, boi):
    model = make_model()
    ids = torch.tensor([[BOS, 11, 12, boi]])
    cache = model.model(input_ids=ids, use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    model.denoise(cache, torch.ones_like(ids), num_inference_steps=3, guidance_scale=1, **DRAWING)
    model.denoise(cache, torch.ones_like(ids), num_inference_steps=3, guidance_scale=2.5, **DRAWING)
    assert cache.get_seq_length() == 4
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_a_callback_sees_every_step_and_may_change_the_latents(make_model):
    model, seen = make_model(), []

    def callback(step, timestep, latents):
        seen.append((step, int(timestep)))
        return torch.zeros_like(latents) if step == 3 else latents

    drawn = model.draw_images(torch.tensor([[BOS, 11]]), num_inference_steps=4, callback=callback, **DRAWING)
    assert seen == [(0, 750), (1, 500), (2, 250), (3, 0)] and not drawn.any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"height": 5}, "height.*5.*multiple of 2.*4"),
        ({"width": 1}, "width.*1.*multiple of 2"),
        ({"height": 0}, "height.*0"),
        ({"guidance_scale": 0.5}, "guidance_scale.*0.5"),
        ({"guidance_scale": 10**40}, "guidance_scale.*10{40} .*not finite"),
        ({"num_inference_steps": 0}, "num_inference_steps.*0"),
        ({"num_inference_steps": 1001}, "num_inference_steps.*1001"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt.*0"),
        ({"num_images_per_prompt": 10**12}, r"num_images_per_prompt.*GiB are free, so fewer than \d+ fit"),
        ({"latents": torch.zeros(1, 3, 8, 6)}, "latents.*8, 6.*4, 6"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator.*2"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "scheduler.*FlowMatch.*'epsilon'"),
        ({"scheduler": DDPMScheduler(prediction_type="v_prediction")}, "v_prediction.*'epsilon'"),
    ],
)
def test_drawing_arguments_out_of_range_are_refused_by_name(make_model, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_model().draw_images(torch.tensor([[BOS, 11]]), **{**DRAWING, **arguments})


def test_a_scale_beyond_the_whole_numbers_of_a_tensor_is_a_scale_still(make_model):
    make_model().draw_images(torch.tensor([[BOS, 11]]), **{**DRAWING, "guidance_scale": 10**30})


def test_prompts_that_open_an_image_and_prompts_that_do_not_are_not_mixed(make_model, boi):
    with pytest.raises(ValueError, match="image-opening"):
        make_model().draw_images(torch.tensor([[BOS, boi], [BOS, 11]]), **DRAWING)


# ---------------------------------------------------------------------------------------------------------- text


IMAGE_PROMPTS = ([BOS, (4, 6), 11, 12], [BOS, (4, 6), 13])


def image_prompts(model, lay_out):
    ids, mask = left_padded(*(lay_out(model.config, *parts) for parts in IMAGE_PROMPTS))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.rand(2, 3, 4, 6, generator=seeded(9))}


@torch.no_grad()
def naive_greedy(model, ids, pictures, num_tokens):
    banned = [model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id]
    written = []
    for _ in range(num_tokens):
        scores = model(input_ids=torch.tensor([ids + written]), pixel_values=pictures, use_cache=False).logits[0, -1]
        scores[banned] = -torch.inf
        written.append(int(scores.argmax()))
        if written[-1] == EOS:
            break
    return written


def test_greedy_text_about_images_equals_each_row_alone_without_a_cache(make_model, lay_out):
    model = make_model()
    inputs = image_prompts(model, lay_out)
    written = model.generate(**inputs, max_new_tokens=7, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, parts in enumerate(IMAGE_PROMPTS):
        picture = inputs["pixel_values"][row : row + 1]
        expected = naive_greedy(model, lay_out(model.config, *parts), picture, 7)
        assert written[row].tolist()[: len(expected)] == expected


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 64}]
)
def test_every_kind_of_cache_writes_the_same(make_model, lay_out, options):
    model = make_model()
    inputs = image_prompts(model, lay_out)
    expected = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=7, do_sample=False, **options), expected)


def test_beams_with_images_equal_beams_without_a_cache(make_model, lay_out):
    model = make_model()
    inputs = image_prompts(model, lay_out)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert cached.shape[0] == 4
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)


def test_beams_of_each_row_read_that_rows_images(make_model, lay_out):
    model = make_model()
    rows = [
        lay_out(model.config, BOS, (4, 6), 11, (4, 6)),
        lay_out(model.config, BOS, 11, 12),
        lay_out(model.config, BOS, (4, 6), 13),
    ]
    pictures = torch.rand(3, 3, 4, 6, generator=seeded(9))
    ids, mask = left_padded(*rows)
    options = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, pixel_values=pictures, **options)[:, ids.shape[1] :]
    for row, own in ((0, pictures[:2]), (1, None), (2, pictures[2:])):
        images = {} if own is None else {"pixel_values": own}
        alone = model.generate(torch.tensor([rows[row]]), **images, **options)[:, len(rows[row]) :]
        for together_row, alone_row in zip(together[2 * row : 2 * row + 2].tolist(), alone.tolist(), strict=True):
            assert together_row[: len(alone_row)] == alone_row


def test_sampling_gives_several_sequences_per_prompt(make_model, lay_out):
    model = make_model()
    inputs = image_prompts(model, lay_out)
    out = model.generate(
        **inputs, max_new_tokens=6, do_sample=True, num_return_sequences=3, temperature=1.5, top_p=0.9
    )
    assert out.shape[0] == 6 and len({tuple(row) for row in out.tolist()}) > 2


def test_text_never_holds_image_tokens(make_model):
    model = make_model()
    image_tokens = torch.tensor([model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id])
    with torch.no_grad():  # a model that wants nothing else
        model.lm_head.weight.zero_()
        model.lm_head.weight[image_tokens] = 1e-3
    ids = torch.tensor([[BOS, 11, 12]]).expand(5, -1)
    for options in ({}, {"suppress_tokens": [17]}, {"generation_config": model.generation_config}):
        written = model.generate(ids, max_new_tokens=20, do_sample=True, **options)[:, 3:]
        assert not torch.isin(written, image_tokens).any()
    model.generation_config.suppress_tokens = [18]
    written = model.generate(ids, max_new_tokens=200 // 2, do_sample=True, suppress_tokens=None)[:, 3:]
    assert not torch.isin(written, torch.tensor([18, *image_tokens])).any()


def test_text_ends_at_the_end_token(make_model):
    model = make_model()
    assert model.generation_config.eos_token_id == EOS and model.generation_config.pad_token_id == PAD
    ids = torch.tensor([[BOS, 11]])
    force = forbid_padding(Plan({11: {2: EOS}}))
    assert model.generate(ids, max_new_tokens=9, do_sample=False, logits_processor=force).shape[1] == 2 + 3


def test_an_unknown_generation_mode_is_refused(make_model):
    with pytest.raises(ValueError, match="generation_mode.*'video'"):
        make_model().generate(torch.tensor([[BOS]]), generation_mode="video")


def test_image_mode_of_generate_draws(make_model):
    model = make_model()
    ids = torch.tensor([[BOS, 11]])
    drawn = model.generate(ids, generation_mode="image", max_new_tokens=256, generator=seeded(3), **DRAWING)
    assert torch.equal(drawn, model.draw_images(ids, generator=seeded(3), **DRAWING))


# ---------------------------------------------------------------------------------------------------- interleaved


class Plan(LogitsProcessor):
    """Forces tokens at given places of a row's written text, and forbids the stops elsewhere.

    Rows are known by the token behind `<s>`; places count text tokens and image openings behind the prompt.
    """

    def __init__(self, places, prompt_length=2):
        self.places, self.prompt_length = places, prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [EOS, 3, 4, 5]] = -torch.inf
        for row, ids in enumerate(input_ids.tolist()):
            real = [token for token in ids if token not in (PAD, 4, 5)]
            place = len(real) - self.prompt_length
            token = self.places.get(real[1], {}).get(place)
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0
        return scores


@torch.no_grad()
def naive_interleaved(model, prompt, places, noises, sigmas, scale, max_tokens):
    """One row by itself: every token and every denoising step over the whole sequence."""
    config, ids, images, parts, place = model.config, list(prompt), [], [[]], 0
    while True:
        latents = torch.cat(images) if images else None
        scores = model(input_ids=torch.tensor([ids]), pixel_values=latents, use_cache=False).logits[0, -1]
        scores[[EOS, 3, 4, 5, PAD]] = -torch.inf
        token = places.get(place, int(scores.argmax()))
        place += 1
        ids.append(token)
        if token == EOS:
            return parts
        if token != config.boi_token_id:
            parts[-1].append(token)
            if len(parts[-1]) == max_tokens:
                return parts
            continue
        x, uncond_ids = noises.pop(0)[None], [BOS, config.boi_token_id, *[config.image_token_id] * PATCHES]
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            times = torch.tensor([0.0] * len(images) + [1000.0 * sigma])
            out = model.model(
                input_ids=torch.tensor([ids + [config.image_token_id] * PATCHES]),
                latents=torch.cat([*images, x]),
                timesteps=times,
                use_cache=False,
            )
            cond = model.model.patch_out(out.last_hidden_state[:, -PATCHES:], times[-1:], (), (HEIGHT, WIDTH))
            out = model.model(input_ids=torch.tensor([uncond_ids]), latents=x, timesteps=times[-1:], use_cache=False)
            uncond = model.model.patch_out(out.last_hidden_state[:, -PATCHES:], times[-1:], (), (HEIGHT, WIDTH))
            x = x + (after - sigma) * (uncond + scale * (cond - uncond))
        images.append(x)
        ids += [config.image_token_id] * PATCHES + [config.eoi_token_id]
        parts += [x[0], []]


def forbid_padding(plan):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, PAD] = torch.where(torch.isfinite(scores).sum(-1) > 1, -torch.inf, scores[:, PAD])
            return scores

    return LogitsProcessorList([plan, Forbid()])


def test_interleaved_answers_equal_each_row_written_and_drawn_without_a_cache(make_model, boi):
    model = make_model(prediction_type="flow_prediction")
    prompts = [[BOS, 11], [BOS, 12], [BOS, 13]]
    places = {11: {2: boi, 6: EOS}, 12: {3: EOS}, 13: {0: boi, 4: boi, 7: EOS}}
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.5, "generator": seeded(8), **DRAWING}
    documents = model.generate_interleaved(
        torch.tensor(prompts),
        draw_kwargs=arguments,
        max_new_tokens=9,
        do_sample=False,
        logits_processor=forbid_padding(Plan(places)),
    )
    scheduler, generator = model.default_scheduler(), seeded(8)
    scheduler.set_timesteps(3)
    first, second = (
        torch.randn(2, 3, HEIGHT, WIDTH, generator=generator),
        torch.randn(1, 3, HEIGHT, WIDTH, generator=generator),
    )
    noises = [[first[0]], [], [first[1], second[0]]]
    for prompt, document, noise in zip(prompts, documents, noises, strict=True):
        expected = naive_interleaved(model, prompt, places[prompt[1]], noise, scheduler.sigmas.tolist(), 2.5, 9)
        assert len(document) == len(expected)
        for part, wanted in zip(document, expected, strict=True):
            if isinstance(wanted, list):
                assert part.tolist() == wanted
            else:
                close(part, wanted)


def test_interleaving_left_padded_prompts_equals_each_alone(make_model, boi):
    model = make_model(prediction_type="flow_prediction")
    rows = [[BOS, 11], [BOS, 12, 19, 20]]
    plans = {11: {1: boi, 4: EOS}}, {12: {2: boi, 5: EOS}}
    both = LogitsProcessorList([Plan({11: {1: boi, 4: EOS}, 12: {4: boi, 7: EOS}})])
    ids, mask = left_padded(*rows)
    draw_kwargs = {"num_inference_steps": 2, **DRAWING}
    together = model.generate_interleaved(
        ids, mask, draw_kwargs={**draw_kwargs, "generator": [seeded(1), seeded(2)]}, max_new_tokens=6,
        do_sample=False, logits_processor=both,
    )  # fmt: skip
    for row, (prompt, plan) in enumerate(zip(rows, plans, strict=True)):
        alone = model.generate_interleaved(
            torch.tensor([prompt]), draw_kwargs={**draw_kwargs, "generator": [seeded(row + 1)]}, max_new_tokens=6,
            do_sample=False, logits_processor=LogitsProcessorList([Plan(plan, prompt_length=len(prompt))]),
        )[0]  # fmt: skip
        assert [part.ndim for part in together[row]] == [part.ndim for part in alone] == [1, 3, 1]
        for part, wanted in zip(together[row], alone, strict=True):
            assert part.tolist() == wanted.tolist() if part.ndim == 1 else close(part, wanted) is None


def test_an_answer_ends_when_it_opens_one_image_too_many(make_model, boi):
    model = make_model()
    plan = LogitsProcessorList([Plan({11: dict.fromkeys(range(20), boi)})])
    for max_images in (0, 1, 2):
        parts = model.generate_interleaved(
            torch.tensor([[BOS, 11]]), max_images=max_images, draw_kwargs=DRAWING, logits_processor=plan
        )[0]
        assert sum(part.ndim == 3 for part in parts) == max_images


def test_interleaving_reads_the_prompts_images(make_model, lay_out, boi):
    model = make_model()
    prompt, picture = torch.tensor([lay_out(model.config, BOS, 11, (4, 6))]), torch.rand(1, 3, 4, 6)
    plan = LogitsProcessorList([Plan({11: {3: boi, 6: EOS}}, prompt_length=3)])
    arguments = {"max_new_tokens": 8, "do_sample": False, "logits_processor": plan}
    draw = {"latents": torch.randn(1, 3, HEIGHT, WIDTH), **DRAWING}
    first = model.generate_interleaved(
        prompt, pixel_values=picture, draw_kwargs={**draw, "generator": seeded(0)}, **arguments
    )[0]
    other = model.generate_interleaved(
        prompt, pixel_values=picture + 1, draw_kwargs={**draw, "generator": seeded(0)}, **arguments
    )[0]
    assert [part.ndim for part in first] == [1, 3, 1]
    assert not torch.allclose(first[1], other[1])


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"num_return_sequences": 3}])
def test_interleaving_has_one_answer_per_prompt(make_model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        make_model().generate_interleaved(torch.tensor([[BOS, 11]]), **option)


def test_interleaving_ends_texts_at_the_tokens_asked_for(make_model, boi):
    model = make_model()
    plan = LogitsProcessorList([Plan({11: {2: 17, 4: EOS}})])
    arguments = {"draw_kwargs": DRAWING, "max_new_tokens": 7, "do_sample": False, "logits_processor": plan}
    for ends, length in ((17, 2), ([17], 2), (torch.tensor([17, EOS]), 2), (EOS, 4), (None, 4)):
        [[text]] = model.generate_interleaved(torch.tensor([[BOS, 11]]), eos_token_id=ends, **arguments)
        assert len(text) == length


def test_interleaved_answers_stay_within_the_context(make_model, boi):
    limit = len([BOS, 11, boi]) + PATCHES + len(["<eoi>"]) + 5
    model = make_model(text_config={"max_position_embeddings": limit})

    def answer(prompt, places):
        plan = LogitsProcessorList([Plan({11: places})])
        return model.generate_interleaved(
            torch.tensor([prompt]), max_new_tokens=50, do_sample=False, draw_kwargs=DRAWING, logits_processor=plan
        )[0]

    assert [len(part) for part in answer([BOS, 11], {0: boi}) if part.ndim == 1] == [0, 5]
    assert [part.ndim for part in answer([BOS, 11], {0: boi, 2: boi})] == [1, 3, 1]  # the second has no room
    with pytest.raises(ValueError, match=f"takes {limit} positions and leaves no room.*max_position_embeddings"):
        answer([BOS] + [11] * (limit - 1), {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU waits for nothing")
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_no_step_waits_for_the_device(make_model, scheduler_class):
    model = make_model(prediction_type="epsilon").to("cuda")
    scheduler = scheduler_class.from_config(model.default_scheduler().config)

    def watch(step, timestep, latents):
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")
        return latents

    prompt = torch.tensor([[BOS, 11, 12]], device="cuda")
    try:
        model.draw_images(prompt, **DRAWING, num_inference_steps=5, scheduler=scheduler, callback=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
