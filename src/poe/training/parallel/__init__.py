"""Several processes as one run: the process group, ZeRO-2, and a sharded base."""
