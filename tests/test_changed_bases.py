"""A base or a stage that was changed in memory is not saved under the names of the original."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

from conftest import BASES, STAGED, mostly_slow, scramble, tiny_base, tiny_tokenizer, token_ids
from poe import Cascade
from poe.errors import FamilyError, FingerprintError, PoEError


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, as adapter libraries put it into a model."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_a = nn.Parameter(torch.randn(2, linear.in_features))
        self.lora_b = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def wrap(parent: nn.Module, name: str) -> None:
    setattr(parent, name, Adapter(getattr(parent, name)))


def open_cascade(saved_base: Callable[..., Path], name: str = "qwen3") -> Cascade:
    cascade = Cascade.from_pretrained(saved_base(name)).add_stage(name="s", num_layers=1)
    scramble(cascade.stages["s"])
    return cascade


def first_layer(cascade: Cascade) -> Any:
    return cascade.base.model.layers[0]


def resize_embeddings(cascade: Cascade) -> None:
    cascade.base.resize_token_embeddings(cascade.config.vocab_size + 3)


def untie_head(cascade: Cascade) -> None:
    cascade.base.lm_head.weight = nn.Parameter(cascade.base.lm_head.weight.detach() * 2)


CHANGED_VALUES: dict[str, Callable[[Cascade], Any]] = {
    "a merged adapter": lambda c: first_layer(c).self_attn.q_proj.weight.data.add_(1e-3),
    "an edited norm": lambda c: c.base.model.norm.weight.data[0].add_(1),
    "a row of the embedding": lambda c: c.base.model.embed_tokens.weight.data[5].mul_(2),
    "swapped layers": lambda c: c.base.model.layers.__setitem__(0, c.base.model.layers[1]),
    "resized embeddings": resize_embeddings,
    "the positions": lambda c: c.base.model.rotary_emb.inv_freq.mul_(0.5),
    "the config": lambda c: c.config.rope_parameters.update(rope_theta=1e6),
    "a window in the config": lambda c: setattr(c.config, "sliding_window", 2),
}
CHANGED_MODULES: dict[str, Callable[[Cascade], Any]] = {
    "an adapter in the base": lambda c: wrap(first_layer(c).self_attn, "q_proj"),
    "an adapter in the stage": lambda c: wrap(c.stages["s"].layers[0].mlp, "up_proj"),
    "an adapter on the head": lambda c: wrap(c.model("s").lm_head, "base"),
    "an adapter on the embedding": lambda c: setattr(c.model("s").model, "embed_tokens", nn.Sequential()),
    "another head": lambda c: setattr(
        c.model("s"), "lm_head", type(c.model("s").lm_head)(c.base.lm_head, [nn.Module()])
    ),
    "a parametrization": lambda c: parametrize.register_parametrization(
        first_layer(c).mlp.up_proj, "weight", Doubled()
    ),
    "a pruning mask": lambda c: prune.l1_unstructured(first_layer(c).mlp.up_proj, "weight", amount=2),
    "a hook": lambda c: first_layer(c).register_forward_hook(lambda module, args, output: output + 1),
    "a removed layer": lambda c: c.base.model.layers.__delitem__(1),
}


@pytest.mark.parametrize("change", [*CHANGED_VALUES, *CHANGED_MODULES])
def test_a_stage_is_not_saved_when_its_base_or_its_modules_were_changed_in_memory(
    change: str, saved_base: Callable[..., Path], tmp_path: Path
) -> None:
    cascade = open_cascade(saved_base)
    cascade.model("s")
    ({**CHANGED_VALUES, **CHANGED_MODULES}[change])(cascade)
    with pytest.raises((FamilyError, FingerprintError)):
        cascade.save_stage("s", tmp_path / "s")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("door", ["export_native", "export_peft", "push_to_hub", "fold", "compress_head"])
def test_every_way_to_save_a_stage_refuses_modules_that_are_not_the_familys(
    door: str, saved_base: Callable[..., Path], tmp_path: Path
) -> None:
    cascade = open_cascade(saved_base)
    wrap(cascade.model("s").model.layers[0].self_attn, "v_proj")
    argument = {"fold": "f", "compress_head": 4}.get(door, tmp_path / "out")
    arguments = ("me/s", "s") if door == "push_to_hub" else ("s", argument)
    with pytest.raises(FamilyError, match="v_proj"):
        getattr(cascade, door)(*arguments)
    assert not any(tmp_path.iterdir())


def test_a_tied_head_that_was_replaced_is_a_change(saved_base: Callable[..., Path], tmp_path: Path) -> None:
    cascade = open_cascade(saved_base, "qwen3-tied")
    untie_head(cascade)
    with pytest.raises(FingerprintError, match=r"lm_head\.weight"):
        cascade.save_stage("s", tmp_path / "s")


def test_a_base_without_files_may_change_until_its_fingerprint_is_taken(tmp_path: Path) -> None:
    cascade = Cascade(tiny_base()).add_stage(name="s", num_layers=1)
    cascade.base.model.norm.weight.data.add_(1)
    cascade.save_stage("s", tmp_path / "first")
    cascade.base.model.norm.weight.data.add_(1)
    with pytest.raises(FingerprintError):
        cascade.save_stage("s", tmp_path / "second")


def test_a_model_inside_an_adapter_or_with_adapters_is_no_base() -> None:
    model = tiny_base()
    wrap(model.model.layers[0].self_attn, "q_proj")
    with pytest.raises(FamilyError, match="q_proj"):
        Cascade(model)
    with pytest.raises(FamilyError, match="Sequential"):
        Cascade(nn.Sequential(tiny_base()))  # type: ignore[arg-type]


def observe(cascade: Cascade) -> None:
    first_layer(cascade).register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.base.to(torch.bfloat16),
        lambda c: c.base.half().float(),
        lambda c: c.base.double(),
        lambda c: c.base.model.layers.__setitem__(0, torch.compile(first_layer(c))),
        lambda c: c.base.set_attn_implementation("eager"),
        lambda c: c.model("s").enable_input_require_grads(),
        lambda c: c.base.enable_input_require_grads(),
        lambda c: setattr(c.config, "pad_token_id", 3),
        observe,
    ],
)
def test_what_changes_no_value_is_no_change(
    use: Callable[[Cascade], Any], saved_base: Callable[..., Path], tmp_path: Path
) -> None:
    cascade = open_cascade(saved_base)
    use(cascade)
    cascade.save_stage("s", tmp_path / "s")


@pytest.mark.parametrize("name", mostly_slow([*BASES, *STAGED], ["qwen3-tied"]))
def test_every_weight_of_every_family_is_compared(name: str, saved_base: Callable[..., Path]) -> None:
    cascade = Cascade.from_pretrained(saved_base(name)).add_stage(name="s", num_layers=1)
    cascade.model("s")(token_ids())
    cascade.check_unchanged("s")
    for _, weight in cascade.base.named_parameters():
        before = weight.detach().clone()
        weight.data.flatten()[-1] += 1
        assert not torch.equal(before, weight)
        with pytest.raises(FingerprintError):
            cascade.check_unchanged("s")
        weight.data.copy_(before)
    cascade.check_unchanged("s")


def test_a_changed_base_can_be_exported_and_the_card_tells_it(saved_base: Callable[..., Path], tmp_path: Path) -> None:
    cascade = open_cascade(saved_base)
    first_layer(cascade).self_attn.q_proj.weight.data.add_(0.1)
    cascade.export_native("s", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(exported(token_ids()).logits, cascade.model("s")(token_ids()).logits)
    assert "changed since it was opened" in (tmp_path / "out" / "README.md").read_text()


def test_a_stage_is_saved_with_a_warning_when_the_files_of_its_base_are_gone(tmp_path: Path) -> None:
    from poe.loaders.base import save_base_folder

    folder = save_base_folder(tiny_base(), tmp_path / "base", tiny_tokenizer())
    cascade = Cascade.from_pretrained(folder).add_stage(name="s", num_layers=1)
    assert cascade.base_source.fingerprint
    (folder / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="could not be compared"):
        cascade.save_stage("s", tmp_path / "s")


def test_adapters_of_peft_are_refused_until_they_are_merged(saved_base: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cascade = open_cascade(saved_base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(cascade.model("s"), config)
    for save in (cascade.save_stage, cascade.export_native):
        with pytest.raises(PoEError, match="q_proj"):
            save("s", tmp_path / "s")
    merged = model.merge_and_unload()
    cascade.export_native("s", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(exported(token_ids()).logits, merged(token_ids()).logits)
    with pytest.raises(FingerprintError):
        cascade.save_stage("s", tmp_path / "s")


def test_an_adapter_on_the_stage_alone_is_saved_once_it_is_merged(
    saved_base: Callable[..., Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    cascade = open_cascade(saved_base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], init_lora_weights=False)
    merged = peft.get_peft_model(cascade.model("s"), config).merge_and_unload()
    cascade.save_stage("s", tmp_path / "s", dtype=torch.float32)
    reopened = Cascade.from_pretrained(tmp_path / "s")
    assert torch.equal(reopened(token_ids()).logits, merged(token_ids()).logits)
