"""Starts the replicas of TMS_REPLICAS as processes, replaces those that die, and stops them all together.

This process serves nothing itself. Each replica is a whole server at ports of its own.
"""

import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

from tiny_model_server.engine import children, guardian
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.replicas")

_STABLE_S = 10.0  # a replica that lived this long and then died is replaced at once
_LONGEST_BACKOFF_S = 5.0
_STOP_S = 12.0  # beyond the time that accepted calls have; then replicas are killed
_TRIES = 100  # to find free ports that follow one another
_GOOD = (0, -signal.SIGTERM)  # ends of a replica that is to stop, also while it starts


def supervise(settings: Settings) -> int:
    """Runs the replicas until SIGTERM, SIGINT or StopServer; a second signal hurries. Returns the exit code.

    It is 0 after a good stop, and that of a replica which could not start at all: 2 for a wrong setting. SettingsError
    if there cannot be several.
    """
    count = settings.replicas
    if settings.socket:
        raise SettingsError(f"TMS_SOCKET is one path, and TMS_REPLICAS={count} servers cannot share it; unset one")
    free = _free_ports(2 * count) if 0 in (settings.port, settings.http_port) else 0
    port, http_port = settings.port or free, free + count if settings.http_port == 0 else settings.http_port
    http = f", HTTP on ports {http_port} to {http_port + count - 1}" if http_port else ""
    log.info("%d replicas: gRPC on ports %d to %d%s, pid %d", count, port, port + count - 1, http, os.getpid())
    replicas = []
    for index in range(count):
        flags = [f"--replica={index + 1}", f"--port={port + index}"]
        flags.append(f"--http-port={http_port + index if http_port else 'off'}")
        replicas.append(_Replica(index + 1, [sys.executable, *sys.orig_argv[1:], *flags]))
    return _Supervisor(settings, replicas).run()


def _free_ports(count: int) -> int:
    """The first of so many free ports that follow one another."""
    for _ in range(_TRIES):
        with ExitStack() as held, suppress(OSError, OverflowError):  # one is taken, or above 65535
            first: int = held.enter_context(socket.create_server(("", 0))).getsockname()[1]
            for port in range(first + 1, first + count):
                held.enter_context(socket.create_server(("", port)))
            return first
    raise SettingsError(f"there are no {count} free ports that follow one another; choose TMS_PORT and TMS_HTTP_PORT")


class _Replica:
    """One replica: its process, if it runs, and when it is to be started."""

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number, self._command = number, command
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = self._failures = 0
        self.due = 0.0
        """When to start it, by ``time.monotonic``."""
        self._begun = 0.0

    def start(self) -> None:
        """Starts it, in a session of its own: a Ctrl-C in the terminal is for the supervisor alone."""
        self.starts, self._begun = self.starts + 1, time.monotonic()
        ends = partial(guardian.end_with, os.getpid())
        try:
            self.process = children.spawn(self._command, os.environ, start_new_session=True, preexec_fn=ends)
        except OSError as error:
            self.retry(f"cannot be started: {error}")

    def ended(self) -> int | None:
        """The exit code, once after each end; None before."""
        if not self.process or (code := self.process.poll()) is None:
            return None
        children.forget(self.process)
        self.process = None
        return code

    def retry(self, why: str) -> None:
        """Lets it be started again: at once if it had lived for long, else a little later each time."""
        log.error("replica %d %s; starting another one", self.number, why)
        lived = time.monotonic() - self._begun > _STABLE_S
        self._failures = 0 if lived else self._failures + 1
        pause = 0.05 * 2 ** min(self._failures, 10) if self._failures > 1 else 0.0
        self.due = time.monotonic() + min(_LONGEST_BACKOFF_S, pause)


class _Supervisor:
    """Waits for signals, and for the ends of replicas."""

    def __init__(self, settings: Settings, replicas: Sequence[_Replica]) -> None:
        self._settings, self._replicas = settings, replicas
        self._code: int | None = None  # the exit code, once all are to stop
        self._kill_at = math.inf
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()  # signal handlers may put into this kind

    def run(self) -> int:
        """Returns the exit code when all have stopped."""
        children.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: self._signals.put(number))
        while self._code is None or any(one.process for one in self._replicas):
            for one in self._replicas:
                if self._code is None and not one.process and one.due <= time.monotonic():
                    one.start()
            self._wait()
            for one in self._replicas:
                if (code := one.ended()) is not None:
                    self._after_end(one, code)
        log.info("all replicas have stopped")
        return self._code

    def _wait(self) -> None:
        """Waits for a signal, or until a replica is due."""
        due = [one.due for one in self._replicas if self._code is None and not one.process]
        seconds = max(0.0, min([self._kill_at, *due]) - time.monotonic())
        try:
            number = self._signals.get(timeout=None if seconds == math.inf else seconds)
        except queue.Empty:
            number = 0
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stop(0)
        if time.monotonic() > self._kill_at:
            self._kill_at = math.inf
            self._signal(signal.SIGKILL)
        children.reap()

    def _after_end(self, replica: _Replica, code: int) -> None:
        if self._code is not None:
            self._code = self._code or int(code not in _GOOD)
        elif code == 0:
            log.info("replica %d was asked to stop; stopping all", replica.number)
            self._stop(0)
        elif replica.starts == 1 and (code == 2 or (code == 1 and self._settings.strict)):
            log.error("replica %d could not start; stopping all", replica.number)
            self._stop(code)
        else:
            replica.retry(children.how_ended(code))

    def _stop(self, code: int) -> None:
        """Lets all replicas stop, and the second time hurry, which SIGINT means to a replica that stops."""
        first, self._code = self._code is None, self._code or code
        grace_s = self._settings.drain_delay_s + self._settings.grace_s if first else 0
        self._kill_at = time.monotonic() + grace_s + _STOP_S
        self._signal(signal.SIGTERM if first else signal.SIGINT)

    def _signal(self, number: int) -> None:
        for one in self._replicas:
            if one.process:
                one.process.send_signal(number)
