"""Python functions, OpenAPI documents and other dialects become tools, and what has no place in them is noted."""

import copy
import dataclasses
import datetime
import enum
import functools
import json
import random
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, TypedDict, TypeVar

import pytest
from transformers.utils import get_json_schema

from poe.calls import tool_files
from poe.calls.conversation import Call
from poe.calls.schema import lint_schema
from poe.calls.tool_files import read_tools_file
from poe.calls.tools import check_calls, read_tools
from poe.errors import DataError, RowError


class Unit(enum.Enum):
    METRIC = "metric"
    IMPERIAL = "imperial"


class Place(TypedDict):
    city: str
    country: NotRequired[str]


@dataclasses.dataclass
class Stay:
    nights: int
    where: Place
    guests: list[str] = dataclasses.field(default_factory=list)


class Endless(TypedDict):
    inner: list["Endless"]


class Limits:  # as annotated_types and pydantic.Field have them
    description, ge, le, max_length = "how many", 1, 9, None


CityId = NewType("CityId", int)


def parameters_of(function: Any, notes: list[str] | None = None) -> dict[str, Any]:
    (tool,) = read_tools([function], [].append if notes is None else notes.append)
    return tool["function"]["parameters"]


def property_of(hint: Any) -> Any:
    def f(x) -> None:
        """Do it."""

    f.__annotations__["x"] = hint
    return parameters_of(f)["properties"]["x"]


PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
    "required": ["city"],
}
HINTS = [
    (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
    (int | str | None, {"type": ["integer", "string", "null"]}),
    (list[int] | None, {"type": ["array", "null"], "items": {"type": "integer"}}),
    (int | list[str], {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    (Literal["a", 1], {"type": ["string", "integer"], "enum": ["a", 1]}),
    (Unit, {"type": "string", "enum": ["metric", "imperial"]}),
    (list[Unit], {"type": "array", "items": {"type": "string", "enum": ["metric", "imperial"]}}),
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
    (set[str], {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
    (datetime.date, {"type": "string", "format": "date"}),
    (Any, {}),
    (CityId, {"type": "integer"}),
    (TypeVar("T", bound=str), {"type": "string"}),
    ("list[int]", {"type": "array", "items": {"type": "integer"}}),
    ("List[NotDefined]", None),
    (Place, PLACE),
    (Stay, {
        "type": "object",
        "properties": {
            "nights": {"type": "integer"}, "where": PLACE, "guests": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["nights", "where"],
    }),
    (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
    (Annotated[int, Limits], {"type": "integer", "description": "how many", "minimum": 1, "maximum": 9}),
    (Ellipsis, None),  # no type at all
    (complex, None),
    (Endless, None),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "schema"), HINTS, ids=lambda value: str(value)[:40])
def test_annotations_become_schemas(hint: Any, schema: Any) -> None:
    if schema is None:
        with pytest.raises(RowError, match=r"^tools\[0\]: Python function that does not describe a tool: argument 'x'"):
            property_of(hint)
    else:
        assert property_of(hint) == schema


def book(city: str, nights: int = 1, unit: Literal["a", "b"] | None = None, tags: list[str] = [], x: float | int = 0):  # noqa: B006
    """Book a room.

    It may take a while.

    Args:
        city: where it is,
            in two lines
        nights: how many (choices: [1, 2])
        unit: which
        tags: some
        x: any number

    Returns:
        A number
    """


def test_a_function_that_transformers_reads_is_the_same_tool() -> None:
    assert read_tools([book]) == read_tools([get_json_schema(book)])


def test_docstrings_of_three_styles_describe_the_arguments() -> None:
    def google(city: str, days: int) -> str:
        """Say the weather.

        Args:
            city: where
            days: how many
        """

    def sphinx(city: str, days: int) -> str:
        """Say the weather.

        :param city: where
        :param int days: how
            many
        :return: text
        """

    def numpy(city: str, days: int) -> str:
        """Say the weather.

        Parameters
        ----------
        city : str
            where
        days : int
            how
            many

        Returns
        -------
        str
        """

    functions = [tool["function"] for tool in read_tools([google, sphinx, numpy])]
    assert {function["description"] for function in functions} == {"Say the weather."}
    for function in functions:
        described = {name: schema["description"] for name, schema in function["parameters"]["properties"].items()}
        assert described == {"city": "where", "days": "how many"}


def test_what_a_function_does_not_say_is_noted() -> None:
    def f(x, *others, days: int = 2, **rest: int): ...

    notes: list[str] = []
    assert parameters_of(f, notes) == {
        "type": "object",
        "properties": {"x": {}, "days": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": {"type": "integer"},
    }
    assert notes[:3] == [
        "function without a docstring",
        "argument without a type hint takes any value",
        "*args left out",
    ]
    assert check_calls([Call("f", {"x": [1], "days": 3, "more": 4})], [f]) == []
    assert len(check_calls([Call("f", {"days": "3", "more": "4"})], [f])) == 3


def test_methods_and_callable_objects_are_tools() -> None:
    class Shop:
        def order(self, sku: str, count: int = 1) -> None:
            """Order something."""

        def __call__(self, sku: str) -> None:
            """Buy something."""

        @classmethod
        def close(cls, at: datetime.time) -> None:
            """Close the shop."""

    async def wait(seconds: float) -> None:
        """Wait."""

    tools = read_tools(
        [Shop().order, Shop(), Shop.close, functools.partial(Shop().order, count=2), Shop.order, wait][:3]
    )
    assert [(t["function"]["name"], t["function"]["description"]) for t in tools] == [
        ("order", "Order something."), ("Shop", "Buy something."), ("close", "Close the shop."),
    ]  # fmt: skip
    assert [t["function"]["parameters"]["required"] for t in tools] == [["sku"], ["sku"], ["at"]]
    assert read_tools([Shop.order]) == [tools[0]]
    assert parameters_of(functools.partial(Shop().order, count=2))["required"] == ["sku"]
    assert parameters_of(wait)["properties"] == {"seconds": {"type": "number"}}


def test_classes_of_pydantic_are_tools_and_arguments() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Room(pydantic.BaseModel):
        beds: int = pydantic.Field(ge=1, description="how many beds")

    class Reserve(pydantic.BaseModel):
        """Reserve rooms."""

        rooms: list[Room]

    def reserve(rooms: list[Room], name: Annotated[str, pydantic.Field(min_length=2, description="who")]) -> None:
        """Reserve rooms."""

    (tool,) = read_tools([Reserve])
    assert (tool["function"]["name"], tool["function"]["description"]) == ("Reserve", "Reserve rooms.")
    for given in (Reserve, reserve):
        name = given.__name__
        problems = check_calls([Call(name, {"rooms": [{"beds": 0}, {"beds": "x"}], "name": "ab"})], [given])
        assert f"{name}: arguments.rooms[0].beds: 0 is less than the minimum of 1" in problems
        assert f'{name}: arguments.rooms[1].beds: expected integer, found "x"' in problems
    assert parameters_of(reserve)["properties"]["name"] == {"type": "string", "description": "who", "minLength": 2}


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "dict", "properties": {
            "days": {"type": "integer"}, "at": {"type": "tuple", "items": {"type": "float"}}, "how": {"type": "any"},
            "more": {"type": "dict", "properties": {"deep": {"type": "float"}}},
        }, "required": ["days"]},
        {"type": "dict", "properties": {
            "days": {"type": "long"}, "at": {"type": "ArrayList", "items": {"type": "double"}}, "how": {"type": "any"},
            "more": {"type": "HashMap", "properties": {"deep": {"type": "float"}}},
        }, "required": ["days"]},
    ],
    ids=["Python", "Java"],
)  # fmt: skip
def test_the_types_of_bfcl_are_read(parameters: Any) -> None:
    (tool,) = read_tools([{"name": "math.mean", "description": "", "parameters": parameters}])
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "days": {"type": "integer"},
            "at": {"type": "array", "items": {"type": "number"}},
            "how": {},
            "more": {"type": "object", "properties": {"deep": {"type": "number"}}},
        },
        "required": ["days"],
    }


SHOP: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {"title": "Shop", "version": "1"},
    "paths": {
        "/items/{id}": {
            "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}}],
            "get": {
                "operationId": "getItem",
                "summary": "Read an item",
                "description": "With its price.",
                "parameters": [
                    {"$ref": "#/components/parameters/Currency"},
                    {"name": "session", "in": "cookie", "schema": {"type": "string"}},
                    {"name": "Authorization", "in": "header", "schema": {"type": "string"}},
                    {"name": "X-Trace", "in": "header", "description": "an id", "schema": {"type": "string"}},
                ],
            },
            "put": {
                "operationId": "getItem",
                "requestBody": {"$ref": "#/components/requestBodies/Item"},
            },
        },
        "/orders": {
            "post": {
                "description": "Order",
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": {"type": "array", "items": {"$ref": "#/components/schemas/Item"}}
                        },
                        "application/xml": {"schema": {}},
                    }
                },
            }
        },
    },
    "components": {
        "parameters": {"Currency": {"name": "currency", "in": "query", "schema": {"type": "string", "enum": ["EUR"]}}},
        "requestBodies": {
            "Item": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Item"}}},
            }
        },
        "schemas": {
            "Item": {
                "type": "object",
                "required": ["name", "created"],
                "properties": {
                    "id": {"type": "string"},
                    "created": {"type": "string", "readOnly": True},
                    "name": {"type": "string", "nullable": True},
                    "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Item"}},
                },
            }
        },
    },
}


