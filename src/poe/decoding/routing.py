"""Routing: rows of one batch use different stages in one pass through the trunk, and each row's stage can be chosen.

A prompt chooses by how like it is to the training prompts of each stage (`prompt_center.py`).

Like a batch of mixed adapters (S-LoRA, arXiv 2311.03285), but the shared layers are exactly the base's, so their pass
costs as much as the base alone.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from poe.decoding.branches import BranchedModel, build_branched_model
from poe.decoding.prompt_center import find_centers, read_center, read_directions
from poe.decoding.strategy import Expert
from poe.errors import DecodingError


@dataclass(frozen=True)
class Routing:
    """The stage of each row (None: the base), which has the highest of the row's `scores`.

    A score is the cosine similarity of the prompt to the center of a stage's training prompts, less 1 for a prompt that
    is unlike them. The base's is 0.
    """

    stages: list[str | None]
    scores: list[dict[str | None, float]]


class RoutedModel(BranchedModel):
    """A model of the base's class in which each row uses the expert that `branch` names."""

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
        """Run like any causal model of transformers. `branch` (B) has each row's expert."""
        rows = [torch.nonzero(branch == expert)[:, 0].to(input_ids.device) for expert in range(len(self.experts))]
        if token_type_ids is not None:  # few families accept them
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
        logits = torch.cat([self.expert_logits(expert, expert_states) for expert, expert_states in enumerate(states)])
        return CausalLMOutputWithPast(logits=logits[torch.cat(rows).argsort()], past_key_values=cache)


class _RowStops(StoppingCriteria):
    """Ends each row at a stop token of its own stage. `generate` reads `eos_token_id` to pad finished rows."""

    def __init__(self, stops: Sequence[Sequence[int]], branch: Tensor) -> None:
        self.eos_token_id = torch.tensor(sorted({token for own in stops for token in own}))
        # (rows, stop tokens): whether a token ends a row
        self._ends = torch.tensor([[token in own for token in self.eos_token_id.tolist()] for own in stops])[branch]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1:]
        ends = repeat(self._ends, "row token -> (row beam) token", beam=len(last) // len(self._ends)).to(last.device)
        return ((last == self.eos_token_id.to(last.device)) & ends).any(1)


def route(
    base: PreTrainedModel, experts: Sequence[Expert], input_ids: Tensor, attention_mask: Tensor | None = None
) -> Routing:
    """Return the expert of each prompt (B, T); see `Cascade.route`."""
    centers = find_centers(experts, base.config.hidden_size)
    if centers is None:
        lost = [str(each.name) for each in experts if each.stage is not None and read_center(each.stage.prompt) is None]
        raise DecodingError(
            "A prompt goes to the stage whose training prompts it is like. These stages do not know theirs: "
            f"{', '.join(lost)}. Name a stage for each row, or use `fit_prompt_center` for each of them."
        )
    directions = read_directions(base, input_ids, attention_mask)
    columns = {name: center.score(directions).tolist() for name, center in centers.items()}
    scores: list[dict[str | None, float]] = [
        {each.name: 0.0 if each.name is None else columns[each.name][row] for each in experts}
        for row in range(len(input_ids))
    ]
    return Routing([max(row, key=lambda name: row[name]) for row in scores], scores)


def generate_routed(
    base: PreTrainedModel,
    stages: Sequence[str | None] | str,
    find_expert: Callable[[str | None], Expert],
    names: Iterable[str],
    inputs: Tensor | None = None,
    **options: Any,
) -> Any:
    """Generate with one stage for each row (None: the base); `options` are those of `generate`.

    With "auto" each row gets one of the stages `names` or the base (`route`). Each row stops at the stop tokens of
    its own stage, unless `options` have some. Raises `DecodingError` if the number of stages is not the number of rows,
    or if the stages were saved with different sampling.
    """
    prompts = options.get("input_ids") if inputs is None else inputs
    if not isinstance(prompts, Tensor) or prompts.dim() != 2:
        raise DecodingError("Routing needs token ids: expected input_ids of shape (rows, tokens).")
    routing = None
    if isinstance(stages, str):
        candidates = [find_expert(name) for name in (None, *names)]
        routing = route(base, candidates, prompts, options.get("attention_mask"))
        stages = routing.stages
    if len(stages) != len(prompts):
        raise DecodingError(
            f"Expected one stage for each row, None for the base: got {len(stages)} for {len(prompts)} rows."
        )
    experts = [find_expert(name) for name in dict.fromkeys(stages)]
    if base.config._attn_implementation == "flex_attention" and len(experts) > 1:
        raise DecodingError(
            "Flex attention's block masks cannot be split by rows: choose sdpa or eager attention for routing."
        )
    model = build_branched_model(base, experts, RoutedModel)
    branches = {expert.name: number for number, expert in enumerate(experts)}
    branch = torch.tensor([branches[name] for name in stages])
    given_config = options.get("generation_config")
    model.generation_config = _common_config(experts, given_config is not None)
    stops = [_stop_tokens(expert.model.generation_config) for expert in experts]
    if len(set(stops)) > 1 and "eos_token_id" not in options and getattr(given_config, "eos_token_id", None) is None:
        criteria = _RowStops(stops, branch)
        model.generation_config.eos_token_id = None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = int(criteria.eos_token_id[0])
        options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), criteria])
    output = model.generate(inputs, branch=branch, **options)
    if isinstance(output, ModelOutput):
        output.stages = list(stages)
        if routing is not None:
            output.routing = routing
    return output


def _common_config(experts: Sequence[Expert], has_given_config: bool) -> GenerationConfig:
    """Return a copy of the first expert's generation config. Raises `DecodingError` if others differ."""
    configs = [expert.model.generation_config for expert in experts]
    sampling = [{k: v for k, v in config.to_diff_dict().items() if not k.startswith(_IGNORED)} for config in configs]
    if not has_given_config and any(options != sampling[0] for options in sampling):
        differences = "; ".join(
            f"{expert.name or 'the base'}: {options}" for expert, options in zip(experts, sampling, strict=True)
        )
        raise DecodingError(
            f"The rows' stages were saved with different ways to generate ({differences}), but one batch has one: "
            "expected generation_config=..."
        )
    return copy.deepcopy(configs[0])


# Options that change no token, and the stop tokens, which each row has for itself.
_IGNORED = ("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "output_", "return_", "transformers_", "_")


def _stop_tokens(config: GenerationConfig) -> tuple[int, ...]:
    stop = config.eos_token_id
    return () if stop is None else tuple(sorted(stop)) if isinstance(stop, list) else (int(stop),)
