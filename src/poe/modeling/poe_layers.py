"""The layers of a PoE base: rotary positions, attention, MLP, and later additions of nanochat.

`config` is a `PoEConfig`. It is not imported, because two remote-code files can get two different classes of it. A
layer owns its parameters, so it can be stacked or skipped.
Shape letters: B batch, T tokens, D hidden size, H heads, K key-value heads, E head dimension, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without parameters over the last dimension; torch computes it in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def require_size(size: int | None) -> int:
    """Return a size that `PoEConfig` has set."""
    assert size is not None
    return size


class PoERMSNorm(nn.Module):
    """`rms_norm` as a module without weights, so that `model.norm` can be found and hooked."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


class PoERotaryEmbedding(nn.Module):
    """Map positions (B, T) to cosines and sines (B, T, E/2). The checkpoint has no weights of it."""

    inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = require_size(config.head_dim)
        self.theta = config.rope_theta
        self.register_buffer("inv_freq", self._frequencies(), persistent=False)

    def _frequencies(self, device: torch.device | None = None) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float().to(x.device)  # (B, T, E/2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (B, H, T, E) by cosines and sines (B, 1, T, E/2); the two halves of E are pairs."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention of (B, H, T, E) on (B, K, S, E); return (B, T, H, E) and the weights (B, H, T, S)."""
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(
        scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), p=dropout, training=module.training
    )
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PoEAttention(nn.Module):
    """Causal self-attention with grouped queries; queries and keys are rotated, then normalized."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = require_size(config.head_dim)
        heads, key_value_heads = config.num_attention_heads, require_size(config.num_key_value_heads)
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = config.attention_logit_scale * self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        # a new layer computes the identity
        self.o_proj.initial_scale = 0.0  # type: ignore[assignment]
        sliding = config.layer_types is not None and config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.value_embed: nn.Embedding | None = None
        self.value_gate: nn.Linear | None = None
        if layer_idx in (config.value_embedding_layers or ()):
            self.value_embed = nn.Embedding(config.vocab_size, key_value_heads * self.head_dim)
            self.value_gate = nn.Linear(config.value_gate_channels, key_value_heads, bias=False)

    def _value(self, hidden_states: Tensor, input_ids: Tensor | None) -> Tensor:
        """Return values (B, T, K, E), plus the token's value embedding if this layer has one."""
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        if self.value_embed is None:
            return value
        assert self.value_gate is not None
        if input_ids is None:
            raise ValueError("a base with value embeddings needs input_ids: inputs_embeds are not enough")
        gate = self.value_gate(hidden_states[..., : self.value_gate.in_features]).sigmoid()  # (B, T, K)
        embedded = self.value_embed(input_ids).to(value.dtype).view_as(value)
        return value + (self.config.value_gate_scale * gate)[..., None] * embedded

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H, T, E)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)  # (B, K, T, E)
        value = self._value(hidden_states, input_ids).transpose(1, 2)
        cos, sin = (t.unsqueeze(1) for t in position_embeddings)
        eps = self.config.rms_norm_eps
        query = rms_norm(apply_rotary(query, cos, sin), eps)
        key = rms_norm(apply_rotary(key, cos, sin), eps)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class PoEMLP(nn.Module):
    """`down(relu(up(x)) ** 2)` (Primer, arXiv 2109.08668)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, require_size(config.intermediate_size), bias=False)
        self.down_proj = nn.Linear(require_size(config.intermediate_size), config.hidden_size, bias=False)
        self.down_proj.initial_scale = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class PoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream (B, T, D).

    With scalars the layer's input becomes `resid_scale * input + first_scale * first_hidden`.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = PoEAttention(config, layer_idx)
        self.mlp = PoEMLP(config)
        self.resid_scale: nn.Parameter | None = nn.Parameter(torch.ones(1)) if config.layer_scalars else None
        self.first_scale: nn.Parameter | None = nn.Parameter(torch.zeros(1)) if config.layer_scalars else None

    def forward(
        self,
        hidden_states: Tensor,
        first_hidden: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.resid_scale is not None and self.first_scale is not None and first_hidden is not None:
            dtype = hidden_states.dtype
            hidden_states = self.resid_scale.to(dtype) * hidden_states + self.first_scale.to(dtype) * first_hidden
        attended, _ = self.self_attn(rms_norm(hidden_states, self.eps), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(rms_norm(hidden_states, self.eps))


class PoESmear(nn.Module):
    """Add to each position `scale * sigmoid(gate)` times the previous embedding.

    The earlier embeddings are in a cache slot of their own after those of the layers, as keys of one head, so that
    cropping and reordering the cache apply to them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, has_previous: Tensor, cache: Cache | None, slot: int) -> Tensor:
        """Map `x` (B, T, D) to the same shape. `has_previous` (B or 1, T) is False where a document begins."""
        previous = x
        if cache is not None:
            while len(cache.layers) <= slot:
                cache.layers.append(DynamicLayer())
            previous = cache.update(x[:, None], x[:, None, :, :0], slot)[0][:, 0]  # (B, S, D)
        previous = F.pad(previous, (0, 0, 1, 0))[:, -1 - x.shape[1] : -1]
        share = self.scale.to(x.dtype) * self.gate(x[..., : self.gate.in_features]).sigmoid()  # (B, T, 1)
        return x + share * previous * has_previous[..., None]
