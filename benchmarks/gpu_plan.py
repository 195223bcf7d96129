"""What one GPU measures first when its time is short: a plan with a budget, which a second call continues.

    python benchmarks/training_gpu.py --plan 10min --base FOLDER --data xlam=FILE
    python benchmarks/training_gpu.py --plan 5min --small          # tiny shapes on any machine: a test of the plan

The arms run in the order of `make_arms`, the most important first. Each is a process of its own with a limit of its
own. Its result is written to `OUT/NAME.json` as soon as it ends, also if it failed or reached its limit. An arm that
was cut short because the time of the plan was over runs again at the next call; to repeat another one, remove its file.
Nothing is downloaded: FOLDER is a base on this disk, FILE holds its rows.

First comes the comparison on the base: methods of the baseline kit (baselines.py, which repeats them with several
seeds and measures replies) on the same packed rows in the same order, with rates that rise over a twentieth of the
steps and fall to zero. LoRA runs with TRL's own loop and loss; of its rows, documents do not see each other either.
Then comes the speed of training for two random shapes, not compiled and compiled (training_gpu.py), at a fixed number
of rows.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEAST_SECONDS = 20  # an arm does not start with less time left: opening torch and a base takes as long
# name -> (method of the baseline kit, its rate, how it is trained)
COMPARED: dict[str, tuple[str, float, str]] = {
    "LoRA r16, TRL": ("lora", 3e-3, "trl"),
    "fork r16, answer": ("fork", 6e-3, ""),
    "stage, 4 new layers, low-rank head": ("stage", 0.01, ""),
    "fork full, answer": ("fork-full", 2e-4, ""),
    "fork r16, answer, compiled": ("fork", 6e-3, "compiled"),
    "fork r16, answer, cached": ("fork", 6e-3, "cached"),
    "full fine-tuning": ("full", 1e-4, ""),
    "LoRA r16 on the layers of the fork": ("lora-top", 3e-3, ""),
    "last 4 layers and head": ("last", 3e-4, ""),
    "chain, a fork on a fork": ("chain", 6e-3, ""),
    "product of two forks": ("product", 6e-3, ""),
    "fork r16, all tokens": ("fork-all", 6e-3, ""),
    "stage, dense head": ("stage-dense", 0.01, ""),
    "stage, no head": ("stage-no-head", 0.01, ""),
    "stage, copied layers": ("stage-copied", 0.005, ""),
    "stage, AdamW": ("stage-adamw", 1e-3, ""),
}
UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Arm:
    """One measurement: the script and the task of its process, and how many seconds it may take."""

    name: str
    script: str
    task: list[Any]
    seconds: int

    def file(self, out: Path) -> Path:
        """Return where its result is kept."""
        return out / f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.json"


def make_arms(options: dict[str, Any]) -> list[Arm]:
    """Return the arms of the plan, the most important first."""
    from training_gpu import OFF, ON

    def compare(name: str) -> Arm:
        return Arm(name, "gpu_plan.py", [name, options], 600 if options["small"] else 150)

    def speed(shape: str, name: str, compiled: bool = OFF, checkpointing: bool = OFF) -> Arm:
        marks = ", compiled" * compiled + ", checkpointing" * checkpointing
        rows = [4, 16] if name.startswith("LoRA") and not checkpointing else [16]
        own = options["speed"] | ({} if options["small"] else {"rows": rows})
        task = [name, shape, compiled, checkpointing, own]
        return Arm(f"{shape}: {name}{marks}", "training_gpu.py", task, 600 if options["small"] else 90)

    first, second = ("small-poe", "small-qwen3") if options["small"] else ("poe-d24", "qwen3-1.7b")
    lora, fork = "LoRA r16, TRL SFTTrainer", "fork r16, upper half, all tokens"
    dense, low_rank = "stage, dense head", "stage, low-rank head"
    compared = [compare(name) for name in COMPARED]
    return [
        *compared[:3],
        speed(first, lora),
        speed(first, dense),
        speed(first, dense, ON),
        speed(second, lora),
        speed(second, low_rank),
        speed(second, low_rank, ON),
        *compared[3:5],
        speed(second, fork),
        speed(second, fork, ON),
        speed(first, fork, ON),
        speed(first, f"{dense}, cached"),
        speed(second, f"{low_rank}, cached"),
        *compared[5:],
        speed(second, lora, OFF, ON),
        speed(first, lora, ON),
        speed(second, lora, ON),
    ]


def run_plan(
    arms: Iterable[Arm],
    seconds: float,
    out: Path,
    options: Mapping[str, Any],
    start: Callable[[Arm, float], dict[str, Any]],
    note: Callable[[str], Any] = print,
) -> dict[str, dict[str, Any]]:
    """Run the arms that have no result in `out` until `seconds` are over; return all results by name.

    `start` runs one arm for at most so many seconds. Raises `SystemExit` if `out` holds results of other options.
    """
    deadline, results = time.monotonic() + seconds, {}
    out.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        file = arm.file(out)
        if file.exists():
            results[arm.name] = json.loads(file.read_text())
            if results[arm.name]["options"] != options:
                raise SystemExit(f"{file} has other options than this call. Choose another folder with --out.")
            if results[arm.name]["complete"]:
                continue
        left = deadline - time.monotonic()
        if left < min(LEAST_SECONDS, arm.seconds):
            continue
        started = time.monotonic()
        outcome = start(arm, min(arm.seconds, left))
        took = time.monotonic() - started
        complete = not outcome.get("timed_out") or left >= arm.seconds
        results[arm.name] = {"arm": arm.name, "options": options, "complete": complete, "took": took, **outcome}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results[arm.name], indent=1) + "\n")
        os.replace(temporary, file)
        state = outcome.get("error") or ("timed out" if outcome.get("timed_out") else "done")
        note(f"{arm.name}: {state}, {took:.0f} s, {max(deadline - time.monotonic(), 0):.0f} s left")
    return results


def run_arm(arm: Arm, seconds: float) -> dict[str, Any]:
    """Run an arm's process; return its lines of JSON. After `seconds` it is killed, and its lines so far are kept."""
    command = [sys.executable, str(HERE / arm.script), "--child", json.dumps(arm.task)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile
            output, errors = process.communicate()
            timed_out = True
    points = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):  # other lines are output of libraries
            record = json.loads(line)
            if isinstance(record, dict) and "tokens_per_s" in record:
                points.append(record)
    outcome: dict[str, Any] = {"points": points, "timed_out": timed_out}
    if process.returncode and not timed_out:
        outcome["error"] = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:500]
    return outcome


