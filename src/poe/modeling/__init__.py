"""The network and how it grows. Self-contained: these files travel beside every published delta."""
