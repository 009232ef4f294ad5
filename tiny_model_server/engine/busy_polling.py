"""A selector that polls for a moment before it sleeps: to wake a sleeping core costs more than most waits take."""

import selectors
import time
from collections.abc import Callable
from typing import Any


class BusyPollingSelector(selectors.DefaultSelector):
    """Polls for ``seconds`` as long as the last two waits were shorter than that, and ``worthwhile`` says so.

    Two, because a call has two waits: for its worker, and for the next call.
    """

    def __init__(self, seconds: float, worthwhile: Callable[[], bool]) -> None:
        super().__init__()
        self._seconds, self._worthwhile = seconds, worthwhile
        self._short_waits = 0  # in a row

    def select(self, timeout: float | None = None) -> Any:
        """The events within ``timeout`` seconds (None: whenever they come)."""
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        begun = time.monotonic()
        if self._short_waits >= 2 and self._worthwhile():
            end = begun + (self._seconds if timeout is None else min(timeout, self._seconds))
            while time.monotonic() < end:
                if found := super().select(0):
                    return found
        found = super().select(timeout)
        self._short_waits = self._short_waits + 1 if time.monotonic() - begun < self._seconds else 0
        return found
