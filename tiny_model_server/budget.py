"""The bound on the bytes of all requests that are in the server at once (TMS_MAX_INFLIGHT_MB)."""

import threading

from tiny_model_server.errors import Overloaded

_RETRY_AFTER_MS = 100
_SMALL = 1 << 16


class Budget:
    """Counts the bytes of requests, whatever the transport; threads may share it."""

    def __init__(self, limit: int) -> None:
        """``limit`` is in bytes."""
        self.limit = limit
        self.used = 0
        self._coming = 0  # of them, bytes of requests that are not all there
        self._lock = threading.RLock()  # ``expect`` holds it, too

    def take(self, size: int) -> None:
        """Counts ``size`` more bytes; Overloaded if they do not fit beside those under way."""
        with self._lock:
            if self.used + size > self.limit:
                raise Overloaded(
                    f"requests of {self.used} bytes are under way, and {size} more would exceed the "
                    f"{self.limit} bytes of TMS_MAX_INFLIGHT_MB",
                    retry_after_ms=_RETRY_AFTER_MS if size <= self.limit else -1,
                )
            self.used += size

    def expect(self, size: int, before: int = 0) -> None:
        """Counts ``size`` more bytes of a request of which ``before`` were counted and which still arrives.

        All such requests, except small ones, get half of all bytes, so that half-sent requests leave room.
        """
        with self._lock:
            others = self._coming - before
            if others and before + size > _SMALL and others + before + size > self.limit // 2:
                raise Overloaded(
                    f"requests of {others} bytes are arriving, and {before + size} more would exceed half of the "
                    f"{self.limit} bytes of TMS_MAX_INFLIGHT_MB",
                    retry_after_ms=_RETRY_AFTER_MS,
                )
            self.take(size)
            self._coming += size

    def arrived(self, size: int) -> None:
        """A request of so many bytes has arrived, or will not."""
        with self._lock:
            self._coming -= size

    def give(self, size: int) -> None:
        """Counts ``size`` fewer bytes."""
        with self._lock:
            self.used -= size
