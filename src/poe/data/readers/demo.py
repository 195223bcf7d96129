"""Reader `demo`: generated conversations about a small world of tools (`poe.demo`). No file, no network.

`demo` gives 12,000 rows, `demo=500` that many. Every fifth noun and every eighth value never occur in them: they make
the two held-out splits that `evaluation_splits` returns, questions with new values about known tools, and questions
about tools that no training row has.
"""

from collections.abc import Iterator

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.demo.conversations import make_conversation
from poe.errors import DataError

NAME = "demo"
HUB_ID = None
LICENSE = "Apache-2.0"
DEFAULT_ROWS = 12_000


def read(path: str | None, report: DropReport) -> Iterator[Conversation]:
    """Yield the training rows; `path`, if given, is their number."""
    if path is not None and not path.isdigit():
        raise DataError(f"The reader 'demo' generates its rows: expected demo or demo=NUMBER, got demo={path}.")
    for index in range(int(path or DEFAULT_ROWS)):
        report.read[NAME] += 1
        report.kept[NAME] += 1
        yield make_conversation(index)


def evaluation_splits(rows: int) -> dict[str, list[Conversation]]:
    """Return the held-out questions: `rows` of each split, and as many that no tool on offer can serve."""
    calls = ("call", "parallel")
    return {
        "unseen values": [make_conversation(i, "unseen_values", kind=calls[i % 5 == 0]) for i in range(rows)],
        "unseen tools": [make_conversation(i, "unseen_tools", kind=calls[i % 5 == 0]) for i in range(rows)],
        "no tool fits": [
            make_conversation(i, ("unseen_values", "unseen_tools")[i % 2], kind="abstain") for i in range(rows)
        ],
    }
