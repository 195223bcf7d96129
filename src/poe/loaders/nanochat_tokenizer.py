"""Convert nanochat's tokenizer to a fast tokenizer with the same ids, and with a chat template for its conversations.

tiktoken merges the neighbors that form the token of the lowest id. A BPE of `tokenizers` has an ordered list of merges
instead, so the list holds every way to split a token into two known ones, by the token's id.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from poe.errors import SourceError
from poe.loaders.tiktoken_pickle import TiktokenEncoding, read_tiktoken_pickle

BOS, ASSISTANT_END = "<|bos|>", "<|assistant_end|>"
_PARTS = ("user", "assistant", "python", "output")
SPECIAL_TOKENS = (BOS, *(f"<|{part}_{side}|>" for part in _PARTS for side in ("start", "end")))

_CHAT_TEMPLATE = Path(__file__).parents[1] / "assets" / "nanochat.jinja"


def find_tokenizer(checkpoint: Path) -> Path:
    """Return the folder of tokenizer.pkl: the checkpoint's folder, `tokenizer` in it, or nanochat's usual folder.

    nanochat's base folder has the tokenizer in `tokenizer` and checkpoints two levels below. Raises `SourceError`.
    """
    folders = (checkpoint, checkpoint / "tokenizer", checkpoint.resolve().parent.parent / "tokenizer")
    for folder in folders:
        if (folder / "tokenizer.pkl").is_file():
            return folder
    raise SourceError(f"No tokenizer.pkl in {', '.join(map(str, folders))}. Copy nanochat's to the first.")


def read_tokenizer(folder: Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.pkl with nanochat's chat template, checked against token_bytes.pt if present.

    `tokenizer(text)` begins with `<|bos|>`, like nanochat's prompts. With `add_special_tokens=False` the ids are those
    of nanochat's `encode`, except that special tokens in the text are recognized unless `split_special_tokens=True`.
    Raises `SourceError`.
    """
    path = folder / "tokenizer.pkl"
    encoding = read_tiktoken_pickle(path)
    if missing := [token for token in SPECIAL_TOKENS if token not in encoding.special_tokens]:
        raise SourceError(f"{path} lacks nanochat's special tokens {', '.join(missing)}: expected its tokenizer.")
    check_token_bytes(encoding, folder / "token_bytes.pt")
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(encoding, path),
        bos_token=BOS,
        eos_token=ASSISTANT_END,
        pad_token=BOS,  # nanochat has no padding token; <|assistant_end|> must stay a label
        extra_special_tokens=[token for token in encoding.special_tokens if token not in (BOS, ASSISTANT_END)],
        chat_template=_CHAT_TEMPLATE.read_text(encoding="utf-8"),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def byte_level_bpe(encoding: TiktokenEncoding, path: Path) -> Tokenizer:
    """Return a tokenizer with the ids of tiktoken. Raises `SourceError` if the tokens of `path` do not allow it."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in encoding.ranks]:
        raise SourceError(f"{path}: expected a token for every byte, there is none for {missing[:5]}.")
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in encoding.ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(encoding.ranks, key=encoding.ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in spelled and token[cut:] in spelled
    ]
    vocabulary = {spelled[token]: number for token, number in encoding.ranks.items()}
    # ignore_merges: tiktoken looks up a whole piece before it merges
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated")
    except Exception as error:  # the library has its own error type
        raise SourceError(f"{path}: its pattern {encoding.pattern!r} cannot be used: {error}.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(encoding.special_tokens, key=encoding.special_tokens.__getitem__)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if {token: tokenizer.token_to_id(token) for token in special} != encoding.special_tokens:
        raise SourceError(f"{path}: expected the special tokens after all others, as nanochat numbers them.")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, encoding.special_tokens[BOS])]
    )
    return tokenizer


def check_token_bytes(encoding: TiktokenEncoding, path: Path) -> None:
    """Raise `SourceError` if token_bytes.pt belongs to another tokenizer. A missing file is fine.

    It has the number of bytes of each token, 0 for special ones. Older files count a token that is not valid UTF-8 with
    the replacement characters of its decoded text.
    """
    if not path.is_file():
        return
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True).tolist()
    except Exception as error:  # errors of the archive, or of a refused class
        raise SourceError(f"{path} is not one tensor: {error}. Nothing was imported.") from error
    expected = dict.fromkeys(encoding.special_tokens.values(), (0, 0))
    for token, number in encoding.ranks.items():
        expected[number] = (len(token), len(token.decode("utf-8", errors="replace").encode()))
    if not isinstance(counts, list) or len(counts) != len(expected):
        raise SourceError(f"{path}: expected the bytes of {len(expected)} tokens. It belongs to another tokenizer.")
    for number, count in enumerate(counts):
        if count not in expected[number]:
            raise SourceError(
                f"{path}: token {number} has {expected[number][0]} bytes, not {count}. It belongs to another tokenizer."
            )


def _byte_letters() -> dict[int, str]:
    """Return the letter of each byte in a byte-level vocabulary (GPT-2): printable bytes are their own letters."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
