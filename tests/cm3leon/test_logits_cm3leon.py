import pytest
import torch
from transformers.generation import LogitsProcessorList, TopPLogitsWarper

from hf_mm.cm3leon.logits_cm3leon import (
    CodeSampling,
    CodesLogitsProcessor,
    DrawTokenLogitsProcessor,
    FoldStreamsLogitsProcessor,
    ForbidTokensLogitsProcessor,
    GivenTokensLogitsProcessor,
    ImageSpan,
    ImageSpanLogitsProcessor,
    SomeRowsLogitsProcessor,
    TemperLogitsProcessor,
    contrastive_top_k,
    guide_logits,
    temper,
)


# Ids 0-4 text, 5 opens, 6 closes, 7 also closes, 11-17 codes, 18-19 text; images of 3 codes.
SPAN = ImageSpan(11, 7, 3, opening_token_ids=(5,), closing_token_ids=(6, 7))
ALWAYS = ImageSpan(11, 7, 3, opening_token_ids=(5,), closing_token_ids=(6,), always_opens=True)
CODES = set(range(11, 18))
TEXT = set(range(20)) - CODES


def allowed(span, row, max_length=None):
    scores = ImageSpanLogitsProcessor(span, max_length)(torch.tensor([row]), torch.zeros(1, 20))
    return set((scores[0] == 0).nonzero().flatten().tolist())


def naive_contrastive(cond, uncond, k, alpha, temperature):
    """One row, one token at a time, from the words of the paper and of the readings."""
    p_cond = [torch.exp(value) for value in cond.double().log_softmax(-1)]
    p_uncond = (uncond.double() / temperature).softmax(-1)
    possible = sorted((p for p in p_cond if p > 0), reverse=True)
    bar = possible[min(k, len(possible)) - 1]
    scores = []
    for token, p in enumerate(p_cond):
        is_plausible = p > 0 and p >= alpha * bar
        scores.append(torch.log(p) - torch.log(p_uncond[token]) if is_plausible else torch.tensor(-torch.inf))
    return torch.stack(scores).float()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.1), (2, 1.0), (5, 0.3), (13, 0.0), (13, 1.0)])
def test_contrastive_scores_agree_with_a_naive_loop_with_ties(k, alpha, temperature):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        # Few different values make many ties, at the bar too; a third of the tokens is impossible in some rows.
        cond, uncond = torch.randint(-2, 3, (2, 4, 13), generator=generator).float()
        impossible = torch.rand(4, 13, generator=generator) < torch.tensor([[0.0], [0.0], [0.3], [0.9]])
        impossible[:, 3] = False
        cond = cond.masked_fill(impossible, -torch.inf)
        scores = contrastive_top_k(cond, uncond, k=k, alpha=alpha, amateur_temperature=temperature)
        expected = torch.stack(
            [naive_contrastive(*row, k, alpha, temperature) for row in zip(cond, uncond, strict=True)]
        )
        torch.testing.assert_close(scores, expected)
        assert (scores > -torch.inf).any(-1).all()


def test_with_the_first_rank_it_is_contrastive_decoding():
    cond, uncond = torch.randn(2, 5, 31)
    p_cond, p_uncond = cond.softmax(-1), uncond.softmax(-1)
    is_plausible = p_cond >= 0.1 * p_cond.amax(-1, keepdim=True)
    expected = torch.where(is_plausible, p_cond.log() - p_uncond.log(), -torch.inf)
    torch.testing.assert_close(contrastive_top_k(cond, uncond, k=1, alpha=0.1), expected)
    assert contrastive_top_k(cond, uncond, k=1, alpha=1.0).argmax(-1).equal(cond.argmax(-1))


def test_what_the_amateur_holds_impossible_can_be_drawn():
    cond, uncond = torch.randn(2, 1, 5)
    uncond[0, 2] = -torch.inf
    scores = contrastive_top_k(cond, uncond, k=5, alpha=0.0)
    assert scores.isfinite().all() and scores.softmax(-1).isfinite().all() and scores.argmax() == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"k": 0}, "k.*0"),
        ({"k": 8}, "k.*8.*vocabulary.*7"),
        ({"alpha": -0.1}, "alpha.*-0.1"),
        ({"alpha": 1.1}, "alpha.*1.1"),
        ({"amateur_temperature": 0}, "amateur_temperature.*0"),
        ({"amateur_temperature": float("inf")}, "amateur_temperature.*inf"),
        ({"uncond_logits": torch.zeros(2, 7)}, r"cond_logits.*\(3, 7\).*\(2, 7\)"),
    ],
)
def test_contrastive_settings_out_of_range_are_refused(arguments, match):
    arguments = {
        "cond_logits": torch.zeros(3, 7),
        "uncond_logits": torch.zeros(3, 7),
        "k": 1,
        "alpha": 0.5,
        **arguments,
    }
    with pytest.raises(ValueError, match=match):
        contrastive_top_k(**arguments)


