import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_mm.data.text_tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train_text_tokenizer


TEXTS = [f"a {color} {shape} left of a blue square" for color in ("red", "green") for shape in ("star", "heart")] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_text_tokenizer(iter(TEXTS), 283)


def any_text(seed: int) -> str:
    draw = random.Random(seed)
    points = [draw.choice([draw.randrange(0x20), draw.randrange(0x250), draw.randrange(0x11000)]) for _ in range(61)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@pytest.mark.parametrize("seed", range(20))
def test_any_text_survives_unchanged(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    text = any_text(seed)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["", " two  blanks ", "it 's , odd .", "e\u0301 is not é", "👩🏽‍🚀\n", "a\u0000b"])
def test_odd_text_survives_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_their_ids_and_names(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == list(range(6))
        assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
        assert (loaded.boi_token_id, loaded.eoi_token_id, loaded.image_token_id) == (3, 4, 5)
        assert loaded.padding_side == "left"
        assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
        assert loaded("a <boi><image><eoi>")["input_ids"][-3:] == [3, 5, 4]


def test_frequent_words_become_tokens_and_bytes_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 283
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2
    assert tokenizer.unk_token is None


def test_min_frequency_limits_the_merges() -> None:
    assert len(train_text_tokenizer(TEXTS, 283, min_frequency=1000)) == MIN_VOCAB_SIZE


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`vocab_size`=261 must be at least 262: 256 bytes and 6 special tokens"):
        train_text_tokenizer(TEXTS, 261)
    assert len(train_text_tokenizer(TEXTS, 262)) == 262
