"""Shared memory between the front and a worker: an unnamed, growing file that both map, gone with its last user.

Unnamed (memfd) on purpose: a process that is killed leaves nothing behind, and no other process can find it.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tiny_model_server.codec import Array, dtype_name, raw

_ALIGN = 64
_SMALLEST = 1 << 16


class Place(NamedTuple):
    """Where an array lies in a segment: byte offset, dtype name, shape."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class Segment:
    """One mapped file; whoever writes grows it, whoever reads maps more when a place lies beyond its mapping."""

    def __init__(self, fd: int | None = None) -> None:
        """Makes a new segment, or maps the one whose descriptor came from another process."""
        self.fd = _unnamed_file() if fd is None else fd
        self._map: mmap.mmap | None = None
        self._size = 0

    def write(self, arrays: Sequence[Array]) -> list[Place]:
        """Copies portable arrays in, one after the other from the start, over what was there before."""
        places, end = [], 0
        for array in arrays:
            places.append(Place(end, dtype_name(array.dtype), array.shape))
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        view = memoryview(self._mapped(end, grow=True))
        for place, array in zip(places, arrays, strict=True):
            view[place.offset : place.offset + array.nbytes] = raw(array)
        return places

    def read(self, places: Sequence[Place]) -> list[Array]:
        """Writable views of the arrays at these places; the next write overwrites them."""
        return [self._view(Place(*place)) for place in places]

    def _view(self, place: Place) -> Array:
        dtype = np.dtype(place.dtype)
        count = int(np.prod(place.shape, dtype=np.int64))
        data = self._mapped(place.offset + count * dtype.itemsize, grow=False)
        if not count * dtype.itemsize:
            return np.empty(place.shape, dtype)
        return np.frombuffer(data, dtype, count, place.offset).reshape(place.shape)

    def _mapped(self, needed: int, *, grow: bool) -> mmap.mmap:
        if self._map is None or needed > self._size:
            if grow:
                self._size = max(_SMALLEST, needed + needed // 2)
                os.ftruncate(self.fd, self._size)
            else:
                self._size = os.fstat(self.fd).st_size
            # The old mapping, if any, lives on as long as views of it do.
            self._map = mmap.mmap(self.fd, self._size)
        return self._map

    def close(self) -> None:
        """Lets the segment go; views of it stay valid."""
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tiny_model_server")
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
