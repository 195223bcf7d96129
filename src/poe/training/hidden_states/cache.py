"""Hidden states at a stage's boundary on disk: written once per row, read by every run that stands on the same.

`$POE_CACHE/hidden/BOUNDARY/ROWS.safetensors`. BOUNDARY is a hash of all that decides what a row looks like there: the
base's weights and config, the parents, the layers, the dtypes. ROWS is a hash of the token ids and positions of the
rows in a shard, so runs that share rows share shards, whatever else they are. A shard appears under its name when it is
whole. It is checked byte by byte when a run begins, and made again if anything is wrong with it; two processes that
fill one cache take the missing shards in an order of their own and find each other's work done. Any file may be deleted
at any time.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poe.data.cache import cache_root
from poe.data.packing import Batch, PackedRows
from poe.errors import OutputError
from poe.modeling.boundary import Boundary
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.placement import quantization_of
from poe.training.reporting.progress import Progress

if TYPE_CHECKING:
    from poe.cascade import Cascade

SHARD_BYTES = 1 << 26
NOTE_EVERY_S = 30.0
ABANDONED_S = 3600.0  # a shard takes seconds to write: what is unfinished for this long was left by a killed process
_LAYOUT = 1  # of a shard: raise it when what lies in one changes
_STATES = "states"


def boundary_facts(cascade: "Cascade", name: str, boundary: Boundary) -> dict[str, Any]:
    """Return, as JSON values, all that decides what a row looks like at the boundary below stage `name`."""
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


class HiddenCache:
    """The first `used` of `rows` as `boundary` sees them, stored in `dtype`; call it with rows to read their states.

    `facts` are those of `boundary_facts`; `rows_at_once` go through the base together.
    """

    def __init__(
        self,
        boundary: Boundary,
        facts: dict[str, Any],
        dtype: torch.dtype,
        rows: PackedRows,
        used: int,
        rows_at_once: int,
    ) -> None:
        facts = {**facts, "stored_in": str(dtype).removeprefix("torch.")}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache_root() / "hidden" / key
        self._facts, self._boundary, self._dtype = facts, boundary, dtype
        self._rows, self._rows_at_once = rows, rows_at_once
        self._row_shape = (boundary.states, rows.seq_len, boundary.width)
        self.row_bytes = boundary.states * rows.seq_len * boundary.width * dtype.itemsize
        # A power of two: batches of a power of two then never straddle shards.
        per_shard = 1 << (max(1, SHARD_BYTES // self.row_bytes).bit_length() - 1)
        numbers = {digest: n for n in reversed(range(used)) for digest in row_digests(rows.batch(n, 1))}
        self._numbers = sorted(numbers.values())  # of equal rows, the first
        digests = {n: digest for digest, n in numbers.items()}
        self._shards: dict[str, list[int]] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        for start in range(0, len(self._numbers), per_shard):
            members = self._numbers[start : start + per_shard]
            shard = hashlib.blake2b(b"".join(digests[n] for n in members), digest_size=16).hexdigest()
            self._shards[shard] = members
            self._places |= {digests[n]: (shard, at) for at, n in enumerate(members)}

    def path(self, shard: str) -> Path:
        """Return where a shard lies."""
        return self.folder / f"{shard}.safetensors"

    @property
    def shards(self) -> list[str]:
        """The names of the shards, in the order of the rows."""
        return list(self._shards)

    def fill(self, what: str, progress: Progress) -> None:
        """Say what is needed, then compute and write every shard that is missing or damaged.

        Raises `OutputError` before anything is computed if the disk has too little room, and when it cannot be written.
        """
        missing = [shard for shard in self._shards if not self._is_whole(shard)]
        sizes = {shard: len(self._shards[shard]) * self.row_bytes for shard in missing}
        count, (states, length, width) = len(self._numbers), self._row_shape
        progress.note(
            f"hidden states of {count:,} {what} rows: {count:,} x {states * length:,} x {width:,} numbers x "
            f"{self._dtype.itemsize} bytes = {_mib(count * self.row_bytes)} in {self.folder}, "
            f"{_mib(sum(sizes.values()))} of it to be written"
        )
        if not missing:
            return
        self._prepare_folder(sum(sizes.values()))
        random.Random().shuffle(missing)  # not the generator that a seed was given to; unlike another process's
        started, said, done = time.monotonic(), time.monotonic(), 0
        for shard in missing:
            if not self.path(shard).exists() or not self._is_whole(shard):  # another process may have been here
                self._make(shard)
            done += len(self._shards[shard])
            if time.monotonic() - said > NOTE_EVERY_S:
                said = time.monotonic()
                left = (said - started) / done * (sum(map(len, self._shards.values())) - done)
                progress.note(f"hidden states: {done:,} rows computed, at most {left / 60:.1f} min left")
        seconds = time.monotonic() - started
        progress.note(f"{done:,} {what} rows computed in {seconds:.0f} s, {done * length / seconds:,.0f} tokens/s")

    def __call__(self, batch: Batch) -> Tensor:
        """Rows of (B, T) tokens -> their states (B, K, T, D), on the batch's device in the dtype they are stored in."""
        wanted = defaultdict(list)
        for index, digest in enumerate(row_digests(batch)):
            shard, at = self._places[digest]
            wanted[shard].append((index, at))
        states = torch.empty((len(batch.input_ids), *self._row_shape), dtype=self._dtype)
        for shard, members in wanted.items():
            try:
                self._read(shard, members, states)
            except (OSError, SafetensorError):  # deleted under our feet, which a cache must bear
                self._prepare_folder(len(self._shards[shard]) * self.row_bytes)
                self._make(shard)
                self._read(shard, members, states)
        return states.to(batch.input_ids.device)

    def _read(self, shard: str, members: list[tuple[int, int]], states: Tensor) -> None:
        # Mapped for the moment only: pages that were read once do not stay counted as this process's memory.
        with safe_open(self.path(shard), framework="pt") as file:
            stored = file.get_slice(_STATES)
            for index, at in members:
                states[index] = stored[at]

    def _is_whole(self, shard: str) -> bool:
        try:
            with safe_open(self.path(shard), framework="pt") as file:  # refuses a file of the wrong length
                states = file.get_tensor(_STATES)
                expected = (len(self._shards[shard]), *self._row_shape)
                return (
                    tuple(states.shape) == expected
                    and states.dtype == self._dtype
                    and (file.metadata() or {}).get("crc32") == _checksum(states)
                )
        except (OSError, SafetensorError):
            return False

    def _make(self, shard: str) -> None:
        parts = []
        members = self._shards[shard]
        for start in range(0, len(members), self._rows_at_once):
            rows = [self._rows.batch(n, 1) for n in members[start : start + self._rows_at_once]]
            part = Batch(*(torch.cat(tensors).to(self._boundary.device) for tensors in zip(*rows, strict=True)))
            parts.append(self._boundary.below(part.input_ids, part.position_ids).to("cpu", self._dtype))
        states = torch.cat(parts)
        scratch = None
        try:
            handle, scratch = tempfile.mkstemp(prefix=f".{shard[:8]}-", suffix=".part", dir=self.folder)
            os.close(handle)
            save_file({_STATES: states}, scratch, metadata={"crc32": _checksum(states)})
            os.replace(scratch, self.path(shard))
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"Hidden states could not be written to {self.folder}: {error}. What was written stays: free some "
                "space, or name another folder with the environment variable POE_CACHE, and start again."
            ) from error
        finally:
            if scratch is not None:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)

    def _prepare_folder(self, needed: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.part"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > ABANDONED_S:
                        path.unlink()
            free = shutil.disk_usage(self.folder).free
            if needed + needed // 10 > free:  # a tenth for the rest of the run
                raise OutputError(
                    f"Not enough disk for hidden states in {self.folder}: {_mib(needed)} and a tenth to spare are "
                    f"needed, {_mib(free)} are free. Free some space, name another folder with the environment "
                    "variable POE_CACHE, train on fewer rows, or leave cache_hidden out."
                )
            about = self.folder / "about.json"
            if not about.exists():
                about.write_text(json.dumps(self._facts, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"Hidden states cannot be written to {self.folder}: {error}.") from error


def row_digests(batch: Batch) -> list[bytes]:
    """A name for every row of a batch: a hash of its token ids and positions."""
    content = torch.stack([batch.input_ids, batch.position_ids], dim=1).cpu().numpy()  # (B, 2, T)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in content]


def _checksum(states: Tensor) -> str:
    return f"{zlib.crc32(states.contiguous().view(torch.uint8).numpy().data):08x}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
