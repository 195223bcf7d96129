"""Quality of the exits of one base, and speed of early exit and self-speculation against plain decoding.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/decoding.py --base FOLDER --text FILE [--prompts FILE] [--stage FOLDER] [--rounds 3]

`--text` is a file of plain text, which the benchmark cuts into rows. Every second row calibrates the exits (for the
JSON set, calls with other names do). The remaining rows measure the bits per byte of each exit and its agreement with
the top-1 token of full depth. Three sets of prompts are decoded, one prompt at a time, greedily and to the full length:
beginnings of rows ("text"), repeated JSON calls ("json"), and the list in the JSON file `--prompts` ("prompts"). The
peer is the prompt lookup decoding of transformers.

In every round each arm of a set decodes all its prompts, in one process. `tokens/s` is the median over the rounds. `x`
is the median of the ratios to plain decoding in the same round. `same` is the share of tokens that equal plain
decoding.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from poe import Cascade
from poe.decoding import AdaptiveDepth, Exit
from poe.decoding.segments import States, list_exits, segment_model
from poe.decoding.speculation import SelfSpeculation, build_loop, generate_with
from poe.errors import DecodingError

CALLS = [
    '{"name": "get_weather", "arguments": {"city": "%s", "days": %d}}\n',
    '<tool_call>{"name": "book_table", "arguments": {"restaurant": "%s", "guests": %d}}</tool_call>\n',
    '[{"id": %d, "type": "user", "name": "%s", "active": true}]\n',
]
PLACES = ["Paris", "London", "Rome", "Oslo", "Cairo", "Lima"]


OTHERS = "Bern Delhi Quito Sofia Tunis Seoul Accra Milan Lyon Perth Osaka Porto".split()  # for calibration


def json_prompts(names: list[str], count: int) -> list[str]:
    """Return `count` prompts, each a series of calls in one form, as examples of structured output."""
    prompts = []
    for index in range(count):
        form = CALLS[index % len(CALLS)]
        rotated = names[index % len(names) :] + names[: index % len(names)]
        values = [
            (name, i + 2) if form.index("%s") < form.index("%d") else (i + 2, name) for i, name in enumerate(rotated)
        ]
        prompts.append("".join(form % value for value in values))
    return prompts


@torch.no_grad()
def exits_table(cascade: Cascade, rows: list[list[int]]) -> list[dict[str, Any]]:
    """Return the bits per byte of every exit, and the share of top-1 tokens that equal those of full depth."""
    expert = cascade.expert(cascade.active)
    path = segment_model(expert, list_exits(expert))
    nats, same = [0.0] * len(path.segments), [0] * len(path.segments)
    count = size = 0
    for row in rows:
        ids = torch.tensor([row])
        states: States = ()
        predictions = []
        for index, part in enumerate(path.segments):
            states, hidden = part(states, ids, torch.arange(len(row))[None])
            logits = path.logits(index, hidden[0, :-1]).float()
            nats[index] += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            predictions.append(logits.argmax(-1))
        same = [total + int((own == predictions[-1]).sum()) for total, own in zip(same, predictions, strict=True)]
        count += len(row) - 1
        size += len(cascade.tokenizer.decode(row[1:]).encode())
    return [
        {"exit": depth, "bpb": round(n / math.log(2) / size, 4), "agreement": round(s / count, 4)}
        for depth, n, s in zip(path.depths, nats, same, strict=True)
    ]


def race(
    arms: dict[str, Callable[[torch.Tensor], torch.Tensor]], prompts: list[torch.Tensor], rounds: int
) -> list[dict]:
    """Decode all prompts with every arm in every round; return a record per arm. The first arm is the reference."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    outputs: dict[str, list[torch.Tensor]] = {}
    for turn in range(rounds + 1):  # the first round warms up
        for name, arm in arms.items():
            started = time.perf_counter()
            outputs[name] = [arm(ids) for ids in prompts]
            seconds = time.perf_counter() - started
            if turn:
                new = sum(o.shape[1] - p.shape[1] for o, p in zip(outputs[name], prompts, strict=True))
                rates[name].append(new / seconds)
    plain = next(iter(arms))
    table = []
    for name in arms:
        pairs = list(zip(outputs[name], outputs[plain], prompts, strict=True))
        equal = sum(int((ours[:, p.shape[1] :] == theirs[:, p.shape[1] :]).sum()) for ours, theirs, p in pairs)
        table.append(
            {
                "arm": name,
                "tokens_per_s": round(statistics.median(rates[name]), 2),
                "x": round(statistics.median(a / b for a, b in zip(rates[name], rates[plain], strict=True)), 3),
                "same": round(equal / sum(theirs.shape[1] - p.shape[1] for _, theirs, p in pairs), 4),
            }
        )
    return table


