"""Self-speculation: an early exit drafts, the layers above it verify all drafted tokens in one pass.

Draft and model share their lower layers, so they share those layers' cache, and verifying starts from the states that
drafting left behind: nothing is computed twice. Greedy, the tokens are those of full depth; sampled, every token is
accepted or drawn again so that its distribution is full depth's (Leviathan et al., arXiv 2211.17192).
Shape letters: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from poe.decoding.segments import Path, exits_below, path_of
from poe.errors import DecodingError
from poe.modeling.stage import Stage


@dataclass(frozen=True)
class SelfSpeculation:
    """How to draft: up to `num_tokens` from the exit after `exit` layers, while the draft is sure.

    A token is drafted only where the likeliest one has at least `least_probability` in the draft's own distribution.
    `acceptance`, the share of drafted tokens that full depth kept, and `speedup` over plain decoding are what
    `calibrate_draft` measured; None where nothing was.
    """

    exit: int
    num_tokens: int = 5
    least_probability: float = 0.4
    acceptance: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 0 <= self.least_probability < 1:
            raise DecodingError(
                f"A draft has at least one token and a least probability below 1, got num_tokens={self.num_tokens!r}, "
                f"least_probability={self.least_probability!r}."
            )


def accept(target: Tensor, draft: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Leviathan's rule: given tokens drafted from `draft`, return tokens distributed as `target`, and which were kept.

    `target`, `draft` (B, V) are probabilities, `drafted` (B, 1) token ids. A token x is kept with probability
    min(1, target(x) / draft(x)); where it is not, another is drawn from max(0, target - draft), normalised.
    """
    chance = target.gather(1, drafted) / draft.gather(1, drafted)
    kept = torch.rand_like(chance) < chance
    if kept.all():
        return drafted, kept
    left = (target - draft).clamp(min=0)
    # Equal up to rounding, nothing is left: then the token was kept but for that rounding.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, target)
    return torch.where(kept, drafted, left.multinomial(1)), kept


