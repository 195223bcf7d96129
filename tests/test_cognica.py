"""Stages in the layout of the published releases. Their files are not here: the fixture writes our own in it.

As their card has it: the stage's matrices under nanochat's names and the numbers they have above the base,
`lm_head_stage`, a surplus copy of the base's head, and two vectors with the scalars of all layers.
"""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from command_line import run_program
from conftest import scramble
from poe import Cascade, StageConfig
from poe.errors import FamilyError, FingerprintError, SourceError
from poe.loaders.nanochat import swap_halves
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

IDS = torch.tensor([[1, 5, 9, 13, 17, 21]])
THEIRS = {
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "self_attn.value_gate": "attn.ve_gate",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with scalars, value embeddings and a sliding window, as theirs has."""
    torch.manual_seed(0)
    config = PoEConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        layer_scalars=True,
        value_embedding_layers=[1, 3],
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        sliding_window=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = PoEForCausalLM(config).eval()
    scramble(model)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_their_layout(cascade: Cascade, name: str, whole: bool = False) -> dict[str, Tensor]:
    """Write a stage as they do; `whole` adds all of the base, as a nanochat checkpoint has it."""
    stage, model = cascade.stages[name], cascade.model(name)
    written = {"lm_head.weight": cascade.base.lm_head.weight, "lm_head_stage.weight": stage.head.weight}
    for vector, scalar in (("resid_lambdas", "resid_scale"), ("x0_lambdas", "first_scale")):
        written[vector] = torch.cat([getattr(layer, scalar) for layer in model.model.layers])
    for index, layer in enumerate(model.model.layers):
        if index < stage.below and not whole:
            continue
        for tensor_name, tensor in layer.named_parameters():
            module = tensor_name.removesuffix(".weight")
            if module in THEIRS:
                tensor = swap_halves(tensor, 8) if module.endswith(("q_proj", "k_proj")) else tensor
                written[f"transformer.h.{index}.{THEIRS[module]}.weight"] = tensor
            elif module == "self_attn.value_embed":
                written[f"value_embeds.{index}.weight"] = tensor
    if whole:
        written["transformer.wte.weight"] = torch.cat([model.model.embed_tokens.weight, torch.zeros(3, 32)])
    return {key: value.detach().clone().contiguous() for key, value in written.items()}


def trained(base: Path, name: str = "tool", cascade: Cascade | None = None) -> Cascade:
    cascade = cascade or Cascade.from_pretrained(base)
    cascade.add_stage(StageConfig(name, 2, parent=cascade.active))
    scramble(cascade.stages[name], seed=len(name))
    return cascade


@pytest.mark.parametrize("whole", [False, True], ids=["release", "checkpoint"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_imported_stage_gives_the_same_logits(base, whole: bool, suffix: str, tmp_path: Path) -> None:
    original = trained(base)
    (tmp_path / "theirs").mkdir()
    tensors = in_their_layout(original, "tool", whole)
    if not whole:
        assert len(tensors) == 2 * 6 + 4  # their count for two layers; for four it is 28
    if suffix == "pt":
        torch.save({f"_orig_mod.{name}": t for name, t in tensors.items()}, tmp_path / "theirs" / "model_000100.pt")
    else:
        save_file(tensors, tmp_path / "theirs" / "stage.safetensors")
    (tmp_path / "theirs" / "tokenizer.pkl").write_bytes(pickle.dumps({"never": "opened"}))
    imported = Cascade.from_pretrained(base).import_stage(tmp_path / "theirs", "tool")
    imported.save_stage("tool", tmp_path / "ours", dtype=torch.float32)
    again = Cascade.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = original(input_ids=IDS).logits
        assert torch.equal(imported(input_ids=IDS).logits, expected)
        assert torch.equal(again(input_ids=IDS).logits, expected)
    trained_numbers = sum(t.numel() for t in original.stages["tool"].parameters())
    assert sum(t.numel() for t in again.stages["tool"].parameters()) == trained_numbers


def test_a_child_is_imported_on_its_parent(base, tmp_path: Path) -> None:
    original = trained(base, "child", trained(base))
    (tmp_path / "theirs").mkdir()
    save_file(in_their_layout(original, "child"), tmp_path / "theirs" / "child.safetensors")
    imported = Cascade.from_pretrained(base).add_stage(original.stages["tool"].config)
    imported.stages["tool"].load_delta(original.stages["tool"].delta_state_dict())
    imported.import_stage(tmp_path / "theirs", "child")
    with torch.no_grad():
        assert torch.equal(imported(input_ids=IDS).logits, original(input_ids=IDS).logits)


def change_scalar(tensors: dict[str, Tensor]) -> None:
    tensors["resid_lambdas"][0] += 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.update({"transformer.h.4.attn.c_gate.weight": torch.ones(2, 2)}), SourceError, "c_gate"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}), FingerprintError, "lm_head"),
        (change_scalar, FingerprintError, "resid_scale"),
        (lambda t: t.pop("transformer.h.5.mlp.c_fc.weight"), ValueError, "missing"),
        (lambda t: t.update({"smear_lambda": torch.ones(1)}), SourceError, "smear"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("transformer")], SourceError, "from 4"),
    ],
    ids=["unknown name", "other head", "other scalars", "missing matrix", "other architecture", "no layers"],
)
def test_files_that_do_not_fit_are_refused_and_leave_nothing(base, change, error, message: str, tmp_path: Path) -> None:
    tensors = in_their_layout(trained(base), "tool")
    change(tensors)
    (tmp_path / "theirs").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs" / "stage.safetensors")
    cascade = Cascade.from_pretrained(base)
    with pytest.raises(error, match=message):
        cascade.import_stage(tmp_path / "theirs", "tool")
    assert not cascade.stages
    assert cascade.active is None


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_checkpoint_with_other_objects_is_refused(base, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    torch.save({"lm_head.weight": Bomb()}, tmp_path / "theirs" / "model_000001.pt")
    with pytest.raises(SourceError, match="only tensors"):
        Cascade.from_pretrained(base).import_stage(tmp_path / "theirs", "tool")
    assert not (tmp_path / "exploded").exists()


def test_imported_stages_need_a_poe_base(saved_base, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="PoE"):
        Cascade.from_pretrained(saved_base("qwen3")).import_stage(tmp_path, "tool")


def test_the_command_writes_a_folder_that_loads(base, tmp_path: Path) -> None:
    original = trained(base)
    (tmp_path / "theirs").mkdir()
    save_file(in_their_layout(original, "tool"), tmp_path / "theirs" / "stage.safetensors")
    folders = (tmp_path / "theirs", tmp_path / "ours")
    done = run_program("poe", "import", "cognica", *folders, "--base", base, "--name", "tool")
    assert done.returncode == 0, done.stderr
    assert f"{original.stages['tool'].num_parameters():,} parameters" in done.stdout
    assert Cascade.from_pretrained(tmp_path / "ours").active == "tool"
