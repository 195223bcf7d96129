"""A stage gives the same results from remote code without this package, from the package, and from transformers."""

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import poe.modeling
from command_line import run_stranger
from conftest import EXEMPLARS, RECURRENT, mostly_slow, scramble, token_ids
from poe import Cascade, StageConfig
from poe.errors import SourceError
from poe.loaders.stage_folder import network_files
from poe.modeling.modeling_poe_stage import PoEStageConfig, PoEStageForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Group = tuple[tuple[str, str], ...]  # (base, dtype)
HEADS = ("dense", "low_rank", "none")
# Every base in one dtype is quick. A group is opened by one process, which costs as much as many folders.
QUICK = tuple((name, ("fp32", "bf16")[index % 2]) for index, name in enumerate(EXEMPLARS))
SLOW = tuple(pair for pair in itertools.product(EXEMPLARS, DTYPES) if pair not in QUICK)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}

# What a stranger runs. `poe` cannot be imported; every folder named on stdin is opened and used.
STRANGER = """
import hashlib, json, sys
sys.modules["poe"] = None
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
job = json.load(sys.stdin)
ids, padded, mask = (torch.tensor(job[name]) for name in ("ids", "padded", "mask"))
answers = {}
for folder in job["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        logits = model(ids).logits.float().numpy().tobytes()
    answers[folder] = [
        type(model).__name__,
        hashlib.sha256(logits).hexdigest(),
        model.generate(input_ids=ids, **job["greedy"]).tolist(),
        model.generate(input_ids=ids, use_cache=False, **job["greedy"]).tolist(),
        model.generate(input_ids=padded, attention_mask=mask, **job["greedy"]).tolist(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("w5 w6").input_ids,
        str(model.dtype),
    ]
try:
    import poe
except ImportError:
    json.dump(answers, sys.stdout)
"""


def stranger(folders: list[str], environment: dict[str, str] | None = None) -> dict:
    """Open folders in a process without this package; return what it saw, by folder."""
    job = dict(
        zip(("ids", "padded", "mask"), (t.tolist() for t in prompts()), strict=True), folders=folders, greedy=GREEDY
    )
    return run_stranger(STRANGER, job, environment)


def prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids (2, 9), the same left-padded (2, 12), and the mask of the padded ones."""
    ids = token_ids()
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], dim=1)
    return ids, padded, (torch.arange(12) >= 3).long().repeat(2, 1)


@pytest.fixture(scope="module")
def stages(saved_base, tmp_path_factory) -> Callable[[Group], dict[str, str]]:
    """A scrambled stage on each (base, dtype) of a group with every head, and a chain of two; name -> folder."""

    @functools.cache
    def save(group: Group) -> dict[str, str]:
        root, folders = tmp_path_factory.mktemp("stages"), {}
        for name, label in group:
            cascade = Cascade.from_pretrained(saved_base(name, DTYPES[label]))
            for head in HEADS:
                stage = f"{name}-{label}-{head}"
                cascade.add_stage(StageConfig(stage, 2, head, 4))
                scramble(cascade.stages[stage], seed=1)
                folders[stage] = str(cascade.save_stage(stage, root / stage))
            child = f"{name}-{label}-child"
            cascade.add_stage(StageConfig(child, 1, "low_rank", 4, parent=f"{name}-{label}-dense"))
            scramble(cascade.stages[child], seed=2)
            folders[child] = str(cascade.save_stage(child, root / child))
        return folders

    return save


@pytest.fixture(scope="module")
def seen(stages) -> Callable[[Group], dict]:
    """What a stranger sees in each folder of a group."""
    return functools.cache(lambda group: stranger(list(stages(group).values())))


@pytest.mark.parametrize("head", [*HEADS, "child"])
@pytest.mark.parametrize(
    ("group", "base_name", "label"),
    [*((QUICK, *pair) for pair in QUICK), *(pytest.param(SLOW, *pair, marks=pytest.mark.slow) for pair in SLOW)],
)
def test_remote_code_and_the_package_give_the_same_results(
    group, base_name, label, head, stages, seen, tmp_path
) -> None:
    import hashlib

    folder = stages(group)[f"{base_name}-{label}-{head}"]
    cascade = Cascade.from_pretrained(folder)
    kind, logits, cached, uncached, padded, words, dtype = seen(group)[folder]
    ids, padded_ids, mask = prompts()
    with torch.no_grad():
        mine = cascade(ids).logits
    assert kind == type(cascade.base).__name__
    assert dtype == str(DTYPES[label])
    assert logits == hashlib.sha256(mine.float().numpy().tobytes()).hexdigest()
    assert cached == cascade.generate(input_ids=ids, **GREEDY).tolist()
    assert uncached == cascade.generate(input_ids=ids, use_cache=False, **GREEDY).tolist()
    assert padded == cascade.generate(input_ids=padded_ids, attention_mask=mask, **GREEDY).tolist()
    assert cached != cascade.generate(input_ids=ids, stage=None, **GREEDY).tolist()
    if label == "fp32":
        assert cached == uncached == [row[3:] for row in padded]
    assert words == cascade.tokenizer("w5 w6").input_ids
    if base_name in RECURRENT:
        return
    cascade.model(cascade.active).save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, mine)


def test_the_network_files_import_nothing_of_ours() -> None:
    import ast

    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    files = network_files()
    names = {path.name for path in files}
    assert {"modeling_poe_stage.py", "modeling_poe.py", "failures.py"} <= names
    stays = {
        "__init__.py",
        "answer_boundary.py",
        "boundary.py",
        "early.py",
        "span_attention.py",
        "standins.py",
    }  # for training and exits alone
    assert names == {path.name for path in Path(poe.modeling.__file__).parent.glob("*.py")} - stays
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{path.name}: the scanner misses `from . import x`"
                assert f"{node.module}.py" in names


OPTIONS = """
import os, sys, torch, transformers
sys.modules["poe"] = None
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, pipeline
folder, moved, wrong = sys.argv[1:]
load = lambda place=folder, **options: AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)
model = load(dtype=torch.bfloat16, attn_implementation="eager", low_cpu_mem_usage=True)
assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
assert model.generation_config.eos_token_id == [2, 7], model.generation_config
assert not model.training and all(p.requires_grad for p in model.parameters())
assert load(dtype="float32").dtype == load().dtype == torch.float32
model = load(device_map="cpu", revision="main")
assert load(device_map="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
model, info = load(output_loading_info=True)
assert not info["missing_keys"]
out = pipeline("text-generation", model=folder, trust_remote_code=True)("w5 w6", max_new_tokens=4, do_sample=False)
assert out[0]["generated_text"].startswith("w5 w6"), out
model.set_attn_implementation("eager")
assert model(torch.tensor([[5, 6]]), output_attentions=True, output_hidden_states=True).attentions[-1] is not None
assert len(model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states) == 5
model.save_pretrained(sys.argv[2] + "-native")

def failing(kind, text, call):
    try:
        call()
    except Exception as error:
        assert type(error).__name__ == kind and text in str(error), (kind, text, type(error), error)
    else:
        raise AssertionError(kind)

os.environ["POE_BASE"] = wrong
failing("FingerprintError", "Wrong base", load)
os.environ["POE_BASE"] = "/no/such/folder"
failing("LineageError", "There is no folder /no/such/folder", load)
del os.environ["POE_BASE"]
failing("FingerprintError", "Wrong base", lambda: load(base=wrong))
load(base=wrong, verify=False)
open(folder + "/evil.pkl", "w").close()
failing("DeltaError", "evil.pkl", load)
os.unlink(folder + "/evil.pkl")
data = bytearray(open(folder + "/delta.safetensors", "rb").read())
data[-1] ^= 1
open(folder + "/delta.safetensors", "wb").write(data)
failing("FingerprintError", "changed after it was written", load)
open(folder + "/delta.safetensors", "wb").write(data[:-5])
failing("DeltaError", "truncated", load)
print("ALL GOOD")
"""


@pytest.mark.parametrize("name", mostly_slow(("poe", "qwen3-tied"), ["qwen3-tied"]))
def test_options_and_errors_through_remote_code(name: str, saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base(name)).add_stage(StageConfig("t", 2, head_rank=4))
    scramble(cascade.stages["t"], seed=1)
    folder = cascade.save_stage("t", tmp_path / "t", prompt={"name": "p", "version": "1", "stop": ["w7"]})
    arguments = [str(folder), str(tmp_path / "moved"), str(saved_base(name, seed=1))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OPTIONS, *arguments], capture_output=True, text=True, check=False
    )
    assert "ALL GOOD" in done.stdout, done.stderr[-3000:]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved-native")
    for name, tensor in cascade.stages["t"].layers.state_dict().items():
        stored = again.state_dict()[f"model.layers.{int(name[0]) + 2}{name[1:]}"]
        assert torch.equal(stored, tensor.to(torch.bfloat16).float()), name


def test_auto_classes_open_a_stage_when_the_package_is_installed(stages: Callable[[Group], dict[str, str]]) -> None:
    folder = stages(QUICK)["qwen3-fp32-dense"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(token_ids()).logits, Cascade.from_pretrained(folder)(token_ids()).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == Cascade.from_pretrained(folder).tokenizer.chat_template


def test_a_poe_base_opens_without_the_package(saved_base) -> None:
    code = (
        "import sys, torch; sys.modules['poe'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)('w5').input_ids)\n"
        "options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)\n"
        "print(model.generate(torch.tensor([[5, 6, 7]]), **options).tolist())"
    )
    folder = saved_base("poe")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    cascade = Cascade.from_pretrained(folder)
    tokens = cascade.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert done.stdout.splitlines() == ["[5]", str(tokens.tolist())], done.stderr[-2000:]


def test_a_subfolder_is_refused(stages: Callable[[Group], dict[str, str]]) -> None:
    with pytest.raises(SourceError, match="subfolder"):
        PoEStageForCausalLM.from_pretrained(stages(QUICK)["poe-fp32-none"], subfolder="x")
    with pytest.raises(NotImplementedError, match="loaded, not built"):
        PoEStageForCausalLM(PoEStageConfig())


def test_options_reach_the_base(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base()).add_stage(StageConfig("t", 1))
    folder = cascade.save_stage("t", tmp_path / "t")
    opened = Cascade.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert {p.dtype for p in opened.model("t").parameters()} == {torch.bfloat16}
    assert opened.model("t").config._attn_implementation == "eager"
    assert opened.tokenizer("w5").input_ids == [5]
    assert not any(p.requires_grad for p in opened.base.parameters())
    assert not opened.model("t").training
