"""The processes that the front starts, and those that come to it as orphans."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tiny_model_server.engine import guardian
from tiny_model_server.engine.guardian import kill, parents, read

_MARK = "TINY_MODEL_SERVER_FRONT"  # in the environment of all that a front starts
_ORPHAN_S = 1.0  # a child that has ended and that nobody has waited for in this time is nobody's

_PATIENCE_S = 2.0  # with orphans that a SIGKILL does not end

_adopts = False
_spawning = threading.Lock()
_ours: set[int] = set()  # children that somebody waits for


def spawn(command: Sequence[str], env: Mapping[str, str], **options: Any) -> "subprocess.Popen[bytes]":
    """Starts a guardian; OSError if it cannot be. Call ``forget`` when it has been waited for."""
    with _spawning:
        started = subprocess.Popen(command, env={**env, _MARK: str(os.getpid())}, **options)
        _ours.add(started.pid)
    return started


def forget(started: "subprocess.Popen[bytes]") -> None:
    """Ends what a guardian that was killed itself has left to the front."""
    with _spawning:
        _ours.discard(started.pid)
    end = time.monotonic() + _PATIENCE_S
    # When an orphan has ended its own children are orphans, too.
    while (orphans := [pid for pid in _orphans() if _is_of_a_worker(pid)]) and time.monotonic() < end:
        for pid in orphans:
            kill(pid)
        time.sleep(0.01)


def adopt_orphans() -> None:
    """Makes this process, which must have no other children than guardians, the parent of what they leave."""
    global _adopts
    _adopts = os.getpid() != 1  # to process 1 come also orphans of those whom an operator has started in its container
    guardian.adopt_orphans()
    if hasattr(os, "waitid"):  # macOS has no orphans for us
        threading.Thread(target=_reap_orphans, name="orphans", daemon=True).start()


def _reap_orphans() -> None:
    """Waits for ended processes that nobody else waits for, for ever: they come to process 1, and to subreapers."""
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # sleeps until a child has ended, and leaves it as it is
        except ChildProcessError:
            time.sleep(_ORPHAN_S)
            continue
        before = _ended_children()
        time.sleep(_ORPHAN_S)
        with _spawning:
            for pid in (before & _ended_children()) - _ours:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def _is_of_a_worker(pid: int) -> bool:
    return _adopts or f"{_MARK}={os.getpid()}".encode() in read(pid, "environ").split(b"\0")


def _orphans() -> set[int]:
    with _spawning:
        return _children() - _ended_children() - _ours


def _children() -> set[int]:
    return {pid for pid, parent in parents().items() if parent == os.getpid()}


def _ended_children() -> set[int]:
    return {pid for pid in _children() if read(pid, "stat").rpartition(b")")[2].split()[:1] == [b"Z"]}
