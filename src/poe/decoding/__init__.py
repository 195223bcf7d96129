"""Ways to decode: exit early, draft and verify, combine experts, route rows to stages."""

from poe.decoding.depth import AdaptiveDepth
from poe.decoding.parsing import parse_strategy
from poe.decoding.products import Fit, Product
from poe.decoding.routing import Routing
from poe.decoding.speculation import SelfSpeculation
from poe.decoding.strategy import Exit, Expert, Strategy

__all__ = [
    "AdaptiveDepth",
    "Exit",
    "Expert",
    "Fit",
    "Product",
    "Routing",
    "SelfSpeculation",
    "Strategy",
    "parse_strategy",
]
