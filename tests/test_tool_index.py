"""The index of tools finds those that a question needs."""

import pytest

from poe.tools.retrieval import ToolIndex


def declare(name: str, description: str, **parameters: str) -> dict:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    declare("getWeatherForecast", "Get the forecast for a town", town="the town"),
    declare("book_train", "Book a seat", station="where the train leaves"),
    declare("translateText", "Translate a sentence", language="the target language"),
    declare("open_account", "Open an account", owner="the owner's name"),
    declare("überweisung", "Geld überweisen", empfänger="wer das Geld bekommt"),
]


@pytest.fixture(scope="module")
def index() -> ToolIndex:
    return ToolIndex(TOOLS)


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("What is the weather?", ["getWeatherForecast"]),
        ("A seat near the station, please", ["book_train"]),
        ("Which language is this?", ["translateText"]),
        ("Bitte Geld überweisen", ["überweisung"]),
        ("Xyzzy?", []),
        ("", []),
    ],
)
def test_words_of_names_descriptions_and_parameters_count(index: ToolIndex, question: str, found: list[str]) -> None:
    assert [tool["function"]["name"] for tool in index.search(question)][:1] == found


def test_each_sentence_finds_its_tool(index: ToolIndex) -> None:
    question = "Book a seat in the train that leaves at the station. Translate it. Then the weather!"
    names = {tool["function"]["name"] for tool in index.search(question, 3)}
    assert names == {"book_train", "translateText", "getWeatherForecast"}
    assert len(index.search(question, 1)) == 1


def test_an_index_of_no_tools_finds_none() -> None:
    assert ToolIndex([]).search("anything") == []
