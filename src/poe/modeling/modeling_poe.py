"""The PoE base: a plain decoder in the shape of nanochat (github.com/karpathy/nanochat), as a transformers model.

RoPE, then QK-norm; RMSNorm without parameters; relu^2 MLP; grouped-query attention; no biases; an untied head whose
logits are soft-capped. What nanochat added over time is a value in the config: value embeddings with gates, scalars of
each layer, sliding windows, smear, backout. A layer owns all that is its own, so that it can be stacked or left out.
Configuration and model share one file on purpose: two remote-code files can end up as two different classes.
Shape letters: B batch, T tokens, D hidden size, H heads, K key-value heads, E head dimension, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
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

    Off unless said: `layer_scalars` gives every layer a scale of the residual stream and one of the first hidden state;
    `value_embedding_layers` are the layers that add `value_gate_scale * sigmoid(gate)` times an embedding of the token
    to their values, the gate reading the first `value_gate_channels` channels (ResFormer, arXiv 2410.17897);
    `layer_types` and `sliding_window` as everywhere in transformers; `smear_channels` lets each position take up a
    share of the embedding before it, decided by that many channels; `backout_layer` is the layer whose output is
    subtracted, scaled, before the final norm (also below a stage: it stays where it is when layers are stacked).

    `stage_layers`, such as [12, 5, 4, 3], cuts the layers into stages: after each of them the final norm and the head
    make a prediction (PoE local learning trains every stage by its own). `stage_heads` gives every stage a head of its
    own that is added to the shared one. `combiner` says which prediction the model returns: that of the last stage, or
    with "log_op" the normalised mean of all stages' log-probabilities.
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
    layer_scalars: bool = False
    value_embedding_layers: list[int] | None = None
    value_gate_channels: int = 12
    value_gate_scale: float = 3.0
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    smear_channels: int | None = None
    backout_layer: int | None = None
    stage_layers: list[int] | None = None
    stage_heads: bool = False
    combiner: str = "last"
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
        stages = self.stage_layers
        if stages is not None and (min(stages, default=0) < 1 or sum(stages) != self.num_hidden_layers):
            raise ValueError(f"stage_layers {stages} should be positive and sum to {self.num_hidden_layers} layers")
        if self.combiner not in ("last", "log_op"):
            raise ValueError(f"combiner should be 'last' or 'log_op', got {self.combiner!r}")

    @property
    def boundaries(self) -> list[int]:
        """The number of layers below each prediction, the last one being all of them."""
        return list(accumulate(self.stage_layers or [self.num_hidden_layers]))


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
        sliding = config.layer_types is not None and config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.value_embed: nn.Embedding | None = None
        self.value_gate: nn.Linear | None = None
        if layer_idx in (config.value_embedding_layers or ()):
            self.value_embed = nn.Embedding(config.vocab_size, key_value_heads * self.head_dim)
            self.value_gate = nn.Linear(config.value_gate_channels, key_value_heads, bias=False)

    def _value(self, hidden_states: Tensor, input_ids: Tensor | None) -> Tensor:
        """Values (B, T, K, E), the token's own embedding added where this layer has one."""
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

    def __init__(self, config: PoEConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, derived(config.intermediate_size), bias=False)
        self.down_proj = nn.Linear(derived(config.intermediate_size), config.hidden_size, bias=False)
        self.down_proj.initial_scale = 0.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class PoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream (B, T, D).

    With scalars the layer first makes its input `resid_scale * input + first_scale * first_hidden`.
    """

    def __init__(self, config: PoEConfig, layer_idx: int) -> None:
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
    """Adds to each position `scale * sigmoid(gate)` times the embedding before it: a cheap look at the last token.

    The embeddings seen so far lie in a cache slot of their own after those of the layers, as keys of one head, so that
    cropping and reordering the cache reach them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, has_previous: Tensor, cache: Cache | None, slot: int) -> Tensor:
        """`x` (B, T, D); `has_previous` (B or 1, T), False where a document begins."""
        previous = x
        if cache is not None:
            while len(cache.layers) <= slot:
                cache.layers.append(DynamicLayer())
            previous = cache.update(x[:, None], x[:, None, :, :0], slot)[0][:, 0]  # (B, S, D)
        previous = F.pad(previous, (0, 0, 1, 0))[:, -1 - x.shape[1] : -1]
        share = self.scale.to(x.dtype) * self.gate(x[..., : self.gate.in_features]).sigmoid()  # (B, T, 1)
        return x + share * previous * has_previous[..., None]


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
        elif isinstance(module, PoEDecoderLayer) and module.resid_scale is not None and module.first_scale is not None:
            nn.init.ones_(module.resid_scale)
            nn.init.zeros_(module.first_scale)
        elif isinstance(module, PoESmear):
            nn.init.zeros_(module.scale)
        elif isinstance(module, PoEModel) and module.backout_scale is not None:
            nn.init.constant_(module.backout_scale, 0.2)