class Drafting:
    """A decoding loop for `generate(custom_generate=...)` that drafts at the end of the first of a path's two parts.

    All rows advance together, by as many drafted tokens as the row with the fewest accepted ones, and one more: to stop
    there depends on nothing that comes later, so each row's tokens stay exact. Rows that have ended are not waited for.
    `drafted`, `accepted` and `passes` count over all calls, in tokens of one row.
    """

    def __init__(self, path: Path, num_tokens: int, least_probability: float) -> None:
        self._path, self._num_tokens, self._least = path, num_tokens, least_probability
        self.drafted = self.accepted = self.passes = 0

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[..., Tensor],
        generation_config: Any,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generate as the native loops do; `generate` prepares and passes all of these."""
        _refuse(input_ids, generation_config, past_key_values)
        draft, rest = self._path.parts
        cache = self._path.new_cache()
        sampling, config = generation_config.do_sample, generation_config
        pad_token = config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)  # type: ignore[attr-defined]
        ids, last = input_ids, config.max_length
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        if attention_mask is not None:
            attention_mask = pad(attention_mask, (0, max(0, last - ids.shape[1])), value=1)
        unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        waited_for = unfinished == 1
        scores: list[Tensor] = []
        raw: list[Tensor] = []

        def masked(length: int) -> Tensor | None:
            return None if attention_mask is None else attention_mask[:, :length]

        states, _ = draft((), ids, position_ids, masked(ids.shape[1]), cache.of[0])
        new, where = ids, position_ids  # what the upper part has not seen yet
        guesses: list[Tensor] = []
        first = True
        while True:
            count = len(guesses)  # of drafted tokens: the last ones of `new`
            _, hidden = rest(states, new, where, masked(ids.shape[1] + count), cache.of[1])
            if first:  # before that a window's older states are not needed
                cache.activate_past_recording()
                first = False
            logits = self._path.logits(1, hidden[:, -1 - count :]).to(torch.float32)
            for index in range(count + 1):
                score = logits_processor(ids, logits[:, index].clone())
                drafted = new[:, new.shape[1] - count + index, None] if index < count else None
                if not sampling:
                    tokens = score.argmax(-1, keepdim=True)
                    kept = tokens == drafted if drafted is not None else None
                elif drafted is not None:
                    tokens, kept = accept(score.softmax(-1), guesses[index], drafted)
                else:
                    tokens, kept = score.softmax(-1).multinomial(1), None
                if config.return_dict_in_generate:
                    scores, raw = [*scores, score], [*raw, logits[:, index]]
                tokens = tokens.squeeze(1)
                if ends:
                    tokens = tokens * unfinished + pad_token * (1 - unfinished)
                ids = torch.cat([ids, tokens[:, None]], dim=1)
                waited_for = unfinished == 1 if ends else waited_for  # a row that has ended is only padded on
                unfinished = unfinished & ~stopping_criteria(ids, tuple(scores) if scores else None)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                if kept is None or not bool((kept.squeeze(1) | ~waited_for).all()) or not bool(unfinished.any()):
                    break
            self.drafted, self.accepted, self.passes = self.drafted + count, self.accepted + index, self.passes + 1
            if not bool(unfinished.any()):
                break
            waited_for = unfinished == 1 if ends else waited_for
            cache.crop(index - count)
            position_ids = where[:, where.shape[1] - 1 - count :][:, index, None] + 1
            states, new, where, guesses = self._draft(
                draft, cache, ids, position_ids, masked, waited_for, logits_processor, sampling, last - ids.shape[1] - 1
            )
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # type: ignore[arg-type]
            scores=tuple(scores) if config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(raw) if config.output_logits else None,  # type: ignore[arg-type]
        )

    def _draft(
        self,
        draft: Any,
        cache: Any,
        ids: Tensor,
        position: Tensor,
        masked: Callable[[int], Tensor | None],
        waited_for: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        sampling: bool,
        room: int,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, list[Tensor]]:
        """Run the lower part over the last token and those that it drafts.

        Returns the states, ids and positions of all of them, and for each drafted token the probabilities (B, V) that
        it was drawn from (greedy: nothing of use).
        """
        states: list[tuple[Tensor, ...]] = []
        guesses: list[Tensor] = []
        tokens, places = [ids[:, -1:]], [position]
        while True:
            state, hidden = draft((), tokens[-1], places[-1], masked(ids.shape[1]), cache.of[0])
            states.append(state)
            if len(guesses) >= min(self._num_tokens, room):
                break
            score = logits_processor(ids, self._path.logits(0, hidden)[:, -1].to(torch.float32))
            guess = score.softmax(-1)
            surest, likeliest = guess.max(-1, keepdim=True)
            if bool(((surest.squeeze(1) < self._least) & waited_for).any()):
                break
            tokens.append(guess.multinomial(1) if sampling else likeliest)
            places.append(places[-1] + 1)
            guesses.append(guess)
            ids = torch.cat([ids, tokens[-1]], dim=1)
        together = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
        return together, torch.cat(tokens, dim=1), torch.cat(places, dim=1), guesses


def drafting(
    model: PreTrainedModel, base: PreTrainedModel, stage: Stage | None, draft: SelfSpeculation | int
) -> Drafting:
    """Return the loop that a draft means; raises `DecodingError` for a depth at which the model makes no prediction."""
    plan = draft if isinstance(draft, SelfSpeculation) else SelfSpeculation(draft)
    known = exits_below(base, stage)
    if plan.exit not in known:
        raise DecodingError(
            f"draft leaves after {plan.exit!r} layers, but this model makes its predictions below the top after "
            f"{', '.join(map(str, known)) or 'none'} (layers): expected one of these."
        )
    return Drafting(path_of(base, stage, [plan.exit], model), plan.num_tokens, plan.least_probability)


def generate_with(
    loop: Drafting,
    model: Any,
    *args: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `model.generate` with a loop of ours; transformers does not hand such a loop the streamer and tokenizer."""
    if stop_strings is not None:
        if tokenizer is None:
            raise DecodingError("stop_strings need the tokenizer that they are read with: pass tokenizer=... as well.")
        criteria = [*(kwargs.get("stopping_criteria") or []), StopStringCriteria(tokenizer, stop_strings)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)

    def decode(model: PreTrainedModel, input_ids: Tensor, **prepared: Any) -> Any:
        return loop(model, input_ids, **{**prepared, "streamer": streamer})

    return model.generate(*args, streamer=streamer, custom_generate=decode, **kwargs)


def _refuse(input_ids: Tensor, config: Any, past_key_values: Any) -> None:
    asked = {
        "num_beams": (config.num_beams or 1) > 1,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "inputs_embeds": input_ids.shape[1] == 0,
        "past_key_values": past_key_values is not None and past_key_values.get_seq_length() > 0,
        "use_cache=False": config.use_cache is False,
    }
    refused = [name for name, given in asked.items() if given]
    if refused:
        raise DecodingError(
            f"Self-speculation cannot be used with {', '.join(refused)}: expected greedy decoding or sampling from "
            "token ids. Leave out draft=."
        )
