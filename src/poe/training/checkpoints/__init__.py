"""Checkpoints: their files, the state of a run and of its optimizer, the identity of a run, random generators."""
