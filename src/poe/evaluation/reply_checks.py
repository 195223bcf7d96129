"""Check replies in text against a reference: the final number of a worked answer, and Python code.

| metric | share |
|---|---|
| final_number | replies with the reference's final number: the first one after `####`, else the last one |
| marked_number | the same, of the number after `####` alone |
| parses | replies with code that Python's parser accepts |
| defines | replies with code that defines each function that the question calls and the reference defines |
| same_code | replies with the syntax tree of the reference, so comments and spaces do not count |
| similarity | the mean share of characters that code and reference have in common, in order (difflib's ratio) |

A reply that is no program has zero in all metrics of code but `similarity`. Code is parsed and never executed, so
nothing here tells whether it passes its tests.
"""

import ast
import re
from decimal import Decimal
from difflib import SequenceMatcher
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.literals import parse_python
from poe.evaluation.call_metrics import Counts

MARK = "####"
_NUMBER = re.compile(r"(?:(?<![\w)%])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_FENCED = re.compile(r"```[\w+#.-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def check_number(conversation: Conversation, reply: str) -> Counts:
    """Compare the final number of a reply with that of the reference answer. Without one in it, nothing counts."""
    right = find_number(reference_of(conversation))
    if right is None:
        return {}
    marked = find_number(reply) if MARK in reply else None
    return {
        "final_number": (float(find_number(reply) == right), 1.0),
        "marked_number": (float(marked == right), 1.0),
    }


def find_number(text: str) -> Decimal | None:
    """Return the first number after the first `####`, or the last number of a text without that mark."""
    before, mark, after = text.replace("$", "").replace("\N{MINUS SIGN}", "-").partition(MARK)
    found = _NUMBER.findall(after if mark else before)
    return Decimal(found[0 if mark else -1].replace(",", "")) if found else None


def check_code(conversation: Conversation, reply: str) -> Counts:
    """Compare the code of a reply with that of the reference answer."""
    question = "\n".join(str(message["content"]) for message in conversation.question)
    code, reference = find_code(reply), find_code(reference_of(conversation))
    tree, right = _parse(code), _parse(reference)
    counts: Counts = {"parses": (float(tree is not None), 1.0)}
    if asked := {name for name in _functions(right) if re.search(rf"\b{re.escape(name)}\s*\(", question)}:
        counts["defines"] = (float(asked <= _functions(tree)), 1.0)
    is_same = tree is not None and right is not None and ast.dump(tree) == ast.dump(right)
    counts["same_code"] = (float(is_same), 1.0)
    counts["similarity"] = (SequenceMatcher(None, code, reference, autojunk=False).ratio(), 1.0)
    return counts


def find_code(text: str) -> str:
    """Return the first fenced block of a text, which may be cut off, or all of a text without fences."""
    fenced = _FENCED.search(text)
    return (fenced[1] if fenced else text).strip()


def reference_of(conversation: Conversation) -> str:
    """Return the text of the first assistant turn that is trained on."""
    return str(conversation.messages[len(conversation.question)]["content"] or "")


def _parse(code: str) -> Any:
    """Return the syntax tree of a program with at least one statement, else None."""
    try:
        tree = parse_python(code)
    except ValueError:
        return None
    return tree if tree.body else None


def _functions(tree: Any) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} if tree else set()
