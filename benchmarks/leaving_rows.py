"""What a batch costs that goes on until its longest reply has ended, and one that rows leave when they have ended.

    python benchmarks/leaving_rows.py --base FOLDER --suite xlam=FILE --rows 32 --max-new-tokens 96

Both decode the same questions greedily, free and constrained. Rows are counted in every pass. The replies are compared:
smaller matrix products are rounded otherwise, so in bf16 a token with a near tie may differ. The last line is the cost
of teacher forcing on the same rows.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from poe import Cascade
from poe.chat import RawReply, generate_replies
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.evaluation.call_suite import CallSuite, Questions
from poe.evaluation.kinds import make_suite, read_sources
from poe.evaluation.suites import Item, Settings
from poe.evaluation.teacher_forcing import AnswerForcing


def decode(questions: Questions, items: Sequence[Item], settings: Settings, *, leaves: bool) -> tuple[Any, ...]:
    """Return the replies, the seconds, the passes, and the rows of all passes."""
    model: Any = questions.cascade.model(questions.cascade.active)
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    limit = settings.max_new_tokens
    constraints = [questions.make_constraint(item.content, None, limit) for item in items]
    started = time.perf_counter()
    replies: list[RawReply] = generate_replies(
        model,
        questions.cascade.tokenizer,
        [item.tokens for item in items],
        questions.renderer.stop_token_ids,
        max_new_tokens=limit,
        constraints=constraints if settings.constrain else None,
        generate=None if leaves else model.generate,
    )
    hook.remove()
    return replies, time.perf_counter() - started, len(rows), sum(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo")
    parser.add_argument("--suite", default="demo=32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cascade = Cascade.from_pretrained(args.base, dtype=args.dtype)
    complete_template(cascade.tokenizer)
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    settings = Settings(max_new_tokens=args.max_new_tokens, rows=args.rows)
    suite = make_suite(read_sources(args.suite)[0], cascade, renderer, settings)
    assert isinstance(suite, CallSuite)
    questions, items = Questions(cascade, renderer), suite.items
    decode(questions, items[:2], replace(settings, max_new_tokens=4), leaves=True)  # warm up
    print(f"{len(items)} questions, prompts of {sum(len(item.tokens) for item in items) / len(items):.0f} tokens")
    print("| replies | loop | seconds | passes | rows of all passes | equal replies |\n|---|---|---:|---:|---:|---:|")
    for constrain in (False, True):
        chosen, kind = replace(settings, constrain=constrain), "constrained" if constrain else "free"
        whole = decode(questions, items, chosen, leaves=False)
        leaving = decode(questions, items, chosen, leaves=True)
        equal = sum(a == b for a, b in zip(whole[0], leaving[0], strict=True))
        print(f"| {kind} | all rows to the end | {whole[1]:.1f} | {whole[2]} | {whole[3]:,} | |")
        print(f"| {kind} | rows leave | {leaving[1]:.1f} | {leaving[2]} | {leaving[3]:,} | {equal} of {len(items)} |")
    started = time.perf_counter()
    AnswerForcing(cascade, renderer).count_right_tokens(cascade.active, [item.content for item in items])
    print(f"teacher forcing: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
