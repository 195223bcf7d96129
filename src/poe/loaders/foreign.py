"""Stages that other projects trained, recognized by their files."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from poe.errors import FamilyError
from poe.loaders import cognica, peft
from poe.modeling.modeling_poe import PoEForCausalLM
from poe.modeling.stage_config import StageConfig


def read_foreign_stage(
    folder: Path,
    name: str,
    base: PreTrainedModel,
    parent: str | None,
    model_of: Callable[[str | None], PreTrainedModel],
) -> tuple[StageConfig, dict[str, Tensor]]:
    """Return the config and the tensors of the stage `name` that a foreign checkpoint in `folder` becomes.

    `parent` is the stage that a stage of Cognica's releases stands on, `model_of` returns the model that ends in it.
    Raises `SourceError`, `FingerprintError` or `FamilyError`.
    """
    if (folder / peft.CONFIG).is_file():
        return peft.read_peft(folder, base, name)
    if not isinstance(base, PoEForCausalLM):
        raise FamilyError(f"Such stages stand on PoE bases: got a base of type {base.config.model_type!r}.")
    tensors = cognica.read_stage(folder, model_of(parent), base.lm_head.weight)
    num_layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers."))
    head = "dense" if "head.weight" in tensors else "none"
    return StageConfig(name, num_layers, head, parent=parent), tensors
