"""Messages between the front and a worker: a stream socket with small pickles, and descriptors beside them.

The ends take turns, except that the front may say that a batch is not wanted any more. A message is small: a long one
is handed over as the descriptor of a file in memory. So neither end ever waits for room in the socket, and the front
never waits at all.
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

from tiny_model_server.shared_memory import unnamed_file

_HEADER = struct.Struct("<IQIB")  # _MARK, bytes of the pickle, number of descriptors, whether the pickle is in a file
_MARK = 0x7E5A11ED  # a model that writes into the socket does not know it
_READ = 1 << 16
_LONG = 1 << 14  # bytes of a pickle that goes into a file
_MOST_FDS = 250  # that are sent at once; Linux takes 253
_LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.ETOOMANYREFS}
_FLAGS = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))  # programs that a model starts inherit no descriptor
_CUT_OFF = int(socket.MSG_CTRUNC)
_SPACE = socket.CMSG_SPACE(4 * _MOST_FDS)


class WorkerConnection:
    """One end. With a non-blocking socket, ``receive`` returns None until a message is complete."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._received = b""
        self._fds: list[int] = []

    def pending(self) -> bool:
        """Whether a message was read together with the one before it: the socket does not announce it any more."""
        return bool(self._received)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends a message with copies of descriptors.

        OSError if the other end is closed, or if this process lacks descriptors or memory. Nothing was sent then.
        """
        data = pickle.dumps(message)
        if len(data) <= _LONG:
            header = _HEADER.pack(_MARK, len(data), len(fds), False)
            return self._send(header + data, fds)
        file = unnamed_file()
        try:
            with open(file, "wb", closefd=False) as writable:
                writable.write(data)
            self._send(_HEADER.pack(_MARK, len(data), len(fds) + 1, True), [*fds, file])
        finally:
            os.close(file)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        rest = fds
        try:
            while len(rest) > _MOST_FDS:  # the first ones go beside a byte each time
                socket.send_fds(self.socket, [data[:1]], rest[:_MOST_FDS])
                data, rest = data[1:], rest[_MOST_FDS:]
            sent = socket.send_fds(self.socket, [data], rest) if rest else self.socket.send(data)
        except OSError as error:
            if len(rest) == len(fds):
                raise
            raise ConnectionError("the message was sent in part") from error
        if sent < len(data):
            raise ConnectionError("the other end does not read")

    def receive(self) -> tuple[Any, list[int]] | None:
        """Returns the next message and its descriptors.

        EOFError or OSError if the other end is closed, UnpicklingError if it sent something else.
        """
        while not self._received or (message := self._complete()) is None:
            try:
                data = self._read()
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            self._received += data
        return message

    def _read(self) -> bytes:
        data, ancillary, flags, _ = self.socket.recvmsg(_READ, _SPACE, _FLAGS)
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        self._fds += fds
        if flags & _CUT_OFF:
            raise OSError(errno.EMFILE, "this process has no descriptor free")
        return data

    def _complete(self) -> tuple[Any, list[int]] | None:
        if len(self._received) < _HEADER.size:
            return None
        mark, size, count, in_file = _HEADER.unpack_from(self._received)
        if mark != _MARK:
            raise pickle.UnpicklingError("not a message of this server")
        end = _HEADER.size + (0 if in_file else size)
        if len(self._received) < end or len(self._fds) < count:
            return None
        data, self._received = self._received[_HEADER.size : end], self._received[end:]
        fds, self._fds = self._fds[:count], self._fds[count:]
        if in_file:
            with open(fds.pop(), "rb") as file:
                file.seek(0)
                data = file.read(size)
        return pickle.loads(data), fds

    def close(self) -> None:
        """Closes the socket, and descriptors that came and were not taken."""
        self.socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def lacks(error: BaseException, *also: int) -> bool:
    """Whether the server itself lacks descriptors, memory or processes: nobody's fault, to be tried again."""
    if isinstance(error, OSError):
        return error.errno in _LACKS or error.errno in also
    return isinstance(error, MemoryError)
