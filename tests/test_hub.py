"""Publish stages on a Hub and load them, over HTTP with the real client."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from command_line import run_program
from conftest import scramble, token_ids
from fake_hub import FakeHub
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.errors import DeltaError, FingerprintError, LineageError, SourceError, StageError
from poe.loaders.hub import plan_upload, upload
from poe.modeling.access import Access, fetch
from poe.modeling.tensor_file import read_header
from test_stage_loading import stranger

TOKEN = {"token": "hf_me"}


def rounded(cascade: Cascade, name: str, seed: int = 1) -> Cascade:
    """Give a stage random weights that bf16 holds exactly, so that what is stored is what is here."""
    scramble(cascade.stages[name], seed)
    with torch.no_grad():
        for parameter in cascade.stages[name].parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return cascade


def publish_base(folder: Path, repo: str = "me/base") -> str:
    """Push a base's folder and return its commit."""
    return str(upload(plan_upload(folder, repo, **TOKEN), **TOKEN).oid)


def stage_folder(saved_base, tmp_path: Path, name: str = "t", seed: int = 1) -> Path:
    """Return the folder of a stage on a base that only this machine has."""
    cascade = Cascade.from_pretrained(saved_base()).add_stage(StageConfig(name, 1, "low_rank", 4))
    return rounded(cascade, name, seed).save_stage(name, tmp_path / name)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again at once where it would wait."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def chain(hub: FakeHub, saved_base, request: pytest.FixtureRequest) -> tuple[str, str, str, torch.Tensor]:
    """Three repositories, each of another owner: (base, parent, child, what the child computes)."""
    mark = request.node.name.split("[")[0].replace("test_", "")[:40]
    base, parent, child = f"owner1/{mark}", f"owner2/{mark}", f"owner3/{mark}"
    publish_base(saved_base(), base)
    cascade = Cascade.from_pretrained(base)
    for repo, name, below in ((parent, "parent", None), (child, "child", "parent")):
        cascade.add_stage(StageConfig(name, 1, "low_rank" if below else "dense", 4, parent=below))
        rounded(cascade, name, len(name)).push_to_hub(repo, stage=name, **TOKEN)
    with torch.no_grad():
        return base, parent, child, cascade(token_ids()).logits


def edit_config(hub: FakeHub, repo: str, **changes) -> None:
    """Change fields of a published config.json behind everybody's back."""
    config = json.loads(hub.files(repo)["config.json"])
    hub.put(repo, **{"config.json": json.dumps({**config, **changes}).encode()})


@pytest.mark.slow
def test_a_chain_over_three_repositories_loads_with_and_without_the_package(chain, hub, saved_base, tmp_path) -> None:
    base, parent, child, expected = chain
    config = json.loads(hub.files(child)["config.json"])
    assert config["parent"]["repo"] == parent
    assert config["parent"]["revision"] == hub.repos[parent].branches["main"]
    assert config["base"]["repo"] == base
    assert config["base"]["revision"] == hub.repos[base].branches["main"]
    assert f"base_model: {base}" in hub.files(child)["README.md"].decode()
    # A pinned commit stays the same after its owners change the repository.
    for repo, file in ((base, "model.safetensors"), (parent, "delta.safetensors"), (parent, "config.json")):
        hub.put(repo, **{file: b"another"})
    cascade = Cascade.from_pretrained(child)
    assert list(cascade.stages) == ["parent", "child"]
    assert torch.equal(cascade(token_ids()).logits, expected)
    assert torch.equal(Cascade.from_pretrained(child, local_files_only=True)(token_ids()).logits, expected)
    for name, repo in (("parent", parent), ("child", child)):
        again = cascade.save_stage(name, tmp_path / name) / "delta.safetensors"
        first = hub.repos[repo].commits[list(hub.repos[repo].commits)[1]]
        assert again.read_bytes() == first["delta.safetensors"], name
    online = stranger([child])
    asked = len(hub.requests)
    assert stranger([child], {"HF_HUB_OFFLINE": "1"}) == online
    assert len(hub.requests) == asked
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert online[child][2] == cascade.activate("child").generate(input_ids=token_ids(), **greedy).tolist()


