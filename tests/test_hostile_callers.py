"""What a hostile caller tries who speaks the protocols himself: nobody else waits for him."""

import socket
import struct
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import grpc
import psutil
import pytest

from tests.conftest import Server
from tests.test_web import post
from tiny_model_server import schemas
from tiny_model_server.client import calls
from tiny_model_server.client.channel import ChannelKey, SharedChannel
from tiny_model_server.client.credentials import Credentials
from tiny_model_server.server import forms

StartServer = Callable[..., Server]
RUN_TEXT = schemas.methods("server", "server.Server")["RunText"]
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


class Raw:
    """A connection of HTTP/2 by hand, whose window says how many bytes of answers the server may send."""

    def __init__(self, port: int, window: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        settings = self._frame(4, 0, 0, struct.pack(">HI", 4, window)) + self._frame(4, 1, 0, b"")
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        self._next = 1

    def call(self, path: str, message: bytes | None = b"") -> None:
        """Begins a call; it stays half-open if there is no message."""
        names = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        names |= {"content-type": "application/grpc"}
        head = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in names.items()
        )
        sent = self._frame(1, 4, self._next, head)
        if message is not None:
            body = struct.pack(">?I", False, len(message)) + message
            parts = [body[at : at + (1 << 14)] for at in range(0, len(body), 1 << 14)]
            sent += b"".join(self._frame(0, part is parts[-1], self._next, part) for part in parts)
        self._next += 2
        self.socket.sendall(sent)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@contextmanager
def raw(server: Server, connections: int, window: int = 0) -> Iterator[list[Raw]]:
    with ExitStack() as stack:
        made = [Raw(server.port, window) for _ in range(connections)]
        for one in made:
            stack.enter_context(one.socket)
        yield made


def seconds_of_health(server: Server, times: int = 5) -> float:
    """The longest that a caller with a connection of its own waits for Check, or for the first answer of Watch."""
    longest = 0.0
    for path in [CHECK, WATCH] * times:
        begun = time.monotonic()
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            assert next(channel.unary_stream(path)(b"", timeout=30)) == b"\x08\x01"
        longest = max(longest, time.monotonic() - begun)
    return longest


