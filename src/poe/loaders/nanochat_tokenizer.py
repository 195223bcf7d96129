"""nanochat's tokenizer as a fast tokenizer: the same ids, and its conversations as a chat template.

tiktoken merges whichever neighbors join to the known token of the lowest id. A BPE of `tokenizers` lists its merges
instead, in order: so every way to cut a token into two known ones is listed, by the token's id.
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
    """Return the folder of tokenizer.pkl: the checkpoint's own, `tokenizer` in it, or where nanochat keeps it.

    nanochat keeps checkpoints two folders below its base folder and the tokenizer in `tokenizer` there. Raises
    `SourceError`.
    """
    places = (checkpoint, checkpoint / "tokenizer", checkpoint.resolve().parent.parent / "tokenizer")
    for folder in places:
        if (folder / "tokenizer.pkl").is_file():
            return folder
    raise SourceError(f"No tokenizer.pkl in {', '.join(map(str, places))}. Copy nanochat's to the first.")


def read_tokenizer(folder: Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.pkl with nanochat's chat template, checked against token_bytes.pt if there.

    `tokenizer(text)` begins with `<|bos|>`, as nanochat's prompts do; without special tokens
    (`add_special_tokens=False`) the ids are those of nanochat's `encode`, but that special tokens that are spelled out
    in the text are read as such unless `split_special_tokens=True`. Raises `SourceError`.
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
        pad_token=BOS,  # nanochat has none; the end of an answer, its other choice, must stay a label
        extra_special_tokens=[token for token in encoding.special_tokens if token not in (BOS, ASSISTANT_END)],
        chat_template=_CHAT_TEMPLATE.read_text(encoding="utf-8"),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def byte_level_bpe(encoding: TiktokenEncoding, path: Path) -> Tokenizer:
    """Return a tokenizer that gives the ids of tiktoken. Raises `SourceError` if `path`'s tokens allow none."""
    if lacking := [byte for byte in range(256) if bytes([byte]) not in encoding.ranks]:
        raise SourceError(f"{path}: expected a token for every byte, there is none for {lacking[:5]}.")
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in encoding.ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(encoding.ranks, key=encoding.ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in spelled and token[cut:] in spelled
    ]
    vocabulary = {spelled[token]: number for token, number in encoding.ranks.items()}
    # ignore_merges: tiktoken looks a whole piece up before it merges anything
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated")
    except Exception as error:  # the library's own type
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
    """Refuse a token_bytes.pt that belongs to another tokenizer; a missing one is fine, the tokens tell as much.

    It counts the bytes of every token, 0 for special ones. Older ones count a token that is no valid UTF-8 as it
    decodes, with replacement characters.
    """
    if not path.is_file():
        return
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True).tolist()
    except Exception as error:  # the libraries' own errors, of the archive, a refused class
        raise SourceError(f"{path} is not one tensor: {error}. Nothing was read from it.") from error
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
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2): printable ones stand for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
