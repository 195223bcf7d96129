"""The identity of a run: a checkpoint is continued only by a run with the same identity."""

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
# Fields that do not change the result of a run, and those that a run that ran out of memory must change to continue:
# they change the rounding of sums at most.
IGNORED_FIELDS = (
    *("description", "checkpoint_every", "keep_checkpoints", "track"),
    *("max_tokens_per_batch", "checkpoint_activations"),
)


def run_identity(
    plan: Plan,
    num_steps: int,
    rows: Mapping[str, Rows | None],
    parameters: Iterable[tuple[str, nn.Parameter]],
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """Return everything that decides the result of a run, as JSON values by name.

    `rows` are the training and validation rows by name. `facts` are added as they are, for example the fingerprint of
    the base.
    """
    shapes = json.dumps([[name, list(p.shape), str(p.dtype)] for name, p in parameters])
    fields = {name: value for name, value in plan.as_dict().items() if name not in IGNORED_FIELDS}
    data = {f"{use} rows": rows_fingerprint(source) for use, source in rows.items() if source is not None}
    identity = {**fields, "steps": num_steps, **data, "trained tensors": _short_hash(shapes.encode()), **facts}
    return dict(json.loads(json.dumps(identity)))  # tuples become lists, as in a checkpoint


def rows_fingerprint(rows: Rows) -> str:
    """Return the number of rows, and a hash of it and of sampled rows."""
    digest = hashlib.sha256(str(rows.num_rows).encode())
    for batch in sample_rows(rows):
        for tensor in batch:
            digest.update(tensor.numpy().tobytes())
    return f"{rows.num_rows:,} rows, {digest.hexdigest()[:12]}"


def sample_rows(rows: Rows) -> Iterator[Batch]:
    """Yield at most 64 single rows, spread evenly; of streamed rows, from the first chunk."""
    num_rows = getattr(rows, "num_first_rows", rows.num_rows)
    count = min(num_rows, SAMPLED_ROWS)
    return (rows.batch(i * num_rows // count, 1) for i in range(count))


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], run: Path) -> None:
    """Raise `TrainingError`, with every difference, unless the identities of a checkpoint and of this run are equal."""
    differences = [
        f"  {name}: {saved.get(name, 'unknown')!r} -> {current.get(name, 'unknown')!r}"
        for name in {**saved, **current}
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise TrainingError(
            f"The checkpoint in {run} belongs to another run (then -> now):\n" + "\n".join(differences) + "\n"
            "Resume with the options and the data it was started with, or choose another folder with --out."
        )


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
