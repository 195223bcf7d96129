"""Products of experts: several stages on one base, and the base, decide together about every token.

A logarithmic opinion pool (Genest & Zidek 1986; Hinton 2002, products of experts), `log p = sum w_i log p_i - log Z`
with weights that sum to one; or the sum of what each stage changes, `base + sum w_i (stage_i - base)` on logits, in
which the base is counted once (as weight deltas are in task arithmetic, arXiv 2212.04089, here on the outputs).
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

from poe.decoding.branches import Branched, build_branched_model, positions
from poe.decoding.strategy import Expert
from poe.errors import DataError, DecodingError

MODES = ("log_op", "delta")


@dataclass(frozen=True)
class Fit:
    """Weights that were learned, and the loss (nats per labeled token) with those before and with them."""

    weights: dict[str | None, float]
    before: float
    after: float
    tokens: int


class Product(Branched):
    """A causal language model whose logits are the renormalized log-probabilities of several stages together.

    It is of the base's own class, so `generate` has everything: sampling, processors, streamers, stopping, beams. The
    trunk runs once for all stages, and its layers are cached once. `weights` maps names (None: the base) to numbers.
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
        """As every causal model in transformers; the logits (B, T, V) are in fp32 and `logsumexp` of them is zero."""
        if token_type_ids is not None:  # few families know them
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
        read = [self.read(expert, own) for expert, own in enumerate(states)]
        logits = combine(read, self._factors(list(self.weights.values())))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])  # type: ignore[operator]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids and mask (B, T) -> log-probabilities of every next token (B, T, V), fp32; padding on any side."""
        logits = self(
            input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False
        ).logits
        assert isinstance(logits, Tensor)
        return logits

    def fit(self, rows: Iterable[Mapping[str, Any]]) -> Fit:
        """Learn the weights from a few hundred rows, by gradient on the weights alone, and use them from now on.

        A row, or a batch of them, is a mapping with `input_ids` (T or B x T) and optionally `labels` (as everywhere:
        not shifted, -100 is ignored; default: all tokens) and `attention_mask`. The stages read every row once,
        without a graph; their logits at labeled tokens are held while the weights are learned (bytes: tokens x stages
        x vocabulary x those of a logit). The weights of "log_op" stay positive with sum one, those of "delta" are free;
        both losses are convex in the weights and found by L-BFGS. Raises `DataError` if no token has a label.
        """
        held = [kept for row in rows if len((kept := self._labeled(row))[1])]
        count = sum(len(labels) for _, labels in held)
        if not count:
            raise DataError(
                "No token of the rows has a label: expected rows of at least two tokens, with `labels` other than -100."
            )
        log_op = self.mode == "log_op"
        start = torch.tensor(list(self.weights.values()), device=held[0][1].device)
        # The weights of a pool are a softmax of free numbers; a weight of zero could not be left again.
        free = (start.clamp_min(1e-3).log() if log_op else start).requires_grad_()
        optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> float:
            """The mean loss; its gradient is added to that of `free`, row by row, so that one row's graph lives."""
            optimizer.zero_grad()
            total = 0.0
            with torch.enable_grad():
                for logits, labels in held:
                    weights = free.softmax(0) if log_op else free
                    scores = combine(logits, self._factors(weights.unbind()))
                    part = torch.nn.functional.nll_loss(scores, labels, reduction="sum") / count
                    part.backward()
                    total += float(part.detach())
            return total

        before = self._loss(held)
        optimizer.step(loss)
        learned = (free.softmax(0) if log_op else free).tolist()
        known, self.weights = self.weights, dict(zip(self.weights, learned, strict=True))
        after = self._loss(held)
        if not after <= before:  # a search that left the finite numbers
            self.weights, after = known, before
        return Fit(dict(self.weights), before, after, count)

    def _loss(self, held: "Sequence[tuple[list[Tensor], Tensor]]") -> float:
        factors = self._factors(list(self.weights.values()))
        losses = [torch.nn.functional.nll_loss(combine(x, factors), y, reduction="sum") for x, y in held]
        return float(torch.stack(losses).sum()) / sum(len(y) for _, y in held)

    @torch.no_grad()
    def _labeled(self, row: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """A row's (or batch's) logits at its labeled tokens, (n, V) for every expert, and the labels (n)."""
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise DataError(
                f"A row must be a mapping with `input_ids`, and `labels` if not all tokens count: got {row!r:.80}."
            )
        fields = ("input_ids", "labels", "attention_mask")
        given = {name: torch.atleast_2d(torch.as_tensor(row[name])) for name in fields if row.get(name) is not None}
        ids, mask = given["input_ids"].to(self.device), given.get("attention_mask")
        mask = mask if mask is None else mask.to(ids.device)
        labels = given.get("labels", ids).to(ids.device)
        if labels.shape != ids.shape:
            raise DataError(f"Labels must be as many as tokens: got {tuple(labels.shape)} and {tuple(ids.shape)}.")
        wanted = labels[:, 1:] != -100
        if mask is not None:  # what padding says of a row's first token is of no account
            wanted &= (mask[:, 1:] * mask[:, :-1]).bool()
        states, _ = self.expert_states(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        return [self.read(expert, own[:, :-1][wanted]) for expert, own in enumerate(states)], labels[:, 1:][wanted]

    def _factors(self, weights: Sequence[Any]) -> list[Any]:
        """What every expert's logits are multiplied by; in "delta" the first expert is the base."""
        return [1.0 - sum(weights), *weights] if self.mode == "delta" else list(weights)


def compose(
    base: PreTrainedModel,
    stages: Mapping[str | None, float] | Iterable[str | None],
    find_expert: Callable[[str | None], Expert],
    mode: str = "log_op",
) -> Product:
    """Return the product of stages (None: the base) with these weights, equal ones where only names are given.

    Raises `DecodingError` for an unknown mode and for weights that the mode does not allow: those of "log_op" are not
    negative and sum to one; those of "delta" are finite, and of stages alone.
    """
    if mode not in MODES:
        raise DecodingError(f"The mode of a product must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    names = list(stages)
    if not names or len(set(names)) < len(names):
        raise DecodingError(
            f"A product is of one or more different stages, such as {{'tool': 0.7, 'math': 0.3}}: got {stages!r}."
        )
    given = stages if isinstance(stages, Mapping) else dict.fromkeys(names, 1 / len(names))
    weights = {name: float(given[name]) for name in names}
    total = sum(weights.values())
    if not math.isfinite(total):
        raise DecodingError(f"The weights of a product must be finite numbers, got {weights}.")
    if mode == "log_op" and (min(weights.values()) < 0 or abs(total - 1) > 1e-3):
        raise DecodingError(
            f"The weights of mode 'log_op' must not be negative and must sum to one: got {weights}, sum {total:g}. "
            "Divide them by their sum, or choose mode='delta', whose weights are free."
        )
    if mode == "delta" and None in weights:
        raise DecodingError(
            "Mode 'delta' is base + sum of weight * (stage - base): the base is in it already, once. "
            "Leave None out, or choose mode='log_op', where the base is one of the experts."
        )
    experts = [find_expert(name) for name in ([None, *names] if mode == "delta" else names)]
    product = build_branched_model(base, experts, Product)
    product.mode, product.weights = mode, weights
    heaviest = max(experts, key=lambda expert: abs(weights.get(expert.name, 0.0)))
    product.generation_config = copy.deepcopy(heaviest.model.generation_config)
    assert isinstance(product, Product)
    return product


def combine(logits: Sequence[Tensor], factors: Sequence[Any]) -> Tensor:
    """Several logits (..., V), each times its factor -> log-probabilities (..., V) in fp32.

    It does not matter whether logits or their log-probabilities are summed: they differ by a constant for each token,
    which the last step takes away.
    """
    used = [(f, x) for f, x in zip(factors, logits, strict=True) if isinstance(f, Tensor) or f]  # 0 * -inf is no number
    parts = [factor * x.float() for factor, x in used]
    return sum(parts[1:], start=parts[0]).log_softmax(-1)
