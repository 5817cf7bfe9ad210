from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList

from hf_mm.cm3leon import generation_cm3leon
from hf_mm.cm3leon.generation_cm3leon import close_gaps, draw_noise
from hf_mm.cm3leon.guidance_cm3leon import GuidedGenerationMixin
from hf_mm.cm3leon.logits_cm3leon import CodeSampling, ImageSpan, ImageSpanLogitsProcessor


class GuidedLlama(GuidedGenerationMixin, LlamaForCausalLM):
    pass


@pytest.fixture
def llama():
    config = LlamaConfig(
        vocab_size=53, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=28,
        max_position_embeddings=64, initializer_range=0.4, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return GuidedLlama(config).eval()


@pytest.fixture(params=["running", "grid", "rotary"])
def model(make_model, request):
    return make_model(image_positions=request.param)


@pytest.fixture
def running_model(make_model):
    return make_model()


@pytest.fixture
def grid_model(make_model):
    return make_model(image_positions="grid")


def prompts(model, *lengths, seed=0):
    """Random text prompts of these lengths behind `<eos>`, padded on the left, opening an image."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    rows = [torch.randint(10, 250, (length,), generator=generator) for length in lengths]
    width = max(lengths) + 2
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -len(row) - 2 :] = torch.tensor([config.eos_token_id, *row, config.break_token_id])
        mask[index, -len(row) - 2 :] = 1
    return ids, mask


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_rows(model):
    """Rows of every forward from now on."""
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


def greedy_both_ways(model, mask_value=0):
    """Guided greedy decoding by this project and by the library's two forwards, prompts and negatives of any length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 50, (3, 7), generator=generator)
    negative = torch.randint(10, 50, (3, 5), generator=generator)
    mask, negative_mask = torch.ones_like(ids), torch.ones_like(negative)
    mask[0, :4], mask[1, :1], negative_mask[1, :2], negative_mask[2, :3] = (mask_value,) * 4
    arguments = {
        "attention_mask": mask,
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": negative_mask,
        "guidance_scale": 2.5,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    return model.generate(ids, **arguments), GenerationMixin.generate(model, ids, **arguments)


@pytest.mark.parametrize("name", ["llama", "running_model", "grid_model"])
def test_guided_greedy_decoding_gives_the_tokens_of_the_librarys_two_forwards(name, request):
    model = request.getfixturevalue(name)
    guided, expected = greedy_both_ways(model)
    assert guided.shape == (3, 19) and torch.equal(guided, expected)
    assert len(guided[:, 7:].unique()) > 8


def test_least_lengths_are_counted_without_the_padding_of_longer_negative_prompts(llama):
    ids, negative = torch.randint(10, 50, (2, 3)), torch.randint(10, 50, (1, 8))
    arguments = {"guidance_scale": 3.0, "do_sample": False, "negative_prompt_ids": negative, "max_new_tokens": 9}
    first = llama.generate(ids, **arguments)[0, 3].item()
    ended = llama.generate(ids[:1], min_length=7, eos_token_id=first, **arguments)
    assert ended.shape[1] >= 7


def test_longer_negative_prompts_leave_no_trace_in_the_answer(llama):
    ids, negative = torch.randint(10, 50, (2, 3)), torch.randint(10, 50, (1, 8))
    arguments = {"guidance_scale": 3.0, "do_sample": False, "negative_prompt_ids": negative}
    guided = llama.generate(ids, max_new_tokens=6, **arguments)
    expected = GenerationMixin.generate(
        llama, ids, max_new_tokens=6, **{**arguments, "negative_prompt_ids": negative.expand(2, -1)}
    )
    assert torch.equal(guided, expected)
    assert torch.equal(llama.generate(ids, max_length=9, **arguments), expected)
    llama.generation_config.max_length = 9
    assert torch.equal(llama.generate(ids, **arguments), expected)
    assert torch.equal(llama.generate(ids, max_new_tokens=6, **arguments), expected)
    llama.generation_config.max_length = None
    settings = GenerationConfig(max_length=9, do_sample=False, guidance_scale=3.0, pad_token_id=0)
    own = llama.generate(ids, negative_prompt_ids=negative, generation_config=settings)
    assert torch.equal(own, expected)
    output = llama.generate(ids, max_new_tokens=6, return_dict_in_generate=True, output_scores=True, **arguments)
    assert torch.equal(output.sequences, expected) and output.scores[0].shape == (2, 53)


def test_a_guided_step_is_one_forward_of_twice_the_rows(llama):
    rows = count_rows(llama)
    greedy_both_ways(llama)
    assert rows[:12] == [6] * 12 and rows[12:] == [3] * 24


def test_text_without_a_mode_may_run_on_with_codes_beyond_an_image(model):
    """Nothing forbids it there, and codes beyond an image have no place in one."""
    config = model.config
    ids, _ = prompts(model, 3)
    others = [*range(config.first_image_token_id), *range(config.image_token_ids.stop, config.vocab_size)]
    longer = config.tokens_per_image + 3
    arguments = {"max_new_tokens": longer, "do_sample": False, "suppress_tokens": others, "eos_token_id": None}
    written = model.generate(ids, **arguments)[:, ids.shape[1] :]
    assert written.shape[1] == longer and model.image_span.is_code(written).all()


def test_guidance_of_one_is_plain_sampling_bit_for_bit(llama):
    ids, negative = torch.randint(10, 50, (3, 4)), torch.randint(10, 50, (3, 2))
    rows = count_rows(llama)
    outputs = []
    for arguments in ({}, {"guidance_scale": 1, "negative_prompt_ids": negative}, {"guidance_scale": 1.0}):
        torch.manual_seed(5)
        outputs.append(
            llama.generate(
                ids,
                do_sample=True,
                top_p=0.9,
                max_new_tokens=9,
                return_dict_in_generate=True,
                output_scores=True,
                **arguments,
            )  # fmt: skip
        )
    assert set(rows) == {3}
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        assert all(torch.equal(*pair) for pair in zip(output.scores, outputs[0].scores, strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_processors_and_several_sequences_work_behind_guidance(llama, scale):
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((len(input_ids), scores.shape))
            return scores

    ids = torch.randint(10, 50, (2, 4))
    sequences = llama.generate(
        ids, negative_prompt_ids=ids[:, :2], guidance_scale=scale, do_sample=True, repetition_penalty=1.2,
        num_return_sequences=3, max_new_tokens=4, logits_processor=LogitsProcessorList([Watch()]),
    )  # fmt: skip
    assert sequences.shape == (6, 8) and set(seen) == {(6, (6, 53))}


@pytest.mark.parametrize("name", ["llama", "running_model", "grid_model"])
def test_static_and_dynamic_caches_and_none_agree(name, request):
    model = request.getfixturevalue(name)
    ids, negative = torch.randint(10, 50, (2, 4)), torch.randint(10, 50, (2, 2))
    arguments = {"negative_prompt_ids": negative, "guidance_scale": 2.0, "do_sample": False, "max_new_tokens": 9}
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    dynamic, static, none = (
        model.generate(ids, attention_mask=mask, **arguments, **cache)
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    )
    assert torch.equal(dynamic, static) and torch.equal(dynamic, none)


def test_beams_with_guidance_are_refused(llama):
    ids = torch.randint(10, 50, (2, 4))
    with pytest.raises(ValueError, match="num_beams.*2"):
        llama.generate(ids, negative_prompt_ids=ids, guidance_scale=2.0, num_beams=2)


def naive_image(model, ids, mask, noise, scale, temperature=1.0, top_p=1.0, contrastive=None):
    """One image of one prompt: a forward of everything for each code and each stream, then the words of the paper."""
    config, row = model.config, ids[mask.bool()].tolist()
    other = [config.eos_token_id, config.first_sentinel_token_id, config.break_token_id]
    codes = []
    for value in noise.tolist():
        cond, uncond = (
            model(torch.tensor([prompt + codes])).logits[0, -1, config.first_image_token_id :][
                : config.image_vocab_size
            ]
            for prompt in (row, other)
        )
        if contrastive is None:
            scores = (uncond + scale * (cond - uncond)) / temperature
        else:
            k, alpha = contrastive
            p = cond.softmax(-1)
            is_plausible = p >= alpha * p.sort(descending=True).values[k - 1]
            scores = torch.where(is_plausible, cond.log_softmax(-1) - uncond.log_softmax(-1), -torch.inf) / temperature
        p = scores.double().softmax(-1)
        if top_p < 1:
            order = p.argsort(descending=True)
            num_kept = int((p[order].cumsum(-1) < top_p).sum()) + 1
            p = torch.zeros_like(p).scatter(0, order[:num_kept], p[order[:num_kept]])
        codes.append(int((p.cumsum(-1) <= value * p.sum()).sum()) + config.first_image_token_id)
    return codes


@pytest.mark.parametrize(
    ("fields", "naive"),
    [
        ({}, {"scale": 1.0}),
        ({"guidance_scale": 2.5}, {"scale": 2.5}),
        ({"guidance_scale": 2.5, "temperature": 0.7, "top_p": 0.6}, {"scale": 2.5, "temperature": 0.7, "top_p": 0.6}),
        (
            {"decoding": "contrastive", "contrastive_k": 3, "contrastive_alpha": 0.4, "top_p": 0.1},
            {"scale": 1.0, "contrastive": (3, 0.4)},
        ),
    ],
)
def test_images_are_those_of_a_naive_loop(model, fields, naive):
    ids, mask = prompts(model, 2, 5, 3)
    drawn = model.draw_images(ids, mask, sampling=CodeSampling(**fields), generator=seeded(0, 1, 2))
    for row, generator in enumerate(seeded(0, 1, 2)):
        noise = torch.rand(1, 16, generator=generator)[0]
        assert drawn[row].tolist() == naive_image(model, ids[row], mask[row], noise, **naive)


def test_first_rank_contrastive_greedy_images_are_those_of_contrastive_decoding(model):
    ids, mask = prompts(model, 4)
    sampling = CodeSampling(decoding="contrastive", contrastive_k=1, contrastive_alpha=0.1, do_sample=False)
    drawn, codes = model.draw_images(ids, mask, sampling=sampling)[0].tolist(), []
    config = model.config
    for _ in range(16):
        logits = [
            model(torch.tensor([row + codes])).logits[0, -1, config.first_image_token_id :][: config.image_vocab_size]
            for row in (ids[0].tolist(), model.unconditional_prompt())
        ]
        cond, uncond = (value.log_softmax(-1) for value in logits)
        score = (cond - uncond).masked_fill(cond.exp() < 0.1 * cond.exp().max(), -torch.inf)
        codes.append(int(score.argmax()) + config.first_image_token_id)
    assert drawn == codes


def test_what_a_prompt_gives_does_not_depend_on_the_prompts_beside_it(model):
    ids, mask = prompts(model, 2, 5, 3)
    sampling = CodeSampling(guidance_scale=2.5, decoding="mixed", contrastive_k=4, contrastive_alpha=0.2, top_p=0.9)
    together = model.draw_images(ids, mask, sampling=sampling, num_images_per_prompt=3, generator=seeded(7, 8, 9))
    for row, seed in ((2, 9), (0, 7)):
        alone = model.draw_images(
            *close_gaps(ids[row : row + 1], mask[row : row + 1]),
            sampling=sampling, num_images_per_prompt=3, generator=seeded(seed),
        )  # fmt: skip
        assert torch.equal(alone, together[3 * row : 3 * row + 3])
    assert len(together.unique(dim=0)) == 9


def test_one_generator_per_image_gives_each_its_own(model):
    ids, mask = prompts(model, 2, 5)
    images = model.draw_images(ids, mask, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    for row, seed in ((0, 1), (1, 2)):
        alone = model.draw_images(ids[row : row + 1], mask[row : row + 1], generator=seeded(seed))
        assert torch.equal(alone[0], images[seed])
    with pytest.raises(ValueError, match="generator.*3.*2 prompts.*4 pictures"):
        model.draw_images(ids, mask, num_images_per_prompt=2, generator=seeded(0, 1, 2))


def test_noise_of_one_generator_is_drawn_at_once():
    device = torch.device("cpu")
    noise = draw_noise(2, 6, 5, seeded(3)[0], device)
    assert torch.equal(noise, torch.rand(6, 5, generator=seeded(3)[0])) and noise.max() < 1 and noise.min() >= 0
    torch.manual_seed(3)
    assert torch.equal(draw_noise(2, 6, 5, None, device), noise)


def test_a_guided_code_is_one_forward_of_all_streams(model):
    ids, mask = prompts(model, 2, 5)
    rows = count_rows(model)
    model.draw_images(ids, mask, sampling=CodeSampling(guidance_scale=2), num_images_per_prompt=3)
    model.draw_images(ids, mask)
    other = torch.tensor([[[15, 16], [17, 18]]]).expand(2, -1, -1)
    model.draw_images(
        ids, mask, negative_input_ids=other, sampling=CodeSampling(guidance_scale=2, image_guidance_scale=2)
    )
    assert rows == [12] * 16 + [2] * 16 + [6] * 16


def test_the_images_of_a_prompt_share_its_reading(model):
    ids, mask = prompts(model, 2, 5)
    read, sampling = [], CodeSampling(guidance_scale=2)
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, given, output: read.append(given[0].numel())
    )
    model.draw_images(ids, mask, sampling=sampling, num_images_per_prompt=3)
    handle.remove()
    length = ids.shape[1]
    assert read == [4 * (length - 1)] + [12] * 16


def test_static_and_dynamic_caches_draw_alike(model):
    ids, mask = prompts(model, 2, 5)
    for scale in (1.0, 2.5):
        images = [
            model.draw_images(
                ids,
                mask,
                sampling=CodeSampling(guidance_scale=scale),
                generator=seeded(0, 1),
                cache_implementation=cache,
            )
            for cache in (None, "static")
        ]
        assert torch.equal(*images)


def test_a_saved_setting_for_text_does_not_touch_images(model):
    ids, mask = prompts(model, 3)
    plain = model.draw_images(ids, mask, generator=seeded(0))
    model.generation_config.update(
        guidance_scale=3.0, repetition_penalty=1.7, top_k=1, do_sample=True, min_new_tokens=40, num_return_sequences=1
    )
    assert torch.equal(model.draw_images(ids, mask, generator=seeded(0)), plain)


def test_three_streams_follow_the_image_and_the_text(model):
    ids, mask = prompts(model, 3)
    image, uncond = prompts(model, 2, seed=1)[0], torch.tensor([model.unconditional_prompt()])
    others = torch.stack([torch.nn.functional.pad(image, (0, 0)), torch.nn.functional.pad(uncond, (1, 0))], 1)
    other_mask = (others != 0).long()
    sampling = CodeSampling(guidance_scale=3.0, image_guidance_scale=1.5, do_sample=False)
    drawn = model.draw_images(
        ids, mask, negative_input_ids=others, negative_attention_mask=other_mask, sampling=sampling
    )[0].tolist()
    codes, config = [], model.config
    for _ in range(16):
        c, i, u = (model(torch.tensor([row.tolist() + codes])).logits[0, -1] for row in (ids[0], image[0], uncond[0]))
        scores = u + 1.5 * (i - u) + 3.0 * (c - i)
        scores = scores[config.first_image_token_id :][: config.image_vocab_size]
        codes.append(int(scores.argmax()) + config.first_image_token_id)
    assert drawn == codes


@pytest.mark.parametrize("image_positions", ["running", "grid", "rotary"])
def test_streams_whose_prompts_hold_codes_go_on_where_they_are(make_model, image_positions):
    """As in filling in a region: behind a sentinel in one stream, in the middle of the image in the other."""
    model = make_model(image_positions=image_positions)
    ids, mask = prompts(model, 3, 5)
    first = model.config.first_image_token_id
    others = torch.tensor([[*model.unconditional_prompt(), first + 3, first + 7, first + 7]]).expand(2, 1, -1)
    sampling = CodeSampling(guidance_scale=3.0, do_sample=False)
    span = replace(model.image_span, tokens_per_image=9)
    drawn = model.draw_images(ids, mask, negative_input_ids=others, sampling=sampling, span=span)
    for row in range(2):
        codes = []
        for _ in range(9):
            c, u = (
                model(torch.tensor([prompt.tolist() + codes])).logits[0, -1, first:][: model.config.image_vocab_size]
                for prompt in (ids[row][mask[row].bool()], others[row, 0])
            )
            codes.append(int((u + 3.0 * (c - u)).argmax()) + first)
        assert drawn[row].tolist() == codes


def test_given_codes_stand_and_the_others_follow_them(model):
    ids, mask = prompts(model, 3, 4)
    free = (
        model.draw_images(ids, mask, generator=seeded(0, 1), num_images_per_prompt=2)
        - model.config.first_image_token_id
    )
    given = torch.full((2, 16), -1)
    given[:, 5:9] = torch.tensor([1, 2, 3, 4])
    drawn = model.draw_images(ids, mask, generator=seeded(0, 1), num_images_per_prompt=2, given_codes=given)
    drawn = drawn - model.config.first_image_token_id
    assert torch.equal(drawn[:, :5], free[:, :5]) and (drawn[:, 5:9] == given[0, 5:9]).all()
    assert not torch.equal(drawn[:, 9:], free[:, 9:])


def test_a_callback_sees_every_code_and_may_stop_the_drawing(model):
    ids, mask = prompts(model, 2, 3)
    whole, seen = model.draw_images(ids, mask, generator=seeded(0, 1)), []
    cut = model.draw_images(
        ids, mask, generator=seeded(0, 1), callback=lambda number, ids: seen.append((number, ids)),
        should_stop=lambda: len(seen) == 6,
    )  # fmt: skip
    assert torch.equal(cut, whole[:, :6]) and [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(part, whole[:, :number]) for number, part in seen)


def test_prompts_are_opened_where_they_are_not(model):
    ids, mask = prompts(model, 2, 3)
    opened = model.draw_images(ids, mask, generator=seeded(0, 1))
    assert torch.equal(model.draw_images(ids[:, :-1], mask[:, :-1], generator=seeded(0, 1)), opened)
    ids[0, -1] = 11
    with pytest.raises(ValueError, match="some prompts end"):
        model.draw_images(ids, mask)


def test_prompts_that_leave_no_room_are_refused_with_the_length_that_fits(model):
    limit = model.config.max_position_embeddings
    ids, mask = prompts(model, limit - 16 - 2, 3)
    assert model.draw_images(ids, mask).shape == (2, 16)
    with pytest.raises(ValueError, match=f"{limit - 15} positions.*16.*{limit}.*Shorten.* {limit - 16} "):
        model.draw_images(*prompts(model, limit - 16 - 1, 3))


def test_more_candidates_than_memory_holds_are_refused_with_the_number_that_fits(model, monkeypatch):
    ids, mask = prompts(model, 3, 5)
    monkeypatch.setattr(generation_cm3leon, "free_memory", lambda device: 1_000_000)
    with pytest.raises(ValueError, match=r"num_candidates`=500 for each of 2 prompts .* so (\d+) fit") as caught:
        model.draw_images(ids, mask, num_images_per_prompt=500)
    number = int(str(caught.value).split(" so ")[1].split()[0])
    assert 2 < number < 200
    assert model.draw_images(ids, mask, num_images_per_prompt=number).shape == (2 * number, 16)
    with pytest.raises(ValueError, match=f"{number} fit"):
        model.draw_images(ids, mask, num_images_per_prompt=number + 1)
    with pytest.raises(ValueError, match="fit"):  # guidance takes twice the cache
        model.draw_images(ids, mask, num_images_per_prompt=number, sampling=CodeSampling(guidance_scale=2))


def test_free_memory_is_a_number_of_bytes():
    assert generation_cm3leon.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt.*0"),
        ({"sampling": {"decoding": "contrastive", "contrastive_k": 10**4, "contrastive_alpha": 0.5}}, "contrastive_k.*10000.*vocabulary of"),
        ({"negative_input_ids": torch.zeros(2, 2, 3), "sampling": {"guidance_scale": 2}}, "negative_input_ids.*2, 2, 3.*2, 1"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(model, arguments, match):
    if "sampling" in arguments:
        arguments = {**arguments, "sampling": CodeSampling(**arguments["sampling"])}
    with pytest.raises(ValueError, match=match):
        model.draw_images(*prompts(model, 2, 3), **arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": False}, {"guidance_scale": 2.0, "temperature": 0.1}])
def test_a_model_whose_scores_are_broken_draws_nothing_rather_than_code_0(model, value, sampling):
    place = model.config.first_image_token_id + 5

    def break_scores(module, args, output):
        output[..., place] = value

    model.lm_head.register_forward_hook(break_scores)
    with pytest.raises(FloatingPointError, match="image codes.*NaN or infinity"):
        model.draw_images(*prompts(model, 2, 3), sampling=CodeSampling(**sampling))


class Favour(LogitsProcessor):
    """Makes some tokens much likelier."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        scores[:, self.tokens] += 30
        return scores


def test_interleaved_documents_hold_whole_images_and_text_between_them(model):
    config = model.config
    ids, mask = prompts(model, 2, 5, 3)
    favour = Favour(config.break_token_id, *config.image_token_ids)
    documents = model.generate_interleaved(
        ids[:, :-1], mask[:, :-1], max_images=2, max_new_tokens=5, do_sample=True,
        logits_processor=LogitsProcessorList([favour]),
        draw_kwargs={"sampling": CodeSampling(guidance_scale=2.0)},
    )  # fmt: skip
    for parts in documents:
        images = [part for part in parts if part.ndim == 2]
        assert len(images) == 2 and parts[0].ndim == parts[2].ndim == 1
        for image in images:
            assert image.shape == (1, 16) and model.image_span.is_code(image).all()
        for text in parts[::2]:
            assert not model.image_span.is_code(text).any()


def test_interleaving_is_drawing_behind_what_was_written(model):
    config = model.config
    ids, mask = prompts(model, 4)
    favour = LogitsProcessorList([Favour(config.break_token_id, *config.image_token_ids)])
    parts = model.generate_interleaved(
        ids, mask, max_images=2, do_sample=False, logits_processor=favour, draw_kwargs={"generator": seeded(0)[0]}
    )[0]
    assert [len(part) for part in parts[::2]] == [0, 1, 1]
    assert torch.equal(parts[1], model.draw_images(ids, mask, generator=seeded(0)[0]))
    behind = torch.cat([ids, parts[1]], -1)
    expected = GenerationMixin.generate(
        model, behind, do_sample=False, max_new_tokens=2,
        logits_processor=LogitsProcessorList([*favour, ImageSpanLogitsProcessor(model.image_span)]),
    )[0, behind.shape[1] :]  # fmt: skip
    assert expected[0] == parts[2][0] == config.break_token_id and model.image_span.is_code(expected[1])
    generator = seeded(0)[0]
    torch.rand(16, generator=generator)  # the first image's
    behind = torch.cat([behind, parts[2][None]], -1)
    assert torch.equal(parts[3], model.draw_images(behind, generator=generator))


def test_a_document_ends_where_the_model_ends_it(model):
    ids, mask = prompts(model, 2, 5)
    parts = model.generate_interleaved(
        ids, mask, do_sample=False, logits_processor=LogitsProcessorList([Favour(model.config.eos_token_id)])
    )
    assert [[len(part) for part in row] for row in parts] == [[0], [0]]


def test_no_image_begins_where_there_is_no_room(model):
    limit = model.config.max_position_embeddings
    ids, mask = prompts(model, limit - 16 - 2, 3)
    favour = LogitsProcessorList([Favour(*model.config.image_token_ids)])
    parts = model.generate_interleaved(ids, mask, do_sample=True, logits_processor=favour)
    assert all(part.ndim == 1 for row in parts for part in row)
    with pytest.raises(ValueError, match=f"{limit} positions.*no room"):
        model.generate_interleaved(*prompts(model, limit - 2))


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_interleaving_has_one_answer_per_prompt(model, name):
    with pytest.raises(ValueError, match=f"{name}.*2"):
        model.generate_interleaved(*prompts(model, 2), **{name: 2})


def test_modes_of_generate_write_text_or_draw(model):
    config = model.config
    ids, mask = prompts(model, 2, 3)
    torch.manual_seed(0)
    text = model.generate(ids, attention_mask=mask, generation_mode="text", do_sample=True, max_new_tokens=60)
    written = text[:, ids.shape[1] :]
    assert not model.image_span.is_code(written).any()
    sentinels = range(config.first_sentinel_token_id, config.first_sentinel_token_id + config.num_sentinel_tokens)
    assert not set(written.flatten().tolist()) & {*sentinels, config.image_token_id}
    config.drawing_temperature = 0.4
    for asked in ({}, {"guidance_scale": 1.0, "do_sample": False}, {"guidance_scale": 2.0, "top_p": 0.5}):
        settings = {"guidance_scale": config.drawing_guidance_scale, "temperature": 0.4, **asked}
        expected = model.draw_images(ids, mask, sampling=CodeSampling(**settings), generator=seeded(0, 1))
        arguments = {"attention_mask": mask, "generation_mode": "image", "generator": seeded(0, 1), **asked}
        assert torch.equal(model.generate(ids, **arguments), expected)
    with pytest.raises(ValueError, match="`sampling` is given, and .'top_p'. beside it"):
        model.generate(ids, generation_mode="image", sampling=CodeSampling(), top_p=0.5)
    with pytest.raises(ValueError, match="generation_mode.*audio"):
        model.generate(ids, generation_mode="audio")


def test_text_mode_never_parts_the_document_and_interleaving_does(model):
    config, (ids, mask) = model.config, prompts(model, 2, 5)
    favour = LogitsProcessorList([Favour(config.break_token_id)])
    arguments = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 9, "logits_processor": favour}
    text = model.generate(ids, generation_mode="text", **arguments)
    assert not (text[:, ids.shape[1] :] == config.break_token_id).any()
    parts = model.generate_interleaved(ids, **arguments)
    assert any((part == config.break_token_id).any() for row in parts for part in row)


def test_plain_generate_is_the_librarys_but_for_the_placeholder(model):
    ids, mask = prompts(model, 2, 3)
    outputs = []
    for generate in (model.generate, lambda *args, **kwargs: GenerationMixin.generate(model, *args, **kwargs)):
        torch.manual_seed(0)
        outputs.append(
            generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                max_new_tokens=19,
                suppress_tokens=[model.config.image_token_id],
            )
        )
    assert torch.equal(*outputs)
    assert model.image_span.is_code(outputs[0][:, ids.shape[1] :]).any()


def test_pictures_of_a_prompt_become_codes_once(model):
    config = model.config
    pixels = torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1
    placeholders = [config.image_token_id] * 16
    ids = torch.tensor([[config.eos_token_id, *placeholders, config.break_token_id, 11, config.break_token_id]] * 2)
    codes = model.encode_images(pixels)
    placed = ids.clone()
    placed[:, 1:17] = codes
    text = [
        model.generate(prompt, do_sample=False, max_new_tokens=5, num_return_sequences=2, num_beams=2, **images)
        for prompt, images in ((ids, {"pixel_values": pixels}), (placed, {}))
    ]
    assert torch.equal(*text) and torch.equal(text[0][::2, 1:17], codes)
    images = [
        model.draw_images(prompt, generator=seeded(0, 1), **images)
        for prompt, images in ((ids, {"pixel_values": pixels}), (placed, {}))
    ]
    assert torch.equal(*images)


def test_gaps_are_closed_in_order():
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]])
    ids, mask = close_gaps(ids, mask)
    assert (
        ids.shape == (2, 3)
        and ids[mask.bool()].tolist() == [2, 4, 6, 7, 8]
        and mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    )


def test_spans_know_their_codes():
    span = ImageSpan(11, 7, 3, (5,), (6,))
    assert span.is_code(torch.arange(20)).nonzero().flatten().tolist() == list(range(11, 18))


@pytest.mark.parametrize("lengths", [(4,), (2, 7)])
def test_answers_end_with_the_context_whatever_is_asked_for(model, lengths):
    ids, mask = prompts(model, *lengths)
    limit, width = model.config.max_position_embeddings, ids.shape[1]
    write = partial(model.generate, ids, attention_mask=mask, eos_token_id=-1)
    room = limit - int(mask.sum(-1).max())
    most = {"max_new_tokens": room + 9}
    for asked in (most, {"max_length": limit + 99}, {**most, "min_new_tokens": room + 5}):
        assert write(**asked).shape[1] == width + room
    assert write(max_new_tokens=3, stopping_criteria=None).shape[1] == width + 3
    longer = prompts(model, 3 * max(lengths))[0]
    written = write(negative_prompt_ids=longer, guidance_scale=2.0, **most)
    assert written.shape[1] == width + limit - longer.shape[1]
