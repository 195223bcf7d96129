"""The delta file: reproducible bytes, exact names, and no undetected damage."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from conftest import EXEMPLARS, every_value, scramble, tiny_base
from poe import Cascade, StageConfig
from poe.errors import DeltaError, FingerprintError, OutputError, StageError
from poe.modeling import fingerprint as fingerprints
from poe.modeling.delta_file import read_delta, read_delta_header, verify_delta, write_delta
from poe.modeling.fingerprint import fingerprint_files, fingerprint_files_cached, fingerprint_tensors
from poe.modeling.tensor_file import DTYPES, read_header, write_tensors

HEADS = pytest.mark.parametrize("head", ["dense", "low_rank", "none"])
TRAINED = {
    "dense": {"head.weight"},
    "low_rank": {"head.a", "head.b"},
    "none": set(),
}


def make_stage(saved_base, head: str = "dense", name: str = "qwen3", dtype: torch.dtype = torch.float32) -> Cascade:
    """Return a cascade with a scrambled stage `t` on a saved base."""
    cascade = Cascade.from_pretrained(saved_base(name, dtype)).add_stage(StageConfig("t", 2, head, 4))
    scramble(cascade.stages["t"], seed=1)
    return cascade


@pytest.fixture
def folder(saved_base, tmp_path: Path) -> Path:
    """A complete stage folder beside nothing, on a base elsewhere."""
    return make_stage(saved_base).save_stage("t", tmp_path / "t")


@pytest.mark.parametrize(
    ("base_name", "head", "stored"), every_value(EXEMPLARS, ["dense", "low_rank", "none"], [None, torch.float32])
)
def test_saving_a_loaded_stage_gives_the_same_bytes(saved_base, base_name, head, stored, tmp_path) -> None:
    cascade = make_stage(saved_base, head, base_name)
    first = cascade.save_stage("t", tmp_path / "first", dtype=stored) / "delta.safetensors"
    again = Cascade.from_pretrained(first.parent).save_stage("t", tmp_path / "again") / "delta.safetensors"
    assert first.read_bytes() == again.read_bytes()
    tensors = load_file(first)
    own = cascade.stages["t"].delta_state_dict()
    assert tensors.keys() == own.keys()
    assert {n for n in tensors if not n.startswith("layers.")} == TRAINED[head]
    assert {t.dtype for t in tensors.values()} == {stored or torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, own[name].to(tensor.dtype)), name
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "poe_format": "1",
        "stage": "t",
        "attach_at": str(cascade.stages["t"].below),
        "base_fingerprint": cascade.base_source.fingerprint,
        "parent_fingerprint": "",
        "self_fingerprint": fingerprint_tensors(tensors),
    }
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "NOTICE",
        "modeling_poe_stage.py",
    ):
        assert (first.parent / name).read_bytes() == (again.parent / name).read_bytes(), name


@HEADS
def test_a_delta_has_only_trained_tensors(saved_base, head, tmp_path) -> None:
    cascade = make_stage(saved_base, head)
    path = cascade.save_stage("t", tmp_path / "t") / "delta.safetensors"
    parameters = cascade.stages["t"].num_parameters()
    assert 2 * parameters < path.stat().st_size < 2 * parameters + 8192


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


tensor_sets = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**31)),
    min_size=1,
    max_size=5,
)


def realize(description: dict) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (dtype, shape, seed) in description.items():
        generator = torch.Generator().manual_seed(seed)
        count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


@settings(max_examples=60, deadline=None)
@given(description=tensor_sets, seed=st.integers(0, 99))
def test_a_fingerprint_names_weights_not_files(description: dict, seed: int, tmp_path_factory) -> None:
    tensors = realize(description)
    whole = fingerprint_tensors(tensors)
    names = list(tensors)
    random.Random(seed).shuffle(names)
    assert fingerprint_tensors({name: tensors[name] for name in names}) == whole
    folder = tmp_path_factory.mktemp("f")
    cut = seed % (len(names) + 1)
    save_file({name: tensors[name] for name in names[:cut]}, folder / "1", {"any": "thing"})
    write_tensors(folder / "2", {name: tensors[name] for name in names[cut:]}, {})
    assert fingerprint_files([folder / "1", folder / "2"]) == whole
    write_tensors(folder / "3", tensors, {"b": "1", "a": "2"})
    write_tensors(folder / "4", {name: tensors[name] for name in names}, {"a": "2", "b": "1"})
    assert (folder / "3").read_bytes() == (folder / "4").read_bytes()
    assert describe(load_file(folder / "3")) == describe(tensors)


@settings(max_examples=40, deadline=None)
@given(description=tensor_sets, seed=st.integers(0, 10**6))
def test_one_changed_bit_changes_the_fingerprint(description: dict, seed: int) -> None:
    tensors = realize(description)
    whole = fingerprint_tensors(tensors)
    chosen = [name for name, tensor in tensors.items() if tensor.numel() and tensor.dtype != torch.bool]
    if chosen:
        raw = tensors[chosen[seed % len(chosen)]].reshape(-1).view(torch.uint8)
        raw[seed % len(raw)] ^= 1 << (seed % 8)
        assert fingerprint_tensors(tensors) != whole
    for name, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        assert fingerprint_tensors(others) != whole
        assert fingerprint_tensors({**others, name + "x": tensor}) != whole
        assert fingerprint_tensors({**others, name: tensor.reshape(1, *tensor.shape)}) != whole


def test_a_fingerprint_can_be_computed_by_hand() -> None:
    import hashlib

    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3, dtype=torch.int64)}
    lines = [
        b"a\0I64\0\0" + hashlib.sha256(struct.pack("<q", 3)).hexdigest().encode() + b"\n",
        b"b\0F32\x002\0" + hashlib.sha256(struct.pack("<2f", 1, 2)).hexdigest().encode() + b"\n",
    ]
    assert fingerprint_tensors(tensors) == hashlib.sha256(b"".join(lines)).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_has_one_fingerprint_in_every_storage(base_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_base(base_name, dtype)
    stored = revert_weight_conversion(model, model.state_dict())
    expected = fingerprint_tensors(stored)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        opened = Cascade.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert opened.base_source.fingerprint == expected, name
    assert Cascade(model).base_source.fingerprint == expected
    # Files of tied models may hold the head as well.
    full = {name: tensor.clone() for name, tensor in stored.items()}
    save_file(full, tmp_path / "full.safetensors")
    assert "lm_head.weight" in full
    assert fingerprint_files([tmp_path / "full.safetensors"]) == expected
    full["lm_head.weight"][0, 0] += 1
    assert fingerprint_tensors(full) != expected


def test_a_fingerprint_is_cached_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "model.safetensors")
    save_file({"a": torch.ones(3)}, path)
    first = fingerprint_files_cached([path])
    calls = []
    real = fingerprints.fingerprint_files
    monkeypatch.setattr(fingerprints, "fingerprint_files", lambda paths: calls.append(1) or real(paths))
    assert fingerprint_files_cached([path]) == first
    assert not calls
    save_file({"a": torch.zeros(3)}, path)
    os.utime(path, ns=(1, 1))
    assert fingerprint_files_cached([path]) != first
    assert len(calls) == 1


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(fraction: float, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("t") / "delta.safetensors"
    write_delta(path, {"layers.0.w": torch.randn(5, 3)}, stage="t", attach_at=2, base_fingerprint="0" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(DeltaError, match=r"truncated|not a safetensors|cannot be read"):
        read_delta_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DeltaError, match="no tensor owns"):
        read_delta_header(path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_changed_bit_of_a_delta_is_refused(position: int, bit: int, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("b") / "delta.safetensors"
    write_delta(path, {"layers.0.w": torch.randn(5, 3)}, stage="t", attach_at=2, base_fingerprint="0" * 64)
    data = bytearray(path.read_bytes())
    start = min(entry.start for entry in read_header(path)[0].values())
    data[start + position % (len(data) - start)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(
        FingerprintError, match=r"changed after it was written: expected fingerprint \w{12}, got \w{12}"
    ):
        verify_delta(path, read_delta_header(path))


def damage(folder: Path, change) -> None:
    """Rewrite a folder's delta through `change(tensors, metadata)`."""
    path = folder / "delta.safetensors"
    tensors = load_file(path)
    metadata = read_header(path)[1]
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)


