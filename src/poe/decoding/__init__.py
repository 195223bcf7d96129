"""Ways to decode: exit early, draft and verify, combine experts, route rows to stages."""

from pathlib import Path

from poe.decoding.depth import AdaptiveDepth
from poe.decoding.products import Fit, Product
from poe.decoding.prompt_center import fit_prompt_center
from poe.decoding.routing import Routing
from poe.decoding.speculation import SelfSpeculation
from poe.decoding.strategy import Exit, Expert, Strategy
from poe.errors import DecodingError

__all__ = [
    "AdaptiveDepth",
    "Exit",
    "Expert",
    "Fit",
    "Product",
    "Routing",
    "SelfSpeculation",
    "Strategy",
    "fit_prompt_center",
    "parse_strategy",
]


def parse_strategy(text: str) -> Strategy:
    """Return the strategy of `exit=DEPTH`, `adaptive=FILE` or `draft=DEPTH`. Raises `DecodingError` for other text."""
    kind, _, value = text.partition("=")
    if kind == "adaptive" and value:
        return AdaptiveDepth.load(Path(value))
    if kind in ("exit", "draft") and value.isdecimal():
        return Exit(int(value)) if kind == "exit" else SelfSpeculation(int(value))
    raise DecodingError(f"expected exit=DEPTH, adaptive=FILE or draft=DEPTH (DEPTH in layers), got {text!r}.")
