"""What is loaded is what was fingerprinted: no other file, config or moment decides what a stage stands on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TorchAoConfig

import poe.modeling.fingerprint as fingerprint_module
from conftest import BASES, EXEMPLARS, mostly_slow, scramble, tiny_base, tiny_model, token_ids
from poe import Cascade, StageConfig
from poe.errors import DeltaError, FingerprintError, PoEError, SourceError
from poe.loaders.verify import verify
from poe.modeling import opening
from poe.modeling.fingerprint import fingerprint_files, fingerprint_files_cached
from poe.modeling.lineage import compare_networks
from poe.modeling.modeling_poe_stage import PoEStageForCausalLM

DOORS: dict[str, Callable[[Path], object]] = {
    "package": lambda folder: Cascade.from_pretrained(folder / "stage"),
    "remote code": lambda folder: PoEStageForCausalLM.from_pretrained(folder / "stage"),
    "open base": lambda folder: Cascade.from_pretrained(folder / "base").load_stage(folder / "stage"),
}


@pytest.fixture(scope="module")
def original(saved_base, tmp_path_factory) -> Path:
    """A folder with `base` and `stage` on it."""
    root = tmp_path_factory.mktemp("loaded")
    shutil.copytree(saved_base("llama"), root / "base")
    cascade = Cascade.from_pretrained(root / "base").add_stage(StageConfig("stage", 1, "low_rank", 4))
    scramble(cascade.stages["stage"])
    cascade.save_stage("stage", root / "stage")
    return root


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder / "stage") if not check.ok}


def other_weights(folder: Path, name: str) -> None:
    tensors = {key: tensor + 1 for key, tensor in load_file(folder / "base/model.safetensors").items()}
    save_file(tensors, folder / "base" / name, {"format": "pt"})


CHOICES: dict[str, Callable[[Path], object]] = {
    "weights named in config.json": lambda f: (
        other_weights(f, "other.safetensors"),
        edit(f / "base/config.json", transformers_weights="other.safetensors"),
    ),
    "an adapter beside the base": lambda f: (f / "base/adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "shards of a distributed checkpoint": lambda f: other_weights(f, "shard-00001-model-00001-of-00001.safetensors"),
    "an index of another folder": lambda f: (
        (f / "base/model.safetensors").rename(f / "model.safetensors"),
        (f / "base/model.safetensors.index.json").write_text('{"weight_map": {"x": "../model.safetensors"}}'),
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_base_that_offers_other_weights_is_refused(folder: Path, choice: str) -> None:
    CHOICES[choice](folder)
    for door in DOORS.values():
        with pytest.raises(SourceError, match=r"is not only a base|of its own folder"):
            door(folder)
    assert failures(folder).keys() >= {"base"}


@pytest.mark.parametrize("keyword", [{"variant": "x"}, {"gguf_file": "x.gguf"}, {"subfolder": "x"}])
def test_a_keyword_that_chooses_other_weights_is_refused(folder: Path, keyword: dict) -> None:
    with pytest.raises(SourceError, match=r"does not take|There is no folder"):
        Cascade.from_pretrained(folder / "base", **keyword)


def quantize(folder: Path) -> dict[str, object]:
    quantization = pytest.importorskip("torchao.quantization")
    return {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}


PLACES: dict[str, Callable[[Path], dict[str, object]]] = {
    "in memory": lambda folder: {},
    "offloaded": lambda folder: {"device_map": {"": "disk"}, "offload_folder": folder / "offload"},
    "quantized": quantize,
}


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_a_model_that_was_loaded_from_another_file_is_refused(
    folder: Path, options: Callable[[Path], dict[str, object]], monkeypatch
) -> None:
    """The file that transformers reads does not matter: the tensors in memory do."""
    other_weights(folder, "other.safetensors")
    loader = opening.AutoModelForCausalLM.from_pretrained

    def load_another(repo: str, **options: object) -> object:
        edit(Path(repo) / "config.json", transformers_weights="other.safetensors")
        return loader(repo, **options)

    monkeypatch.setattr(opening.AutoModelForCausalLM, "from_pretrained", load_another)
    monkeypatch.setattr("poe.modeling.lineage.BaseSource.check_unchanged", lambda source: None)
    with pytest.raises(FingerprintError, match="was not loaded as it is in"):
        Cascade.from_pretrained(folder / "base", **options(folder))


def test_a_base_that_changes_while_it_is_loaded_is_refused(folder: Path, monkeypatch) -> None:
    loader = opening.AutoModelForCausalLM.from_pretrained
    path = folder / "base/model.safetensors"

    def load_between(repo: str, **options: object) -> object:
        good, times = path.read_bytes(), os.stat(path)
        other_weights(folder, "model.safetensors")
        model = loader(repo, **options)
        path.write_bytes(good)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return model

    monkeypatch.setattr(opening.AutoModelForCausalLM, "from_pretrained", load_between)
    with pytest.raises(FingerprintError, match="were changed after they were opened"):
        Cascade.from_pretrained(folder / "stage")


def test_a_base_that_changes_after_it_was_opened_has_no_fingerprint(folder: Path) -> None:
    cascade = Cascade.from_pretrained(folder / "base").add_stage(StageConfig("new", 1))
    other_weights(folder, "model.safetensors")
    with pytest.raises(FingerprintError, match=r"were changed after they were opened|has changed in memory"):
        cascade.save_stage("new", folder / "new")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("kind", ["new", "fork", "compressed"])
def test_a_delta_that_is_swapped_after_its_check_is_refused(saved_base, tmp_path: Path, monkeypatch, kind: str) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama"))
    fork = {"layers": "fork", "attach_at": 1} if kind == "fork" else {}
    cascade.add_stage(StageConfig("t", 1, "low_rank", 4, **fork))
    dtype = torch.int8 if kind == "compressed" else None
    for seed in (1, 2):
        scramble(cascade.stages["t"], seed)
        cascade.save_stage("t", tmp_path / str(seed), dtype=dtype)
    built = opening.build_stage

    def swap(*arguments: object, **options: object) -> object:
        shutil.copy(tmp_path / "2" / "delta.safetensors", tmp_path / "1" / "delta.safetensors")
        return built(*arguments, **options)

    monkeypatch.setattr(opening, "build_stage", swap)
    with pytest.raises(FingerprintError, match="was changed after it was written"):
        Cascade.from_pretrained(tmp_path / "1")


def test_a_remembered_fingerprint_is_used_only_for_the_same_file(folder: Path, monkeypatch) -> None:
    path = folder / "base/model.safetensors"
    before = fingerprint_files_cached([str(path)])
    calls = []
    monkeypatch.setattr(fingerprint_module, "fingerprint_files", lambda paths: calls.append(1) or "read")
    assert (fingerprint_files_cached([str(path)]), calls) == (before, [])
    times, content = os.stat(path), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and modification time
    assert fingerprint_files_cached([str(path)]) == "read"


def test_verify_reads_every_byte_and_trusts_no_record(folder: Path, monkeypatch) -> None:
    cascade = Cascade.from_pretrained(folder / "stage")
    monkeypatch.setattr("poe.modeling.lineage.fingerprint_files_cached", lambda paths: cascade.base_source.fingerprint)
    other_weights(folder, "model.safetensors")
    assert failures(folder).keys() == {"base"}


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_record_that_others_can_write_is_not_trusted(folder: Path, mode: int) -> None:
    path = folder / "base/model.safetensors"
    fingerprint_files_cached([str(path)])
    records = Path(os.environ["HF_HOME"]) / "poe/fingerprints"
    record = next(r for r in records.iterdir() if str(path) in r.read_text())
    assert record.stat().st_mode & 0o777 == 0o600
    edit(record, fingerprint="f" * 64)
    assert fingerprint_files_cached([str(path)]) == "f" * 64  # this user's own record
    record.chmod(mode)
    assert fingerprint_files_cached([str(path)]) == fingerprint_files([path])


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weights = folder / "base/model.safetensors"
    with pytest.raises(DeltaError, match="which another shard holds too"):
        fingerprint_files([weights, shutil.copy(weights, folder / "again.safetensors")])


# family -> a field of its config.json that changes what it computes, and another value
NETWORKS = {
    "llama": {"rope_theta": 500.0, "rms_norm_eps": 0.1, "hidden_act": "gelu"},
    "qwen2-sliding": {"sliding_window": 2, "use_sliding_window": False},
    "gemma2": {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 2},
    "granite": {"logits_scaling": 1.0, "residual_multiplier": 0.1, "embedding_multiplier": 1.0},
    "smollm3": {"no_rope_layers": [1, 1]},
    "poe": {"attention_logit_scale": 2.0, "final_logit_softcapping": 1.0},
    "hrm": {"L_cycles": 1, "embedding_scale": 1.0, "prefix_lm": False},
}
NOTES = {
    "transformers_version": "4.40.0",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "architectures": None,
    "_name_or_path": "elsewhere",
    "eos_token_id": [2, 5],
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "max_position_embeddings": 4096,
    "a_note": "of somebody",
}


def test_an_edited_config_of_a_base_is_refused_at_every_door(folder: Path) -> None:
    path = folder / "base/config.json"
    good = json.loads(path.read_text())
    ids = token_ids()
    expected = Cascade.from_pretrained(folder / "stage")(ids).logits
    for changes in ({"rms_norm_eps": 0.1}, {"rope_theta": 500.0, "rope_parameters": None}, {"hidden_act": "gelu"}):
        path.write_text(json.dumps(good | changes))
        for door in DOORS.values():
            with pytest.raises(FingerprintError, match="makes another network"):
                door(folder)
        assert failures(folder).keys() == {"base config"}
    path.write_text(json.dumps(good | NOTES))
    assert not failures(folder)
    assert torch.equal(Cascade.from_pretrained(folder / "stage")(ids).logits, expected)


@pytest.mark.parametrize("name", mostly_slow(BASES, EXEMPLARS))
def test_a_config_differs_exactly_if_the_network_does(name: str) -> None:
    """Every field of the config in turn gets another value; the logits decide whether it matters."""
    base = tiny_base(name)
    fields = json.loads(base.config.to_json_string(use_diff=False))
    assert not compare_networks(fields, json.loads(base.config.to_json_string()))
    assert not compare_networks(fields, fields | NOTES)
    ids = token_ids()
    state, expected = base.state_dict(), base(ids).logits
    for field, value in fields.items():
        for other in _other_values(value):
            changed = fields | {field: other}
            if field == "model_type" or compare_networks(fields, changed):
                continue
            try:
                model = tiny_model(fields["model_type"], changed)
                model.load_state_dict(state, strict=False)
                logits = model(ids).logits
            except Exception:
                continue
            assert torch.equal(logits, expected), (field, value, other)


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 0.5 + 0.1]
    if isinstance(value, dict) and "rope_theta" in value:
        return [value | {"rope_theta": 77.0}, value | {"rope_type": "linear", "factor": 2.0}]
    return {"silu": ["gelu"], "gelu": ["silu"]}.get(str(value), []) if isinstance(value, str) else []


@pytest.mark.parametrize("name", NETWORKS)
def test_fields_of_a_family_that_change_its_function_are_compared(name: str) -> None:
    fields = json.loads(tiny_base(name).config.to_json_string(use_diff=False))
    for field, value in NETWORKS[name].items():
        changed = fields | {field: value}
        if field == "rope_theta":
            changed["rope_parameters"] = None
        if field == "use_sliding_window":
            changed["layer_types"] = None
        assert compare_networks(fields, changed), field


def test_spellings_of_other_versions_are_the_same_network() -> None:
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}}
    old = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert not compare_networks(old, new)
    assert compare_networks(old | {"rope_theta": 10000.0}, new)
    assert compare_networks(old, old | {"quantization_config": {"quant_method": "torchao"}})
    assert compare_networks(old, old | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_another_repository_is_never_run(folder: Path, trust: bool) -> None:
    edit(folder / "base/config.json", auto_map={"AutoModelForCausalLM": "somebody/else--evil.Model"})
    if trust:
        with pytest.raises(SourceError, match="takes code from another repository"):
            Cascade.from_pretrained(folder / "base", trust_remote_code=True)
    else:
        assert type(Cascade.from_pretrained(folder / "base").base).__module__.startswith("transformers.")
    with pytest.raises(FingerprintError, match="auto_map"):
        Cascade.from_pretrained(folder / "stage", trust_remote_code=trust)


@pytest.mark.parametrize(
    "location", ["file:///etc", "http://127.0.0.1:9/me/base", "https://example.invalid/x", "ftp://x/y"]
)
def test_a_base_is_never_a_url(folder: Path, location: str) -> None:
    with pytest.raises(PoEError):
        Cascade.from_pretrained(location)
    config = json.loads((folder / "stage/config.json").read_text())
    edit(folder / "stage/config.json", base=config["base"] | {"repo": location})
    with pytest.raises(PoEError):
        Cascade.from_pretrained(folder / "stage")
