"""How often `ToolIndex` finds the tools that a question needs, on the public pool of Seal-Tools.

    python benchmarks/tool_retrieval.py FOLDER

FOLDER has `sealtools_tool_pool.jsonl`, `sealtools_dev.jsonl` and `sealtools_test_in_domain.jsonl`: `tool.jsonl`,
`dev.jsonl` and `test_in_domain.jsonl` of fairyshine/Seal-Tools (Apache-2.0). Of each set and number of tools it
prints the share of right tools that were found, the share of questions with all of them, and the time of a question.
"""

import json
import sys
import time
from pathlib import Path
from unittest import mock

from poe.calls.conversation import Tool
from poe.calls.tools import read_tools
from poe.tools import retrieval
from poe.tools.retrieval import TOOLS_OFFERED, ToolIndex

COUNTS = (1, 3, 5, 10, 20, 50)
Question = tuple[str, set[str]]


def read_pool(path: Path) -> list[Tool]:
    """Return the tools of the pool."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    declared = [
        {"name": row["api_name"], "description": row["api_description"]}
        | {"parameters": row["parameters"], "required": row["required"]}
        for row in rows
    ]
    return [tool for one in declared for tool in read_tools([one], flat=True)]


def read_questions(path: Path) -> list[Question]:
    """Return questions with the names of the tools that they need."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["query"], {call["api"] for call in row["calling"]}) for row in rows]


def measure(index: ToolIndex, questions: list[Question], count: int) -> tuple[float, float, float, float]:
    """Return the tools offered, the share of right tools found, that of questions with all, and seconds a question."""
    start = time.perf_counter()
    found = [{tool["function"]["name"] for tool in index.search(question, count)} for question, _ in questions]
    seconds = (time.perf_counter() - start) / len(questions)
    pairs = [(names, right) for names, (_, right) in zip(found, questions, strict=True)]
    hits = sum(len(names & right) for names, right in pairs) / sum(len(right) for _, right in pairs)
    return sum(map(len, found)) / len(found), hits, sum(right <= names for names, right in pairs) / len(pairs), seconds


def main(folder: Path) -> None:
    """Print a table."""
    tools = read_pool(folder / "sealtools_tool_pool.jsonl")
    start = time.perf_counter()
    index = ToolIndex(tools)
    print(f"{len(tools):,} tools indexed in {time.perf_counter() - start:.2f} s\n")
    print("| questions | scores | at most | offered | right tools | all right tools | ms |")
    print("|---|---|---|---|---|---|---|")
    for name in ("dev", "test_in_domain"):
        questions = read_questions(folder / f"sealtools_{name}.jsonl")
        print_line(name, "sentences, cut off", TOOLS_OFFERED, measure(index, questions, TOOLS_OFFERED))
        with mock.patch.object(retrieval, "_CUT_OFF", 0.0):
            for count in COUNTS:
                print_line(name, "sentences", count, measure(index, questions, count))
            whole = [(question.translate(str.maketrans(".?!;", "    ")), right) for question, right in questions]
            for count in COUNTS:
                print_line(name, "whole question", count, measure(index, whole, count))


def print_line(name: str, label: str, count: int, numbers: tuple[float, float, float, float]) -> None:
    """Print a line of the table."""
    offered, hits, whole, seconds = numbers
    print(f"| {name} | {label} | {count} | {offered:.1f} | {hits:.3f} | {whole:.3f} | {1000 * seconds:.2f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
