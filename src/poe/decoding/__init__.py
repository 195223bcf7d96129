"""Ways to decode that only a cascade has: leave early, draft and verify, with one key-value cache."""