@pytest.mark.parametrize(("path", "connections"), [(WATCH, 4), (CHECK, 40)])
def test_callers_of_health_who_read_nothing_hold_nobody_up(
    start_server: StartServer, path: str, connections: int
) -> None:
    server = start_server()
    with raw(server, connections) as hostile:
        for one in hostile:
            for _ in range(1000 // connections):
                one.call(path)
        assert seconds_of_health(server) < 2


def test_half_open_calls_of_health_hold_nobody_up_for_long(start_server: StartServer) -> None:
    server = start_server()
    with raw(server, 100) as hostile:
        for one in hostile:
            for _ in range(10):
                one.call(CHECK, None)
        time.sleep(1)  # their connections are known as slow by now
        assert seconds_of_health(server) < 1.5


def test_those_who_watch_health_are_bounded(start_server: StartServer) -> None:
    """Each may hold a connection, and so a descriptor: the oldest watch ends, and is not begun anew."""
    server = start_server(command=("bash", "-c", 'ulimit -n 1024; exec "$0" server.py', sys.executable))
    with grpc.insecure_channel(server.address) as channel, raw(server, 1, 1 << 16) as (hostile,):
        first = channel.unary_stream(WATCH)(b"", timeout=30)
        assert next(first) == b"\x08\x01"
        for _ in range(256):
            hostile.call(WATCH)
        with pytest.raises(grpc.RpcError) as caught:
            next(first)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert seconds_of_health(server) < 2


def test_clients_beyond_those_who_may_watch_health_cost_nothing(start_server: StartServer) -> None:
    """None watches again: it would end another's watch, which would do the same, for ever."""
    command = ("bash", "-c", 'ulimit -n 160; exec "$0" server.py', sys.executable)
    server = start_server(command=command, TMS_MAX_CONNECTION_AGE_S=60)
    front, request = psutil.Process(server.process.pid), calls.text("RunText", "echo", "x", None)
    key = ChannelKey(f"ipv4:{server.address}", Credentials())
    channels = [SharedChannel(key) for _ in range(50)]  # 40 may watch
    try:
        for one in channels:
            one.stub(request.method, True)(request, timeout=20)
        before = sum(front.cpu_times()[:2])
        time.sleep(2)
        assert sum(front.cpu_times()[:2]) - before < 0.3
        for one in channels:
            one.stub(request.method, True)(request, timeout=20)
    finally:
        for one in channels:
            one.close()


def test_requests_that_stay_half_sent_leave_room_for_others(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_INFLIGHT_MB=16)
    url = f"http://127.0.0.1:{server.http_port}/models/echo/run"
    with ExitStack() as stack:
        for _ in range(4):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port)))
            half.sendall(b"POST /models/echo/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (4 << 20))
        time.sleep(0.5)
        large = "x" * (1 << 20)
        with server.client("echo") as client:
            assert client.run_text(large, timeout=10, retry=False) == large
        small = urllib.request.Request(url, b"x", {"Content-Type": "text/plain"})
        with urllib.request.urlopen(small, timeout=10) as answer:
            assert answer.read() == b'"x"\n'


def test_large_url_encoded_forms_are_refused(server: Server) -> None:
    """Decoding takes many times the memory of what was sent."""
    kind = "application/x-www-form-urlencoded"
    status, answer = post(server, "/models/echo/run", b"text=" + b"%41+" * 100_000, kind)
    assert status == 400
    assert "multipart/form-data" in answer["error"]
    assert post(server, "/models/echo/run", b"text=" + b"%41+" * 10_000, kind) == (200, "A " * 10_000)


@pytest.mark.parametrize("escaped", ["%C3%A9", "a%", "%4", "%%41", "%zz%41", "%2541", "a+b%2Bc", "", "%e2%82%ac" * 3])
def test_escapes_in_url_encoded_forms(escaped: str) -> None:
    found = forms.read_input("application/x-www-form-urlencoded", bytearray(b"text=" + escaped.encode()))
    assert found == (urllib.parse.unquote_plus(escaped), {})


def test_answers_that_nobody_reads_take_bounded_memory(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_INFLIGHT_MB=32, TMS_THREADS=16)
    process = psutil.Process(server.process.pid)
    request = RUN_TEXT.request(text="x" * (2 << 20), model="echo").SerializeToString()
    before = process.memory_info().rss
    with raw(server, 4) as hostile:
        for _ in range(40):
            for one in hostile:
                one.call(RUN_TEXT.path, request)
            time.sleep(0.05)
        assert seconds_of_health(server, 1) < 2
        with server.client("echo") as client:
            assert client.run_text("x", timeout=10) == "x"
        assert process.memory_info().rss - before < 600 << 20  # twice as much without a bound
        server.wait_for_log("too many calls wait for their callers")


def test_a_message_that_is_compressed_is_refused(server: Server) -> None:
    """Before it becomes large: a thousand times as large, while its caller sent next to nothing."""
    with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
        bomb = RUN_TEXT.request(text="x" * (1 << 20), model="echo").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(RUN_TEXT.path)(bomb, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in caught.value.details()


def test_answers_by_http_that_nobody_reads_take_bounded_memory(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_INFLIGHT_MB=16)
    process = psutil.Process(server.process.pid)
    body = b"x" * (12 << 20)
    head = (
        b"POST /models/echo/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(30):
            hostile = stack.enter_context(socket.socket())
            hostile.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            hostile.connect(("127.0.0.1", server.http_port))
            hostile.sendall(head % len(body) + body)
            hostile.settimeout(20)
            assert hostile.recv(1)  # the answer has begun
        server.wait_for_log("too many bytes of answers")
        assert process.memory_info().rss < 250 << 20  # twice as much without a bound
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/readyz", timeout=10) as answer:
            assert answer.status == 200
