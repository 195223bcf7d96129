"""Generated conversations about the demo world of tools (`poe.demo`), without files or network.

`demo` gives 12,000 rows, `demo=500` gives 500. Every fifth noun and every eighth value never occur in them. They make
the held-out splits of `evaluation_splits`: questions with new values for known tools, and questions about new tools.
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
    """Yield the training rows. `path` is their number (default 12,000)."""
    if path is not None and not path.isdigit():
        raise DataError(f"The reader 'demo' generates its rows: expected demo or demo=NUMBER, got demo={path}.")
    for index in range(int(path or DEFAULT_ROWS)):
        report.read[NAME] += 1
        report.kept[NAME] += 1
        yield make_conversation(index)


def evaluation_splits(rows: int) -> dict[str, list[Conversation]]:
    """Return held-out questions: `rows` of each split, and the same number that no offered tool can serve."""
    calls = ("call", "parallel")
    return {
        "unseen values": [make_conversation(i, "unseen_values", kind=calls[i % 5 == 0]) for i in range(rows)],
        "unseen tools": [make_conversation(i, "unseen_tools", kind=calls[i % 5 == 0]) for i in range(rows)],
        "no tool fits": [
            make_conversation(i, ("unseen_values", "unseen_tools")[i % 2], kind="abstain") for i in range(rows)
        ],
    }
