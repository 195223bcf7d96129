"""A tiny cascade with every way in which stages can stand to each other."""

import torch

from conftest import scramble
from decoding_models import decoding_cascade
from poe import Cascade

STAGES = ("tool", "math", "low", "child", "grandchild")


def branched_cascade(name: str, dtype: torch.dtype = torch.float32) -> Cascade:
    """Two siblings on top of four layers, one above three of them, and a chain of three; all weights are random."""
    cascade = decoding_cascade(name, dtype=dtype)
    cascade.add_stage(name="tool", num_layers=2)
    cascade.add_stage(name="math", num_layers=1, head="low_rank", head_rank=4)
    cascade.add_stage(name="low", num_layers=2, attach_at=3)
    cascade.add_stage(name="child", num_layers=1, parent="tool", head="none")
    cascade.add_stage(name="grandchild", num_layers=2, parent="child")
    for seed, stage in enumerate(STAGES):
        scramble(cascade.stages[stage], seed)
    return cascade
