"""Routing: a batch whose rows use different stages, in one pass through the trunk; and choosing each row's stage.

Like a batch of mixed adapters (S-LoRA, arXiv 2311.03285), but the shared part of the work is exactly the base's: no
layer of the trunk knows of the stages, so its pass costs what the base alone costs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from poe.decoding.branches import Branched, build_branched_model, positions
from poe.decoding.strategy import Expert
from poe.errors import DecodingError


@dataclass(frozen=True)
class Routing:
    """Which stage each row should use (None: the base), and why.

    `scores` are for every row the mean log-probability (nats per prompt token) of its prompt under each candidate.
    """

    stages: list[str | None]
    scores: list[dict[str | None, float]]


class Routed(Branched):
    """A model that reads every row at the expert that `branch` names; of the base's own class, with its `generate`."""

    def forward(
        self,
        input_ids: Tensor,
        branch: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run like any causal model of transformers. `branch` (B) has each row's expert; every expert must occur."""
        rows = [torch.nonzero(branch == expert)[:, 0].to(input_ids.device) for expert in range(len(self.experts))]
        if token_type_ids is not None:  # few families know them
            kwargs["token_type_ids"] = token_type_ids
        states, cache = self.expert_states(
            input_ids,
            past_key_values,
            rows if len(rows) > 1 else None,
            logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = torch.cat([self.read(expert, own) for expert, own in enumerate(states)])
        return CausalLMOutputWithPast(logits=logits[torch.cat(rows).argsort()], past_key_values=cache)

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Routing:
        """Score the prompts (B, T) with every expert, in one pass through the trunk, and choose the most likely one.

        The first expert wins a tie. One row's logits exist at a time.
        """
        states, _ = self.expert_states(
            input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False
        )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        known = (real[:, 1:] * real[:, :-1]).bool()
        names = [expert.name for expert in self.experts]
        scores: list[dict[str | None, float]] = []
        for row, (ids, seen) in enumerate(zip(input_ids, known, strict=True)):
            read = [self.read(expert, own[row, :-1][seen]).float().log_softmax(-1) for expert, own in enumerate(states)]
            said = [logits.gather(-1, ids[1:][seen][:, None]).sum() / max(1, len(logits)) for logits in read]
            scores.append(dict(zip(names, torch.stack(said).tolist(), strict=True)))
        return Routing([max(row, key=lambda name: row[name]) for row in scores], scores)


class _RowStops(StoppingCriteria):
    """Ends every row at a stop token of its own stage; `generate` knows by `eos_token_id` that there are any."""

    def __init__(self, stops: Sequence[Sequence[int]], branch: Tensor) -> None:
        self.eos_token_id = torch.tensor(sorted({token for own in stops for token in own}))
        self._ends = torch.tensor([[token in own for token in self.eos_token_id.tolist()] for own in stops])[branch]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1:]
        ends = self._ends.repeat_interleave(len(last) // len(self._ends), 0).to(last.device)
        return ((last == self.eos_token_id.to(last.device)) & ends).any(1)


def generate_routed(
    base: PreTrainedModel,
    stages: Sequence[str | None],
    find_expert: Callable[[str | None], Expert],
    inputs: Tensor | None = None,
    **options: Any,
) -> Any:
    """Generate with a stage of its own for every row (None: the base); `options` are those of `generate`.

    Every row stops at its own stage's stop tokens, unless `options` give some. Raises `DecodingError` where there are
    not as many stages as rows, and where the stages have been saved with different ways of sampling.
    """
    prompts = options.get("input_ids") if inputs is None else inputs
    if not isinstance(prompts, Tensor) or prompts.dim() != 2:
        raise DecodingError("Routing reads token ids: expected input_ids of shape (rows, tokens).")
    if len(stages) != len(prompts):
        raise DecodingError(
            f"There must be one stage for every row, None for the base: got {len(stages)} for {len(prompts)} rows."
        )
    experts = [find_expert(name) for name in dict.fromkeys(stages)]
    if base.config._attn_implementation == "flex_attention" and len(experts) > 1:
        raise DecodingError("Flex attention's block masks cannot be divided by rows: choose sdpa or eager to route.")
    model = build_branched_model(base, experts, Routed)
    names = [expert.name for expert in experts]
    branch = torch.tensor([names.index(name) for name in stages])
    given = options.get("generation_config")
    model.generation_config = _common_config(experts, given is not None)
    stops = [_stops(expert.model.generation_config) for expert in experts]
    if len(set(stops)) > 1 and "eos_token_id" not in options and getattr(given, "eos_token_id", None) is None:
        criteria = _RowStops(stops, branch)
        model.generation_config.eos_token_id = None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = int(criteria.eos_token_id[0])
        options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), criteria])
    output = model.generate(inputs, branch=branch, **options)
    if isinstance(output, ModelOutput):
        output.stages = list(stages)
    return output


def _common_config(experts: Sequence[Expert], given: bool) -> GenerationConfig:
    """Return a copy of the first expert's generation config. Raises `DecodingError` if others differ."""
    configs = [expert.model.generation_config for expert in experts]
    ways = [{k: v for k, v in config.to_diff_dict().items() if not k.startswith(_NO_MATTER)} for config in configs]
    if not given and any(way != ways[0] for way in ways):
        said = "; ".join(f"{expert.name or 'the base'}: {way}" for expert, way in zip(experts, ways, strict=True))
        raise DecodingError(
            f"The rows' stages were saved with different ways to generate ({said}), and one batch has one: expected "
            "generation_config=... to say which."
        )
    return copy.deepcopy(configs[0])


# What does not change a token, and the stop tokens, which every row has for itself.
_NO_MATTER = ("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "output_", "return_", "transformers_", "_")


def _stops(config: GenerationConfig) -> tuple[int, ...]:
    stop = config.eos_token_id
    return () if stop is None else tuple(sorted(stop)) if isinstance(stop, list) else (int(stop),)
