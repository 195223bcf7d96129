"""Ask a model, run its calls, and give the results back, until it answers or a budget is used up."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

from poe.calls.arguments import find_faults
from poe.calls.content import content_text
from poe.calls.conversation import Call, Message, Tool
from poe.calls.json_text import as_text
from poe.calls.streaming import CallPart, Part, TextPart
from poe.calls.tools import check_calls
from poe.cascade import Cascade
from poe.chat import Answer, AnswerStream, read_messages
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.errors import DataError, DecodingError, ToolError
from poe.loaders.tokenizer import check_tokenizer
from poe.tools.execution import Outcome, bind_tools, cut_text, declarations, run_calls
from poe.tools.retrieval import TOOL_SHARE, TOOLS_OFFERED, ToolIndex

Reason = Literal["answer", "turns", "seconds", "tokens", "length", "context", "invalid reply"]
Policy = Callable[[list[Message], list[Tool]], Answer]

_MOST_SECONDS = 600.0
_REPLY_TOKENS = 256
_RESULT_CHARS = 8_000


class Agent:
    """A model that calls tools until it answers.

    `policy` is a cascade, or a function `messages, tools -> Answer`. `tools` are Python functions, MCP servers of
    `connect_mcp`, or a list of both (`bind_tools`); with `dry_run`, declarations too, because no call is run.

    `approve(call)` is asked before each call, except of tools of MCP servers that declare them read-only. Without
    `approve`, every valid call is run. A run ends after `max_turns` replies, `max_seconds`, or `max_tokens` generated
    tokens. A call fails after `call_seconds`. Of a result, the model reads `result_chars` characters (default: as many
    as its context has tokens, about a quarter of it, but at most 8,000). `options` are those of `Cascade.chat`:
    `stage`, `stream`, `max_new_tokens`, ...; `tool_choice` holds for the first reply.

    A call that does not fit its tool is never run. The model reads why, once; a second such reply in a row ends the
    run. It reads the error of a tool, too; the same call that fails again raises `ToolError`. If the tools take more
    than half of the context, each turn offers those that fit the question best (`ToolIndex`), and those that were
    called before.
    """

    def __init__(
        self,
        policy: Cascade | Policy,
        tools: Any,
        *,
        approve: Callable[[Call], bool] | None = None,
        dry_run: bool = False,
        max_turns: int = 10,
        max_seconds: float = _MOST_SECONDS,
        max_tokens: int | None = None,
        call_seconds: float = 60.0,
        result_chars: int | None = None,
        **options: Any,
    ) -> None:
        self.tools = bind_tools(tools)
        self.approve, self.dry_run = approve, dry_run
        self.max_turns, self.max_seconds, self.max_tokens = max_turns, max_seconds, max_tokens
        self.call_seconds = call_seconds
        self._policy, self._options = policy, options
        self._by_name = {bound.name: bound for bound in self.tools}
        if not dry_run and (declared := [bound.name for bound in self.tools if bound.start is None]):
            raise DataError(
                f"Tool {declared[0][:80]!r} is only declared, so nothing can run it: expected a Python function, an "
                "MCP server of connect_mcp, or dry_run=True."
            )
        if isinstance(policy, Cascade):
            self._counter: _TokenCounter | None = _TokenCounter(policy)
        elif options or max_tokens is not None:
            name = "max_tokens" if max_tokens is not None else next(iter(options))
            raise DecodingError(f"{name} needs a cascade as policy: a function generates and counts by itself.")
        else:
            self._counter = None
        context = self._counter.context if self._counter else None
        self.result_chars = result_chars or min(_RESULT_CHARS, context or _RESULT_CHARS)
        self._index = self._build_index()

    def run(self, messages: str | Sequence[Mapping[str, Any]]) -> "AgentRun":
        """Run until the end. `messages` are in OpenAI's form, or a question. Raises `ToolError`.

        To keep the transcript of a run that is interrupted or raises, use `start` and iterate over it.
        """
        run = self.start(messages)
        for _ in run:
            pass
        return run

    def start(self, messages: str | Sequence[Mapping[str, Any]]) -> "AgentRun":
        """Return a run that goes on while you iterate over it."""
        question = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        read_messages(question)  # raises for what is no conversation
        return AgentRun(self, list(map(dict, question)))

    def _build_index(self) -> ToolIndex | None:
        """Return an index of the tools if they take too much of the context, else None."""
        if self._counter is None or self._counter.context is None or not self.tools:
            return None
        tools = declarations(self.tools)
        return ToolIndex(tools) if self._counter.count_tools(tools) > TOOL_SHARE * self._counter.context else None

    def _offer(self, messages: Sequence[Message]) -> list[Tool]:
        """Return the tools for the next turn."""
        if self._index is None or self._counter is None or self._counter.context is None:
            return declarations(self.tools)
        asked = next((m["content"] for m in reversed(messages) if m["role"] == "user" and m["content"]), "")
        question = content_text(asked)
        called = {call["function"]["name"] for m in messages for call in m.get("tool_calls") or ()}
        used = [bound.tool for bound in self.tools if bound.name in called]
        found = [tool for tool in self._index.search(question, TOOLS_OFFERED) if tool not in used]
        while found and self._counter.count_tools([*used, *found]) > TOOL_SHARE * self._counter.context:
            found.pop()
        return [*used, *found]


class AgentRun:
    """A run of an agent. It goes on while you iterate over it, and is its own result.

    The iteration yields the parts of each reply (`TextPart`, `CallPart`, `FaultPart` of `poe.calls.streaming`; with
    `stream=True` as the model writes them), and an `Outcome` for each call.

    messages  the transcript in OpenAI's form, also after an interrupt or an error
    answer    the last `Answer`
    reason    why it ended: "answer"; "turns", "seconds" or "tokens": the budget; "length": a reply was cut off;
              "context": the transcript does not fit into the model; "invalid reply": twice, one after the other
    turns     the number of replies
    tokens    the number of tokens of the replies, None if the policy is a function
    seconds   how long it took
    outcomes  what became of each call
    """

    def __init__(self, agent: Agent, messages: list[Message]) -> None:
        self.messages = messages
        self.answer: Answer | None = None
        self.reason: Reason | None = None
        self.turns = 0
        self.tokens: int | None = None if agent._counter is None else 0
        self.seconds = 0.0
        self.outcomes: list[Outcome] = []
        self._agent = agent
        self._failed: dict[str, str] = {}  # calls of which the model read the error, and that error
        self._had_problems = False
        self._events = self._go()

    def __iter__(self) -> Iterator[Part | Outcome]:
        return self._events

    @property
    def text(self) -> str:
        """The text of the answer, "" if there is none."""
        return self.answer.text if self.answer is not None and self.reason == "answer" else ""

    def _go(self) -> Iterator[Part | Outcome]:
        self._started = time.monotonic()
        try:
            while self.reason is None:
                tools = self._agent._offer(self.messages)
                self.reason = self._used_up(tools)
                if self.reason is None:
                    yield from self._take_turn(tools)
        finally:
            self.seconds = time.monotonic() - self._started

    def _seconds_left(self) -> float:
        return self._agent.max_seconds - (time.monotonic() - self._started)

    def _used_up(self, tools: list[Tool]) -> Reason | None:
        """Return the budget that is used up, or None."""
        agent = self._agent
        if self.turns >= agent.max_turns:
            return "turns"
        if self._seconds_left() <= 0:
            return "seconds"
        if agent.max_tokens is not None and (self.tokens or 0) >= agent.max_tokens:
            return "tokens"
        counter = agent._counter
        if counter is not None and counter.context is not None:
            return "context" if counter.count_prompt(self.messages, tools) >= counter.context else None
        return None

    def _take_turn(self, tools: list[Tool]) -> Iterator[Part | Outcome]:
        reply = self._ask(tools)
        if reply is None:
            self.reason = "tokens"
            return
        if isinstance(reply, AnswerStream):
            with closing(reply):  # an interrupt stops its thread
                yield from reply.parts()
                reply = reply.answer
        else:
            yield from [TextPart(reply.text)] if reply.text else []
            yield from map(CallPart, reply.calls)
        self.answer = answer = reply
        self.turns += 1
        if self._agent._counter is not None and self.tokens is not None:
            self.tokens += self._agent._counter.count_text(answer.raw)
        if answer.finish_reason == "length":  # its calls may not be all that it wanted to write
            self.messages.append({"role": "assistant", "content": answer.text or answer.raw})
            most = self._agent.max_tokens
            is_spent = most is not None and self.tokens is not None and self.tokens >= most
            self.reason = "seconds" if self._seconds_left() <= 0 else "tokens" if is_spent else "length"
            return
        fitting = set(check_calls(answer.calls, tools))
        unread = [problem for problem in answer.problems if problem not in fitting]
        if not answer.calls and not unread:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.reason = "answer"
            return
        yield from self._handle_calls(answer, unread, tools)

    def _ask(self, tools: list[Tool]) -> Any:
        """Return the policy's reply, None if too few tokens are left for one."""
        agent, policy = self._agent, self._agent._policy
        if not isinstance(policy, Cascade):
            return policy(list(self.messages), tools)
        options = {"max_new_tokens": _REPLY_TOKENS, **agent._options, "max_time": self._seconds_left()}
        if self.turns:  # a call that must come has come: else no answer could follow
            options.pop("tool_choice", None)
        left = math.inf if agent.max_tokens is None else agent.max_tokens - (self.tokens or 0)
        if left >= options["max_new_tokens"]:
            return policy.chat(self.messages, tools, **options)
        try:
            return policy.chat(self.messages, tools, **{**options, "max_new_tokens": left})
        except DecodingError:  # no reply that the constraint allows is so short
            return None

    def _handle_calls(self, answer: Answer, unread: list[str], tools: list[Tool]) -> Iterator[Outcome]:
        """Run the calls that may be run, and add the reply and all outcomes to the transcript."""
        problems = ["; ".join(map(str, find_faults(call, tools))) for call in answer.calls]
        if is_repeated := self._had_problems and bool(unread or any(problems)):
            self.reason = "invalid reply"
        self._had_problems = bool(unread or any(problems))
        outcomes: list[Outcome | None] = [
            Outcome(call, "invalid", f"Error: the call was not run: {problem}.") if problem else None
            for call, problem in zip(answer.calls, problems, strict=True)
        ]
        rest = "The call was not run: the agent was stopped before."
        try:
            for i, call in enumerate(answer.calls):
                outcomes[i] = outcomes[i] or self._decide(call, is_repeated or bool(unread))
            yield from filter(None, outcomes)
            waiting = [i for i, outcome in enumerate(outcomes) if outcome is None]
            bound = [(self._agent._by_name[answer.calls[i].name], answer.calls[i]) for i in waiting]
            seconds = max(0.0, min(self._agent.call_seconds, self._seconds_left()))
            rest = "The agent was stopped before there was a result: the call may have had its effect."
            for position, outcome in run_calls(bound, seconds):
                shown = replace(outcome, text=cut_text(outcome.text, self._agent.result_chars))
                outcomes[waiting[position]] = shown
                yield shown
        finally:
            pairs = zip(answer.calls, outcomes, strict=True)
            whole = [outcome or Outcome(call, "stopped", rest) for call, outcome in pairs]
            self._write_down(answer, unread, whole)
        self._check_failures(whole)

    def _decide(self, call: Call, is_refused: bool) -> Outcome | None:
        """Return the outcome of a valid call that is not run, None for one that is."""
        agent = self._agent
        if is_refused:
            return Outcome(call, "stopped", "The call was not run, because the reply was not accepted.")
        if agent.dry_run:
            return Outcome(call, "dry run", "Dry run: the call fits its tool, and was not run.")
        asks = agent.approve is not None and not agent._by_name[call.name].is_read_only
        if asks and not agent.approve(call):  # type: ignore[misc]
            return Outcome(call, "refused", "The user refused this call. It was not run.")
        return None

    def _write_down(self, answer: Answer, unread: list[str], outcomes: list[Outcome]) -> None:
        """Add a reply, the outcomes of its calls, and what could not be read of it, to the transcript."""
        self.outcomes += outcomes
        before = sum(len(message.get("tool_calls") or ()) for message in self.messages)
        calls = [call.as_openai(before + i) for i, call in enumerate(answer.calls)]
        if calls:
            self.messages.append({"role": "assistant", "content": answer.text or None, "tool_calls": calls})
        else:
            self.messages.append({"role": "assistant", "content": answer.raw})
        self.messages += [
            {"role": "tool", "tool_call_id": call["id"], "name": outcome.call.name, "content": outcome.text}
            for call, outcome in zip(calls, outcomes, strict=True)
        ]
        if unread and self.reason is None:
            text = f"Your reply was not accepted: {'; '.join(unread)}. Write it again."
            self.messages.append({"role": "user", "content": cut_text(text, self._agent.result_chars)})

    def _check_failures(self, outcomes: list[Outcome]) -> None:
        """Raise `ToolError` for a call that failed before, so that the model has read why."""
        failed = {as_text([o.call.name, o.call.arguments]): o for o in outcomes if o.status == "failed"}
        for key, outcome in failed.items():
            if key in self._failed:
                raise ToolError(
                    f"Tool {outcome.call.name!r} failed twice with the same arguments, the second time after the model "
                    f"had read the error: {self._failed[key][:500]!r}, then {outcome.text[:500]!r}. Check the tool."
                )
            self._failed[key] = outcome.text


class _TokenCounter:
    """Counts the tokens of a cascade's prompts."""

    def __init__(self, cascade: Cascade) -> None:
        config: Any = cascade.base.config
        check_tokenizer(cascade.tokenizer, config.vocab_size)
        complete_template(cascade.tokenizer)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._tokenizer = cascade.tokenizer
        self._renderer = Renderer(cascade.tokenizer, vocab_size=config.vocab_size)

    def count_prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> int:
        return len(self._renderer.prompt_ids(read_messages(messages), tools))

    def count_tools(self, tools: Sequence[Tool]) -> int:
        """Return how many tokens the tools add to a prompt."""
        question: list[Message] = [{"role": "user", "content": "a question"}]
        return self.count_prompt(question, tools) - self.count_prompt(question, ())

    def count_text(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)
