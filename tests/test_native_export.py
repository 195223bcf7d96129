"""Native export: an ordinary checkpoint for any program, and errors before anything is written."""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from command_line import run_stranger
from conftest import BASES, EXEMPLARS, RECURRENT, scramble, tiny_base, tiny_tokenizer, token_ids
from poe import Cascade, StageConfig
from poe.errors import FamilyError, OutputError
from poe.loaders import native
from poe.loaders.llama_cpp import find_differences

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Every base in one dtype is quick. A group is opened by one process, which costs as much as many folders.
Group = tuple[tuple[str, str], ...]  # (base, dtype)
FLAT = [name for name in EXEMPLARS if name not in RECURRENT]
QUICK = tuple((name, ("bf16", "fp32")[index % 2]) for index, name in enumerate(FLAT))
SLOW = tuple(pair for pair in itertools.product(FLAT, DTYPES) if pair not in QUICK)
EXPORTS = pytest.mark.parametrize(
    ("group", "flat_name", "label"),
    [*((QUICK, *pair) for pair in QUICK), *(pytest.param(SLOW, *pair, marks=pytest.mark.slow) for pair in SLOW)],
)

# What a stranger runs: `poe` cannot be imported, and remote code is trusted only where a folder brings some.
STRANGER = """
import hashlib, json, os, sys
sys.modules["poe"] = None
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
job = json.load(sys.stdin)
ids = torch.tensor(job["ids"])
answers = {}
for folder in job["folders"]:
    remote = {"trust_remote_code": True} if os.path.exists(folder + "/modeling_poe.py") else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **remote)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        logits = model(ids).logits.float().numpy().tobytes()
    answers[folder] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
        "logits": hashlib.sha256(logits).hexdigest(),
        "tokens": model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, eos_token_id=None).tolist(),
        "words": tokenizer("w5 w6").input_ids,
        "template": tokenizer.chat_template,
        "stops": model.generation_config.eos_token_id,
        "dtype": str(model.dtype),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }
try:
    import poe
except ImportError:
    json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def exports(saved_base, tmp_path_factory) -> Callable[[Group], dict[str, tuple[Path, Cascade, str]]]:
    """Name -> (folder, cascade, stage): the bases of a group, a chain of two, sharded and attached low too."""
    prompt = {"name": "p", "version": "1", "stop": ["w7"]}

    @functools.cache
    def export(group: Group) -> dict[str, tuple[Path, Cascade, str]]:
        root, made = tmp_path_factory.mktemp("exports"), {}
        for base, label in group:
            cascade = Cascade.from_pretrained(saved_base(base, DTYPES[label]))
            cascade.add_stage(StageConfig("parent", 2, "dense", attach_at=1 if label == "bf16" else None))
            cascade.add_stage(StageConfig("child", 1, "low_rank", 4, parent="parent"))
            cascade.add_stage(StageConfig("plain", 1, "none"))
            for seed, stage in enumerate(cascade.stages.values()):
                scramble(stage, seed)
            cascade.model("parent")  # assembled before its stop tokens are known
            cascade.save_stage("parent", root / "stages" / f"{base}-{label}", prompt=prompt)
            for stage, size in (("parent", "5GB"), ("child", "8KB"), ("plain", 20_000)):
                name = f"{base}-{label}-{stage}"
                made[name] = (cascade.export_native(stage, root / name, max_shard_size=size), cascade, stage)
        return made

    return export


@pytest.fixture(scope="module")
def seen(exports) -> Callable[[Group], dict]:
    """What a stranger sees in each export of a group."""

    @functools.cache
    def see(group: Group) -> dict:
        job = {"ids": token_ids().tolist(), "folders": [str(folder) for folder, _, _ in exports(group).values()]}
        return run_stranger(STRANGER, job)

    return see


@pytest.mark.parametrize("stage", ["parent", "child", "plain"])
@EXPORTS
def test_plain_transformers_computes_the_same_logits(group, flat_name, label, stage, exports, seen) -> None:
    folder, cascade, _ = exports(group)[f"{flat_name}-{label}-{stage}"]
    answer = seen(group)[str(folder)]
    with torch.no_grad():
        logits = cascade(token_ids(), stage=stage).logits
    assert answer["logits"] == hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
    tokens = cascade.generate(input_ids=token_ids(), stage=stage, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert answer["tokens"] == tokens.tolist()
    assert answer["class"] == type(cascade.base).__name__
    assert answer["missing"] == []
    assert answer["tied"] == (stage == "plain" and cascade.config.tie_word_embeddings)
    assert answer["dtype"] == str(DTYPES[label])
    assert answer["words"] == cascade.tokenizer("w5 w6").input_ids
    assert answer["template"] == cascade.tokenizer.chat_template
    own = cascade.stages[stage].generation_config
    assert answer["stops"] == (2 if own is None else own.eos_token_id)
    if flat_name == "qwen3":
        assert answer["stops"] == ([2, 7] if stage == "parent" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("label", list(DTYPES))
@pytest.mark.parametrize("name", [name for name in BASES if name not in (*EXEMPLARS, *RECURRENT)])
@torch.no_grad()
def test_a_chain_on_every_other_base_is_exported(name, label, saved_base, tmp_path) -> None:
    cascade = Cascade.from_pretrained(saved_base(name, DTYPES[label]))
    cascade.add_stage(StageConfig("parent", 2, "dense", attach_at=1 if label == "bf16" else None))
    cascade.add_stage(StageConfig("child", 1, "low_rank", 4, parent="parent"))
    for seed, stage in enumerate(cascade.stages.values()):
        scramble(stage, seed)
    for stage in ("parent", "child"):
        model = AutoModelForCausalLM.from_pretrained(cascade.export_native(stage, tmp_path / stage))
        assert torch.equal(model(token_ids()).logits, cascade(token_ids(), stage=stage).logits)


@EXPORTS
def test_the_files_are_those_of_an_ordinary_checkpoint(group, flat_name, label, exports, tmp_path) -> None:
    for stage in ("parent", "child", "plain"):
        folder, cascade, _ = exports(group)[f"{flat_name}-{label}-{stage}"]
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == cascade.config.model_type
        assert config["architectures"] == [type(cascade.base).__name__]
        is_tied = stage == "plain" and cascade.config.tie_word_embeddings
        assert config.get("tie_word_embeddings", True) is is_tied
        depth = cascade.stages[stage].below + len(cascade.stages[stage].layers)
        assert config["num_hidden_layers"] == depth
        if config.get("layer_types"):
            assert config["layer_types"] == cascade.model(stage).config.layer_types
            assert len(config["layer_types"]) == depth
        assert config["dtype"] == str(DTYPES[label]).removeprefix("torch.")
        assert (folder / "modeling_poe.py").exists() == ("auto_map" in config) == (flat_name == "poe")
        assert str(tmp_path.parent) not in "".join(
            p.read_text() for p in folder.glob("*.*") if p.suffix in (".json", ".md")
        )
        files = sorted(folder.glob("*.safetensors"))
        stored = {name: tensor for path in files for name, tensor in load_file(path).items()}
        expected = cascade.model(stage).state_dict()
        if is_tied:
            del expected["lm_head.weight"]
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(stored[name], tensor), name
        index = folder / "model.safetensors.index.json"
        if stage == "parent":
            assert [path.name for path in files] == ["model.safetensors"]
            assert not index.exists()
            with safe_open(files[0], "pt") as file:
                assert file.metadata() == {"format": "pt"}
        else:
            assert len(files) > 1
            content = json.loads(index.read_text())
            assert content["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
            assert {name: path.name for path in files for name in load_file(path)} == content["weight_map"]
            limit = 8_000 if stage == "child" else 20_000
            assert all(sum(t.nbytes for t in load_file(p).values()) <= limit or len(load_file(p)) == 1 for p in files)


def test_an_export_is_a_base_to_build_on(exports) -> None:
    folder, cascade, stage = exports(QUICK)["qwen3-tied-fp32-child"]
    again = Cascade.from_pretrained(folder).add_stage(StageConfig("next", 1, "low_rank", 4))
    assert torch.equal(again(token_ids()).logits, cascade(token_ids(), stage=stage).logits)
    scramble(again.stages["next"])
    assert len(again.model("next").model.layers) == 6


def test_export_does_not_change_the_base_or_the_cascade(exports) -> None:
    _, cascade, _ = exports(QUICK)["qwen3-tied-fp32-child"]
    assert cascade.config.tie_word_embeddings
    assert cascade.config.num_hidden_layers == 2
    for (name, mine), theirs in zip(
        cascade.base.state_dict().items(), tiny_base("qwen3-tied").state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_stages_are_stored_in_the_dtype_of_the_base(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base(dtype=torch.bfloat16)).add_stage(
        StageConfig("t", 1), dtype=torch.float32
    )
    scramble(cascade.stages["t"])
    stored = load_file(cascade.export_native("t", tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    own = cascade.stages["t"].layers[0].mlp.up_proj.weight
    assert torch.equal(stored["model.layers.2.mlp.up_proj.weight"], own.to(torch.bfloat16))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cascade.stages["t"].layers.to(torch.bfloat16)
    assert torch.equal(loaded(token_ids()).logits, cascade(token_ids()).logits)


def test_the_config_keeps_the_bases_spelling(saved_base, tmp_path: Path) -> None:
    """Programs that know the older names (`rope_theta`, `torch_dtype`) read them from the export as from the base."""
    shutil.copytree(saved_base("llama"), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    path.write_text(json.dumps({**config, "rope_theta": 1234.0, "torch_dtype": "float32", "mine": [1]}))
    cascade = Cascade.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    cascade.add_stage(StageConfig("t", 1))
    folder = cascade.export_native("t", tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    before = json.loads(path.read_text())
    changed = {name: written.get(name) for name in written.keys() | before if written.get(name) != before.get(name)}
    assert changed == {"num_hidden_layers": 3, "torch_dtype": "bfloat16"}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.rope_parameters["rope_theta"] == 1234.0
    assert torch.equal(again(token_ids()).logits, cascade(token_ids()).logits)


def test_no_more_than_one_tensor_is_in_memory_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor but the head that reaches the writer is the very memory of the model."""
    cascade = Cascade(tiny_base("qwen3-tied")).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    shared = {p.data_ptr() for p in (*cascade.base.parameters(), *cascade.stages["t"].layers.parameters())}
    written, real = {}, native.write_tensors

    def write(path: Path, tensors: dict, metadata: dict) -> None:
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        real(path, tensors, metadata)

    monkeypatch.setattr(native, "write_tensors", write)
    cascade.export_native("t", tmp_path / "out", max_shard_size="8KB")
    assert {name for name, pointer in written.items() if pointer not in shared} == {"lm_head.weight"}


