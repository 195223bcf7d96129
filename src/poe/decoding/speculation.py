"""Self-speculation: an early exit drafts tokens, and the layers above it verify all of them in one pass.

Where the text repeats, prompt lookup can copy the draft from earlier tokens instead, without running a layer.

Draft and model share their lower layers and the cache of those layers. Verifying starts from the states of drafting, so
nothing is computed twice. Greedy decoding gives the tokens of full depth. With sampling, each token is accepted or
drawn again so that its distribution is full depth's (Leviathan et al., arXiv 2211.17192).
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

from poe.decoding.segments import SegmentedCache, SegmentedModel, States, list_exits, segment_model
from poe.decoding.strategy import Expert, Strategy
from poe.errors import DecodingError


@dataclass(frozen=True)
class SelfSpeculation(Strategy):
    """Draft up to `num_tokens` tokens with the exit after `depth` layers, and verify them with full depth.

    Drafting stops at a token of less than `min_probability` in the exit's own distribution. With
    `prompt_lookup_num_tokens`, up to that many tokens are copied from the last place where the newest three (or two)
    tokens occurred, as in transformers' prompt lookup (Saxena 2023), and the exit drafts only where they did not occur.
    `calibrate_draft` measures `acceptance`, the share of drafted tokens that full depth keeps, and `speedup` over plain
    decoding; both are None if they were not measured.
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


def look_up_tokens(ids: Tensor, max_tokens: int) -> Tensor:
    """Return up to `max_tokens` tokens (1, n) that followed an earlier copy of the end of `ids` (1, T).

    The end is the last three tokens, or two if three occur nowhere else. The last copy with enough tokens after it
    counts, or the first copy if none has enough.
    """
    for size in (3, 2):
        if ids.shape[1] <= size:
            continue
        earlier = ids[0, :-1].unfold(0, size, 1)
        starts = (earlier == ids[0, -size:]).all(-1).nonzero().squeeze(1) + size
        if len(starts):
            long_enough = starts[starts <= ids.shape[1] - max_tokens]
            start = int(long_enough[-1] if len(long_enough) else starts[0])
            return ids[:, start : start + max_tokens]
    return ids[:, :0]


