"""MuonAdamW, schedule, loss, trainer and checkpoints."""
