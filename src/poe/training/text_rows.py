"""The training rows of a base: the texts of its recipe, tokenized and packed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Text
from poe.data.drops import DropReport
from poe.data.encoding import TextEncoder
from poe.data.packing import Batch, Document, PackedRows, pack
from poe.data.streamed import StreamedRows
from poe.data.text import documents, is_generated
from poe.demo.conversations import make_conversation
from poe.demo.tokenizer import COPYING, PROSE, train_tokenizer
from poe.demo.words import NOUNS
from poe.stages.recipe import BaseRecipe

TOKENIZER_CHARACTERS = 20_000_000
VALIDATION_ROWS = 48
EASY_SHARE = 0.1  # share of the steps at the start, in which the demo world trains copying and looking up
DOCUMENTS_PER_CALL = 256  # of the tokenizer, whose result takes thirty times the memory of the arrays


@dataclass
class ConcatenatedRows:
    """The rows of `first`, followed by those of `second`."""

    first: PackedRows
    second: PackedRows

    @property
    def num_rows(self) -> int:
        return self.first.num_rows + self.second.num_rows

    def batch(self, step: int, rows_per_step: int) -> Batch:
        first_steps = self.first.num_rows // rows_per_step
        if step < first_steps:
            return self.first.batch(step, rows_per_step)
        return self.second.batch(step - first_steps, rows_per_step)


def make_tokenizer(recipe: BaseRecipe) -> Any:
    """Train the tokenizer of a base on the texts of its recipe."""
    pieces = COPYING if is_generated(recipe.data) else PROSE
    return train_tokenizer(_tokenizer_texts(recipe), recipe.vocab_size, pieces)


def _tokenizer_texts(recipe: BaseRecipe) -> Iterator[str]:
    """Yield texts for the tokenizer: the data, and of the demo world also its nouns and calls, to keep them short."""
    num_characters = 0
    for document in islice(documents(recipe.data, seed=recipe.seed), 12_000):
        yield document.text
        num_characters += len(document.text)
        if num_characters > TOKENIZER_CHARACTERS:
            break
    if is_generated(recipe.data):
        for index in range(1000):
            yield " ".join(NOUNS)
            for message in make_conversation(index).messages:
                yield message["content"] or str(message.get("tool_calls"))


def make_rows(
    recipe: BaseRecipe,
    tokenizer: Any,
    num_steps: int,
    report: DropReport | None = None,
    index: Path | None = None,
    resume: bool = False,
) -> tuple[PackedRows, PackedRows | ConcatenatedRows | StreamedRows]:
    """Return validation and training rows. They share no document, and no source row that was cut into documents.

    Generated texts are packed before training and shuffled as a whole. Other texts are read during training: `report`
    counts the rows of the first pass, and `index` and `resume` are passed to `StreamedRows`.
    """
    if is_generated(recipe.data):
        return _generated_rows(recipe, tokenizer, num_steps)
    held_out, tokens = [], 0
    for text in documents(recipe.data, seed=recipe.seed):
        held_out.append(text)
        tokens += len(tokenizer(text.text, verbose=False)["input_ids"])  # roughly: control tokens count once
        if tokens >= VALIDATION_ROWS * recipe.seq_len:
            break
    sources = {text.source for text in held_out} - {None}
    encode = partial(encode_texts, TextEncoder(tokenizer))
    packing: dict[str, Any] = {"long": "split", "seed": recipe.seed, "pad_id": tokenizer.pad_token_id}
    val = pack(encode(held_out), recipe.seq_len, **packing)
    reports = [report] if report is not None else []

    def texts() -> Iterator[Text]:
        one_pass = documents(recipe.data, seed=recipe.seed, report=reports.pop() if reports else None)
        # Leaves out the held-out documents, and all documents of a source row that is held out in part.
        return (text for text in islice(one_pass, len(held_out), None) if text.source not in sources)

    num_rows = num_steps * recipe.tokens_per_step // recipe.seq_len
    return val, StreamedRows(texts, encode, recipe.seq_len, num_rows, index=index, resume=resume, **packing)


def _generated_rows(
    recipe: BaseRecipe, tokenizer: Any, num_steps: int
) -> tuple[PackedRows, PackedRows | ConcatenatedRows]:
    rows_per_step = recipe.tokens_per_step // recipe.seq_len

    def pack_texts(seed: int, tokens: int, easy: float = 0.0) -> PackedRows:
        texts = documents(recipe.data, seed=seed, easy=easy)
        return pack(
            _take_tokens(tokens, encode_texts(TextEncoder(tokenizer), texts)),
            recipe.seq_len,
            seed=recipe.seed,
            pad_id=tokenizer.pad_token_id,
        )

    val = pack_texts(recipe.seed + 1, VALIDATION_ROWS * recipe.seq_len)
    easy = round(num_steps * EASY_SHARE) * rows_per_step if recipe.init is None else 0
    rows = pack_texts(recipe.seed + 3, num_steps * recipe.tokens_per_step)
    if not easy:
        return val, rows
    return val, ConcatenatedRows(pack_texts(recipe.seed + 2, int(easy * recipe.seq_len * 1.01), easy=0.8), rows)


def _take_tokens(tokens: int, encoded: Iterator[Document]) -> Iterator[Document]:
    """Yield documents until they have at least `tokens` tokens."""
    for document in encoded:
        yield document
        tokens -= len(document[0])
        if tokens <= 0:
            return


def encode_texts(encoder: TextEncoder, texts: Iterable[Text]) -> Iterator[Document]:
    """Yield the token ids of each text, and which of them have a label.

    In a text with answers, chat markers become special tokens. In a plain text they are ordinary text.
    """
    for is_plain, group in groupby(texts, key=lambda text: text.answers is None):
        while batch := list(islice(group, DOCUMENTS_PER_CALL)):
            encoded: Any = encoder.tokenizer(
                [text.text for text in batch],
                verbose=False,
                return_offsets_mapping=not is_plain,
                split_special_tokens=is_plain,
            )
            for n, text in enumerate(batch):
                is_split = is_plain and encoder.has_control_tokens(text.text)
                ids = np.asarray(encoder.encode_plain(text.text) if is_split else encoded["input_ids"][n], np.int32)
                has_label = np.ones(len(ids), bool) if is_plain else _touches_answer(text, encoded["offset_mapping"][n])
                yield ids, has_label


def _touches_answer(text: Text, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return for each token, given by its characters, whether it overlaps an answer."""
    answers = text.answers or []
    return np.asarray([any(a < end and b > start for start, end in answers) for a, b in offsets], dtype=bool)
