"""Training speed, memory and MFU of a stage against other methods, on one GPU in bf16.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/training_gpu.py                 # all shapes and arms, about an hour on an H100
    python benchmarks/training_gpu.py --small         # tiny shapes on any machine, not compiled: a test of the arms
    python benchmarks/training_gpu.py --plan 10min --base FOLDER --data xlam=FILE      # see gpu_plan.py

The bases are a random PoE model of depth 24 and width 1,536 (1.38 B parameters, 604 M of them value embeddings on
alternating layers; full attention) and a random model in the shape of Qwen3-1.7B (tied). Rows have 2,048 random tokens,
and every position has a label. Every arm and setting runs in a separate process. It doubles the rows per step until
memory is full; the table has the fastest number of rows. TRL with LoRA runs with and without gradient checkpointing and
torch.compile. MFU counts the FLOPs that the method needs (`arms.Cost`), without recomputation and without a backward
pass that the method does not need. It divides them by the dense bf16 peak of the device, or by the rate of a large
matrix product if the device is not in the table.

The output is JSON, a Markdown table, and for each arm except TRL a profile of its slowest kernels.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEAKS = {  # dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets; the first matching name is used
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
QWEN3_1_7B = {
    "layers": 28,
    "width": 2048,
    "vocab": 151936,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "poe-d24": ("poe", {"layers": 24, "width": 1536, "vocab": 32768}),
    "qwen3-1.7b": ("qwen3", QWEN3_1_7B),
    "small-poe": ("poe", {"layers": 4, "width": 128, "vocab": 512}),
    "small-qwen3": ("qwen3", {"layers": 4, "width": 128, "vocab": 512, "tie_word_embeddings": True}),
}
ON, OFF = True, False
ARMS: dict[str, tuple[str, list[tuple[bool, bool]]]] = {  # name -> (kind, [(compile, checkpointing), ...])
    "full fine-tune": ("full", [(OFF, OFF), (OFF, ON)]),
    "LoRA r16, PEFT, our loss": ("lora", [(OFF, OFF), (OFF, ON)]),
    "LoRA r16, TRL SFTTrainer": ("trl", [(OFF, OFF), (OFF, ON), (ON, OFF), (ON, ON)]),
    "last layers and head": ("last", [(OFF, OFF)]),
    "stage, dense head": ("dense", [(OFF, OFF), (ON, OFF)]),
    "stage, low-rank head": ("low_rank", [(OFF, OFF), (ON, OFF)]),
    "stage, no head": ("none", [(OFF, OFF), (ON, OFF)]),
    "stage, dense head, cached": ("dense cached", [(OFF, OFF)]),
    "stage, low-rank head, cached": ("low_rank cached", [(OFF, OFF)]),
    "fork r16, upper half, all tokens": ("fork", [(OFF, OFF), (ON, OFF)]),
}
REFERENCE = "LoRA r16, TRL SFTTrainer"


def child(name: str, shape: str, compiled: bool, checkpointing: bool, options: dict[str, Any]) -> None:
    """Measure one arm at one setting with increasing numbers of rows; print a line of JSON for every number of rows."""
    import arms
    import torch

    kind, fields = SHAPES[shape]
    device = options["device"]
    settings = arms.Settings(
        stage_layers=options["stage_layers"],
        last_layers=options["stage_layers"],
        device=device,
        bf16=True,
        compile=options["backend"] if compiled else None,
        attach_at=fields["layers"] // 2,
        checkpointing=checkpointing,
        chunked=ARMS[name][0] == "lora",
    )

    def make_base() -> Any:
        with torch.device(device):
            return arms.qwen3(**fields) if kind == "qwen3" else poe_base(**fields)

    measure = measure_trl if ARMS[name][0] == "trl" else measure_arm
    measure(ARMS[name][0], make_base, fields["vocab"], settings, options, Clock(device))


def poe_base(layers: int, width: int, vocab: int) -> Any:
    """Return a random PoE base with value embeddings on every second layer, including the last."""
    import torch

    from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

    torch.manual_seed(0)
    config = PoEConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        attention_logit_scale=1.44,
        layer_scalars=True,
        value_embedding_layers=list(range((layers - 1) % 2, layers, 2)),
    )
    return PoEForCausalLM(config)


class Clock:
    """Measures the seconds and peak memory of steps; synchronizes with a GPU before each reading."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device == "cuda" else None
        self.seconds: list[float] = []
        self.started = 0.0

    def reset(self) -> None:
        self.seconds = []
        gc.collect()
        if self.cuda:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()

    def begin(self) -> None:
        if self.cuda:
            self.cuda.synchronize()
        self.started = time.perf_counter()

    def end(self) -> None:
        if self.cuda:
            self.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def peak(self) -> int:
        return self.cuda.max_memory_allocated() if self.cuda else 0


