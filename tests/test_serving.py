"""The server in this process, with OpenAI's client: replies, streams, errors, limits, and numbers."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from poe import Cascade
from poe.serving.engine import Engine
from poe.serving.server import LOOPBACK, Limits
from served_models import Server

PLAIN: dict[str, Any] = {"max_tokens": 10}


@pytest.fixture(scope="module")
def server(served: tuple[Cascade, Any]) -> Iterator[Server]:
    cascade, models = served
    engine = Engine(cascade, [model.stage for model in models.values()], max_batch=8)
    engine.start()
    yield Server(engine, models, limits=Limits(max_context=400, max_body=20_000))
    engine.close()


def test_every_model_is_listed_and_answers_as_it_does_alone(server: Server, served: tuple[Cascade, Any]) -> None:
    listed = server.request("GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["base", "alpha", "beta", "gamma"]
    assert server.request("GET", "/v1/models/beta").json()["id"] == "beta"
    replies = set()
    for name, model in served[1].items():
        completion = server.ask(name, "Please book a gondola for Marla.", **PLAIN)
        replies.add(completion.choices[0].message.content)
        if name not in ("base", "gamma"):
            continue
        question = [{"role": "user", "content": "Please book a gondola for Marla."}]
        expected = served[0].chat(question, stage=model.stage, max_new_tokens=10)
        (choice,) = completion.choices
        assert choice.message.content.strip() == expected.text
        assert choice.finish_reason == expected.finish_reason
        assert completion.model == name
        assert completion.usage.completion_tokens == 10
    assert len(replies) > 2


def test_requests_at_the_same_time_get_their_own_replies(server: Server, served: tuple[Cascade, Any]) -> None:
    async def ask_all() -> list[Any]:
        async with server.openai() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(12)))

    async def ask(client: Any, number: int) -> Any:
        messages = [{"role": "user", "content": f"number {number}"}]
        model = list(served[1])[number % 4]
        return await client.chat.completions.create(model=model, messages=messages, max_tokens=3 + number % 7)

    passes, rows = server.engine.passes, server.engine.decoded_rows
    completions = asyncio.run(ask_all())
    assert server.engine.decoded_rows - rows > 1.5 * (server.engine.passes - passes)
    for number, completion in enumerate(completions):
        model, length = list(served[1])[number % 4], 3 + number % 7
        alone = server.ask(model, f"number {number}", max_tokens=length)
        assert completion.choices[0].message.content == alone.choices[0].message.content


def test_a_stream_is_the_reply_in_pieces(server: Server) -> None:
    whole = server.ask("beta", **PLAIN, logprobs=True, top_logprobs=2)
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    *chunks, last = server.ask("beta", **PLAIN, **options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 3
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    scores = [score for chunk in chunks if chunk.choices[0].logprobs for score in chunk.choices[0].logprobs.content]
    assert [score.token for score in scores] == [score.token for score in whole.choices[0].logprobs.content]
    assert all(score.logprob == score.top_logprobs[0].logprob and len(score.top_logprobs) == 2 for score in scores)


def test_several_choices_of_one_seed_differ_and_repeat(server: Server) -> None:
    options = {**PLAIN, "n": 3, "temperature": 1.8, "seed": 5}
    first, second = (server.ask("alpha", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    chunks = server.ask("alpha", **options, stream=True)
    for index in range(3):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.delta.content or "" for part in parts) == texts[index]


def test_stop_strings_end_the_reply(server: Server) -> None:
    text = server.ask("alpha", **PLAIN).choices[0].message.content
    stopped = server.ask("alpha", **PLAIN, stop=[text[4:7]])
    assert stopped.choices[0].message.content == text[: text.index(text[4:7])]
    assert stopped.choices[0].finish_reason == "stop"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"frequency_penalty": 0.5}, "frequency_penalty", "does not support"),
    ({"logit_bias": {"5": 3}}, "logit_bias", "does not support"),
    ({"top_k": 3}, "top_k", "does not support"),
    ({"functions": []}, "functions", "does not support"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 1000}, "n", "less than or equal to"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"top_logprobs": 3}, "top_logprobs", "need logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stop": ["a"] * 40}, "stop", "at most"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", "last message"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role", "one of system"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role", "one of system"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "image",
    ),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "cannot be used"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": "sometimes"}, "tool_choice", "'auto', 'none' or 'required'"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "belong together"),
    ({"model": None}, "model", "valid string"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_field_that_cannot_be_used_is_refused_by_its_name(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    response = server.post(**fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_unknown_model_and_an_unknown_path_are_named(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="expected one of base, alpha, beta, gamma"):
        server.ask("delta")
    assert server.request("POST", "/v1/embeddings", json={}).status_code == 404
    assert "expected GET /v1/models" in server.request("GET", "/").json()["error"]["message"]
    assert server.request("GET", "/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": NaN}', b'{"a":' * 3000, b'"\\ud800"', b'{"model": "alpha"}']
)
def test_a_malformed_body_is_an_error_of_one_line(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = server.request("POST", "/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "\n" not in response.json()["error"]["message"]


def test_a_request_that_is_too_large_or_too_long_is_refused(server: Server) -> None:
    assert server.post(user="x" * 30_000).status_code == 413

    async def parts() -> Any:
        for _ in range(30):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    response = server.request("POST", "/v1/chat/completions", content=parts(), headers=headers)
    assert response.status_code == 413
    for fields in ({"messages": [{"role": "user", "content": "gondola " * 1000}]}, {"max_tokens": 1000}):
        response = server.post(**fields)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "400 together" in response.json()["error"]["message"]


def test_a_web_page_cannot_use_a_server_of_this_machine(served: tuple[Cascade, Any], server: Server) -> None:
    """A page can post text to any address, and can make its own name lead to this machine."""
    text = {"content-type": "text/plain"}
    assert server.request("POST", "/v1/chat/completions", content=b"{}", headers=text).status_code == 415
    local = Server(server.engine, served[1], hosts=LOOPBACK)
    assert local.request("GET", "/v1/models").status_code == 200
    assert local.request("GET", "/v1/models", headers={"host": "[::1]:8000"}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert local.request("GET", "/v1/models", headers={"host": host}).status_code == 403


def test_a_key_is_needed_everywhere_but_for_health(served: tuple[Cascade, Any], server: Server) -> None:
    closed = Server(server.engine, served[1], api_key="a key")
    assert closed.request("GET", "/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/metrics", "/nothing"):
        assert closed.request("GET", path).status_code == 401
        assert closed.request("GET", path, headers={"authorization": "Bearer a ke"}).status_code == 401
    assert closed.request("GET", "/v1/models", headers={"authorization": "Bearer a key"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        closed.ask()


def test_a_full_server_tells_when_to_come_again(served: tuple[Cascade, Any]) -> None:
    cascade, models = served
    engine = Engine(cascade, ["alpha"], max_batch=1, max_queue=1)  # it is not started: nothing moves
    busy = Server(engine, models)

    async def ask_three() -> Any:
        async with busy.http() as client:
            body = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
            waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(2)]
            while engine.num_waiting < 2:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/chat/completions", json=body)
            engine.start()
            return refused, await asyncio.gather(*waiting)

    refused, answered = asyncio.run(ask_three())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [response.status_code for response in answered] == [200, 200]
    engine.close()
    assert busy.post(model="alpha").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(served: tuple[Cascade, Any], stream: bool) -> None:
    cascade, models = served
    engine = Engine(cascade, ["alpha"])
    engine.start()
    server = Server(engine, models)
    body = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "stream": stream, "stop": None}
    sent = json.dumps({**body, "max_tokens": 4000}).encode()

    async def leave() -> None:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        await messages.put({"type": "http.request", "body": sent, "more_body": False})
        headers = [(b"content-type", b"application/json"), (b"host", b"x")]
        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "asgi": {"spec_version": "2.3"}}

        async def send(message: dict[str, Any]) -> None:
            pass

        task = asyncio.create_task(server.app(scope, messages.get, send))
        while not engine.num_running:
            await asyncio.sleep(0.005)
        await messages.put({"type": "http.disconnect"})
        await task

    asyncio.run(leave())
    deadline = time.monotonic() + 5
    while engine.num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.num_running == 0
    assert 'poe_requests_total{model="alpha",status="499"} 1.0' in server.request("GET", "/metrics").text
    engine.close()


def test_a_late_reply_is_an_error_also_inside_a_stream(served: tuple[Cascade, Any]) -> None:
    cascade, models = served
    engine = Engine(cascade, ["alpha"], max_seconds=0.3)
    engine.start()
    server = Server(engine, models)
    long = {"max_tokens": 4000, "logprobs": True}
    with pytest.raises(openai.InternalServerError, match="not finished in the time") as caught:
        server.ask(**long)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="not finished in the time"):
        server.ask(**long, stream=True)
    engine.close()


def test_metrics_count_requests_tokens_and_times(server: Server) -> None:
    server.ask("gamma", max_tokens=5)
    server.post(model="nothing")
    text = server.request("GET", "/metrics").text
    assert 'poe_requests_total{model="gamma",status="200"}' in text
    assert 'poe_requests_total{model="unknown",status="404"}' in text
    for name in ("poe_rows_running", "poe_rows_waiting", "poe_passes_total", "poe_pass_rows_total"):
        assert f"\n{name} " in text
    for name in ("poe_time_to_first_token_seconds", "poe_request_seconds"):
        assert f'{name}_bucket{{le="0.5",model="gamma"}}' in text
    for name in ("poe_prompt_tokens_total", "poe_completion_tokens_total"):
        assert f'{name}{{model="gamma"}}' in text


def test_no_text_of_a_request_is_reported(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("the prompt was: a secret")

    monkeypatch.setattr("poe.serving.server.read_question", fail)
    response = server.post()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert len(server.reports) == 1
    assert "RuntimeError" in server.reports[0]
    assert "secret" not in server.reports[0]
