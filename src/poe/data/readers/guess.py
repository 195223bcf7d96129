"""Find the reader of a file from its first row, for a SPEC item that is a path alone."""

from poe.data.drops import DropReport
from poe.data.readers.messages import holds_conversation
from poe.data.sources import file_rows
from poe.errors import DataError

# Keys of public data sets -> the reader. A data set has a license, so its reader is suggested and not chosen.
_PUBLIC = {
    ("query", "answers"): "xlam",
    ("system", "chat"): "glaive",
    ("instruction", "output"): "alpaca",
    ("question", "answer"): "gsm8k",
}


def find_reader(path: str) -> str:
    """Return the name of the reader for the rows of a file, a folder, or a glob.

    Rows with `messages`, with `prompt` and `completion` (OpenAI, TRL) or with `conversations` (ShareGPT) belong to
    `messages`. Raises `DataError` for other rows, with the reader of the public data set that has the same keys, and
    for a path without rows.
    """
    report = DropReport()
    row = next((row for _, row in file_rows(path, "messages", report)), None)
    if isinstance(row, dict) and holds_conversation(row):
        return "messages"
    if row is None:
        reasons = ", ".join(report.dropped.get("messages", {})) or "it has no rows"
        raise DataError(f"No row of {path} can be read: {reasons}. Expected JSON rows with `messages`.")
    keys = ", ".join(sorted(map(str, row))[:12]) if isinstance(row, dict) else type(row).__name__
    public = next((name for names, name in _PUBLIC.items() if isinstance(row, dict) and {*names} <= row.keys()), None)
    hint = f" Rows with these keys are read by {public}={path}." if public else " `poe readers` lists all readers."
    raise DataError(
        f"The rows of {path} do not tell which reader they need: expected `messages` in each row, got the keys {keys}. "
        f"Name the reader: READER={path}.{hint}"
    )
