"""Tiny bases of every family, with random weights on which an error cannot hide; no user's cache, no real Hub."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="poe-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(HF_HOME=_CACHE, HF_MODULES_CACHE=f"{_CACHE}/modules", HF_HUB_DISABLE_PROGRESS_BARS="1")
for _name in ("POE_BASE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

from hub_server import FakeHub  # noqa: E402

# The client reads the Hub's address when it is imported; no test asks the real one.
HUB = FakeHub()
os.environ.update(HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

VOCABULARY = 61
# name -> (model type, tied embedding)
BASES = {
    "poe": ("poe", False),
    "llama": ("llama", False),
    "qwen2": ("qwen2", False),
    "qwen2-tied": ("qwen2", True),
    "qwen3": ("qwen3", False),
    "qwen3-tied": ("qwen3", True),
}


def scramble(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Add noise to every parameter, zero ones included, so that no path computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter))


def tiny_base(name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a base of two layers and width 32 with random weights."""
    from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

    model_type, tied = BASES[name]
    classes = {
        "poe": (PoEConfig, PoEForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "qwen3":
        fields["head_dim"] = 8
    config_class, model_class = classes[model_type]
    torch.manual_seed(seed)
    model = model_class(config_class(**fields)).to(dtype).eval()
    scramble(model, seed)
    return model


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of words `w3` ... with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer


def token_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Return random token ids (rows, length) without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(BASES))
def base_name(request: pytest.FixtureRequest) -> str:
    """Every family, tied and untied."""
    return str(request.param)


@pytest.fixture
def hub() -> FakeHub:
    """An empty Hub on loopback; HF_ENDPOINT names it."""
    HUB.reset()
    return HUB


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `saved_base(name, dtype, seed)`: the folder of a tiny base, written once per session."""
    from poe.loaders.base_folder import save_base_folder

    root, known = tmp_path_factory.mktemp("bases"), {}

    def get(name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
        key = f"{name}-{str(dtype).removeprefix('torch.')}-{seed}"
        if key not in known:
            known[key] = save_base_folder(tiny_base(name, dtype, seed), root / key, tiny_tokenizer())
        return known[key]

    return get
