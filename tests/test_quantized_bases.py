"""A base in 8 or 4 bits keeps its quantized weights; the stage is plain, learns, and is saved separately."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from conftest import BASES, scramble, tiny_base, tiny_model, tiny_tokenizer, token_ids
from poe import Cascade, StageConfig
from poe.errors import FamilyError, FingerprintError, SourceError
from poe.loaders.base import save_base_folder
from poe.modeling.heads import FoldedHead
from poe.modeling.placement import quantization_of
from poe.training.reporting.progress import Progress
from poe.training.trainer import train_stage


def torchao_int8() -> TorchAoConfig:
    """8 bit weights, activations as they are."""
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    """4 bit weights in the layout that needs no kernel of its own."""
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))


def bitsandbytes_8bit() -> BitsAndBytesConfig:
    """LLM.int8(), which rounds activations as well."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4bit() -> BitsAndBytesConfig:
    """NF4 with quantized scales."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


HOW = pytest.mark.parametrize("how", [torchao_int8, torchao_int4, bitsandbytes_8bit, bitsandbytes_4bit])


@pytest.fixture
def folder(flat_name: str, tmp_path: Path) -> Path:
    """A base in bf16 whose matrices are as wide as the 4 bit kernels ask for."""
    return wide_base(flat_name, tmp_path)


def wide_base(name: str, tmp_path: Path) -> Path:
    """Write a base of two layers and width 64 in bf16."""
    model_type, fields = BASES[name]
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    wide |= {"head_dim": 16} if "head_dim" in fields else {}
    model = tiny_model(model_type, {**fields, **wide}, torch.bfloat16)
    return save_base_folder(model, tmp_path / "base", tiny_tokenizer(name))


def held(tensor: Any) -> bytes:
    """Return the bytes of a tensor, or of all those in which a quantized one is held."""
    if hasattr(tensor, "__tensor_flatten__"):
        return b"".join(held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def digests(base: PreTrainedModel) -> dict[str, str]:
    """Return a hash of every parameter's and buffer's bytes."""
    tensors = [*base.named_parameters(), *base.named_buffers()]
    return {name: hashlib.sha256(held(tensor)).hexdigest() for name, tensor in tensors}


def learn(cascade: Cascade, ids: torch.Tensor) -> None:
    """Take two optimizer steps on the active stage."""
    model, stage = cascade.model(cascade.active).train(), cascade.stages[cascade.active]
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.02)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_weights_that_a_quantizer_does_not_read_are_refused(tmp_path: Path) -> None:
    """Of a fused matrix that it quantizes, transformers 5.23 reads one part and fills the rest with random numbers."""
    with pytest.raises(SourceError, match=r"incomplete: 16 tensors.*without quantization_config"):
        Cascade.from_pretrained(wide_base("hrm", tmp_path), quantization_config=torchao_int8())


@HOW
def test_a_stage_on_a_quantized_base(folder: Path, how: Callable, tmp_path: Path) -> None:
    cascade, ids = Cascade.from_pretrained(folder, quantization_config=how()), token_ids()
    named = cascade.base_source.fingerprint
    assert named == Cascade.from_pretrained(folder).base_source.fingerprint
    before = cascade(ids).logits  # the first forward pass: 4 bit weights of bitsandbytes are repacked for the CPU now
    weights = digests(cascade.base)
    cascade.add_stage(StageConfig("t", 2, head_rank=4))
    stage = cascade.stages["t"]
    assert {(type(p), p.dtype) for p in stage.parameters()} == {(nn.Parameter, torch.bfloat16)}
    linear = {type(m) for m in stage.modules() if "Linear" in type(m).__name__}
    assert linear == {nn.Linear}
    assert torch.equal(cascade(ids).logits, before)
    learn(cascade, ids)
    after = cascade(ids).logits
    assert not torch.equal(after, before)
    assert torch.equal(cascade(ids, stage=None).logits, before)
    assert digests(cascade.base) == weights
    saved = cascade.save_stage("t", tmp_path / "t")
    assert torch.equal(Cascade.from_pretrained(saved, quantization_config=how())(ids).logits, after)
    door = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, quantization_config=how())
    with torch.no_grad():  # with a graph below, bitsandbytes computes in another order
        assert torch.equal(door(ids).logits, after)
    assert Cascade.from_pretrained(saved).base_source.fingerprint == named  # the same stage, on the base as it was


@HOW
def test_stages_are_folded_and_compressed_but_never_merged(how: Callable, tmp_path: Path) -> None:
    cascade, ids = Cascade.from_pretrained(wide_base("qwen3", tmp_path), quantization_config=how()), token_ids()
    cascade(ids)
    weights = digests(cascade.base)
    for name, parent in (("a", None), ("b", "a")):
        cascade.add_stage(StageConfig(name, 1, head_rank=4, parent=parent))
        scramble(cascade.stages[name], seed=1)
    with pytest.raises(FamilyError, match=r"quantized \((torchao|bitsandbytes), \w+\).*on the base in floating"):
        cascade.export_native("b", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = cascade(ids).logits
    assert torch.allclose(cascade.fold("b")(ids).logits, expected, rtol=0.05, atol=0.05)
    cascade.compress_head("b-folded", 2)
    assert digests(cascade.base) == weights


@HOW
def test_a_quantized_folder_is_a_different_base(how: Callable, tmp_path: Path) -> None:
    original = wide_base("qwen3-tied", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(original, quantization_config=how())
    base.save_pretrained(tmp_path / "small")
    cascade, ids = Cascade.from_pretrained(tmp_path / "small").add_stage(StageConfig("t", 1)), token_ids()
    scramble(cascade.stages["t"], scale=0.05)
    saved = cascade.save_stage("t", tmp_path / "t")
    assert torch.equal(Cascade.from_pretrained(saved)(ids).logits, cascade(ids).logits)
    with pytest.raises(FingerprintError, match="Wrong base"):
        Cascade.from_pretrained(saved, base=original)


@HOW
def test_remote_code_gives_an_ordinary_quantized_model(how: Callable, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(wide_base("qwen3-tied", tmp_path)).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"], scale=0.05)
    saved = cascade.save_stage("t", tmp_path / "t")
    door = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, quantization_config=how())
    door.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(again(token_ids()).logits, door(token_ids()).logits)
    assert all(type(m) is nn.Linear for m in again.model.layers[2].modules() if "Linear" in type(m).__name__)


@HOW
def test_the_summary_shows_quantization_and_counts_stored_bytes(how: Callable, tmp_path: Path) -> None:
    folder = wide_base("llama", tmp_path)
    plain, small = (
        repr(Cascade.from_pretrained(folder, **options)).splitlines()[1]
        for options in ({}, {"quantization_config": how()})
    )
    assert "quantized (" in small
    assert "quantized" not in plain
    *_, numbers, _, size, unit = plain.split()
    *_, same_numbers, _, less, same_unit = small.split()
    assert (numbers, unit) == (same_numbers, same_unit)
    assert float(less) < 0.7 * float(size)


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    how = torchao_int8()
    how.modules_to_not_convert = []
    cascade = Cascade.from_pretrained(wide_base("qwen3", tmp_path), quantization_config=how)
    with pytest.raises(FamilyError, match=r"output head must be a plain .*Int8Tensor.*exclude it from quant"):
        cascade.add_stage(StageConfig("t", 1))
    assert not cascade.stages


def test_the_trainer_trains_beside_quantized_weights(tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained("demo", quantization_config=torchao_int8())
    weights = digests(cascade.base)
    length = {"seq_len": 512, "tokens_per_step": 1024, "max_steps": 2, "validation_ratio": 0.1, "num_layers": 1}
    run = train_stage(cascade, "demo", "demo=120", tmp_path / "out", progress=Progress("test", quiet=True), **length)
    assert digests(cascade.base) == weights
    written = load_file(run.folder / "delta.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in written.items() if name.endswith("proj.weight"))
    assert quantization_of(Cascade.from_pretrained(run.folder).base) is None


class Packed(torch.Tensor):
    """A tensor subclass that claims to be in floating point, as torchao's are."""


def test_weights_that_only_look_plain_are_recognized() -> None:
    base = tiny_base()
    assert quantization_of(base) is None
    pretender = nn.Linear(4, 4)
    pretender.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Packed))
    with pytest.raises(FamilyError, match="with Packed"):
        FoldedHead(pretender, [])
    narrow = nn.Linear(4, 4, bias=False)
    narrow.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(FamilyError, match="floating point"):
        FoldedHead(narrow, [])
    for odd in (pretender, narrow):
        changed = copy.deepcopy(base)
        changed.model.layers[0].mlp.up_proj = odd
        with pytest.raises(FingerprintError, match="quantized and was not opened"):
            _ = Cascade(changed).base_source
