"""Hidden states for the head: their sources, and the cache on disk of those at the boundary of a stage."""
