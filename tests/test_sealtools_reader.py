"""Seal-Tools: a pool of tools beside the rows, and calls that use results of earlier calls."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.readers import get_reader, read_source, sealtools
from poe.data.spec import DataSource
from poe.errors import DataError
from test_readers import shape


def entry(name: str, parameters: dict[str, str], *results: str) -> dict[str, Any]:
    return {
        "api_name": name,
        "api_description": f"{name} does it",
        "field": "Baking/Bread",
        "parameters": {key: {"type": kind, "description": key} for key, kind in parameters.items()},
        "required": list(parameters)[:1],
        "responses": {result: {"type": "str", "description": result} for result in results},
    }


POOL = {
    e["api_name"]: e
    for e in [
        entry("findFlour", {"kind": "str", "grams": "int"}, "flour", "price"),
        entry("bakeLoaf", {"flour": "str", "hot": "bool"}, "loaf"),
        entry("weighLoaf", {"loaf": "str"}, "grams"),
        entry("setTimer", {"minutes": "int"}),
        *(entry(f"other{i}", {"a": "float"}, "b") for i in range(20)),
    ]
}


def step(api: str, parameters: dict[str, Any], *results: str) -> dict[str, Any]:
    return {"api": api, "parameters": parameters, "responses": list(results)}


FIND = step("findFlour", {"kind": "rye"}, "API_call_0", "API_call_1")
BAKE = step("bakeLoaf", {"flour": "API_call_0"}, "API_call_2")
TIMER = step("setTimer", {"minutes": 5})


def row(*calling: dict[str, Any], id: str = "dev-1") -> dict[str, Any]:
    return {"id": id, "query": 'Bread, with "rye.', "calling": list(calling)}


def prompted(row: dict[str, Any], offered: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the same row in the fine-tuning format."""
    prompt = f'Choose.\n\nInput:\napi_list = {offered}\ntask_instruction = "{row["query"]}"\nOutput:\n'
    spoken = [{"from": "human", "value": prompt}, {"from": "gpt", "value": str(row["calling"])}]
    return {"id": row["id"], "conversations": spoken}


def read(value: Any, pool: Any = POOL) -> tuple[list[Conversation], dict[str, Any]]:
    report = DropReport()
    return list(sealtools.read([("row 0", value)], report, pool)), report.as_dict()["sealtools"]


def reason(value: Any, pool: Any = POOL) -> str:
    conversations, counts = read(value, pool)
    assert conversations == []
    return next(iter(counts["dropped"]))


def turns(value: Any) -> list[Any]:
    (conversation,), counts = read(value)
    assert counts["dropped"] == {}
    return shape(conversation)[1:]


def test_independent_calls_are_one_message() -> None:
    assert turns(row(FIND, TIMER)) == [
        ("assistant", None, [("findFlour", {"kind": "rye"}), ("setTimer", {"minutes": 5})])
    ]


def test_a_dependent_call_follows_the_result_it_uses() -> None:
    weigh = step("weighLoaf", {"loaf": "API_call_2"}, "API_call_3")
    assert turns(row(FIND, TIMER, BAKE, weigh)) == [
        ("assistant", None, [("findFlour", {"kind": "rye"}), ("setTimer", {"minutes": 5})]),
        ("tool", '{"flour": "API_call_0", "price": "API_call_1"}', []),
        ("tool", "{}", []),
        ("assistant", None, [("bakeLoaf", {"flour": "API_call_0"})]),
        ("tool", '{"loaf": "API_call_2"}', []),
        ("assistant", None, [("weighLoaf", {"loaf": "API_call_2"})]),
    ]


def test_a_step_ends_only_before_a_dependent_call() -> None:
    again = step("bakeLoaf", {"flour": "API_call_1"}, "API_call_3")
    assert [len(calls) for _, _, calls in turns(row(FIND, BAKE, TIMER, again))] == [1, 0, 3]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_no_result_name_is_used_before_it_is_shown(uses: list[int]) -> None:
    """Call k uses the result of call uses[k] if that is an earlier call, and text if not."""
    calling = [
        step("weighLoaf", {"loaf": f"API_call_{use}" if use < k else "rye"}, f"API_call_{k}")
        for k, use in enumerate(uses)
    ]
    (conversation,), _ = read(row(*calling))
    shown: set[str] = set()
    made = []
    for message in conversation.messages[1:]:
        if message["role"] == "tool":
            shown.update(json.loads(message["content"]).values())
        for call in message.get("tool_calls", []):
            value = call["function"]["arguments"]["loaf"]
            assert value == "rye" or value in shown
            made.append(value)
    assert made == [call["parameters"]["loaf"] for call in calling]  # every call once, in the order of the row


