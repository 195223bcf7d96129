"""Serve one base and its stages on one machine: requests share passes in a batch, behind an OpenAI-compatible API."""
