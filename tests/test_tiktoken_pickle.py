"""Pickles of a tiktoken Encoding are read; every other pickle is refused, and nothing in it runs.

tiktoken is not needed: a class of the same name makes the same pickles, and a golden one was made by nanochat.
"""

import base64
import json
import pickle
import pickletools
import random
import struct
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.errors import SourceError
from poe.loaders.tiktoken_pickle import read_tiktoken_pickle

GOLDEN = json.loads((Path(__file__).parent / "golden" / "nanochat_tokenizer.json").read_text())
NANOCHATS = base64.b64decode(GOLDEN["pickle"])
# SETITEM: what pickle writes for a dictionary of one item
ADMITTED = {"SETITEM", *(opcode.name for opcode, _, _ in pickletools.genops(NANOCHATS))}


class Encoding:
    def __init__(self, **state: object) -> None:
        self.state = state

    def __getstate__(self) -> object:
        return self.state


Encoding.__module__, Encoding.__qualname__ = "tiktoken.core", "Encoding"


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def pickled(state: object, protocol: int = 4, cls: type = Encoding) -> bytes:
    """What pickle writes of an Encoding with this state, where tiktoken is installed."""
    encoding = cls()
    encoding.state = state
    package, core = types.ModuleType("tiktoken"), types.ModuleType("tiktoken.core")
    core.Encoding = cls  # type: ignore[attr-defined]
    before = {name: sys.modules.pop(name, None) for name in ("tiktoken", "tiktoken.core")}
    sys.modules.update({"tiktoken": package, "tiktoken.core": core})
    try:
        return pickle.dumps(encoding, protocol)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def fields(ranks: object, special: object = None, **more: object) -> dict:
    special = {} if special is None else special
    return {"name": "n", "pat_str": "p", "mergeable_ranks": ranks, "special_tokens": special, **more}


def read(content: bytes, folder: Path):
    path = folder / "tokenizer.pkl"
    path.write_bytes(content)
    return read_tiktoken_pickle(path)


def test_a_pickle_of_nanochat_is_read(tmp_path: Path) -> None:
    encoding = read(NANOCHATS, tmp_path)
    assert len(encoding.ranks) + len(encoding.special_tokens) == 500
    assert encoding.ranks[b" the"] > 255
    assert encoding.special_tokens["<|bos|>"] == 491
    assert encoding.pattern.startswith("'(?i:[sdmt]|ll|ve|re)|")
    assert "tiktoken" not in sys.modules


@given(st.sets(st.binary(min_size=1, max_size=300), min_size=1), st.sets(st.text(min_size=1)), st.sampled_from([4, 5]))
def test_any_pickled_encoding_is_read(tmp_path_factory, tokens, special, protocol: int) -> None:
    ranks = {token: number for number, token in enumerate(tokens)}
    specials = {token: len(ranks) + number for number, token in enumerate(special)}
    encoding = read(pickled(fields(ranks, specials), protocol), tmp_path_factory.getbasetemp())
    assert (encoding.pattern, encoding.ranks, encoding.special_tokens) == ("p", ranks, specials)


def calls(function: str, argument: str) -> bytes:
    """A pickle, written by hand, that calls `module function` with a text."""
    module, name = function.encode().split()
    return (
        b"\x80\x04c" + module + b"\n" + name + b"\n(X" + struct.pack("<I", len(argument)) + argument.encode() + b"tR."
    )


def names(module: bytes, name: bytes, rest: bytes) -> bytes:
    """A pickle that names a class with the opcode that an Encoding's has, then goes on with `rest`."""
    return b"\x80\x04\x8c%c%b\x8c%c%b\x93" % (len(module), module, len(name), name) + rest


