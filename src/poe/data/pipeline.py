"""From a `--data` SPEC to packed rows: read, de-duplicate, split, render, pack, and account for every row."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from poe.data.conversation import Conversation
from poe.data.drops import DropReport, Unfaithful
from poe.data.packing import PackedRows, pack
from poe.data.readers import READERS, demo, load_conversations
from poe.data.render import Renderer
from poe.data.split import deduplicate, split
from poe.errors import DataError, TemplateError

MAX_VALIDATION_CONVERSATIONS = 512  # a measure of bits per byte need not read more


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
    eval_rows: int = 200,
    seed: int = 0,
    report: DropReport | None = None,
) -> TrainingData:
    """Read `spec` and pack it into rows of `seq_len` tokens.

    `epochs` are the passes per reader where the SPEC does not say; `held_out` the share of queries kept for validation;
    `eval_rows` how many conversations of each held-out split are kept to be answered. A conversation that is too long
    or cannot be rendered is dropped and counted in `report`. Raises `DataError` when nothing is left to train on, or
    `TemplateError` when the chat template cannot show the assistant's tokens in any row.
    """
    report = report or DropReport()
    loaded = load_conversations(spec, report)
    seen: set[bytes] = set()
    train_documents: list[tuple[list[int], list[bool]]] = []
    val_conversations: list[Conversation] = []
    sources: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[Conversation]] = {}
    for part in loaded:
        source = part.source
        unique = deduplicate(part.conversations, report, seen)
        training, kept_out = split(unique, held_out, seed)
        documents = _render_all(training, renderer, seq_len, report)
        passes = source.epochs if source.epochs is not None else (epochs or {}).get(source.name, 1)
        train_documents += _repeat(documents, passes * source.weight, seed)
        val_conversations += kept_out
        sources[str(source)] = {
            "reader": source.name,
            "hub_id": READERS[source.name].hub_id if source.path is None else None,
            "licence": READERS[source.name].licence,
            "conversations": len(training),
            "held_out": len(kept_out),
            "epochs": passes,
            "weight": source.weight,
            "documents": len(documents),
            "tokens": sum(len(ids) for ids, _ in documents),
        }
        if source.name == demo.NAME:
            splits |= demo.evaluation_splits(eval_rows)
        elif kept_out:
            splits.setdefault(f"held-out {source.name}", []).extend(kept_out)
    if not train_documents:
        raise DataError(f"No row of {spec!r} can be trained on; dropped: {_reasons(report)}.")
    val_documents = _render_all(
        _sample(val_conversations, MAX_VALIDATION_CONVERSATIONS, seed), renderer, seq_len, DropReport()
    )
    if not val_documents:
        raise DataError(
            f"No row of {spec!r} is held out for validation ({len(train_documents)} to train on): "
            "give more rows, or a larger held_out share."
        )
    pad = renderer.tokenizer.pad_token_id or 0
    train = pack(train_documents, seq_len, seed=seed, pad_id=pad)
    val = pack(val_documents, seq_len, seed=seed, pad_id=pad)
    splits = {name: _sample(conversations, eval_rows, seed) for name, conversations in splits.items()}
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
    }
    return TrainingData(train, val, splits, summary)


def _render_all(
    conversations: Iterable[Conversation], renderer: Renderer, seq_len: int, report: DropReport
) -> list[tuple[list[int], list[bool]]]:
    """Render to (ids, loss mask); what is too long, untrained or refused by the template is dropped and counted."""
    documents: list[tuple[list[int], list[bool]]] = []
    failure: TemplateError | None = None
    rendered = False
    for conversation in conversations:
        row = {"messages": conversation.messages, "tools": conversation.tools}

        def drop(reason: str, conversation: Conversation = conversation, row: dict[str, Any] = row) -> None:
            report.drop(conversation.source, reason, row, conversation.id)
            report.kept[conversation.source] -= 1

        try:
            parts = renderer.render_all(conversation)
        except Unfaithful as error:
            drop(error.reason)
            continue
        except DataError:
            drop("the chat template refuses it")
            continue
        except TemplateError as error:
            failure = failure or error
            drop("the chat template hides the assistant's tokens")
            continue
        rendered = True
        if any(len(part.input_ids) > seq_len for part in parts):
            drop(f"longer than {seq_len} tokens")
        elif not any(any(part.loss_mask) for part in parts):
            drop("nothing of the assistant's to train on")
        else:
            documents += [(part.input_ids, part.loss_mask) for part in parts]
    if failure is not None and not rendered:
        raise failure
    return documents


def _repeat(documents: list[Any], times: float, seed: int) -> list[Any]:
    """`documents`, `times` over; of a broken pass, a random part."""
    whole = int(times)
    rest = round((times - whole) * len(documents))
    return documents * whole + random.Random(seed).sample(documents, rest)


def _sample(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    return conversations if len(conversations) <= count else random.Random(seed).sample(conversations, count)


def _reasons(report: DropReport) -> str:
    counts = [f"{reason} ({n})" for reasons in report.dropped.values() for reason, n in reasons.most_common(3)]
    return ", ".join(counts) or "nothing, there were no rows"