def compare_child(name: str, options: dict[str, Any]) -> None:
    """Train one arm of the comparison; print its speed, seconds, peak memory and held-out loss as a line of JSON.

    The loss is that of the saved weights, opened again.
    """
    import dataclasses
    import tempfile

    import arms
    import torch
    from baseline_measures import validate
    from baseline_methods import METHODS, STAGE_LAYERS, TrainedMethod, open_base, save, train
    from training_gpu import Clock

    from poe.data.packing import Batch
    from poe.data.pipeline import prepare
    from poe.data.render import Renderer
    from poe.data.templates import complete_template
    from poe.stages import Recipe

    device, steps, rows_per_step = options["device"], options["steps"], options["rows_per_step"]
    length, dtype = options["seq_len"], "bfloat16" if options["bf16"] else "float32"
    known, rate, how = COMPARED[name]
    method = METHODS[known]
    if how == "cached":
        method = dataclasses.replace(method, options={**method.options, "cached": True})
    cascade = open_base(method, options["base"], dtype, device)
    complete_template(cascade.tokenizer)
    recipe = Recipe(
        name="plan", data=options["data"], seq_len=length, tokens_per_step=length, validation_ratio=0.05, eval_rows=0
    )
    data = prepare(recipe, Renderer(cascade.tokenizer))
    torch.manual_seed(0)
    settings = arms.Settings(
        device=device,
        bf16=options["bf16"],
        chunked=True,
        lr=rate,
        matrix_lr=rate,
        head_lr=rate / 10,
        stage_layers=STAGE_LAYERS,
        last_layers=STAGE_LAYERS,
        attach_at=options["attach_at"],
        max_grad_norm=1.0,
        compile=options["speed"]["backend"] if how == "compiled" else None,
    )

    def batch(step: int) -> Batch:
        return Batch(*(part.to(device) for part in data.train.batch(step, rows_per_step)))

    clock = Clock(device)
    clock.reset()
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        if how == "trl":
            import trl_arm

            rows = Batch(*data.train.batch(0, rows_per_step * steps))
            watch = trl_arm.Watch(clock.begin, clock.end)
            sizes, adapter = trl_arm.trl_lora_on_rows(lambda: cascade.base, rows, rows_per_step, settings, steps, watch)
            seconds, trained, peak = clock.seconds, sizes["trained"], clock.peak()
            adapter.to(torch.bfloat16).save_pretrained(weights, save_embedding_layers=False)
        else:
            arm, _, seconds = train(method, cascade, settings, length, steps, batch)
            peak = clock.peak()
            trained = sum(stage.num_parameters() for stage in cascade.stages.values()) or arm.trained
            save(method, cascade, arm, weights)
        found = validate(TrainedMethod(method, weights, options["base"], dtype, device), data.val, options["val_rows"])
    speed = rows_per_step * length / statistics.median(seconds[min(3, steps - 1) :])
    quality = {"held_out_loss": found["forced_nats"], "calls_right": found["forced_calls"]}
    record = {"tokens_per_s": speed, "seconds": sum(seconds), "peak_bytes": peak, "trained": trained, **quality}
    print(json.dumps({**record, "steps": steps}), flush=True)


