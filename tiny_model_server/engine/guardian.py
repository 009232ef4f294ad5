"""Sees to it that nothing which a worker has started outlives it, however the worker or the front ends.

Each worker runs below a guardian: a process that does nothing but wait. On Linux it is a "subreaper": processes whose
parents have ended become its children, those in sessions of their own too. So it can end them all when the worker has
ended, or when the front has: by itself, or by SIGKILL. It then ends as the worker did. Elsewhere it ends the worker's
process group.
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
from typing import NoReturn

_SET_PDEATHSIG = 1  # of prctl
_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 5.0  # with processes that a SIGKILL does not end
_TRACKER_S = 1.0  # multiprocessing's resource tracker has to remove shared memory when its processes have ended


def guard(control: int) -> None:
    """Splits this process: one half returns, and is the worker; the other one is its guardian and never returns.

    ``control`` is the socket to the front; the guardian notices there that the front has gone. It ends the worker when
    it hears SIGTERM.
    """
    adopt_orphans()
    _ask_for_signal_at_parents_death(signal.SIGCONT)  # for a guardian that the model has stopped
    heard, wakeup = os.pipe()
    for fd in (heard, wakeup):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    guardian = os.getpid()
    while (worker := _fork()) is None:
        time.sleep(0.1)  # too many processes just now
        if select.select([heard], [], [], 0)[0] or _is_over(control):
            os._exit(1)
    if worker:
        _watch(worker, control, heard)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.close(heard)
    os.close(wakeup)
    os.setsid()  # what it sends to its process group does not reach the guardian
    _ask_for_signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)


def adopt_orphans() -> None:
    """Makes the orphans among this process' descendants its children, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)


def _ask_for_signal_at_parents_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, number)


def _fork() -> int | None:
    try:
        return os.fork()
    except OSError:
        return None


def _is_over(control: int) -> bool:
    poll = select.poll()
    poll.register(control, 0)  # hears only that the other end is closed
    return bool(poll.poll(0))


def _watch(worker: int, control: int, heard: int) -> NoReturn:
    poll = select.poll()
    poll.register(control, 0)
    poll.register(heard, select.POLLIN)
    status: int | None = None
    while status is None:
        for fd, _ in poll.poll():
            if fd == heard:
                told = os.read(heard, 4096)
            if fd == control or signal.SIGTERM in told:
                kill(worker)
            if fd == control:
                poll.unregister(control)
        status = _reap().get(worker)
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
    begun, pause = time.monotonic(), 0.002
    if sys.platform != "linux":
        with suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
        return
    while time.monotonic() - begun < _PATIENCE_S:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return
        for pid in _descendants():
            if time.monotonic() - begun > _TRACKER_S or b"resource_tracker" not in read(pid, "cmdline"):
                kill(pid)
        time.sleep(pause := min(2 * pause, 0.05))
        _reap()


def _end_as(status: int) -> NoReturn:
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def kill(pid: int) -> None:
    """Sends SIGKILL, where it may."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def read(pid: int, name: str) -> bytes:
    """What the system says of a process in the file ``/proc/PID/NAME``; empty if it does not."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def parents() -> dict[int, int]:
    """The parent of every process; empty where the system does not tell."""
    found: dict[int, int] = {}
    with suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit() and (stat := read(int(name), "stat")):
                found[int(name)] = int(stat.rpartition(b")")[2].split()[1])
    return found


def _descendants() -> list[int]:
    known, found = parents(), [os.getpid()]
    for pid in found:
        found += [child for child, parent in known.items() if parent == pid]
    return found[1:]
