"""The PoE base: a plain decoder in the shape of nanochat (github.com/karpathy/nanochat), as a transformers model.

RoPE, then QK-norm; RMSNorm without parameters; relu^2 MLP; grouped-query attention; no biases; an untied head whose
logits are soft-capped. Configuration and model share one file on purpose: two remote-code files can end up as two
different classes. Shape letters: B batch, T tokens, D hidden size, H heads, K key-value heads, E head dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs


class PoEConfig(PreTrainedConfig):
    """Configuration of a PoE base.

    `attention_logit_scale` multiplies the usual `head_dim ** -0.5`: after QK-norm a logit cannot exceed
    `attention_logit_scale * head_dim ** 0.5`, so this number sets how sharp attention can become (older nanochat
    checkpoints use 1.0, newer ones 1.2 ** 2).
    """

    model_type = "poe"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    attention_logit_scale: float = 1.0
    final_logit_softcapping: float | None = 15.0
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without parameters over the last dimension, computed in fp32 by torch."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def derived(size: int | None) -> int:
    """A size that `PoEConfig` fills in when it is left out."""
    assert size is not None
    return size


class PoERMSNorm(nn.Module):
    """`rms_norm` as a module, so that `model.norm` can be found and hooked. It holds no weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


class PoERotaryEmbedding(nn.Module):
    """Cosines and sines for positions (B, T) -> two tensors (B, T, E/2); nothing is kept in the checkpoint."""

    inv_freq: Tensor

    def __init__(self, config: PoEConfig) -> None:
        super().__init__()
        self.head_dim = derived(config.head_dim)
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
    """Rotate `x` (B, H, T, E) by cosines and sines (B, 1, T, E/2); the two halves of E are a pair."""
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
    """Plain attention: (B, H, T, E) x (B, K, S, E) -> (B, T, H, E) and the weights (B, H, T, S)."""
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
    """Causal self-attention with grouped queries: rotate, then normalise queries and keys."""

    def __init__(self, config: PoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = derived(config.head_dim)
        heads, key_value_heads = config.num_attention_heads, derived(config.num_key_value_heads)
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = config.attention_logit_scale * self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        # a new layer is the identity
        self.o_proj.initial_scale = 0.0  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H, T, E)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)  # (B, K, T, E)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
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
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class PoEMLP(nn.Module):
    """`down(relu(up(x)) ** 2)` (Primer, arXiv 2109.08668)."""

    def __init__(self, config: PoEConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, derived(config.intermediate_size), bias=False)
        self.down_proj = nn.Linear(derived(config.intermediate_size), config.hidden_size, bias=False)
        self.down_proj.initial_scale = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class PoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream (B, T, D)."""

    def __init__(self, config: PoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = PoEAttention(config, layer_idx)
        self.mlp = PoEMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(rms_norm(hidden_states, self.eps), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(rms_norm(hidden_states, self.eps))


class PoEPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities shared by the backbone and the causal model."""

    config_class = PoEConfig
    config: PoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PoEDecoderLayer, "attentions": PoEAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices of variance 1/inputs, zero output projections, a small head, unit embeddings.

        By leaf: transformers skips modules of remote code that hold no parameters themselves.
        """
        if isinstance(module, PoERotaryEmbedding):
            module.inv_freq.copy_(module._frequencies(module.inv_freq.device))
        elif isinstance(module, nn.Linear):
            bound = getattr(module, "initial_scale", 1.0) * (3 / module.in_features) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


class PoEModel(PoEPreTrainedModel):
    """The backbone: token ids (B, T) -> normalised hidden states (B, T, D)."""

    def __init__(self, config: PoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = PoERMSNorm(config.rms_norm_eps)
        self.rotary_emb = PoERotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        mask: Any = attention_mask
        if not isinstance(mask, dict):
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            mask = mask["full_attention"]

        # The embedding is normalised before the first layer, as in nanochat.
        hidden_states = rms_norm(inputs_embeds, self.config.rms_norm_eps)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class PoEForCausalLM(PoEPreTrainedModel, GenerationMixin):
    """The base with its head: `logits = cap * tanh(W norm(x) / cap)`, (B, T, V)."""

    def __init__(self, config: PoEConfig) -> None:
        super().__init__(config)
        self.model = PoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.initial_scale = 0.01
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` (B, T) as everywhere in transformers: not shifted, -100 is ignored; the loss is in nats."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
