"""A BPE of `tokenizers` gives the ids of tiktoken for any vocabulary, or the vocabulary is refused."""

import base64
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from poe.errors import SourceError
from poe.loaders.nanochat_tokenizer import SPECIAL_TOKENS, byte_level_bpe, read_tokenizer
from poe.loaders.tiktoken_pickle import TiktokenEncoding, read_tiktoken_pickle

GOLDEN = json.loads((Path(__file__).parent / "golden" / "nanochat_tokenizer.json").read_text())
BYTES = {bytes([byte]): byte for byte in range(256)}
ONE_PIECE = r"[\s\S]+"


def encoding(ranks: dict[bytes, int], special: tuple[str, ...] = ("<|bos|>",)) -> TiktokenEncoding:
    return TiktokenEncoding(ONE_PIECE, ranks, {token: len(ranks) + index for index, token in enumerate(special)})


def as_tiktoken_does(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Join the neighbors that make the token of the lowest id, the first such, until none make one."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        if min(joined) == len(ranks):
            break
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=25),
    st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=20),
)
@example([(1, 2), (0, 1), (2, 1), (4, 5)], ["abcb", "aabcb"])  # bc, ab, cb, abcb: no merge leads to a known piece
def test_any_vocabulary_gives_the_ids_of_tiktoken(joins: list[tuple[int, int]], texts: list[str]) -> None:
    """Tokens that can be cut into known ones in several ways are many here: each is a pair of earlier ones."""
    ranks, tokens = dict(BYTES), [b"a", b"b", b"c"]
    for left, right in joins:
        token = tokens[left % len(tokens)] + tokens[right % len(tokens)]
        if token not in ranks and len(token) < 30:
            ranks[token] = len(ranks)
            tokens.append(token)
    tokenizer = byte_level_bpe(encoding(ranks), Path("t"))
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == as_tiktoken_does(text.encode(), ranks)


@given(st.text(min_size=1))
def test_every_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = byte_level_bpe(encoding(dict(BYTES)), Path("t"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert bytes(ids) == text.encode()


def test_a_special_token_keeps_its_id_in_any_order() -> None:
    special = dict(reversed(encoding(BYTES, ("<|bos|>", "<|b|>", "<|c|>")).special_tokens.items()))
    tokenizer = byte_level_bpe(TiktokenEncoding(ONE_PIECE, BYTES, special), Path("t"))
    assert tokenizer.encode("<|c|>x<|b|>").ids == [256, 258, ord("x"), 257]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "("}, "pattern"),
        ({"ranks": {token: rank for token, rank in BYTES.items() if rank < 255}}, r"none for \[255\]"),
        ({"special_tokens": {"<|bos|>": 0}, "ranks": {token: r + 1 for token, r in BYTES.items()}}, "after all others"),
    ],
    ids=["a pattern that is none", "a byte that is missing", "special tokens before the others"],
)
def test_vocabularies_without_equal_ids_are_refused(change: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        byte_level_bpe(dataclasses.replace(encoding(BYTES), **change), Path("t"))


def test_a_tokenizer_without_nanochats_special_tokens_is_refused(tmp_path: Path) -> None:
    pickled = base64.b64decode(GOLDEN["pickle"])
    assert pickled.count(b"<|python_end|>") == 1
    (tmp_path / "tokenizer.pkl").write_bytes(pickled.replace(b"<|python_end|>", b"<|PYTHON_END|>"))
    assert set(SPECIAL_TOKENS) - read_tiktoken_pickle(tmp_path / "tokenizer.pkl").special_tokens.keys() == {
        "<|python_end|>"
    }
    with pytest.raises(SourceError, match=r"<\|python_end\|>"):
        read_tokenizer(tmp_path, 2048)
