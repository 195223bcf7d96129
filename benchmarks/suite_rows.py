"""Count what the suites of `poe eval` ask: rows read, questions, those with calls, and what is dropped by reason.

python benchmarks/suite_rows.py apibank=level-1-api.json sealtools=dev.jsonl plans=dev.jsonl ...
"""

import sys

from poe.errors import DataError
from poe.evaluation.call_metrics import split_question
from poe.evaluation.kinds import read_sources
from poe.evaluation.suites import CALLS


def main(specs: list[str]) -> None:
    """Print a line of a table for each SPEC."""
    print("| suite | rows read | rows asked | questions | with calls | dropped |")
    print("|---|---:|---:|---:|---:|---|")
    for spec in specs:
        try:
            (rows,) = read_sources(spec)
        except DataError as error:
            print(f"| {spec} | | 0 | 0 | 0 | {error} |")
            continue
        asked = len({row for _, row, _, _ in rows.rows})
        calls = sum(bool(split_question(content)[1]) for *_, content in rows.rows) if rows.kind == CALLS else asked
        dropped = ", ".join(f"{reason} {count}" for reason, count in rows.dropped.most_common())
        print(f"| {spec} | {rows.read} | {asked} | {len(rows.rows)} | {calls} | {dropped} |")


if __name__ == "__main__":
    main(sys.argv[1:])
