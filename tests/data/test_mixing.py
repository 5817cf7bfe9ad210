import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from hf_mm.data.mixing import DocumentArguments, StepSampler, build_content, document_share, sample_generator


PAIR = {"image": object(), "text": "a kite"}


def keys_of(sampler, num_batches):
    return list(itertools.islice(iter(sampler), num_batches))


def test_all_processes_together_draw_what_one_process_draws():
    alone = keys_of(StepSampler(11, 6, seed=3, batches_per_step=2), 8)
    halves = [
        keys_of(StepSampler(11, 3, seed=3, batches_per_step=2, process_index=index, num_processes=2), 8)
        for index in range(2)
    ]
    assert [first + second for first, second in zip(*halves, strict=True)] == alone


@pytest.mark.parametrize("step", [1, 5, 17])
def test_a_run_goes_on_at_any_step_with_the_same_samples(step):
    arguments = {"num_text_rows": 5, "text_document_share": 0.3, "batches_per_step": 2}
    whole = keys_of(StepSampler(11, 3, 7, **arguments), 2 * (step + 4))
    assert keys_of(StepSampler(11, 3, 7, first_step=step, **arguments), 8) == whole[2 * step :]


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own():
    numbers = [key.row for batch in keys_of(StepSampler(11, 11, seed=3), 3) for key in batch]
    epochs = [numbers[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_another_seed_gives_another_order():
    first, second = ([key.row for key in keys_of(StepSampler(29, 29, seed=seed), 1)[0]] for seed in (1, 2))
    assert first != second


def test_sample_numbers_run_without_gaps():
    sampler = StepSampler(7, 4, seed=0)
    assert [key.number for batch in keys_of(sampler, 5) for key in batch] == list(range(20))


def test_text_rows_have_their_share_and_are_spread_evenly():
    sampler = StepSampler(11, 100, seed=3, num_text_rows=7, text_document_share=0.3)
    keys = keys_of(sampler, 10)
    for batch in keys:
        assert sum(key.source == 1 for key in batch) in (29, 30, 31)
    texts = [key.row for batch in keys for key in batch if key.source == 1]
    assert sorted(texts[:7]) == list(range(7)) and sorted(texts[7:14]) == list(range(7))
    pairs = [key.row for batch in keys for key in batch if key.source == 0]
    assert sorted(pairs[:11]) == list(range(11))


def test_without_text_rows_every_sample_is_a_pair():
    assert all(key.source == 0 for key in keys_of(StepSampler(5, 50, seed=0, text_document_share=0.5), 1)[0])


def test_weights_set_how_often_a_row_is_drawn_and_change_for_the_last_part():
    weights = [np.array([1.0, 0.0, 3.0]), np.array([0.0, 1.0, 0.0])]
    sampler = StepSampler(3, 1000, seed=3, weights=weights, final_step=4)
    batches = keys_of(sampler, 6)
    counts = Counter(key.row for batch in batches[:4] for key in batch)
    assert set(counts) == {0, 2} and 0.72 < counts[2] / 4000 < 0.78
    assert {key.row for batch in batches[4:] for key in batch} == {1}


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="num_rows.*0"):
        StepSampler(0, 3, seed=0)


def test_token_shares_become_document_shares():
    share = document_share(0.3, mean_text_tokens=210, mean_pair_tokens=70)
    assert share * 210 / (share * 210 + (1 - share) * 70) == pytest.approx(0.3)


def test_samples_have_generators_of_their_own():
    draws = {
        (seed, number): torch.rand(3, generator=sample_generator(seed, number))
        for seed in range(3)
        for number in range(50)
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 150
    assert torch.equal(draws[1, 7], torch.rand(3, generator=sample_generator(1, 7)))


def layouts(arguments, count=4000, row=None):
    kinds = Counter()
    for number in range(count):
        content, cap = build_content(row or PAIR, arguments, sample_generator(0, number))
        kinds[tuple(part["type"] for part in content), cap] += 1
    return kinds


def test_orders_dropout_and_cap_have_their_shares():
    kinds = layouts(DocumentArguments(image_first_share=0.2, caption_dropout=0.25, noise_cap=500))
    assert set(kinds) == {(("image", "text"), 500), (("image",), None), (("text", "image"), None)}
    assert 0.18 < kinds[("image", "text"), 500] / 4000 < 0.22
    assert 0.18 < kinds[("image",), None] / 4000 < 0.22  # a quarter of the other four fifths
    assert kinds[("image", "text"), None] == 0


def test_shares_of_nought_and_one_leave_one_layout():
    assert set(layouts(DocumentArguments(image_first_share=0, caption_dropout=0), 50)) == {(("text", "image"), None)}
    assert set(layouts(DocumentArguments(image_first_share=1), 50)) == {(("image", "text"), None)}
    assert set(layouts(DocumentArguments(image_first_share=0, caption_dropout=1), 50)) == {(("image",), None)}


def test_documents_stay_as_they_stand_and_text_rows_are_text():
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": 1}, {"type": "text", "text": "b"}]
    assert build_content({"content": content}, DocumentArguments(), sample_generator(0, 0)) == (content, None)
    text = build_content({"text": "alone"}, DocumentArguments(), sample_generator(0, 0))
    assert text == ([{"type": "text", "text": "alone"}], None)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"image_first_share": 1.2}, "image_first_share"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
        ({"text_token_share": 1}, "text_token_share"),
        ({"text_token_share": 0}, "text_token_share"),
        ({"noise_cap": 0}, "noise_cap"),
    ],
)
def test_shares_out_of_range_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=f"{name}.*{fields[name]}"):
        DocumentArguments(**fields)
