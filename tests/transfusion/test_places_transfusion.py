"""Attention by place: what is alike in two pictures, and what text and running positions keep."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration
from hf_mm.transfusion.places_transfusion import PlaceRotaryEmbedding, add_places, grid_places, patch_places


HEAD_DIM, SIDE = 32, 8


@pytest.fixture
def rotary():
    text_config = LlamaConfig(hidden_size=2 * HEAD_DIM, num_attention_heads=2, vocab_size=64)
    config = TransfusionConfig(
        text_config=text_config, image_size=2 * SIDE, boi_token_id=3, eoi_token_id=4, image_token_id=5
    )
    return PlaceRotaryEmbedding(config, LlamaRotaryEmbedding(text_config))


def slower_half(vectors):
    """The pairs that rotate by place; the members of a pair stand half a head apart."""
    return torch.cat([half[..., HEAD_DIM // 4 :] for half in vectors.split(HEAD_DIM // 2, dim=-1)], dim=-1)


def two_pictures(gap):
    is_image = torch.tensor([[False, *[True] * SIDE**2, *[False] * gap, *[True] * SIDE**2]])
    return is_image, add_places(None, is_image, grid_places(SIDE, SIDE).repeat(1, 2))


@pytest.mark.parametrize("gap", [1, 40])
def test_equal_queries_and_keys_fit_best_at_the_same_place_however_far_apart(rotary, gap):
    is_image, position_ids = two_pictures(gap)
    same = torch.ones(1, 1, is_image.shape[1], HEAD_DIM)
    query, key = apply_rotary_pos_emb(same, same, *rotary(same, position_ids))
    number = SIDE**2
    query, key = slower_half(query[0, 0, -number:]), slower_half(key[0, 0, 1 : 1 + number])
    scores = query @ key.T
    assert (scores.argmax(-1) == torch.arange(number)).all()
    torch.testing.assert_close(scores.diagonal(), torch.full((number,), float(HEAD_DIM // 2)))  # not rotated at all
    ahead = scores.topk(2).values
    assert (ahead[:, 0] - ahead[:, 1] > 1).all()


def test_the_faster_half_is_the_backbones_own(rotary):
    is_image, position_ids = two_pictures(3)
    like = torch.zeros(1, is_image.shape[1], 1)
    for own, theirs in zip(rotary(like, position_ids), rotary.running(like, position_ids[0]), strict=True):
        for start in (0, HEAD_DIM // 2):
            kept = slice(start, start + HEAD_DIM // 4)
            torch.testing.assert_close(own[..., kept], theirs[..., kept], rtol=0, atol=0)
            assert (own != theirs)[..., start + HEAD_DIM // 4 : start + HEAD_DIM // 2].any()


def test_text_is_nowhere_in_a_picture(rotary):
    is_image, position_ids = two_pictures(3)
    like = torch.zeros(1, is_image.shape[1], 1)
    cos, sin = (slower_half(table)[~is_image] for table in rotary(like, position_ids))
    assert (cos == 1).all() and (sin == 0).all()
    for own, theirs in zip(
        rotary(like, position_ids[0]), rotary(like, position_ids * 0 + position_ids[0]), strict=True
    ):
        assert own.shape == theirs.shape  # text alone comes with running positions alone
    cos, sin = map(slower_half, rotary(like, position_ids[0]))
    assert (cos == 1).all() and (sin == 0).all()


def test_rows_and_columns_of_pictures_of_different_sizes():
    is_image = torch.tensor([[True] * 6 + [False] * 2, [False] + [True] * 3 + [False] + [True] * 2 + [False]])
    places = patch_places(torch.Size([3, 4, 6, 6]), torch.tensor([[4, 6], [6, 2], [2, 4]]), patch_size=2)
    running, rows, columns = add_places(torch.arange(8)[None], is_image, places)
    assert running.tolist() == [list(range(8))] * 2
    assert rows.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 2, 0, 0, 0, 0]]
    assert columns.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]]


def test_a_loaded_model_rotates_as_the_saved_one(make_model, tmp_path):
    model = make_model(patch_positions="rotary")
    model.save_pretrained(tmp_path)
    loaded = TransfusionForConditionalGeneration.from_pretrained(tmp_path).eval()
    config, latents = model.config, torch.randn(2, 3, 4, 4)
    ids = [2, 11, config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id] * 2
    inputs = {"input_ids": torch.tensor([ids]), "latents": latents}
    expected = model(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    plain = make_model(patch_positions="grid")
    plain.load_state_dict(model.state_dict())
    assert (plain(**inputs).logits - expected).abs().max() > 1e-3
