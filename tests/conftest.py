"""Tiny bases of every family with random weights, shared fixtures, and a Hub on loopback with a cache of its own."""

import atexit
import copy
import functools
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: several run at once
_CACHE = tempfile.mkdtemp(prefix="poe-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    POE_CACHE=f"{_CACHE}/poe", HF_HOME=_CACHE, HF_MODULES_CACHE=f"{_CACHE}/modules", HF_HUB_DISABLE_PROGRESS_BARS="1"
)
for _name in ("POE_BASE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

from fake_hub import FakeHub  # noqa: E402

# The client reads the address of the Hub when it is imported. No test connects to the real Hub.
HUB = FakeHub()
os.environ.update(HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
settings.register_profile("tests", suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
settings.load_profile("tests")

VOCABULARY = 61
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh"}
HRM = {"head_dim": 8, "num_key_value_heads": 4, "embedding_scale": 2.0, "L_cycles": 2}
TWO_TYPES = {"layer_types": ["full_attention", "sliding_attention"]}
TIED = {"tie_word_embeddings": True}
SMALL_RUN = {  # fields of a recipe, for a stage that trains in seconds
    "seq_len": 512,
    "tokens_per_step": 1024,
    "validation_every": 20,
    "eval_rows": 2,
    "dtype": "float32",
    "num_layers": 1,
    "validation_ratio": 0.1,
}
# name -> (model type, fields of its config)
BASES: dict[str, tuple[str, dict]] = {
    "poe": ("poe", {}),
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", TIED),
    "qwen2-sliding": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, **TIED}),
    "qwen3-sliding": ("qwen3", {"head_dim": 8, **SLIDING}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3-tied": ("smollm3", {"no_rope_layers": [0, 1], **TIED, **SLIDING}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral-tied": ("mistral", {"sliding_window": None, **TIED}),
    "gemma2": ("gemma2", {**GEMMA, "final_logit_softcapping": 3.0}),
    "gemma2-tied": ("gemma2", {**GEMMA, **TWO_TYPES, **TIED}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3-tied": ("gemma3_text", {**GEMMA, **TWO_TYPES, "final_logit_softcapping": 3.0, **TIED}),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": 4, **TIED}),
    "olmo2": ("olmo2", {}),
    "olmo2-tied": ("olmo2", TIED),
    "granite": (
        "granite",
        {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.4},
    ),
    "granite-tied": ("granite", {"residual_multiplier": 0.3, "logits_scaling": 0.5, **TIED}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 5.0}),
    "nanochat-tied": ("nanochat", TIED),
    "hrm": ("hrm_text", {**HRM, "L_bp_cycles": [1]}),
    "hrm-tied": ("hrm_text", {**HRM, "H_cycles": 3, "L_cycles": 1, "prefix_lm": False, **TIED}),
    # not declared: recognized by their structure
    "cohere-tied": ("cohere", {"logit_scale": 0.3, **TIED}),
    "glm4": ("glm4", {"head_dim": 8}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "stablelm": ("stablelm", {}),
}
# A PoE base with a head for each of its stages: its own head is a sum.
STAGED: dict[str, tuple[str, dict]] = {
    "poe-stages": ("poe", {"stage_layers": [1, 1], "stage_heads": True, "backout_layer": 0})
}
RECURRENT = ("hrm", "hrm-tied")  # a stage attaches on top only, and cannot be exported as an ordinary checkpoint
# One base of every kind, for tests of what does not depend on the family.
EXEMPLARS = ("poe", "qwen2-tied", "qwen3", "qwen3-tied", "gemma3-tied", "cohere-tied", "hrm")


def scramble(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Add noise to every parameter, also to those that are zero, so that every path changes the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter))


