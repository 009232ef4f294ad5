"""The local transport: what a caller sends to the server's unix socket, and what a server sends to a client."""

import asyncio
import json
import os
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from random import Random
from typing import Any

import numpy as np

from tests.fuzzing import engine as engines
from tests.fuzzing import grpc_targets, mutators, oracle
from tests.fuzzing.mutators import Leaf
from tests.fuzzing.oracle import Finding, Target
from tiny_model_server import local_transport, schemas
from tiny_model_server.client import calls, errors
from tiny_model_server.client.call import Call, LocalCall
from tiny_model_server.client.local import LocalConnection, LocalConnections
from tiny_model_server.client.stats import Stats
from tiny_model_server.local_transport import ANSWER, FINAL, HELLO, REQUEST
from tiny_model_server.server.local_server import LocalServer, _Connection
from tiny_model_server.shared_memory import unnamed_file

_PORT = 100_000 + os.getpid()
"""No server has such a port, so the names of the sockets are free."""
_MEMORY = 1 << 16
_TURNS = 12
"""Turns of the loop in which a piece is read and answered."""


# ---- from a caller to the server


@cache
def _server() -> tuple[asyncio.AbstractEventLoop, LocalServer]:
    loop = asyncio.new_event_loop()
    server = LocalServer(engines.engine(), _PORT, "127.0.0.1:50000")
    server.threads = engines.InlineExecutor()
    server.loop = loop
    return loop, server


def serve(data: bytes) -> None:
    """The first byte says which descriptor comes with the greeting; then come pieces, each after the last's answer."""
    if data:
        loop, server = _server()
        loop.run_until_complete(_served(server, data))


async def _served(server: LocalServer, data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        connection = _Connection(server, theirs)
        ours.setblocking(False)
        fds = _descriptor(data[0])
        for piece in mutators.pieces(data[1:]):
            with suppress(OSError):  # it was refused before
                socket.send_fds(ours, [piece], fds)
            for _ in range(_TURNS if not fds else _TURNS + 4):  # the first piece is read in two parts
                await asyncio.sleep(0)
            for fd in fds:
                os.close(fd)
            fds = []
            _check_answers(ours)
        for fd in fds:
            os.close(fd)
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    connection.close()
    if server.connections or server.engine.inflight.used:
        raise Finding(f"{server.connections} are left, and {server.engine.inflight.used} bytes")


def _descriptor(kind: int) -> list[int]:
    """A caller's own memory: none, sealed, one that may shrink, or no memory at all."""
    if kind % 4 == 0:
        return []
    if kind % 4 == 3:
        return [os.open("/dev/null", os.O_RDONLY)]
    fd = unnamed_file() if kind % 4 == 1 else os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _MEMORY)
    return [fd]


def _check_answers(ours: socket.socket) -> None:
    data = b""
    with suppress(OSError):
        while more := _received(ours):
            data += more
    if len(data) >= HELLO.size and HELLO.unpack_from(data)[0] < 100 and data[HELLO.size :].startswith(b"127"):
        data = data[HELLO.size + HELLO.unpack_from(data)[0] :]
    while len(data) >= ANSWER.size:
        size, code, _ = ANSWER.unpack_from(data)
        name = calls.STATUSES[code & ~FINAL]
        body = data[ANSWER.size : ANSWER.size + size]
        if name != "OK":
            oracle.status(name, body.decode())
        data = data[ANSWER.size + size :]


def _received(ours: socket.socket) -> bytes:
    data, fds, *_ = socket.recv_fds(ours, 1 << 16, 4)
    for fd in fds:
        os.close(fd)
    return data


def _greeting(metadata: dict[str, str]) -> bytes:
    text = json.dumps(metadata).encode()
    return HELLO.pack(len(text)) + text


def _request(method: str, message: bytes, call_id: str = "abc", seconds: float = 5.0) -> bytes:
    path = f"/server.Server/{method} {call_id}".encode()
    return REQUEST.pack(len(message), seconds, 1, len(path)) + path + message


def _placed() -> Iterator[tuple[str, bytes]]:
    image = grpc_targets.PIXELS
    values = [grpc_targets.VALUES[1], [np.zeros(16, np.float32)], image]
    made = [calls.value("Run", "echo", value, None) for value in values]
    made += [calls.image(name, "echo", one, None) for name in ("RunImage", "RunImageToImage") for one in (image,)]
    made += [calls.image("RunImageToImage", "masks", image, None)]
    made += [calls.image_batch("echo", [image, image], None, True), calls.value_batch("echo", values, None, True)]
    for one in made:
        yield one.method.name, one.placed([128 * index for index in range(len(one.parts))])


