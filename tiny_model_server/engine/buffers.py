"""Shared buffers for calls whose callers share no memory with the workers, as those by gRPC and HTTP."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from tiny_model_server.codec import Encoded
from tiny_model_server.errors import Overloaded
from tiny_model_server.shared_memory import SharedBuffers, read_arrays, write_arrays

_MOST = 16  # are kept for later calls
_LARGEST = 16 << 20  # bytes; larger ones are not kept
_RETRY_AFTER_MS = 100


class BufferPool:
    """Keeps the buffers of calls that are over for later ones; threads may share it."""

    def __init__(self, on_loop: Callable[[Callable[[], None]], None]) -> None:
        """``on_loop`` calls a function on the engine's loop, to which the counts of the buffers' users belong."""
        self._on_loop = on_loop
        self._free: deque[SharedBuffers] = deque()

    def take(self) -> SharedBuffers:
        """Buffers for one call. Overloaded if there is no memory or no descriptor for them."""
        with suppress(IndexError):
            return self._free.pop()
        try:
            return SharedBuffers()
        except OSError as error:
            raise Overloaded(f"the server has no memory to share now: {error}", _RETRY_AFTER_MS) from None

    def give_back(self, buffers: SharedBuffers) -> None:
        """Ends a call's use; buffers that a worker or a model still uses, and large ones, are not kept."""
        few = len(self._free) < _MOST
        if few and buffers.holders == 1 and not buffers.retained and buffers.size <= _LARGEST:
            self._free.append(buffers)
        else:
            self._on_loop(buffers.close)

    def close(self) -> None:
        """Closes all that are kept; for the loop."""
        while self._free:
            self._free.pop().close()


def place(values: Sequence[Encoded], buffers: SharedBuffers) -> Sequence[Encoded]:
    """The values, of which all arrays lie in shared memory. Overloaded if there is no memory for them."""
    arrays = [array for value in values if not value.shared for array in value.arrays]
    if not arrays:
        return values
    try:
        places = iter(write_arrays(buffers.request, arrays))
    except OSError as error:
        raise Overloaded(f"the server has no memory for the request now: {error}", _RETRY_AFTER_MS) from None
    return [
        value if value.shared else value._replace(shared=(buffers, [next(places) for _ in value.arrays]))
        for value in values
    ]


def copy_out(outcome: Encoded) -> Encoded:
    """The outcome with arrays of this process' own."""
    if not outcome.shared:
        return outcome
    buffers, places = outcome.shared
    return Encoded(outcome.text, read_arrays(buffers.response, places))
