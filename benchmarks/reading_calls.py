"""Read calls: those of public data sets, and replies with errors in them, whole and in pieces.

    python benchmarks/reading_calls.py [FOLDER] [--strings 200000] [--seed 17]

FOLDER holds files of public function-calling sets under their usual names; files that are missing are left out. A call
counts as readable if another parser reads it: json for JSON (for glaive, json on the text between the quotes), ast for
Python notation. The reply is read in the call form that the set is written in; where a set has JSON objects alone,
they are put between Hermes' marks. A call counts as read if name and arguments equal those of the other parser.

The strings are replies that each form wrote, and texts of the folder, with parts cut, doubled, swapped and inserted.
Each is read whole and in pieces of random lengths; the two must be equal, and nothing may raise an error. Last, the
time for each character at growing lengths.
"""

import argparse
import ast
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from replies import cut, mutate, random_reply

from poe.calls.conversation import Call
from poe.calls.forms.call_forms import CALL_FORMS, parse_reply
from poe.calls.streaming import ReplyReader, join_parts

Found = tuple[str, str, list[Any] | None]  # the text, its form, and what the other parser reads: None is unreadable


def rows(folder: Path, name: str) -> list[Any]:
    """Return the rows of a JSON or JSONL file; an empty list if it is not there."""
    path = folder / name
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def glaive(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        for turn in re.split(r"\n*(?:USER|ASSISTANT|FUNCTION RESPONSE): ", row["chat"]):
            if "<functioncall>" not in turn:
                continue
            text = turn.replace("<|endoftext|>", "").rstrip()
            body = text.partition("<functioncall>")[2].strip()
            value = parsed(body)
            quoted = re.fullmatch(r"""\{"name": "([^"]*)", "arguments": '(.*)'\}""", body, re.DOTALL)
            if value is None and quoted:
                arguments = parsed(quoted[2])
                value = None if arguments is None else {"name": quoted[1], "arguments": arguments}
            yield text, "glaive", None if value is None else [(value["name"], value["arguments"])]


def pairs(values: list[Any], key: str = "arguments") -> list[Any]:
    return [(value["name"], value[key]) for value in values]


def objects(texts: list[str]) -> Found:
    """Return JSON objects between Hermes' marks."""
    values = [json.loads(text) for text in texts]
    values = [{**v, "arguments": parsed(a) if isinstance(a := v["arguments"], str) else a} for v in values]
    text = "\n".join(f"<tool_call>\n{json.dumps(v, ensure_ascii=False)}\n</tool_call>" for v in values)
    return text, "hermes", pairs(values)


def glaive_demo(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                yield objects([turn["value"]])


def xlam(folder: Path, name: str, key: str = "answers") -> Iterator[Found]:
    for row in rows(folder, name):
        yield row[key], "xlam", pairs(json.loads(row[key].strip("`\n")))


def xlam_messages(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        calls = [m["content"] for m in row["messages"] if m["role"] == "tool_call"]
        if calls:
            yield objects(calls)


def reasoning(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        parts = [p for m in row["messages"] if isinstance(m["content"], list) for p in m["content"]]
        calls = [p["value"] for p in parts if p["type"] == "tool_call"]
        for call in calls:
            values = parsed(call) if isinstance(call, str) else call
            yield objects([json.dumps(v) for v in (values if isinstance(values, list) else [values])])


def toolrl(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        text = row["output"].rpartition("</think>")[2]
        lines = [
            line for block in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL) for line in block.split("\n")
        ]
        for line in filter(str.strip, lines):
            value = parsed(line)
            is_call = isinstance(value, dict) and "parameters" in value
            yield line, "llama", pairs([value], "parameters") if is_call else None


def python_calls(text: str) -> list[Any] | None:
    """Return the calls of a Python list with keyword arguments that are literals."""
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else []
        if not calls or any(not isinstance(call, ast.Call) or call.args for call in calls):
            return None
        return [(ast.unparse(c.func), {k.arg: ast.literal_eval(k.value) for k in c.keywords}) for c in calls]
    except (SyntaxError, ValueError):
        return None


def apibank(folder: Path, name: str, key: str = "output") -> Iterator[Found]:
    for row in rows(folder, name):
        match = re.search(r"\[.*\]", row[key], re.DOTALL)
        yield row[key], "python", python_calls(match[0]) if match else None


def nexusraven(folder: Path, name: str) -> Iterator[Found]:
    for row in rows(folder, name):
        text = f"[{row['reference'].removeprefix('r = ')}]"
        yield text, "python", python_calls(text)


SETS: list[tuple[str, Any]] = [
    ("glaive_v2_rebuilt.jsonl", glaive),
    ("glaive_v2_rebuilt_single_turn.jsonl", glaive),
    ("glaive_toolcall_en_demo.json", glaive_demo),
    ("xlam_train_1000.json", xlam),
    ("xlam_test_500.first10.json", xlam),
    ("xlam_rows_0_999_messages.json", xlam_messages),
    ("xlam_rows_1000_1199_messages.first10.json", xlam_messages),
    ("hammer_masked_xlam_example.json", lambda folder, name: xlam(folder, name, "output")),
    ("toolrl_rlla_sft_400.json", toolrl),
    ("reason_tool_use_demo_50.jsonl", reasoning),
    ("apibank_lv3-api-train.json", apibank),
    *(
        (f"apibank_test_level-{n}-api.first10.json", lambda f, name: apibank(f, name, "expected_output"))
        for n in (1, 2)
    ),
    *((f"nexusraven_{n}_queries.first10.json", nexusraven) for n in ("cve_cpe", "emailrep", "virustotal")),
]


def read_in_pieces(text: str, form: str, pieces: list[str]) -> Any:
    reader = ReplyReader(form)
    return join_parts([part for piece in pieces for part in reader.feed(piece)] + reader.close())


def read_sets(folder: Path) -> list[tuple[str, str]]:
    """Print how many calls of each set are read. Return all texts."""
    print("| file | form | calls | readable | read | read in pieces | named faults of the others |")
    print("|---|---|---:|---:|---:|---:|---|")
    rng, texts = random.Random(1), []
    for name, read in SETS:
        total = readable = whole = pieces = 0
        faults: dict[str, int] = {}
        form = ""
        for text, form, expected in read(folder, name):
            texts.append((text, form))
            reply = parse_reply(text, form)
            calls = [(call.name, call.arguments) for call in reply.calls]
            total += len(expected) if expected is not None else 1
            if expected is None:
                for fault in reply.faults:
                    faults[fault.kind.name] = faults.get(fault.kind.name, 0) + 1
                continue
            readable += len(expected)
            whole += len(expected) if json.dumps(calls) == json.dumps(expected) else 0
            pieces += len(expected) if read_in_pieces(text, form, cut(rng, text)) == reply else 0
        named = ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items()))
        if total:
            print(f"| {name} | {form} | {total:,} | {readable:,} | {whole:,} | {pieces:,} | {named} |")
    return texts


def read_mutations(count: int, seed: int, texts: list[tuple[str, str]]) -> None:
    rng, forms = random.Random(seed), list(CALL_FORMS.values())
    calls = faults = characters = wrong = 0
    start = time.process_time()
    for i in range(count):
        form = forms[i % len(forms)]
        text, name = random_reply(rng, form), form.name
        if texts and i % 4 == 0:
            text, name = rng.choice(texts)
        text = mutate(rng, text[:2000])
        reply = parse_reply(text, name)
        wrong += read_in_pieces(text, name, cut(rng, text)) != reply
        calls, faults, characters = calls + len(reply.calls), faults + len(reply.faults), characters + len(text)
    seconds = time.process_time() - start
    print(f"\n{count:,} strings, {characters:,} characters: no error, {wrong} read otherwise in pieces, ", end="")
    print(f"{calls:,} calls and {faults:,} faults, {seconds:.0f} s of CPU time, the making of the strings included")


def read_long_texts() -> None:
    print("\n| microseconds per character | 10,000 | 40,000 | 160,000 characters |\n|---|---:|---:|---:|")
    for form in CALL_FORMS.values():
        call = form.write([Call("f", {"x": "some text", "n": [1, 2, 3]})])
        long = form.write([Call("f", {"x": "y" * 170_000})])
        broken = call[: len(call) // 2]
        for label, unit, size in (("calls", f"{call}\n", 10**9), ("calls", f"{call}\n", 4), ("one call", long, 4),
                                  ("broken calls", broken, 4)):  # fmt: skip
            figures = []
            for length in (10_000, 40_000, 160_000):
                text = (unit * (length // len(unit) + 1))[:length]
                pieces = [text[i : i + size] for i in range(0, len(text), size)]
                start = time.process_time()
                read_in_pieces(text, form.name, pieces)
                figures.append((time.process_time() - start) / length * 1e6)
            way = "whole" if size > 4 else "in pieces of 4"
            print(f"| {form.name}, {label}, {way} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--strings", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    texts = read_sets(options.folder) if options.folder else []
    read_mutations(options.strings, options.seed, texts)
    read_long_texts()


if __name__ == "__main__":
    main()
