"""Texts that a model predicts: bits per byte, which show what a stage forgot."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from poe.cascade import Cascade
from poe.data.encoding import TextEncoder
from poe.data.packing import pack
from poe.data.render import Renderer, token_bytes
from poe.errors import DataError
from poe.evaluation.call_metrics import Counts
from poe.evaluation.suites import Item, Rows, Settings
from poe.training.hidden_states.sources import whole_model_sources
from poe.training.run import TrainedModel
from poe.training.validation import sum_losses

WINDOW = 1024  # the most tokens that are read together; no token is predicted from an earlier window


class TextSuite:
    """Predicts every token of each text after the first one. The stage acts on all of them."""

    batch_size = 8
    success = None

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        self.rows, self._cascade = rows, cascade
        self._encoder = TextEncoder(cascade.tokenizer, cascade.config.vocab_size)
        self._window = min(WINDOW, getattr(cascade.config, "max_position_embeddings", None) or WINDOW)
        self._token_bytes = token_bytes(cascade.tokenizer, cascade.config.vocab_size)
        self.items, self.dropped = rows.choose(self._encode, settings.rows, settings.seed)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the summed bits and bytes of the predicted tokens of each text."""
        model = self._cascade.model(stage).eval()
        measured = TrainedModel(model, [], whole_model_sources(model), self._token_bytes)
        answers = []
        for item in items:
            started = time.perf_counter()
            document = np.asarray(item.tokens, dtype=np.int32), np.ones(len(item.tokens), dtype=bool)
            rows = pack([document], min(self._window, len(item.tokens)), long="split")
            _, labels, bits, num_bytes = sum_losses(measured, [rows.batch(0, rows.num_rows)])[-1]
            seconds = round(time.perf_counter() - started, 4)
            answers.append({"bits": bits, "bytes": num_bytes, "tokens": int(labels), "seconds": seconds})
        return answers

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return the bits and the bytes of each text."""
        return [{"bits_per_byte": (float(answer["bits"]), float(answer["bytes"]))} for answer in answers]

    def _encode(self, text: str) -> list[int] | str:
        try:
            ids = self._encoder.encode_plain(text)
        except DataError as error:
            return getattr(error, "reason", "text without tokens")
        return ids if len(ids) > 1 else "nothing to predict"
