"""The text of a strategy on the command line."""

from pathlib import Path

from poe.decoding.depth import AdaptiveDepth
from poe.decoding.speculation import SelfSpeculation
from poe.decoding.strategy import Exit, Strategy
from poe.errors import DecodingError


def parse_strategy(text: str) -> Strategy:
    """Return the strategy of `exit=DEPTH`, `adaptive=FILE` or `draft=DEPTH`. Raises `DecodingError` for other text."""
    kind, _, value = text.partition("=")
    if kind == "adaptive" and value:
        return AdaptiveDepth.load(Path(value))
    if kind in ("exit", "draft") and value.isdecimal():
        return Exit(int(value)) if kind == "exit" else SelfSpeculation(int(value))
    raise DecodingError(f"expected exit=DEPTH, adaptive=FILE or draft=DEPTH (DEPTH in layers), got {text!r}.")
