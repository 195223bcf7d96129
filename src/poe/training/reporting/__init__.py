"""Reports of a run: history, metrics, progress, estimate, trackers, and the files in its folder."""
