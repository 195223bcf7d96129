"""A generated world of tools. Its rows and texts train the embedded base and the demo stage."""
