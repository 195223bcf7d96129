"""Ways to decode that only a cascade has: leave early, draft and verify, with one key-value cache."""

from poe.decoding.depth import AdaptiveDepth
from poe.decoding.speculation import SelfSpeculation

__all__ = ["AdaptiveDepth", "SelfSpeculation"]
