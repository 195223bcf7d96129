"""A base: opened from a folder or repository, held with its tokenizer and source, written as a folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from poe.errors import FingerprintError
from poe.files.output import atomic_folder
from poe.loaders.tokenizer import load_tokenizer
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.lineage import BaseSource
from poe.modeling.opening import load_base
from poe.modeling.placement import is_offloaded, quantization_of


@dataclass(frozen=True)
class Base:
    """A base in memory.

    `tokenizer` is None if the base has none. `known_source` is None for a model that was not opened from files.
    """

    model: PreTrainedModel
    tokenizer: Any = None
    known_source: BaseSource | None = None

    @cached_property
    def source(self) -> BaseSource:
        """The base's location (`repo`, `revision`) and the `fingerprint` of its files as stored.

        A base that was quantized during loading has the fingerprint of the original files. For a model in memory the
        fingerprint is computed from its weights. Raises `FingerprintError` if such a model is quantized or offloaded.
        """
        if self.known_source is not None:
            return self.known_source
        state = "quantized" if quantization_of(self.model) else "offloaded" if is_offloaded(self.model) else None
        if state is not None:
            raise FingerprintError(
                f"The base is {state} and was not opened by Cascade.from_pretrained, so its original weights are "
                "unknown: expected Cascade.from_pretrained(folder or repository, with the same quantization_config or "
                "device_map), which takes the fingerprint of the files."
            )
        tensors = revert_weight_conversion(self.model, self.model.state_dict())  # the names and shapes of its files
        return BaseSource(None, known_fingerprint=fingerprint_tensors(tensors))


def open_base(
    source: BaseSource,
    config: dict[str, Any],
    *,
    tokenizer_repo: str,
    tokenizer_revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Base:
    """Load a base's model (see `load_base`) and the tokenizer of `tokenizer_repo`: the base, or a stage on it."""
    tokenizer = load_tokenizer(tokenizer_repo, tokenizer_revision, source.access, trust_remote_code)
    model = load_base(source, config, trust_remote_code=trust_remote_code, **options)
    return Base(model, tokenizer, source)


def save_base_folder(
    model: PreTrainedModel, folder: Path | str, tokenizer: Any = None, *, card: str | None = None
) -> Path:
    """Write a base's folder atomically: config.json, model.safetensors, tokenizer files, README.md if `card` is given.

    For a PoE base it also writes `modeling_poe.py` and its `auto_map`, so
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without the package. Weights keep
    their dtype. Raises `OutputError` if the folder cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    with atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return target
