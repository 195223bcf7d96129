"""A user's first run on a real base, from the built wheel: train, stop and resume, call.

    python benchmarks/small_data.py --base FOLDER [--rows 30] [--data rows.jsonl] [--out FOLDER]

The wheel of this checkout is built and installed into a new environment, which finds the dependencies of this one and
nothing else of it. Everything after that is what a user would do: one command without options beyond base, data, and
folder. Without --data the rows are from the generated world; they are no measure of quality. `python
benchmarks/smollm2.py FOLDER` makes a base.

Prints what happened when, and exits with 1 unless held-out loss fell, the first line of progress came within 20 seconds
and the end within 5 seconds of Ctrl-C, and the stage answers a question of the rows with calls that fit the tools.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIRST_LINE_S, STOP_S = 20, 5


def install_wheel(folder: Path) -> Path:
    """Build the wheel, install it into a new environment, and return the folder of the environment's programs."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", wheel], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    origin = subprocess.run([python, "-c", "import poe; print(poe.__file__)"], capture_output=True, text=True, cwd="/")
    assert origin.stdout.startswith(str(folder)), origin
    return python.parent


def make_rows(programs: Path, count: int, path: Path) -> Path:
    """Write generated rows with tools and calls."""
    subprocess.run([programs / "poe", "data", "export", f"demo={count}", path], check=True, stdout=subprocess.DEVNULL)
    return path


def train(command: list[str], stop_at: str = "") -> tuple[int, float, float, list[str]]:
    """Run a training; return its exit code, the seconds until its first line, those after Ctrl-C, and its lines.

    Ctrl-C is sent 3 seconds after the first line that contains `stop_at`.
    """
    started, first, stopped, lines = time.monotonic(), 0.0, 0.0, []
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr or ():
            first = first or time.monotonic() - started
            print(f"{time.monotonic() - started:7.1f} s  {line}", end="", flush=True)
            lines.append(line)
            if stop_at and stop_at in line and not stopped:
                time.sleep(3)
                process.send_signal(signal.SIGINT)
                stopped = time.monotonic()
    return process.returncode, first, time.monotonic() - stopped if stopped else 0.0, lines


def asks_for_calls(row: dict[str, Any]) -> bool:
    """Return whether the first answer of a row is calls and nothing else."""
    answer = next((message for message in row["messages"] if message["role"] == "assistant"), {})
    return bool(row.get("tools") and answer.get("tool_calls") and not answer.get("content"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, help="new folder that keeps the run")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    for name in ("PYTHONPATH", "POE_BASE"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="poe-small-data-") as scratch:
        folder = Path(scratch)
        os.environ["POE_CACHE"] = str(folder / "cache")
        programs = install_wheel(folder)
        rows = options.data or make_rows(programs, options.rows, folder / "rows.jsonl")
        run = options.out or folder / "run"
        command = [str(programs / "poe-train"), "stage", "--base", options.base, "--data", str(rows)]
        command += ["--out", str(run)]
        code, first_line, stop_seconds, _ = train(command, stop_at="step 1/")
        stopped = code == 130
        code, _, _, _ = train([*command, "--resume"])
        record = json.loads((run / "training.json").read_text(encoding="utf-8"))
        example = next(filter(asks_for_calls, map(json.loads, rows.open(encoding="utf-8"))))
        tools = example["tools"] if isinstance(example["tools"], str) else json.dumps(example["tools"])
        (folder / "tools.json").write_text(tools, encoding="utf-8")
        question = next(message["content"] for message in example["messages"] if message["role"] == "user")
        call = [programs / "poe", "call", run, question, "--tools", folder / "tools.json"]
        answered = subprocess.run(call, capture_output=True, text=True)
    has_calls = answered.returncode == 0 and bool(json.loads(answered.stdout)["tool_calls"])
    before, best = record["trajectory"][0]["val_bpb"], record["val_bpb"]
    checks = {
        f"first line after {first_line:.1f} s": first_line < FIRST_LINE_S,
        f"stopped {stop_seconds:.1f} s after Ctrl-C": stopped and stop_seconds < STOP_S,
        f"resumed, exit code {code}": code == 0,
        f"validation {before:.4f} -> {best:.4f} bits per byte": best < before,
        f"poe call: {answered.stdout.strip() or answered.stderr.strip()}": has_calls,
    }
    print(json.dumps({key: record[key] for key in ("estimate", "actual", "ratio", "evaluation")}, indent=2))
    for text, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'} {text}")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
