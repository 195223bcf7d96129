"""Calibrate self-speculation: time drafts on prompts beside plain decoding."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from poe.decoding.generation import greedy_options
from poe.decoding.segments import list_exits
from poe.decoding.speculation import DraftLoop, SelfSpeculation, build_loop, generate_with
from poe.decoding.strategy import Expert
from poe.errors import DecodingError

LENGTHS = (3, 8)
MIN_PROBABILITIES = (0.2, 0.5)
LOOKUP_TOKENS = 8
MAX_EXITS = 6
MIN_SPEEDUP = 1.03  # smaller gains are within the noise of the measurement
FINALISTS = 2


def calibrate_draft(
    expert: Expert, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 48, rounds: int = 3
) -> SelfSpeculation:
    """Return the draft that decodes the prompts (rows of token ids) fastest.

    Each exit (at most six, evenly spread), length and minimum probability decodes each prompt once, greedily. The best
    ones then take `rounds` turns with plain decoding, with and without prompt lookup; medians decide. Raises
    `DecodingError`, with the times, if none is at least 3 % faster than plain decoding.
    """
    prompts = [prompt for prompt in prompts if len(prompt)]
    if not prompts:
        raise DecodingError("Drafts are measured on prompts: expected at least one row of token ids, got none.")
    exits = list_exits(expert)
    if not exits:
        raise DecodingError("This model has no exit below its top, so it cannot draft: leave out strategy=.")
    rows = [torch.tensor([list(prompt)], device=expert.model.device) for prompt in prompts]
    options = greedy_options(max_new_tokens=max_new_tokens)
    model: Any = expert.model

    def decode_plainly() -> int:
        return _count_new_tokens(rows, [model.generate(ids, **options) for ids in rows])

    def decode_with(loop: DraftLoop) -> Callable[[], int]:
        return lambda: _count_new_tokens(rows, [generate_with(loop, model, ids, **options) for ids in rows])

    tried_exits = sorted({exits[round(i * (len(exits) - 1) / (MAX_EXITS - 1))] for i in range(MAX_EXITS)})
    decode_plainly()  # warm up
    trials = []
    for plan in itertools.starmap(SelfSpeculation, itertools.product(tried_exits, LENGTHS, MIN_PROBABILITIES)):
        trials.append((_seconds_per_token(decode_with(build_loop(expert, plan))), plan))
    finalists = [plan for _, plan in sorted(trials, key=lambda trial: trial[0])[:FINALISTS]]
    finalists += [dataclasses.replace(plan, prompt_lookup_num_tokens=LOOKUP_TOKENS) for plan in finalists]
    loops = [build_loop(expert, plan) for plan in finalists]
    decoders = [decode_plainly, *map(decode_with, loops)]
    times: list[list[float]] = [[] for _ in decoders]
    for _ in range(rounds):
        for decoder_times, decoder in zip(times, decoders, strict=True):
            decoder_times.append(_seconds_per_token(decoder))
    plain_seconds, *draft_seconds = (statistics.median(decoder_times) for decoder_times in times)
    seconds, loop, best = min(zip(draft_seconds, loops, finalists, strict=True), key=lambda result: result[0])
    best = dataclasses.replace(best, acceptance=round(loop.accepted / loop.drafted, 4) if loop.drafted else 0.0)
    if plain_seconds / seconds < MIN_SPEEDUP:
        lookup = ", with prompt lookup" if best.prompt_lookup_num_tokens else ""
        raise DecodingError(
            f"No exit pays as a draft here: plain decoding takes {1e3 * plain_seconds:.3g} ms a token, the best draft "
            f"{1e3 * seconds:.3g} ms (after {best.depth} of {model.config.num_hidden_layers} layers, up to "
            f"{best.num_tokens} tokens{lookup}, {100 * (best.acceptance or 0):.0f} % of them kept). "
            "Leave out strategy=."
        )
    return dataclasses.replace(best, speedup=round(plain_seconds / seconds, 3))


def _count_new_tokens(prompts: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    return sum(output.shape[1] - prompt.shape[1] for prompt, output in zip(prompts, outputs, strict=True))


def _seconds_per_token(decode: Callable[[], int]) -> float:
    started = perf_counter()
    tokens = decode()
    return (perf_counter() - started) / max(1, tokens)