def test_guidance_of_two_and_three_streams_is_the_papers_sum():
    cond, image, uncond = streams = torch.randn(3, 5, 7)
    torch.testing.assert_close(guide_logits(streams[::2], [3.0]), uncond + 3 * (cond - uncond))
    expected = uncond + 1.5 * (image - uncond) + 7.5 * (cond - image)
    torch.testing.assert_close(guide_logits(streams, [7.5, 1.5]), expected)


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_scales_of_one_give_the_first_stream_bit_for_bit(num_streams):
    streams = torch.randn(num_streams, 5, 7) * 1e4
    assert torch.equal(guide_logits(streams, [1] * (num_streams - 1)), streams[0])
    folded = FoldStreamsLogitsProcessor([1.0] * (num_streams - 1))(torch.zeros(5, 3), streams.flatten(0, 1))
    assert torch.equal(folded, streams[0])


def test_excluded_tokens_stay_excluded_by_guidance_and_are_never_nan():
    streams = torch.randn(2, 3, 7)
    streams[:, :, 2] = -torch.inf
    guided = guide_logits(streams, [2.0])
    assert (guided[:, 2] == -torch.inf).all() and guided[:, [0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("num_streams", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_another_stream_forbids_is_guided_to_and_never_nan(num_streams, dtype):
    streams = torch.randn(num_streams, 3, 7).to(dtype)
    streams[-1, :, 2], streams[1, :, 5], streams[0, :, 4], streams[:, :, 6] = (-torch.inf,) * 4
    guided = guide_logits(streams, [2.0, 3.0][: num_streams - 1])
    assert guided.dtype == torch.float32 and not guided.isnan().any()
    assert (guided[:, [4, 6]] == -torch.inf).all() and guided[:, [0, 1, 2, 3, 5]].isfinite().all()
    assert (guided.softmax(-1)[:, [0, 1, 3]] == 0).all()  # the prompt alone makes the two possible
    # Among those, the conditional stream still tells which is the better.
    only = torch.full((num_streams, 1, 2), -torch.inf)
    only[:-1] = torch.tensor([3.0, 2.0])
    assert guide_logits(only, [2.0, 1.0][: num_streams - 1]).diff() < -0.9


EXTREMES = torch.tensor([-torch.inf, -3e38, -1e30, -1e5, -1.0, 0.0, 1.0, 1e5, 1e30, 3e38])


@pytest.mark.parametrize("temperature", [1e-45, 1e-3, 0.4, 1.0, 1e30])
@pytest.mark.parametrize(
    ("scales", "contrastive"),
    [
        ([7.5], None),
        ([1e30], None),
        ([3.0, 1e30], None),
        ([1.0], {"k": 1, "alpha": 0.0}),
        ([1.0], {"k": 3, "alpha": 0.5}),
        ([1.0], {"k": 9, "alpha": 0.1, "amateur_temperature": 1e-45}),
        ([1.0], {"k": 9, "alpha": 0.1, "amateur_temperature": 1e30}),
    ],
)
def test_extreme_scores_are_never_nan_and_what_is_drawn_is_possible(temperature, scales, contrastive):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, len(EXTREMES), (len(scales) + 1, 200, 11), generator=generator)
    index[0, :, 3] = 5
    streams, ids = EXTREMES[index], torch.zeros(200, 1)
    folded = FoldStreamsLogitsProcessor(scales, contrastive)(ids, streams.flatten(0, 1))
    scores = TemperLogitsProcessor(temperature)(ids, folded)
    assert not folded.isnan().any() and not scores.isnan().any()
    assert (scores.amax(-1) == 0).all() and (scores[streams[0] == -torch.inf] == -torch.inf).all()
    out = DrawTokenLogitsProcessor(torch.rand(200, 1, generator=generator), 1)(ids, scores)
    drawn = out.argmax(-1, keepdim=True)
    assert (out > -torch.inf).sum() == 200 and (scores.gather(1, drawn) > -torch.inf).all()


def test_contrastive_scores_survive_low_temperatures():
    """Two tokens are possible for the expert alone: one of them is drawn, and the likelier one much oftener."""
    cond, uncond = torch.tensor([[0.2, 0.1, 0.5, 0.2]]).log(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    scores = contrastive_top_k(cond, uncond, k=4, alpha=0.0)
    shares = TemperLogitsProcessor(0.5)(torch.zeros(1, 1), scores).softmax(-1)[0]
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.0, 25 / 29, 4 / 29]), atol=5e-3, rtol=0)


