"""What a worker sends to the front, whose model may write into any of its descriptors: messages, facts, and lines.

The content of a message is a pickle, which can name any function. So what is given here is the text of Python's
literals, of which a pickle is made, and the bytes around it. Random pickles would do random things to this machine.
"""

import ast
import asyncio
import os
import pickle
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from random import Random
from typing import Any

from tests.fuzzing import engine as engines
from tests.fuzzing import mutators
from tests.fuzzing.mutators import Leaf
from tests.fuzzing.oracle import Finding, Target
from tiny_model_server import logs
from tiny_model_server.codec import ARRAY, Encoded
from tiny_model_server.engine.batcher import Item, Stream
from tiny_model_server.engine.worker_connection import _HEADER, _MARK, WorkerConnection
from tiny_model_server.engine.worker_output import WorkerOutput
from tiny_model_server.engine.worker_process import Misplaced, Plugin, WorkerProcess
from tiny_model_server.engine.worker_slot import WorkerSlot
from tiny_model_server.errors import ModelUnavailable, ServerError
from tiny_model_server.settings import ModelOptions
from tiny_model_server.shared_memory import SharedBuffers

_TURNS = 6


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(bytes on the wire, descriptors beside them) of each piece: its first byte says how it is framed."""
    for piece in mutators.pieces(data):
        kind, content = piece[:1], piece[1:]
        if kind == b"r":
            yield content, 0
            continue
        try:
            message = pickle.dumps(ast.literal_eval(content.decode(errors="replace").strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if kind == b"f":  # in a file
            yield _HEADER.pack(_MARK, len(message), 1, True) + message, 1
        elif kind == b"c":  # cut off
            yield (_HEADER.pack(_MARK, len(message), 0, False) + message)[:-3], 0
        else:
            yield _HEADER.pack(_MARK, len(message), 0, False) + message, 0


def _send(ours: socket.socket, frame: bytes, count: int) -> None:
    with suppress(OSError):
        if not count:
            ours.sendall(frame)
            return
        fd = os.memfd_create("message")
        os.write(fd, frame[_HEADER.size :])
        socket.send_fds(ours, [frame[: _HEADER.size]], [fd])
        os.close(fd)


# ---- outcomes


def outcomes(data: bytes) -> None:
    """The first byte says what the batch is; the rest are the messages with which a worker answers it."""
    if data:
        _loop().run_until_complete(_answered(data[0], data[1:]))


async def _answered(kind: int, data: bytes) -> None:
    model = engines.engine().model("echo")
    killed: list[int] = []
    slot = WorkerSlot("echo", ModelOptions(), model.batcher, model.metrics, lambda: killed.append(1))
    buffers = SharedBuffers() if kind % 3 == 1 else None
    stream = Stream(1.0) if kind % 3 == 2 else None
    items = [Item(Encoded(ARRAY, []), "", 0, None, lambda item: None) for _ in range(1 if buffers or stream else 2)]
    items[0].response, items[0].stream = buffers, stream
    slot.start(items)
    for frame, count in _frames(data):
        _send(slot.theirs, frame, count)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
    with suppress(OSError):
        slot.theirs.close()
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    left = slot.end()
    model.batcher.remove(slot)
    if buffers:
        buffers.close()
    for item in items:
        _check_outcome(item, left, killed)


def _check_outcome(item: Item, left: list[Item], killed: list[int]) -> None:
    if item.outcome is None:
        if item not in left or not killed:
            raise Finding("an item has no outcome, and its worker goes on")
    elif not isinstance(item.outcome, (Encoded, ServerError)):
        raise Finding(f"an outcome is {type(item.outcome).__name__}")
    elif isinstance(item.outcome, Encoded) and not isinstance(item.outcome.text, str):
        raise Finding(f"the text of an outcome is {type(item.outcome.text).__name__}")


_OUTCOMES = [
    (0, "([(None, '1', []), (None, '\"x\"', [])], 0.5, set(), [])"),
    (0, "([(None, '{\"$array\": 0}', [(0, 'uint8', (4, 2))]), ('INVALID_ARGUMENT', 'wrong', [])], 0.1, {1}, [])"),
    (0, "([(None, '1', [])], 0.5, set(), [])"),
    (1, "([(None, '{\"$array\": 0}', [(64, '<U3', (2,))])], 0.5, {0}, [])"),
    (2, "(None, '{\"a\": 1}', [])"),
    (2, "([], 0.5, set(), [('counter', 'name', 'doc', {}, 1.0)])"),
]


def _outcome_seeds() -> list[bytes]:
    seeds = [bytes([kind]) + mutators.joined([b"m" + text.encode()]) for kind, text in _OUTCOMES]
    seeds += [bytes([kind]) + mutators.joined([b"f" + text.encode()]) for kind, text in _OUTCOMES[:2]]
    value, end = (b"m" + _OUTCOMES[at][1].encode() for at in (4, 5))
    seeds += [b"\2" + mutators.joined([value, value, end]), b"\0" + mutators.joined([b"r" + bytes(20), value])]
    header = _HEADER.pack(_MARK, 1 << 40, 3, True)
    return [
        *seeds,
        b"\1" + mutators.joined([b"c" + _OUTCOMES[3][1].encode()]),
        b"\0" + mutators.joined([b"r" + header]),
    ]


def _mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    """Changes one message: the tree of literals in it, its framing, or its bytes."""
    pieces = mutators.pieces(data[1:])
    if not pieces or rng.random() < 0.03:
        return bytes([rng.randrange(3)]) + data[1:]
    at = rng.randrange(len(pieces))
    kind, content = pieces[at][:1], pieces[at][1:]
    if rng.random() < 0.08:
        pieces.insert(at, pieces[at])
    elif rng.random() < 0.08:
        pieces[at] = rng.choice((b"m", b"f", b"c", b"r")) + content
    elif kind == b"r" or rng.random() < 0.1:
        pieces[at] = kind + leaf(content)
    else:
        pieces[at] = kind + _literal(content, rng, leaf)
    return data[:1] + mutators.joined(pieces)


def _literal(content: bytes, rng: Random, leaf: Leaf) -> bytes:
    try:
        value = ast.literal_eval(content.decode())
        return repr(mutators.tree(value, rng, leaf)).encode()
    except Exception:  # it is no literal any more, or cannot be one
        return leaf(content)


# ---- what it declares


def facts(data: bytes) -> None:
    """The messages of a worker while it loads its model."""
    _loop().run_until_complete(_load(data[1:]))


async def _load(data: bytes) -> None:
    engine = engines.engine()
    plugin = Plugin("echo", engines.FOLDER / "echo", {"load_timeout_s": 0.05})
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = WorkerProcess.__new__(WorkerProcess)  # without a process
    process._plugin, process._settings, process._index, process._control = (
        plugin,
        engine.settings,
        0,
        WorkerConnection(ours),
    )
    process._placement, process._loop = process._place(ModelOptions()), asyncio.get_running_loop()
    process.ended = process._loop.create_future()
    process.ended.set_result("exited with code 1")
    reader, writer = os.pipe()
    process._output = WorkerOutput(reader, {"model": "echo"}, plugin.lines)
    try:
        for frame, count in _frames(data):
            _send(theirs, frame, count)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(ModelUnavailable, Misplaced):
            await process.load()
    finally:
        os.close(writer)
        process._output.close()
        process._control.close()
        theirs.close()


_DECLARED: dict[str, Any] = {
    "options": {"max_batch_size": 1, "timeout_s": 60.0, "queue_size": 8, "devices": "auto", "workers": None},
    "stages": [],
    "is_async": False,
    "metadata": {"inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 2]}]},
    "schema": {},
    "example": None,
    "pid": 5,
}


def _fact_seeds() -> list[bytes]:
    ready = repr(("ready", [4, 4])).encode()
    seeds = [
        [repr(("declared", _DECLARED | more)).encode(), ready] for more in ({}, {"stages": ["rows"]}, {"example": 1})
    ]
    seeds += [[repr(("failed", "no")).encode()], [repr(("declared", {})).encode()], [ready], [b"1"]]
    return [b"\0" + mutators.joined([b"m" + one for one in every]) for every in seeds]


# ---- what it prints


def lines(data: bytes) -> None:
    """What a model prints, in pieces as they are read."""
    _loop().run_until_complete(_printed(data))


async def _printed(data: bytes) -> None:
    reader, writer = os.pipe()
    kept: deque[str] = deque(maxlen=200)
    output = WorkerOutput(reader, {"model": "echo", "worker": 0}, kept)
    data = data.replace(b"MARK", output.mark.encode())
    for piece in mutators.pieces(data):
        os.write(writer, piece[:60_000])
        while piece:
            output._next.cancel()
            output._turn()
            piece = piece[1 << 11 :]
    os.close(writer)
    output.close()
    for line in kept:
        if "\n" in line or not line:
            raise Finding(f"a line of the log is {line!r:.200}")


_LINES = [
    b"hello\nworld\n",
    b"50%\r100%\n",
    b"MARK2026 INFO models.x: hi\n",
    b"printed MARKrecord\n\xff\xfe\n",
    b"no end",
]


class _Nowhere:
    """Takes what would be written to standard error."""

    def write(self, text: str, patience_ms: float | None = 0) -> None:
        text.encode()


def targets() -> Iterator[Target]:
    """What a worker may send."""
    logs.output.write = _Nowhere().write  # type: ignore[method-assign]
    reports = ("tiny_model_server.worker_slot",)
    modules = ("engine/worker_slot.py", "engine/worker_connection.py", "errors.py")
    yield Target("worker_outcomes", outcomes, _outcome_seeds(), modules, _mutated, reports)
    modules = ("engine/worker_process.py", "engine/worker_connection.py", "settings.py")
    yield Target("worker_facts", facts, _fact_seeds(), modules, _mutated)
    seeds = [mutators.joined([one]) for one in _LINES] + [mutators.joined([b"x" * 20_000, *_LINES])]
    yield Target("worker_lines", lines, seeds, ("engine/worker_output.py", "logs.py"))
