"""Server-sent events: what a model yields, as it comes, to callers that read, that leave, and that read nothing."""

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Server, only, wait_for
from tests.test_faults import write_model
from tests.test_http import metric, states

StartServer = Callable[..., Server]
Ask = Callable[..., http.client.HTTPResponse]
ACCEPT = {"Accept": "text/event-stream", "Content-Type": "application/json"}
COUNTS = """
    def run(self, data, args):
        import time
        for index in range(data):
            if index == args.get('slow_from'):
                time.sleep(600)
            yield index if not args.get('long') else 'x' * args['long']
"""


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Sends a request and returns the answer, of which the body is not read. The connections end with the test."""
    with ExitStack() as stack:
        yield lambda *asked: stack.enter_context(closing(_ask(*asked)))


def _ask(server: Server, model: str, data: Any, args: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)  # it ends with the answer
    kind, body = "application/json", json.dumps(data)
    if args:
        kind, body = "multipart/form-data; boundary=b", ""
        for name, value in (("data", data), ("args", args)):
            body += f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{json.dumps(value)}\r\n'
        body += "--b--\r\n"
    connection.request("POST", f"/models/{model}/run", body, ACCEPT | {"Content-Type": kind, "Connection": "close"})
    return connection.getresponse()


def events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """(event, data) as they come, parsed as the HTML standard says."""
    name, data = "message", ""
    for line in iter(answer.readline, b""):
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif not field:
            yield name, json.loads(data)
            name, data = "message", ""


def test_what_a_model_yields(server: Server, ask: Ask) -> None:
    answer = ask(server, "tokens", 3)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    found = list(events(answer))
    assert [(name, value and value["index"]) for name, value in found] == [
        ("message", 0),
        ("message", 1),
        ("message", 2),
        ("end", None),
    ]
    assert found[1][1]["array"] == [1] * 100_000


def test_a_connection_is_used_again_after_a_stream(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    for _ in range(2):
        connection.request("POST", "/models/tokens/run", "1", ACCEPT)
        answer = connection.getresponse()
        assert answer.read().endswith(b"event: end\ndata: null\n\n")
    connection.close()


@pytest.mark.parametrize(("model", "data", "value"), [("echo", "a\r\nb Ü", "a\r\nb Ü"), ("pipeline", "21", [42])])
def test_a_model_that_yields_nothing_has_one_event(server: Server, ask: Ask, model: str, data: Any, value: Any) -> None:
    assert list(events(ask(server, model, data))) == [("message", value), ("end", None)]


def test_a_value_comes_before_the_next_is_made(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", COUNTS))
    answer = ask(server, "slow", 3, {"slow_from": 2})
    found = events(answer)
    assert [next(found), next(found)] == [("message", 0), ("message", 1)]


@pytest.mark.parametrize(
    ("model", "data", "args", "code", "message"),
    [
        ("tokens", 3, {"fail_at": 0}, 400, "no more"),
        ("tokens", 1, {"die_at": 0}, 500, "exited with code 9"),
        ("nobody", 1, {}, 404, "no model 'nobody'"),
        ("misbehave", 1, {"do": "raise"}, 500, "no such thing"),
    ],
)
def test_what_fails_before_the_first_event_has_a_status(
    server: Server, ask: Ask, model: str, data: Any, args: dict[str, Any], code: int, message: str
) -> None:
    answer = ask(server, model, data, args)
    assert answer.status == code
    assert answer.headers["Content-Type"] == "application/json"
    assert message in json.load(answer)["error"]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [({"fail_at": 2}, "INVALID_ARGUMENT", "no more"), ({"die_at": 2}, "INTERNAL", "exited with code 9")],
)
def test_what_fails_midway_is_an_event(
    server: Server, ask: Ask, args: dict[str, Any], status: str, message: str
) -> None:
    *values, (name, error) = events(ask(server, "tokens", 5, args))
    assert [value["index"] for _, value in values] == [0, 1]
    assert (name, error["status"]) == ("error", status)
    assert message in error["error"]


def test_a_caller_that_leaves_ends_the_models_work(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    server = start_server(only("tokens"), TEST_CLOSED=closed)
    for read in (True, False):  # also one that leaves before it has read anything
        answer = ask(server, "tokens", 10_000, {"sleep": 0.01})
        if read:
            next(events(answer))
        answer.close()
        wait_for(lambda: closed.exists() and closed.read_text(), "the generator to be closed")
        closed.unlink()


def test_a_caller_that_reads_nothing(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    """The model pauses, and then its work ends; the caller's connection holds little memory, and no thread."""
    server = start_server(write_model(tmp_path, "slow", COUNTS), TMS_STREAM_IDLE_S=1)
    process = psutil.Process(server.process.pid)
    form = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = form % (b"data", b"100000") + form % (b"args", b'{"long": 100000}') + b"--b--\r\n"
    head = f"POST /models/slow/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Accept: text/event-stream\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port)) as caller:
        before = process.memory_info().rss
        caller.sendall(head.encode() + body)
        wait_for(lambda: metric(server, "tms_in_flight") == 1, "the stream to begin")
        wait_for(lambda: metric(server, "tms_in_flight") == 0, "the stream to end")
        assert process.memory_info().rss - before < 64 << 20
        assert list(events(ask(server, "slow", 1))) == [("message", 0), ("end", None)]
        caller.settimeout(20)
        answer = b""
        while part := caller.recv(1 << 20):
            answer += part
            if answer.endswith(b"0\r\n\r\n"):
                break
    assert b"event: error" in answer
    assert b"DEADLINE_EXCEEDED" in answer


def test_streams_that_wait_hold_no_threads(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", COUNTS), TMS_THREADS=64)
    process = psutil.Process(server.process.pid)
    body = json.dumps(1).encode()
    request = f"POST /models/slow/run HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request += "Accept: text/event-stream\r\nContent-Type: application/json\r\n\r\n"
    ask(server, "slow", 2, {"slow_from": 1})
    before = process.num_threads()
    with ExitStack() as stack:
        for number in range(40):
            caller = stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port)))
            caller.sendall(request.encode().replace(b"Host: x", b"Host: localhost") + body)
            wait_for(lambda want=number + 2: metric(server, "tms_in_flight") == want, "it to be queued")
        assert process.num_threads() < before + 10
        assert states(server)["slow"] == "READY"
    wait_for(lambda: metric(server, "tms_in_flight") == 1, "the others to be dropped")


def test_a_stream_counts_as_a_call(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", COUNTS), TMS_THREADS=1)
    ask(server, "slow", 2, {"slow_from": 1})
    refused = ask(server, "slow", 1)
    assert refused.status == 429
    assert "1 calls in work" in json.load(refused)["error"]


def test_a_server_that_stops_ends_a_stream(start_server: StartServer, ask: Ask, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", COUNTS), TMS_GRACE_S=0.5, TMS_DRAIN_DELAY_S=0)
    answer = ask(server, "slow", 2, {"slow_from": 1})
    found = events(answer)
    assert next(found) == ("message", 0)
    server.stop()
    name, error = next(found)
    assert (name, error["status"]) == ("error", "UNAVAILABLE")
    assert not [line for line in server.log if "Traceback" in line], server.log
