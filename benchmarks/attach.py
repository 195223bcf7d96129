"""Quality and speed of a specialist that is attached at different depths of its base.

    python benchmarks/attach.py [--base demo --data demo --recipe demo --steps 120 --seeds 0] [--depths 2 4 6]
    python benchmarks/attach.py --base runs/base-text --data "glaive=FILE,xlam=FILE" --recipe tool --seq-len 512 ...

Rows, steps and number of trained layers are the same at every depth. For every depth the benchmark reports validation
bits per byte, on demo rows also the share of exact calls, and tokens per second of training and of generating one reply
(greedy, batch 1, one thread) beside the base alone. In every round each depth generates once; the table has medians
over the rounds. The limit of generation is memory bandwidth: each token reads all weights in use once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from poe import Cascade
from poe.data.readers.demo import evaluation_splits
from poe.evaluation.calls import evaluate_calls
from poe.modeling.exits import exits_of
from poe.training.trainer import train_stage


def train_at_depth(args: argparse.Namespace, depth: int, seed: int) -> tuple[Cascade, dict[str, Any]]:
    """Train a specialist on the first `depth` layers of the base, and evaluate it."""
    cascade = Cascade.from_pretrained(args.base, dtype=args.dtype)
    overrides = {"seq_len": args.seq_len, "tokens_per_step": args.tokens_per_step}
    with tempfile.TemporaryDirectory(prefix="poe-attach-") as folder:
        result = train_stage(
            cascade,
            args.recipe,
            args.data,
            Path(folder) / "run",
            max_steps=args.steps,
            validation_every=max(1, args.steps // 4),
            num_layers=args.layers,
            attach_at=depth,
            seed=seed,
            eval_rows=0,
            **{name: value for name, value in overrides.items() if value},
        )
    name = cascade.active
    assert name is not None
    record: dict[str, Any] = {
        "depth": depth,
        "seed": seed,
        "val_bpb": result.history.best_bpb,
        "train_tokens_per_s": result.history.tokens / result.history.seconds,
        "parameters": cascade.stages[name].num_parameters(),
    }
    if args.rows:
        scores = evaluate_calls(cascade, name, evaluation_splits(args.rows), max_new_tokens=120)
        record["scores"] = {split: score.as_dict() for split, score in scores.items()}
    return cascade, record


def speeds(models: dict[str, Any], vocabulary: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the median tokens per second of every model, by name; each model generates once per round."""
    prompt = torch.randint(10, vocabulary, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(args.rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: args.new_tokens / statistics.median(times) for name, times in seconds.items()}


def table(results: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """Return a Markdown table with one row per depth; values are means over the seeds."""
    splits = list(results[0].get("scores", {}))
    head = ["layers below", "val bpb", *splits, "training tokens/s", "reply tokens/s", "against the base"]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    for depth in dict.fromkeys(result["depth"] for result in results):
        runs = [result for result in results if result["depth"] == depth]
        cells = [f"{statistics.mean(r['val_bpb'] for r in runs):.3f}"]
        for split in splits:
            kind = "abstained" if split == "no tool fits" else "exact"
            cells.append(f"{statistics.mean(r['scores'][split][kind] for r in runs):.3f}")
        cells.append(f"{statistics.mean(r['train_tokens_per_s'] for r in runs):,.0f}")
        cells += [f"{rates[str(depth)]:.1f}", f"{rates[str(depth)] / rates['base']:.2f}"]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--depths", type=int, nargs="*", help="default: all exits of the base")
    parser.add_argument("--layers", type=int, default=2, help="number of layers of the specialist")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--tokens-per-step", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=100, help="demo questions per split to answer; 0 for other data")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/attach.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    depths = args.depths or exits_of(Cascade.from_pretrained(args.base).config)
    results, models = [], {}
    for seed in args.seeds:
        for depth in depths:
            cascade, record = train_at_depth(args, depth, seed)
            results.append(record)
            models[str(depth)] = cascade.model(cascade.active).eval()
            models.setdefault("base", cascade.base.eval())
    rates = speeds(models, cascade.config.vocab_size, args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"arguments": vars(args), "results": results, "rates": rates}, indent=2, default=str)
    )
    print(table(results, rates))


if __name__ == "__main__":
    main()
