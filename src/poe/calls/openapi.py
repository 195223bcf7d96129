"""Read an OpenAPI document (3.0 or 3.1) as tools: one tool for each operation.

| in the document | in the tool |
|---|---|
| `operationId`, or the method and the path | the name |
| `summary` and `description` | the description |
| parameters of the path, the query and the headers | arguments, those of the path required |
| the JSON (or form) body: an object | its properties are arguments as well |
| any other body | the argument `body` |
| references to components | `$defs` of the parameters |

An argument with a name that is taken gets another one: `id`, then `query_id` or `body_id`. What has no place in a call
is left out and noted: cookies, bodies of another kind, callbacks.
"""

import re
from collections.abc import Iterator
from typing import Any

from poe.calls.resolution import Resolver, UnresolvableError
from poe.calls.schema import Note, lint_schema, no_note, repair_schema
from poe.errors import RowError

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_NAME = 64
_STANDARD_HEADERS = ("accept", "content-type", "authorization")  # by OpenAPI's own rule these are no parameters
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_COMPONENTS = "#/components/schemas/"


def is_openapi(value: Any) -> bool:
    """Return whether a JSON value is an OpenAPI document."""
    return isinstance(value, dict) and ("openapi" in value or "swagger" in value) and "name" not in value


def describe_operations(document: dict[str, Any], note: Note) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each operation, and its tool. Raises `RowError` with the place of what cannot be read."""
    version = str(document.get("openapi", document.get("swagger")))
    if not version.startswith("3."):
        raise RowError(f"OpenAPI document of version {version[:20]!r}; expected 3.0 or 3.1")
    paths = document.get("paths") or {}
    if not isinstance(paths, dict):
        raise RowError("OpenAPI document with paths that are no object")
    if document.get("webhooks"):
        note("webhooks left out")
    reader, names = _Document(document, note), set[str]()
    for path, item in paths.items():
        place = f"paths[{path!r}]"
        try:
            item = reader.follow(item)
            operations = {method: item[method] for method in METHODS if isinstance(item.get(method), dict)}
            for method, operation in operations.items():
                place = f"paths[{path!r}].{method}"
                tool = reader.describe(operation, item.get("parameters"), method, path)
                tool["name"] = _free_name(tool["name"], names, note)
                yield place, tool
        except (RowError, UnresolvableError) as error:
            if isinstance(error, RowError):
                raise RowError(error.reason, f"{place}.{error.place}" if error.place else place) from None
            raise RowError(f"OpenAPI document that {error}", place) from None


def _clean_name(name: str) -> str:
    return _NOT_IN_A_NAME.sub("_", name).strip("_")[:_MAX_NAME] or "operation"


def _free_name(name: str, taken: set[str], note: Note) -> str:
    clean = _clean_name(name)
    free, number = clean, 2
    while free in taken:
        free, number = f"{clean[: _MAX_NAME - 4]}_{number}", number + 1
    taken.add(free)
    if free != name:
        note(f"operation {name[:80]!r} named {free!r}")
    return free


class _Document:
    def __init__(self, document: dict[str, Any], note: Note) -> None:
        self._document = document
        self._resolver = Resolver(document)
        self._note = note

    def follow(self, value: Any) -> dict[str, Any]:
        """Return an object of the document, or the one that it refers to. Raises `UnresolvableError`."""
        for _ in range(20):
            if not isinstance(value, dict):
                raise RowError("OpenAPI document with a value that is no object")
            if "$ref" not in value:
                return value
            value = self._resolver.follow(value["$ref"])
        raise UnresolvableError("refers back to itself")

    def describe(self, operation: dict[str, Any], shared: Any, method: str, path: str) -> dict[str, Any]:
        """Return an operation as the `function` part of a tool."""
        name = operation.get("operationId") or _clean_name(f"{method}{path}")
        texts = (operation.get("summary"), operation.get("description"))
        about = "\n".join(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
        if operation.get("callbacks"):
            self._note(f"{name}: callbacks left out")
        properties: dict[str, Any] = {}
        required: list[str] = []
        for parameter in self._list_parameters(operation, shared, str(name)):
            argument = self._argument(parameter["name"], parameter["in"], properties, str(name))
            properties[argument] = self._parameter_schema(parameter)
            if parameter.get("required") is True or parameter["in"] == "path":
                required.append(argument)
        if operation.get("requestBody"):
            self._add_body(self.follow(operation["requestBody"]), properties, required, str(name))
        schema = {"type": "object", "properties": properties, "required": required}
        return {"name": str(name), "description": about, "parameters": self._with_definitions(schema)}

    def _list_parameters(self, operation: dict[str, Any], shared: Any, name: str) -> list[dict[str, Any]]:
        """Return the parameters of a path, replaced and followed by those of its operation."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for given in (shared, operation.get("parameters")):
            for parameter in map(self.follow, given if isinstance(given, list) else ()):
                key = parameter.get("name"), parameter.get("in")
                if not all(isinstance(part, str) for part in key):
                    raise RowError("OpenAPI parameter without a name or a place")
                if key[1] not in ("path", "query", "header"):
                    self._note(f"{name}: {key[1]} parameter {key[0]!r} left out")
                elif key[1] != "header" or str(key[0]).lower() not in _STANDARD_HEADERS:
                    found[key] = parameter  # type: ignore[index]
        return list(found.values())

    def _parameter_schema(self, parameter: dict[str, Any]) -> Any:
        schema = parameter.get("schema")
        if schema is None and isinstance(parameter.get("content"), dict):
            schema = next(
                (media.get("schema") for media in parameter["content"].values() if isinstance(media, dict)), None
            )
        if not isinstance(schema, dict):
            schema = {}
        text = parameter.get("description")
        return {**schema, "description": text} if isinstance(text, str) and "$ref" not in schema else schema

    def _argument(self, name: str, where: str, taken: dict[str, Any], operation: str) -> str:
        argument = name
        while argument in taken:
            argument = f"{where}_{argument}"
        if argument != name:
            self._note(f"{operation}: {where} parameter {name!r} named {argument!r}")
        return argument

    def _add_body(self, body: dict[str, Any], properties: dict[str, Any], required: list[str], name: str) -> None:
        given = body.get("content")
        content: dict[str, Any] = given if isinstance(given, dict) else {}
        kinds = sorted(content, key=_preference)
        chosen = kinds[0] if kinds and _preference(kinds[0]) < 3 else None
        for kind in kinds:
            if kind != chosen:
                self._note(f"{name}: body of the type {kind[:80]} left out")
        schema = content[chosen].get("schema") if chosen is not None and isinstance(content[chosen], dict) else None
        if not isinstance(schema, dict):
            return
        if problem := lint_schema(repair_schema(self._with_definitions(schema), no_note), "requestBody"):
            raise RowError(*problem)
        flat = self._resolver.resolve(schema)
        is_required = body.get("required") is True
        members = flat[0].get("properties") if len(flat) == 1 and flat[0].get("type", "object") == "object" else None
        if not isinstance(members, dict) or not members or flat[0].get("additionalProperties"):
            argument = self._argument("body", "request", properties, name)
            properties[argument] = schema
            required += [argument] if is_required else []
            return
        names = flat[0].get("required")
        for member, sub in members.items():
            if isinstance(sub, dict) and sub.get("readOnly") is True:
                self._note(f"{name}: read-only {member!r} left out")
                continue
            argument = self._argument(member, "body", properties, name)
            properties[argument] = sub
            required += [argument] if is_required and isinstance(names, list) and member in names else []

    def _with_definitions(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return a schema with the components that it refers to under `$defs`."""
        definitions: dict[str, Any] = {}
        written: dict[str, Any] = self._localize(schema, definitions)
        return {**written, "$defs": definitions} if definitions else written

    def _localize(self, value: Any, definitions: dict[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._localize(member, definitions) for member in value]
        if not isinstance(value, dict):
            return value
        copied = {key: member for key, member in value.items() if key not in ("discriminator", "xml", "externalDocs")}
        reference = copied.pop("$ref", None)
        written = {key: self._localize(member, definitions) for key, member in copied.items()}
        if reference is None:
            return written
        target = self._resolver.follow(reference)
        name = reference.removeprefix(_COMPONENTS) if isinstance(reference, str) else ""
        name = _NOT_IN_A_NAME.sub("_", name)
        if name not in definitions:
            definitions[name] = True  # it may contain itself
            definitions[name] = self._localize(target, definitions)
        return {**written, "$ref": f"#/$defs/{name}"}


def _preference(kind: str) -> int:
    essence = kind.partition(";")[0].strip().lower()
    if essence == "application/json" or essence.endswith("+json"):
        return 0 if essence == "application/json" else 1
    return 2 if essence in (*_FORMS, "*/*", "application/*") else 3