def test_a_revision_is_pinned_to_a_commit(hub: FakeHub, saved_base) -> None:
    publish_base(saved_base())
    cascade = Cascade.from_pretrained("me/base").add_stage(StageConfig("t", 1))
    expected = []
    for seed, branch in ((1, None), (2, None), (3, "next")):
        address = rounded(cascade, "t", seed).push_to_hub("me/t", revision=branch, **TOKEN)
        expected.append((address.rpartition("/")[2], cascade(token_ids()).logits))
    assert cascade.stages["t"].source["revision"] == expected[2][0]
    for revision, logits in [*expected, ("main", expected[1][1]), (None, expected[1][1]), ("next", expected[2][1])]:
        again = Cascade.from_pretrained("me/t", revision=revision)
        assert torch.equal(again(token_ids()).logits, logits), revision
        assert again.stages["t"].source["repo"] == "me/t"
        assert len(again.stages["t"].source["revision"]) == 40
    with pytest.raises(SourceError, match=r"no such revision \(404\)"):
        Cascade.from_pretrained("me/t", revision="never")


@pytest.mark.slow
def test_a_private_repository_opens_only_for_its_owner(hub: FakeHub, saved_base) -> None:
    publish_base(saved_base())
    cascade = Cascade.from_pretrained("me/base").add_stage(StageConfig("t", 1))
    cascade.push_to_hub("me/secret", private=True, **TOKEN)
    assert hub.repos["me/secret"].private
    with pytest.raises(SourceError, match=r"private and your token may not see it \(401\).*hf auth login"):
        Cascade.from_pretrained("me/secret")
    assert Cascade.from_pretrained("me/secret", **TOKEN).active == "t"
    cascade.push_to_hub("me/open", **TOKEN)
    before = dict(hub.repos["me/open"].commits)
    with pytest.raises(SourceError, match="me/open exists and is public"):
        cascade.push_to_hub("me/open", private=True, **TOKEN)
    assert hub.repos["me/open"].commits == before


