"""Evidence that a base is unchanged while its stages are off: equal hashes of its logits on fixed prompts."""

import hashlib
import os
from collections.abc import Callable

import torch

from poe.cascade import Cascade
from poe.loaders.chains import find_lineage
from poe.loaders.repository import locate
from poe.modeling.access import Access, read_config
from poe.modeling.lineage import is_stage
from poe.modeling.placement import device_of

PROMPTS, PROMPT_TOKENS = 4, 32


@torch.no_grad()
def hash_logits(cascade: Cascade) -> str:
    """Return the SHA-256 of the base's logits (fp32) on fixed prompts of random tokens, with every stage off."""
    model = cascade.model(None).eval()
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(cascade.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=draws)
    logits = model(input_ids=ids.to(device_of(model.get_input_embeddings())), use_cache=False).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def hash_base_alone(
    repo: str | os.PathLike[str], open_base: Callable[[str], Cascade], base: str | os.PathLike[str] | None = None
) -> str | None:
    """Open the base of a stage without the stage, and return its `hash_logits`. None if `repo` is no stage.

    `open_base` opens a repository in the dtype and on the device in which the stage will run.
    """
    location, access = locate(repo), Access()
    if not is_stage(read_config(location, access)[0]):
        return None
    source = find_lineage(location, access, None, verify=True, base=base).base
    return hash_logits(open_base(str(source.repo)))
