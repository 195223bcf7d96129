"""Training speed, memory and artifact size of a stage against other methods, on a CPU in fp32.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/training_cpu.py [--shapes wide deep --rounds 5 --threads 2 --arms ...] --json runs/bench/cpu.json

The bases are two random Qwen3 models of width 384. Batches have 4 x 512 random tokens, and every position has a label.
Every arm runs in a separate process, so that its peak memory is measured separately. `--together` arms run beside the
reference, PEFT's LoRA. They take turns after every step, so that other load on the machine affects all arms equally.
The table has medians; a ratio is the median of the ratios of steps in the same round. It has ratios of wall time and of
CPU time. With one thread, the ratio of CPU time varies less on a machine with other load. With more threads, CPU time
includes the time in which threads wait.

The limit of an arm is calculated from the FLOPs of its matrix products and attention (`arms.Cost`: for a stage
`2 N_base + 6 (N_stage + N_head)` per token, plus attention) and the measured rate of a large matrix product, which is
one more process that takes turns with the arms.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES = {
    "wide": {"layers": 12, "width": 384, "vocab": 16384},
    "deep": {"layers": 24, "width": 384, "vocab": 4096},
    "small": {"layers": 3, "width": 64, "vocab": 512},
}
STAGE = "stage, 2 layers"
ARMS = {
    "full fine-tune": ("full", {}),
    "LoRA r16, PEFT": ("lora", {}),
    "LoRA r16, PEFT, our loss": ("lora", {"chunked": True}),
    "LoRA r16, TRL SFTTrainer": ("trl", {}),
    "last 2 layers and head": ("last", {}),
    f"{STAGE}, dense head": ("dense", {}),
    f"{STAGE}, dense head, AdamW": ("dense", {"adamw": True}),
    f"{STAGE}, low-rank head": ("low_rank", {}),
    f"{STAGE}, no head": ("none", {}),
    f"{STAGE}, dense head, cached": ("dense cached", {}),
    f"{STAGE}, low-rank head, cached": ("low_rank cached", {}),
    f"{STAGE}, dense head, cached, AdamW": ("dense cached", {"adamw": True}),
}
REFERENCE = "LoRA r16, PEFT"
MATMUL = "a 2048 x 2048 matrix product"


def child(name: str, shape: dict[str, int], batch: int, length: int, steps: int) -> None:
    """Take `steps` steps, each after a line on stdin; print the seconds of each step, and the sizes at the end."""
    import torch

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    started = (0.0, 0.0)

    def begin() -> None:
        nonlocal started
        sys.stdin.readline()
        started = time.perf_counter(), time.process_time()

    def end() -> None:
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        print(json.dumps([wall, cpu]), flush=True)

    for facts in run_arm(name, shape, batch, length, steps, begin, end, torch):
        print(json.dumps(facts | {"peak_rss": peak()}), flush=True)


def run_arm(
    name: str,
    shape: dict[str, int],
    batch: int,
    length: int,
    steps: int,
    begin: Callable[[], None],
    end: Callable[[], None],
    torch: Any,
) -> Iterator[dict[str, Any]]:
    """Take the steps of an arm, with `begin()` before and `end()` after each step; then yield its sizes."""
    if name == MATMUL:
        a, b = torch.randn(2, 2048, 2048)
        for _ in range(steps):
            begin()
            for _ in range(4):
                torch.mm(a, b)
            end()
        yield {"flops": 4 * 2 * 2048**3}
        return
    import arms

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kind, options = ARMS[name]
    settings = arms.Settings(**options)
    rows = arms.random_batch(shape["vocab"], batch, length)

    def make_base() -> Any:
        return arms.qwen3(**shape)

    if kind == "trl":
        import trl_arm

        imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield {
            **trl_arm.trl_lora(make_base, rows.input_ids, settings, steps, trl_arm.Watch(begin, end)),
            "imported_rss": imported,
        }
        return
    builders = {"full": arms.full, "lora": arms.lora, "last": arms.last_layers}
    if kind in builders:
        arm = builders[kind](make_base, length, settings)
    else:
        arm = arms.stage(make_base, length, settings, head=kind.split()[0], cached=kind.endswith("cached"))
    for _ in range(steps):
        begin()
        arm.step(rows)
        end()
    yield arm.sizes() | {"imported_rss": imported}


def measure(shape: dict[str, int], names: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run all arms, step by step in turns; return the seconds and sizes of each."""
    steps = args.rounds + args.warmup
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    running: dict[str, subprocess.Popen[str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    try:
        for name in names:
            task = [name, shape, args.batch, args.length, steps]
            running[name] = subprocess.Popen(
                [sys.executable, __file__, "--child", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        durations: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(steps):
            for name in names if turn % 2 else reversed(names):
                _start_step(running[name])
                wall, cpu = _read_result(running[name], name)
                if turn >= args.warmup:
                    durations[name].append((wall, cpu))
        for name in names:
            wall_seconds, cpu_seconds = (list(times) for times in zip(*durations[name], strict=True))
            facts[name] = _read_result(running[name], name) | {"seconds": wall_seconds, "cpu_seconds": cpu_seconds}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return facts


def _start_step(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _read_result(process: "subprocess.Popen[str]", name: str) -> Any:
    assert process.stdout is not None
    while line := process.stdout.readline():
        try:
            return json.loads(line)
        except ValueError:  # output of a library
            continue
    raise SystemExit(f"The arm {name!r} ended without a result. Its messages are above.")


def summarize(facts: dict[str, dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return the medians of every arm, and the share of its calculated limit that it reaches."""
    matmul = facts[MATMUL]
    rate, cpu_rate = (matmul["flops"] / statistics.median(matmul[kind]) for kind in ("seconds", "cpu_seconds"))
    reference = facts[REFERENCE]
    rows = []
    for name, fact in facts.items():
        if name == MATMUL:
            continue
        # Compare steps of the same round: other load on the machine affects both.
        ratio, cpu_ratio = (
            round(statistics.median(r / s for r, s in zip(reference[kind], fact[kind], strict=True)), 2)
            for kind in ("seconds", "cpu_seconds")
        )
        speed = tokens / statistics.median(fact["seconds"])
        limit = rate / fact["flops_per_token"]
        cpu_speed = tokens / statistics.median(fact["cpu_seconds"])
        rows.append(
            {
                "arm": name,
                "tokens_per_s": round(speed),
                "tokens_per_cpu_s": round(cpu_speed),
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "ratio_limit": round(reference["flops_per_token"] / fact["flops_per_token"], 2),
                "limit_tokens_per_s": round(limit),
                "share_of_limit": round(speed / limit, 3),
                "cpu_share_of_limit": round(cpu_speed * fact["flops_per_token"] / cpu_rate, 3),
                "peak_rss_mib": round(fact["peak_rss"] / 2**20),
                "peak_above_imports_mib": round((fact["peak_rss"] - fact["imported_rss"]) / 2**20),
                "memory_ratio": round(fact["peak_rss"] / reference["peak_rss"], 2),
                "trained": fact["trained"],
                "artifact_bytes": 2 * fact["published"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = ["arm", "tokens/s", "to LoRA", "in CPU time", "FLOPs allow", "of limit", "peak MiB", "above imports"]
    head += ["memory to LoRA", "artifact MB"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for r in rows:
        cells = [r["arm"], f"{r['tokens_per_s']:,}", r["ratio"], r["cpu_ratio"], r["ratio_limit"]]
        cells += [f"{r['cpu_share_of_limit']:.0%}", f"{r['peak_rss_mib']:,}", f"{r['peak_above_imports_mib']:,}"]
        cells += [r["memory_ratio"], f"{r['artifact_bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    import torch

    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in packages},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["wide", "deep"])
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    for name, value in {"batch": 4, "length": 512, "rounds": 5, "warmup": 1, "together": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/training_cpu.json"))
    args = parser.parse_args()
    names = [n for n in ARMS if n == REFERENCE or not args.arms or any(text in n for text in args.arms)]
    results: dict[str, Any] = {"machine": machine(args.threads), "batch": [args.batch, args.length], "shapes": {}}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    others = [name for name in names if name != REFERENCE]
    for key in args.shapes:
        rows: dict[str, dict[str, Any]] = {}
        seconds = []
        for first in range(0, len(others), args.together):
            facts = measure(SHAPES[key], [REFERENCE, *others[first : first + args.together], MATMUL], args)
            seconds.append({name: [fact["seconds"], fact["cpu_seconds"]] for name, fact in facts.items()})
            for row in summarize(facts, args.batch * args.length):
                rows.setdefault(row["arm"], row)
            ordered = [rows[name] for name in ARMS if name in rows]
            results["shapes"][key] = {**SHAPES[key], "rows": ordered, "groups": seconds}
            args.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\n{key}: {SHAPES[key]}\n\n{table(ordered)}", flush=True)


if __name__ == "__main__":
    main()
