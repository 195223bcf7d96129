"""The rows a base is trained on: the texts of its recipe, tokenized and packed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Text
from poe.data.drops import DropReport
from poe.data.packing import Batch, Document, PackedRows, pack
from poe.data.streamed import StreamedRows
from poe.data.text import documents, is_generated
from poe.demo.conversations import make_conversation
from poe.demo.tokenizer import COPYING, PROSE, train_tokenizer
from poe.demo.words import NOUNS
from poe.stages.recipe import BaseRecipe

TOKENIZER_CHARACTERS = 20_000_000
VALIDATION_ROWS = 48
EASY_SHARE = 0.1  # of the steps: the demo world begins with copying and looking up
ENCODED_AT_ONCE = 256  # documents: what the tokenizer returns takes thirty times the memory of its arrays


@dataclass
class Chained:
    """The rows of `first`, then those of `second`."""

    first: PackedRows
    second: PackedRows

    @property
    def num_rows(self) -> int:
        return self.first.num_rows + self.second.num_rows

    def batch(self, step: int, rows_per_step: int) -> Batch:
        steps = self.first.num_rows // rows_per_step
        return self.first.batch(step, rows_per_step) if step < steps else self.second.batch(step - steps, rows_per_step)


def tokenizer_for(recipe: BaseRecipe) -> Any:
    """Train the tokenizer of a base on the texts of its recipe."""
    pieces = COPYING if is_generated(recipe.data) else PROSE
    return train_tokenizer(_tokenizer_texts(recipe), recipe.vocab_size, pieces)


def _tokenizer_texts(recipe: BaseRecipe) -> Iterator[str]:
    """Text for the tokenizer: the data; of the demo world also its nouns and some calls, to make them cheap."""
    seen = 0
    for document in islice(documents(recipe.data, seed=recipe.seed), 12_000):
        yield document.text
        seen += len(document.text)
        if seen > TOKENIZER_CHARACTERS:
            break
    if is_generated(recipe.data):
        for index in range(1000):
            yield " ".join(NOUNS)
            for message in make_conversation(index).messages:
                yield message["content"] or str(message.get("tool_calls"))


def training_rows(
    recipe: BaseRecipe,
    tokenizer: Any,
    num_steps: int,
    report: DropReport | None = None,
    index: Path | None = None,
    resume: bool = False,
) -> tuple[PackedRows, PackedRows | Chained | StreamedRows]:
    """Return validation and training rows; the two share no document, and no row that several documents were cut from.

    Generated texts are packed at once, and shuffled as a whole. All others are read while training goes on; `report`
    counts what the first pass reads, `index` and `resume` are those of `StreamedRows`.
    """
    if is_generated(recipe.data):
        return _generated_rows(recipe, tokenizer, num_steps)
    held_out, tokens = [], 0
    for text in documents(recipe.data, seed=recipe.seed):
        held_out.append(text)
        tokens += len(tokenizer(text.text, verbose=False)["input_ids"])
        if tokens >= VALIDATION_ROWS * recipe.seq_len:
            break
    sources = {text.source for text in held_out} - {None}
    encode = partial(_encoded, tokenizer)
    packing: dict[str, Any] = {"long": "split", "seed": recipe.seed, "pad_id": tokenizer.pad_token_id}
    val = pack(encode(held_out), recipe.seq_len, **packing)
    reports = [report] if report is not None else []

    def texts() -> Iterator[Text]:
        one_pass = documents(recipe.data, seed=recipe.seed, report=reports.pop() if reports else None)
        # The rest of a long row that is held out in part, and all of it where the text is gone through again.
        return (text for text in islice(one_pass, len(held_out), None) if text.source not in sources)

    num_rows = num_steps * recipe.tokens_per_step // recipe.seq_len
    return val, StreamedRows(texts, encode, recipe.seq_len, num_rows, index=index, resume=resume, **packing)


def _generated_rows(recipe: BaseRecipe, tokenizer: Any, num_steps: int) -> tuple[PackedRows, PackedRows | Chained]:
    rows_per_step = recipe.tokens_per_step // recipe.seq_len

    def packed(seed: int, tokens: int, easy: float = 0.0) -> PackedRows:
        texts = documents(recipe.data, seed=seed, easy=easy)
        return pack(
            _up_to(tokens, _encoded(tokenizer, texts)), recipe.seq_len, seed=recipe.seed, pad_id=tokenizer.pad_token_id
        )

    val = packed(recipe.seed + 1, VALIDATION_ROWS * recipe.seq_len)
    easy = round(num_steps * EASY_SHARE) * rows_per_step if recipe.init is None else 0
    rows = packed(recipe.seed + 3, num_steps * recipe.tokens_per_step)
    if not easy:
        return val, rows
    return val, Chained(packed(recipe.seed + 2, int(easy * recipe.seq_len * 1.01), easy=0.8), rows)


def _up_to(tokens: int, encoded: Iterator[Document]) -> Iterator[Document]:
    for document in encoded:
        yield document
        tokens -= len(document[0])
        if tokens <= 0:
            return


def _encoded(tokenizer: Any, texts: Iterable[Text]) -> Iterator[Document]:
    """The token ids of each text, and which of them the loss counts.

    In a text with answers the marks of a chat are marks; in any other they are what somebody wrote.
    """
    for is_plain, group in groupby(texts, key=lambda text: text.answers is None):
        while some := list(islice(group, ENCODED_AT_ONCE)):
            encoded = tokenizer(
                [text.text for text in some],
                verbose=False,
                return_offsets_mapping=not is_plain,
                split_special_tokens=is_plain,
            )
            for n, text in enumerate(some):
                ids = np.asarray(encoded["input_ids"][n], dtype=np.int32)
                learned = np.ones(len(ids), bool) if is_plain else _learned(text, encoded["offset_mapping"][n])
                yield ids, learned


def _learned(text: Text, offsets: list[tuple[int, int]]) -> np.ndarray:
    """For each token, by its characters, whether it touches an answer."""
    answers = text.answers or []
    return np.asarray([any(a < end and b > start for start, end in answers) for a, b in offsets], dtype=bool)
