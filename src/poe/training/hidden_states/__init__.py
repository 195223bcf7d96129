"""Hidden states at a stage's boundary: where training reads them from, and their cache on disk."""
