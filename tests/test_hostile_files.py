"""Hostile sizes, shapes, names and texts: bounded before time or memory is spent, and never obeyed by a terminal."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import poe.commands.app as program
from conftest import mostly_slow, tiny_tokenizer
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.data.drops import DropReport
from poe.data.samples import Sample
from poe.data.statistics import SourceStatistics
from poe.data.statistics_page import write_page
from poe.errors import (
    DeltaError,
    PoEError,
    RecipeError,
    SourceError,
    StageError,
    TemplateError,
    escape_markdown,
    printable,
)
from poe.loaders.template_cost import check_template_cost
from poe.loaders.verify import Check, verify
from poe.modeling.access import MOST_JSON_BYTES, read_json
from poe.modeling.tensor_file import read_header
from poe.stages import load_recipe
from poe.training.reporting.progress import PlainConsole

EVIL = "a\x1b]0;x\x07\x9b2J\u202eb\u200b\nok   base: all fine [/x][bold] | <script>"


def tensor_file(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, tuple[object, bytes]] = {
    "overlapping tensors": ({f"t{i}": entry(0, 8, [2]) for i in range(20_000)}, bytes(8)),
    "a hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "a shape of other size": ({"a": entry(0, 8, [3])}, bytes(8)),
    "a huge shape": ({"a": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8)),
    "a number beyond 64 bits": ({"a": entry(0, 8, [1 << 70])}, bytes(8)),
    "a thousand dimensions": ({"a": entry(0, 8, [1] * 1000)}, bytes(8)),
    "more than the file holds": ({"a": entry(0, 1 << 40, [1 << 38])}, bytes(8)),
    "a name of 10 kB": ({"n" * 10_000: entry(0, 8, [2])}, bytes(8)),
    "a lone surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "deep nesting": (b"[" * 100_000, bytes(8)),
    "a list": ([1], bytes(8)),
    "15 MB of shape": (b'{"a": {"dtype": "F32", "shape": [' + b"9," * 7_000_000 + b'9], "data_offsets": [0, 8]}}', b""),
}


@pytest.mark.parametrize("what", mostly_slow(HEADERS, [what for what in HEADERS if "MB" not in what]))
def test_a_header_that_cannot_be_true_is_refused_at_once(tmp_path: Path, what: str) -> None:
    with pytest.raises(DeltaError) as refusal:
        read_header(tensor_file(tmp_path / "x.safetensors", *HEADERS[what]))
    assert len(str(refusal.value)) < 2_500


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="is not a safetensors file"):
        read_header(tensor_file(tmp_path / "x.safetensors", {}, length=1 << 40))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


FILES: dict[str, Callable[[Path], object]] = {
    "sparse": sparse,
    "pipe": pipe,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "deep": lambda path: path.write_text('{"a": ' * 5_000 + "1" + "}" * 5_000),
    "deeper": lambda path: path.write_text('{"model_type": ' + "[" * 900 + "]" * 900 + "}"),
    "list": lambda path: path.write_text("[]"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "number": lambda path: path.write_text("1" * 10_000),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_config.json"])
def test_a_file_that_is_no_small_json_object_is_one_error(saved_base, tmp_path: Path, name: str, what: str) -> None:
    folder = Path(shutil.copytree(saved_base("llama"), tmp_path / "base"))
    (folder / name).unlink(missing_ok=True)
    FILES[what](folder / name)
    with pytest.raises(SourceError, match=r"regular file|expected at most|JSON|nested|not a model config") as refusal:
        Cascade.from_pretrained(folder)
    assert len(str(refusal.value)) < 2_500
    assert MOST_JSON_BYTES < 1 << 30


@pytest.mark.parametrize("what", ["sparse", "pipe", "folder"])
@pytest.mark.parametrize("name", ["delta.safetensors", "training.json"])
def test_a_stage_with_such_a_file_fails_a_check(saved_base, tmp_path: Path, name: str, what: str) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama")).add_stage(StageConfig("t", 1, "none"))
    folder = cascade.save_stage("t", tmp_path / "t", training={})
    (folder / name).unlink()
    FILES[what](folder / name)
    run = CliRunner().invoke(app, ["inspect", str(folder)])
    assert run.exit_code == 1 or name == "training.json"
    assert isinstance(run.exception, PoEError | SystemExit | None)
    if name == "delta.safetensors":
        assert not all(check.ok for check in verify(folder))


def test_a_stage_that_claims_a_giant_size_is_refused_before_it_is_read(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama")).add_stage(StageConfig("t", 1, "none"))
    folder = cascade.save_stage("t", tmp_path / "t")
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"num_layers": 10**9}, {"name": "x" * 10_000}, {"head": "low_rank", "head_rank": 10**12}):
        (folder / "config.json").write_text(json.dumps(config | {"stage": config["stage"] | changes}))
        with pytest.raises(PoEError):
            Cascade.from_pretrained(folder)
        assert {check.name for check in verify(folder) if not check.ok}


@pytest.mark.parametrize("heads", [{"num_attention_heads": 3}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}])
def test_heads_that_do_not_divide_are_one_error(saved_base, tmp_path: Path, heads: dict) -> None:
    folder = Path(shutil.copytree(saved_base("llama"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config | heads))
    with pytest.raises(PoEError):
        Cascade.from_pretrained(folder)


TEMPLATES = {
    "takes too long": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "takes too much memory": "{{ 'a' * 9000000000 }}",
    "makes too much text": "{% if tools %}{{ 'a' * 3000000 }}{% endif %}",
}


@pytest.mark.parametrize("problem", [pytest.param(p, marks=pytest.mark.slow) if "long" in p else p for p in TEMPLATES])
def test_a_template_that_costs_too_much_is_refused(problem: str) -> None:
    tokenizer = tiny_tokenizer()
    check_template_cost(tokenizer)
    tokenizer.chat_template = TEMPLATES[problem]
    with pytest.raises(TemplateError, match=problem):
        check_template_cost(tokenizer)


def test_a_base_with_a_costly_template_is_refused_by_every_command(saved_base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_base("llama"), tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(TEMPLATES["takes too much memory"])
    for command in (
        ["verify", str(folder)],
        ["push", str(folder), "me/x", "--dry-run"],
        ["generate", str(folder), "w5"],
    ):
        run = CliRunner().invoke(app, command)
        assert "takes too much memory" in run.output + str(run.exception), command


def test_a_message_is_one_bounded_line_without_control_characters() -> None:
    text = str(SourceError(EVIL * 100_000))
    assert len(text) < 10_000
    assert text.isprintable()
    assert "\n" not in text
    assert printable("a\tb\n c") == "a b c"
    assert printable("日本語\u3000é 🙂") == "日本語 é 🙂"


def test_a_console_prints_text_and_obeys_none_of_it() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200, color_system=None)
    console.print(EVIL)
    console.rule(EVIL)
    shown = file.getvalue()
    assert not {"\x1b", "\x9b", "\u202e", "\u200b", "\x07"} & set(shown)
    assert "[/x][bold]" in shown
    assert json.loads('"\\u202e"') == "\u202e"
    assert "\\u001b" in shown


def test_a_stage_cannot_forge_a_line_of_verify(monkeypatch) -> None:
    monkeypatch.setattr("poe.loaders.verify.verify", lambda *a, **k: iter([Check(EVIL, False, EVIL)]))
    run = CliRunner().invoke(app, ["verify", "x"])
    assert len(run.output.splitlines()) == 1
    assert run.output.startswith("FAIL")


def test_hostile_rows_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    call = {"from": "human", "value": EVIL}
    rows = [{"id": EVIL, "conversations": [call, {"from": "gpt", "value": EVIL}]}]
    row = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}], "id": EVIL}
    (tmp_path / "rows.json").write_text(json.dumps([row, *rows]))
    for command in (
        ["data", "show", f"messages={tmp_path / 'rows.json'}"],
        ["data", "stats", f"messages={tmp_path / 'rows.json'}"],
    ):
        run = CliRunner().invoke(app, command)
        assert not {"\x1b", "\x9b", "\u202e", "\u200b"} & set(run.output), command
        assert run.exception is None or isinstance(run.exception, PoEError | SystemExit), command


def test_pages_of_statistics_show_hostile_names_and_rows(tmp_path: Path) -> None:
    report = DropReport()
    report.drop(EVIL, EVIL, "1")
    report.repair(EVIL, EVIL)
    for name in ("page.html", "page.md"):
        samples = [Sample(EVIL, 2, 1, [(EVIL, False), (EVIL, True)])]
        write_page(tmp_path / name, [SourceStatistics(EVIL, EVIL, None, {}, calls=[1])], report, samples)
        page = (tmp_path / name).read_text()
        assert not {"\x1b", "\x9b", "\u202e"} & set(page)
        assert "<script>" not in page
        assert page.count("<mark>") == 2 * (name == "page.html")
        if name == "page.md":
            assert "\nok   base" not in page
    assert escape_markdown("![a](b)|`c`<d>") == r"!\[a\](b)\|\`c\`&lt;d>"


def test_aliases_in_a_recipe_are_refused_and_not_expanded(tmp_path: Path) -> None:
    lines = [
        "a: &a [x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="alias"):
        load_recipe(tmp_path / "r.yaml")


def test_a_name_has_one_rule() -> None:
    for name in ("x" * 101, "a\n", "-a", "a/b", "", "a\u202e"):
        with pytest.raises(StageError):
            StageConfig(name)
    assert StageConfig("x" * 100)


def test_records_of_runs_are_read_with_bounds(tmp_path: Path) -> None:
    sparse(tmp_path / "big.json")
    with pytest.raises(SourceError, match="expected at most"):
        read_json(tmp_path / "big.json")
    assert program.out is not None
