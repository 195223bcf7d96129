"""The model card has the recorded results, valid metadata, and no broken links."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import scramble, tiny_tokenizer
from poe import Cascade, StageConfig
from poe.errors import StageError, escape_controls
from poe.loaders.card import example_prompt, non_commercial, notice, stage_card
from poe.loaders.hub import plan_upload, upload

ROOT = Path(__file__).parents[1]
CONFIG = {
    "stage": {"name": "tool", "num_layers": 4, "head": "low_rank", "head_rank": 64},
    "parent": None,
    "base": {"repo": "me/base", "revision": "c0ffee", "fingerprint": "f" * 64},
    "base_config": {"model_type": "qwen3"},
    "prompt": {"name": "chat_template", "version": "123456789abc", "stop": ["<|im_end|>"]},
}
TRAINING = {
    "license": "apache-2.0",
    "recipe": {"name": "tool", "lr": 0.02},
    "data": {
        "seq_len": 2048,
        "sources": {
            "glaive": {"hub_id": "x/glaive", "license": "Apache-2.0", "conversations": 1000, "epochs": 4},
            "own": {"hub_id": None, "license": None, "conversations": 5, "epochs": 1},
        },
        "rows": {"glaive": {"read": 1234, "kept": 1000, "dropped": {"cannot be parsed": 234}}},
    },
    "steps": 380,
    "tokens": 3112960,
    "seconds": 277.2,
    "environment": {"device": "a processor", "versions": {"torch": "2.13.0"}},
    "trajectory": [{"step": 0, "val_bpb": 2.2194}, {"step": 380, "val_bpb": 0.05993}],
    "val_bpb": 0.05993467,
    "evaluation": {
        "new values": {
            "base": {"rows": 150, "exact": 0.0, "names": 0.0, "valid": 0.0, "abstained": None},
            "stage": {"rows": 150, "exact": 0.6333, "names": 0.86, "valid": 0.7533, "abstained": None},
        },
        "no tool fits": {"stage": {"rows": 150, "exact": None, "names": None, "valid": None, "abstained": 0.76}},
    },
}


def card(training: dict = TRAINING, **changes) -> str:
    return stage_card({**CONFIG, **changes}, training, parameters=1_234_567, repo="me/tool", example="<user>hello")


def test_a_fork_is_described_as_changes_of_layers() -> None:
    fork = {"name": "tool", "num_layers": 13, "attach_at": 17, "head": "none", "head_rank": None, "layers": "fork"}
    text = card(stage={**fork, "rank": 16, "active": "answer"})
    assert "changes (rank 16) of 13 layers from 17 up, active on the answer alone" in text
    assert "deeper" not in text
    assert "--native out --all-tokens" in text
    assert "full rank" in (text := card(stage={**fork, "rank": None, "active": "all"}))
    assert "--all-tokens" not in text
    assert "4 new decoder layers" in card()


def test_the_front_matter_reads_back() -> None:
    content = ModelCard(card())
    data = content.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("me/base", "adapter", "transformers")
    assert (data.license, data.datasets, data.model_name) == ("apache-2.0", ["x/glaive"], "tool")
    got = {(result.dataset_name, result.metric_name): result.metric_value for result in data.eval_results}
    assert got == {
        ("new values", "exact calls"): 0.6333,
        ("new values", "right tools"): 0.86,
        ("new values", "valid calls"): 0.7533,
        ("no tool fits", "right abstention"): 0.76,
        ("validation rows", "bits per byte"): 0.059935,
    }
    assert ModelCard(str(content)).data.to_dict() == data.to_dict()
    assert "<!--" not in content.text


def test_the_card_has_the_recorded_results() -> None:
    text = card()
    for part in (
        "1,234,567 parameters",
        "lr: 0.02",
        "| glaive (`x/glaive`) | 1,234 | 1,000 | 4 | Apache-2.0 |",
        "| own | - | 5 | 1 | not stated |",
        "- glaive: cannot be parsed: 234",
        "| 380 | 0.0599 |",
        "2.2194 before training, 0.0599 after (step 380)",
        "| new values | stage | 150 | 0.633 | 0.860 | 0.753 | - |",
        '`Cascade.from_pretrained("me/tool")`'.strip("`"),
        'AutoModelForCausalLM.from_pretrained("me/tool", trust_remote_code=True)',
        "poe export me/tool --native out",
        "<user>hello",
        "`<|im_end|>`",
        "up to 2,048 tokens",
        "torch 2.13.0",
    ):
        assert part in text, part
    assert "Not for commercial use" not in text
    assert "has not been measured" in card({})
    local = card(base={**CONFIG["base"], "repo": "../../private/base"})
    assert "Its base is not on the Hub" in local
    assert "the frozen base `base`" in local
    assert "private" not in local
    assert "base_model" not in local


def test_the_card_begins_with_a_question_and_the_reply_of_the_stage() -> None:
    reply = '<tool_call>{"name": "get_weather", "arguments": {"city": "Lisbon"}}</tool_call>'
    text = stage_card(CONFIG, {**TRAINING, "example": {"reply": reply}}, parameters=1, example="tools: get_weather")
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert "tools=tools" in code
    assert "tools" not in re.search("```python\n(.*?)```", card(), re.DOTALL)[1]
    titles = re.findall("^## (.*)$", text, re.MULTILINE)
    assert titles == ["Ask it", "Results", "Other ways to load it", "Limits", "How it was made"]
    assert text.index(code) < text.index(reply) < text.index("## Results") < text.index("lr: 0.02")
    assert text.count("<details>") == text.count("</details>") == 3


@pytest.mark.parametrize("license", ["CC-BY-NC-4.0", "cc-by-nc-sa-3.0", "non-commercial", "Noncommercial research"])
def test_a_non_commercial_license_is_stated_first(license: str) -> None:
    data = {"sources": {"good": {"license": "Apache-2.0"}, "bad": {"license": license, "hub_id": "x/bad"}}}
    assert non_commercial({"data": data}) == ["bad"]
    body = ModelCard(card({"data": data})).text
    assert body.index("Not for commercial use:** the license of bad") < body.index("## ")
    text = notice(CONFIG, {"data": data})
    assert "NOT FOR COMMERCIAL USE: the license of bad" in text
    assert f"Training data: bad, license {license} (x/bad)." in text


@pytest.mark.parametrize("license", ["Apache-2.0", "mit", "CC-BY-4.0", "encumbered", None])
def test_other_licenses_add_no_restriction(license: str | None) -> None:
    assert non_commercial({"license": license}) == []


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(name=words, license=words, reason=words, example=words)
def test_any_training_record_gives_a_readable_card(name, license, reason, example) -> None:
    training = {
        "license": license,
        "recipe": {name: reason},
        "data": {
            "sources": {name: {"license": license, "conversations": 1, "epochs": 1, "hub_id": "x/y"}},
            "rows": {name: {"read": 2, "dropped": {reason: 1}}},
        },
        "evaluation": {name: {"stage": {"rows": 1, "exact": 0.5}}},
    }
    content = ModelCard(stage_card(CONFIG, training, parameters=1, example=example * 3))
    assert content.data.license == escape_controls(license)
    assert content.data.eval_results[0].dataset_name == escape_controls(name)


def test_the_example_prompt_has_a_tool_if_the_template_supports_tools() -> None:
    tokenizer = tiny_tokenizer()
    assert "Lisbon" in example_prompt(tokenizer)
    tokenizer.chat_template = "{{ tools[0].function.name }}{% if add_generation_prompt %}<go>{% endif %}"
    assert example_prompt(tokenizer) == "get_weather<go>"
    tokenizer.chat_template = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}{{ messages[0].role }}"
    assert example_prompt(tokenizer) == "user"
    tokenizer.chat_template = None
    assert example_prompt(tokenizer) is None
    assert example_prompt(None) is None


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]


def test_every_link_of_a_card_leads_somewhere(hub, saved_base, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "report.png").write_bytes(b"\x89PNG")
    data = {"sources": {"bad": {"license": "cc-by-nc-4.0", "conversations": 1, "epochs": 1}}}
    cascade = Cascade.from_pretrained(saved_base()).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    folder = cascade.save_stage("t", tmp_path / "t", {**TRAINING, "data": data})
    found = links((folder / "README.md").read_text())
    assert {"report.png", "training.json", "NOTICE"} <= set(found)
    assert all((folder / link).is_file() for link in found)
    # The card of the same stage elsewhere, without a plot, does not show one.
    again = Cascade.from_pretrained(folder).save_stage("t", tmp_path / "u", json.loads(json.dumps(TRAINING)))
    assert "report.png" not in links((again / "README.md").read_text())
    upload(plan_upload(saved_base(), "me/base", token="hf_me"), token="hf_me")
    plan = plan_upload(folder, "me/t", base="me/base", token="hf_me")
    published = plan.files["README.md"]
    assert isinstance(published, bytes)
    assert 'from_pretrained("me/t")' in published.decode()
    assert "base_model: me/base" in published.decode()
    assert set(links(published.decode())) <= plan.files.keys()
    # A license is chosen with the push. A card that the user has edited keeps its text.
    (folder / "README.md").write_text("---\nlicense: other\n---\n# Mine\n")
    plan = plan_upload(folder, "me/t", base="me/base", license="mit", token="hf_me")
    assert plan.files["README.md"].decode().split() == "--- license: mit --- # Mine".split()
    assert "License of this stage: mit." in plan.files["NOTICE"].decode()
    assert json.loads(plan.files["training.json"])["license"] == "mit"
    with pytest.raises(StageError, match="license= do not apply"):
        plan_upload(saved_base(), "me/base", license="mit", token="hf_me")


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in links(page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
