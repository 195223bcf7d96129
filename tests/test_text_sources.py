"""Text for pretraining: every kind of file and the Hub, streamed; dropped text is counted."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data import text as reading
from poe.data.drops import DropReport
from poe.data.text import documents, is_generated
from poe.demo.tokenizer import COPYING, PROSE, SPECIAL_TOKENS, train_tokenizer
from poe.errors import DataError, SourceError

TEXTS = ["One text.\nTwo lines.", "Ünï-\u2028code 日本語 🙂", "Third."]


def read(spec: str) -> tuple[list[str], dict[str, int]]:
    report = DropReport()
    texts = [document.text for document in documents(spec, report=report)]
    counts = report.as_dict()["text"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    return texts, counts["dropped"]


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[], bytes]] = {
    "a.txt": lambda: "<|endoftext|>".join(TEXTS).encode(),
    "a.md": lambda: ("\ufeff" + "\n<|endoftext|>\n".join(TEXTS)).encode(),
    "a.jsonl": lambda: as_lines([{"id": 1, "text": text} for text in TEXTS]),
    "a.json": lambda: json.dumps([{"content": text, "url": ""} for text in TEXTS]).encode(),
    "a.ndjson": lambda: as_lines([{"story": text} for text in TEXTS]),
    "a.parquet": lambda: parquet([{"raw_content": text, "n": 1} for text in TEXTS]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compressed", ["", ".gz", ".zst"])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, compressed: str) -> None:
    data = FILES[name]()
    data = {"": bytes, ".gz": gzip.compress, ".zst": zstandard}[compressed](data)
    path = tmp_path / f"{name}{compressed}"
    path.write_bytes(data)
    assert read(f"text={path}") == (TEXTS, {})


def test_folders_and_globs_may_have_every_kind_of_file(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / name).write_bytes(data())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert sorted(read(f"text={tmp_path}")[0]) == sorted(TEXTS * len(FILES))
    assert sorted(read(f"text={tmp_path}/**/*.js*")[0]) == sorted(TEXTS * 2)
    assert sorted(read(f"text={tmp_path}/sub/a.txt*3")[0]) == sorted(TEXTS * 3)
    with pytest.raises(DataError, match=r"picture\.png.*expected txt, md, json"):
        read(f"text={tmp_path}/*.png")


def test_rows_without_text_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [{"text": "kept"}, {"text": None}, {"text": " \n"}, {"words": "x"}, 7, "a bare text", {"text": "\ud800"}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows) + b'{"text": "\xff"}\n{"text": \n')
    texts, dropped = read(f"text={tmp_path}/a.jsonl")
    assert texts == ["kept", "a bare text"]
    assert dropped == {
        "no text in the column 'text'": 2,
        "empty text": 1,
        "neither a text nor an object": 1,
        "text with a lone surrogate": 1,
        "not UTF-8": 1,
        "not JSON": 1,
    }


def test_only_the_line_of_bad_bytes_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"gut\n" + b"bad \xff\xfe\n" + "naïve\n".encode() + b"cut \xc3")
    assert read(f"text={tmp_path}/a.txt") == (["gut\nnaïve\n"], {"line that is not UTF-8": 2})


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard)])
def test_a_truncated_file_gives_the_text_before_the_break(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    import random

    words = random.Random(0)
    rows = [{"text": f"{n} {words.getrandbits(200):x}"} for n in range(20_000)]
    for name, data in (("a.jsonl", as_lines(rows)), ("a.txt", b"\n".join(r["text"].encode() for r in rows))):
        compressed = compress(data)
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(compressed[: len(compressed) * 3 // 4])
        texts, dropped = read(f"text={path}")
        assert dropped == {"truncated file": 1}
        assert len("".join(texts)) > 300_000
        assert texts[0].startswith("0 ")
        path.write_bytes(b"not compressed at all")
        with pytest.raises(DataError, match=r"is not a (gzip|zstd) file"):
            read(f"text={path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_lines([{"url": "x", "score": 1}]), "no column that is clearly the text.*url, score"),
        (as_lines([{"text": ""}, {"text": " "}]), "There is no text.*empty text 2"),
        (b"", "There is no text"),
    ],
)
def test_files_without_text_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(f"text={tmp_path}/a.jsonl")


visible = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=30)


document = st.lists(visible, max_size=3).map("\n".join).filter(lambda text: reading.END_OF_TEXT not in text)


@given(st.lists(document, min_size=1, max_size=8), st.integers(1, 9))
def test_blocks_and_parts_of_any_size_lose_nothing(tmp_path_factory: Any, texts: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(reading.END_OF_TEXT.join(texts).encode())
    data = path.read_bytes()

    class Blocks:
        truncated = False

        def __init__(self, file: Path) -> None: ...

        def __iter__(self) -> Iterator[bytes]:
            return (data[i : i + size] for i in range(0, len(data), size))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "PART_CHARACTERS", 7)
        patched.setattr(reading, "Blocks", Blocks)
        parts = list(reading._plain_parts(path, DropReport()))
    assert max(map(len, parts)) <= 7
    assert "".join(parts) == "".join(texts)


def test_files_are_interleaved_by_size(tmp_path: Path) -> None:
    for name, lines in (("a", 3000), ("b", 1000)):
        (tmp_path / f"{name}.txt").write_text("\n".join([name * 99] * lines))
    first = "".join(text.text for text in islice(documents(f"text={tmp_path}"), 10))
    assert 2 < first.count("a") / first.count("b") < 4


class Hub:
    """A fake Hub that records the requests to `load_dataset` and can fail while reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Callable[[], Iterator[Any]]) -> None:
        datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
        info = type("Info", (), {"sha": "c0ffee"})
        monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *a, **k: info)
        self.requests: list[Any] = []

        def load(*names: Any, **options: Any) -> Any:
            self.requests.append((names, options))
            return datasets.IterableDataset.from_generator(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_data_set_of_the_hub_is_streamed_at_one_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def rows() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield {"text": f"row {taken}", "id": taken}

    hub = Hub(monkeypatch, rows)
    texts = [text.text for text in islice(documents("text=some/set"), 3)]
    assert texts == ["row 1", "row 2", "row 3"]
    assert taken < 10  # an endless set is only read as far as needed
    next(documents("text=some/set/english"))
    options = {"split": "train", "streaming": True, "revision": "c0ffee"}
    assert hub.requests == [(("some/set", None), options), (("some/set", "english"), options)]


def test_a_data_set_that_fails_while_reading_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[Any]:
        yield {"text": "one"}
        raise ConnectionError("no route")

    Hub(monkeypatch, rows)
    with pytest.raises(SourceError, match=r"'some/set' failed at row 1: no route"):
        list(documents("text=some/set"))


def test_an_existing_path_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, lambda: iter([{"text": "far"}]))
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "set").mkdir()
    (tmp_path / "some" / "set" / "a.txt").write_text("near")
    monkeypatch.chdir(tmp_path)
    assert read("text=some/set")[0] == ["near"]
    with pytest.raises(DataError, match=r"No file or folder 'some/other\.txt'"):
        read("text=some/other.txt")
    assert not hub.requests


def test_only_generated_sources_count_as_generated() -> None:
    assert is_generated("demo:2,notations")
    assert not is_generated("demo,text=some/set")


@pytest.mark.parametrize("pieces", [COPYING, PROSE])
@pytest.mark.parametrize(
    "text", ["e\u0301 नमस्ते ไทย 日本語 👩‍👩‍👧", "a  b\t\r\n\n  c ", "3.14159 ١٢٣ x²", "\x00\u200b'll DON'T"]
)
def test_a_tokenizer_decodes_every_text_to_itself(pieces: str, text: str) -> None:
    tokenizer = train_tokenizer(["Some words, some more words. 12 34"] * 3, 300, pieces)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    digits = tokenizer.tokenize("20268")
    assert digits == list("20268")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