def tables(results: Mapping[str, dict[str, Any]], peak: float | None) -> str:
    """Return the results as two Markdown tables: the comparison, and the speed."""
    titles = ["comparison", "trained, M", "tokens/s", "training, s", "peak GiB", "held-out loss", "calls right"]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * 6]
    for name in COMPARED:
        for p in results.get(name, {}).get("points", ()):
            lines.append(
                f"| {name} | {p['trained'] / 1e6:.1f} | {p['tokens_per_s']:,.0f} | {p['seconds']:.1f} "
                f"| {p['peak_bytes'] / 2**30:.1f} | {p['held_out_loss']:.4f} | {p['calls_right'] or 0:.3f} |"
            )
    lines += ["", "| speed | rows | tokens/s | MFU | peak GiB |", "|---|" + "---:|" * 4]
    for name, result in results.items():
        for p in result["points"] if name not in COMPARED else ():
            mfu = f"{p['tokens_per_s'] * p['flops_per_token'] / peak:.1%}" if peak else "-"
            lines.append(f"| {name} | {p['rows']} | {p['tokens_per_s']:,.0f} | {mfu} | {p['peak_bytes'] / 2**30:.1f} |")
    failed = [f"- {name}: {r.get('error') or 'reached its limit'}" for name, r in results.items() if not r["points"]]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def parse_seconds(text: str) -> float:
    """Read a time such as 10min, 90s or 1h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 10min, 90s or 1h, got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        compare_child(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=parse_seconds, required=True, metavar="TIME", help="such as 10min")
    parser.add_argument("--base", help="folder of a base on this disk")
    parser.add_argument("--data", help="a data SPEC of files, such as glaive=FILE,xlam=FILE")
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    parser.add_argument("--small", action="store_true", help="tiny shapes, the embedded base; runs on any machine")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/bench/gpu_plan")
    args = parser.parse_args()
    import torch
    from training_gpu import device_facts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("Expected a CUDA device, but found none. Use --small to test the plan on the CPU.")
    if not args.small and not (args.base and args.data):
        raise SystemExit(
            "Expected --base FOLDER and --data SPEC: the comparison trains on a base and rows of this disk."
        )
    compare = {"base": args.base or "demo", "data": args.data or "demo=200", "seq_len": 2048, "rows_per_step": 8}
    compare |= {"steps": 110, "val_rows": 48, "bf16": device == "cuda", "attach_at": "auto"}
    speed = {"length": 2048, "max_rows": 16, "stage_layers": 2, "steps": 8, "warmup": 3, "profile": False}
    speed |= {"device": device, "backend": "inductor"}
    if args.small:
        compare |= {"seq_len": 512, "rows_per_step": 1, "steps": 3, "val_rows": 1, "attach_at": 6}
        speed |= {"length": 64, "max_rows": 1, "steps": 1, "warmup": 1, "backend": "eager"}
    options = {**compare, "speed": speed, "small": args.small, "device": device}
    out = args.out or Path("runs/bench") / ("gpu_plan_small" if args.small else "gpu_plan")
    arms = [arm for arm in make_arms(options) if not args.arms or any(text in arm.name for text in args.arms)]
    facts = device_facts(device)
    results = run_plan(arms, args.plan, out, {**options, "name": facts["device"]}, run_arm)
    text = tables(results, facts["peak"])
    (out / "device.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "tables.md").write_text(text + "\n")
    open_arms = sum(not results.get(arm.name, {}).get("complete") for arm in arms)
    print(f"\n{text}\n\n{len(arms) - open_arms} of {len(arms)} arms done in {out}; the same command continues.")


if __name__ == "__main__":
    main()
