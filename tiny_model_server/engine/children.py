"""The processes that the front starts, and the orphans that it adopts. For the thread of the engine's loop.

The supervisor of several replicas starts them in the same way.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tiny_model_server.engine import guardian
from tiny_model_server.engine.guardian import kill, read

_MARK = "TINY_MODEL_SERVER_FRONT"  # in the environment of all that a front starts

_guardians: set[int] = set()  # whoever has started them waits for them
_adopting = False


def spawn(command: Sequence[str], env: Mapping[str, str], **options: Any) -> "subprocess.Popen[bytes]":
    """Starts a guardian; OSError if it cannot be started. Call ``forget`` when it has been waited for."""
    started = subprocess.Popen(command, env={**env, _MARK: str(os.getpid())}, **options)
    _guardians.add(started.pid)
    return started


def how_ended(code: int) -> str:
    """A process' end in words, by its ``returncode``: "was killed by SIGSEGV" or "exited with code 3"."""
    hint = " (out of memory, or from outside)" if code == -signal.SIGKILL else ""
    return f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}{hint}"


def forget(started: "subprocess.Popen[bytes]") -> None:
    """Kills what a guardian that was itself killed has left to the front."""
    _guardians.discard(started.pid)
    _kill_orphans()
    reap()


def adopt_orphans() -> None:
    """Makes this process the parent of the orphans that guardians leave. It must have no other children than guardians.

    Its loop must call ``reap`` at each SIGCHLD.
    """
    global _adopting
    _adopting = os.getpid() != 1  # process 1 of a container also gets orphans of what an operator starts there
    guardian.adopt_orphans()


def reap() -> None:
    """Waits for orphans that have ended, so that no zombies stay. Returns at once."""
    found = False
    with suppress(ChildProcessError, AttributeError):  # macOS has no waitid and no orphans for us
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)) and _is_orphan(ended.si_pid):
            found = bool(os.waitpid(ended.si_pid, os.WNOHANG)[0])
    if found:
        _kill_orphans()  # its children are ours now


def _kill_orphans() -> None:
    mark = f"{_MARK}={os.getpid()}".encode()
    for pid in filter(_is_orphan, guardian.children()):
        if _adopting or mark in read(pid, "environ").split(b"\0"):
            kill(pid)


def _is_orphan(pid: int) -> bool:
    return pid not in _guardians
