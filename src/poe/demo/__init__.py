"""A procedural world of tools: what the embedded base and the demo stage are trained on, all of it generated."""
