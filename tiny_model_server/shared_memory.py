"""Shared memory between processes of one host: unnamed files, which go with their last user.

Unnamed (memfd) on purpose: a process that is killed leaves nothing behind, and no other process can find it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import numpy as np

from tiny_model_server.codec import Array, dtype_name, dtype_of, raw

try:
    import fcntl
except ImportError:  # Windows, where the client works without shared memory
    fcntl = None  # type: ignore[assignment]

ALIGN = 64
_MAP_FIXED = 0x10
_SMALLEST = 1 << 16
_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_SEAL", 0)
"""No end may shrink what the other maps, or change that."""
_PUNCH_HOLE = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_MOST_AT_ONCE = 1 << 30  # bytes; Linux writes no more than 2 GiB in one call


Place = tuple[int, str, tuple[int, ...]]
"""Where an array lies in a segment: byte offset, dtype name, shape."""


def layout(arrays: Sequence[Array]) -> tuple[list[Place], int]:
    """Where arrays lie one after the other, and where the last ends."""
    places: list[Place] = []
    end = 0
    for array in arrays:
        begin = -(-end // ALIGN) * ALIGN
        places.append((begin, dtype_name(array.dtype), array.shape))
        end = begin + array.nbytes
    return places, end


class Segment:
    """One mapped file; whoever writes grows it, whoever reads maps more when a place lies beyond its mapping.

    Whoever makes one closes it.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Makes a new segment, or takes over the descriptor of one that came from another process."""
        self.fd = unnamed_file() if fd is None else fd
        self._map: mmap.mmap | None = None
        self._size = 0

    def write(self, arrays: Sequence[Array]) -> list[Place]:
        """Copies portable arrays in, one after the other from the start, over what was there before."""
        if not arrays:
            return []
        places, end = layout(arrays)
        mapped = self._mapped(end, grow=True)
        for (offset, *_), array in zip(places, arrays):
            mapped[offset : offset + array.nbytes] = raw(array)
        return places

    def read(self, places: Sequence[Place]) -> list[Array]:
        """Writable views of the arrays at these places; the next write overwrites them."""
        return [self._view(*place) for place in places]

    def _view(self, offset: int, name: str, shape: tuple[int, ...]) -> Array:
        dtype = dtype_of(name)
        count = math.prod(shape)
        if not count:  # nothing may be mapped yet, and an empty file cannot be
            return np.empty(shape, dtype)
        data = self._mapped(offset + count * dtype.itemsize, grow=False)
        return np.frombuffer(data, dtype, count, offset).reshape(shape)

    def _mapped(self, needed: int, *, grow: bool) -> mmap.mmap:
        if self._map is None or needed > self._size:
            if grow:
                size = max(_SMALLEST, needed + needed // 2)
                if os.fstat(self.fd).st_size < size:  # others may have made it larger
                    os.ftruncate(self.fd, size)
            else:
                size = min(os.fstat(self.fd).st_size, max(_SMALLEST, 2 * needed))
            self._unmap()
            self._map, self._size = mmap.mmap(self.fd, size), size
        return self._map

    def _unmap(self) -> None:
        found, self._map, self._size = self._map, None, 0
        if found is not None:
            with suppress(BufferError):  # somebody has a view of it: then the mapping ends with the view
                found.close()

    def bytes_at(self, offset: int, length: int) -> memoryview:
        """A view of these bytes; ValueError if they are not all there or are not aligned to 64."""
        check_place(self.fd, offset, length)
        try:
            return (
                memoryview(self._mapped(offset + length, grow=False))[offset:][:length] if length else memoryview(b"")
            )
        except (OSError, OverflowError) as error:
            raise ValueError(f"{length} bytes cannot be mapped: {error}") from None

    def array(self, size: int) -> Array:
        """The first so many bytes, zero in a new segment."""
        return np.frombuffer(self._mapped(size, grow=True), np.uint8, size)

    def detach(self) -> None:
        """Makes what is mapped here a copy of this process' own, under whoever looks at it; the next view maps anew."""
        whole = np.frombuffer(self._mapped(0, grow=False), np.uint8)
        call = ctypes.CDLL(None, use_errno=True).mmap
        call.restype, call.argtypes = (
            ctypes.c_void_p,
            [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
        )
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
        if call(whole.ctypes.data, whole.nbytes, protection, flags, self.fd, 0) != whole.ctypes.data:
            raise OSError(ctypes.get_errno(), "memory cannot be copied")
        whole[:: mmap.PAGESIZE] = whole[:: mmap.PAGESIZE].copy()  # a page is copied when it is written to
        self._map, self._size = None, 0

    def close(self) -> None:
        """Closes the descriptor and ends the mapping; views that somebody still has stay valid."""
        self._unmap()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class SharedBuffers:
    """The memory that a caller shares with the workers: one buffer for requests, one for responses.

    The front itself never maps it. It knows the two descriptors, and hands them to workers. The caller's connection, or
    the thread that answers the call, owns them; they are closed when the owner has closed them and no worker uses them
    any more. But for reading and writing, only the engine's loop may touch them.
    """

    _names = itertools.count()
    open_names: ClassVar[set[int]] = set()
    """Names of those that are not closed."""

    def __init__(self, request: int | None = None, response: int | None = None, *, caller_owned: bool = False) -> None:
        """Takes over the descriptors given, and makes new files for the others.

        ``caller_owned`` says that the request buffer is memory of the caller's own.
        """
        self.request = unnamed_file() if request is None else request
        try:
            self.response = unnamed_file() if response is None else response
        except OSError:
            os.close(self.request)
            raise
        self.caller_owned = caller_owned
        self.name = next(self._names)
        self.retained = False
        """Whether a model keeps what lies in the request buffer. It is the model's then, and is not written again."""
        self.holders = 1
        """The owner, and the workers that use them now."""
        self.closed = False
        self.open_names.add(self.name)

    def release(self) -> None:
        """A holder does not use them any more. The last one closes the descriptors."""
        self.holders -= 1
        if not self.holders:
            self._dispose()

    def close(self) -> None:
        """Ends the owner's hold."""
        if not self.closed:
            self.closed = True
            self.release()

    def renewed(self) -> SharedBuffers:
        """Buffers with a new file for requests, in the place of one that a model retains. OSError if there is none."""
        request = unnamed_file()
        try:
            return SharedBuffers(request, os.dup(self.response))
        except OSError:
            os.close(request)
            raise

    @property
    def size(self) -> int:
        """Bytes of both buffers."""
        return os.fstat(self.request).st_size + os.fstat(self.response).st_size

    def _dispose(self) -> None:
        self.open_names.discard(self.name)
        if not self.retained:  # workers may map it until they receive that it is closed
            discard(self.response)
            if not self.caller_owned:
                discard(self.request)
        os.close(self.request)
        os.close(self.response)


def read_arrays(fd: int, places: Sequence[Place]) -> list[Array]:
    """Copies of the arrays at these places of a file, without mapping it."""
    found = []
    for offset, name, shape in places:
        dtype = dtype_of(name)
        data = _read(fd, offset, math.prod(shape) * dtype.itemsize)
        found.append(np.frombuffer(data, dtype).reshape(shape) if data else np.empty(shape, dtype))
    return found


def write_arrays(fd: int, arrays: Sequence[Array]) -> list[Place]:
    """Copies portable arrays into a file, from its start, without mapping it."""
    places, end = layout(arrays)
    if os.fstat(fd).st_size < end:
        os.ftruncate(fd, end)
    for (offset, *_), array in zip(places, arrays):
        data, at = raw(array), 0
        while at < len(data):
            at += os.pwrite(fd, data[at : at + _MOST_AT_ONCE], offset + at)
    return places


def _read(fd: int, offset: int, length: int) -> bytes:
    parts, end = [], offset + length
    while offset < end and (part := os.pread(fd, min(end - offset, _MOST_AT_ONCE), offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_place(fd: int, offset: int, length: int) -> None:
    """ValueError if so many bytes at ``offset`` of this file are not there, or are not aligned to 64."""
    if offset < 0 or length < 0 or offset % ALIGN or offset + length > os.fstat(fd).st_size:
        raise ValueError(f"{length} bytes at {offset} do not lie in the shared memory, aligned to {ALIGN}")


def sealed(fd: int) -> bool:
    """True if nobody can shrink this memory; OSError if it is no memory at all."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) == _SEALS)


def discard(fd: int) -> None:
    """Gives the memory of a file back at once, whoever maps it still; where the system cannot, it goes later."""
    if punch := getattr(ctypes.CDLL(None), "fallocate", None):
        punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        punch(fd, _PUNCH_HOLE, 0, os.fstat(fd).st_size)


def unnamed_file() -> int:
    """The descriptor of a new file without a name, in memory where the system can; it cannot be made to shrink."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tiny_model_server", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
