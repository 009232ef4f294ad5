"""The client's end of the local transport: its connections, and arrays that are handed over without a copy."""

import json
import logging
import math
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server import local_transport
from tiny_model_server.client import fork_safety
from tiny_model_server.client.daemons import daemons
from tiny_model_server.codec import Array
from tiny_model_server.local_transport import ANSWER, AT_ONCE, BUFFER, HELLO, READY, REQUEST
from tiny_model_server.shared_memory import ALIGN, Segment, discard

log = logging.getLogger("tiny_model_server.client")

MOST_CALLS = 64
"""Calls at once of one client by the local transport; gRPC carries those beyond."""
_MOST_PREPARING = 8  # connections that are made at once for later calls
_PAUSE_S = 1.0  # between attempts to reach a server that has no local transport
_HANDSHAKE_S = 2.0


class Answer(NamedTuple):
    """What came of a call: the number of its status, and the message or the error's text."""

    code: int
    body: bytes


class LocalConnection:
    """A client's end of one connection, for one call at a time."""

    def __init__(self, port: int, metadata: dict[str, str], memory: "OwnMemory | None" = None) -> None:
        """Connects; OSError if there is no such server, or it is another user's.

        With ``memory``, that of a ``shared_array``, the connection is for calls with this array.
        """
        self.memory = memory
        self.generation = fork_safety.generation
        with ExitStack() as undo:
            self._socket = undo.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(_HANDSHAKE_S)
            self._socket.connect(local_transport.address(port))
            if not local_transport.same_user(self._socket):
                raise PermissionError("the server at this port is another user's")
            greeting = json.dumps(metadata).encode()
            socket.send_fds(self._socket, [HELLO.pack(len(greeting))], [memory.fd] if memory else [])
            self._socket.sendall(greeting)
            header, fds, *_ = socket.recv_fds(self._socket, HELLO.size, 2)
            segments = [Segment(fd) for fd in fds]
            for segment in segments:
                undo.callback(segment.close)
            if len(header) < HELLO.size or len(fds) != 2:
                raise ConnectionError("the server takes no more callers")
            self.request, self.response = segments
            self.server = local_transport.receive(self._socket, *HELLO.unpack(header)).decode(errors="replace")
            self._socket.settimeout(None)  # with a timeout, Python would poll before each operation
            undo.pop_all()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        if memory:
            memory.connections.append(self)

    def place(self, arrays: Sequence[Array]) -> list[int]:
        """Puts the arrays of the next call into the shared memory, unless they lie there; returns their places."""
        if self.memory:
            return [_offset(array) for array in arrays]
        return [offset for offset, *_ in self.request.write(arrays)]

    def send(self, path: bytes, message: bytes, timeout: float, repeatable: bool) -> None:
        """Sends a request, with the call's id in ``path``; TimeoutError, or OSError if the server has gone."""
        data = REQUEST.pack(len(message), timeout, repeatable, len(path)) + path + message
        if len(data) <= AT_ONCE:
            return self._socket.sendall(data)
        self._socket.settimeout(timeout)
        self._socket.sendall(data)
        self._socket.settimeout(None)

    def fileno(self) -> int:
        """The descriptor: readable when there is an answer, or when the server has disconnected."""
        return self._socket.fileno()

    def complete(self) -> bool:
        """True if ``receive`` would not wait, after something has come."""
        try:
            data = self._socket.recv(BUFFER, socket.MSG_PEEK)
        except OSError:
            return True
        if len(data) < ANSWER.size:
            return True
        size, _, renewed = ANSWER.unpack_from(data)
        return len(data) >= ANSWER.size + size and not renewed

    def answered(self) -> bool:
        """True if an answer, or an end, can be received without waiting."""
        return bool(self._poll.poll(0))

    def receive(self, timeout: float) -> Answer:
        """The answer to the request that was sent; TimeoutError, or OSError if the server disconnects."""
        if not self._poll.poll(timeout * 1000):
            raise TimeoutError
        data = self._socket.recv(BUFFER)
        if len(data) < ANSWER.size:
            raise ConnectionError("the server has disconnected")
        size, code, renewed = ANSWER.unpack_from(data)
        body, missing = data[ANSWER.size :], ANSWER.size + size - len(data)
        if missing > 0:
            self._socket.settimeout(timeout)
            body += local_transport.receive(self._socket, missing)
            self._socket.settimeout(None)
        if renewed:
            self._renew()
        return Answer(code, body)

    def _renew(self) -> None:
        """Takes a new request buffer, because a model has retained what lies in the old one."""
        self._socket.sendall(READY)
        _, fds, *_ = socket.recv_fds(self._socket, 1, 1)
        if not fds:
            raise ConnectionError("the server sent no memory")
        self.request.close()
        self.request = Segment(fds[0])

    def disconnect(self) -> None:
        """Ends the connection, from any thread; a call that waits fails. For a forked child, does nothing."""
        if self.generation == fork_safety.generation:
            with suppress(OSError):  # the other end closed first
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection, and closes it and its memory; for the thread that uses it."""
        self.disconnect()
        self._socket.close()
        self.request.close()
        self.response.close()


class LocalConnections:
    """The connections of one client to the server at one port; threads may share them."""

    def __init__(self, port: int, metadata: dict[str, str]) -> None:
        self.busy: set[LocalConnection] = set()
        """Those with a call under way."""
        self.idle: dict[OwnMemory | None, list[LocalConnection]] = {}
        """The others, by the ``shared_array`` that they are for."""
        self.closed = False
        self.not_before = 0.0
        """When the next attempt to connect may be made, by ``time.monotonic``."""
        self._port, self._metadata = port, metadata
        self._lock = threading.Lock()
        self._preparing = threading.Semaphore(_MOST_PREPARING)
        # An application may drop a client without closing it, as it may drop an open file.
        weakref.finalize(self, _close, self.idle)

    def give_up(self, why: str) -> None:
        """Leaves all further calls to gRPC."""
        log.warning("the local transport is not used any more: %s", why)
        self.not_before = math.inf

    def take(self, arrays: Sequence[Array], *, wait: bool = True) -> LocalConnection | None:
        """A connection for a call with these arrays; None if there is none.

        Without ``wait``, takes one that is open, or lets another thread connect for later calls.
        """
        memories = {_memory(array) for array in arrays}
        memory = memories.pop() if len(memories) == 1 else None
        with self._lock:
            for dropped in [one for one in self.idle if one and one.fd < 0]:
                del self.idle[dropped]
            if len(self.busy) >= MOST_CALLS or self.not_before == math.inf:
                return None
            if idle := self.idle.get(memory):
                self.busy.add(idle[-1])
                return idle.pop()
        if time.monotonic() < self.not_before:
            return None
        if wait:
            return self._connect(memory)
        if self._preparing.acquire(blocking=False):
            done = daemons(fork_safety.generation).submit(partial(self._prepare, memory))
            done.add_done_callback(lambda _: self._preparing.release())
        return None

    def _connect(self, memory: "OwnMemory | None") -> LocalConnection | None:
        try:
            connection = LocalConnection(self._port, self._metadata, memory)
        except OSError:
            self.not_before = max(self.not_before, time.monotonic() + _PAUSE_S)
            return None
        with self._lock:
            self.busy.add(connection)
        return connection

    def _prepare(self, memory: "OwnMemory | None") -> None:
        if connection := self._connect(memory):
            self.give_back(connection, usable=True)

    def give_back(self, connection: LocalConnection, *, usable: bool) -> None:
        """Takes a connection back after its call. Closes it if it failed, or if the call was abandoned."""
        memory = connection.memory
        with self._lock:
            known = connection in self.busy
            self.busy.discard(connection)
            if usable and known and not (memory and memory.fd < 0):
                self.idle.setdefault(memory, []).append(connection)
                return
        connection.close()

    def close(self, *, calls: bool = True) -> None:
        """Closes all connections. Calls in them fail, or without ``calls``, may end first."""
        with self._lock:
            busy, self.busy, self.closed = self.busy, set(), True
            _close(self.idle)
        for connection in busy if calls else ():  # the thread that waits for the answer closes it
            connection.disconnect()


def _close(idle: dict["OwnMemory | None", list[LocalConnection]]) -> None:
    while idle:
        for connection in idle.popitem()[1]:
            connection.close()


def shared_array(shape: int | Sequence[int], dtype: Any = np.uint8) -> Array:
    """A new array of zeros that calls to a server on this host hand over without a copy.

    Fill it in place, as ``capture.read(frame)`` of OpenCV does, and not while a call with it is under way. Elsewhere it
    is an array as others are.
    """
    made = np.empty(shape, dtype)  # checks both; untouched memory costs nothing
    if not local_transport.available() or not made.nbytes:
        return np.zeros(shape, dtype)
    memory = OwnMemory()
    whole = memory.array(made.nbytes)
    _shared[id(whole)] = memory
    # The array is the application's, and its memory lives as long as any array's does.
    weakref.finalize(whole, lambda name: _shared.pop(name).forget(), id(whole)).atexit = False
    return whole.view(made.dtype).reshape(made.shape)


class OwnMemory(Segment):
    """The memory of one ``shared_array``, and the connections that were made for it."""

    def __init__(self) -> None:
        super().__init__()
        self.connections: list[LocalConnection] = []
        self._process = os.getpid()

    def forget(self) -> None:
        """Gives the memory back, also where a worker maps it still, and ends the connections.

        In a forked child, both go on for the parent.
        """
        if self._process == os.getpid():
            discard(self.fd)
        self.close()
        for connection in self.connections:
            connection.close()


_shared: dict[int, OwnMemory] = {}
"""The memory of each ``shared_array`` that is still used, by the id of the array of bytes that is the base of all."""


def _memory(array: Array) -> OwnMemory | None:
    """The shared memory in which an array lies, aligned; None if it lies elsewhere."""
    memory = _shared.get(id(array.base))
    return None if memory is None or _offset(array) % ALIGN else memory


def _offset(array: Array) -> int:
    """Where a part of a ``shared_array`` begins in its memory."""
    base: Any = array.base
    return int(array.__array_interface__["data"][0] - base.__array_interface__["data"][0])
