"""A tiny cascade with siblings, a chain, and a stage below the top of the base."""

import torch

from conftest import scramble
from decoding_models import decoding_cascade
from poe import Cascade

STAGES = ("tool", "math", "low", "child", "grandchild")


def branched_cascade(name: str, dtype: torch.dtype = torch.float32) -> Cascade:
    """Return a base of four layers with random stages: two siblings on top, one after layer three, a chain of three."""
    cascade = decoding_cascade(name, dtype=dtype)
    cascade.add_stage(name="tool", num_layers=2)
    cascade.add_stage(name="math", num_layers=1, head="low_rank", head_rank=4)
    cascade.add_stage(name="low", num_layers=2, attach_at=3)
    cascade.add_stage(name="child", num_layers=1, parent="tool", head="none")
    cascade.add_stage(name="grandchild", num_layers=2, parent="child")
    for seed, stage in enumerate(STAGES):
        scramble(cascade.stages[stage], seed)
    return cascade
