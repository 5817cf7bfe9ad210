"""The blocks of CM3Leon's decoder: attention and feed-forward without biases, behind norms without weights.

Know hidden states, masks and caches; neither ids nor images.
"""

# Axes: B rows, L sequence, D hidden.

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cm3leon import CM3LeonConfig
from .packing_cm3leon import attend_within_documents
from .places_cm3leon import PlaceRotation


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends by plain matrix products, for every attention weight to be seen."""
    weights = query @ key.transpose(2, 3) * scaling  # (B, heads, L, past + L)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream: told apart because it begins at zero."""


class PositionEmbedding(nn.Embedding):
    """The learned positions: told apart because they begin smaller than other weights."""


class CM3LeonAttention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, config: CM3LeonConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = ResidualProjection(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        place_rotation: PlaceRotation | None = None,
        document_lengths: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads `hidden_states` behind what the cache holds; returns them and, eager, the attention weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        if place_rotation is not None:
            query, key = place_rotation.rotate(query, key)
        if document_lengths is not None:
            output = attend_within_documents(query, key, value, document_lengths, self.scaling)
            return self.o_proj(output.flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class CM3LeonMLP(nn.Module):
    """Two linear layers without biases around an activation."""

    def __init__(self, config: CM3LeonConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the layers to each position by itself."""
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class CM3LeonDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a layer norm without weights."""

    def __init__(self, config: CM3LeonConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.self_attn = CM3LeonAttention(config, layer_idx)
        self.mlp_norm = build_norm(config)
        self.mlp = CM3LeonMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Adds both parts to the residual stream, of shape `(B, L, D)`."""
        hidden_states = hidden_states + self.self_attn(self.attention_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def build_norm(config: CM3LeonConfig) -> nn.LayerNorm:
    """Builds a layer norm with neither weight nor bias. Source: CM3Leon, section 2.3."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
