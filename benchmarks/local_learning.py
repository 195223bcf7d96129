"""PoE local learning against backpropagation: loss of every stage, speed and memory.

    python benchmarks/local_learning.py --data "text=FILES" [--recipe text --steps 400 --out runs/bench/local_learning]

Both arms have the same architecture, text, number of tokens and learning rates. Each arm runs `poe-train base` in a
separate process and saves its base in OUT/ARM; if that folder has a training.json, the arm is not trained again. The
benchmark reports validation bits per byte at every boundary and tokens per second. A separate process measures how much
the forward and backward passes over one batch of `--tokens` random tokens raise peak resident memory, because the peak
of a training run is in the preparation of text. The limit: local learning reads the head once per stage instead of
once, and stores the activations of one stage instead of all.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from poe.data.packing import Batch
from poe.modeling.families import logits_of
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.stages import load_base_recipe
from poe.training.hidden_states.sources import StagePredictions
from poe.training.loss import cross_entropy_sum
from poe.training.precision import choose_dtype

ARMS = ("local", "backprop")


def train(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm if its training.json is missing; return the content of training.json."""
    folder = args.out / arm
    if not (folder / "training.json").exists():
        command = [sys.executable, "-m", "poe.commands.train", "base", args.recipe, "--data", args.data]
        command += ["--learning", arm, "--out", str(folder), "--max-steps", str(args.steps)]
        command += ["--validation-every", str(max(1, args.steps // 10)), *args.options]
        subprocess.run(command, check=True)
    record: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record


def memory(arm: str, args: argparse.Namespace) -> float:
    """Return the MiB by which passes over one batch raise the peak memory of a new process, gradients included."""
    command = [sys.executable, __file__, "--data", "", "--recipe", args.recipe, "--tokens", str(args.tokens)]
    output = subprocess.run([*command, "--measure", arm], check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def measure(arm: str, args: argparse.Namespace) -> None:
    """Print the result of `memory`; this runs in the new process."""
    recipe = load_base_recipe(args.recipe)
    config = PoEConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        stage_layers=recipe.stage_layers,
    )
    model: Any = PoEForCausalLM(config)
    model = model.to(choose_dtype(recipe.dtype)).train()
    ids = torch.randint(0, recipe.vocab_size, (args.tokens // recipe.seq_len, recipe.seq_len))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):  # the first pass includes one-time allocations
        batch = Batch(ids, ids, torch.arange(recipe.seq_len).expand_as(ids))
        for hidden, weight, _ in StagePredictions(model, arm == "local").predictions(batch, learning=True):
            cross_entropy_sum(hidden, weight, batch.labels, logits_of(config)).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with one row per arm."""
    stages = len(records[ARMS[0]]["trajectory"][-1]["stage_bpb"])
    head = [*(f"stage {k + 1}" for k in range(stages)), "tokens/s", "MiB for a batch"]
    lines = [f"| val bpb | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for arm, record in records.items():
        best = next(point for point in record["trajectory"] if point["step"] == record["best_step"])
        cells = [f"{bpb:.4f}" for bpb in best["stage_bpb"]]
        cells += [f"{record['tokens'] / record['seconds']:,.0f}", f"{record['batch_mib']:,.0f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    local, control = (records[arm]["val_bpb"] for arm in ARMS)
    return "\n".join([*lines, "", f"local learning costs {local / control - 1:+.1%} of the bits per byte at the top"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/local_learning"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="further options of poe-train base, after --")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args)
        return
    records = {arm: {**train(arm, args), "batch_mib": memory(arm, args)} for arm in ARMS}
    (args.out / "result.json").write_text(json.dumps(records, indent=2) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
