"""Write a tokenizer beside a model: as copies of the base's own files, or in words that older readers understand.

transformers 5 writes a tokenizer_config.json that transformers 4, which llama.cpp's converter pins, cannot read.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from poe.errors import PoEError
from poe.modeling.access import Access, fetch
from poe.modeling.lineage import BaseSource

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "tiktoken.model", "tekken.json", "added_tokens.json", "special_tokens_map.json"),
    *(CONFIG, TEMPLATE, "chat_template.json"),
)


def save_tokenizer(tokenizer: Any, folder: Path, source: BaseSource | None = None) -> None:
    """Write the files of a tokenizer into a folder; nothing for None.

    If the files of the base at `source`, or those that the tokenizer was loaded from, make the same tokenizer, they are
    copied byte for byte. A chat template that was changed since replaces theirs. The files of another tokenizer, as
    after `add_tokens`, are written by transformers, in the words that its versions 4 and 5 share if there are any.
    """
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    named = str(getattr(tokenizer, "name_or_path", None) or "")
    places = [] if source is None or source.repo is None else [(source.repo, source.revision, source.access)]
    for repo, revision, access in [*places, *([(named, None, Access(local_files_only=True))] if named else [])]:
        try:
            files = {name: path for name in FILES if (path := fetch(repo, name, access, revision)) is not None}
            config = json.loads(Path(files[CONFIG]).read_text(encoding="utf-8")) if CONFIG in files else {}
            if not config or "auto_map" in config:  # code of its own is copied by save_pretrained alone
                continue
            original = AutoTokenizer.from_pretrained(
                repo, revision=revision or "main", trust_remote_code=False, **access.kwargs(repo)
            )
        except (PoEError, OSError, ValueError, KeyError):  # not there, or no tokenizer that can be compared
            continue
        with tempfile.TemporaryDirectory() as temporary:
            original.save_pretrained(temporary)
            if _read_contents(Path(temporary)) != _read_contents(folder):
                continue
        _copy_files(files, config, folder, keep_template=tokenizer.chat_template == original.chat_template)
        return
    _write_shared_words(folder)


def _read_contents(folder: Path) -> dict[str, Any]:
    """Return what a folder's files say about a tokenizer: not its template, nor how the last call padded its texts."""
    contents: dict[str, Any] = {}
    for name in FILES:
        path = folder / name
        if path.is_file() and name not in (TEMPLATE, "chat_template.json"):
            contents[name] = json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
    for field in ("padding", "truncation"):
        contents.get("tokenizer.json", {}).pop(field, None)
    contents.get(CONFIG, {}).pop("chat_template", None)
    return contents


def _copy_files(files: dict[str, str], config: dict[str, Any], folder: Path, *, keep_template: bool) -> None:
    """Replace the tokenizer files in a folder by copies, all but the chat template unless `keep_template`."""
    for name in FILES:
        if not keep_template and name == TEMPLATE:
            continue  # transformers has written the changed one
        if name in files and (keep_template or name != "chat_template.json"):
            shutil.copyfile(files[name], folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    if not keep_template and "chat_template" in config:  # some readers prefer it to the file of the changed template
        del config["chat_template"]
        _write_json(folder / CONFIG, config)


def _write_shared_words(folder: Path) -> None:
    """Rewrite a tokenizer_config.json of transformers 5 so that version 4 reads it too, if version 5 still reads it.

    For some families version 5 takes another class than the one that the file names.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    shared = {name: value for name, value in config.items() if name != "extra_special_tokens"}
    if config.get("tokenizer_class") == "TokenizersBackend":
        shared["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        is_list = isinstance(config["extra_special_tokens"], list)
        shared["additional_special_tokens" if is_list else "extra_special_tokens"] = config["extra_special_tokens"]
    if shared == config:
        return
    try:
        contents = _read_and_save(folder)
        _write_json(folder / CONFIG, shared)
        is_same = _read_and_save(folder) == contents
    except Exception:  # a class that does not fit the files can raise any error
        is_same = False
    if not is_same:
        _write_json(folder / CONFIG, config)


def _read_and_save(folder: Path) -> dict[str, Any]:
    """Return the files that transformers writes for the tokenizer that it reads in a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(temporary)
        return _read_contents(Path(temporary))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
