"""Muon against AdamW for the matrices of a stage: equal number of tokens, swept learning rates, several seeds.

    python benchmarks/optimizer_ablation.py --base FOLDER --data glaive=...,xlam=... [--steps 60 --seeds 0 1 2]

Only the optimizer of the matrices differs; rows, head (AdamW), schedule and number of tokens are the same. All
candidates train on the same cached hidden states. The first seed sweeps the learning rates; the other seeds train at
the best rate of each optimizer. A seed sets the new weights, the held-out rows and the order of the training rows, so
the optimizers are compared seed by seed. Muon with a momentum that rises from 0.85 uses the best rate of Muon.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from poe import Cascade
from poe.stages import Recipe
from poe.training.sweep import sweep

RATES = {"muon": [0.01, 0.02, 0.04, 0.08], "adamw": [0.001, 0.002, 0.004, 0.008]}
RISING = "muon, rising momentum"
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {},
    "adamw": {"matrix_optimizer": "adamw"},
    RISING: {"initial_momentum": 0.85},
}


def train_with_rates(args: argparse.Namespace, name: str, rates: list[float], seed: int) -> dict[float, float]:
    """Train with every rate; return the validation bits per byte by rate."""
    plan = Recipe(
        name="ablation",
        data=args.data,
        num_layers=2,
        seq_len=512,
        tokens_per_step=args.tokens_per_step,
        max_steps=args.steps,
        validation_every=args.steps,
        head_lr=0.002,
        weight_decay=0.0,
        eval_rows=1,
        seed=seed,
    ).replace(**OPTIONS[name])
    with tempfile.TemporaryDirectory(prefix="poe-ablation-") as folder:
        cascade = Cascade.from_pretrained(args.base)
        result = sweep(cascade, plan, {"matrix_lr": rates}, output_dir=Path(folder) / "sweep")
    return {candidate.tried["matrix_lr"]: candidate.val_bpb for candidate in result.candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("runs/bench/optimizer_ablation.json"))
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"steps": args.steps, "tokens_per_step": args.tokens_per_step, "rules": {}}
    print(
        "| matrices | rate: val bpb, first seed | best rate | val bpb by seed | minus muon's |\n|---|---|---:|---|---:|"
    )
    for name in OPTIONS:
        rates = [report["rules"]["muon"]["best_rate"]] if name == RISING else RATES[name]
        swept = train_with_rates(args, name, rates, args.seeds[0])
        best = min(swept, key=lambda rate: swept[rate])
        values = [swept[best], *(train_with_rates(args, name, [best], seed)[best] for seed in args.seeds[1:])]
        report["rules"][name] = {"swept": swept, "best_rate": best, "val_bpb": values}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        differences = [a - b for a, b in zip(values, report["rules"]["muon"]["val_bpb"], strict=True)]
        cells = ", ".join(f"{rate}: {bpb:.4f}" for rate, bpb in sorted(swept.items()))
        by_seed = ", ".join(f"{value:.4f}" for value in values)
        mean, spread = statistics.mean(differences), (max(differences) - min(differences)) / 2
        print(f"| {name} | {cells} | {best} | {by_seed} | {mean:+.4f} ±{spread:.4f} |", flush=True)


if __name__ == "__main__":
    main()
