"""Self-speculation: an early exit drafts, the layers above it verify all drafted tokens in one pass.

Where the text repeats itself, what followed the last time may be drafted instead: looked up, for no layer's time.

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
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from poe.decoding.segments import PartsCache, SegmentedModel, States, list_exits, segment_model
from poe.decoding.strategy import Expert, Strategy
from poe.errors import DecodingError


@dataclass(frozen=True)
class SelfSpeculation(Strategy):
    """How to draft: up to `num_tokens` from the exit after `depth` layers, while the draft is sure.

    A token is drafted only where the likeliest one has at least `min_probability` in the draft's own distribution.
    With `prompt_lookup_num_tokens`, up to so many tokens are copied from where the last three tokens (or else the last
    two) occurred before (as transformers' prompt lookup does, Saxena 2023), and the exit drafts only where they did
    not. `acceptance`, the share of drafted tokens that full depth kept, and `speedup` over plain decoding are what
    `calibrate_draft` measured; None where nothing was.
    """

    depth: int
    num_tokens: int = 5
    min_probability: float = 0.4
    prompt_lookup_num_tokens: int = 0
    acceptance: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 0 <= self.min_probability < 1 or self.prompt_lookup_num_tokens < 0:
            raise DecodingError(
                "A draft needs at least one token, a min_probability from 0 to below 1, and no negative number of "
                f"tokens to look up: got num_tokens={self.num_tokens!r}, min_probability={self.min_probability!r}, "
                f"prompt_lookup_num_tokens={self.prompt_lookup_num_tokens!r}."
            )

    def build_model(self, expert: Expert) -> PreTrainedModel:
        """Return the expert's own model: drafting changes the decoding loop, not the forward pass."""
        return expert.model

    def generate(self, expert: Expert, *args: Any, **kwargs: Any) -> Any:
        """Generate with a loop that drafts and verifies. Raises `DecodingError` for options that it cannot support."""
        return generate_with(build_loop(expert, self), expert.model, *args, **kwargs)


def looked_up(ids: Tensor, most: int) -> Tensor:
    """Return up to `most` tokens (1, n) that followed the last three, or else two, tokens of `ids` (1, T) earlier.

    Of several places it is the last one that enough tokens follow, or else the first.
    """
    for size in (3, 2):
        if ids.shape[1] <= size:
            continue
        earlier = ids[0, :-1].unfold(0, size, 1)
        starts = (earlier == ids[0, -size:]).all(-1).nonzero().squeeze(1) + size
        if len(starts):
            enough = starts[starts <= ids.shape[1] - most]
            start = int(enough[-1] if len(enough) else starts[0])
            return ids[:, start : start + most]
    return ids[:, :0]


def accept(target: Tensor, draft: Tensor | None, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Leviathan's rule: given tokens drafted from `draft`, return tokens distributed as `target`, and which were kept.

    `target`, `draft` (B, V) are probabilities, `drafted` (B, 1) token ids. A token x is kept with probability
    min(1, target(x) / draft(x)); where it is not, another is drawn from max(0, target - draft), normalized. Without
    `draft` the tokens were not drawn: each had probability one.
    """
    if draft is None:
        draft = torch.zeros_like(target).scatter_(1, drafted, 1.0)
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

    def __init__(self, path: SegmentedModel, plan: SelfSpeculation) -> None:
        self._path, self._plan = path, plan
        self.drafted = self.accepted = self.passes = 0

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generate as the native loops do; `generate` prepares and passes all of these."""
        _refuse(input_ids, generation_config, past_key_values)
        rows = _Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer, attention_mask)
        upper, cache = self._path.parts[1], self._path.new_cache()
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        states, _ = self._path.parts[0]((), input_ids, position_ids, rows.mask(input_ids.shape[1]), cache.of[0])
        # What the upper part has not seen yet: (B, T) tokens, the drafted ones last, and what these were drawn from.
        new, where, guesses = input_ids, position_ids, list[Tensor | None]()
        while True:
            count = len(guesses)
            _, hidden = upper(states, new, where, rows.mask(rows.ids.shape[1] + count), cache.of[1])
            if new is input_ids:  # only now: of a long prompt a window keeps no more than it needs
                cache.activate_past_recording()
            logits = self._path.logits(1, hidden[:, -1 - count :]).to(torch.float32)
            accepted = rows.verify(logits, new[:, new.shape[1] - count :], guesses)
            self.drafted, self.accepted, self.passes = self.drafted + count, self.accepted + accepted, self.passes + 1
            if rows.ended:
                break
            cache.crop(accepted - count)
            following = where[:, where.shape[1] - 1 - count + accepted, None] + 1
            states, new, where, guesses = self._draft(rows, cache, following)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return rows.ids
        return GenerateDecoderOnlyOutput(
            sequences=rows.ids,  # type: ignore[arg-type]
            scores=tuple(rows.scores) if generation_config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(rows.logits) if generation_config.output_logits else None,  # type: ignore[arg-type]
        )

    def _draft(
        self, rows: "_Rows", cache: PartsCache, position: Tensor
    ) -> tuple[States, Tensor, Tensor, list[Tensor | None]]:
        """Run the lower part over the last token, at `position` (B or 1, 1), and over those that it drafts after it.

        Returns the states, ids and positions (B, T) of all of them, and for each drafted token the probabilities (B, V)
        that it was drawn from. Where the draft is not sure, full depth predicts from the states that are there anyway.
        """
        states: list[States] = []
        found = rows.look_up(min(self._plan.prompt_lookup_num_tokens, rows.room - 1))
        guesses: list[Tensor | None] = [None] * found.shape[1]
        ids = torch.cat([rows.ids, found], dim=1)
        tokens = [ids[:, ids.shape[1] - 1 - len(guesses) :]]
        places = [position + torch.arange(1 + len(guesses), device=position.device)]
        most = 0 if guesses else min(self._plan.num_tokens, rows.room - 1)
        while True:
            state, hidden = self._path.parts[0]((), tokens[-1], places[-1], rows.mask(ids.shape[1]), cache.of[0])
            states.append(state)
            if len(guesses) >= most:
                break
            guess = rows.processed(ids, self._path.logits(0, hidden)[:, -1].to(torch.float32)).softmax(-1)
            surest, likeliest = guess.max(-1, keepdim=True)
            if bool(((surest.squeeze(1) < self._plan.min_probability) & rows.waited_for).any()):
                break
            tokens.append(guess.multinomial(1) if rows.sampling else likeliest)
            places.append(places[-1] + 1)
            guesses.append(guess)
            ids = torch.cat([ids, tokens[-1]], dim=1)
        together = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
        return together, torch.cat(tokens, dim=1), torch.cat(places, dim=1), guesses


class _Rows:
    """The rows of one call: their tokens so far, which go on, and what the native loops do with every new token."""

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, mask: Tensor | None
    ) -> None:
        self.ids, self.processed, self._criteria, self._streamer = ids, processors, criteria, streamer
        self.sampling, self._pad, self._keep = (
            config.do_sample,
            config._pad_token_tensor,
            config.return_dict_in_generate,
        )
        self._length = config.max_length
        self._mask = None if mask is None else pad(mask, (0, max(0, self._length - ids.shape[1])), value=1)
        self._unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        self._padded = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.waited_for = self._unfinished == 1
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return int(self._length - self.ids.shape[1])

    @property
    def ended(self) -> bool:
        return not bool(self._unfinished.any())

    def mask(self, length: int) -> Tensor | None:
        """The attention mask (B, length) of all tokens up to there, None if none is padding."""
        return None if self._mask is None else self._mask[:, :length]

    def look_up(self, most: int) -> Tensor:
        """Up to `most` tokens (B, n) that followed before: as many as every row that is waited for has, else none."""
        if most < 1:
            return self.ids[:, :0]
        found = [looked_up(row[None], most)[0] for row in self.ids]
        count = min((len(own) for own, on in zip(found, self.waited_for.tolist(), strict=True) if on), default=0)
        return torch.stack([pad(own[:count], (0, count - len(own[:count]))) for own in found])

    def verify(self, logits: Tensor, drafted: Tensor, guesses: list[Tensor | None]) -> int:
        """Take over drafted tokens (B, n) as far as full depth's logits (B, n + 1, V) keep them, and one token more.

        Returns how many were kept in every row that is waited for.
        """
        for index in range(logits.shape[1]):
            score = self.processed(self.ids, logits[:, index].clone())
            draft = drafted[:, index, None] if index < drafted.shape[1] else None
            if self.sampling and draft is not None:
                tokens, kept = accept(score.softmax(-1), guesses[index], draft)
            else:
                tokens = score.softmax(-1).multinomial(1) if self.sampling else score.argmax(-1, keepdim=True)
                kept = tokens == draft if draft is not None else torch.zeros_like(tokens, dtype=torch.bool)
            on = bool((kept.squeeze(1) | ~self.waited_for).all()) and draft is not None
            self._add(tokens.squeeze(1), score, logits[:, index])
            if self.ended or not on:
                break
        return index

    def _add(self, tokens: Tensor, score: Tensor, logits: Tensor) -> None:
        if self._keep:
            self.scores.append(score)
            self.logits.append(logits)
        if self._padded:
            tokens = tokens * self._unfinished + self._pad * (1 - self._unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self._unfinished = self._unfinished & ~self._criteria(self.ids, tuple(self.scores) if self.scores else None)
        if self._padded:  # a row that has ended is only padded from here on
            self.waited_for = self._unfinished == 1
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())


def build_loop(expert: Expert, plan: SelfSpeculation) -> Drafting:
    """Return the decoding loop of a plan. Raises `DecodingError` for a depth without an exit."""
    exits = list_exits(expert)
    if plan.depth not in exits:
        raise DecodingError(
            f"SelfSpeculation drafts after {plan.depth!r} layers, but this model has exits below its top after "
            f"{', '.join(map(str, exits)) or 'none'} (layers): expected one of these."
        )
    return Drafting(segment_model(expert, [plan.depth]), plan)


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
        "past_key_values": isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() > 0,
        "cache_implementation": past_key_values is not None and not isinstance(past_key_values, DynamicCache),
        "use_cache=False": config.use_cache is False,
    }
    refused = [name for name, given in asked.items() if given]
    if refused:
        raise DecodingError(
            f"Self-speculation cannot be used with {', '.join(refused)}: expected greedy decoding or sampling from "
            "token ids. Leave out strategy=."
        )