def quantize_config(base) -> None:
    base.config.quantization_config = {"quant_method": "bitsandbytes"}


def quantize_weights(base) -> None:
    layer = base.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


def offload(base) -> None:
    base.model.layers[0].mlp.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantize_config, "quantized .bitsandbytes.*floating point"),
        (quantize_weights, r"quantized \(torch.uint8\)"),
        (offload, "offloaded"),
    ],
)
def test_a_base_without_plain_weights_is_refused(change, message: str, tmp_path: Path) -> None:
    cascade = Cascade(tiny_base()).add_stage(StageConfig("t", 1))
    change(cascade.base)
    with pytest.raises(FamilyError, match=message):
        cascade.export_native("t", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = Cascade(tiny_base(), tiny_tokenizer()).add_stage(StageConfig("t", 1))
    out = tmp_path / "deep" / "out"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, native._RESERVED_BYTES + 1000))
        with pytest.raises(OutputError, match=r"needs .* GB, but its disk has .* GB free"):
            cascade.export_native("t", out)
    assert not out.parent.exists()
    with pytest.raises(OutputError, match="max_shard_size should be bytes or text such as '5GB', got 'big'"):
        cascade.export_native("t", out, max_shard_size="big")
    for fails_at in range(0, 12, 3):
        calls, real = [], os.fsync

        def fsync(handle: int, calls=calls, real=real, fails_at=fails_at) -> None:
            calls.append(handle)
            if len(calls) > fails_at:
                raise OSError(28, "No space left on device")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OutputError, match="No space left on device"):
                cascade.export_native("t", out, max_shard_size="8KB")
        assert not out.parent.exists()
    out.mkdir(parents=True)
    cascade.export_native("t", out)
    with pytest.raises(OutputError, match="is not empty"):
        cascade.export_native("t", out)
    assert (out / "model.safetensors").exists()


