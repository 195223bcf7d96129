"""Prepare the data of a run: read the rows, split them, render them, pack them, and account for every row.

`corpus.py` keeps the rows on disk. Several processes render them, in an order that depends only on the seed. Training
maps the packed files into memory. Less than a kilobyte per row stays in memory: its position on disk, and the hashes
and MinHash values that compare it with other rows.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.augment import ToolPool
from poe.data.cache import cached_folder, fingerprint
from poe.data.corpus import DROPPED_FILE, EVALUATION, HELD_OUT, TRAIN, Corpus, read_corpus
from poe.data.drops import DropReport
from poe.data.packing import PackedRows, open_packed_rows, pack_to_folder
from poe.data.readers import READERS, demo
from poe.data.render import Renderer
from poe.data.render_worker import RenderTally, RenderWorker, find_refusal
from poe.data.sizes import DataSize, choose_seq_len, longest_row, resolve_sizes
from poe.data.spool import spool_documents
from poe.data.workers import default_workers, ordered_map
from poe.errors import DataError, TemplateError
from poe.stages.augmentation import Augmentation
from poe.stages.recipe import Recipe

MAX_VALIDATION_CONVERSATIONS = 512  # enough to measure bits per byte
ROWS_PER_TASK = 128  # rows that a process renders at a time
MIN_ROWS_FOR_WORKERS = 2000  # with fewer rows, starting processes takes longer than it saves


@dataclass
class TrainingData:
    """Packed rows for training and validation, held-out conversations to answer, and a summary of all rows.

    `recipe` is the recipe of the run, with a number for every size.
    """

    train: PackedRows
    val: PackedRows
    held_out: dict[str, list[Conversation]]  # name of a split -> conversations with the expected answers
    recipe: Recipe
    size: DataSize
    summary: dict[str, Any] = field(default_factory=dict)


def prepare(
    recipe: Recipe,
    renderer: Renderer,
    report: DropReport | None = None,
    workers: int | None = None,
    *,
    max_positions: int | None = None,
    num_processes: int = 1,
) -> TrainingData:
    """Read `recipe.data` and pack it into rows, as the recipe's data options say.

    Only training rows are augmented, differently in every epoch. If the augmented row cannot be used (it is too long,
    for example), the original row is used. A conversation that is too long or cannot be rendered is dropped and counted
    in `report`. `workers` is the number of rendering processes (default: `default_workers()`); it does not change the
    result, and a small set is rendered in this process. Sizes that the recipe leaves to the data are chosen for a base
    with `max_positions` positions and for `num_processes` processes (sizes.py).

    Raises `DataError` when no training row or no validation row is left, and `TemplateError` when the chat template
    does not show the assistant's tokens in any row.
    """
    report = DropReport() if report is None else report
    corpus = read_corpus(recipe, report)
    train_sources = range(len(corpus.sources) - corpus.num_evaluation_sources)
    epochs = {}
    for n in train_sources:
        source = corpus.sources[n]
        epochs[n] = source.epochs if source.epochs is not None else recipe.epochs.get(source.name, 1)
    items = _shuffled_items(corpus, {n: epochs[n] * corpus.sources[n].weight for n in train_sources}, recipe.seed)
    items_hash = hashlib.sha256(items.tobytes()).hexdigest()
    lengths = (str(recipe.seq_len), str(recipe.tokens_per_step), max_positions)
    options = (*lengths, recipe.seed, items_hash, asdict(recipe.augment))
    key = fingerprint("packed", corpus.key, renderer.fingerprint(), *options)

    def pack(folder: Path) -> dict[str, Any]:
        folder_report = DropReport(folder / DROPPED_FILE)
        try:
            pool = _tool_pool(corpus, recipe.augment)
            longest = longest_row(recipe, max_positions)
            worker = RenderWorker(corpus.folder, renderer, longest, recipe.augment, pool, recipe.seed)
            fit = partial(choose_seq_len, recipe, max_positions=max_positions)
            return _pack(folder, items, worker, fit, corpus, folder_report, workers or default_workers())
        except (DataError, TemplateError):
            folder_report.close()
            report.add(folder_report.as_dict(), folder / DROPPED_FILE)
            raise
        finally:
            folder_report.close()

    folder, counts = cached_folder("packed", key, pack)
    report.add(counts["dropped"], folder / DROPPED_FILE)
    size = DataSize(
        conversations=int((corpus.side == TRAIN).sum()),
        held_out=int((corpus.side == HELD_OUT).sum()),
        packed_rows=counts["packed"],
        passes=len(items) / max(1, len(np.unique(items[:, 0]))),
        chosen_passes=any(corpus.sources[n].epochs or corpus.sources[n].name in recipe.epochs for n in train_sources),
    )
    if not counts["packed"]:
        raise DataError(f"No row of {recipe.data!r} can be trained on; dropped: {_drop_reasons(report)}.")
    if not counts["validation"]:
        raise DataError(
            f"No row of {recipe.data!r} is held out for validation ({counts['packed']} packed rows to train on; "
            f"dropped: {_drop_reasons(report)}): give more rows, or a larger validation_ratio."
        )
    train = open_packed_rows(folder / "train", recipe.seed, recipe.isolate_documents)
    val = open_packed_rows(folder / "val", recipe.seed)
    for rows, name in ((train, "train"), (val, "validate")):
        if not rows.trained_tokens:
            raise DataError(
                f"The rows of {recipe.data!r} have no token to {name} on: their {rows.stats.tokens} tokens are all "
                "context. Check the tokenizer and the chat template with `poe data show`."
            )
    splits = _held_out_splits(corpus, train_sources, recipe, set(counts["dropped_held_out"]), renderer, report)
    resolved = resolve_sizes(recipe, train.seq_len, corpus.validation_ratio, size, num_processes)
    sources = {}
    for n in train_sources:
        source = corpus.sources[n]
        sources[str(source)] = {
            "reader": source.name,
            "hub_id": READERS[source.name].hub_id if source.path is None else None,
            "license": READERS[source.name].license,
            "conversations": len(corpus.row_numbers(n, TRAIN)),
            "held_out": len(corpus.row_numbers(n, HELD_OUT)),
            "epochs": epochs[n],
            "weight": source.weight,
            **counts["sources"][n],
        }
    summary = {
        "spec": recipe.data,
        "sources": sources,
        "rows": report.as_dict(),
        "packed_rows": train.num_rows,
        "seq_len": train.seq_len,
        "fill": round(train.fill, 4),
        "tokens": train.stats.tokens,
        "trained_tokens": train.trained_tokens,
        "validation_rows": val.num_rows,
        "augmentation": asdict(recipe.augment),
        "augmented_rows_left_plain": counts["left_plain"],
    }
    return TrainingData(train, val, splits, resolved, size, summary)


def _shuffled_items(corpus: Corpus, passes: dict[int, float], seed: int) -> np.ndarray:
    """Return (row, epoch) pairs, int64 (M, 2), in random order, with each source's training rows `passes` times.

    A fractional pass contains a random sample of the rows.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for source, count in passes.items():
        rows = corpus.row_numbers(source, TRAIN)
        for epoch in range(int(count)):
            parts.append(np.stack([rows, np.full_like(rows, epoch)], axis=1))
        sample = rng.choice(rows, round((count - int(count)) * len(rows)), replace=False)
        parts.append(np.stack([sample, np.full_like(sample, int(count))], axis=1))
    items = np.concatenate(parts)
    return items[rng.permutation(len(items))]


