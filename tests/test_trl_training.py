"""Training a stage with TRL: the base stays frozen, and the trainer saves the stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from conftest import VOCABULARY, render_one, scramble, tiny_base
from poe import Cascade, StageConfig
from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.export import export
from poe.data.readers import demo
from poe.data.render import Renderer
from poe.errors import TrainingError
from poe.modeling.fingerprint import fingerprint_tensors
from poe.training.trl import SaveDelta

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_with_trl.py"


def cascade_with_stage(base: Path, head: str = "low_rank") -> Cascade:
    return Cascade.from_pretrained(base).add_stage(StageConfig("s", num_layers=1, head=head, head_rank=4))


def rows(count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, 12), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer(cascade: Cascade, folder: Path, *callbacks: TrainerCallback, **options) -> SFTTrainer:
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    return SFTTrainer(
        model=cascade.model("s"),
        args=SFTConfig(str(folder), **settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        processing_class=cascade.tokenizer,
        callbacks=[SaveDelta(cascade, "s"), *callbacks],
    )


class Gradients(TrainerCallback):
    """Records the names of the parameters that had a gradient at any step."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.seen |= {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3-tied", "poe", "gemma3-tied"])
def test_only_the_stage_has_gradients_and_the_base_is_unchanged(
    saved_base, tmp_path: Path, name: str, checkpointing: bool
) -> None:
    cascade = cascade_with_stage(saved_base(name))
    base, stage = (fingerprint_tensors(part.state_dict()) for part in (cascade.base, cascade.stages["s"]))
    own = {id(p) for p in cascade.stages["s"].parameters()}
    gradients = Gradients()
    run = trainer(cascade, tmp_path / "out", gradients, gradient_checkpointing=checkpointing)
    run.train()
    assert gradients.seen == {n for n, p in cascade.model("s").named_parameters() if id(p) in own}
    assert fingerprint_tensors(cascade.base.state_dict()) == base
    assert fingerprint_tensors(cascade.stages["s"].state_dict()) != stage


def test_checkpoints_and_result_are_stage_folders(saved_base, tmp_path: Path) -> None:
    cascade = cascade_with_stage(saved_base())
    trainer(cascade, tmp_path / "out").train()
    ids = torch.arange(3, 12)[None]
    logits = {}
    for folder, steps in (("checkpoint-2", 2), ("checkpoint-4", 4), ("", 4)):
        logits[folder] = Cascade.from_pretrained(tmp_path / "out" / folder / "s")(ids).logits
        record = json.loads((tmp_path / "out" / folder / "s" / "training.json").read_text())
        assert record["steps"] == steps
    assert torch.equal(logits[""], logits["checkpoint-4"])
    assert not torch.equal(logits[""], logits["checkpoint-2"])
    assert torch.allclose(logits[""], cascade(ids).logits, atol=0.05)  # the delta is stored in bf16
    base = sum(p.numel() for p in cascade.base.parameters())
    for path in (tmp_path / "out").rglob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        assert numbers == cascade.stages["s"].num_parameters() < base
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.safetensors")) == [
        *["delta.safetensors"] * 3,
        *["model.safetensors"] * 2,  # of the two checkpoints
    ]


def test_save_model_writes_the_stage_and_export_native_the_model(saved_base, tmp_path: Path) -> None:
    cascade = cascade_with_stage(saved_base())
    run = trainer(cascade, tmp_path / "out")
    scramble(cascade.stages["s"], seed=1)
    run.save_model(str(tmp_path / "stage"))
    assert (tmp_path / "stage" / "s" / "delta.safetensors").is_file()
    assert not list((tmp_path / "stage").rglob("model.safetensors"))
    cascade.export_native("s", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_trainer_resumes_exactly(saved_base, tmp_path: Path) -> None:
    whole = cascade_with_stage(saved_base(), head="dense")
    trainer(whole, tmp_path / "a").train()
    resumed = cascade_with_stage(saved_base(), head="dense")
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in whole.stages["s"].state_dict().items():
        assert torch.equal(tensor, resumed.stages["s"].state_dict()[name]), name


def test_best_checkpoint_is_loaded_before_the_stage_is_saved(saved_base, tmp_path: Path) -> None:
    cascade = cascade_with_stage(saved_base())
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}
    run = trainer(cascade, tmp_path / "out", **options, max_steps=6)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != 6, "a rate this high was to make the last step worse than an earlier one"
    ours, kept = (tmp_path / "out" / folder / "s" / "delta.safetensors" for folder in ("", f"checkpoint-{best}"))
    assert ours.read_bytes() == kept.read_bytes()


def test_trainer_of_another_model_is_refused_before_training(saved_base, tmp_path: Path) -> None:
    cascade = cascade_with_stage(saved_base())
    with pytest.raises(TrainingError, match=r"expected model=cascade.model\('s'\)"):
        SFTTrainer(
            model=tiny_base(),
            args=SFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none"),
            train_dataset=rows(),
            processing_class=cascade.tokenizer,
            callbacks=[SaveDelta(cascade, "s")],
        )


def test_push_to_hub_of_the_trainer_is_refused(saved_base, tmp_path: Path) -> None:
    cascade = cascade_with_stage(saved_base())
    args = SFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, push_to_hub=True)
    with pytest.raises(TrainingError, match=r"cascade\.push_to_hub"):
        SaveDelta(cascade, "s").on_init_end(args, TrainerState(), TrainerControl(), cascade.model("s"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Conversation]]:
    """Return the rows that `poe data export` writes, and their conversations."""
    conversations = list(demo.read("40", DropReport()))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    export(conversations, path)
    return path, conversations


def test_trl_reads_exported_rows_with_the_same_labels(exported, tmp_path: Path) -> None:
    path, conversations = exported
    cascade = Cascade.from_pretrained("demo", dtype="float32").add_stage(StageConfig("tool", num_layers=1, head="none"))
    run = SFTTrainer(
        model=cascade.model("tool"),
        args=SFTConfig(str(tmp_path), assistant_only_loss=True, bf16=False, max_length=None, report_to="none"),
        train_dataset=Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")),
        processing_class=cascade.tokenizer,
    )
    renderer = Renderer(cascade.tokenizer)
    for conversation, theirs in zip(conversations, run.train_dataset, strict=True):
        ours = render_one(renderer, conversation)
        assert theirs["input_ids"] == ours.input_ids
        assert [label != -100 for label in theirs["labels"]] == ours.loss_mask


@pytest.mark.slow
def test_trl_example_trains_on_exported_rows(exported, tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLE), str(exported[0]), str(tmp_path / "out"), "--steps", "4"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert Cascade.from_pretrained(tmp_path / "out" / "tool").active == "tool"
    assert not list((tmp_path / "out").glob("model*"))
