"""Products of experts: combine the predictions of several stages and their base for each token.

"log_op" is a logarithmic opinion pool (Genest & Zidek 1986; products of experts, Hinton 2002),
`log p = sum w_i log p_i - log Z` with weights that sum to one. "delta" adds the changes of the stages on the logits,
`base + sum w_i (stage_i - base)`, and counts the base once (task arithmetic, arXiv 2212.04089, on outputs).
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from poe.decoding.branches import BranchedModel, build_branched_model, count_positions
from poe.decoding.strategy import Expert
from poe.errors import DataError, DecodingError

MODES = ("log_op", "delta")


@dataclass(frozen=True)
class Fit:
    """Learned weights, and the loss (nats per labeled token) before and after learning them, over `tokens` labels."""

    weights: dict[str | None, float]
    before: float
    after: float
    tokens: int


class Product(BranchedModel):
    """A causal language model that combines several stages; its logits are normalized log-probabilities.

    It is of the base's class, so its `generate` supports sampling, processors, streamers, stopping and beams. The trunk
    runs once and is cached once for all stages. `weights` maps names (None: the base) to numbers.
    """

    mode: str
    weights: dict[str | None, float]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run like any causal model of transformers. The logits (B, T, V) are log-probabilities in fp32."""
        if token_type_ids is not None:  # few families accept them
            kwargs["token_type_ids"] = token_type_ids
        states, cache = self.expert_states(
            input_ids,
            past_key_values,
            logits_to_keep=logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        expert_logits = [self.expert_logits(expert, expert_states) for expert, expert_states in enumerate(states)]
        logits = combine(expert_logits, self._factors(list(self.weights.values())))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])  # type: ignore[operator]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map token ids and mask (B, T), padded on any side, to the next tokens' log-probabilities (B, T, V), fp32."""
        logits = self(
            input_ids, attention_mask=attention_mask, position_ids=count_positions(attention_mask), use_cache=False
        ).logits
        assert isinstance(logits, Tensor)
        return logits

    def fit(self, rows: Iterable[Mapping[str, Any]]) -> Fit:
        """Learn the weights from a few hundred rows, and use them from then on.

        A row, or a batch of rows, is a mapping with `input_ids` (T or B x T) and optionally `labels` (not shifted, -100
        is ignored; default: all tokens) and `attention_mask`. The stages read each row once, without a graph. Their
        logits at labeled tokens stay in memory (bytes: tokens x stages x vocabulary x bytes of a logit). The weights of
        "log_op" stay positive with sum one, those of "delta" are free. Both losses are convex in the weights and are
        minimized by L-BFGS. Raises `DataError` if no token has a label.
        """
        examples = [example for row in rows if len((example := self._collect_labeled(row))[1])]
        count = sum(len(labels) for _, labels in examples)
        if not count:
            raise DataError(
                "No token of the rows has a label: expected rows of at least two tokens, with `labels` other than -100."
            )
        log_op = self.mode == "log_op"
        start = torch.tensor(list(self.weights.values()), device=examples[0][1].device)
        # The weights of "log_op" are a softmax of free numbers. A weight of zero would have no gradient.
        free = (start.clamp_min(1e-3).log() if log_op else start).requires_grad_()
        optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> float:
            """Return the mean loss and add its gradient to `free`, row by row, so that one graph exists at a time."""
            optimizer.zero_grad()
            total = 0.0
            with torch.enable_grad():
                for logits, labels in examples:
                    weights = free.softmax(0) if log_op else free
                    scores = combine(logits, self._factors(weights.unbind()))
                    part = torch.nn.functional.nll_loss(scores, labels, reduction="sum") / count
                    part.backward()
                    total += float(part.detach())
            return total

        before = self._mean_loss(examples)
        optimizer.step(loss)
        learned = (free.softmax(0) if log_op else free).tolist()
        previous, self.weights = self.weights, dict(zip(self.weights, learned, strict=True))
        after = self._mean_loss(examples)
        if not after <= before:  # the search diverged
            self.weights, after = previous, before
        return Fit(dict(self.weights), before, after, count)

    def _mean_loss(self, examples: Sequence[tuple[list[Tensor], Tensor]]) -> float:
        factors = self._factors(list(self.weights.values()))
        losses = [torch.nn.functional.nll_loss(combine(x, factors), y, reduction="sum") for x, y in examples]
        return float(torch.stack(losses).sum()) / sum(len(y) for _, y in examples)

    @torch.no_grad()
    def _collect_labeled(self, row: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Return the logits (n, V) of each expert at the labeled tokens of a row or batch, and the labels (n)."""
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise DataError(
                f"Expected rows that are mappings with `input_ids` and optionally `labels`, got {row!r:.80}."
            )
        fields = ("input_ids", "labels", "attention_mask")
        tensors = {name: torch.atleast_2d(torch.as_tensor(row[name])) for name in fields if row.get(name) is not None}
        ids, mask = tensors["input_ids"].to(self.device), tensors.get("attention_mask")
        mask = mask if mask is None else mask.to(ids.device)
        labels = tensors.get("labels", ids).to(ids.device)
        if labels.shape != ids.shape:
            raise DataError(
                f"Expected as many labels as tokens, got shapes {tuple(labels.shape)} and {tuple(ids.shape)}."
            )
        is_labeled = labels[:, 1:] != -100
        if mask is not None:  # padding does not predict the first token of a row
            is_labeled &= (mask[:, 1:] * mask[:, :-1]).bool()
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": count_positions(mask)}
        with self.acting_on_labels(labels):
            states, _ = self.expert_states(ids, use_cache=False, **inputs)
        return [
            self.expert_logits(expert, expert_states[:, :-1][is_labeled]) for expert, expert_states in enumerate(states)
        ], labels[:, 1:][is_labeled]

    def _factors(self, weights: Sequence[Any]) -> list[Any]:
        """Return the factor of each expert's logits. In "delta" the first expert is the base."""
        return [1.0 - sum(weights), *weights] if self.mode == "delta" else list(weights)


def compose(
    base: PreTrainedModel,
    stages: Mapping[str | None, float] | Iterable[str | None],
    find_expert: Callable[[str | None], Expert],
    mode: str = "log_op",
) -> Product:
    """Return the product of stages (None: the base) with these weights, equal ones if only names are given.

    Raises `DecodingError` for an unknown mode or invalid weights: those of "log_op" must not be negative and must sum
    to one; those of "delta" must be finite and only for stages.
    """
    if mode not in MODES:
        raise DecodingError(f"The mode of a product must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    names = list(stages)
    if not names or len(set(names)) < len(names):
        raise DecodingError(
            f"Expected one or more different stages, such as {{'tool': 0.7, 'math': 0.3}}, got {stages!r}."
        )
    numbers = stages if isinstance(stages, Mapping) else dict.fromkeys(names, 1 / len(names))
    weights = {name: float(numbers[name]) for name in names}
    total = sum(weights.values())
    if not math.isfinite(total):
        raise DecodingError(f"The weights of a product must be finite numbers, got {weights}.")
    if mode == "log_op" and (min(weights.values()) < 0 or abs(total - 1) > 1e-3):
        raise DecodingError(
            f"The weights of mode 'log_op' must not be negative and must sum to one: got {weights}, sum {total:g}. "
            "Divide them by their sum, or choose mode='delta', which allows any weights."
        )
    if mode == "delta" and None in weights:
        raise DecodingError(
            "Mode 'delta' is base + sum of weight * (stage - base) and counts the base once already: leave None out, "
            "or choose mode='log_op', in which the base is one of the experts."
        )
    experts = [find_expert(name) for name in ([None, *names] if mode == "delta" else names)]
    product = build_branched_model(base, experts, Product)
    product.mode, product.weights = mode, weights
    heaviest = max(experts, key=lambda expert: abs(weights.get(expert.name, 0.0)))
    product.generation_config = copy.deepcopy(heaviest.model.generation_config)
    assert isinstance(product, Product)
    return product


def combine(logits: Sequence[Tensor], factors: Sequence[Any]) -> Tensor:
    """Return the normalized log-probabilities (..., V), fp32, of a weighted sum of logits (..., V).

    Log-probabilities instead of logits would give the same result: they differ by a constant per token, which the
    normalization removes.
    """
    used = [(f, x) for f, x in zip(factors, logits, strict=True) if isinstance(f, Tensor) or f]  # 0 * -inf would be nan
    parts = [factor * x.float() for factor, x in used]
    return sum(parts[1:], start=parts[0]).log_softmax(-1)