def test_temperatures_divide_scores():
    scores = torch.randn(3, 7)
    scores[:, 2] = -torch.inf
    torch.testing.assert_close(temper(scores, 0.3).softmax(-1), (scores / 0.3).softmax(-1))
    assert (temper(torch.full((2, 3), -torch.inf), 0.3) == -torch.inf).all()


def test_rows_of_a_mix_are_those_of_either_way():
    scores, ids = torch.randn(2 * 4, 7), torch.zeros(4, 3)
    settings = {"k": 2, "alpha": 0.5}
    rows = torch.tensor([False, True, False, True])
    mixed = FoldStreamsLogitsProcessor([2.0], settings, rows)(ids, scores)
    assert torch.equal(mixed[::2], FoldStreamsLogitsProcessor([2.0])(ids, scores)[::2])
    assert torch.equal(mixed[1::2], FoldStreamsLogitsProcessor([2.0], settings)(ids, scores)[1::2])
    top_p = SomeRowsLogitsProcessor(TopPLogitsWarper(0.3), rows)(ids, scores[:4])
    assert torch.equal(top_p[::2], scores[:4:2])
    assert torch.equal(top_p[1::2], TopPLogitsWarper(0.3)(ids[1::2], scores[1:4:2]))


def test_half_of_the_candidates_of_each_prompt_are_contrastive_in_a_mix():
    sampling = CodeSampling(decoding="mixed", contrastive_k=2, contrastive_alpha=0.5)
    for num_candidates, expected in [(1, [0]), (2, [0, 1]), (5, [0, 0, 0, 1, 1]), (8, [0] * 4 + [1] * 4)]:
        fold = sampling.processors(3 * num_candidates, num_candidates, torch.device("cpu"))[0]
        assert fold.contrastive_rows.int().tolist() == expected * 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 1], TEXT),
        ([0, 5], TEXT | CODES),
        ([0, 5, 11], CODES),
        ([5, 11, 17], CODES),
        ([5, 11, 17, 12], {6, 7}),
        ([5, 11, 17, 12, 6], TEXT),
        ([1, 5, 11, 17, 12, 7, 1], TEXT),
        ([14], CODES),
        ([14, 14, 14], {6, 7}),
        ([5, 13, 13, 13, 7, 5, 12], CODES),
    ],
)
def test_images_stand_where_they_may_and_are_as_long_as_they_are(row, expected):
    assert allowed(SPAN, row) == expected


def test_where_an_image_always_follows_its_opening_nothing_else_does():
    assert allowed(ALWAYS, [0, 5]) == CODES
    assert allowed(ALWAYS, [5, 11, 12, 13]) == {6}
    assert allowed(ALWAYS, [0, 1]) == TEXT


def test_no_image_begins_that_would_not_be_closed_in_time():
    assert allowed(SPAN, [0, 5], max_length=6) == TEXT | CODES  # 3 codes and the token behind
    assert allowed(SPAN, [0, 5], max_length=5) == TEXT
    assert 5 in allowed(ALWAYS, [0], max_length=6) and 5 not in allowed(ALWAYS, [0], max_length=5)


def test_random_walks_hold_whole_images_only():
    generator = torch.Generator().manual_seed(0)
    for span in (SPAN, ALWAYS):
        processor = ImageSpanLogitsProcessor(span, max_length=60)
        ids = torch.randint(0, 5, (16, 2), generator=generator)
        while ids.shape[1] < 60:
            scores = torch.randn(16, 20, generator=generator)
            scores[:, 5] += 3
            scores = processor(ids, scores)
            ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], -1)
        spelled = ["".join("c" if 11 <= token < 18 else "o" if token == 5 else "." for token in row) for row in ids]
        assert sum(row.count("occc.") + row.count("occco") for row in spelled) > 16
        for row in spelled:
            assert "c" not in row.replace("occc", "o")
            assert span is SPAN or row.count("o") == row.count("occc")


def test_allowed_scores_are_untouched_in_every_stream():
    ids = torch.tensor([[0, 1], [0, 5], [5, 11]])
    scores = torch.randn(2 * 3, 20)
    out = ImageSpanLogitsProcessor(SPAN)(ids, scores)
    kept = out > -torch.inf
    assert torch.equal(out[kept], scores[kept]) and torch.equal(kept[:3], kept[3:])


def test_forbidden_ranges_spare_exceptions():
    out = ForbidTokensLogitsProcessor([range(2, 5), range(7, 8)], exceptions=(3,))(torch.zeros(2, 1), torch.ones(2, 9))
    assert (out == -torch.inf).any(0).nonzero().flatten().tolist() == [2, 4, 7]