@pytest.mark.parametrize(
    ("repo", "trouble", "message"),
    [
        ("me/nothing", None, r"no such repository.*\(401\)"),
        ("me/gated", None, r"is gated \(403\)\. Ask for access at http://127.*/me/gated.*hf auth login"),
        ("me/limited", 429, r"too many requests to the Hub \(429\)\. Wait some minutes"),
        ("me/limited", 503, r"answered 503\. Try again later.*local_files_only"),
        ("me/limited", 403, r"may not do this \(403\)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_clear_error(hub, saved_base, no_waiting, repo, trouble, message) -> None:
    publish_base(saved_base(), "me/gated")
    hub.repos["me/gated"].gated = True
    hub.answer_all = trouble
    with pytest.raises(SourceError, match=message) as caught:
        Cascade.from_pretrained(repo)
    assert repo in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failing_hub_is_not_taken_for_an_empty_repository(hub, saved_base, no_waiting) -> None:
    publish_base(saved_base(), "me/halfway")
    source = Cascade.from_pretrained("me/halfway").base_source
    hub.answer_all = 429
    with pytest.raises(SourceError, match="too many requests"):
        fetch("me/halfway", "model.safetensors.index.json", Access(), "main")
    assert fetch("me/halfway", "model.safetensors", Access(), source.revision) is not None


@pytest.mark.parametrize(
    ("token", "trouble", "message"),
    [
        (False, None, r"\(401\)"),
        ("hf_me", 403, r"may not do this \(403\)"),
        ("hf_me", 429, r"too many requests to the Hub \(429\)"),
    ],
)
def test_a_refused_push_is_one_clear_error(hub, saved_base, no_waiting, token, trouble, message) -> None:
    plan = plan_upload(saved_base(), "me/t")
    hub.answer_all = trouble
    with pytest.raises(SourceError, match=message):
        upload(plan, token=token)
    assert "me/t" not in hub.repos


def test_an_interrupted_upload_publishes_nothing_and_can_be_repeated(hub: FakeHub, saved_base, no_waiting) -> None:
    publish_base(saved_base())
    cascade = Cascade.from_pretrained("me/base").add_stage(StageConfig("t", 1))
    rounded(cascade, "t")
    hub.drop_uploads = 99
    with pytest.raises(SourceError, match="Stage t could not be pushed"):
        cascade.push_to_hub("me/broken", stage="t", **TOKEN)
    assert hub.uploading.is_set()
    assert hub.files("me/broken") == {}
    assert cascade.stages["t"].source is None
    hub.drop_uploads = 2  # the client tries again by itself
    cascade.push_to_hub("me/broken", stage="t", **TOKEN)
    assert hub.drop_uploads == 0
    assert torch.equal(Cascade.from_pretrained("me/broken")(token_ids()).logits, cascade(token_ids()).logits)


def test_a_push_with_a_lost_answer_is_a_push_if_the_hub_has_its_files(hub: FakeHub, saved_base, no_waiting) -> None:
    plan = plan_upload(saved_base(), "me/lost")
    hub.drop_answers = 99
    commit = upload(plan, **TOKEN)
    assert commit.oid == hub.repos["me/lost"].branches["main"]
    assert set(hub.files("me/lost")) == set(plan.files)


def test_a_push_with_a_lost_answer_names_what_is_unknown(hub: FakeHub, saved_base, no_waiting, monkeypatch) -> None:
    trouble: list[int | None] = []

    def lose(api, repo_id: str, *args, **options):
        hub.put("me/lost", **{"other.txt": b"of somebody else"})
        hub.answer_all = trouble[0]
        raise ConnectionError("lost")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lose)
    for status, message in ((None, "somebody else changed me/lost"), (429, "may have been pushed")):
        hub.answer_all, trouble[:] = None, [status]
        with pytest.raises(SourceError, match=message):
            upload(plan_upload(saved_base(), "me/lost"), **TOKEN)


def program(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "poe.commands.poe", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_nothing_behind(hub: FakeHub, saved_base, tmp_path: Path) -> None:
    publish_base(saved_base())
    arguments = ["push", str(stage_folder(saved_base, tmp_path)), "me/killed", "--base", "me/base"]
    hub.hold_uploads = True
    running = program(*arguments, HF_TOKEN="hf_me")
    try:
        assert hub.uploading.wait(300), running.stdout.read()
    finally:
        running.send_signal(signal.SIGKILL)
    running.communicate()
    assert hub.files("me/killed") == {}
    hub.hold_uploads = False
    again = run_program("poe", *arguments, environment={"HF_TOKEN": "hf_me"})
    text = again.stdout
    assert again.returncode == 0, again.stderr
    assert f"/me/killed/commit/{hub.repos['me/killed'].branches['main']}" in text
    local = (tmp_path / "t" / "delta.safetensors").read_bytes()
    assert hub.files("me/killed")["delta.safetensors"] == local
    assert Cascade.from_pretrained("me/killed").active == "t"


def test_push_of_a_folder_uploads_that_folder(hub: FakeHub, saved_base, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    folder = stage_folder(saved_base, tmp_path)
    (folder / "dropped.jsonl").write_text("somebody's row")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.safetensors").write_text("large")
    publish_base(saved_base())
    before = len(hub.requests)
    run = CliRunner().invoke(app, ["push", str(folder), "me/t", "--base", "me/base", "--dry-run"])
    assert run.exit_code == 0, run.output
    assert not [line for line in hub.requests[before:] if not line.startswith(("GET", "HEAD"))]
    assert "me/t" not in hub.repos
    names = {path.name for path in folder.iterdir()} - {"dropped.jsonl", "checkpoint"}
    for name in names:
        assert name in run.output
    assert f"{(folder / 'delta.safetensors').stat().st_size:,}" in run.output
    assert "not uploaded: checkpoint/state.safetensors, dropped.jsonl" in run.output
    run = CliRunner().invoke(app, ["push", str(folder), "me/t", "--base", "me/base", "--revision", "v1"])
    assert run.exit_code == 0, run.output
    assert hub.files("me/t") == {}
    there = hub.files("me/t", "v1")
    assert there.keys() == names
    differing = {name for name in names if there[name] != (folder / name).read_bytes()}
    assert differing == {"config.json", "README.md", "NOTICE"}
    base = json.loads(there["config.json"])["base"]
    assert base == {
        "repo": "me/base",
        "revision": hub.repos["me/base"].branches["main"],
        "fingerprint": json.loads((folder / "config.json").read_text())["base"]["fingerprint"],
    }
    assert not any(str(tmp_path).encode() in content for content in there.values())
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.")
    assert plan_upload(folder, "me/t", base="me/base").files["README.md"] == folder / "README.md"


def test_a_local_parent_must_be_pushed_first(hub: FakeHub, saved_base, tmp_path: Path) -> None:
    parent = stage_folder(saved_base, tmp_path, "parent")
    cascade = Cascade.from_pretrained(parent).add_stage(StageConfig("child", 1, parent="parent"))
    child = rounded(cascade, "child", 5).save_stage("child", tmp_path / "child")
    other = stage_folder(saved_base, tmp_path, "other", seed=2)
    publish_base(saved_base())
    for folder, repo in ((parent, "me/parent"), (other, "me/other")):
        upload(plan_upload(folder, repo, base="me/base", **TOKEN), **TOKEN)
    with pytest.raises(LineageError, match=r"'child' stands on a parent that only this machine has.*--parent me/NAME"):
        plan_upload(child, "me/child", base="me/base", **TOKEN)
    with pytest.raises(LineageError, match=r"stands on a base that only this machine has.*--base me/NAME"):
        plan_upload(child, "me/child", parent="me/parent", **TOKEN)
    with pytest.raises(FingerprintError, match="me/other is not the parent of 'child'"):
        plan_upload(child, "me/child", base="me/base", parent="me/other", **TOKEN)
    with pytest.raises(LineageError, match="me/base is not a stage"):
        plan_upload(child, "me/child", base="me/base", parent="me/base", **TOKEN)
    with pytest.raises(StageError, match="has no parent, so parent= does not apply"):
        plan_upload(parent, "me/parent", base="me/base", parent="me/other", **TOKEN)
    upload(plan_upload(child, "me/child", base="me/base", parent="me/parent", **TOKEN), **TOKEN)
    again = Cascade.from_pretrained("me/child")
    assert torch.equal(again(token_ids()).logits, cascade(token_ids()).logits)


@pytest.mark.parametrize("name", ["x.pkl", "sub/pytorch_model.bin", "notes.txt", "evil.py", "model.safetensors"])
def test_unexpected_files_are_refused_by_name(hub, saved_base, tmp_path: Path, name: str) -> None:
    publish_base(saved_base())
    folder = stage_folder(saved_base, tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(DeltaError, match=name):
        plan_upload(folder, "me/t", base="me/base")


def test_a_push_is_checked_first(hub: FakeHub, saved_base, tmp_path: Path) -> None:
    publish_base(saved_base())
    publish_base(saved_base(seed=1), "me/other")
    folder = stage_folder(saved_base, tmp_path)
    with pytest.raises(DeltaError, match=r"cannot be published: base: Wrong base"):
        plan_upload(folder, "me/t", base="me/other")
    with pytest.raises(LineageError, match="base should be a repository on the Hub, got the folder"):
        plan_upload(folder, "me/t", base=str(saved_base()))
    with pytest.raises(SourceError, match="is not a repository name"):
        plan_upload(folder, "me/t/oops", base="me/base")
    (folder / "modeling_poe.py").write_text("print('mine')")
    with pytest.raises(DeltaError, match=r"network files: modeling_poe\.py is not the one of this package"):
        plan_upload(folder, "me/t", base="me/base")
    with pytest.raises(SourceError, match="There is no folder"):
        plan_upload(tmp_path / "nowhere", "me/t")


def test_a_tampered_file_on_the_hub_is_refused(chain, hub: FakeHub, tmp_path: Path) -> None:
    base, parent, child, expected = chain
    for repo, file, message in (
        (base, "model.safetensors", "Wrong base"),
        (parent, "delta.safetensors", "changed after it was written"),
        (child, "delta.safetensors", "changed after it was written"),
    ):
        # In the very commit that is named: as if the Hub itself were not to be trusted.
        commits = hub.repos[repo].commits
        oid = hub.repos[repo].branches["main"]
        honest = commits[oid]
        commits[oid] = {**honest, file: honest[file][:-1] + bytes([honest[file][-1] ^ 1])}
        with pytest.raises(FingerprintError, match=message):
            Cascade.from_pretrained(child, cache_dir=tmp_path / repo)
        commits[oid] = honest
    assert torch.equal(Cascade.from_pretrained(child, cache_dir=tmp_path / "c")(token_ids()).logits, expected)


HOSTILE = ["../../../secret", "/etc", "~/private", "a/b/c", ".", "./x", "owner/../../x"]


@pytest.mark.parametrize("where", HOSTILE)
@pytest.mark.parametrize("what", ["base", "parent"])
def test_a_repository_cannot_name_a_folder_of_the_reader(hub, saved_base, tmp_path, monkeypatch, what, where) -> None:
    folder = stage_folder(saved_base, tmp_path)
    hub.repos.clear()
    publish_base(saved_base())
    upload(plan_upload(folder, "me/hostile", base="me/base", **TOKEN), **TOKEN)
    config = json.loads(hub.files("me/hostile")["config.json"])
    named = {**config["base"], "repo": where, "revision": None}
    edit_config(hub, "me/hostile", **{what: named})
    read = []
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: read.append(str(path)) or real(path, *a, **k))
    with pytest.raises(LineageError, match="may name only repositories"):
        Cascade.from_pretrained("me/hostile")
    assert not [path for path in read if "secret" in path or "private" in path]
    if what == "base":  # the reader may say so
        assert Cascade.from_pretrained("me/hostile", base=saved_base()).active == "t"


def test_a_local_folder_does_not_replace_a_repository(chain, saved_base, tmp_path, monkeypatch) -> None:
    base, _, child, _ = chain
    shutil.copytree(saved_base(), tmp_path / base)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LineageError, match="the working directory holds a folder of that name"):
        Cascade.from_pretrained(child)


def test_an_absolute_path_is_refused_in_a_folder(saved_base, tmp_path: Path) -> None:
    folder = stage_folder(saved_base, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["base"]["repo"] = str(saved_base())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LineageError, match="expected a path relative to its own"):
        Cascade.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"parent": "me/base"},
        {"parent": {"repo": 3, "fingerprint": "x"}},
        {"parent": {"repo": "me/base"}},
        {"base": ["me/base"]},
        {"base": {"fingerprint": 1}},
        {"base": {"fingerprint": "f", "repo": {}}},
        {"stage": {"name": ["t"], "num_layers": 1, "attach_at": 2, "head": "none"}},
    ],
)
def test_a_malformed_config_is_one_clear_error(hub, saved_base, tmp_path, changes: dict) -> None:
    publish_base(saved_base())
    upload(plan_upload(stage_folder(saved_base, tmp_path), "me/shape", base="me/base", **TOKEN), **TOKEN)
    edit_config(hub, "me/shape", **changes)
    with pytest.raises(DeltaError, match=r"config\.json: .*Fetch it again"):
        Cascade.from_pretrained("me/shape")


