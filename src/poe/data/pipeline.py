"""From a `--data` SPEC to packed rows: read, divide, render, pack, and account for every row.

Rows go through on disk (corpus.py), are rendered by several processes in an order that `seed` alone decides, and are
packed into files that training maps into memory. What stays in memory is under a kilobyte a row: where it lies,
and the digests and MinHash values it is compared by.
"""

import hashlib
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.augment import ToolPool
from poe.data.cache import fingerprint, made_once
from poe.data.corpus import DROPPED, EVALUATION, HELD_OUT, TRAIN, Corpus, read_corpus
from poe.data.drops import DropReport
from poe.data.packing import PackedRows, pack_to, packed_rows
from poe.data.readers import READERS, demo
from poe.data.render import Renderer
from poe.data.rendering import RenderRows, Tally
from poe.data.workers import default_workers, ordered_map
from poe.errors import DataError, TemplateError
from poe.stages.augmentation import Augmentation

MAX_VALIDATION_CONVERSATIONS = 512  # a measure of bits per byte need not read more
CHUNK = 128  # rows that a process renders at a time
FEW = 2000  # rows for which starting processes takes longer than it saves


@dataclass
class TrainingData:
    """Packed rows for training and validation, held-out conversations to answer, and what became of every row."""

    train: PackedRows
    val: PackedRows
    held_out: dict[str, list[Conversation]]  # name of a split -> questions with their right answers
    summary: dict[str, Any] = field(default_factory=dict)


def prepare(
    spec: str,
    renderer: Renderer,
    *,
    seq_len: int,
    epochs: dict[str, int] | None = None,
    held_out: float = 0.02,
    near_duplicates: float | None = None,
    evaluation: str = "",
    augmentation: Augmentation | None = None,
    isolated: bool = True,
    eval_rows: int = 200,
    seed: int = 0,
    report: DropReport | None = None,
    workers: int | None = None,
) -> TrainingData:
    """Read `spec` and pack it into rows of `seq_len` tokens.

    `epochs` are the passes per reader where the SPEC does not say; `held_out`, `near_duplicates` and `evaluation` are
    those of `read_corpus`. Training rows, and no others, go through `augmentation`, in every pass anew; where the
    result cannot be used (too long, say) the row is taken as it is. `isolated`: packed documents do not see each other.
    `eval_rows` is how many conversations of each held-out split are kept to be answered. A conversation that is too
    long or cannot be rendered is dropped and counted in `report`. `workers` processes render (default:
    `default_workers()`; few rows are rendered here); their number does not change the result. Raises `DataError` when
    nothing is left to train on, `TemplateError` when the template cannot show the assistant's tokens in any row.
    """
    report = DropReport() if report is None else report
    corpus = read_corpus(spec, report, held_out=held_out, near=near_duplicates, evaluation=evaluation, seed=seed)
    own = list(range(len(corpus.sources) - corpus.asked))
    passes = {
        n: source.epochs if source.epochs is not None else (epochs or {}).get(source.name, 1)
        for n, source in enumerate(corpus.sources)
    }
    items = _shuffled(corpus, {n: passes[n] * corpus.sources[n].weight for n in own}, seed)
    options = augmentation or Augmentation()
    items_digest = hashlib.sha256(items.tobytes()).hexdigest()
    key = fingerprint("packed", corpus.key, renderer.fingerprint(), seq_len, seed, items_digest, asdict(options))

    def make(folder: Path) -> dict[str, Any]:
        mine = DropReport(folder / DROPPED)
        try:
            work = RenderRows(corpus.folder, renderer, seq_len, options, _pool(corpus, options), seed)
            return _pack(folder, items, work, corpus, mine, workers or default_workers())
        except (DataError, TemplateError):
            mine.close()
            report.absorb(mine.as_dict(), folder / DROPPED)
            raise
        finally:
            mine.close()

    folder, said = made_once("packed", key, make)
    report.absorb(said["dropped"], folder / DROPPED)
    if not said["packed"]:
        raise DataError(f"No row of {spec!r} can be trained on; dropped: {_reasons(report)}.")
    if not said["validation"]:
        raise DataError(
            f"No row of {spec!r} is held out for validation ({said['packed']} packed rows to train on): "
            "give more rows, or a larger validation_ratio."
        )
    train, val = packed_rows(folder / "train", seed, isolated), packed_rows(folder / "val", seed)
    sources = {}
    for n in own:
        source = corpus.sources[n]
        sources[str(source)] = {
            "reader": source.name,
            "hub_id": READERS[source.name].hub_id if source.path is None else None,
            "license": READERS[source.name].license,
            "conversations": len(corpus.numbers(n, TRAIN)),
            "held_out": len(corpus.numbers(n, HELD_OUT)),
            "epochs": passes[n],
            "weight": source.weight,
            **said["sources"][n],
        }
    summary = {
        "spec": spec,
        "sources": sources,
        "rows": report.as_dict(),
        "packed_rows": train.num_rows,
        "seq_len": seq_len,
        "fill": round(train.fill, 4),
        "tokens": train.stats.tokens,
        "trained_tokens": train.trained_tokens,
        "validation_rows": val.num_rows,
        "augmentation": asdict(options),
        "augmented_rows_left_plain": said["left_plain"],
    }
    return TrainingData(train, val, _splits(corpus, own, eval_rows, seed), summary)


