"""A base: opened from a folder or repository, held with its tokenizer and source, written as a folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from poe.errors import FingerprintError
from poe.files.output import atomic_folder
from poe.loaders.tokenizer import load_tokenizer
from poe.loaders.tokenizer_files import save_tokenizer
from poe.loaders.unchanged import REMEDY, Record, check_unchanged, find_changed_weight
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.lineage import BaseSource
from poe.modeling.opening import load_base
from poe.modeling.placement import is_offloaded, quantization_of
from poe.modeling.stage import Stage


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
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        return BaseSource(None, known_fingerprint=fingerprint_tensors(tensors), config=config)

    @cached_property
    def record(self) -> Record:
        """The state of the model when the cascade got it."""
        return Record(self.model)

    def find_changed_weight(self) -> str | None:
        """Return the name of a weight that was changed in memory, None if there is none. All weights are read."""
        source = self.known_source or vars(self).get("source")  # a fingerprint that is taken later includes the change
        return None if source is None else find_changed_weight(self.model, self.record, source)

    def check_unchanged(self, stage: Stage | None = None, *, weights: bool = True) -> None:
        """Check that the base, and a stage with its parents, were not changed in memory.

        Raises `FamilyError` for other modules and hooks, `FingerprintError` for other weights, buffers or config. With
        `weights=False` the base's weights are not read.
        """
        check_unchanged(self.model, self.record, stage)
        if weights and (name := self.find_changed_weight()):
            if self.known_source is not None and self.known_source.repo is not None:
                self.known_source.check_unchanged()  # the weights differ too if the files on disk were changed
            raise FingerprintError(
                f"The base has changed in memory: {name} is not what it was when it was opened. A stage on it would be "
                f"saved under the fingerprint of another base. {REMEDY}"
            )


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
        save_tokenizer(tokenizer, temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return target