def test_shards_of_other_folders_are_refused(saved_base, tmp_path: Path) -> None:
    base = shutil.copytree(saved_base(), tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = stage_folder(saved_base, tmp_path)
    with pytest.raises(SourceError, match="expected safetensors files of its own folder"):
        Cascade.from_pretrained(folder, base=base)
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SourceError, match=r"expected a JSON object, got list"):
        Cascade.from_pretrained(folder, base=base)


@pytest.mark.slow
def test_pickles_of_a_repository_are_never_fetched(chain, hub: FakeHub) -> None:
    base, _, child, expected = chain
    evil = {"pytorch_model.bin": b"\x80", "tokenizer.pkl": b"\x80", "sub/x.pt": b"\x80"}
    hub.put(child, **evil)
    hub.put(base, **evil)
    assert torch.equal(Cascade.from_pretrained(child)(token_ids()).logits, expected)
    assert stranger([child])
    assert not [name for name in hub.sent if name.endswith((".bin", ".pkl", ".pt"))]
    run = CliRunner().invoke(app, ["verify", child])
    assert run.exit_code == 1
    assert "FAIL file names: expected no file that can carry a pickle, got pytorch_model.bin" in run.output
    assert run.output.count("FAIL") == 1


def test_inspect_reads_the_header_and_no_weights(chain, hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    base, parent, child, _ = chain
    hub.sent.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    done = run_program("poe", "inspect", child, columns=400)
    text = done.stdout
    assert done.returncode == 0, done.stderr
    assert "child: 1 layers above 3, head rank 4" in text
    assert f"{base} (revision {hub.repos[base].branches['main']})" in text
    for repo in (parent, child):
        content = hub.files(repo)["delta.safetensors"]
        (tmp_path / "d").write_bytes(content)
        first_weight = min(entry.start for entry in read_header(tmp_path / "d")[0].values())
        assert f"{len(content):,} bytes" in text
        assert hub.sent[f"{repo}/delta.safetensors"] == first_weight
    assert not [name for name in hub.sent if name.endswith("model.safetensors")]