def tiny_base(name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a base of two layers and width 32 with random weights."""
    model_type, fields = (BASES | STAGED)[name]
    return tiny_model(model_type, fields, dtype, seed)


def tiny_model(
    model_type: str, fields: dict | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Return a causal language model of any model type, of two layers and width 32, with random weights."""
    import poe  # noqa: F401  - registers the PoE classes

    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **(fields or {}),
    }
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    scramble(model, seed)
    embedding = model.get_input_embeddings()
    with torch.no_grad():  # a tied model with a scaled embedding would only repeat its last token
        embedding.weight.div_(float(getattr(embedding, "embed_scale", 1.0)))
    return model


def tiny_tokenizer(base: str = "") -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of words `w3` ... with a chat template.

    On a qwen2 base transformers reads any tokenizer as byte-level BPE, so that one has the characters of these words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    if base.startswith("qwen2"):
        characters = {text: i for i, text in enumerate(["<|endoftext|>", "Ġ", "w", *"0123456789"], start=3)}
        inner = Tokenizer(models.BPE({**special, **characters}, []))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        words = {f"w{i}": i for i in range(3, VOCABULARY)}
        inner = Tokenizer(models.WordLevel({**special, **words}, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer


@functools.cache
def _demo_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from poe.demo.text import make_text
    from poe.demo.tokenizer import train_tokenizer

    return train_tokenizer([make_text(i).text for i in range(300)], 600)


def render_one(renderer: Any, conversation: Any) -> Any:
    """Render a conversation that takes one row."""
    (row,) = renderer.render(conversation)
    return row


def demo_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 600 tokens with the demo's special tokens and chat template."""
    return copy.deepcopy(_demo_tokenizer())


def token_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Return random token ids (rows, length) without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def mostly_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters of a test, with the mark `slow` on those that are not in `quick`."""
    quick = list(quick)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in quick else pytest.mark.slow
        )
        for value in values
    ]


def every_value(*axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of `axes` as parameters of a test. Quick are so many that each value occurs in one."""
    values = [list(axis) for axis in axes]
    count = max(map(len, values))
    quick = [tuple(axis[(i + shift) % len(axis)] for shift, axis in enumerate(values)) for i in range(count)]
    return mostly_slow(itertools.product(*values), quick)


@pytest.fixture(params=EXEMPLARS)
def base_name(request: pytest.FixtureRequest) -> str:
    """The name of one base of every kind, tied and untied."""
    return str(request.param)


@pytest.fixture(params=[name for name in EXEMPLARS if name not in RECURRENT])
def flat_name(request: pytest.FixtureRequest) -> str:
    """The name of one base of every kind whose layers run once each."""
    return str(request.param)


@pytest.fixture
def hub() -> FakeHub:
    """An empty Hub on loopback. HF_ENDPOINT holds its address."""
    HUB.reset()
    return HUB


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random PoE base of a few thousand weights with `demo_tokenizer()`. Do not write into it."""
    from poe.loaders.base import save_base_folder
    from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

    torch.manual_seed(0)
    config = PoEConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1)
    return save_base_folder(PoEForCausalLM(config), tmp_path_factory.mktemp("demo") / "base", demo_tokenizer())


@pytest.fixture(scope="session")
def stage_folders(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The folders of three random stages on `demo_base`. Do not write into them."""
    from served_models import save_stages

    return save_stages(demo_base, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="session")
def served(demo_base: Path, stage_folders: list[str]) -> Any:
    """The cascade of `demo_base` with the stages of `stage_folders`, and the models of a server for them."""
    from served_models import open_models

    return open_models([str(demo_base), *stage_folders])


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `saved_base(name, dtype, seed)`, which gives the folder of a tiny base. Do not write into it."""
    from poe.loaders.base import save_base_folder

    root, known = tmp_path_factory.mktemp("bases"), {}

    def get(name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
        key = f"{name}-{str(dtype).removeprefix('torch.')}-{seed}"
        if key not in known:
            known[key] = save_base_folder(tiny_base(name, dtype, seed), root / key, tiny_tokenizer(name))
        return known[key]

    return get