def test_the_export_command(saved_base, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from poe.commands.poe import app

    cascade = Cascade.from_pretrained(saved_base("qwen3-tied", torch.bfloat16)).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    cascade.save_stage("t", tmp_path / "t")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "t"), "--native", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(token_ids()).logits, Cascade.from_pretrained(tmp_path / "t")(token_ids()).logits)
    assert "warning" not in done.output
    cascade = Cascade.from_pretrained(saved_base("cohere-tied")).add_stage(StageConfig("t", 1, "low_rank", 4))
    cascade.save_stage("t", tmp_path / "c")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "c"), "--native", str(tmp_path / "cohere")])
    assert done.exit_code == 0, done.output
    assert "warning: llama.cpp would not compute what transformers" in done.output
    done = CliRunner().invoke(app, ["export", str(saved_base()), "--native", str(tmp_path / "base")])
    assert "is a base: expected a stage" in str(done.exception)


@pytest.mark.parametrize(("head", "warned"), [("low_rank", True), ("none", False)])
def test_an_export_that_is_another_model_in_llama_cpp_comes_with_a_warning(head, warned, tmp_path) -> None:
    cascade = Cascade(tiny_base("cohere-tied")).add_stage(StageConfig("t", 1, head, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cascade.export_native("t", tmp_path / "out")
    reason = "its converter refuses a head beside the embedding"
    assert any(reason in str(each.message) for each in caught) == warned
    assert (reason in (tmp_path / "out" / "README.md").read_text()) == warned


WINDOW = {"sliding_window": 8}
EVERY_SECOND = ["sliding_attention", "full_attention"] * 4


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        *((model_type, {}, None) for model_type in ("llama", "qwen2", "gemma2", "gemma3_text", "smollm3")),
        ("exaone4", {**WINDOW, "num_hidden_layers": 64}, None),
        (
            "exaone4",
            {**WINDOW, "num_hidden_layers": 32},
            "exaone4, 32 layers., and other positions, and this.*8 tokens to 24 of them",
        ),
        ("phi3", WINDOW, "a sliding window to no layer .phi3, 8 layers.*to 8 of them"),
        ("phi3", {"sliding_window": 131072}, None),
        ("mistral", WINDOW, "to no layer .mistral"),
        ("gemma3_text", {"layer_types": EVERY_SECOND}, "to all layers but every 6th .gemma3_text"),
        (
            "gemma2",
            {"num_hidden_layers": 46, "hidden_size": 3584, "num_attention_heads": 16},
            "by 224.*and this one by 256",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 168}, "by 256.*8 layers"),
        ("smollm3", {"no_rope_layers": [1, 0] * 4}, "out of every 4th layer"),
        ("olmo2", {}, "does not open olmo2 with a tied head"),
        ("phi", {"intermediate_size": 96}, "intermediate_size of 4 x"),
        ("glm", {}, "rms_norm_eps is 1e-05"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_found_in_the_config(model_type, fields, message) -> None:
    config = AutoConfig.for_model(model_type, **{"num_hidden_layers": 8, **fields})
    found = "; ".join(find_differences(config, has_head=False))
    assert found == "" if message is None else re.search(message, found)
