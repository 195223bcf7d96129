"""Seconds, tokens and memory until a target held-out loss: stages and forks against LoRA, last layers and full tuning.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/time_to_loss.py --base FOLDER --data "glaive=rows.jsonl,xlam=rows.json" [--steps 200]

All arms have the same packed rows in the same order, tokens per step, held-out rows, chunked loss, schedule and
gradient clipping. Each arm runs once per multiplier of `--rates`; the table has the run with the lowest final loss. The
rates at multiplier 1 are, for AdamW, 3e-5 (full), 2e-4 (LoRA r16), 1e-4 (last layers), 3e-4 (forks of rank 16) and 5e-5
(forks of full rank), and for a stage 0.002 with Muon and 1e-4 for the head. A call is correct if each of its tokens is
the top-1 prediction. Seconds include training steps and the pass that fills a cache, but no evaluation. The runs are
separate processes, one after another. A target is the base's loss minus a share of the difference between that loss and
the lowest final loss.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

ARMS: dict[str, tuple[str, float]] = {  # name -> (kind, AdamW rate at multiplier 1)
    "full fine-tune": ("full", 3e-5),
    "LoRA r16": ("lora", 2e-4),
    "last layers and head": ("last", 1e-4),
    "stage, dense head": ("dense", 0.0),
    "stage, low-rank head": ("low_rank", 0.0),
    "stage, low-rank head, cached": ("low_rank cached", 0.0),
    "fork r16, answer": ("fork answer", 3e-4),
    "fork r16, answer, cached": ("fork answer cached", 3e-4),
    "fork r16, all tokens": ("fork all", 3e-4),
    "fork, full rank, answer": ("fork full answer", 5e-5),
}
SHARES = (0.5, 0.75, 0.9, 0.97)


def child(name: str, multiplier: float, options: dict[str, Any]) -> None:
    """Train one arm at one rate; print a line of JSON per evaluation, and a line with sizes and memory at the end."""
    import arms
    import torch

    from poe import Cascade
    from poe.data.packing import Batch
    from poe.data.pipeline import prepare
    from poe.data.render import Renderer
    from poe.data.templates import complete_template
    from poe.modeling.families import logits_of
    from poe.stages import Recipe
    from poe.training.loss import per_label_losses
    from poe.training.schedule import lr_factor

    cascade = Cascade.from_pretrained(options["base"], dtype=options["dtype"])
    recipe = Recipe(
        name="benchmark",
        data=options["data"],
        seq_len=options["seq_len"],
        tokens_per_step=options["seq_len"],
        validation_ratio=options["held_out"],
        seed=options["seed"],
    )
    complete_template(cascade.tokenizer)
    data = prepare(recipe, Renderer(cascade.tokenizer))
    torch.manual_seed(options["seed"])
    kind, lr = ARMS[name]
    settings = arms.Settings(
        stage_layers=options["stage_layers"],
        last_layers=options["stage_layers"],
        attach_at=options["attach_at"],
        bf16=options["dtype"] == "bfloat16",
        chunked=True,
        lr=lr * multiplier,
        matrix_lr=0.002 * multiplier,
        head_lr=1e-4 * multiplier,
        max_grad_norm=1.0,
        rows_per_pass=options["rows_per_pass"],
    )

    def make_base() -> Any:
        return cascade.base.requires_grad_(True)

    builders = {"full": arms.full, "lora": arms.lora, "last": arms.last_layers}
    if kind in builders:
        arm = builders[kind](make_base, options["seq_len"], settings)
    elif kind.startswith("fork"):
        words = kind.split()
        rank = None if "full" in words else arms.LORA_RANK
        active = "all" if "all" in words else "answer"
        arm = arms.fork(make_base, options["seq_len"], settings, rank, active, cached="cached" in words)
    else:
        cached = kind.endswith("cached")
        arm = arms.stage(make_base, options["seq_len"], settings, head=kind.split()[0], cached=cached)
    logits = logits_of(arm.model.config)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Return the nats per label, and the shares of labels and whole calls that are top-1 with teacher forcing."""
        arm.model.eval()
        total, right = 0.0, torch.zeros(2, 2)
        for row in range(min(options["val_rows"], data.val.num_rows)):
            part = Batch(*data.val.batch(row, 1))
            head = arm.model.get_output_embeddings()
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                hidden = arm.hidden(part)
            labels, hidden = part.labels[0], hidden.to(head.weight.dtype)
            losses = per_label_losses(hidden, head.weight, part.labels, logits, head.bias)
            total += float(losses.double().sum())
            trained = labels != -100
            likeliest = (hidden[0][trained] @ head.weight.T).argmax(-1) == labels[trained]
            calls = correct_calls(labels[trained].tolist(), likeliest.tolist(), cascade.tokenizer)
            right += torch.tensor([[likeliest.sum(), len(likeliest)], [sum(calls), len(calls)]])
        arm.model.train()
        shares = right[:, 0] / right[:, 1]
        return {"loss": total / float(right[0, 1]), "labels_right": float(shares[0]), "calls_right": float(shares[1])}

    seconds, cpu_seconds, tokens = 0.0, 0.0, 0
    rows = options["tokens_per_step"] // options["seq_len"]
    print(json.dumps({"step": 0, "tokens": 0, "seconds": 0.0, **evaluate()}), flush=True)
    for step in range(options["steps"]):
        batch = Batch(*data.train.batch(step, rows))
        factor = lr_factor(step, options["steps"], initial_lr_factor=0.0, warmup_ratio=0.05, warmdown_ratio=0.9)
        arm.scale_rates(factor)
        started, cpu_started = time.perf_counter(), time.process_time()
        arm.step(batch)
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        tokens += batch.input_ids.numel()
        if (step + 1) % options["validation_every"] == 0 or step + 1 == options["steps"]:
            times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
            record = {"step": step + 1, "tokens": tokens, **times, **evaluate()}
            print(json.dumps(record), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row_counts = {"training_rows": data.train.num_rows, "validation_rows": data.val.num_rows}
    print(json.dumps({"facts": arm.sizes() | row_counts | {"peak_rss": peak}}), flush=True)


def correct_calls(labels: list[int], likeliest: list[bool], tokenizer: Any) -> list[bool]:
    """Return for each call `<tool_call>...</tool_call>` in the labels whether all of its tokens are correct."""
    pieces = [tokenizer.decode([token]) for token in labels]
    ends = list(accumulate(map(len, pieces)))
    tokens = [(end - len(piece), end, right) for end, piece, right in zip(ends, pieces, likeliest, strict=True)]
    spans = [match.span() for match in re.finditer(r"<tool_call>.*?</tool_call>", "".join(pieces), re.S)]
    return [all(right for start, end, right in tokens if start < stop and begin < end) for begin, stop in spans]


def run_one(name: str, multiplier: float, args: argparse.Namespace) -> dict[str, Any]:
    options = {k: v for k, v in vars(args).items() if k not in ("arms", "rates", "out", "threads")}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", json.dumps([name, multiplier, options])]
    curve: list[dict[str, float]] = []
    facts: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                record = json.loads(line)
            except ValueError:  # output of a library
                continue
            if "facts" in record:
                facts = record["facts"]
            else:
                curve.append(record)
                print(f"{name}, x{multiplier:g}: {record}", file=sys.stderr)
    if not facts:
        raise SystemExit(f"{name} at x{multiplier:g} ended without a result. Its messages are above.")
    return {"arm": name, "multiplier": multiplier, "curve": curve, **facts}


def reach(curve: list[dict[str, float]], target: float, what: str) -> float | None:
    """Return the value of `what` (seconds or tokens) at which the loss first reaches the target.

    Values between evaluations are linear interpolations. Return None if the loss stays above the target.
    """
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"]) if before["loss"] > target else 0.0
            return before[what] + share * (after[what] - before[what])
    return None


def summarize(runs: list[dict[str, Any]]) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the target losses, and the results of the best run of every arm."""
    best = {}
    for run in runs:
        last = run["curve"][-1]["loss"]
        if last == last and (run["arm"] not in best or last < best[run["arm"]]["curve"][-1]["loss"]):
            best[run["arm"]] = run
    start = next(iter(best.values()))["curve"][0]["loss"]
    lowest = min(run["curve"][-1]["loss"] for run in best.values())
    targets = [start - share * (start - lowest) for share in SHARES]
    rows = []
    for name, run in best.items():
        end = run["curve"][-1]
        rows.append(
            {
                "arm": name,
                "multiplier": run["multiplier"],
                "final_loss": end["loss"],
                "calls_right": end["calls_right"],
                "seconds": end["seconds"],
                "tokens_per_s": round(end["tokens"] / end["seconds"]),
                "seconds_to": [reach(run["curve"], t, "seconds") for t in targets],
                "tokens_to": [reach(run["curve"], t, "tokens") for t in targets],
                "peak_rss_mib": round(run["peak_rss"] / 2**20),
                "artifact_bytes": 2 * run["published"],
            }
        )
    return targets, rows


def table(targets: list[float], rows: list[dict[str, Any]]) -> str:
    columns = [f"s to {t:.3f}" for t in targets]
    head = ["arm", "rate", "tokens/s", *columns, "final loss", "calls right", "peak MiB", "artifact MB"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for r in rows:
        times = ["-" if s is None else f"{s:,.0f}" for s in r["seconds_to"]]
        cells = [
            r["arm"],
            f"x{r['multiplier']:g}",
            f"{r['tokens_per_s']:,}",
            *times,
            f"{r['final_loss']:.4f}",
            f"{r['calls_right']:.3f}",
        ]
        cells += [f"{r['peak_rss_mib']:,}", f"{r['artifact_bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for row in rows:
        key = (row["arm"], row["multiplier"])
        curve = next(r["curve"] for r in runs if (r["arm"], r["multiplier"]) == key)
        for axis, what in zip(axes, ("seconds", "tokens"), strict=True):
            axis.plot([p[what] for p in curve], [p["loss"] for p in curve], label=row["arm"])
            axis.set(xlabel=f"training {what}")
    axes[0].set(ylabel="held-out loss (nats per trained token)")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, help="a data SPEC, such as glaive=FILE,xlam=FILE")
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 3, 10], help="multipliers of an arm's rates")
    numbers = {"seq_len": 1024, "tokens_per_step": 8192, "rows_per_pass": 4, "steps": 200, "validation_every": 20}
    numbers |= {"val_rows": 16, "stage_layers": 2, "seed": 0, "threads": os.cpu_count() or 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--held-out", type=float, default=0.02)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--attach-at", type=int, default=None, help="first layer of the forks; default: the lowest layer that copies"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/time_to_loss"))
    args = parser.parse_args()
    args.attach_at = "auto" if args.attach_at is None else args.attach_at
    args.out.mkdir(parents=True, exist_ok=True)
    names = [n for n in ARMS if not args.arms or any(text in n for text in args.arms)]
    runs: list[dict[str, Any]] = []
    options = {k: v for k, v in vars(args).items() if k != "out"}
    for name in names:
        for multiplier in args.rates:
            runs.append(run_one(name, multiplier, args))
            targets, rows = summarize(runs)
            result = {"options": options, "targets": targets, "rows": rows, "runs": runs}
            (args.out / "curves.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(targets, rows))
    plot(args.out / "curves.png", runs, rows)


if __name__ == "__main__":
    main()
