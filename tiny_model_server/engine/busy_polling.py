"""Waiting awake for a moment before sleeping: to wake a core up costs more than most waits within a call take."""

import threading
import time
from collections.abc import Callable
from typing import Any

seconds = 0.0
"""How long to stay awake; 0 is not at all. Set at the start."""
calls: Callable[[], int] = int
"""How many calls are under way. Set at the start."""
few = 2
"""So many calls at once leave a core to stay awake on; of more, callers and workers need it. Set at the start."""
_most = 0.0  # calls at once, lately
_one = threading.Lock()  # stays awake at a time: more would only take each other's core


def _crowded() -> bool:
    global _most
    _most = max(calls(), 0.95 * _most)
    return _most > few


class Waiter:
    """Waits in one place for events, and stays awake there as long as that has paid lately."""

    def __init__(self, poll: Callable[[float | None], Any]) -> None:
        """``poll`` returns events if there are any within so many seconds (None: whenever)."""
        self._poll = poll
        self.pays = True
        """Whether the last wait was short."""

    def wait(self, timeout: float | None) -> Any:
        """What ``poll`` finds within ``timeout`` seconds."""
        if not seconds or (timeout is not None and timeout <= 0) or _crowded():
            return self._poll(timeout)
        begun = time.monotonic()
        if self.pays and _one.acquire(blocking=False):
            try:
                while time.monotonic() - begun < seconds:
                    if found := self._poll(0):
                        return found
            finally:
                _one.release()
        found = self._poll(timeout)
        self.pays = time.monotonic() - begun < seconds
        return found