def row_counts(options: dict[str, Any]) -> list[int]:
    if "rows" in options:
        return list(options["rows"])
    return [1 << n for n in range(options["max_rows"].bit_length()) if 1 << n <= options["max_rows"]]


def report(sizes: dict[str, Any], rows: int, options: dict[str, Any], clock: Clock) -> None:
    seconds = statistics.median(clock.seconds[options["warmup"] :])
    speed = rows * options["length"] / seconds
    print(json.dumps({**sizes, "rows": rows, "tokens_per_s": speed, "peak_bytes": clock.peak()}), flush=True)


def measure_arm(kind: str, make_base: Callable[[], Any], vocab: int, s: Any, options: Any, clock: Clock) -> None:
    import arms
    import torch

    builders = {"full": arms.full, "lora": arms.lora, "last": arms.last_layers}
    if kind in builders:
        arm = builders[kind](make_base, options["length"], s)
    elif kind == "fork":
        arm = arms.fork(make_base, options["length"], s, active="all")
    else:
        arm = arms.stage(make_base, options["length"], s, head=kind.split()[0], cached=kind.endswith("cached"))
    fastest: tuple[float, Any] = (0.0, None)
    for rows in row_counts(options):
        batch = arms.Batch(*(t.to(options["device"]) for t in arms.random_batch(vocab, rows, options["length"])))
        try:
            clock.reset()
            for _ in range(options["warmup"] + options["steps"]):
                clock.begin()
                arm.step(batch)
                clock.end()
        except torch.OutOfMemoryError:
            arm.optimizer.zero_grad(set_to_none=True)
            break
        report(arm.sizes(), rows, options, clock)
        fastest = max(
            fastest, (rows / statistics.median(clock.seconds[options["warmup"] :]), batch), key=lambda f: f[0]
        )
    if options["profile"] and fastest[1] is not None:
        clock.reset()
        print(json.dumps({"profile": profile(lambda: arm.step(fastest[1]), options["device"])}), flush=True)


def measure_trl(kind: str, make_base: Callable[[], Any], vocab: int, s: Any, options: Any, clock: Clock) -> None:
    import arms
    import torch
    import trl_arm

    for rows in row_counts(options):
        ids = arms.random_batch(vocab, rows, options["length"]).input_ids
        watch = trl_arm.Watch(clock.begin, clock.end)
        try:
            clock.reset()
            sizes = trl_arm.trl_lora(make_base, ids, s, options["warmup"] + options["steps"], watch)
        except torch.OutOfMemoryError:
            break
        report(sizes, rows, options, clock)


def profile(step: Callable[[], Any], device: str) -> str:
    """Profile two steps; return a table of the kernels that take the most time."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        for _ in range(2):
            step()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(recorded.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80))


def run_child(name: str, shape: str, compiled: bool, checkpointing: bool, options: dict[str, Any]) -> dict[str, Any]:
    task = json.dumps([name, shape, compiled, checkpointing, options])
    done = subprocess.run(
        [sys.executable, __file__, "--child", task],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    points: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {"compile": compiled, "checkpointing": checkpointing, "points": points}
    for line in done.stdout.splitlines():
        if line.startswith("{") and line.endswith("}"):
            try:
                record = json.loads(line)
            except ValueError:  # output of a library
                continue
            outcome.update(record) if "profile" in record else points.append(record)
    if done.returncode:
        outcome["error"] = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(f"{name} on {shape}: {done.stderr[-3000:]}", file=sys.stderr)
    return outcome


def device_facts(device: str) -> dict[str, Any]:
    """Return the name of the device, its peak FLOP/s, and its measured rate on a large bf16 matrix product."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    clock = Clock(device)
    for _ in range(8):
        clock.begin()
        torch.mm(a, b)
        clock.end()
    measured = 2 * size**3 / statistics.median(clock.seconds[2:])
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = next((rate for device_name, rate in PEAKS.items() if device_name in name), None)
    return {
        "device": name,
        "peak": peak or measured,
        "peak_from": "data sheet" if peak else "a large matrix product",
        "matmul": measured,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl", "accelerate")},
    }