def _pack(
    folder: Path,
    items: np.ndarray,
    worker: RenderWorker,
    choose_length: Callable[[int], int],
    corpus: Corpus,
    report: DropReport,
    workers: int,
) -> dict[str, Any]:
    """Render and pack the training items and a sample of the held-out rows into `folder`.

    `choose_length` gets the length of the longest document, and returns that of the packed rows.
    """
    tally, seed = RenderTally(corpus, report), worker.seed
    held_out = np.flatnonzero(corpus.side == HELD_OUT)
    if len(held_out) > MAX_VALIDATION_CONVERSATIONS:
        rng = np.random.default_rng(seed)
        held_out = np.sort(rng.choice(held_out, MAX_VALIDATION_CONVERSATIONS, replace=False))
    plain_worker = RenderWorker(corpus.folder, worker.renderer, worker.seq_len)
    rendered = plain_worker(np.stack([held_out, np.zeros_like(held_out)], axis=1))
    to_validate = [document for row in rendered for document in row.documents]
    tasks = (items[i : i + ROWS_PER_TASK] for i in range(0, len(items), ROWS_PER_TASK))
    results = ordered_map(worker, tasks, 1 if len(items) < MIN_ROWS_FOR_WORKERS else workers)
    with spool_documents(folder / "documents", tally.count(results)) as to_train:
        seq_len = choose_length(max(to_train.longest, *(len(ids) for ids, _ in to_validate), 0))
        options: dict[str, Any] = {"seed": seed, "pad_id": worker.renderer.tokenizer.pad_token_id or 0}
        train = pack_to_folder(folder / "train", to_train, seq_len, **options)
    if not train.rows:
        tally.raise_if_hidden()
    for item in rendered:
        if item.dropped is not None:
            tally.drop(item.row, item.dropped)
    val = pack_to_folder(folder / "val", to_validate, seq_len, **options)
    return {
        "sources": tally.sources,
        "dropped_held_out": [row for row in sorted(tally.dropped) if corpus.side[row] == HELD_OUT],
        "dropped": report.as_dict(),
        "left_plain": dict(tally.left_plain),
        "packed": train.rows,
        "validation": val.rows,
    }


