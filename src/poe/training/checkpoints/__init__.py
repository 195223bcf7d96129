"""Checkpoints: the files of a run's state, what identifies a run, and the random generators."""
