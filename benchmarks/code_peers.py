"""Models of transformers over text and image tokens, and ours, with decoders of one size and random weights.

All have the same width, layers and heads, a text vocabulary of 2,048 and, where images are codes, 8,192 codes beside
it. Their image encoders are as small as they can be, so that what is timed is the decoder.
"""

from typing import Any

from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
)

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration
from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration


CODEBOOK = 8192
TEXT_TOKENS = 2048
PAD, BOS, EOS, BOI, EOI, IMAGE = range(6)  # text ids, and where a family has no place of its own
FIRST_TEXT = 6
FIRST_CODE = TEXT_TOKENS
SIDE = 12  # image tokens along each side of an image
HEAD_DIM = 64
VQ_STRIDE = 4  # pixels per code
JANUS_STRIDE = 16  # pixels per vector of its vision encoder
PATCH_SIZE = 2  # of Transfusion, on pixels


def gated_sizes(hidden_size: int, num_layers: int, max_positions: int) -> dict[str, Any]:
    """Sizes of a gated decoder with as many weights as CM3Leon's, whose feed-forward layers are not gated."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": round(8 * hidden_size / 3),
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_DIM,
        "num_key_value_heads": hidden_size // HEAD_DIM,
        "max_position_embeddings": max_positions,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def build_cm3leon(hidden_size: int, num_layers: int, max_positions: int) -> CM3LeonForConditionalGeneration:
    """Builds CM3Leon."""
    last = TEXT_TOKENS + CODEBOOK
    vq_config = {
        "block_out_channels": [16, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 8,
        "num_vq_embeddings": CODEBOOK,
        "sample_size": VQ_STRIDE * SIDE,
    }
    config = CM3LeonConfig(
        vocab_size=last + 5,
        image_vocab_size=CODEBOOK,
        first_image_token_id=FIRST_CODE,
        break_token_id=last,
        eoss_token_id=last + 1,
        image_token_id=last + 2,
        first_sentinel_token_id=last + 3,
        num_sentinel_tokens=2,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=max_positions,
        image_size=VQ_STRIDE * SIDE,
        vq_config=vq_config,
    )
    return CM3LeonForConditionalGeneration(config)


def build_transfusion(
    hidden_size: int, num_layers: int, max_positions: int, side: int = SIDE
) -> TransfusionForConditionalGeneration:
    """Builds Transfusion on raw pixels, with `side` patches along each side of an image."""
    config = TransfusionConfig(
        text_config={
            "model_type": "llama",
            **gated_sizes(hidden_size, num_layers, max_positions),
            "vocab_size": TEXT_TOKENS,
        },
        image_size=PATCH_SIZE * side,
        patch_size=PATCH_SIZE,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMAGE,
    )
    return TransfusionForConditionalGeneration(config)


def build_emu3(hidden_size: int, num_layers: int, max_positions: int) -> Emu3ForConditionalGeneration:
    """Builds Emu3, its image tokenizer as small as it goes: it is given codes."""
    codes = {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODEBOOK)}
    config = Emu3Config(
        text_config={
            **gated_sizes(hidden_size, num_layers, max_positions),
            "vocab_size": TEXT_TOKENS + CODEBOOK + 5,
            "attention_dropout": 0.0,
        },
        vq_config={"codebook_size": CODEBOOK, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32},
        vocabulary_map={**codes, "<image>": IMAGE, "<|extra_200|>": BOI},
    )
    return Emu3ForConditionalGeneration(config)


def build_chameleon(hidden_size: int, num_layers: int, max_positions: int) -> ChameleonForConditionalGeneration:
    """Builds Chameleon."""
    codes = {f"IMGIMG{spell_code(code)}Z": FIRST_CODE + code for code in range(CODEBOOK)}
    config = ChameleonConfig(
        **gated_sizes(hidden_size, num_layers, max_positions),
        vocab_size=TEXT_TOKENS + CODEBOOK + 5,
        vq_config={
            "num_embeddings": CODEBOOK,
            "embed_dim": 8,
            "latent_channels": 8,
            "resolution": VQ_STRIDE * SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_type": "none",
        },
        vocabulary_map={**codes, "<image>": IMAGE},
    )
    return ChameleonForConditionalGeneration(config)


def spell_code(code: int) -> str:
    """Spells a code as Chameleon's vocabulary does, digits as letters from A."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))


def build_janus(hidden_size: int, num_layers: int, max_positions: int) -> JanusForConditionalGeneration:
    """Builds Janus."""
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            **gated_sizes(hidden_size, num_layers, max_positions),
            "vocab_size": TEXT_TOKENS,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": JANUS_STRIDE * SIDE,
            "num_image_tokens": SIDE**2,
            "projection_dim": hidden_size,
        },
        vq_config={
            "num_embeddings": CODEBOOK,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "projection_dim": hidden_size,
            "image_token_embed_dim": hidden_size,
        },
        image_token_id=IMAGE,
    )
    return JanusForConditionalGeneration(config)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Finds the layers of a model's decoder: the longest list of modules with an attention of their own."""
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(
        (part for part in found if len(part) and "self_attn" in dict(part[0].named_children())),
        key=lambda part: sum(weight.numel() for weight in part.parameters()),
    )
