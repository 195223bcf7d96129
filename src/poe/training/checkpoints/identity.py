"""What makes a run the run it is: a checkpoint is continued only by a run that would have written it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from poe.data.packing import Batch, Rows
from poe.errors import TrainingError
from poe.stages.recipe import Plan

SAMPLED_ROWS = 64
# Fields that change what is shown and kept of a run, not what comes out of it.
FREE = ("description", "checkpoint_every", "keep_checkpoints", "track")


def run_identity(
    plan: Plan,
    num_steps: int,
    rows: Mapping[str, Rows | None],
    parameters: Iterable[tuple[str, nn.Parameter]],
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """Return, as JSON values by name, everything that decides the bytes that a run ends with.

    `rows` are the data by their use, `facts` what only the caller knows, such as the fingerprint of the base.
    """
    shapes = json.dumps([[name, list(p.shape), str(p.dtype)] for name, p in parameters])
    fields = {name: value for name, value in plan.as_dict().items() if name not in FREE}
    data = {f"{use} rows": rows_fingerprint(source) for use, source in rows.items() if source is not None}
    identity = {**fields, "steps": num_steps, **data, "trained tensors": _short(shapes.encode()), **facts}
    return dict(json.loads(json.dumps(identity)))  # tuples become lists, as they will when it is read back


def rows_fingerprint(rows: Rows) -> str:
    """Return how many rows there are and a hash of their number and of rows spread evenly over those at hand."""
    digest = hashlib.sha256(str(rows.num_rows).encode())
    for batch in sampled(rows):
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
    return f"{rows.num_rows:,} rows, {digest.hexdigest()[:12]}"


def sampled(rows: Rows) -> Iterator[Batch]:
    """Yield at most 64 single rows, spread evenly over all; of rows made while they are used, over the first made."""
    num_rows = getattr(rows, "num_first_rows", rows.num_rows)
    count = min(num_rows, SAMPLED_ROWS)
    return (rows.batch(i * num_rows // count, 1) for i in range(count))


def check_same_run(saved: Mapping[str, Any], mine: Mapping[str, Any], run: Path) -> None:
    """Raise `TrainingError`, with every difference, unless the two identities are equal."""
    differing = [
        f"  {name}: {saved.get(name, 'unknown')!r} -> {mine.get(name, 'unknown')!r}"
        for name in {**saved, **mine}
        if saved.get(name) != mine.get(name)
    ]
    if differing:
        raise TrainingError(
            f"The checkpoint in {run} belongs to another run (then -> now):\n" + "\n".join(differing) + "\n"
            "Resume with the options and the data it was started with, or choose another folder with --out."
        )


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
