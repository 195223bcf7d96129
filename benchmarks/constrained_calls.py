"""Calls under a grammar on random tool sets: are they readable, valid and finished, and what does it cost?

    python benchmarks/constrained_calls.py random --sets 2000
    python benchmarks/constrained_calls.py runs/demo --sets 2000 --cost 20
    python benchmarks/constrained_calls.py /path/to/SmolLM2-135M-Instruct --sets 2000 --cost 20

`random` is a model of random weights, once with each of four kinds of tokenizer; any other name is a base or a stage
for `Cascade.from_pretrained`. Every tool set of `tool_sets.py` is asked for one question with `tool_choice="required"`.
A set whose shortest call has no room in `--max-new-tokens` is counted as refused. The shares are of the others:

    readable   the call form reads at least one call, and nothing in the reply is malformed
    valid      every call names a given tool and fits its schema
    finished   the reply ends with a stop token
    closed     the ending came from the constraint, because `--max-new-tokens` came near

`--cost N` then answers N sets alone, free and constrained, both with the same number of tokens. It prints the medians
of the CPU time per token, and the share of the constrained time that is spent in the constraint. Both take one pass of
the model for each token.

`--skip N` answers N sets alone with one pass for each token, and with forced tokens that skip the model. It prints the
passes, and the CPU time per token without the prompt's pass.

The prompt is the question alone: what a reply may be does not depend on it, and prompts with tools take most of the
time. `--tools-in-prompt` shows the tools as well.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tool_sets import make_tools

from chat_families import family
from poe import Cascade
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import check_calls
from poe.chat import RawReply, ReplyPlan, generate_replies, plan_reply
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.decoding.constraints import Constraint
from poe.errors import DecodingError

KINDS = {"byte-level": "qwen3", "space marks": "llama-2", "unigram": "chatml, unigram", "demo": "demo"}
QUESTION = [{"role": "user", "content": "Please do what I asked for yesterday, for Marla, 37 people, in Größenau."}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="random, or a base or stage")
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first set")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--cost", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tools-in-prompt", action="store_true")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| model | tokenizer | sets | refused | readable | valid | finished | closed | compile ms, median (95 %) |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, model, tokenizer in list_models(args.model):
        complete_template(tokenizer)
        print(f"| {args.model} | {name} | {measure_shares(args, model, tokenizer)} |", flush=True)
        if args.cost:
            print(measure_cost(args, model, tokenizer), flush=True)
        if args.skip:
            print(measure_skipping(args, model, tokenizer), flush=True)


def list_models(name: str) -> Iterator[tuple[str, PreTrainedModel, Any]]:
    """Yield a kind of tokenizer, a model and the tokenizer."""
    if name != "random":
        cascade = Cascade.from_pretrained(name)
        yield "its own", cascade.model(cascade.active), cascade.tokenizer
        return
    for kind, key in KINDS.items():
        tokenizer = Cascade.from_pretrained("demo").tokenizer if key == "demo" else family(key)
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 5,  # a head is often larger than the vocabulary
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8192,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # so that its choices are not nearly equal
            model.lm_head.weight.mul_(30)
        yield kind, model, tokenizer


def make_questions(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the seed, tools, plan, constraint (None if the set is refused), seconds and prompt of each tool set."""
    renderer = Renderer(tokenizer, vocab_size=model.config.vocab_size)
    for seed in range(args.first, args.first + args.sets):
        tools = make_tools(seed)
        started = time.process_time()
        options = {"tool_choice": "required"}
        plan = plan_reply(tokenizer, model.config.vocab_size, renderer.stop_token_ids, tools, **options)
        try:
            constraint = plan.make_constraint(args.max_new_tokens)
        except DecodingError:
            constraint = None
        seconds = time.process_time() - started
        shown = tools if args.tools_in_prompt else ()
        yield seed, tools, plan, constraint, seconds, renderer.prompt_ids(QUESTION, shown)


def measure_shares(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> str:
    stops = Renderer(tokenizer, vocab_size=model.config.vocab_size).stop_token_ids
    counts: Counter[str] = Counter()
    times: list[float] = []
    batch: list[tuple[Any, ...]] = []
    for question in make_questions(args, model, tokenizer):
        times.append(question[4])
        if question[3] is None:
            counts["refused"] += 1
            continue
        batch.append(question)
        if len(batch) == args.batch:
            answer_batch(args, model, tokenizer, stops, batch, counts)
            batch = []
    if batch:
        answer_batch(args, model, tokenizer, stops, batch, counts)
    asked = args.sets - counts["refused"]
    shares = [f"{counts[key] / max(1, asked):.2%}" for key in ("readable", "valid", "finished", "closed")]
    times = sorted(times[1:] or times)  # the first one reads the vocabulary
    speed = f"{1e3 * statistics.median(times):.1f} ({1e3 * times[int(0.95 * len(times))]:.1f})"
    return " | ".join([str(args.sets), str(counts["refused"]), *shares, speed])


def answer_batch(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    stops: tuple[int, ...],
    batch: list[tuple[Any, ...]],
    counts: Counter[str],
) -> None:
    constraints = [question[3] for question in batch]
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch, "do_sample": args.sample}
    replies = generate_replies(model, tokenizer, [q[5] for q in batch], stops, constraints=constraints, **options)
    for (seed, tools, plan, constraint, *_), reply in zip(batch, replies, strict=True):
        found = judge_reply(plan, tools, constraint, reply)
        counts.update(key for key, holds in found.items() if holds)
        if not (found["readable"] and found["valid"] and found["finished"]):
            print(f"seed {seed}: {found}: {reply.text[-200:]!r}", file=sys.stderr)


