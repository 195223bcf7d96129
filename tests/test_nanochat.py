"""nanochat checkpoints as PoE bases, against golden numbers from nanochat's own code.

Seven of its versions, by commit, ran in fp32 on weights that `weights` makes here again, and its tokenizer on texts
that are hard to cut. Where a version always computes in bf16, or calls FlashAttention, fp32 and its
own later fallback stood in.
"""

import base64
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import run_program
from conftest import render_one, scramble
from poe import Cascade, StageConfig
from poe.calls.conversation import Conversation
from poe.data.render import Renderer, token_bytes
from poe.data.templates import extend_with_tools
from poe.errors import SourceError
from poe.loaders.nanochat_base import import_nanochat

GOLDEN = Path(__file__).parent / "golden"
RUN = json.loads((GOLDEN / "nanochat_layouts.json").read_text())
LAYOUTS = RUN["layouts"]
TOKENS = json.loads((GOLDEN / "nanochat_tokenizer.json").read_text())
IDS = torch.tensor(RUN["ids"])
OLDEST, NEWEST = next(iter(LAYOUTS)), list(LAYOUTS)[-1]


def weights(layout: str) -> dict[str, Tensor]:
    """The weights that nanochat computed the golden logits with: no generator's, so that no version changes them."""
    made = {}
    for name, shape in LAYOUTS[layout]["shapes"].items():
        seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name)) % 1009
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + seed) * 43758.5453
        noise = ((wave - wave.floor()) * 2 - 1).reshape(shape)
        if len(shape) == 1:
            noise = 0.7 + 0.3 * noise
        elif not any(part in name for part in ("wte", "value_embeds", "lm_head")):
            noise = noise * (3 / shape[1]) ** 0.5
        made[name] = noise.float()
    return made


def write(folder: Path, layout: str, tensors: dict[str, Tensor] | None = None, step: int = 10) -> Path:
    """A checkpoint folder as nanochat leaves it, the tokenizer beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights(layout) if tensors is None else tensors, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.0, "model_config": LAYOUTS[layout]["model_config"]}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(base64.b64decode(TOKENS["pickle"]))
    torch.save(torch.tensor(TOKENS["token_bytes"]["2026-07-03"]), folder / "token_bytes.pt")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return `imported(layout)`: the PoE base made of a version's checkpoint, once per module."""
    root = tmp_path_factory.mktemp("nanochat")

    def get(layout: str) -> Path:
        if not (root / layout).exists():
            import_nanochat(write(root / f"{layout}-checkpoint", layout), root / layout)
        return root / layout

    return get


@pytest.fixture(scope="module")
def tokenizer(imported):
    return AutoTokenizer.from_pretrained(imported(NEWEST))


def kept(logits: Tensor) -> Tensor:
    """The part of logits (2, 150, 500) that is golden."""
    return logits[:, RUN["positions"], :: RUN["every"]]


def golden(layout: str) -> Tensor:
    return load_file(GOLDEN / "nanochat_logits.safetensors")[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_are_nanochats(layout: str, imported) -> None:
    """Several rows and each alone, by transformers alone and by the package, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(imported(layout), trust_remote_code=True)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(kept(model(IDS).logits), golden(layout), **close)
    alone = torch.cat([model(row[None]).logits for row in IDS])
    torch.testing.assert_close(kept(alone), golden(layout), **close)
    cascade = Cascade.from_pretrained(imported(layout))
    torch.testing.assert_close(kept(cascade(IDS).logits), golden(layout), **close)
    options = {"attention_mask": torch.ones(1, 8), "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert cascade.generate(input_ids=IDS[:1, :8], **options)[0, 8:].tolist() == LAYOUTS[layout]["greedy"]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10_000.0},
        {"attention_logit_scale": 1.15**2},
        {"value_gate_scale": 2.0},
        {"sliding_window": 128},
        {"layer_types": None},
        {"backout_layer": 1},
        {"final_logit_softcapping": 20.0},
        {"rms_norm_eps": 1e-3},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_every_constant_matters_to_the_golden_numbers(change: dict, imported) -> None:
    model = AutoModelForCausalLM.from_pretrained(imported(NEWEST), trust_remote_code=True, **change)
    assert (kept(model(IDS).logits) - golden(NEWEST)).abs().max() > 1e-3


@torch.no_grad()
def test_padded_rows_are_left_out(imported, tmp_path: Path) -> None:
    """nanochat pads its tables to a multiple of 64 rows and never computes with the padding."""
    tensors = weights(NEWEST)
    for name in ("transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight"):
        assert tensors[name].shape[0] == 512
        tensors[name][500:] = torch.nan
    import_nanochat(write(tmp_path / "checkpoint", NEWEST, tensors), tmp_path / "base")
    model, plain = Cascade.from_pretrained(tmp_path / "base"), Cascade.from_pretrained(imported(NEWEST))
    assert model.base.lm_head.weight.shape[0] == len(model.tokenizer) == 500
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_mixed_types_become_the_widest(imported, tmp_path: Path) -> None:
    """nanochat keeps embeddings in bf16 and all else in fp32; a compiled model's names have a prefix."""
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in weights(OLDEST).items()}
    table = tensors["_orig_mod.transformer.wte.weight"].bfloat16()
    tensors["_orig_mod.transformer.wte.weight"] = table
    import_nanochat(write(tmp_path / "checkpoint", OLDEST, tensors), tmp_path / "base")
    written = load_file(tmp_path / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["model.embed_tokens.weight"], table.float())
    plain = load_file(imported(OLDEST) / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], plain["lm_head.weight"])


