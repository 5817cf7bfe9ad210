"""Which blocks a decoder is made of: CM3Leon's own, or those of the library's Chameleon, for comparison.

Knows what the library's modules ask of a configuration; the blocks themselves are elsewhere.
"""

from typing import Any, cast

from torch import nn
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonAttention,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
    ChameleonSwinDecoderLayer,
)

from .configuration_cm3leon import CM3LeonConfig
from .layers_cm3leon import CM3LeonAttention, CM3LeonDecoderLayer, PositionEmbedding, build_norm


# Layer and attention by `decoder_block`.
BLOCK_CLASSES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "cm3leon": (CM3LeonDecoderLayer, CM3LeonAttention),
    "chameleon": (ChameleonSwinDecoderLayer, ChameleonAttention),
}

ROPE_THETA = 10_000.0  # the base of Chameleon's rotary positions, and of the Llama that Transfusion is made of


class ChameleonFields:
    """A configuration of CM3Leon under the names that the library's Chameleon modules read.

    The kind of attention is looked up each time, since it may change while a model lives.

    Args:
        config ([`CM3LeonConfig`]): Of the model.
    """

    attention_bias = mlp_bias = False
    attention_dropout = 0.0
    model_parallel_size = 1

    def __init__(self, config: CM3LeonConfig) -> None:
        self.model_config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.num_attention_heads = self.num_key_value_heads = config.num_attention_heads
        self.max_position_embeddings, self.hidden_act = config.max_position_embeddings, config.hidden_act
        self.rms_norm_eps = config.layer_norm_eps
        self.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}

    @property
    def _attn_implementation(self) -> str | None:
        return self.model_config._attn_implementation


def build_positions(config: CM3LeonConfig) -> tuple[PositionEmbedding | None, nn.Module | None]:
    """Builds what tells a decoder running positions: a table that is added, or what finds the angles of rotations."""
    if config.decoder_block == "chameleon":
        return None, ChameleonRotaryEmbedding(cast(Any, ChameleonFields(config)))
    return PositionEmbedding(config.max_position_embeddings, config.hidden_size), None


def build_blocks(config: CM3LeonConfig) -> tuple[nn.ModuleList, nn.Module]:
    """Builds the blocks that `decoder_block` names, and the norm behind them.

    Args:
        config ([`CM3LeonConfig`]): Of the model.

    Source: CM3Leon (arXiv 2309.02591), section 2.3; Chameleon (arXiv 2405.09818), section 2.3, whose norms stand
    behind attention and feed-forward in its 34B model, and in the baseline of Transfusion (arXiv 2408.11039, section
    4).
    """
    block, _ = BLOCK_CLASSES[config.decoder_block]
    fields: Any = config if config.decoder_block == "cm3leon" else ChameleonFields(config)
    layers = nn.ModuleList(block(fields, index) for index in range(config.num_hidden_layers))
    if config.decoder_block == "chameleon":
        return layers, ChameleonRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return layers, build_norm(config)