ENCODING = (b"tiktoken.core", b"Encoding")
TOUCH = "__import__('pathlib').Path('exploded').touch()"
HOSTILE = {
    "a class that runs code": pickle.dumps(Bomb()),
    "one inside the ranks": pickled(fields({b"a": Bomb()})),
    "one as a field": pickled(fields({b"a": 0}, more=Bomb())),
    "one as the state": pickled(Bomb()),
    "one in a list": pickled(fields([Bomb()])),
    "an old protocol": pickle.dumps(Bomb(), 0),
    "eval": calls("builtins eval", TOUCH),
    "a shell": calls("os system", "touch exploded"),
    "eval by the admitted opcode": names(b"builtins", b"eval", b"\x8c%c%b\x85R." % (len(TOUCH), TOUCH.encode())),
    "a function of the class": names(b"tiktoken.core", b"Encoding.__init__", b")\x81."),
    "globals behind the class": names(b"tiktoken.core", b"Encoding.__init__.__globals__", b"."),
    "the class called": names(*ENCODING, b")R."),
    "the class made with arguments": names(*ENCODING, b"\x8c\x01a\x85\x81}b."),
    "a state for the class itself": names(*ENCODING, b"}b."),
    "two states": names(*ENCODING, b")\x81}b}b."),
    "no state": names(*ENCODING, b")\x81."),
    "an instance as a key": names(*ENCODING, b")\x81}\x94h\x00K\x01s."),
    "items for an instance": names(*ENCODING, b")\x81\x8c\x01aK\x01s."),
    "more than one thing": b"\x80\x04K\x01" + NANOCHATS[2:],
    "an object of a registry": b"\x80\x04\x82\x01.",
    "an object from outside": b"\x80\x04Pelsewhere\n.",
    "a memo of 16 GiB": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a number of a gigabyte": b"\x80\x04\x8b\xff\xff\xff\x3f.",
    "a deep nest": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a memo that is not there": b"\x80\x04h\x07.",
    "an empty stack": b"\x80\x04u.",
    "nothing at all": b"",
    "no pickle": b"hello",
    "a checkpoint": b"PK\x03\x04" + bytes(100),
    "the name of an encoding": pickled("cl100k_base"),
    "a field too many": pickled(fields({b"a": 0}, explicit_n_vocab=1)),
    "a field too few": pickled({"name": "n"}),
    "ranks that are no dictionary": pickled(fields("ranks")),
    "ranks of text": pickled(fields({"a": 0})),
    "special tokens of bytes": pickled(fields({b"a": 0}, {b"b": 1})),
    "a gap in the ids": pickled(fields({b"a": 0, b"b": 2})),
    "an id twice": pickled(fields({b"a": 0, b"b": 0})),
    "an empty token": pickled(fields({b"": 0})),
    "no tokens": pickled(fields({})),
    "an id below 0": pickled(fields({b"a": -1})),
    "ids as text": pickled(fields({b"a": "0"})),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_other_pickles_are_refused_and_run_nothing(content: bytes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"tokenizer\.pkl"):
        read(content, tmp_path)
    assert not Path("exploded").exists()
    assert "tiktoken" not in sys.modules


def test_the_hostile_pickle_runs_code_when_unpickled(tmp_path: Path, monkeypatch) -> None:
    """Unpickled as usual it goes off, so that the refusals above mean something."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["a class that runs code"])
    assert Path("exploded").exists()


UNUSED = [opcode for opcode in pickletools.opcodes if opcode.name not in ADMITTED and opcode.arg is None]


@pytest.mark.parametrize("opcode", UNUSED, ids=lambda opcode: opcode.name)
def test_an_opcode_that_an_encoding_does_not_need_is_refused(opcode, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=opcode.name):
        read(NANOCHATS[:-1] + opcode.code.encode("latin-1") + b".", tmp_path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of an opcode that is then refused
def test_damage_is_refused_or_has_no_effect(tmp_path: Path) -> None:
    """A cut file is refused. Of flipped bytes some only rename a token: what comes back still is what one should be."""
    for end in range(0, len(NANOCHATS), 37):
        with pytest.raises(SourceError):
            read(NANOCHATS[:end], tmp_path)
    rng, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(NANOCHATS)
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
        try:
            encoding = read(bytes(changed), tmp_path)
        except SourceError:
            refused += 1
            continue
        assert {type(token) for token in encoding.ranks} == {bytes}
        assert {type(token) for token in encoding.special_tokens} == {str}
        numbers = [*encoding.ranks.values(), *encoding.special_tokens.values()]
        assert sorted(numbers) == list(range(500))
    assert refused > 100
