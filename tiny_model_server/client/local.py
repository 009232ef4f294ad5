"""The client's end of the local transport."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server.codec import Array
from tiny_model_server.local_transport import (
    ANSWER,
    AT_ONCE,
    BUFFER,
    HELLO,
    LOOPBACK,
    READY,
    REQUEST,
    address,
    available,
    receive,
    same_user,
)
from tiny_model_server.shared_memory import ALIGN, Segment

log = logging.getLogger("tiny_model_server.client")

THREADS = 8
"""Calls of one client that futures wait for at once; gRPC takes what is more."""
_PAUSE_S = 1.0  # between attempts to reach a server that has no short cut
_HANDSHAKE_S = 2.0


class Answer(NamedTuple):
    """What came of a call: gRPC's number of its status, the message or the error's text, the arrays' memory."""

    code: int
    body: bytes
    outbox: Segment


class LocalConnection:
    """A client's end of one connection, for one call at a time."""

    def __init__(self, port: int, metadata: dict[str, str], lent: _OwnMemory | None = None) -> None:
        """Connects; OSError if there is no such server, or it is another user's.

        With ``lent``, the calls are those of one ``shared_array``, which lies there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        undo = [self._socket.close]
        try:
            self._socket.settimeout(_HANDSHAKE_S)
            self._socket.connect(address(port))
            if not same_user(self._socket):
                raise PermissionError("the server at this port is another user's")
            told = json.dumps(metadata).encode()
            socket.send_fds(self._socket, [HELLO.pack(len(told))], [lent.fd] if lent else [])
            self._socket.sendall(told)
            header, fds, *_ = socket.recv_fds(self._socket, HELLO.size, 2)
            segments = [Segment(fd) for fd in fds]
            undo += [segment.close for segment in segments]
            if len(header) < HELLO.size or len(fds) != 2:
                raise ConnectionError("the server takes no more callers")
            self.inbox, self.outbox = segments
            self.server = receive(self._socket, *HELLO.unpack(header)).decode()
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            self._socket.settimeout(None)  # with one, Python would poll before everything it does
        except BaseException:
            for close in undo:
                close()
            raise
        self.lent = lent
        if lent:
            lent.connections.append(self)

    def place(self, arrays: Sequence[Array]) -> list[int]:
        """Where the arrays of the next call lie in the shared memory, after they were put there if need be."""
        if self.lent:
            return [_offset(array) for array in arrays]
        return [offset for offset, *_ in self.inbox.write(arrays)]

    def send(self, path: bytes, message: bytes, timeout: float, repeatable: bool) -> None:
        """Sends a request; TimeoutError, or OSError if the server has gone."""
        data = REQUEST.pack(len(message), timeout, repeatable, len(path)) + path + message
        if len(data) <= AT_ONCE:
            return self._socket.sendall(data)
        self._socket.settimeout(timeout)
        self._socket.sendall(data)
        self._socket.settimeout(None)

    def fileno(self) -> int:
        """The descriptor, which can be read from when there is an answer, or an end."""
        return self._socket.fileno()

    def whole(self) -> bool:
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
        """True if there is an answer, or an end, to be received without waiting."""
        return bool(self._poll.poll(0))

    def receive(self, timeout: float) -> Answer:
        """The answer to the request that was sent; TimeoutError, or OSError if the server goes away."""
        if not self._poll.poll(timeout * 1000):
            raise TimeoutError
        data = self._socket.recv(BUFFER)
        if len(data) < ANSWER.size:
            raise ConnectionError("the server has gone")
        size, code, renewed = ANSWER.unpack_from(data)
        body, missing = data[ANSWER.size :], ANSWER.size + size - len(data)
        if missing > 0:
            self._socket.settimeout(timeout)
            body += receive(self._socket, missing)
            self._socket.settimeout(None)
        if renewed:
            self._socket.sendall(READY)
            _, fds, *_ = socket.recv_fds(self._socket, 1, 1)
            if not fds:
                raise ConnectionError("the server sent no memory")
            old, self.inbox = self.inbox, Segment(fds[0])
            old.close()
        return Answer(code, body, self.outbox)

    def hang_up(self) -> None:
        """Ends the connection, from any thread; a call that waits fails."""
        with suppress(OSError):  # the other end closed first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection and its memory; for the thread that uses it."""
        self._socket.close()
        self.inbox.close()
        self.outbox.close()