def test_an_openapi_document_gives_a_tool_for_each_operation() -> None:
    notes: list[str] = []
    get, put, post = [tool["function"] for tool in read_tools(SHOP, notes.append)]
    assert (get["name"], get["description"]) == ("getItem", "Read an item\nWith its price.")
    assert get["parameters"] == {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "currency": {"type": "string", "enum": ["EUR"]},
            "X-Trace": {"type": "string", "description": "an id"},
        },
        "required": ["id"],
    }
    assert put["name"] == "getItem_2"
    assert list(put["parameters"]["properties"]) == ["id", "body_id", "name", "parts"]
    assert put["parameters"]["required"] == ["id", "name"]
    assert put["parameters"]["properties"]["name"] == {"type": ["string", "null"]}
    assert put["parameters"]["$defs"]["Item"]["properties"]["parts"]["items"] == {"$ref": "#/$defs/Item"}
    assert post["name"] == "post_orders"
    assert check_calls(
        [Call("post_orders", {"body": [{"name": "x", "created": "", "parts": [{"name": 1}]}]})], SHOP
    ) == [
        "post_orders: arguments.body[0].parts[0].created: required argument missing",
        "post_orders: arguments.body[0].parts[0].name: expected string or null, found 1",
    ]
    assert [note for note in notes if ":" in note or "named" in note] == [
        "getItem: cookie parameter 'session' left out",
        "getItem: body parameter 'id' named 'body_id'",
        "getItem: read-only 'created' left out",
        "operation 'getItem' named 'getItem_2'",
        "post_orders: body of the type application/xml left out",
    ]
    assert read_tools([json.dumps(SHOP)]) == read_tools(SHOP)


def changed(**changes: Any) -> dict[str, Any]:
    return {**SHOP, **changes}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"swagger": "2.0", "paths": {}}, "OpenAPI document of version '2.0'; expected 3.0 or 3.1"),
        (changed(paths={"/a": {"get": {"parameters": [{"$ref": "other.yaml#/a"}]}}}),
         "paths['/a'].get: OpenAPI document that refers to another document"),
        (changed(paths={"/a": {"get": {"parameters": [{"in": "query"}]}}}),
         "paths['/a'].get: OpenAPI parameter without a name or a place"),
        (changed(paths={"/a": {"get": {"parameters": [{"name": "x", "in": "query", "schema": {"type": "strnig"}}]}}}),
         "paths['/a'].get.parameters.properties.x.type: tool schema with an unknown type ('strnig')"),
        (changed(paths={"/a": {"get": {"parameters": [{"$ref": "#/paths/~1a/get/parameters/0"}]}}}),
         "paths['/a'].get: OpenAPI document that refers back to itself"),
    ],
)  # fmt: skip
def test_a_document_that_cannot_be_read_is_one_error_with_its_place(document: Any, message: str) -> None:
    with pytest.raises(RowError) as error:
        read_tools(document)
    assert str(error.value) == message


def test_tools_are_read_from_yaml(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setattr(tool_files, "MAX_YAML_VALUES", 1000)

    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(SHOP))
    assert read_tools_file(path) == read_tools(SHOP)
    path.write_text("openapi: 3.0.3\npaths:\n  /on:\n    get:\n      responses: {200: {description: ok}}\n")
    assert [tool["function"]["name"] for tool in read_tools_file(path)] == ["get_on"]
    bomb = "a: &a [1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi"))  # noqa: B905
    for text, message in (
        ("a: [", "not YAML .line 1, column 5"),
        (bomb, "more than 1,000 values"),
        ("[]", "holds no tools"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_tools_file(path)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Return every member of a JSON value as its container and key."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, member in list(members) for place in ((value, key), *places_in(member))]


def test_a_damaged_document_is_read_or_refused() -> None:
    rng, refused = random.Random(5), 0
    for _ in range(600):
        document = copy.deepcopy(SHOP)
        for _ in range(rng.randrange(1, 4)):
            container, key = rng.choice(places_in(document)[1:])
            container[key] = rng.choice(
                [None, 5, "x", "", True, [], {}, [{}], {"$ref": "#"}, {"$ref": "#/paths"}, -1.5]
            )
        try:
            tools = read_tools(document)
        except RowError:
            refused += 1
        else:
            assert all(lint_schema(tool["function"]["parameters"]) is None for tool in tools)
    assert 100 < refused < 500
