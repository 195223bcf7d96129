"""The entry point without the package: `AutoModelForCausalLM.from_pretrained(stage, trust_remote_code=True)`.

It returns a grown model of the base's own class, such as a Qwen3ForCausalLM with more layers. Config and model share
this file, because two remote-code files can become two classes.
"""

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .access import Access
from .failures import SourceError
from .growth import make_standalone
from .lineage import resolve_lineage, warn_unverified
from .opening import load_base, load_stages
from .stage import assemble


class PoEStageConfig(PreTrainedConfig):
    """config.json of a stage folder, in the delta format."""

    model_type = "poe_stage"

    poe_format: str = "1"
    stage: dict | None = None
    parent: dict | None = None
    base: dict | str | None = None
    base_config: dict | None = None
    prompt: dict | None = None


class PoEStageForCausalLM(PreTrainedModel):
    """The class that AutoModelForCausalLM loads. Its `from_pretrained` returns the grown native model."""

    config_class = PoEStageConfig
    config: PoEStageConfig
    base_model_prefix = "model"

    def __init__(self, config: PoEStageConfig, *inputs: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "A stage is loaded, not built from a config: use AutoModelForCausalLM.from_pretrained(folder_or_repo, "
            "trust_remote_code=True)."
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Return a model of the base's class with this stage's layers and folded head, in evaluation mode.

        `revision` is the stage's. `base` (or the environment variable POE_BASE) overrides the location of the base.
        `verify=False` skips the comparison of fingerprints. Other options (dtype, device_map, attn_implementation,
        quantization_config, ...) go to the base. Raises the errors of failures.py.
        """
        location = os.fspath(pretrained_model_name_or_path)
        if kwargs.pop("subfolder", None):
            raise SourceError(
                f"{location}: `subfolder` is not supported, because a stage is a whole repository or folder."
            )
        access = Access(
            token=kwargs.pop("token", None),
            cache_dir=kwargs.pop("cache_dir", None),
            local_files_only=kwargs.pop("local_files_only", False),
            force_download=kwargs.pop("force_download", False),
        )
        # AutoConfig moves keywords with names of config attributes into the config.
        config_base = getattr(config, "base", None)
        base_location = kwargs.pop("base", config_base if isinstance(config_base, str) else None)
        verify, info = kwargs.pop("verify", True), kwargs.pop("output_loading_info", False)
        trust = bool(kwargs.pop("trust_remote_code", False))
        attention = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation_internal", None)
        for name in ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "proxies", "low_cpu_mem_usage"):
            kwargs.pop(name, None)
        if attention is not None:
            kwargs["attn_implementation"] = attention

        lineage = resolve_lineage(location, access, revision=kwargs.pop("revision", None), base=base_location)
        if verify:
            lineage.verify()
        else:
            warn_unverified(location)
        base = load_base(lineage.base, lineage.base_config, trust_remote_code=trust, verify=verify, **kwargs)
        model = make_standalone(base, assemble(base, load_stages(base, lineage, verify=verify)[-1]))
        model.config.name_or_path = model.name_or_path = location
        return (model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}) if info else model
