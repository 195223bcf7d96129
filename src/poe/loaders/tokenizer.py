"""Load a tokenizer, and decide whether it can be used: `load_tokenizer` and `check_tokenizer`."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from poe.errors import TokenizerError
from poe.loaders.template_cost import check_template_cost
from poe.modeling.access import Access, fetch

__all__ = ["VOCABULARIES", "check_tokenizer", "load_tokenizer"]

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tiktoken.model", "tekken.json"),
)
SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
MAX_FILE_BYTES = 1 << 30
MAX_REASON = 300  # characters of a library's message
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SAMPLES = 64  # entries of a vocabulary that are tried


def load_tokenizer(
    repo: str, revision: str | None = None, access: Access | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the tokenizer of a folder or Hub repository, None if it has no tokenizer files.

    Raises `TokenizerError` if there are files and they do not make a usable tokenizer: a file that is no regular file,
    that is not what its name promises, or that the libraries cannot read. transformers makes an empty tokenizer for
    some families when there are no files; it counts as none.
    """
    access = access or Access()
    if os.path.isdir(repo) and (problem := _find_broken_file(Path(repo))):
        raise TokenizerError(f"The tokenizer of {repo} cannot be used: {problem}")
    try:
        # Without an explicit trust_remote_code, transformers prompts on the terminal for unknown models.
        tokenizer = AutoTokenizer.from_pretrained(
            repo, revision=revision or "main", trust_remote_code=trust_remote_code, **access.kwargs(repo)
        )
        reason = _find_problem(tokenizer)
    except BaseException as error:  # a damaged file can raise any error, and the Rust library panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        tokenizer, reason = None, _explain(error)
    if reason is None:
        check_template_cost(tokenizer)
        return tokenizer
    needs_code = "trust_remote_code" in reason  # its vocabulary may have any name
    if not needs_code and all(fetch(repo, name, access, revision) is None for name in VOCABULARIES):
        return None
    raise TokenizerError(
        f"The tokenizer of {repo} cannot be used: {reason} Fetch its files again, or remove all of them to open the "
        "base without a tokenizer."
    )


def check_tokenizer(tokenizer: Any, vocab_size: int | None = None, owner: str = "The base") -> None:
    """Raise `TokenizerError` unless text can be encoded with `tokenizer` for a base with `vocab_size` embeddings."""
    if tokenizer is None:
        raise TokenizerError(f"{owner} has no tokenizer: put its tokenizer files (tokenizer.json, ...) beside it.")
    if problem := _find_problem(tokenizer):
        raise TokenizerError(f"{owner} has a tokenizer that cannot be used: {problem} Put its own files beside it.")
    if vocab_size is None:
        return
    added = tokenizer.added_tokens_decoder
    largest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=0)
    if largest >= vocab_size:
        raise TokenizerError(
            f"The tokenizer has ids up to {largest}, and {owner[0].lower()}{owner[1:]} has {vocab_size} embeddings: it "
            "is the tokenizer of another model. Put the right tokenizer files beside the base."
        )
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        number = getattr(tokenizer, f"{role}_id", None)
        if number is not None and number >= vocab_size:
            raise TokenizerError(
                f"The tokenizer's {role} {str(getattr(tokenizer, role))[:80]!r} has the id {number}, and "
                f"{owner[0].lower()}{owner[1:]} has {vocab_size} embeddings: the token was added and the embedding was "
                f"not resized. Name a token of the vocabulary as {role}, or resize the base and save it."
            )


def _find_problem(tokenizer: Any) -> str | None:
    """Return why text cannot be encoded with a tokenizer, None if it can."""
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    special = {*added, *tokenizer.all_special_ids}
    ordinary = sorted(number for number in vocabulary.values() if number not in special)
    if not ordinary:
        return f"it has no vocabulary besides {len(vocabulary)} special tokens, so it encodes every text to nothing."
    samples = ordinary[:: max(1, len(ordinary) // SAMPLES)]
    texts = [tokenizer.decode([number]) for number in samples]
    if not any(set(tokenizer.encode(text, add_special_tokens=False)) - special for text in texts):
        return (
            f"it encodes text to nothing, although it has {len(vocabulary)} tokens. A file that says how to use the "
            "vocabulary (tokenizer_config.json, merges.txt) is missing or belongs to another tokenizer."
        )
    return None


def _find_broken_file(folder: Path) -> str | None:
    """Return what is wrong with the tokenizer files of a folder, None if each is what its name promises."""
    for name in (*VOCABULARIES, *SETTINGS):
        path = folder / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file. Replace it with the tokenizer's own."
            if status.st_size > MAX_FILE_BYTES:
                return f"{name} has {status.st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}. Fetch it again."
            if not status.st_size:
                return f"{name} is empty. Fetch it again."
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return f"{name} is a Git LFS pointer, not the file itself. Run `git lfs pull` in the repository."
            if problem := _find_json_problem(path) if path.suffix == ".json" else None:
                return problem
        except FileNotFoundError:
            if path.is_symlink():
                return f"{name} is a link to a file that does not exist. Fetch it again."
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}."
    return None


def _find_json_problem(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{path.name} is not JSON ({_shorten(error)}). Fetch it again."
    if not isinstance(content, dict):
        return f"{path.name} is not a JSON object but a {type(content).__name__}. Fetch it again."
    if path.name != "tokenizer.json":
        return None
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(content.get("added_tokens", []), list):
        return f"{path.name} describes no tokenizer: expected an object `model` and a list `added_tokens`."
    return None


def _explain(error: BaseException) -> str:
    """Return a sentence for an error of the libraries."""
    text = _shorten(error)
    if "untagged enum" in text or "did not match any variant" in text:
        return (
            f"tokenizer.json has a part of a kind that tokenizers {tokenizers.__version__} does not know ({text}). "
            "Update the library."
        )
    if "trust_remote_code" in text:
        return "it needs code of its repository, which runs only with trust_remote_code=True."
    return f"{type(error).__name__}: {text}"


def _shorten(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
