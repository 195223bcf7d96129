"""PoE local learning against backpropagation: same base, text, tokens and rates; what each stage predicts, and memory.

    python benchmarks/local_learning.py --data "text=FILES" [--recipe text --steps 400 --out runs/bench/local_learning]

Each arm is a process of its own, `poe-train base`, and leaves its base in OUT/ARM; an arm whose base is there is not
trained again. Reported: validation bits per byte at every boundary, tokens per second, peak resident memory. The limit:
local learning reads the head once per stage instead of once, and saves what passes through one stage instead of all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ARMS = ("local", "backprop")


def train(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm, or read what it left; returns its training.json."""
    folder = args.out / arm
    if not (folder / "training.json").exists():
        command = [sys.executable, "-m", "poe.commands.train", "base", args.recipe, "--data", args.data]
        command += ["--learning", arm, "--out", str(folder), "--max-steps", str(args.steps)]
        command += ["--eval-every", str(max(1, args.steps // 10)), *args.options]
        subprocess.run(command, check=True)
    record: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record


def table(records: dict[str, dict[str, Any]]) -> str:
    """One row per arm."""
    stages = len(records[ARMS[0]]["trajectory"][-1]["stage_bpb"])
    head = [*(f"stage {k + 1}" for k in range(stages)), "tokens/s", "peak MiB"]
    lines = [f"| val bpb | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for arm, record in records.items():
        best = next(point for point in record["trajectory"] if point["step"] == record["best_step"])
        cells = [f"{bpb:.4f}" for bpb in best["stage_bpb"]]
        cells += [f"{record['tokens'] / record['seconds']:,.0f}", f"{record['actual']['memory_bytes'] / 2**20:,.0f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    local, control = (records[arm]["val_bpb"] for arm in ARMS)
    return "\n".join([*lines, "", f"local learning costs {local / control - 1:+.1%} of the bits per byte at the top"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/local_learning"))
    parser.add_argument("options", nargs="*", help="further options of poe-train base, after --")
    args = parser.parse_args()
    records = {arm: train(arm, args) for arm in ARMS}
    (args.out / "result.json").write_text(json.dumps(records, indent=2) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
