"""Keywords of transformers' own loaders are taken or refused by name; caches and new stages that do not fit too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import DynamicCache, GenerationConfig

from conftest import scramble, tiny_base, token_ids
from poe import Cascade
from poe.errors import PoEError, RecipeError, SourceError, StageError
from poe.loaders.options import REFUSED


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"torch_dtype": torch.bfloat16}, lambda c: c.base.dtype == torch.bfloat16),
        ({"torch_dtype": "float16"}, lambda c: c.base.dtype == torch.float16),
        ({"dtype": "bfloat16"}, lambda c: c.base.dtype == torch.bfloat16),
        ({"attn_implementation": "eager"}, lambda c: c.config._attn_implementation == "eager"),
        ({"use_safetensors": True, "force_download": True, "low_cpu_mem_usage": True}, lambda c: True),
        ({"device_map": "cpu", "max_memory": {"cpu": "1GB"}}, lambda c: c.base.device.type == "cpu"),
        ({"generation_config": GenerationConfig(top_k=7)}, lambda c: c.base.generation_config.top_k == 7),
        ({"revision": "main", "cache_dir": "somewhere", "local_files_only": True, "token": False}, lambda c: True),
    ],
)
def test_keywords_of_transformers_are_taken(
    options: dict[str, Any], expected: Callable[[Cascade], bool], saved_base: Callable[..., Path]
) -> None:
    assert expected(Cascade.from_pretrained(saved_base(), **options))


@pytest.mark.parametrize("kind", ["base", "stage"])
def test_a_subfolder_is_opened_like_the_folder(kind: str, saved_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved_base()
    if kind == "stage":
        cascade = Cascade.from_pretrained(folder).add_stage(name="s", num_layers=1)
        scramble(cascade.stages["s"])
        folder = cascade.save_stage("s", tmp_path / "s", dtype=torch.float32)
    inside = Cascade.from_pretrained(folder.parent, subfolder=folder.name)
    assert torch.equal(inside(token_ids()).logits, Cascade.from_pretrained(folder)(token_ids()).logits)


@pytest.mark.parametrize("name", [*REFUSED, "rope_theta", "num_hidden_layers", "atn_implementation", "nonsense"])
def test_other_keywords_are_refused_by_name(name: str, saved_base: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match=name):
        Cascade.from_pretrained(saved_base(), **{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "nonsense"},
        {"attn_implementation": "nonsense"},
        {"device_map": "nonsense"},
        {"use_safetensors": False},
        {"quantization_config": {"quant_method": "nonsense"}},
    ],
)
def test_a_keyword_with_a_wrong_value_is_one_message(options: dict[str, Any], saved_base: Callable[..., Path]) -> None:
    with pytest.raises(PoEError):
        Cascade.from_pretrained(saved_base(), **options)


def test_a_subfolder_of_a_repository_is_refused_with_what_to_do() -> None:
    with pytest.raises(SourceError, match="hf download me/model"):
        Cascade.from_pretrained("me/model", subfolder="sub", local_files_only=True)


def test_a_stage_can_be_named_first_when_no_recipe_has_the_name() -> None:
    cascade = Cascade(tiny_base()).add_stage("mine", num_layers=2, head="none")
    assert (cascade.active, cascade.stages["mine"].config.num_layers) == ("mine", 2)
    for recipe in ("mine2", "tol", "missing.yaml"):
        with pytest.raises(RecipeError, match=r"Unknown recipe|no such file"):
            cascade.add_stage(recipe, **({} if recipe == "mine2" else {"num_layers": 2}))
    for wrong in ({"layers": 2}, {"depth": 2}, {"num_layers": "2"}):
        with pytest.raises(StageError):
            cascade.add_stage("tool", **wrong)
    with pytest.raises(StageError, match="Expected a recipe"):
        cascade.add_stage(3)


@pytest.mark.parametrize(("first", "second"), [(None, "one"), ("one", "two"), ("two", "one"), (None, "low")])
@pytest.mark.parametrize("configured", [True, False])
def test_a_cache_of_a_model_of_another_depth_is_refused(first: str | None, second: str, configured: bool) -> None:
    cascade = Cascade(tiny_base())
    cascade.add_stage(name="one", num_layers=1).add_stage(name="two", num_layers=2)
    cascade.add_stage(name="low", num_layers=2, attach_at=1)
    ids = token_ids(1, 6)
    model = cascade.model(first)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(StageError, match="key-value cache"):
        cascade.model(second)(ids[:, 4:], past_key_values=cache)
    own = DynamicCache()
    cascade.model(second)(ids[:, :4], past_key_values=own)
    cascade.model(second)(ids[:, 4:], past_key_values=own)


def test_a_grown_model_is_offloaded_by_accelerate_or_refused_in_one_message(saved_base: Callable[..., Path]) -> None:
    cascade = Cascade.from_pretrained(saved_base()).add_stage(name="s", num_layers=1)
    scramble(cascade.stages["s"])
    expected = cascade(token_ids()).logits
    try:
        offloaded = cpu_offload(cascade.model("s"), execution_device=torch.device("cpu"))
        assert torch.allclose(offloaded(token_ids()).logits, expected)
    except PoEError:
        pass