def test_given_tokens_stand_in_their_places():
    given = torch.tensor([[-1, 4], [2, -1]])
    processor, scores = GivenTokensLogitsProcessor(given, prompt_length=3), torch.randn(4, 7)
    for length, forced in ((3, {1: 2}), (4, {0: 4}), (5, {})):
        out = processor(torch.zeros(2, length), scores).unflatten(0, (2, 2))
        for row in range(2):
            kept = (out[:, row] > -torch.inf).any(0).nonzero().flatten().tolist()
            assert kept == ([forced[row]] if row in forced else list(range(7)))


def test_codes_are_shown_alone_and_left_alone():
    seen = []

    def inner(ids, scores):
        seen.append(scores)
        return scores[:2]

    scores = torch.randn(4, 20)
    out = CodesLogitsProcessor(SPAN, inner)(torch.zeros(2, 1), scores)
    assert torch.equal(seen[0], scores[:, 11:18]) and torch.equal(out[:, 11:18], scores[:2, 11:18])
    assert (out[:, :11] == -torch.inf).all() and (out[:, 18:] == -torch.inf).all()


def test_drawn_tokens_follow_the_distribution_and_skip_what_is_impossible():
    scores = torch.tensor([0.5, 0.0, 0.2, 0.0, 0.3, 0.0]).log().expand(20000, -1)
    noise = torch.rand(20000, 1)
    drawn = DrawTokenLogitsProcessor(noise, 2)(torch.zeros(20000, 2), scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=6) / 20000
    torch.testing.assert_close(shares, scores[0].exp(), atol=0.012, rtol=0)
    assert not shares[[1, 3, 5]].any()


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24])
def test_the_ends_of_the_noise_draw_possible_tokens(noise):
    scores = torch.randn(64, 8192) * 5
    scores[:, :7] = scores[:, -7:] = -torch.inf
    out = DrawTokenLogitsProcessor(torch.full((64, 1), noise), 1)(torch.zeros(64, 1), scores)
    drawn = out.argmax(-1)
    assert (out > -torch.inf).sum() == 64 and (scores.gather(1, drawn[:, None]) > -torch.inf).all()
    if noise == 0.5:
        before = scores.double().softmax(-1).cumsum(-1).gather(1, drawn[:, None])
        assert ((before - 0.5).abs() <= scores.double().softmax(-1).gather(1, drawn[:, None]) + 1e-5).all()


def test_impossible_tokens_are_not_drawn_where_sums_are_rounded_another_way(monkeypatch):
    exact = torch.Tensor.cumsum

    def rounded(tensor, dim):  # as on devices that add up in parallel
        return exact(tensor, dim) + 1e-2 * torch.rand_like(tensor)

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    scores = torch.randn(500, 31).masked_fill(torch.rand(500, 31) < 0.7, -torch.inf)
    scores[:, 17] = 0.0
    drawn = DrawTokenLogitsProcessor(torch.rand(500, 1), 1)(torch.zeros(500, 1), scores).argmax(-1, keepdim=True)
    assert (scores.gather(1, drawn) > -torch.inf).all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale.*0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale.*nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale.*inf"),
        ({"temperature": float("inf")}, "temperature.*inf"),
        ({"image_guidance_scale": 0}, "image_guidance_scale.*0"),
        ({"guidance_scale": 10**400}, "guidance_scale.*10{400} .*not finite"),
        ({"temperature": 10**400}, "temperature.*10{400} .*finite"),
        ({"temperature": 0}, "temperature.*0.*do_sample"),
        ({"top_k": 0}, "top_k.*0"),
        ({"top_p": 0}, "top_p.*0"),
        ({"top_p": 1.5}, "top_p.*1.5"),
        ({"decoding": "beam"}, "decoding.*beam.*mixed"),
        ({"decoding": "contrastive"}, "contrastive_k"),
        ({"decoding": "mixed", "contrastive_k": 0, "contrastive_alpha": 0.5}, "`contrastive_k`=0"),
        ({"contrastive_k": 3}, "`contrastive_k`=3 has no effect.*top_p.*decoding"),
        (
            {"decoding": "mixed", "contrastive_k": 1, "contrastive_alpha": 0.5, "image_guidance_scale": 2},
            "image_guidance_scale.*2",
        ),
    ],
)
def test_settings_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        CodeSampling(**fields)


def test_streams_are_those_that_the_settings_need():
    contrastive = {"decoding": "contrastive", "contrastive_k": 1, "contrastive_alpha": 0.1}
    assert CodeSampling().scales == ()
    assert CodeSampling(guidance_scale=2).scales == (2,)
    assert CodeSampling(guidance_scale=2, image_guidance_scale=3).scales == (2, 3)
    assert CodeSampling(image_guidance_scale=3).scales == (1, 3)
    assert CodeSampling(**contrastive).scales == (1,)
    assert isinstance(CodeSampling().processors(1, 1, torch.device("cpu")), LogitsProcessorList)
