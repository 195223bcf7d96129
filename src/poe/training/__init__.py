"""Training of stages and bases: data rows, model, optimizer, loop, checkpoints and reports."""