def _serve_seeds() -> list[bytes]:
    hello = _greeting({})
    memory = b"\1" + mutators.joined([_greeting({"authorization": "Bearer x"})])
    seeds = [
        b"\0",
        b"\0" + mutators.joined([hello]),
        b"\3" + mutators.joined([hello]),
        b"\2" + mutators.joined([hello]),
    ]
    seeds += [memory + mutators.joined([_request(name, message)]) for name, message in _placed()]
    requests = [_request(name, message) for name, message in grpc_targets.native_requests() if len(message) < 1000]
    seeds += [b"\0" + mutators.joined([hello, one]) for one in requests]
    seeds += [b"\0" + mutators.joined([hello, *requests[:3]]), b"\0" + mutators.joined([hello, requests[0][:9]])]
    large = _request("RunText", calls.text("RunText", "echo", "x" * 40_000, None).inline())
    return [*seeds, b"\0" + mutators.joined([hello, large]), b"\0" + mutators.joined([hello, large[:100], large[100:]])]


def _serve_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    pieces = mutators.pieces(data[1:])
    if not pieces or rng.random() < 0.04:
        return leaf(data)
    first = bytes([rng.randrange(4)]) if rng.random() < 0.05 else data[:1]
    if rng.random() < 0.07:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(pieces))
    at = rng.randrange(min(1, len(pieces) - 1), len(pieces))
    pieces[at] = _request_changed(pieces[at], rng, leaf) if at else _greeting_changed(pieces[at], rng, leaf)
    return first + mutators.joined(pieces)


def _greeting_changed(piece: bytes, rng: Random, leaf: Leaf) -> bytes:
    text = leaf(piece[HELLO.size :])
    return HELLO.pack(len(text) if rng.random() < 0.9 else rng.getrandbits(32)) + text


def _request_changed(piece: bytes, rng: Random, leaf: Leaf) -> bytes:
    if len(piece) < REQUEST.size or rng.random() < 0.08:
        return leaf(piece)
    _, seconds, repeatable, path_size = REQUEST.unpack_from(piece)
    path, message = piece[REQUEST.size :][:path_size], piece[REQUEST.size + path_size :]
    kind = rng.random()
    if kind < 0.1:
        path = leaf(path)[:255]
    elif kind < 0.2:
        seconds = rng.choice((*mutators.FLOATS[:5], float("nan"), float("inf"), -1.0))
    else:
        method = schemas.methods("server", "server.Server").get(path.split(b" ")[0].decode("ascii", "ignore")[15:])
        message = mutators.message(method.request, message, rng, leaf) if method else leaf(message)
    size = len(message) if rng.random() < 0.95 else rng.choice((0, 1, 40_000, 1 << 29, (1 << 32) - 1))
    seconds = seconds if abs(seconds) < 3e38 or seconds != seconds else float("inf")
    return REQUEST.pack(size, seconds, repeatable, len(path)) + path + message


# ---- from a server to a client


class _OneServer:
    """A server in a thread that accepts one client after the other, and sends what it is given."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sends: queue.SimpleQueue[tuple[list[int], bytes]] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(local_transport.address(port))
        self._socket.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            accepted, _ = self._socket.accept()
            with accepted:
                fds, data = self.sends.get()
                with suppress(OSError):
                    socket.send_fds(accepted, [data[: HELLO.size]], fds)
                    accepted.sendall(data[HELLO.size :])
                    accepted.shutdown(socket.SHUT_WR)
                    while accepted.recv(1 << 16):
                        pass
                for fd in fds:
                    os.close(fd)


@cache
def _one_server() -> _OneServer:
    return _OneServer(_PORT + 10_000_000)


class _Transport:
    """What a call must know of its client."""

    options = {"timeout": 5.0}
    model = "echo"
    metadata = ()
    locals = ()

    def __init__(self) -> None:
        self.stats = Stats()


def _questions() -> list[calls.Request]:
    made = [calls.text("RunText", "echo", "x", None), calls.image("RunImageToImage", "echo", grpc_targets.PIXELS, None)]
    made += [calls.value("Run", "echo", grpc_targets.VALUES[1], None), calls.text_batch("echo", ["a"], None, False)]
    return [*made, calls.ask("GetModelStates"), calls.ask("GetModelInfo", model="echo")]


def receive(data: bytes) -> None:
    """The first byte chooses the client's request, the second how many descriptors the server sends."""
    if len(data) < 2 + HELLO.size:
        return
    questions, server = _questions(), _one_server()
    question = questions[data[0] % len(questions)]
    fds = [unnamed_file() for _ in range(data[1] % 4)]
    for fd in fds:
        os.ftruncate(fd, _MEMORY)
    server.sends.put((fds, data[2:]))
    try:
        connection = LocalConnection(server.port, {})
    except OSError:
        return
    outcome: Future[Any] = Future()
    connections = LocalConnections(server.port, {})
    call = LocalCall(Call(_Transport(), question, 5.0, True, outcome), connections, connection)
    connections.busy.add(connection)
    try:
        if call.send():
            call.receive()
    except errors.ModelClientError as error:
        if not error.details() and error.code().name == "OK":
            raise Finding("an error without a reason") from error
    finally:
        connections.close()
        connection.close()