def arms_of(
    cascade: Cascade, depths: dict[str, Any], args: argparse.Namespace, loops: dict[str, Any]
) -> dict[str, Any]:
    """Return all decoding arms by name, and add the speculation loops to `loops`, which count drafted tokens."""
    options = {"do_sample": False, "max_new_tokens": args.new_tokens, "eos_token_id": None}
    expert = cascade.expert(cascade.active)
    model: Any = expert.model
    exits = list_exits(expert)
    arms: dict[str, Any] = {"plain": partial(model.generate, **options)}
    arms["peer: prompt lookup, up to 8"] = partial(model.generate, **options, prompt_lookup_num_tokens=8)
    for depth in exits:
        arms[f"exit {depth}"] = partial(cascade.generate, **options, stage=None, strategy=Exit(depth))
    for name, depth in depths.items():
        arms[name] = partial(cascade.generate, **options, strategy=depth)
    for depth in args.draft_exits or exits:
        plans = {f"up to {n}": SelfSpeculation(depth, n, args.min_probability) for n in args.lengths}
        with_lookup = SelfSpeculation(depth, args.lengths[-1], args.min_probability, prompt_lookup_num_tokens=8)
        for name, plan in {**plans, f"up to {args.lengths[-1]}, or looked up": with_lookup}.items():
            loop = loops[f"draft {depth}, {name}"] = build_loop(expert, plan)
            arms[f"draft {depth}, {name}"] = partial(generate_with, loop, model, **options)
    return arms


def calibrate_depths(cascade: Cascade, rows: list[list[int]], args: argparse.Namespace) -> dict[str, AdaptiveDepth]:
    """Calibrate thresholds for 99 % and 100 % agreement on `rows`, and print the share of tokens at each exit."""
    depths = {}
    for target in (0.99, 1.0):
        depth = cascade.calibrate_depth(rows, agreement=target, confidence=args.confidence)
        pairs = zip([*depth.depths, depth.full], depth.shares, strict=True)
        shares = ", ".join(f"{share:.0%} at {layers}" for layers, share in pairs)
        print(f"\nadaptive {target:.0%}: held-out agreement {depth.agreement:.2%}; exits: {shares}")
        depths[f"adaptive {target:.0%}"] = depth
    return depths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--stage", type=Path, help="folder of a saved stage; full depth is then base and stage")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="a JSON list of prompts")
    parser.add_argument("--dtype", default="float32")
    for name, value in {"rows": 64, "seq_len": 256, "texts": 4, "new_tokens": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--draft-exits", type=int, nargs="+", help="default: all")
    parser.add_argument("--min-probability", type=float, default=0.3)
    parser.add_argument("--confidence", default="margin")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/decoding.json"))
    args = parser.parse_args()
    cascade = Cascade.from_pretrained(args.base, dtype=args.dtype)
    if args.stage:
        cascade.load_stage(args.stage)
    text = args.text.read_text(encoding="utf-8", errors="replace")[: 8 * args.rows * args.seq_len]
    ids = cascade.tokenizer(text)["input_ids"]
    rows = [ids[i : i + args.seq_len] for i in range(0, len(ids) - args.seq_len + 1, args.seq_len)][: args.rows]
    report: dict[str, Any] = {
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "exits": exits_table(cascade, rows[1::2]),
    }
    print("| exit | bits per byte | agreement |\n|---:|---:|---:|")
    for row in report["exits"]:
        print(f"| {row['exit']} | {row['bpb']} | {100 * row['agreement']:.1f} % |")
    calls = cascade.tokenizer(json_prompts(OTHERS, 36))["input_ids"]
    prompts = {"text": [row[: len(row) // 4] for row in rows[1::2][: args.texts]]}
    prompts["json"] = cascade.tokenizer(json_prompts(PLACES, len(CALLS)))["input_ids"]
    if args.prompts:
        prompts["prompts"] = [cascade.tokenizer(text)["input_ids"] for text in json.loads(args.prompts.read_text())]
    report["adaptive"], report["races"], report["calibrated"] = {}, {}, {}
    for name, examples in prompts.items():
        loops: dict[str, Any] = {}
        depths = calibrate_depths(cascade, calls if name == "json" else rows, args)
        report["adaptive"][name] = {arm: vars(depth) for arm, depth in depths.items()}
        arms = arms_of(cascade, depths, args, loops)
        try:
            draft = cascade.calibrate_draft(examples, max_new_tokens=args.new_tokens)
            report["calibrated"][name] = vars(draft)
            arms["calibrated draft"] = partial(cascade.generate, **arms["plain"].keywords, strategy=draft)
        except DecodingError as error:
            report["calibrated"][name] = str(error)
        print(f"\n{name}, calibrated: {report['calibrated'][name]}")
        table = race(arms, [torch.tensor([prompt]) for prompt in examples], args.rounds)
        for row in table:
            if loop := loops.get(row["arm"]):
                row["acceptance"] = round(loop.accepted / max(1, loop.drafted), 3)
                row["tokens_per_pass"] = round((loop.accepted + loop.passes) / loop.passes, 2)
        report["races"][name] = table
        print("\n| arm | tokens/s | x plain | same | accepted | tokens per pass |\n|---|---:|---:|---:|---:|---:|")
        for row in table:
            accepted, per_pass = row.get("acceptance", ""), row.get("tokens_per_pass", "")
            print(f"| {row['arm']} | {row['tokens_per_s']} | {row['x']} | {row['same']} | {accepted} | {per_pass} |")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
