"""The PoE base: a plain decoder in the shape of nanochat (github.com/karpathy/nanochat), as a transformers model.

It has RoPE before QK-norm, RMSNorm without parameters, a relu^2 MLP, grouped-query attention, no biases, and an untied
head with soft-capped logits. The config switches on what nanochat added later: value embeddings with gates, scalars of
each layer, sliding windows, smear, backout. A layer owns its parameters, so it can be stacked or skipped.
Config and model share one file, because two remote-code files can become two different classes.
Shape letters: B batch, T tokens, D hidden size, H heads, K key-value heads, E head dimension, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .poe_layers import PoEAttention, PoEDecoderLayer, PoERMSNorm, PoERotaryEmbedding, PoESmear, rms_norm


class PoEConfig(PreTrainedConfig):
    """Configuration of a PoE base.

    `attention_logit_scale` multiplies the usual `head_dim ** -0.5`. After QK-norm a logit is at most
    `attention_logit_scale * head_dim ** 0.5`, so it limits how sharp attention can become (1.0 in older nanochat
    checkpoints, 1.2 ** 2 in newer ones).

    These are off by default. `layer_scalars`: each layer scales the residual stream and the first hidden state.
    `value_embedding_layers`: these layers add `value_gate_scale * sigmoid(gate)` times an embedding of the token to
    their values; the gate reads the first `value_gate_channels` channels (ResFormer, arXiv 2410.17897). `layer_types`
    and `sliding_window` are those of transformers. `smear_channels`: each position adds a share of the previous
    embedding, which a gate on that many channels decides. `backout_layer`: the output of this layer is scaled and
    subtracted before the final norm (also below a stage; it keeps its place when layers are stacked).

    `stage_layers`, such as [12, 5, 4, 3], divides the layers into stages: the final norm and the head predict after
    each of them (PoE local learning trains each stage by its own prediction). `stage_heads` gives each stage a head
    that is added to the shared one. `combiner` chooses the model's prediction: "last" for the last stage's, "log_op"
    for the normalized mean of all stages' log-probabilities.
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
        layers = range(self.num_hidden_layers)
        named = {
            "smear_channels": (self.smear_channels or 1, range(1, self.hidden_size + 1)),
            "backout_layer": (self.backout_layer or 0, layers),
            **{f"value_embedding_layers[{i}]": (x, layers) for i, x in enumerate(self.value_embedding_layers or [])},
        }
        for name, (value, allowed) in named.items():
            if value not in allowed:
                raise ValueError(f"{name} should be in {allowed.start}..{allowed.stop - 1}, got {value}")
        kinds = {"full_attention", "sliding_attention"}
        if self.layer_types is not None and (len(self.layer_types) != len(layers) or {*self.layer_types} - kinds):
            raise ValueError(f"layer_types should be {len(layers)} of {sorted(kinds)}, got {self.layer_types}")
        if self.combiner not in ("last", "log_op"):
            raise ValueError(f"combiner should be 'last' or 'log_op', got {self.combiner!r}")

    @property
    def boundaries(self) -> list[int]:
        """The number of layers below each prediction, the last one being all of them."""
        return list(accumulate(self.stage_layers or [self.num_hidden_layers]))


class PoEPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities of the backbone and the causal model."""

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
        """Initialize matrices with variance 1/inputs, output projections with zero, a small head, unit embeddings.

        Each branch handles one leaf module, because transformers skips remote-code modules without own parameters.
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
    """`stage_states` are the normalized hidden states (B, T, D) at each boundary, if the combiner needs them."""

    stage_states: tuple[Tensor, ...] | None = None


class PoEModel(PoEPreTrainedModel):
    """The backbone: token ids (B, T) -> normalized hidden states (B, T, D)."""

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
        combines_stages = self.config.combiner == "log_op"
        states = tuple(
            self.stages(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                boundaries=self.config.boundaries if combines_stages else [self.config.num_hidden_layers],
                **kwargs,
            )
        )
        return PoEModelOutput(
            last_hidden_state=states[-1],
            past_key_values=past_key_values if use_cache else None,
            stage_states=states if combines_stages else None,
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
        """Yield the normalized hidden states (B, T, D) after each of `boundaries` (numbers of layers), one at a time.

        The layers above a boundary run when the next states are requested. With `detach` no gradient crosses a
        boundary, so each stage can learn before the next one runs, and one stage's graph exists at a time.
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

        # As in nanochat, the embedding is normalized before the first layer.
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
        self._summed: dict[int, tuple[Any, Tensor]] = {}  # by stage: a key of both parts, and their sum
        self.post_init()

    def head_weight(self, stage: int) -> Tensor:
        """Return the head (V, D) of a stage: the shared head, plus the stage's own if there is one.

        The sum is computed in fp32. Without gradients it is cached until one of its parts changes.
        """
        shared = self.lm_head.weight
        if not self.config.stage_heads:
            return shared
        stage_head: Tensor = self.lm_head_stages[stage].weight  # type: ignore[assignment]
        if torch.is_grad_enabled() and (shared.requires_grad or stage_head.requires_grad):
            self._summed.clear()
            return (shared.float() + stage_head.float()).to(shared.dtype)
        key = tuple(
            (t.data_ptr(), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in (shared, stage_head)
        )
        if stage not in self._summed or self._summed[stage][0] != key:
            self._summed[stage] = key, (shared.float() + stage_head.float()).to(shared.dtype)
        return self._summed[stage][1]

    def _logits(self, hidden_states: Tensor, stage: int) -> Tensor:
        """Map normalized states (B, T, D) at the boundary of `stage` to soft-capped logits (B, T, V)."""
        if self.config.stage_heads:
            logits = F.linear(hidden_states, self.head_weight(stage))
        else:  # call the module: a hook may move its input to another device
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
        """Return logits (B, T, V), and the loss in nats for `labels` (B, T): not shifted, -100 is ignored."""
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
