"""Load a base and its stages from files, for the package and for the AutoModel entry point."""

from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .access import fetch
from .delta_file import read_delta
from .failures import DeltaError, PoEError, SourceError, StageError
from .families import FAMILIES
from .layer_pattern import read_pattern
from .lineage import BaseSource, Lineage
from .modeling_poe import PoEConfig, PoEForCausalLM
from .placement import load_head_into_memory
from .recognition import check_structure
from .stage import Stage, build_stage

# save_pretrained of a PoE model then writes the file that defines it, and its auto_map.
PoEConfig.register_for_auto_class()
PoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def load_base(
    source: BaseSource, config: dict[str, Any], *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a base in evaluation mode; `options` are those of `from_pretrained` (dtype, device_map, ...).

    A PoE base is loaded by the class beside this file, any other base by its transformers class. Raises `FamilyError`,
    before reading weights, if the base is no causal language model or its structure cannot be grown, and `SourceError`
    if weights are missing or unreadable. `recognize_family` then checks bases of undeclared families. An output head
    that `device_map` offloads is loaded into memory.
    """
    model_type = str(config.get("model_type"))
    loader: Any = PoEForCausalLM if model_type == "poe" else AutoModelForCausalLM
    assert source.repo is not None
    location = {
        "revision": source.revision or "main",
        "trust_remote_code": trust_remote_code,
        **source.access.kwargs(source.repo),
    }
    try:
        if model_type not in FAMILIES:
            check_structure(source.repo, model_type, **location)
        model, report = loader.from_pretrained(
            source.repo, use_safetensors=True, output_loading_info=True, **location, **options
        )
    except (OSError, ValueError) as error:
        if isinstance(error, PoEError):
            raise
        raise SourceError(f"The base {source.repo} could not be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(report["missing_keys"]):
        # transformers only warns, and initializes them at random.
        raise SourceError(
            f"The base {source.repo} is incomplete: {len(missing)} tensors are not in its files "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch it again"
            + (", or open it without quantization_config." if options.get("quantization_config") else ".")
        )
    load_head_into_memory(model)
    return model.eval()


def load_stages(base: PreTrainedModel, lineage: Lineage, known: dict[str, Stage] | None = None) -> list[Stage]:
    """Build and fill every stage of a chain on a loaded base; return them from the base upwards.

    `known` are stages on this base that are already loaded, by fingerprint; they are reused. The base does not change.
    Raises `DeltaError`, before copying any tensor, for a delta or config that does not fit.
    """
    stages: list[Stage] = []
    for files in lineage.stages:
        parent = stages[-1] if stages else None
        stage = (known or {}).get(files.header.self_fingerprint)
        if stage is None:
            try:
                config = files.stage_config(parent.name if parent else None)
                below = config.layers_below(base.config.num_hidden_layers if parent is None else parent.depth)
                pattern = read_pattern(base, files.config["stage"], below) if config.layers == "new" else None
                stage = build_stage(base, config, parent, pattern=pattern)
            except StageError as error:
                raise DeltaError(f"config.json of {files.repo} does not fit its base: {error}") from error
            stage.load_delta(read_delta(files.delta_path, files.name))
            stage.source = {
                "repo": files.repo,
                "revision": files.revision,
                "fingerprint": files.header.self_fingerprint,
            }
            stage.saved_dtype = files.header.dtype
            stage.prompt = files.config.get("prompt")
            if fetch(files.repo, "generation_config.json", files.access, files.revision) is not None:
                stage.generation_config = GenerationConfig.from_pretrained(files.folder)
        stages.append(stage)
    return stages