def _answer(body: bytes, code: int = 0, renewed: int = 0) -> bytes:
    return ANSWER.pack(len(body), code, renewed) + body


def response_seeds() -> Iterator[tuple[int, bytes]]:
    """(number of the request, message) of answers as the inline engine makes them."""
    for number, one in enumerate(_questions()):
        names = list(schemas.methods("server", "server.Server"))
        for answer in grpc_targets.call("native", names.index(one.method.name), one.inline(), {}):
            yield number, answer


def _receive_seeds() -> list[bytes]:
    name = b"127.0.0.1:50000"
    hello = HELLO.pack(len(name)) + name
    response = schemas.message("server", "server.Response")
    place = {"dtype": "uint8", "shape": [4], "place": {"offset": 64, "length": 4}}
    placed = response(data='{"$array": 0}', arrays=[place]).SerializeToString()
    seeds = [bytes([number, 2]) + hello + _answer(body) for number, body in response_seeds()]
    seeds += [b"\2\2" + hello + _answer(placed), b"\2\3" + hello + _answer(placed, renewed=1)]
    seeds += [bytes([0, 2]) + hello + _answer("wrong é".encode(), code) for code in (3, 5, 8 | FINAL, 13, 99)]
    return [*seeds, b"\0\0" + hello, b"\0\2" + hello, b"\0\2" + hello + _answer(b"")[:3]]


def _receive_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    kind, begin = rng.random(), 2 + HELLO.size
    if kind < 0.1 or len(data) < begin:
        return leaf(data)
    begin += HELLO.unpack_from(data, 2)[0]
    if len(data) < begin + ANSWER.size:
        return data[:2] + leaf(data[2:])
    size, code, renewed = ANSWER.unpack_from(data, begin)
    body = data[begin + ANSWER.size :]
    if kind < 0.25:
        code, renewed = rng.choice((0, 3, 5, 8, 14, 17, 200, FINAL)), rng.choice((0, 0, 1))
    else:
        questions = _questions()
        body = mutators.message(questions[data[0] % len(questions)].method.response, body, rng, leaf)
    size = len(body) if rng.random() < 0.95 else rng.getrandbits(20)
    return data[:begin] + ANSWER.pack(size, code, renewed) + body


# ---- from a server to a client, by gRPC


def decode(data: bytes) -> None:
    """The first byte chooses the client's request; the rest is the message that answers it."""
    questions = _questions()
    question = questions[data[0] % len(questions) if data else 0]
    try:
        response = schemas.parse_trailing(question.method.response, data[1:])
    except Exception:  # grpcio reports it as INTERNAL
        return
    with oracle.only(errors.ModelClientError):
        question.decode(*response)


def _decode_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    questions = _questions()
    number = data[0] % len(questions) if data else 0
    return bytes([number]) + mutators.message(questions[number].method.response, data[1:], rng, leaf)


def targets() -> Iterator[Target]:
    """Both ends of the local transport, and a client's answers by gRPC."""
    modules = ("server/local_server.py", "protocols/native.py", "shared_memory.py")
    yield Target("local_server", serve, _serve_seeds(), modules, _serve_mutated)
    client = ("client/local.py", "client/call.py", "client/calls.py", "local_transport.py", "shared_memory.py")
    yield Target("local_client", receive, _receive_seeds(), client, _receive_mutated)
    seeds = [bytes([number]) + body for number, body in response_seeds()]
    yield Target("client_answers", decode, seeds, ("client/calls.py", "codec.py", "schemas.py"), _decode_mutated)
