"""Low-rank forks become PEFT's LoRA adapters and back, and PEFT computes the same numbers with them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from command_line import run_program
from conftest import scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.errors import FamilyError, SourceError
from poe.loaders.peft import read_peft

NAMES = ["llama", "qwen3-tied", "gemma2", "phi3", "olmo2", "poe", "phi"]


def forked(name: str, active: str = "all", attach_at: int = 1, dtype: torch.dtype = torch.float32) -> Cascade:
    cascade = Cascade(tiny_base(name, dtype))
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=attach_at, rank=4, active=active, head="none"))
    scramble(cascade.stages["f"], seed=1)
    return cascade


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attach_at", [0, 1])
def test_an_adapter_comes_back_as_the_same_fork(name: str, attach_at: int, tmp_path: Path) -> None:
    cascade = forked(name, attach_at=attach_at)
    cascade.export_peft("f", tmp_path / "adapter")
    cascade.import_stage(tmp_path / "adapter", "again")
    assert torch.equal(cascade(token_ids(), stage="again").logits, cascade(token_ids(), stage="f").logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("active", ["all", "answer"])
def test_peft_computes_the_same_loss_and_gradients(name: str, active: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cascade = forked(name, active, dtype=torch.float64)
    stage, ids = cascade.stages["f"].requires_grad_(True), token_ids()
    ids[:, 4] = 60  # the prompt's last token, as it stands nowhere else
    ids[:, 5:] = ids[:, 5:] % 59
    ids[:, :4] = ids[:, :4] % 59
    stage.saved_dtype = torch.float64
    cascade.export_peft("f", tmp_path / "adapter", invocation_tokens=[60] if active == "answer" else None)
    theirs = peft.PeftModel.from_pretrained(
        tiny_base(name, torch.float64), tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False
    )
    labels = ids.clone()
    labels[:, :5] = -100
    ours = cascade(input_ids=ids, labels=labels)
    expected = theirs(input_ids=ids, labels=labels)
    begin = 4 if active == "answer" else 0
    torch.testing.assert_close(ours.logits[:, begin:], expected.logits[:, begin:], rtol=1e-6, atol=1e-6)
    ours.loss.backward()
    expected.loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(stage.parameters()))
    for path, parameter in stage.named_parameters():
        _, index, rest = path.split(".", 2)
        module, _, factor = rest.rpartition(".")
        end = f"layers.{int(index) + 1}.{module}.lora_{factor.upper()}.weight"
        found = next(gradient for n, gradient in gradients.items() if n.endswith(end))
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-7)


def test_alpha_scales_an_imported_adapter(tmp_path: Path) -> None:
    cascade = forked("llama")
    folder = cascade.export_peft("f", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    before = read_peft(folder, cascade.base, "x")[1]
    for change, scale in (({"lora_alpha": 12}, 3.0), ({"use_rslora": True, "lora_alpha": 4}, 2.0)):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        after = read_peft(folder, cascade.base, "x")[1]
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor * (scale if name.endswith(".b") else 1.0))


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    cascade = forked("llama")
    cascade.add_stage(StageConfig("new", 1)).add_stage(StageConfig("full", layers="fork", attach_at=1, rank=None))
    for name in ("new", "full"):
        with pytest.raises(FamilyError, match="cannot be a LoRA adapter"):
            cascade.export_peft(name, tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "expected peft_type 'LORA'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 3}, "has rank 4, expected 3"),
        ({"r": "many"}, "positive whole number"),
    ],
)
def test_what_no_fork_can_compute_is_refused(change: dict, match: str, tmp_path: Path) -> None:
    cascade = forked("llama")
    folder = cascade.export_peft("f", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError, match=match):
        read_peft(folder, cascade.base, "x")


def test_tensors_that_are_no_factors_are_refused(tmp_path: Path) -> None:
    cascade = forked("llama")
    folder = cascade.export_peft("f", tmp_path / "adapter")
    save_file({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"lm_head\.weight"):
        read_peft(folder, cascade.base, "x")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(SourceError, match="Other formats are not opened"):
        read_peft(folder, cascade.base, "x")


def test_the_commands_export_and_import_an_adapter(saved_base: Callable, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("qwen3"))
    for name, active in (("all", "all"), ("answer", "answer")):
        cascade.add_stage(StageConfig(name, layers="fork", attach_at=1, rank=4, active=active, head="none"))
        scramble(cascade.stages[name], seed=1)
        cascade.save_stage(name, tmp_path / name)
        words = () if active == "all" else ("--invocation", "w7")
        done = run_program("poe", "export", tmp_path / name, "--peft", tmp_path / f"{name}-peft", *words)
        assert done.returncode == 0, done.stderr
        config = json.loads((tmp_path / f"{name}-peft" / "adapter_config.json").read_text())
        assert config.get("alora_invocation_tokens") == (None if active == "all" else cascade.tokenizer("w7").input_ids)
        folders = (tmp_path / f"{name}-peft", tmp_path / f"{name}-again")
        done = run_program("poe", "import", "peft", *folders, "--base", saved_base("qwen3"), "--name", name)
        assert done.returncode == 0, done.stderr
        assert f"active on {active}" in done.stdout
        again, saved = (Cascade.from_pretrained(tmp_path / folder) for folder in (f"{name}-again", name))
        assert again.stages[name].config == saved.stages[name].config
        assert torch.equal(again(token_ids()).logits, saved(token_ids()).logits)


def test_the_export_command_asks_before_an_answer_fork_acts_on_all_tokens(saved_base: Callable, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("qwen3"))
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, active="answer", head="none"))
    stage = cascade.save_stage("f", tmp_path / "f")
    for kind in ("--native", "--peft"):
        done = run_program("poe", "export", stage, kind, tmp_path / kind)
        assert done.returncode == 1
        assert "--all-tokens" in done.stderr
        assert not (tmp_path / kind).exists()
        done = run_program("poe", "export", stage, kind, tmp_path / kind, "--all-tokens")
        assert done.returncode == 0, done.stderr
    assert "alora_invocation_tokens" not in json.loads((tmp_path / "--peft" / "adapter_config.json").read_text())
    for words in ((), ("--native", "a", "--peft", "b"), ("--native", "a", "--invocation", "w7")):
        assert run_program("poe", "export", stage, *words, cwd=tmp_path).returncode == 2


def test_an_adapter_is_not_imported_on_a_stage(saved_base: Callable, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("qwen3"))
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, head="none"))
    stage, adapter = cascade.save_stage("f", tmp_path / "f"), cascade.export_peft("f", tmp_path / "adapter")
    done = run_program("poe", "import", "peft", adapter, tmp_path / "out", "--base", stage)
    assert done.returncode == 1
    assert "expected a base" in done.stderr
