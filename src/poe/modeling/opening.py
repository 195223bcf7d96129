"""Files become a base and its stages: the steps that the package and the AutoModel entry point share."""

from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .access import fetch
from .delta_file import read_delta
from .failures import DeltaError, SourceError, StageError
from .families import FAMILIES
from .lineage import BaseSource, Lineage
from .modeling_poe import PoEConfig, PoEForCausalLM
from .placement import bring_head_back
from .recognition import check_structure
from .stage import Stage, build_stage

# A PoE model saved with save_pretrained then carries the file that defines it, and its auto_map.
PoEConfig.register_for_auto_class()
PoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def load_base(
    source: BaseSource, config: dict[str, Any], *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a base in evaluation mode; `options` are those of `from_pretrained` (dtype, device_map, ...).

    A PoE base is loaded by the class that lies beside this file, any other by its transformers class. Raises
    `FamilyError` before reading weights if its structure says that it cannot be grown, or if it is no causal language
    model, `SourceError` if they cannot be read or lack some. Whether a base of an undeclared family can be grown,
    `recognize_family` says. An output head that `device_map` offloads is brought back into memory.
    """
    model_type = str(config.get("model_type"))
    loader: Any = PoEForCausalLM if model_type == "poe" else AutoModelForCausalLM
    assert source.repo is not None
    where = {
        "revision": source.revision or "main",
        "trust_remote_code": trust_remote_code,
        **source.access.kwargs(source.repo),
    }
    try:
        if model_type not in FAMILIES:
            check_structure(source.repo, model_type, **where)
        model, found = loader.from_pretrained(
            source.repo, use_safetensors=True, output_loading_info=True, **where, **options
        )
    except OSError as error:
        raise SourceError(f"The base {source.repo} could not be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(found["missing_keys"]):
        # transformers only warns, and fills them with random numbers.
        raise SourceError(
            f"The base {source.repo} is not whole: {len(missing)} tensors got no values from its files "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch it again"
            + (", or open it without quantization_config." if options.get("quantization_config") else ".")
        )
    bring_head_back(model)
    return model.eval()


def load_stages(base: PreTrainedModel, lineage: Lineage, known: dict[str, Stage] | None = None) -> list[Stage]:
    """Build every stage of a chain on a loaded base and fill it; return them from the base upwards.

    `known` are stages already standing on this base, by fingerprint: they are used as they are. Nothing is written to
    the base; a delta that does not fit raises `DeltaError` before any of its tensors is copied.
    """
    stages: list[Stage] = []
    for link in lineage.links:
        parent = stages[-1] if stages else None
        stage = (known or {}).get(link.header.self_fingerprint)
        if stage is None:
            try:
                stage = build_stage(base, link.stage_config(parent.name if parent else None), parent)
            except StageError as error:
                raise DeltaError(f"config.json of {link.repo} does not fit its base: {error}") from error
            stage.load_delta(read_delta(link.delta_path, link.name))
            stage.source = {"repo": link.repo, "revision": link.revision, "fingerprint": link.header.self_fingerprint}
            stage.saved_dtype = link.header.dtype
            stage.prompt = link.config.get("prompt")
            if fetch(link.repo, "generation_config.json", link.access, link.revision) is not None:
                stage.generation_config = GenerationConfig.from_pretrained(link.folder)
        stages.append(stage)
    return stages
