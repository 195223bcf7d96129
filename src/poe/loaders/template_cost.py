"""Refuse a chat template that takes too long or too much memory, before it is rendered in this process.

Templates run in a sandbox that keeps them from files and code, but not from loops of minutes or text of gigabytes.
"""

import functools
import os
import signal
import sys
import time
import warnings
from typing import Any

from poe.errors import TemplateError

MOST_SECONDS, MOST_BYTES, LONGEST_TEXT = 3, 1 << 30, 1_000_000
_MOST_WAIT = 300  # seconds
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
_QUESTION = {"role": "user", "content": "a"}
# Conversations that reach most branches of a template: messages, tools, generation prompt.
_TRIALS = (
    ([_QUESTION], None, True),
    ([{"role": "system", "content": "a"}, _QUESTION, {"role": "assistant", "content": "b"}, _QUESTION], None, True),
    ([_QUESTION], [_TOOL], True),
    (
        [
            _QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "c"},
        ],
        [_TOOL],
        False,
    ),
)


def check_template_cost(tokenizer: Any) -> None:
    """Raise `TemplateError` if rendering short conversations takes 3 s of CPU, 1 GiB, or makes a million characters.

    A forked process renders them, because a template cannot be stopped inside this one. Where processes cannot be
    forked (outside Linux) nothing is checked. Each template is tried once per process.
    """
    if tokenizer is not None and getattr(tokenizer, "chat_template", None) and sys.platform == "linux":
        problem = _try_template(_Trial(tokenizer))
        if problem is not None:
            raise TemplateError(
                f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} {problem} to render a short "
                f"conversation: expected at most {MOST_SECONDS} s and {LONGEST_TEXT:,} characters. Replace its "
                "chat_template."
            )


class _Trial:
    """A tokenizer that is the same key as another one with the same templates."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.key = str(tokenizer.chat_template)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Trial) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=64)
def _try_template(trial: _Trial) -> str | None:
    """Return what a template does too much, None if it is harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child runs one thread
        child = os.fork()
    if child == 0:
        os._exit(_render(trial.tokenizer))
    start, (done, status) = time.monotonic(), (0, 0)
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() - start > _MOST_WAIT:  # a busy machine, or a lock that was held in the fork
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "takes too long"
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return "takes too long" if os.WTERMSIG(status) == signal.SIGXCPU else "takes too much memory"
    return {1: "makes too much text", 2: "takes too much memory"}.get(os.WEXITSTATUS(status))


def _render(tokenizer: Any) -> int:
    """Render the trials under limits of the operating system; return 0, 1 (too long) or 2 (too much memory)."""
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except Exception:
        return 0
    for messages, tools, prompt in _TRIALS:
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except MemoryError:
            return 2
        except Exception:  # whether a template can be used is decided elsewhere
            continue
        if len(text) > LONGEST_TEXT:
            return 1
    return 0
