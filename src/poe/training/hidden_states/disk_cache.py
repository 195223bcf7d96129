"""A cache on disk of the hidden states at a stage's boundary, for every run on the same base and rows.

A shard is a folder `$POE_CACHE/hidden/BOUNDARY/ROWS` (see `poe.data.cache`) with one file, ROWS.safetensors. BOUNDARY
is a hash of everything that decides the states of a row: the base's weights and config, the parents, the layers, the
dtypes. ROWS is a hash of the token ids and positions of the rows in the shard, so runs that share rows share shards.
Two processes that fill one cache compute the missing shards in different orders and skip those that the other has
finished.
"""

import hashlib
import json
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poe.cascade import Cascade
from poe.data.cache import cache_root, cached_folder, is_cached, make_private_folder
from poe.data.packing import Batch, PackedRows
from poe.errors import OutputError
from poe.files.output import write_file
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.placement import quantization_of
from poe.training.reporting.progress import Progress

SHARD_BYTES = 1 << 26
PROGRESS_INTERVAL_S = 30.0
_LAYOUT = 2  # version of the content of a shard; increase it when that changes
_STATES = "states"


class RowReader(Protocol):
    """What the layers below a stage leave of rows, as `states` vectors of `width` numbers a token; see `Boundary`."""

    states: int
    width: int
    layers: list[Any]
    device: torch.device

    def below(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return (B, states, T, width) for token ids and positions (B, T), without a graph."""


def boundary_facts(cascade: Cascade, name: str, boundary: RowReader) -> dict[str, Any]:
    """Return, as JSON values, everything that decides the states of a row at the boundary below stage `name`."""
    base, stage = cascade.base, cascade.stages[name]
    config = {k: v for k, v in base.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "layout": _LAYOUT,
        "base": cascade.base_source.fingerprint,
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "quantized_by": quantization_of(base),
        "attention": base.config._attn_implementation,
        "computed_in": str(base.dtype).removeprefix("torch."),
        "parents": [fingerprint_tensors(parent.layers.state_dict()) for parent in stage.chain[:-1]],
        "layers_below": stage.below,
        "outputs_of_layers": boundary.layers,
        "transformers": transformers.__version__,
    }


class DiskCache:
    """The states at `boundary` of the first `used_rows` of `rows`, stored in `dtype`. Call it with rows to read them.

    `facts` are the result of `boundary_facts`. The base computes `rows_per_pass` rows in one forward pass.
    """

    def __init__(
        self,
        boundary: RowReader,
        facts: dict[str, Any],
        dtype: torch.dtype,
        rows: PackedRows,
        used_rows: int,
        rows_per_pass: int,
    ) -> None:
        facts = {**facts, "stored_in": str(dtype).removeprefix("torch.")}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self._kind = f"hidden/{key}"
        self.folder = cache_root() / self._kind
        self._facts, self._boundary, self._dtype = facts, boundary, dtype
        self._rows, self._rows_per_pass = rows, rows_per_pass
        self._row_shape = (boundary.states, rows.seq_len, boundary.width)
        self.row_bytes = boundary.states * rows.seq_len * boundary.width * dtype.itemsize
        # A power of two: batches of a power of two rows then lie in one shard.
        per_shard = 1 << (max(1, SHARD_BYTES // self.row_bytes).bit_length() - 1)
        numbers = {digest: n for n in reversed(range(used_rows)) for digest in row_digests(rows.batch(n, 1))}
        self._numbers = sorted(numbers.values())  # of equal rows only the first is stored
        digests = {n: digest for digest, n in numbers.items()}
        self._shards: dict[str, list[int]] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        for start in range(0, len(self._numbers), per_shard):
            members = self._numbers[start : start + per_shard]
            shard = hashlib.blake2b(b"".join(digests[n] for n in members), digest_size=16).hexdigest()
            self._shards[shard] = members
            self._places |= {digests[n]: (shard, at) for at, n in enumerate(members)}

    def path(self, shard: str) -> Path:
        """Return the file of a shard."""
        return self.folder / shard / f"{shard}.safetensors"

    @property
    def shards(self) -> list[str]:
        """The names of the shards, in the order of the rows."""
        return list(self._shards)

    def fill(self, use: str, progress: Progress) -> None:
        """Report the sizes, then compute and write every shard that is missing or damaged. `use` names the rows.

        Raises `OutputError` before anything is computed if the disk has too little space, and when a write fails.
        """
        missing = [shard for shard in self._shards if not is_cached(self._kind, shard)]
        sizes = {shard: len(self._shards[shard]) * self.row_bytes for shard in missing}
        count, (states, length, width) = len(self._numbers), self._row_shape
        progress.note(
            f"hidden states of {count:,} {use} rows: {count:,} x {states * length:,} x {width:,} numbers x "
            f"{self._dtype.itemsize} bytes = {_mib(count * self.row_bytes)} in {self.folder}, "
            f"{_mib(sum(sizes.values()))} of it to be written"
        )
        if not missing:
            return
        self._prepare_folder(sum(sizes.values()))
        # An unseeded generator gives every process its own order, and does not change the generator of the run.
        random.Random().shuffle(missing)
        started = last_note = time.monotonic()
        done = 0
        for shard in missing:
            self._write_shard(shard)
            done += len(self._shards[shard])
            if time.monotonic() - last_note > PROGRESS_INTERVAL_S:
                last_note = time.monotonic()
                left = (last_note - started) / done * (sum(map(len, self._shards.values())) - done)
                progress.note(f"hidden states: {done:,} rows computed, at most {left / 60:.1f} min left")
        seconds = time.monotonic() - started
        progress.note(f"{done:,} {use} rows computed in {seconds:.0f} s, {done * length / seconds:,.0f} tokens/s")

    def __call__(self, batch: Batch) -> Tensor:
        """Return the states (B, K, T, D) of rows of (B, T) tokens, on the batch's device in the stored dtype."""
        places = defaultdict(list)
        for index, digest in enumerate(row_digests(batch)):
            shard, at = self._places[digest]
            places[shard].append((index, at))
        states = torch.empty((len(batch.input_ids), *self._row_shape), dtype=self._dtype)
        for shard, members in places.items():
            try:
                self._read(shard, members, states)
            except (OSError, SafetensorError):  # the file was deleted during the run
                self._prepare_folder(len(self._shards[shard]) * self.row_bytes)
                self._write_shard(shard)
                self._read(shard, members, states)
        return states.to(batch.input_ids.device)

    def _read(self, shard: str, members: list[tuple[int, int]], states: Tensor) -> None:
        # The file is mapped only while it is read, so its pages do not count as memory of this process.
        with safe_open(self.path(shard), framework="pt") as file:
            stored = file.get_slice(_STATES)
            for index, at in members:
                states[index] = stored[at]

    def _write_shard(self, shard: str) -> None:
        """Compute and write a shard, unless another process has written it."""

        def make(folder: Path) -> dict[str, Any]:
            save_file({_STATES: self._compute(self._shards[shard])}, folder / f"{shard}.safetensors")
            return {}

        cached_folder(self._kind, shard, make)

    def _compute(self, members: list[int]) -> Tensor:
        """Return the states of rows by their numbers, in the stored dtype."""
        parts = []
        for start in range(0, len(members), self._rows_per_pass):
            rows = [self._rows.batch(n, 1) for n in members[start : start + self._rows_per_pass]]
            part = Batch(*(torch.cat(tensors).to(self._boundary.device) for tensors in zip(*rows, strict=True)))
            parts.append(self._boundary.below(part.input_ids, part.position_ids).to("cpu", self._dtype))
        return torch.cat(parts)

    def _prepare_folder(self, needed: int) -> None:
        """Make the folder of the shards. Raises `OutputError` unless it has room for `needed` bytes."""
        make_private_folder(self._kind)
        free = shutil.disk_usage(self.folder).free
        if needed + needed // 10 > free:  # a tenth is left for the rest of the run
            raise OutputError(
                f"Not enough disk for hidden states in {self.folder}: {_mib(needed)} and a tenth more are "
                f"needed, {_mib(free)} are free. Free some space, set another folder with the environment "
                "variable POE_CACHE, train on fewer rows, or turn cache_hidden off."
            )
        if not (self.folder / "about.json").exists():
            write_file(self.folder / "about.json", json.dumps(self._facts, indent=2) + "\n")


def row_digests(batch: Batch) -> list[bytes]:
    """Return a hash of the token ids and positions of every row."""
    content = torch.stack([batch.input_ids, batch.position_ids], dim=1).cpu().numpy()  # (B, 2, T)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in content]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
