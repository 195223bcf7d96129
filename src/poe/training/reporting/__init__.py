"""What a run says: history, metrics, progress, estimate, trackers, and the report."""
