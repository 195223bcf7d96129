"""Ways to decode that only a cascade has: leave early, draft and verify, decide together, route rows to stages."""

from poe.decoding.depth import AdaptiveDepth
from poe.decoding.products import Fit, Product
from poe.decoding.routing import Routing
from poe.decoding.speculation import SelfSpeculation

__all__ = ["AdaptiveDepth", "Fit", "Product", "Routing", "SelfSpeculation"]