def rename_stage(tensors: dict, metadata: dict) -> None:
    metadata["stage"] = "other"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, m: t.update(extra=torch.ones(1)), FingerprintError, "changed after"),
        (lambda t, m: t["head.weight"].add_(1), FingerprintError, "changed after"),
        (lambda t, m: t.pop("head.weight"), DeltaError, "declares the head 'dense'"),
        (lambda t, m: m.update(base_fingerprint="0" * 64), FingerprintError, "another base"),
        (lambda t, m: m.update(parent_fingerprint="0" * 64), FingerprintError, "stands on parent"),
        (lambda t, m: m.update(poe_format="9"), DeltaError, "format '9', expected 1 or 2"),
        (lambda t, m: m.pop("self_fingerprint"), DeltaError, "lacks self_fingerprint"),
        (lambda t, m: t.update({"head.weight": t["head.weight"].to(torch.int8)}), DeltaError, "type I8"),
        (rename_stage, DeltaError, "names 'other'"),
    ],
)
def test_a_tampered_delta_is_refused_before_the_base_is_loaded(folder, change, error, message, monkeypatch) -> None:
    damage(folder, change)
    monkeypatch.setattr("poe.loaders.base.load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(error, match=message):
        Cascade.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.ones(1)), "unexpected .'extra'."),
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "missing .'layers.0.mlp.up_proj.weight'."),
        (lambda t: t.update({"head.weight": torch.ones(3, 3)}), r"head.weight should be \(61, 32\), got \(3, 3\)"),
        (lambda t: t["head.weight"].fill_(float("nan")), "not finite"),
        (lambda t: t["layers.0.mlp.up_proj.weight"].mul_(float("inf")), "not finite"),
    ],
)
def test_a_forged_delta_with_a_correct_fingerprint_is_refused(folder, change, message) -> None:
    def forge(tensors: dict, metadata: dict) -> None:
        change(tensors)
        metadata["self_fingerprint"] = fingerprint_tensors(tensors)

    damage(folder, forge)
    with pytest.raises(DeltaError, match=message):
        Cascade.from_pretrained(folder)