def _tool_pool(corpus: Corpus, options: Augmentation) -> ToolPool | None:
    """Return the tools of all training rows if an augmentation draws from them."""
    if not options.draws_tools:
        return None
    return ToolPool.from_conversations(corpus.rows[i] for i in np.flatnonzero(corpus.side == TRAIN).tolist())


def _held_out_splits(
    corpus: Corpus, train_sources: range, recipe: Recipe, dropped: set[int], renderer: Renderer, report: DropReport
) -> dict[str, list[Conversation]]:
    """Return the conversations to answer after training, at most `recipe.eval_rows` per split.

    A question that cannot be rendered is dropped and counted in `report`. `dropped` are rows that were dropped before.
    """
    numbers: dict[str, list[int]] = {}
    splits: dict[str, list[Conversation]] = {}
    for n, source in enumerate(corpus.sources):
        if n in train_sources and source.name == demo.NAME:
            splits |= demo.evaluation_splits(recipe.eval_rows)
        elif n in train_sources:
            rows = corpus.row_numbers(n, HELD_OUT).tolist()
            numbers.setdefault(f"held-out {source.name}", []).extend(rows)
        else:
            numbers[str(source)] = corpus.row_numbers(n, EVALUATION).tolist()
    for name, rows in numbers.items():
        left = [row for row in rows if row not in dropped]
        splits[name] = [corpus.rows[i] for i in _sample(left, recipe.eval_rows, recipe.seed)]
    for name, asked in splits.items():
        refused = [(row, reason) for row in asked if (reason := find_refusal(row, renderer))]
        for row, reason in refused:
            if name not in numbers:  # generated here, so it was not counted yet
                report.read[row.source] += 1
                report.kept[row.source] += 1
            report.drop_kept(row, reason)
            asked.remove(row)
    return {name: asked for name, asked in splits.items() if asked}


def _sample(rows: list[int], count: int, seed: int) -> list[int]:
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)


def _drop_reasons(report: DropReport) -> str:
    counts = [f"{reason} ({n})" for reasons in report.dropped.values() for reason, n in reasons.most_common(3)]
    return ", ".join(counts) or "nothing, there were no rows"
