"""A worker's guardian: ends whatever the worker has started, however the worker or the front ends.

Each worker runs below a guardian, a process that only waits. On Linux it is a "subreaper": processes whose parents have
ended become its children, even those in other sessions. So it can kill them all when the worker has ended, or when the
front has, be it by SIGKILL. Then it ends as the worker did. On other systems it kills the worker's process group.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_SET_PDEATHSIG = 1  # options of prctl
_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 5.0  # with processes that a SIGKILL does not end
_TRACKER_S = 1.0  # multiprocessing's resource tracker removes the shared memory of processes that have ended
_PAUSE_S = 0.02  # between two looks at what is left


def guard(control: int) -> None:
    """Forks. Returns in the child, which becomes the worker; the parent is its guardian and never returns.

    ``control`` is the socket to the front. The guardian kills the worker when the front closes it, or at SIGTERM.
    """
    adopt_orphans()
    _prctl(_SET_PDEATHSIG, signal.SIGCONT)  # the model may have stopped its guardian
    guardian = os.getpid()
    if worker := _fork():
        _watch(worker, control)
    os.setsid()  # a signal that the worker sends to its process group does not reach the guardian
    end_with(guardian)


def end_with(parent: int) -> None:
    """Lets this process be killed when ``parent``, its parent process, ends, where the system can do that."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def adopt_orphans() -> None:
    """Makes the orphans among this process' descendants its children, where the system can do that."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _fork() -> int:
    while True:
        try:
            return os.fork()
        except OSError:  # the system has too many processes just now
            time.sleep(0.1)


def _watch(worker: int, control: int) -> NoReturn:
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):  # with a handler, its number is written to the pipe
        signal.signal(number, lambda number, frame: None)
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    poll.register(control, 0)  # reports nothing but that the other end is closed
    while (status := _reap().get(worker)) is None:
        if closed := control in dict(poll.poll()):
            poll.unregister(control)
        if closed or signal.SIGTERM in os.read(signals, 4096):
            kill(worker)
    _end_descendants(worker)
    _end_as(status)


def _reap() -> dict[int, int]:
    """The children that have ended, with their statuses."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def _end_descendants(worker: int) -> None:
    begun = time.monotonic()
    if sys.platform != "linux":
        with suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
    while (left := children()) and (passed_s := time.monotonic() - begun) < _PATIENCE_S:
        for pid in left:
            if passed_s > _TRACKER_S or b"resource_tracker" not in read(pid, "cmdline"):
                kill(pid)  # its own children become ours
        time.sleep(_PAUSE_S)
        _reap()


def _end_as(status: int) -> NoReturn:
    """Ends by the same exit code or signal."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left a core file already, if any
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def kill(pid: int) -> None:
    """Sends SIGKILL, if that is allowed."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def children() -> list[int]:
    """The living and ended children of this process; none where there is no ``/proc``."""
    own = str(os.getpid()).encode()
    with suppress(OSError):
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if read(pid, "stat").rpartition(b")")[2].split()[1:2] == [own]]
    return []


def read(pid: int, name: str) -> bytes:
    """The content of ``/proc/PID/NAME``; empty if it cannot be read."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