@dataclass
class PoEModelOutput(BaseModelOutputWithPast):
    """`stage_states` are the normalised hidden states (B, T, D) at every boundary, where the combiner reads them."""

    stage_states: tuple[Tensor, ...] | None = None


class PoEModel(PoEPreTrainedModel):
    """The backbone: token ids (B, T) -> normalised hidden states (B, T, D)."""

    def __init__(self, config: PoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = PoERMSNorm(config.rms_norm_eps)
        self.smear = PoESmear(config.smear_channels) if config.smear_channels else None
        self.backout_scale: nn.Parameter | None = None
        if config.backout_layer is not None:
            self.backout_scale = nn.Parameter(torch.full((1,), 0.2))
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
    ) -> PoEModelOutput:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        voting = self.config.combiner == "log_op"
        states = tuple(
            self.stages(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                boundaries=self.config.boundaries if voting else [self.config.num_hidden_layers],
                **kwargs,
            )
        )
        return PoEModelOutput(
            last_hidden_state=states[-1],
            past_key_values=past_key_values if use_cache else None,
            stage_states=states if voting else None,
        )

    def stages(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        boundaries: list[int],
        detach: bool = False,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the normalised hidden states (B, T, D) after each of `boundaries` (numbers of layers), one at a time.

        The layers above run when the next is asked for. With `detach` no gradient crosses a boundary, so that each
        state can be learnt from before the next is made, and only one stage's graph exists at a time.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        kinds = self.config.layer_types or ["full_attention"] * self.config.num_hidden_layers
        masks: Any = attention_mask
        if not isinstance(masks, dict):
            makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {
                kind: makers[kind](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for kind in dict.fromkeys(kinds)
            }

        # The embedding is normalised before the first layer, as in nanochat.
        hidden_states = rms_norm(inputs_embeds, self.config.rms_norm_eps)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.smear is not None:
            slot = self.config.num_hidden_layers
            hidden_states = self.smear(hidden_states, position_ids > 0, past_key_values, slot)
        first_hidden, middle = hidden_states, None
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kinds[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                first_hidden=first_hidden,
                input_ids=input_ids,
                **kwargs,
            )
            if index == self.config.backout_layer:
                middle = hidden_states
            if index + 1 in boundaries:
                below = hidden_states
                if middle is not None and self.backout_scale is not None:
                    below = below - self.backout_scale.to(middle.dtype) * middle
                yield self.norm(below)
                if detach:
                    hidden_states, first_hidden = hidden_states.detach(), first_hidden.detach()
                    middle = None if middle is None else middle.detach()


class PoEForCausalLM(PoEPreTrainedModel, GenerationMixin):
    """The base with its head: `logits = cap * tanh(W norm(x) / cap)`, (B, T, V)."""

    def __init__(self, config: PoEConfig) -> None:
        super().__init__(config)
        self.model = PoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.initial_scale = 0.01
        if config.stage_heads:
            heads = (nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in config.boundaries)
            self.lm_head_stages = nn.ModuleList(heads)
            for head in self.lm_head_stages:
                head.initial_scale = 0.0  # type: ignore[assignment]
        self._summed: dict[int, tuple[Any, Tensor]] = {}  # by stage: what it was made of, the sum
        self.post_init()

    def head_weight(self, stage: int) -> Tensor:
        """What reads the state of stage `stage`: the shared head (V, D), plus the stage's own where there is one.

        The sum is made in fp32 and kept while no gradient is wanted and its parts do not change.
        """
        shared = self.lm_head.weight
        if not self.config.stage_heads:
            return shared
        own: Tensor = self.lm_head_stages[stage].weight  # type: ignore[assignment]
        if torch.is_grad_enabled() and (shared.requires_grad or own.requires_grad):
            self._summed.clear()
            return (shared.float() + own.float()).to(shared.dtype)
        key = tuple((t.data_ptr(), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in (shared, own))
        if stage not in self._summed or self._summed[stage][0] != key:
            self._summed[stage] = key, (shared.float() + own.float()).to(shared.dtype)
        return self._summed[stage][1]

    def _logits(self, hidden_states: Tensor, stage: int) -> Tensor:
        """Normalised states (B, T, D) at the boundary of `stage` -> soft-capped logits (B, T, V)."""
        if self.config.stage_heads:
            logits = F.linear(hidden_states, self.head_weight(stage))
        else:  # as a module: its device may have to be reached by a hook
            logits = self.lm_head(hidden_states)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
        if outputs.stage_states is None:
            logits = self._logits(outputs.last_hidden_state[:, kept], -1)
        else:
            votes = [self._logits(h[:, kept], k).float().log_softmax(-1) for k, h in enumerate(outputs.stage_states)]
            logits = torch.stack(votes).mean(0).log_softmax(-1).to(votes[0].dtype)
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