def summarize(results: dict[str, list[dict[str, Any]]], peak: float) -> list[dict[str, Any]]:
    """Return the results of every arm at its fastest setting and number of rows."""
    best = {}
    for name, settings in results.items():
        points = [(point, s) for s in settings for point in s["points"]]
        if points:
            best[name] = max(points, key=lambda p: p[0]["tokens_per_s"])
    reference = best.get(REFERENCE)
    rows = []
    for name, (point, setting) in best.items():
        rows.append(
            {
                "arm": name,
                "compile": setting["compile"],
                "checkpointing": setting["checkpointing"],
                "rows": point["rows"],
                "tokens_per_s": round(point["tokens_per_s"]),
                "ratio": round(point["tokens_per_s"] / reference[0]["tokens_per_s"], 2) if reference else None,
                "mfu": round(point["tokens_per_s"] * point["flops_per_token"] / peak, 4),
                "peak_gib": round(point["peak_bytes"] / 2**30, 2),
                # at the reference's number of rows
                "memory_ratio": _memory_ratio(results[name], reference),
                "trained": point["trained"],
                "artifact_bytes": 2 * point["published"],
            }
        )
    return rows


def _memory_ratio(settings: list[dict[str, Any]], reference: Any) -> float | None:
    if reference is None or not reference[0]["peak_bytes"]:
        return None
    row_count = reference[0]["rows"]
    same = [p["peak_bytes"] for s in settings for p in s["points"] if p["rows"] == row_count]
    return round(min(same) / reference[0]["peak_bytes"], 2) if same else None


def table(rows: list[dict[str, Any]]) -> str:
    head = "| arm | compile | ckpt | rows | tokens/s | to TRL | MFU | peak GiB | memory at TRL's rows | artifact MB |"
    lines = [head, "|---|---|---|" + "---:|" * 7]
    for r in rows:
        lines.append(
            f"| {r['arm']} | {'on' if r['compile'] else 'off'} | {'on' if r['checkpointing'] else 'off'} | {r['rows']} "
            f"| {r['tokens_per_s']:,} | {r['ratio']} | {r['mfu']:.1%} | {r['peak_gib']} | {r['memory_ratio']} "
            f"| {r['artifact_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
        return
    if any(word.startswith("--plan") for word in sys.argv[1:]):
        import gpu_plan

        gpu_plan.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes; runs on the CPU if there is no GPU")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    numbers = {"length": 2048, "max_rows": 64, "stage_layers": 2, "steps": 8, "warmup": 3}
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training_gpu"))
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("Expected a CUDA device, but found none. Use --small to test all arms on the CPU.")
    options = {k: getattr(args, k) for k in numbers} | {"device": device, "backend": "inductor", "profile": True}
    if args.small:
        options |= {"length": 64, "max_rows": 2, "steps": 2, "warmup": 1}
    shapes = args.shapes or [key for key in SHAPES if key.startswith("small") == args.small]
    facts = device_facts(device)
    result: dict[str, Any] = {"device": facts, "options": options, "shapes": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        settings_by_arm: dict[str, list[dict[str, Any]]] = {}
        for name, (_, settings) in ARMS.items():
            if args.arms and name != REFERENCE and not any(text in name for text in args.arms):
                continue
            settings_by_arm[name] = []
            for compiled, checkpointing in settings:
                if compiled and args.small:
                    continue  # compiling takes minutes on a CPU
                outcome = run_child(name, shape, compiled, checkpointing, options)
                if text := outcome.pop("profile", None):
                    label = f"{shape}-{name.replace(', ', '-').replace(' ', '_')}{'-compiled' if compiled else ''}"
                    (args.out / f"{label}.profile.txt").write_text(text)
                settings_by_arm[name].append(outcome)
            rows = summarize(settings_by_arm, facts["peak"])
            result["shapes"][shape] = {"fields": SHAPES[shape][1], "rows": rows, "settings": settings_by_arm}
            (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        text = f"{shape} on {facts['device']}, rows of {options['length']}\n\n{table(rows)}\n"
        (args.out / f"{shape}.md").write_text(text)
        print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
