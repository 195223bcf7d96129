"""Undeclared families are tried before they are accepted, and refused with a reason."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from conftest import BASES, RECURRENT, scramble, tiny_model, token_ids
from families_page import ACCEPTED, DEEPER, PAGE, REFUSED, declared_and_found, exists, outcome, page
from poe import Cascade, StageConfig
from poe.errors import FamilyError, SourceError
from poe.modeling.families import FAMILIES, family_of
from poe.modeling.recognition import recognize_family

DECLARED = [name for name, (kind, _) in BASES.items() if kind in FAMILIES and name not in RECURRENT]


@pytest.mark.parametrize("name", DECLARED)
def test_recognition_finds_the_declared_parts(name: str) -> None:
    declared, found = declared_and_found(name)
    assert found == dataclasses.replace(declared, per_layer={}, unforked=())


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_recognized_families_are_accepted(model_type: str) -> None:
    if not exists(model_type):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = outcome(model_type)
    assert not isinstance(found, str), found


@pytest.mark.parametrize("model_type", REFUSED)
def test_unsuitable_families_are_refused_with_the_reason(model_type: str) -> None:
    if not exists(model_type):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    reason = outcome(model_type)
    assert f"model type {model_type!r} cannot be grown: " in str(reason)
    assert REFUSED[model_type][1] in str(reason)


def test_the_page_of_families_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"with transformers {transformers.__version__};" not in text:
        pytest.skip("the page was written with another transformers")
    assert text == page(), "run `python tests/families_page.py`"


def test_a_trial_happens_once_per_base_and_leaves_no_trace(monkeypatch) -> None:
    base = tiny_model("stablelm", {"attention_dropout": 0.5}).train()
    base.model.norm.eval()
    modes = [module.training for module in base.modules()]
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config, state = base.config.to_dict(), torch.get_rng_state()
    family = recognize_family(base)
    assert [module.training for module in base.modules()] == modes
    hooks = [hook for module in base.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__ == recognize_family.__module__]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert base.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(type(base), "forward", lambda *args, **kwargs: pytest.fail("tried twice"))
    assert recognize_family(base) is family_of(base) is family
    Cascade(base).add_stage(StageConfig("t", 1))


def breaking(how: str) -> PreTrainedModel:
    """Return a tiny base of an undeclared family that breaks one promise."""
    base = tiny_model("stablelm", {"num_hidden_layers": 3})
    layers = base.model.layers
    if how == "order":
        base.model.layers = nn.ModuleList([layers[0], layers[1], layers[1]])
    elif how == "broken":
        base.model.norm = nn.LayerNorm(7)
    elif how == "scale":
        base.config.logit_scale = 0.5  # the config says so, but the model does not do it
    elif how == "residual":  # something else writes into the residual stream

        class Louder(type(layers[0])):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 1.01

        for layer in layers:
            layer.__class__ = Louder
    return base


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("order", "do not run once each, in order"),
        ("broken", "the trial ended with RuntimeError"),
        ("scale", "its logits are not its head's output"),
        ("residual", "at zero changes the logits"),
    ],
)
def test_a_base_that_fails_a_check_is_refused(how: str, reason: str) -> None:
    base = breaking(how)
    with pytest.raises(FamilyError, match=reason):
        Cascade(base)
    assert "_poe_family" not in vars(base)
    with pytest.raises(FamilyError, match="belongs to no known family"):
        family_of(base)


def test_a_base_of_an_undeclared_family_opens_or_names_the_reason(saved_base, tmp_path) -> None:
    cascade = Cascade.from_pretrained(saved_base("stablelm")).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    folder = cascade.save_stage("t", tmp_path / "t", dtype=torch.float32)
    assert torch.equal(Cascade.from_pretrained(folder)(token_ids()).logits, cascade(token_ids()).logits)
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(FamilyError, match=r"'gpt2' cannot be grown: its layers have no nn\.Linear"):
        Cascade.from_pretrained(tmp_path / "gpt2")
    transformers.T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(FamilyError, match="'t5', which AutoModelForCausalLM does not open"):
        Cascade.from_pretrained(tmp_path / "t5")


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mamba", "opt"])
def test_unsuitable_structures_are_refused_before_weights_are_read(model_type: str, tmp_path) -> None:
    tiny_model(model_type, {**DEEPER, **REFUSED[model_type][0]}).config.save_pretrained(tmp_path)
    with pytest.raises(FamilyError, match=REFUSED[model_type][1].replace("(", r"\(")):
        Cascade.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["stablelm", "gpt2", "mixtral"])
def test_the_trial_decides_if_the_structure_cannot(model_type: str, tmp_path) -> None:
    tiny_model(model_type).config.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="expected a base in safetensors"):  # there are no weights
        Cascade.from_pretrained(tmp_path)
