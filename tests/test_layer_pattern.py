"""New layers continue the pattern of the base's layers, as programs that compute it from a layer's index expect."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import GEMMA, SLIDING, mostly_slow, scramble, tiny_model, tiny_tokenizer, token_ids
from poe import Cascade
from poe.errors import DeltaError
from poe.loaders.base import save_base_folder

FULL, WINDOW = "full_attention", "sliding_attention"
WINDOWED = {"head_dim": 8, "sliding_window": 4}
# Family, fields of its config with the default pattern of the family, and the rule that llama.cpp applies to an index.
FAMILIES = {
    "smollm3": ("smollm3", {}, lambda i: ((i + 1) % 4 != 0, FULL)),
    "smollm3-every-other": ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, lambda i: (i % 2 == 0, FULL)),
    "gemma2": ("gemma2", GEMMA, lambda i: (True, FULL if i % 2 else WINDOW)),
    "gemma3": ("gemma3_text", GEMMA, lambda i: (True, FULL if i % 6 == 5 else WINDOW)),
    "cohere2": ("cohere2", WINDOWED, lambda i: (True, FULL if i % 4 == 3 else WINDOW)),
    "olmo3": ("olmo3", WINDOWED, lambda i: (True, FULL if i % 4 == 3 else WINDOW)),
    "exaone4": ("exaone4", WINDOWED, lambda i: (True, FULL if i % 4 == 3 else WINDOW)),
    "cwm": ("cwm", WINDOWED, lambda i: (True, WINDOW if i % 4 else FULL)),
    "qwen2-windows-above": ("qwen2", {**SLIDING, "max_window_layers": 3}, lambda i: (True, FULL if i < 3 else WINDOW)),
    "qwen3-no-windows": ("qwen3", {**SLIDING, "head_dim": 8, "max_window_layers": 5}, lambda i: (True, FULL)),
    "qwen3-windows-listed": (
        "qwen3",
        {**SLIDING, "head_dim": 8, "layer_types": [FULL, WINDOW, FULL, WINDOW, FULL]},
        lambda i: (True, WINDOW if i % 2 else FULL),
    ),
}
QUICK = ["smollm3", "gemma3", "cohere2"]


def deep_base(name: str, depth: int = 5) -> torch.nn.Module:
    model_type, fields, _ = FAMILIES[name]
    return tiny_model(model_type, {**copy.deepcopy(fields), "num_hidden_layers": depth})


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_base_folder(deep_base(request.param), tmp_path / "base", tiny_tokenizer(request.param))


def check_pattern(config, rule, start: int = 0) -> None:
    for index in range(start, config.num_hidden_layers):
        rope, kind = rule(index)
        assert config.layer_types[index] == kind, index
        assert getattr(config, "no_rope_layers", [rope] * (index + 1))[index] == rope, index


@pytest.mark.parametrize(
    ("folder", "name"), mostly_slow([(n, n) for n in FAMILIES], [(n, n) for n in QUICK]), indirect=["folder"]
)
@torch.no_grad()
def test_new_layers_continue_the_pattern_of_the_family(folder: Path, name: str, tmp_path: Path) -> None:
    rule, options = FAMILIES[name][2], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cascade = Cascade.from_pretrained(folder)
    cascade.add_stage(name="parent", num_layers=3).add_stage(name="child", num_layers=2, parent="parent")
    cascade.add_stage(name="low", num_layers=4, attach_at=3)
    ids = token_ids()
    assert torch.equal(cascade(ids, stage="child").logits, cascade.base(ids).logits)
    for stage in cascade.stages.values():
        scramble(stage)
    for stage in ("parent", "child", "low"):
        check_pattern(cascade.model(stage).config, rule)
        for index, layer in enumerate(cascade.model(stage).model.layers):
            assert getattr(layer.self_attn, "use_rope", 1) == rule(index)[0]
        cascade.save_stage(stage, tmp_path / stage)
        again = Cascade.from_pretrained(tmp_path / stage)
        exported = AutoModelForCausalLM.from_pretrained(again.export_native(stage, tmp_path / f"{stage}-native"))
        check_pattern(exported.config, rule)
        for other in (again, exported):
            assert torch.equal(other(ids).logits, again(ids).logits)
            tokens = [other.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
            assert torch.equal(*tokens)
    folded = Cascade.from_pretrained(tmp_path / "child").fold("child", "folded")
    check_pattern(folded.model("folded").config, rule)
    assert folded.stages["folded"].pattern == [*cascade.stages["parent"].pattern, *cascade.stages["child"].pattern]


@pytest.mark.parametrize(("folder", "name"), [("smollm3", "smollm3"), ("gemma2", "gemma2")], indirect=["folder"])
@torch.no_grad()
def test_a_stage_that_names_no_pattern_keeps_its_uniform_layers(folder: Path, name: str, tmp_path: Path) -> None:
    """Such files are of stages that were trained when every new layer had full attention and positions."""
    cascade = Cascade.from_pretrained(folder).add_stage(name="t", num_layers=4)
    scramble(cascade.stages["t"])
    path = cascade.save_stage("t", tmp_path / "t") / "config.json"
    fields = json.loads(path.read_text())
    del fields["stage"]["per_layer"]
    path.write_text(json.dumps(fields))
    old = Cascade.from_pretrained(tmp_path / "t")
    check_pattern(old.model("t").config, lambda i: (True, FULL), start=5)
    assert not torch.equal(old(token_ids()).logits, cascade(token_ids()).logits)
    again = json.loads((old.save_stage("t", tmp_path / "again") / "config.json").read_text())
    assert again["stage"] == fields["stage"]
    child = old.add_stage(name="child", num_layers=1, parent="t")
    check_pattern(child.model("child").config, FAMILIES[name][2], start=9)


@pytest.mark.parametrize("folder", ["smollm3"], indirect=True)
def test_a_pattern_that_does_not_fit_the_base_is_refused(folder: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(folder).add_stage(name="t", num_layers=4)
    path = cascade.save_stage("t", tmp_path / "t") / "config.json"
    fields = json.loads(path.read_text())
    good = fields["stage"]["per_layer"]
    assert good["no_rope_layers"] == [1, 1, 0, 1]
    for bad in (
        [],
        {},
        {"no_rope_layers": good["no_rope_layers"]},
        {**good, "other": [1] * 4},
        {**good, "no_rope_layers": [1] * 3},
        {**good, "layer_types": ["linear_attention"] * 4},
        {**good, "layer_types": [FULL] * 3 + [None]},
    ):
        path.write_text(json.dumps({**fields, "stage": {**fields["stage"], "per_layer": bad}}))
        with pytest.raises(DeltaError, match="describes its layers by"):
            Cascade.from_pretrained(tmp_path / "t")
