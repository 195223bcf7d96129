"""A procedural world of tools: the data that the embedded base and the demo stage are trained on, all of it generated."""