def accept_or_resample(target: Tensor, draft: Tensor | None, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Turn tokens drafted from `draft` into tokens distributed as `target`; return them and whether each was kept.

    `target` and `draft` (B, V) are probabilities, `drafted` (B, 1) are token ids. A token x is kept with probability
    min(1, target(x) / draft(x)); otherwise another is drawn from max(0, target - draft), normalized (Leviathan et al.).
    `draft` is None for copied tokens, which had probability one.
    """
    if draft is None:
        draft = torch.zeros_like(target).scatter_(1, drafted, 1.0)
    probability = target.gather(1, drafted) / draft.gather(1, drafted)
    kept = torch.rand_like(probability) < probability
    if kept.all():
        return drafted, kept
    residual = (target - draft).clamp(min=0)
    # If both distributions are equal up to rounding, the residual is zero: draw from the target.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
    return torch.where(kept, drafted, residual.multinomial(1)), kept


class DraftLoop:
    """A decoding loop for `generate(custom_generate=...)`: the lower of two segments drafts, the upper one verifies.

    All rows advance together, by the accepted tokens of the row with the fewest, and one more. That number depends on
    no later token, so each row stays exact. Finished rows do not count. `drafted`, `accepted` (tokens of one row) and
    `passes` (of the upper segment) count over all calls.
    """

    def __init__(self, segmented: SegmentedModel, plan: SelfSpeculation) -> None:
        self._segmented, self._plan = segmented, plan
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
        """Run the loop with the arguments that `generate` of transformers passes to its decoding loops."""
        _check_options(input_ids, generation_config, past_key_values)
        rows = _Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer, attention_mask)
        (lower, upper), cache = self._segmented.segments, self._segmented.new_cache()
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        states, _ = lower((), input_ids, position_ids, rows.mask(input_ids.shape[1]), cache.of[0])
        # The input of the upper segment: (B, T) tokens, drafted ones last, and the probabilities each was drawn from.
        new, positions, drafts = input_ids, position_ids, list[Tensor | None]()
        while True:
            count = len(drafts)
            _, hidden = upper(states, new, positions, rows.mask(rows.ids.shape[1] + count), cache.of[1])
            if new is input_ids:  # not earlier: a sliding window keeps only the end of a long prompt
                cache.activate_past_recording()
            logits = self._segmented.logits(1, hidden[:, -1 - count :]).to(torch.float32)
            accepted = rows.verify(logits, new[:, new.shape[1] - count :], drafts)
            self.drafted, self.accepted, self.passes = self.drafted + count, self.accepted + accepted, self.passes + 1
            if rows.ended:
                break
            cache.crop(accepted - count)
            next_position = positions[:, positions.shape[1] - 1 - count + accepted, None] + 1
            states, new, positions, drafts = self._draft(rows, cache, next_position)
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
        self, rows: "_Rows", cache: SegmentedCache, position: Tensor
    ) -> tuple[States, Tensor, Tensor, list[Tensor | None]]:
        """Run the lower segment over the newest token, at `position` (B or 1, 1), and draft tokens after it.

        Returns the states, ids and positions (B, T) of the newest and the drafted tokens, and for each drafted token
        the probabilities (B, V) that it was drawn from, None for copied tokens.
        """
        states: list[States] = []
        copied = rows.look_up(min(self._plan.prompt_lookup_num_tokens, rows.room - 1))
        drafts: list[Tensor | None] = [None] * copied.shape[1]
        ids = torch.cat([rows.ids, copied], dim=1)
        tokens = [ids[:, ids.shape[1] - 1 - len(drafts) :]]
        positions = [position + torch.arange(1 + len(drafts), device=position.device)]
        max_drafts = 0 if drafts else min(self._plan.num_tokens, rows.room - 1)
        lower = self._segmented.segments[0]
        while True:
            state, hidden = lower((), tokens[-1], positions[-1], rows.mask(ids.shape[1]), cache.of[0])
            states.append(state)
            if len(drafts) >= max_drafts:
                break
            draft = rows.processed(ids, self._segmented.logits(0, hidden)[:, -1].to(torch.float32)).softmax(-1)
            highest, most_likely = draft.max(-1, keepdim=True)
            if bool(((highest.squeeze(1) < self._plan.min_probability) & rows.unfinished).any()):
                break
            tokens.append(draft.multinomial(1) if rows.sampling else most_likely)
            positions.append(positions[-1] + 1)
            drafts.append(draft)
            ids = torch.cat([ids, tokens[-1]], dim=1)
        joined = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
        return joined, torch.cat(tokens, dim=1), torch.cat(positions, dim=1), drafts


class _Rows:
    """The rows of one call: their tokens so far, and the steps that the native loops take for each new token."""

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, mask: Tensor | None
    ) -> None:
        self.ids, self.processed, self._criteria, self._streamer = ids, processors, criteria, streamer
        self.sampling, self._pad, self._keep_scores = (
            config.do_sample,
            config._pad_token_tensor,
            config.return_dict_in_generate,
        )
        self._max_length = config.max_length
        self._mask = None if mask is None else pad(mask, (0, max(0, self._max_length - ids.shape[1])), value=1)
        self._running = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        self._pads_finished_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.unfinished = self._running == 1  # the rows that the others wait for
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def room(self) -> int:
        """The number of tokens up to the maximum length."""
        return int(self._max_length - self.ids.shape[1])

    @property
    def ended(self) -> bool:
        return not bool(self._running.any())

    def mask(self, length: int) -> Tensor | None:
        """Return the attention mask (B, length) of the first tokens, None if there is no padding."""
        return None if self._mask is None else self._mask[:, :length]

    def look_up(self, max_tokens: int) -> Tensor:
        """Return up to `max_tokens` copied tokens (B, n); n is the smallest number among the unfinished rows."""
        if max_tokens < 1:
            return self.ids[:, :0]
        copies = [look_up_tokens(row[None], max_tokens)[0] for row in self.ids]
        count = min((len(copy) for copy, on in zip(copies, self.unfinished.tolist(), strict=True) if on), default=0)
        return torch.stack([pad(copy[:count], (0, count - len(copy[:count]))) for copy in copies])

    def verify(self, logits: Tensor, drafted: Tensor, drafts: list[Tensor | None]) -> int:
        """Append the drafted tokens (B, n) that full depth's logits (B, n + 1, V) keep, and one more token.

        Returns how many drafted tokens all unfinished rows kept.
        """
        for index in range(logits.shape[1]):
            score = self.processed(self.ids, logits[:, index].clone())
            proposal = drafted[:, index, None] if index < drafted.shape[1] else None
            if self.sampling and proposal is not None:
                tokens, kept = accept_or_resample(score.softmax(-1), drafts[index], proposal)
            else:
                tokens = score.softmax(-1).multinomial(1) if self.sampling else score.argmax(-1, keepdim=True)
                kept = tokens == proposal if proposal is not None else torch.zeros_like(tokens, dtype=torch.bool)
            all_kept = bool((kept.squeeze(1) | ~self.unfinished).all()) and proposal is not None
            self._append(tokens.squeeze(1), score, logits[:, index])
            if self.ended or not all_kept:
                break
        return index

    def _append(self, tokens: Tensor, score: Tensor, logits: Tensor) -> None:
        if self._keep_scores:
            self.scores.append(score)
            self.logits.append(logits)
        if self._pads_finished_rows:
            tokens = tokens * self._running + self._pad * (1 - self._running)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self._running = self._running & ~self._criteria(self.ids, tuple(self.scores) if self.scores else None)
        if self._pads_finished_rows:  # a finished row gets only padding, so the others need not wait for it
            self.unfinished = self._running == 1
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())


def build_loop(expert: Expert, plan: SelfSpeculation) -> DraftLoop:
    """Return the decoding loop of a plan. Raises `DecodingError` for a depth without an exit."""
    exits = list_exits(expert)
    if plan.depth not in exits:
        raise DecodingError(
            f"SelfSpeculation drafts after {plan.depth!r} layers, but this model has exits below its top after "
            f"{', '.join(map(str, exits)) or 'none'} (layers): expected one of these."
        )
    return DraftLoop(segment_model(expert, [plan.depth]), plan)


def generate_with(
    loop: Callable[..., Any],
    model: Any,
    *args: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """Call `model.generate` with a decoding loop of ours.

    transformers does not pass the streamer and the tokenizer of the stop strings to such a loop, so this does.
    """
    if kwargs.get("stop_strings") is not None:  # None, if it is given, replaces those of the generation config
        if tokenizer is None:
            raise DecodingError("stop_strings need a tokenizer: pass tokenizer=... as well.")
        strings = kwargs.pop("stop_strings")
        criteria = [*(kwargs.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)

    def decode(model: PreTrainedModel, input_ids: Tensor, **prepared: Any) -> Any:
        return loop(model, input_ids, **{**prepared, "streamer": streamer})

    return model.generate(*args, streamer=streamer, custom_generate=decode, **kwargs)


def _check_options(input_ids: Tensor, config: Any, past_key_values: Any) -> None:
    """Raise `DecodingError` for options of `generate` that self-speculation does not support."""
    unsupported = {
        "num_beams": (config.num_beams or 1) > 1,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "inputs_embeds": input_ids.shape[1] == 0,
        "past_key_values": isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() > 0,
        "cache_implementation": past_key_values is not None and not isinstance(past_key_values, DynamicCache),
        "use_cache=False": config.use_cache is False,
    }
    rejected = [name for name, is_used in unsupported.items() if is_used]
    if rejected:
        raise DecodingError(
            f"Self-speculation does not support {', '.join(rejected)}: expected greedy decoding or sampling from token "
            "ids. Leave out these options or strategy=."
        )
