"""Ways to decode that only a cascade has: leave early, draft and verify, decide together, route rows to stages."""
