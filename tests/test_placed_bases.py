"""Bases with a device map: on a named device, or partly offloaded to the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import EXEMPLARS, every_value, scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.errors import FamilyError, FingerprintError
from poe.modeling.families import family_of
from poe.modeling.placement import device_of
from poe.modeling.recognition import recognize_family
from poe.training.reporting.progress import Progress
from poe.training.trainer import train_stage

# What of the base lies on the disk: parts by name, `layers` all of its layers. An output head that is tied follows its
# embedding. `device_map="auto"` puts the head there first, then the layers from the top.
MAPS = {
    "lower layer": {"layers.0": "disk"},
    "upper layer, norm": {"layers.1": "disk", "norm": "disk"},
    "upper layers, head": {"layers": "disk", "norm": "disk", "head": "disk", "embedding if tied": "disk"},
    "embedding": {"layers.0": "disk", "embedding": "disk", "head if tied": "disk"},
    "everything": {"": "disk"},
}


def device_map(base: PreTrainedModel, parts: dict[str, str]) -> dict[str, str]:
    """Return the device map of a family's own module names, in which all that `parts` does not name is on the CPU."""
    if "" in parts:
        return parts
    family = family_of(base)
    embedding = next(n for n, m in base.named_modules() if m is base.get_input_embeddings())
    tied = base.config.tie_word_embeddings
    backbone = family.backbone_of(base)
    places = {f"{family.backbone}.{name}": "cpu" for name, _ in backbone.named_parameters(recurse=False)}
    for name, _ in backbone.named_children():
        path = f"{family.backbone}.{name}"
        if name == family.layers.partition(".")[0]:
            for index in range(len(family.layers_of(base))):
                layer = f"{family.backbone}.{family.layers}.{index}"
                places[layer] = parts.get(f"layers.{index}", parts.get("layers", "cpu"))
        elif path == embedding:
            places[path] = parts.get("embedding", parts.get("embedding if tied", "cpu") if tied else "cpu")
        else:
            places[path] = parts.get("norm", "cpu") if name == family.norm else "cpu"
    places[family.head] = parts.get("head", parts.get("head if tied", "cpu") if tied else "cpu")
    return places


def options(folder: Path, where: str, tmp_path: Path) -> dict[str, Any]:
    """Return the keywords that open a base with the parts that `where` names on the disk."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    recognize_family(base)
    return {"device_map": device_map(base, MAPS[where]), "offload_folder": tmp_path / "offload"}


@pytest.mark.parametrize(("base_name", "where"), every_value(EXEMPLARS, MAPS))
def test_a_stage_on_an_offloaded_base_gives_the_same_results(
    base_name: str, where: str, saved_base, tmp_path: Path
) -> None:
    folder = saved_base(base_name)
    placed = options(folder, where, tmp_path)
    plain, cascade = Cascade.from_pretrained(folder), Cascade.from_pretrained(folder, **placed)
    assert any(p.device.type == "meta" for p in cascade.base.parameters())
    assert cascade.base_source.fingerprint == plain.base_source.fingerprint
    assert "partly offloaded" in repr(cascade)
    assert "offloaded" not in repr(plain)
    ids, before = token_ids(), plain(token_ids()).logits
    for each in (plain, cascade):
        each.add_stage(StageConfig("t", 2, head_rank=4))
        assert torch.equal(each(ids).logits, before)
        learn(each, ids)
    assert {p.device.type for p in cascade.stages["t"].parameters()} == {"cpu"}
    for mine, theirs in zip(cascade.stages["t"].parameters(), plain.stages["t"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    after = plain(ids).logits
    assert not torch.equal(after, before)
    assert torch.equal(cascade(ids).logits, after)
    assert torch.equal(cascade(ids, stage=None).logits, before)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = plain.generate(input_ids=ids, **greedy)
    assert torch.equal(cascade.generate(input_ids=ids, **greedy), tokens)
    saved = cascade.save_stage("t", tmp_path / "t", dtype=torch.float32)
    assert torch.equal(Cascade.from_pretrained(saved, **placed)(ids).logits, after)
    door = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, **placed)
    assert torch.equal(door(ids).logits, after)
    assert torch.equal(door.generate(input_ids=ids, **greedy), tokens)


def learn(cascade: Cascade, ids: torch.Tensor) -> None:
    """Take one optimizer step on the active stage."""
    model, stage = cascade.model(cascade.active).train(), cascade.stages[cascade.active]
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_of_one_device_changes_nothing(place, saved_base, tmp_path: Path) -> None:
    folder = saved_base("qwen3-tied")
    cascade = Cascade.from_pretrained(folder, device_map=place).add_stage(StageConfig("t", 1))
    assert torch.equal(cascade(token_ids()).logits, Cascade.from_pretrained(folder)(token_ids()).logits)
    cascade.export_native("t", tmp_path / "out")


@pytest.mark.slow
def test_the_trainer_trains_on_an_offloaded_base(tmp_path: Path) -> None:
    def trained(out: str, **placed: Any) -> dict[str, torch.Tensor]:
        cascade = Cascade.from_pretrained("demo", **placed)
        length = {"seq_len": 512, "tokens_per_step": 1024, "max_steps": 2, "validation_ratio": 0.1, "num_layers": 1}
        run = train_stage(cascade, "demo", "demo=120", tmp_path / out, progress=Progress("test", quiet=True), **length)
        return load_file(run.folder / "delta.safetensors")

    there = trained("there", device_map=device_map(Cascade.from_pretrained("demo").base, MAPS["embedding"]))
    here = trained("here")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_an_offloaded_weight_that_changed_is_noticed(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama"), **options(saved_base("llama"), "lower layer", tmp_path))
    cascade.check_unchanged()
    projection = cascade.base.model.layers[0].mlp.up_proj
    hook = projection._hf_hook
    changed = {"weight": hook.weights_map["weight"] + 1}
    hook.weights_map = changed
    with pytest.raises(FingerprintError, match=r"layers\.0\.mlp\.up_proj\.weight is not what it was"):
        cascade.check_unchanged()


def test_operations_that_need_the_base_in_memory_are_refused(saved_base, tmp_path: Path) -> None:
    folder = saved_base("qwen3")
    placed = options(folder, "upper layers, head", tmp_path)
    cascade = Cascade.from_pretrained(folder, **placed).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    with pytest.raises(FamilyError, match="offloaded"):
        cascade.export_native("t", tmp_path / "out")
    before = cascade(token_ids()).logits
    assert torch.equal(cascade.fold("t")(token_ids()).logits, before)  # touches the stages alone, so does:
    assert cascade.compress_head("t", 2).parameters_after < cascade.base.lm_head.weight.numel()
    stranger = Cascade(AutoModelForCausalLM.from_pretrained(folder, **placed))
    with pytest.raises(FingerprintError, match="offloaded and was not opened by Cascade"):
        _ = stranger.base_source
    with pytest.raises(FamilyError, match=r"head is offloaded.*Cascade\.from_pretrained"):
        stranger.add_stage(StageConfig("t", 1))


def test_the_device_of_an_offloaded_module() -> None:
    class Hook:
        execution_device = torch.device("cuda", 0)

    layer = tiny_base().model.layers[0].to("meta")
    assert device_of(layer) == torch.device("cpu")  # offloaded, and no attribute has its execution device
    layer.self_attn.q_proj._hf_hook = Hook()
    assert device_of(layer) == torch.device("cuda", 0)
