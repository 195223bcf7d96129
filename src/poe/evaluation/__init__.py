"""Measure specialists: call accuracy on held-out questions."""
