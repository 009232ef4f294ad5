"""Shared memory between the front and a worker: an unnamed, growing file that both map, gone with its last user.

Unnamed (memfd) on purpose: a process that is killed leaves nothing behind, and no other process can find it.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import math
import mmap
import os
import socket
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np

from tiny_model_server.codec import Array, dtype_name, dtype_of, raw

ALIGN = 64
_MAP_FIXED = 0x10
_SMALLEST = 1 << 16
_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_SEAL", 0)
"""No end may shrink what the other maps, or change that."""


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
    """One mapped file; whoever writes grows it, whoever reads maps more when a place lies beyond its mapping."""

    def __init__(self, fd: int | None = None) -> None:
        """Makes a new segment, or maps the one whose descriptor came from another process."""
        self.fd = _unnamed_file() if fd is None else fd
        self.used = math.inf
        """How many bytes of it ``bytes_at`` may look at."""
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
        data = self._mapped(offset + count * dtype.itemsize, grow=False)
        if not count * dtype.itemsize:
            return np.empty(shape, dtype)
        return np.frombuffer(data, dtype, count, offset).reshape(shape)

    def _mapped(self, needed: int, *, grow: bool) -> mmap.mmap:
        if self._map is None or needed > self._size:
            if grow:
                self._size = max(_SMALLEST, needed + needed // 2)
                if os.fstat(self.fd).st_size < self._size:  # others may have made it larger
                    os.ftruncate(self.fd, self._size)
            else:
                self._size = min(os.fstat(self.fd).st_size, max(_SMALLEST, 2 * needed))
            # The old mapping, if any, lives on as long as views of it do.
            self._map = mmap.mmap(self.fd, self._size)
        return self._map

    def bytes_at(self, offset: int, length: int) -> memoryview:
        """A view of these bytes; ValueError if they are not all there or are not aligned to 64."""
        end = offset + length
        there = min(self.used, self._size if end <= self._size else os.fstat(self.fd).st_size)
        if offset < 0 or length < 0 or offset % ALIGN or end > there:
            raise ValueError(f"{length} bytes at {offset} do not lie in the shared memory, aligned to {ALIGN}")
        try:
            return memoryview(self._mapped(end, grow=False))[offset:end] if length else memoryview(b"")
        except (OSError, OverflowError) as error:
            raise ValueError(f"{length} bytes cannot be mapped: {error}") from None

    def sealed(self) -> bool:
        """True if nobody can shrink it; OSError if it is no memory at all."""
        return bool(fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) == _SEALS)

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

    def discard(self) -> None:
        """Gives all memory back at once, whoever maps it still."""
        if hasattr(mmap, "MADV_REMOVE") and (size := os.fstat(self.fd).st_size):
            mmap.mmap(self.fd, size).madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Lets the segment go; views of it stay valid."""
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class Pair:
    """Memory that a caller on this host shares with server and workers: what it sends, and what it gets."""

    _numbers = itertools.count()
    alive: weakref.WeakValueDictionary[int, Pair] = weakref.WeakValueDictionary()

    def __init__(
        self,
        caller: socket.socket,
        inbox: Segment | None = None,
        outbox: Segment | None = None,
        *,
        lent: bool = False,
    ) -> None:
        """New segments, where none are given; ``lent`` says that the inbox is the caller's own."""
        self.caller = caller
        """A duplicate of the socket to the caller, closed with this."""
        self.kept = True  # as long as not all is here
        self.inbox, self.outbox = inbox or Segment(), outbox or Segment()
        self.lent = lent
        self.name = next(self._numbers)
        self.kept = False
        """Set when a model keeps what lies in the inbox: it is the model's own then, and not to be written again."""
        self.alive[self.name] = self

    def room(self, size: int) -> Array:
        """So many bytes of the inbox, which are all that places may lie in."""
        self.inbox.used = size
        return self.inbox.array(size)

    def __del__(self) -> None:
        self.caller.close()


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tiny_model_server", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
