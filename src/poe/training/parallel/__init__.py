"""Several processes: the process group, the optimizer's shards (ZeRO-2), the base's shards (FSDP2)."""
