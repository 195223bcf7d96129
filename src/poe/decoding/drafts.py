"""Which exit should draft, and whether one should at all: measured on prompts, against plain decoding beside it."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from poe.decoding.segments import list_exits
from poe.decoding.speculation import SelfSpeculation, build_loop, generate_with
from poe.decoding.strategy import Expert
from poe.errors import DecodingError

LENGTHS = (3, 8)
LEAST_PROBABILITIES = (0.2, 0.5)
LOOKUP_TOKENS = 8
MOST_EXITS = 6
PAYS = 1.03  # below that a draft is within the noise of the measurement
FINALISTS = 2


def calibrate_draft(
    expert: Expert, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 48, rounds: int = 3
) -> SelfSpeculation:
    """Return the draft with which `model` (it ends in `stage`) decodes the prompts (token ids) fastest.

    Every exit (of many, six that are spread evenly), length and least probability decodes each prompt once, greedily;
    the best take `rounds` turns with plain decoding, with and without looking up what followed before, and medians
    decide. Raises `DecodingError` with the numbers when none is at least 3 % faster than plain decoding.
    """
    prompts = [prompt for prompt in prompts if len(prompt)]
    if not prompts:
        raise DecodingError("Drafts are measured on prompts: expected at least one row of token ids, got none.")
    exits = list_exits(expert)
    if not exits:
        raise DecodingError("This model makes no prediction below its top, so nothing in it can draft: decode plainly.")
    rows = [torch.tensor([list(prompt)], device=expert.model.device) for prompt in prompts]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}

    model: Any = expert.model

    def plain() -> int:
        return _new(rows, [model.generate(ids, **options) for ids in rows])

    def drafted(loop: Any) -> Callable[[], int]:
        return lambda: _new(rows, [generate_with(loop, model, ids, **options) for ids in rows])

    spread = sorted({exits[round(i * (len(exits) - 1) / (MOST_EXITS - 1))] for i in range(MOST_EXITS)})
    plain()  # warm
    trials = []
    for plan in itertools.starmap(SelfSpeculation, itertools.product(spread, LENGTHS, LEAST_PROBABILITIES)):
        trials.append((_seconds_per_token(drafted(build_loop(expert, plan))), plan))
    finalists = [plan for _, plan in sorted(trials, key=lambda trial: trial[0])[:FINALISTS]]
    finalists += [dataclasses.replace(plan, prompt_lookup_num_tokens=LOOKUP_TOKENS) for plan in finalists]
    loops = [build_loop(expert, plan) for plan in finalists]
    contestants = [plain, *map(drafted, loops)]
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for taken, contestant in zip(times, contestants, strict=True):
            taken.append(_seconds_per_token(contestant))
    plainly, *others = (statistics.median(taken) for taken in times)
    seconds, loop, best = min(zip(others, loops, finalists, strict=True), key=lambda each: each[0])
    best = dataclasses.replace(best, acceptance=round(loop.accepted / loop.drafted, 4) if loop.drafted else 0.0)
    if plainly / seconds < PAYS:
        looked_up = "or looked up, " if best.prompt_lookup_num_tokens else ""
        raise DecodingError(
            f"No exit pays as a draft here: plain decoding takes {1e3 * plainly:.3g} ms a token, and the best draft "
            f"(after {best.depth} of {model.config.num_hidden_layers} layers, up to {best.num_tokens} tokens, "
            f"{looked_up}of which "
            f"{100 * (best.acceptance or 0):.0f} % are kept) {1e3 * seconds:.3g} ms. Decode plainly."
        )
    return dataclasses.replace(best, speedup=round(plainly / seconds, 3))


def _new(prompts: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    return sum(output.shape[1] - prompt.shape[1] for prompt, output in zip(prompts, outputs, strict=True))


def _seconds_per_token(decode: Callable[[], int]) -> float:
    started = perf_counter()
    tokens = decode()
    return (perf_counter() - started) / max(1, tokens)