def judge_reply(plan: ReplyPlan, tools: Any, constraint: Constraint, reply: RawReply) -> dict[str, bool]:
    parsed = parse_reply(reply.text, plan.form)
    return {
        "readable": bool(parsed.calls) and not parsed.malformed,
        "valid": bool(parsed.calls) and not check_calls(parsed.calls, tools),
        "finished": constraint.is_finished,
        "closed": constraint.is_cut,
    }


class Timed:
    """A constraint that counts the seconds that it takes."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint, self.seconds = constraint, 0.0

    def follow(self, tokens: list[int]) -> None:
        started = time.process_time()
        self.constraint.follow(tokens)
        self.seconds += time.process_time() - started

    def mask(self, logits: torch.Tensor) -> None:
        started = time.process_time()
        self.constraint.mask(logits)
        self.seconds += time.process_time() - started

    @property
    def is_cut(self) -> bool:
        return self.constraint.is_cut

    @property
    def is_finished(self) -> bool:
        return self.constraint.is_finished


def measure_cost(args: argparse.Namespace, model: Any, tokenizer: Any) -> str:
    free_times, constrained_times, own_times, tokens = [], [], [], 0
    for _, _, plan, constraint, _, prompt in list(make_questions(args, model, tokenizer))[: args.cost]:
        if constraint is None:
            continue
        for _ in range(2):  # the first round prepares kernels for these lengths, and does not count
            timed: Any = Timed(constraint.copy())
            started = time.process_time()
            options = {"constraints": [timed], "max_new_tokens": args.max_new_tokens, "generate": model.generate}
            (reply,) = generate_replies(model, tokenizer, [prompt], plan.vocabulary.stops, **options)
            seconds = time.process_time() - started
            count = reply.num_tokens + timed.is_finished
            stops = (model.config.vocab_size - 1,)  # a token that is hardly written, so that it takes as many tokens
            started = time.process_time()
            (reply,) = generate_replies(model, tokenizer, [prompt], stops, max_new_tokens=count)
            free_seconds = time.process_time() - started
            assert reply.num_tokens == count, "the free reply ended earlier"
        free_times.append(free_seconds / count)
        constrained_times.append(seconds / count)
        own_times.append(timed.seconds / count)
        tokens += count
    medians = [1e3 * statistics.median(times) for times in (free_times, constrained_times, own_times)]
    share = sum(own_times) / sum(constrained_times)
    return (
        f"ms per token over {tokens} tokens, medians: free {medians[0]:.2f}, constrained {medians[1]:.2f} "
        f"({medians[1] / medians[0] - 1:+.1%}), in the constraint {medians[2]:.3f} ({share:.1%} of the time)"
    )


class PassTimer:
    """Hooks that count the passes of a model, and note when the first one ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.passes, self.after_prompt = 0, 0.0
        self._hook = model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1
        if self.passes == 1:
            self.after_prompt = time.process_time()

    def finish(self) -> float:
        """Remove the hook; return the seconds since the prompt's pass."""
        self._hook.remove()
        return time.process_time() - self.after_prompt


def measure_skipping(args: argparse.Namespace, model: Any, tokenizer: Any) -> str:
    passes, seconds, tokens, equal, sets = [0, 0], [0.0, 0.0], 0, 0, 0
    for _, _, plan, constraint, _, prompt in list(make_questions(args, model, tokenizer))[: args.skip]:
        if constraint is None:
            continue
        replies = []
        for way, generate in enumerate((model.generate, None)):
            timer = PassTimer(model)
            options = {"constraints": [constraint.copy()], "max_new_tokens": args.max_new_tokens, "generate": generate}
            replies += generate_replies(model, tokenizer, [prompt], plan.vocabulary.stops, **options)
            seconds[way] += timer.finish()
            passes[way] += timer.passes
        tokens += replies[0].num_tokens + 1
        equal, sets = equal + (replies[0] == replies[1]), sets + 1
    ordinary, skipping = (1e3 * time / tokens for time in seconds)
    return (
        f"{tokens} tokens of {sets} replies, {equal} equal: passes {passes[0]} and {passes[1]}, CPU ms per token "
        f"{ordinary:.2f} and {skipping:.2f} ({ordinary / skipping:.2f}x)"
    )


if __name__ == "__main__":
    main()
