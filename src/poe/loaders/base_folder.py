"""A PoE base becomes a folder that anybody can load through `trust_remote_code`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from poe.loaders.output import staged


def save_base_folder(
    model: PreTrainedModel, folder: Path | str, tokenizer: Any = None, *, card: str | None = None
) -> Path:
    """Write a base: config.json, model.safetensors, tokenizer files, README.md if `card` is given; whole or not at all.

    For a PoE base `modeling_poe.py` and the `auto_map` that names it come along, so
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without the package. Weights keep
    their dtype. Raises `OutputError` if the disk refuses.
    """
    import poe.modeling.opening  # noqa: F401  - registers the PoE classes, so that save_pretrained ships their file

    target = Path(folder).expanduser().absolute()
    with staged(target) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return target