class LocalConnections:
    """The connections of one client to the server at one port; threads may share them."""

    def __init__(self, port: int, metadata: dict[str, str]) -> None:
        self._port = port
        self._metadata = metadata
        self._lock = threading.Lock()
        self._free: list[LocalConnection] = []
        self._lent: dict[_OwnMemory, LocalConnection] = {}
        self._taken: set[LocalConnection] = set()
        self._not_before = 0.0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = self._jobs_begun = 0
        self._process = os.getpid()

    def begin(self, job: Callable[[], None]) -> bool:
        """Does a job in a thread of ours, False if all are busy. They are daemons: no exit waits for them."""
        with self._lock:
            if self._jobs_begun == THREADS:
                return False
            self._jobs_begun += 1
            if self._threads < self._jobs_begun:
                self._threads += 1
                threading.Thread(target=self._work, name="lane", daemon=True).start()
        self._jobs.put(job)
        return True

    def _work(self) -> None:
        while True:
            self._jobs.get()()
            with self._lock:
                self._jobs_begun -= 1

    def give_up(self, why: str) -> None:
        """Leaves all further calls to gRPC."""
        log.warning("no short cut to the server on this host any more: %s", why)
        self._not_before = math.inf

    def take(self, arrays: Sequence[Array], *, connect: bool = True) -> LocalConnection | None:
        """A connection for a call with these arrays; None if the server has no short cut for us, or no more of them.

        Without ``connect``, which may take its time, only one that is there.
        """
        memories = {_memory(array) for array in arrays}
        lent = memories.pop() if len(memories) == 1 else None
        self._forget_arrays()
        with self._lock:
            lane = self._lent.pop(lent, None) if lent else self._free.pop() if self._free else None
            if lane and self._not_before < math.inf:
                self._taken.add(lane)
                return lane
            if not connect or time.monotonic() < self._not_before:
                return None
        try:
            lane = LocalConnection(self._port, self._metadata, lent)
        except OSError:
            self._not_before = max(self._not_before, time.monotonic() + _PAUSE_S)
            return None
        with self._lock:
            self._taken.add(lane)
        return lane

    @property
    def busy(self) -> int:
        """How many connections are in use."""
        return len(self._taken)

    def prepare(self, arrays: Sequence[Array]) -> None:
        """Has a connection made for later calls with such arrays, in a thread of ours."""

        def connect() -> None:
            if lane := self.take(arrays):
                self.give_back(lane, usable=True)

        if time.monotonic() >= self._not_before:
            self.begin(connect)

    def give_back(self, lane: LocalConnection, *, usable: bool) -> None:
        """Takes a connection back after its call; one that broke or was left in the middle is closed."""
        with self._lock:
            known = lane in self._taken
            self._taken.discard(lane)
            if usable and known and not lane.lent:
                self._free.append(lane)
                return
            if usable and known and lane.lent and lane.lent.fd >= 0 and lane.lent not in self._lent:
                self._lent[lane.lent] = lane
                return
        lane.hang_up()
        lane.close()

    def _forget_arrays(self) -> None:
        """Drops the closed connections of arrays that the application has dropped."""
        if self._lent:
            with self._lock:
                self._lent = {memory: lane for memory, lane in self._lent.items() if memory.fd >= 0}

    def close(self, *, calls: bool = True) -> None:
        """Closes all connections; calls in them fail or, without ``calls``, may end before.

        In a forked child, connections go on for the parent.
        """
        ours = self._process == os.getpid()
        with self._lock:
            idle, taken = [*self._free, *self._lent.values()], self._taken
            self._free, self._taken, self._lent = [], set(), {}
        for lane in taken if ours and calls else ():  # to be closed by who waits for the answer
            lane.hang_up()
        for lane in idle:
            if ours:
                lane.hang_up()
            lane.close()


def shared_array(shape: int | Sequence[int], dtype: Any = np.uint8) -> Array:
    """A new array of zeros that calls to a server on this host hand over without a copy.

    Fill it in place, as ``capture.read(frame)`` of OpenCV does, and not while a call with it is under way. Elsewhere it
    is an array as others are.
    """
    made = np.empty(shape, dtype)  # checks both; the system gives no memory to what is not written
    if not available() or not made.nbytes:
        return np.zeros(shape, dtype)
    memory = _OwnMemory()
    whole = memory.array(made.nbytes)
    _shared[id(whole)] = memory
    # The array is the application's, and its memory lives as long as any array's does.
    weakref.finalize(whole, lambda name: _shared.pop(name).forget(), id(whole)).atexit = False
    return whole.view(made.dtype).reshape(made.shape)


class _OwnMemory(Segment):
    """The memory of one ``shared_array``, and the connections that were made for it."""

    def __init__(self) -> None:
        super().__init__()
        self.connections: list[LocalConnection] = []
        self._process = os.getpid()

    def forget(self) -> None:
        """Gives the memory back, also where a worker maps it still, and ends the connections.

        In a forked child, both go on for the parent.
        """
        ours = self._process == os.getpid()
        if ours:
            self.discard()
        self.close()
        for connection in self.connections:
            if ours:
                connection.hang_up()
            connection.close()


_shared: dict[int, _OwnMemory] = {}
"""The memory of each ``shared_array`` that is still used, by the id of the array of bytes that is the base of all."""


def _memory(array: Array) -> _OwnMemory | None:
    """The shared memory in which an array lies, aligned; None if it lies elsewhere."""
    memory = _shared.get(id(array.base))
    return None if memory is None or _offset(array) % ALIGN else memory


def _offset(array: Array) -> int:
    """Where a part of a ``shared_array`` begins in its memory."""
    base: Any = array.base
    return int(array.__array_interface__["data"][0] - base.__array_interface__["data"][0])


def port_of(addresses: Sequence[str]) -> int | None:
    """The port, if these addresses are one server on this host."""
    host, _, port = addresses[0].rpartition(":")
    return int(port) if len(addresses) == 1 and host in LOOPBACK and port.isdigit() else None