def test_the_last_step_is_imported_and_nanochats_folders_are_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "base_checkpoints" / "d4", NEWEST)
    write(checkpoint, OLDEST, step=1_000_000)
    (tmp_path / "tokenizer").mkdir()
    shutil.move(checkpoint / "tokenizer.pkl", tmp_path / "tokenizer")
    done = import_nanochat(checkpoint, tmp_path / "base")
    assert (done.step, done.layout.since) == (1_000_000, "13 October 2025")
    assert done.parameters == sum(t.numel() for t in load_file(done.folder / "model.safetensors").values())


@torch.no_grad()
def test_a_stage_stands_on_it(imported, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(imported(NEWEST)).add_stage(StageConfig("t", 1, "low_rank", 2))
    torch.testing.assert_close(kept(cascade(IDS).logits), golden(NEWEST), atol=1e-5, rtol=1e-5)
    scramble(cascade.stages["t"])
    cascade.save_stage("t", tmp_path / "t", dtype=torch.float32)
    assert torch.equal(Cascade.from_pretrained(tmp_path / "t")(IDS).logits, cascade(IDS).logits)


def rename(old: str, new: str) -> Callable[[dict, dict], None]:
    return lambda tensors, meta: tensors.update({new: tensors.pop(old)})


def put(name: str, tensor: Tensor) -> Callable[[dict, dict], None]:
    return lambda tensors, meta: tensors.update({name: tensor})


def say(**fields: object) -> Callable[[dict, dict], None]:
    return lambda tensors, meta: meta["model_config"].update(fields)


def drop(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, meta: tensors.pop(name)


GATE = "transformer.h.{}.attn.ve_gate.weight"
WRONG = {
    "a tensor of an experiment": (put("v0_lambdas", torch.ones(4)), "v0_lambdas"),
    "two unknown tensors": (rename("smear_gate.weight", "engram.weight"), "1 tensors.*engram.weight"),
    "a missing matrix": (drop("transformer.h.2.mlp.c_fc.weight"), r"layers\.2\.mlp\.up_proj\.weight is missing"),
    "a missing embedding": (drop("transformer.wte.weight"), "width of 64"),
    "a missing gate": (drop(GATE.format(1)), "value_embed.weight is surplus"),
    "another shape": (put("transformer.h.0.mlp.c_fc.weight", torch.ones(9, 64)), r"\(9, 64\), expected \(256, 64\)"),
    "width beyond the heads": (say(n_embd=10**9), "fits no head"),
    "a head that is cut": (put("lm_head.weight", torch.ones(499, 64)), r"\(499, 64\), expected \(500, 64\)"),
    "queries without heads": (put("transformer.h.0.attn.c_q.weight", torch.ones(63, 64)), "fits no head"),
    "a vector for a matrix": (put("transformer.h.0.attn.c_q.weight", torch.ones(64)), "fits no head"),
    "scalars of more layers": (put("resid_lambdas", torch.ones(5)), "4 layers, but the checkpoint has 5"),
    "values that are not finite": (put("smear_lambda", torch.tensor([math.inf])), "smear.scale is not finite"),
    "gates of another width": (put(GATE.format(1), torch.ones(2, 16)), "not of a known version"),
    "smear without backout": (drop("backout_lambda"), "not of a known version"),
    "a stage": (put("lm_head_stage.weight", torch.ones(512, 64)), "head.weight is surplus"),
    "whole numbers": (lambda tensors, meta: tensors.update({n: t.int() for n, t in tensors.items()}), "int32"),
    "a field that is not known": (say(stage_layers=[2, 2]), "stage_layers"),
    "a field of the wrong type": (say(n_head="4"), "above 0"),
    "heads that do not divide": (say(n_head=3), "do not divide"),
    "layers without end": (say(n_layer=10**12), "layers"),
    "another width": (say(n_embd=128, n_head=8), "width of 128"),
    "another window": (say(window_pattern="SSX"), "SSX"),
    "another vocabulary": (say(vocab_size=501), "the tokenizer has 500"),
    "no sizes": (lambda tensors, meta: meta.pop("model_config"), "model_config"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_unknown_checkpoints_are_refused_and_nothing_is_written(change, message: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", NEWEST)
    path = checkpoint / "meta_000010.json"
    tensors, meta = weights(NEWEST), json.loads(path.read_text())
    change(tensors, meta)
    torch.save(tensors, checkpoint / "model_000010.pt")
    path.write_text(json.dumps(meta))
    with pytest.raises(SourceError, match=message):
        import_nanochat(checkpoint, tmp_path / "base")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_000010.pt", {"lm_head.weight": Bomb()}, "only tensors"),
        ("token_bytes.pt", Bomb(), "not one tensor"),
        ("tokenizer.pkl", Bomb(), "pickle of a tiktoken Encoding"),
        ("token_bytes.pt", torch.ones(499), "another tokenizer"),
        ("token_bytes.pt", torch.ones(500), "another tokenizer"),
        ("token_bytes.pt", torch.tensor(1.0), "another tokenizer"),
        ("meta_000010.json", "not JSON", "expected JSON"),
        ("tokenizer.pkl", None, "No tokenizer.pkl"),
        ("meta_000010.json", None, "meta_000010.json is missing"),
        ("model_000010.pt", None, "expected a nanochat checkpoint"),
    ],
)
def test_damaged_files_are_refused(name: str, content, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write(tmp_path / "checkpoint", NEWEST)
    (checkpoint / name).unlink()
    if content is not None:
        torch.save(content, checkpoint / name)
    with pytest.raises(SourceError, match=message):
        import_nanochat(checkpoint, tmp_path / "base")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_token_ids_are_nanochats(tokenizer) -> None:
    """nanochat reads the names of special tokens in a text as text; transformers does if it is asked to."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(special) == 9
    for row in TOKENS["texts"]:
        text, ids = row["text"], row["ids"]
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids, repr(text)
        if not any(token in text for token in special):
            assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids], repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|user_start|>", add_special_tokens=False)["input_ids"] == [492]


@pytest.mark.parametrize("version", TOKENS["token_bytes"])
def test_the_bytes_of_a_token_are_those_of_token_bytes(version: str, tokenizer, tmp_path: Path) -> None:
    """Older versions counted a part of a character as three bytes; both are known, ours are the true ones."""
    checkpoint = write(tmp_path / "checkpoint", OLDEST)
    torch.save(torch.tensor(TOKENS["token_bytes"][version]), checkpoint / "token_bytes.pt")
    import_nanochat(checkpoint, tmp_path / "base")
    assert token_bytes(tokenizer).tolist() == TOKENS["token_bytes"]["2026-07-03"]


@pytest.mark.parametrize("row", TOKENS["conversations"], ids=["plain", "system", "python"])
def test_conversations_are_rendered_as_nanochat_does(row: dict, tokenizer) -> None:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    rendered = tokenizer.apply_chat_template(row["messages"], **options)
    assert rendered["input_ids"] == row["ids"]
    assert rendered["assistant_masks"] == row["mask"]
    asked = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=True, add_generation_prompt=True)
    assert asked["input_ids"] == row["completion"]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["system"], "expected one"),
        (["system", "assistant"], "expected one"),
        (["assistant"], "expected user, got assistant"),
        (["user", "user"], "expected assistant, got user"),
        (["user", "system"], "expected assistant, got system"),
    ],
)
def test_unsupported_conversations_are_refused(roles: list[str], message: str, tokenizer) -> None:
    with pytest.raises(Exception, match=message):
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


def test_a_stage_learns_its_turns_with_their_ends(tokenizer) -> None:
    """nanochat's rows, rendered for training: what it learns, up to the token that ends an answer."""
    for row in TOKENS["conversations"][:2]:  # the third is in parts, which rows of ours never are
        rendered = render_one(Renderer(tokenizer), Conversation(row["messages"]))
        assert rendered.input_ids == row["ids"]
        assert [int(learned) for learned in rendered.loss_mask] == row["mask"]


def test_tools_are_described_in_the_first_question(imported) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported(NEWEST))
    assert extend_with_tools(tokenizer)
    tool = {"type": "function", "function": {"name": "weather", "description": "The sky", "parameters": {}}}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Rain?"}], tools=[tool], tokenize=False)
    assert text.startswith("<|bos|><|user_start|>")
    assert text.index("The sky") < text.index("Rain?<|user_end|>")


def test_the_import_command(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", "a91743c")
    done = run_program("poe", "import", "nanochat", checkpoint, tmp_path / "base")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "step 10," in said
    assert "18 January 2026" in said
    assert "final_logit_softcapping" in said  # what the tensors cannot tell
    torch.save({"engram.weight": torch.ones(1, 1)}, checkpoint / "model_000010.pt")
    failed = run_program("poe", "import", "nanochat", checkpoint, tmp_path / "other")
    assert failed.returncode == 1
    assert "engram.weight" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "other").exists()
