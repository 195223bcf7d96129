"""Measure specialists: calls on held-out questions, texts that are predicted, comparisons with intervals."""