def _shuffled(corpus: Corpus, times: dict[int, float], seed: int) -> np.ndarray:
    """Every training row as often as its source counts, as (row, epoch), int64 (M, 2), in an order of `seed`.

    Of a broken pass, a random part.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for number, count in times.items():
        rows = corpus.numbers(number, TRAIN)
        for epoch in range(int(count)):
            parts.append(np.stack([rows, np.full_like(rows, epoch)], axis=1))
        rest = rng.choice(rows, round((count - int(count)) * len(rows)), replace=False)
        parts.append(np.stack([rest, np.full_like(rest, int(count))], axis=1))
    items = np.concatenate(parts)
    return items[rng.permutation(len(items))]


def _pack(
    folder: Path,
    items: np.ndarray,
    work: RenderRows,
    corpus: Corpus,
    report: DropReport,
    workers: int,
) -> dict[str, Any]:
    """Render and pack the training items, and a sample of the held-out rows, into `folder`."""
    tally = Tally(corpus, report)
    seed, seq_len = work.seed, work.seq_len
    options: dict[str, Any] = {"seed": seed, "pad_id": work.renderer.tokenizer.pad_token_id or 0}
    chunks = (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
    results = ordered_map(work, chunks, 1 if len(items) < FEW else workers)
    train = pack_to(folder / "train", tally.documents(results), seq_len, **options)
    if not train.rows:
        tally.raise_if_hidden()
    held = np.flatnonzero(corpus.side == HELD_OUT)
    if len(held) > MAX_VALIDATION_CONVERSATIONS:
        held = np.sort(np.random.default_rng(seed).choice(held, MAX_VALIDATION_CONVERSATIONS, replace=False))
    plainly = RenderRows(corpus.folder, work.renderer, seq_len)
    documents = (d for one in plainly(np.stack([held, np.zeros_like(held)], axis=1)) for d in one.documents)
    val = pack_to(folder / "val", documents, seq_len, **options)
    return {
        "sources": tally.sources,
        "dropped": report.as_dict(),
        "left_plain": dict(tally.left_plain),
        "packed": train.rows,
        "validation": val.rows,
    }


def _pool(corpus: Corpus, options: Augmentation) -> ToolPool | None:
    """The tools of the training rows, where an augmentation draws from them."""
    if not options.draws_tools:
        return None
    return ToolPool.from_conversations(corpus.rows[i] for i in np.flatnonzero(corpus.side == TRAIN).tolist())


def _splits(corpus: Corpus, own: list[int], eval_rows: int, seed: int) -> dict[str, list[Conversation]]:
    """The questions to be asked after training, at most `eval_rows` of each split."""
    numbers: dict[str, list[int]] = {}
    splits: dict[str, list[Conversation]] = {}
    for n, source in enumerate(corpus.sources):
        if n in own and source.name == demo.NAME:
            splits |= demo.evaluation_splits(eval_rows)
        elif n in own:
            numbers.setdefault(f"held-out {source.name}", []).extend(corpus.numbers(n, HELD_OUT).tolist())
        else:
            numbers[str(source)] = corpus.numbers(n, EVALUATION).tolist()
    for name, rows in numbers.items():
        if rows:
            splits[name] = [corpus.rows[i] for i in _sample(rows, eval_rows, seed)]
    return splits


def _sample(rows: list[int], count: int, seed: int) -> list[int]:
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)


def _reasons(report: DropReport) -> str:
    counts = [f"{reason} ({n})" for reasons in report.dropped.values() for reason, n in reasons.most_common(3)]
    return ", ".join(counts) or "nothing, there were no rows"