@pytest.mark.parametrize("name", ["x.pkl", "sub/x.pt", "pytorch_model.bin", "a.PICKLE", "tokenizer.pkl"])
def test_anything_that_can_hold_a_pickle_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(DeltaError, match=name):
        Cascade.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["delta.safetensors", "config.json"])
def test_an_incomplete_folder_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises((DeltaError, OSError), match=missing):
        Cascade.from_pretrained(folder)


def test_non_finite_values_are_never_written(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base)
    with torch.no_grad():
        cascade.stages["t"].head.weight[0, 0] = float("nan")
    with pytest.raises(DeltaError, match=r"head\.weight holds values that are not finite"):
        cascade.save_stage("t", tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails_at", range(4))
def test_a_full_disk_leaves_the_old_folder_or_none(saved_base, tmp_path: Path, monkeypatch, fails_at: int) -> None:
    cascade = make_stage(saved_base)
    for fresh in (True, False):
        target = tmp_path / f"{fresh}"
        if not fresh:
            cascade.save_stage("t", target)
            (target / "mine.txt").write_text("kept")
        before = {path.name: path.read_bytes() for path in target.rglob("*")} if target.exists() else None
        scramble(cascade.stages["t"], seed=7)
        calls, real = [], os.fsync

        def fsync(handle: int, calls=calls, real=real) -> None:
            calls.append(handle)
            if len(calls) > fails_at:
                raise OSError(28, "No space left on device")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OutputError, match="No space left on device"):
                cascade.save_stage("t", target)
        after = {path.name: path.read_bytes() for path in target.rglob("*")} if target.exists() else None
        assert after == before
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert cascade.save_stage("t", tmp_path / "False") == tmp_path / "False"
    assert (tmp_path / "False" / "mine.txt").read_text() == "kept"


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from conftest import *
from poe import Cascade, StageConfig
from poe.errors import OutputError
cascade = Cascade.from_pretrained({base!r}).add_stage(StageConfig("t", 2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    cascade.save_stage("t", {target!r})
except OutputError as error:
    print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 3000, 20000])
def test_an_unwritable_folder_is_refused(saved_base, tmp_path: Path, limit: int) -> None:
    code = LIMITED.format(
        tests=str(Path(__file__).parent), base=str(saved_base()), limit=limit, target=str(tmp_path / "out" / "t")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "REFUSED" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_a_file_is_refused(saved_base, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        make_stage(saved_base).save_stage("t", tmp_path / "t")
    with pytest.raises(OutputError, match="is a file"):
        make_stage(saved_base).save_stage("t", tmp_path / "t" / "deeper")
    assert (tmp_path / "t").read_text() == "mine"


def test_config_and_card_describe_the_stage(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base, "low_rank")
    source = {"hub_id": "me/rows", "conversations": 5, "epochs": 2.0, "license": "mit"}
    training = {
        "license": "apache-2.0",
        "data": {"sources": {"rows": source}},
        "recipe": {"name": "tool", "lr": 0.1},
        "trajectory": [{"step": 0, "val_bpb": 3.5}, {"step": 10, "val_bpb": 2.25}],
    }
    prompt = {"name": "chatml", "version": "1", "stop": ["w7", "w8 w9"]}
    folder = cascade.save_stage("t", tmp_path / "t", training, prompt=prompt)
    config = json.loads((folder / "config.json").read_text())
    assert config["stage"] == {
        "name": "t",
        "num_layers": 2,
        "attach_at": 2,
        "head": "low_rank",
        "head_rank": 4,
        "own_norm": False,
        "dtype": "bfloat16",
    }
    assert config["parent"] is None
    assert config["prompt"] == prompt
    assert not os.path.isabs(config["base"]["repo"])
    assert all(isinstance(value, str) for value in config["auto_map"].values())
    assert config["base_config"]["num_hidden_layers"] == 2
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert json.loads((folder / "training.json").read_text()) == training
    card = (folder / "README.md").read_text()
    for text in ("license: apache-2.0", "- me/rows", "lr: 0.1", "| 10 | 2.2500 |"):
        assert text in card
    assert "rows, license mit" in (folder / "NOTICE").read_text()
    assert (folder / "chat_template.jinja").exists()
    assert Cascade.from_pretrained(folder).stages["t"].prompt == prompt


def test_reading_returns_the_written_tensors(tmp_path: Path) -> None:
    tensors = {"layers.0.w": torch.randn(4, 2), "head.b": torch.randn(3, 1)}
    path = tmp_path / "delta.safetensors"
    fingerprint = write_delta(path, tensors, stage="t", attach_at=2, base_fingerprint="b", dtype=torch.float32)
    got = read_delta(path, "t")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert read_delta_header(path).self_fingerprint == fingerprint
    with pytest.raises(StageError, match="float32, bfloat16 or float16"):
        write_delta(path, tensors, stage="t", attach_at=2, base_fingerprint="b", dtype=torch.int16)
