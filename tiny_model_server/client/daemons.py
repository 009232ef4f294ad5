"""Threads that wait for calls in the place of the application's own."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any

_MOST_THREADS = 256  # more jobs wait for a thread


class Daemons:
    """An executor that no exit of the process waits for. A job's future can be cancelled while the job runs."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0

    def submit(self, work: Callable[[], Any], outcome: "Future[Any] | None" = None) -> "Future[Any]":
        """Does a job when a thread is free; returns the future of its result, which is ``outcome`` if given."""
        outcome = Future() if outcome is None else outcome
        self._jobs.put((work, outcome))
        if not self._idle.acquire(blocking=False) and self._count < _MOST_THREADS:
            self._count += 1
            threading.Thread(target=self._work, name="calls", daemon=True).start()
        return outcome

    def _work(self) -> None:
        while True:
            _do(*self._jobs.get())
            self._idle.release()


def _do(work: Callable[[], Any], outcome: "Future[Any]") -> None:
    if outcome.cancelled():
        return
    try:
        settle = partial(outcome.set_result, work())
    except Exception as error:
        settle = partial(outcome.set_exception, error)
    if outcome.set_running_or_notify_cancel():
        settle()


@cache
def daemons(generation: int) -> Daemons:
    """The threads of this process, by ``fork_safety.generation``: a forked child does not inherit them."""
    return Daemons()
