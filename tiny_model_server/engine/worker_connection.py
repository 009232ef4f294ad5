"""Messages between the front and one slot of a worker, in turns: a stream socket with pickles, and descriptors."""

from __future__ import annotations

import array
import errno
import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_HEADER = struct.Struct("<III")  # _MARK, bytes of the pickle, number of descriptors
_MARK = 0x7E5A11ED  # by which is seen that a model has written into the socket
_READ = 1 << 16
_MOST_FDS = 200  # in one piece; Linux takes 253
_FLAGS = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))  # what a model starts gets none of them
_SPACE = socket.CMSG_SPACE(4 * _MOST_FDS)


class Incomplete(Exception):
    """A message has begun to come, and the rest is not there yet."""


class Pipe:
    """One end; both belong to this program."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._read = memoryview(bytearray(_READ))
        self._begun = bytearray()  # of a message that was Incomplete
        self._closing = threading.Lock()
        self.whole = True
        """False if an error came in the middle of a message: nothing more can be understood then."""

    def fileno(self) -> int:
        """The descriptor, to be polled."""
        return self._socket.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends a message, with copies of descriptors; OSError if the other end has gone."""
        data = pickle.dumps(message)
        header = _HEADER.pack(_MARK, len(data), len(fds))
        message = data if fds else header + data
        self.whole = False
        for first in range(0, len(fds), _MOST_FDS):
            socket.send_fds(self._socket, [b"\0" if first else header], fds[first : first + _MOST_FDS])
        self._socket.sendall(message)
        self.whole = True

    def receive(self, *, wait: bool = True) -> tuple[Any, list[int]]:
        """The next message and its descriptors; EOFError or OSError if the other end has gone, else UnpicklingError.

        Without ``wait``, where something is there and brings no descriptors: Incomplete if that is not all.
        """
        fds = array.array("i")
        self.whole = False
        data: memoryview | bytearray = self._begun or self._read[: self._receive(fds)]
        if len(data) < _HEADER.size:
            data = self._complete(data, _HEADER.size, fds, wait)
        mark, size, count = _HEADER.unpack_from(data)
        if mark != _MARK:
            raise pickle.UnpicklingError("that is no message")
        while len(fds) < count:
            self._receive(fds, 1)
        if len(data) < _HEADER.size + size:
            data = self._complete(data, _HEADER.size + size, fds, wait)
        self._begun = bytearray()
        self.whole = True
        return pickle.loads(memoryview(data)[_HEADER.size :]), fds.tolist()

    def _complete(self, data: memoryview | bytearray, size: int, fds: array.array[int], wait: bool) -> bytearray:
        self._begun = bytearray(data)
        if not wait:
            raise Incomplete
        while len(self._begun) < size:
            self._begun += self._read[: self._receive(fds, min(size - len(self._begun), _READ))]
        return self._begun

    def _receive(self, fds: array.array[int], most: int = _READ) -> int:
        size, ancillary, flags, _ = self._socket.recvmsg_into([self._read[:most]], _SPACE, _FLAGS)
        for _, _, content in ancillary:
            fds.frombytes(content)
        if flags & socket.MSG_CTRUNC:  # this process may open no more; what was lost does not come again
            raise OSError(errno.EMFILE, "descriptors that came with a message are lost")
        if not size:
            raise EOFError
        return size

    def shutdown(self) -> None:
        """Ends the conversation, from any thread: who waits at either end hears it."""
        with self._closing, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Lets the socket go; for the thread that sends and receives."""
        with self._closing:
            self._socket.close()
