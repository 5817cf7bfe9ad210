"""Trains the text tokenizer: byte-level BPE with the special tokens of text-and-image documents in place.

Knows strings only. Any text survives encoding and decoding unchanged, since every byte is a token.
"""

import copy
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# In the order of their ids, from 0.
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "image_token": "<image>",
}
END_OF_CAPTION = "<end_of_caption>"
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on texts.

    Args:
        texts (`Iterable[str]`): The texts; read once.
        vocab_size (`int`): Largest number of tokens, special tokens and the 256 bytes included. Few or uniform texts
            may give fewer: `len(tokenizer)` is the number there is.
        min_frequency (`int`): How often a pair of tokens must occur to become a token.

    Returns:
        `PreTrainedTokenizerFast`: adds no special tokens by itself and pads on the left; has `boi_token`, `eoi_token`
        and `image_token` with their ids.

    Raises:
        ValueError: If `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"`vocab_size`={vocab_size} must be at least {MIN_VOCAB_SIZE}: {NUM_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    named = ("pad_token", "bos_token", "eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: SPECIAL_TOKENS[name] for name in named},
        extra_special_tokens={name: token for name, token in SPECIAL_TOKENS.items() if name not in named},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_text_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, adding to one of a text model the tokens of images, and one for padding where there is none.

    Args:
        name_or_path (`str`): Folder or Hub id, of `train_text_tokenizer` or of a text model such as Llama.

    Returns:
        `PreTrainedTokenizerBase`: ids that it had stay as they are; pads on the left.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if "image_token" in tokenizer.special_tokens_map:
        return tokenizer
    names = ("boi_token", "eoi_token", "image_token")
    added: dict[str, Any] = {"extra_special_tokens": {name: SPECIAL_TOKENS[name] for name in names}}
    if tokenizer.pad_token is None:
        added["pad_token"] = SPECIAL_TOKENS["pad_token"]
    return AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **added)


def end_captions(tokenizer: PreTrainedTokenizerFast, max_length: int) -> PreTrainedTokenizerFast:
    """Makes a tokenizer for text encoders that read a caption off its last token, as transformers' `CLIPTextModel`.

    That token must occur nowhere else, so it is a new one, `<end_of_caption>`. As the last of the vocabulary it is
    found in either way in which `CLIPTextModel` looks for it: where `eos_token_id` is 2, as in tokenizers of
    [`train_text_tokenizer`], the model takes the token with the highest id, and else the first `eos_token_id`.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Any; not changed.
        max_length (`int`): Tokens that the encoder reads; longer captions are cut in front of the last token.

    Returns:
        `PreTrainedTokenizerFast`: puts that token, its `eos_token`, behind every text, and `bos_token` before it where
        there is one; pads on the right.
    """
    ending = copy.deepcopy(tokenizer)
    ending.add_special_tokens({"eos_token": END_OF_CAPTION})
    ending.padding_side, ending.truncation_side, ending.model_max_length = "right", "right", max_length
    start = [] if ending.bos_token is None else [ending.bos_token]
    single = " ".join([*start, "$A", END_OF_CAPTION])
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{single} $B {END_OF_CAPTION}",
        special_tokens=[(token, ending.convert_tokens_to_ids(token)) for token in (*start, END_OF_CAPTION)],
    )
    return ending
