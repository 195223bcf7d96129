"""Compare the metrics of calls with the scripts that define them, on random inputs.

    pip install --no-deps --target BFCL bfcl-eval==2026.3.23
    python benchmarks/call_metrics.py --bfcl BFCL [--hammer evaluate.py] [--rounds 20]

BFCL's data, its acceptable answers, and its checker come from the package. The calls are the first acceptable answers,
some of them changed: other values, types, names, arguments left out or added, calls doubled, dropped or swapped. The
checker and `match_acceptable` must agree on every one. Hammer's `evaluation/evaluate.py` gets the same calls in a file,
and must print the scores that `hammer_counts` gives.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import runpy
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poe.calls.conversation import Call
from poe.calls.tools import read_tools
from poe.evaluation.acceptable import first_call, match_acceptable
from poe.evaluation.call_metrics import hammer_counts

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
VALUES = ("", "x", "New York", "new-york", 0, 1, 1.0, 2.5, True, None, [], [1], ["a", 2], {}, {"a": 1}, [{"a": "b"}])


def rows(folder: Path, category: str) -> Iterator[tuple[list[Any], list[Any]]]:
    data = folder / "bfcl_eval" / "data"
    name = f"BFCL_v4_{category}.json"
    answers = {row["id"]: row["ground_truth"] for row in read_lines(data / "possible_answer" / name)}
    for row in read_lines(data / name):
        yield row["function"], answers[row["id"]]


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change(rng: random.Random, calls: list[Call], functions: list[Any], answers: list[Any]) -> list[Call]:
    calls = [Call(call.name, copy.deepcopy(call.arguments)) for call in calls]
    for _ in range(rng.choice((0, 1, 1, 2))):
        if not calls:
            break
        kind, i = rng.randrange(11), rng.randrange(len(calls))
        name, arguments = calls[i].name, calls[i].arguments
        key = rng.choice([*arguments, "extra"])
        if kind == 0:
            calls[i] = Call(rng.choice([f["name"] for f in functions] + ["other"]), arguments)
        elif kind == 1:
            arguments.pop(key, None)
        elif kind == 2:
            arguments[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(arguments.get(key), int | float):
            arguments[key] = rng.choice((float(arguments[key]), str(arguments[key]), arguments[key] + 1))
        elif kind == 4 and isinstance(arguments.get(key), str):
            arguments[key] = rng.choice(
                (arguments[key].upper(), arguments[key].replace(" ", "-"), arguments[key] + "s")
            )
        elif kind == 5 and isinstance(arguments.get(key), list) and arguments[key]:
            arguments[key][rng.randrange(len(arguments[key]))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6 and isinstance(arguments.get(key), dict) and arguments[key]:
            arguments[key][rng.choice([*arguments[key], "new"])] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 7:
            calls.append(calls[i])
        elif kind == 8:
            calls.pop(i)
        elif kind == 9:
            rng.shuffle(calls)
        else:
            options = [o for answer in answers for o in answer.get(name, {}).get(key, ())]
            arguments[key] = copy.deepcopy(rng.choice(options or [1]))
    return calls


def load_checker(folder: Path) -> Any:
    """Return BFCL's checker; the list of models, which needs its whole environment, is replaced by one model."""
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"model": types.SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    sys.modules[models.__name__] = models
    sys.path.insert(0, str(folder))
    from bfcl_eval.constants.enums import Language  # type: ignore[import-not-found]
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # type: ignore[import-not-found]

    def check(functions: Any, calls: list[Call], answers: Any, category: str) -> bool | None:
        output = [{call.name: call.arguments} for call in calls]
        try:
            return bool(ast_checker(functions, output, answers, Language.PYTHON, category, "model")["valid"])
        except (KeyError, TypeError, AttributeError, IndexError):
            return None  # the checker fails on this input

    return check


def compare_with_bfcl(folder: Path, rounds: int) -> list[tuple[list[Call], list[Call]]]:
    check, rng = load_checker(folder), random.Random(3)
    pairs = []
    print("| category | rows | gold accepted by BFCL / by us | changed | accepted by BFCL | differences | BFCL fails |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for category in CATEGORIES:
        count = changed = accepted = different = failed = 0
        right = [0, 0]
        for functions, answers in rows(folder, category):
            tools, best = read_tools(functions), [first_call(answer) for answer in answers]
            count += 1
            right[0] += bool(check(functions, best, answers, category))
            right[1] += match_acceptable(best, answers, tools)
            for _ in range(rounds):
                calls = change(rng, best, functions, answers)
                official, ours = check(functions, calls, answers, category), match_acceptable(calls, answers, tools)
                pairs.append((best, calls))
                changed += 1
                if official is None:
                    failed += 1
                    continue
                accepted += official
                if official != ours:
                    different += 1
                    if different < 4:
                        print(f"{category}: BFCL {official}, ours {ours}: {calls} {answers}", file=sys.stderr)
        print(
            f"| {category} | {count} | {right[0]} / {right[1]} | {changed:,} | {accepted:,} | {different} | {failed} |"
        )
    return pairs


def compare_with_hammer(script: Path, pairs: list[tuple[list[Call], list[Call]]]) -> None:
    """Run Hammer's script on a file of the calls, and print its scores beside ours."""
    for name in ("pandas", "tqdm"):  # imported there, and not used
        sys.modules.setdefault(name, types.SimpleNamespace(tqdm=iter))  # type: ignore[arg-type]
    totals = {name: [0, 0, 0] for name in ("name", "argument")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        with path.open("w") as file:
            for expected, calls in pairs:
                texts = [json.dumps([vars_of(call) for call in side])
                         for side in (expected, calls)]  # fmt: skip
                file.write(json.dumps({"label": texts[0], "predict": texts[1]}) + "\n")
                for name, counts in hammer_counts(expected, calls, 0).items():
                    totals[name] = [a + b for a, b in zip(totals[name], counts, strict=True)]
        sys.argv = [str(script), str(path)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(script))
    print(f"\nHammer's script: {printed.getvalue().strip()}")
    ours = {f"F1_{name}": 2 * hits / (predicted + gold) for name, (hits, predicted, gold) in totals.items()}
    print(f"ours: {ours}")


def vars_of(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bfcl", type=Path, required=True)
    parser.add_argument("--hammer", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    pairs = compare_with_bfcl(options.bfcl, options.rounds)
    if options.hammer:
        compare_with_hammer(options.hammer, pairs)


if __name__ == "__main__":
    main()
