"""Lets a process that uses the client fork: gRPC's fork handlers need a moment without calls.

While a fork is under way no call starts, and the fork waits for those that are under way. If they take too long, the
child's first call fails, where gRPC would hang.
"""

import os
import threading

_PATIENCE_S = 65.0  # longer than a call takes by default: a child of a process in a call may crash inside gRPC

_lock = threading.RLock()
_changed = threading.Condition(_lock)
_in_flight = 0
_forking = False
generation = 0
"""Counts the forks that led to this process. Connections of an earlier generation must not be used."""
asyncio_used = False
"""True once gRPC's asyncio was used: it always has a thread in gRPC, so a fork is never safe."""
unusable = False
"""True in a child that was forked while calls were under way, or after asyncio was used."""


class _InFlight:
    def __enter__(self) -> None:
        global _in_flight
        with _lock:  # faster than through the condition
            while _forking:
                _changed.wait()
            _in_flight += 1

    def __exit__(self, *error: object) -> None:
        global _in_flight
        with _lock:
            _in_flight -= 1
            if _forking:
                _changed.notify_all()


in_flight = _InFlight()
"""``with in_flight:`` makes a fork wait for the call in the block. No block begins while a fork is under way."""


def _before() -> None:
    global _forking
    _changed.acquire()
    _forking = True
    if not asyncio_used:
        _changed.wait_for(lambda: _in_flight == 0, _PATIENCE_S)


def _after_in_parent() -> None:
    global _forking
    _forking = False
    _changed.notify_all()
    _changed.release()


def _after_in_child() -> None:
    global _changed, _forking, _in_flight, _lock, generation, unusable
    unusable = unusable or asyncio_used or _in_flight > 0
    _lock, _forking, _in_flight, generation = threading.RLock(), False, 0, generation + 1
    _changed = threading.Condition(_lock)


if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