@pytest.mark.parametrize(
    ("calling", "why"),
    [
        ([BAKE, FIND], "result that no earlier call gives"),
        ([step("bakeLoaf", {"flour": "API_call_2"}, "API_call_2")], "result that no earlier call gives"),
        (
            [FIND, step("bakeLoaf", {"flour": "the API_call_0 of"}, "API_call_2")],
            "name of a result inside another text",
        ),
        ([FIND, step("setTimer", {"minutes": "API_call_1"})], "argument of another type than declared"),
        ([{**FIND, "responses": ["API_call_0"]}, BAKE], "results that the tool does not declare"),
        ([{**FIND, "responses": "API_call_0"}, BAKE], "results are not a list of names"),
        ([step("eatLoaf", {})], "call to a tool that the pool does not have"),
        ([step("bakeLoaf", {})], "required argument missing"),
        ([{"parameters": {}}], "call without a name or arguments"),
        ([], "row of an unknown format"),
    ],
)
def test_rows_that_cannot_be_converted_are_dropped(calling: list[Any], why: str) -> None:
    assert reason(row(*calling)) == why


def test_a_number_in_quotes_is_coerced() -> None:
    (_,), counts = read(row(step("setTimer", {"minutes": "5"})))
    assert counts["repaired"] == {"str coerced to integer": 1}


def offered(conversation: Conversation) -> list[str]:
    return [tool["function"]["name"] for tool in conversation.tools]


def test_offered_tools_depend_only_on_the_id_and_the_pool() -> None:
    drawn = [offered(read(row(FIND, TIMER, id=f"dev-{i}"))[0][0]) for i in range(40)]
    again = [offered(read(row(FIND, TIMER, id=f"dev-{i}"), dict(reversed(POOL.items())))[0][0]) for i in range(40)]
    assert drawn == again
    assert all(len(set(names)) == 5 and {"findFlour", "setTimer"} <= set(names) for names in drawn)
    assert len({tuple(names) for names in drawn}) == 40
    assert {names.index("findFlour") for names in drawn} == {0, 1, 2, 3, 4}  # the called tool may have any position
    many = [step(f"other{i}", {"a": 1}, "API_call_0") for i in range(6)]
    assert len(offered(read(row(*many, many[0]))[0][0])) == 8  # at least two that are not called
    assert len(offered(read(row(FIND), {"findFlour": POOL["findFlour"]})[0][0])) == 1


def test_rows_without_a_pool_are_dropped() -> None:
    assert reason(row(FIND), {}) == "no pool of tools beside the rows"


def test_prompts_contain_their_tools() -> None:
    plain = row(FIND, BAKE)
    offer = [POOL[name] for name in ("other1", "bakeLoaf", "findFlour")]
    (conversation,), _ = read(prompted(plain, offer), {})
    assert offered(conversation) == ["other1", "bakeLoaf", "findFlour"]
    assert conversation.messages == read(plain)[0][0].messages
    assert reason(prompted(plain, offer[:2])) == "call to a tool that is not offered"
    broken = prompted(plain, offer)
    broken["conversations"][1]["value"] = "[{'api': find}]"
    assert reason(broken) == "tools or calls not in Python notation"
    broken["conversations"][0]["value"] = "Choose."
    assert reason(broken) == "row of an unknown format"
    assert reason({"conversations": broken["conversations"][:1]}) == "row of an unknown format"


def write(path: Path, *rows: Any) -> Path:
    text = "\n".join(json.dumps(r) for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def from_path(path: Path) -> list[Conversation]:
    return list(read_source(DataSource("sealtools", str(path)), DropReport()))


def test_the_pool_is_found_beside_the_rows(tmp_path: Path) -> None:
    rows = write(tmp_path / "dev.jsonl", row(FIND), row(BAKE, id="dev-2"))
    write(tmp_path / "toolbox.jsonl", {"api": "another list"})
    report = DropReport()
    list(get_reader("sealtools").read(str(rows), report))
    assert list(report.dropped["sealtools"]) == ["no pool of tools beside the rows"]
    write(tmp_path / "tool.jsonl.gz", *POOL.values())
    assert {f.name for f in get_reader("sealtools").files(str(rows))} == {"dev.jsonl", "tool.jsonl.gz"}
    report = DropReport()
    (conversation,) = get_reader("sealtools").read(str(rows), report)
    assert conversation.id == "dev.jsonl:1"
    assert report.dropped["sealtools"] == {"result that no earlier call gives": 1}


def test_a_folder_may_have_other_files_than_rows(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", row(FIND))
    write(tmp_path / "field.jsonl", {"Baking": ["Bread"]}, {"Music": ["Jazz"]})
    pool = write(tmp_path / "tool.jsonl", *POOL.values())
    report = DropReport()
    assert len(list(get_reader("sealtools").read(str(tmp_path), report))) == report.read["sealtools"] == 1
    with pytest.raises(DataError, match=r"no rows of Seal-Tools, only its pool of tools\. Give the rows"):
        from_path(pool)
    with pytest.raises(DataError, match="its list of fields and pool of tools"):
        from_path(tmp_path / "*l*.jsonl")
    write(pool, POOL["bakeLoaf"], {"name": "damaged"})
    with pytest.raises(DataError, match=r"tool\.jsonl:2 has no 'api_name'"):
        from_path(tmp_path / "dev.jsonl")
