"""Calls in pieces (``InPieces`` of server.proto), whose arrays are copied while they travel; for both ends."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiny_model_server import codec, wire
from tiny_model_server.codec import Array
from tiny_model_server.errors import InvalidInput, Overloaded
from tiny_model_server.shm import ALIGN, layout

LARGE = 2 << 20
"""Bytes of arrays for which pieces are faster than one message."""
_PIECE = 1 << 20


def cut(
    kind: Any, arrays: Sequence[Array], *, whole: bool = False, largest: float = math.inf, **first: Any
) -> Iterator[Any]:
    """The pieces of a message that has told where the arrays lie, by ``shm.layout``; what the ``first`` has beside.

    With ``whole`` there is one piece, which needs the arrays no more. Overloaded if more than ``largest`` bytes follow.
    """
    _, size = layout(arrays)
    _check(size, largest)
    if whole:
        joined = b"".join(codec.raw(array).tobytes() + bytes(-array.nbytes % ALIGN) for array in arrays)
        yield kind(size=size, data=joined[:size], **first)
        return
    piece, at = kind(size=size, **first), 0
    if not size:
        yield piece
    for array in arrays:
        data = codec.raw(array)
        if at % ALIGN:
            yield kind(data=bytes(-at % ALIGN))
            at += -at % ALIGN
        for begin in range(0, len(data), _PIECE):
            yield wire.Tailed(piece, b"", data[begin : begin + _PIECE])
            piece = kind()
        at += len(data)


def _check(size: int, largest: float) -> None:
    if size > largest:
        raise Overloaded(f"{size} bytes, more than TMS_MAX_MESSAGE_MB allows", retry_after_ms=-1)


class Gathered:
    """What has come of one message, and of the bytes that follow it."""

    def __init__(self, memory: Callable[[int], Array], largest: float = math.inf) -> None:
        """``memory`` gives room for so many bytes, of which there may be ``largest``."""
        self._memory = memory
        self._largest = largest
        self.first: Any = None
        self.data: Any = None
        self._at = 0

    def add(self, piece: Any, tail: memoryview | None) -> None:
        """Takes the next piece, whose data may have been left out of it; InvalidInput if it does not fit."""
        if self.first is None:
            if piece.size < 0:
                raise InvalidInput(f"a size of {piece.size} bytes")
            _check(piece.size, self._largest)
            try:
                self.first, self.data = piece, self._memory(piece.size)
            except OSError as error:
                raise Overloaded(f"no memory for {piece.size} bytes: {error}") from None
        data = piece.data if tail is None else tail
        end = self._at + len(data)
        if end > self.first.size:
            raise InvalidInput(f"more than the {self.first.size} bytes that the first piece has told of")
        self.data.data[self._at : end] = data
        self._at = end

    def end(self) -> Any:
        """The first piece, after the last; InvalidInput if one is missing."""
        if self.first is None or self._at != self.first.size:
            told = f"{self.first.size} bytes" if self.first else "at least one piece"
            raise InvalidInput(f"the pieces ended after {self._at} of {told}")
        return self.first
