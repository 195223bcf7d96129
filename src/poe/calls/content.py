"""Read messages with a list of blocks as content, the spelling of Anthropic and of OpenAI, as messages with text.

| block | becomes |
|---|---|
| `text`, `input_text`, `output_text` | the text of the message |
| `tool_use` of the assistant | an entry of `tool_calls` |
| `tool_result` of the user | a message of the role `tool` |
| `thinking`, `redacted_thinking`, `reasoning` of the assistant | left out |

Any other block, such as an image, raises `RowError`: its content would be lost.
"""

from collections.abc import Iterable
from typing import Any

from poe.calls.conversation import Message
from poe.calls.json_text import as_text
from poe.calls.schema import Note, no_note
from poe.errors import RowError

_TEXTS = ("text", "input_text", "output_text")
_REASONING = ("thinking", "redacted_thinking", "reasoning")
_IMAGES = ("image", "image_url", "input_image")
_OTHERS = ("document", "file", "input_file", "audio", "input_audio", "video", "refusal", "search_result")
_KINDS = (*_TEXTS, *_REASONING, *_IMAGES, *_OTHERS, "tool_use", "tool_result")  # a type may be any value
_RESULT_ROLES = ("tool", "function")


def content_text(content: Any) -> str:
    """Return content without calls as text. Values that are no blocks, such as some tool results, become JSON."""
    if content is None:
        return ""
    if isinstance(content, list) and content and all(isinstance(block, dict) and "type" in block for block in content):
        return "".join(map(_block_text, content))
    return as_text(content)


def split_messages(messages: Iterable[Message], note: Note = no_note) -> list[Message]:
    """Return the messages that messages with blocks stand for, in order. Messages with text stay as they are."""
    return [part for message in messages for part in split_message(message, note)]


def split_message(message: Message, note: Note = no_note) -> list[Message]:
    """Return the messages that one message with blocks stands for."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, dict) and content.get("type") in _KINDS:
        content = [content]
    if content is None or isinstance(content, str):
        return [message]
    if role in _RESULT_ROLES and not _has_result(content):
        return [{**message, "content": _result_text(content)}]
    if not content and isinstance(content, list):
        return [{**message, "content": None}]
    if not isinstance(content, list):
        if isinstance(content, dict):
            raise RowError("content that is not text")
        return [message]
    parts: list[Message] = []
    calls: list[dict[str, Any]] = []
    text = ""
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role in ("user", *_RESULT_ROLES):
            if text.strip():
                parts.append({**message, "content": text})
                text = ""
            if block.get("is_error"):
                note("error mark of a result left out")
            result = _result_text(block.get("content"))
            parts.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind not in _REASONING or role != "assistant":
            text += _block_text(block)
            if calls and text.strip():
                raise RowError("text after a call")
    if calls and message.get("tool_calls"):
        raise RowError("calls in the content and in tool_calls")
    if calls:
        return [{**message, "content": text or None, "tool_calls": calls}]
    return [*parts, {**message, "content": text}] if text or not parts else parts


def _has_result(content: Any) -> bool:
    blocks = content if isinstance(content, list) else []
    return any(isinstance(block, dict) and block.get("type") == "tool_result" for block in blocks)


def _result_text(content: Any) -> str:
    """Return the result of a tool as text. A list of objects is JSON unless all of them are blocks."""
    if isinstance(content, list) and not all(isinstance(b, dict) and b.get("type") in _KINDS for b in content):
        return as_text(content)
    return content_text(content)


def _block_text(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in _TEXTS and isinstance(block.get("text"), str):
        return str(block["text"])
    raise RowError("image in the content" if kind in _IMAGES else "content that is not text")
