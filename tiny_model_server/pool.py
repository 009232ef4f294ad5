"""The workers of one model: spawn, watch, restart, stop. Each worker process has a thread that keeps it alive."""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tiny_model_server.batcher import Batcher, Item, Outcome
from tiny_model_server.codec import Packed
from tiny_model_server.errors import DeadlineExceeded, ModelError, ModelUnavailable, from_status
from tiny_model_server.settings import ModelOptions, Settings
from tiny_model_server.shm import Segment

log = logging.getLogger("tiny_model_server.pool")

_ROOT = Path(__file__).resolve().parent.parent
_LONGEST_BACKOFF_S = 30.0  # between attempts to load
_LONGEST_CRASH_BACKOFF_S = 1.0  # between deaths of workers that could be loaded: inputs that kill must not stop others
_STABLE_S = 10.0  # a worker that lived this long and then died is restarted at once


@dataclass(frozen=True)
class Plugin:
    """A model folder: what a worker imports."""

    name: str
    path: Path
    overrides: dict[str, Any]

    @property
    def interpreter(self) -> str:
        """The Python of the folder's own .venv if it has one, else the server's."""
        own = self.path / ".venv" / "bin" / "python"
        return str(own) if own.exists() else sys.executable


@dataclass(frozen=True)
class Loaded:
    """What a worker told of its model: options in force, input shape (None for any), metadata."""

    options: ModelOptions
    input_shape: list[int] | None
    metadata: dict[str, Any]
    example: Packed | None


class _WorkerDied(Exception):
    pass


class _WorkerHung(Exception):
    pass


class _Slot:
    """The front's end of a slot: sends a batch to the worker and waits for the outcomes."""

    def __init__(self, control: Connection) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._inbox, self._outbox = Segment(), Segment()
        self._new_inbox = False
        self._closing = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        with theirs:
            for fd in (theirs.fileno(), self._inbox.fd, self._outbox.fd):
                reduction.send_handle(control, fd, 0)

    def run(self, batch: list[Item], timeout_s: float) -> list[Outcome]:
        """One outcome an item; _WorkerDied or _WorkerHung if there is none."""
        try:
            if self._new_inbox:
                self._inbox.close()
                self._inbox = Segment()
            places = iter(self._inbox.write([array for item in batch for array in item.packed.arrays]))
            items = [(item.packed.text, [next(places) for _ in item.packed.arrays], item.plain) for item in batch]
            self._connection.send((batch[0].args, items, self._new_inbox))
            if self._new_inbox:
                reduction.send_handle(self._connection, self._inbox.fd, 0)
            if not self._poll.poll(timeout_s * 1000):
                raise _WorkerHung
            answers, _seconds, self._new_inbox = self._connection.recv()
        except (EOFError, OSError) as error:
            raise _WorkerDied from error
        return [
            from_status(status, text) if status else Packed(text, [array.copy() for array in self._outbox.read(places)])
            for status, text, places in answers
        ]

    def shutdown(self) -> None:
        """Ends the conversation: a waiting ``run`` raises, the worker's slot leaves."""
        with self._closing:
            if not self._connection.closed:
                with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Lets socket and segments go; for the thread that calls ``run``."""
        with self._closing:
            self._connection.close()
        self._inbox.close()
        self._outbox.close()


class _Process:
    """One worker process, from spawn to death."""

    def __init__(self, plugin: Plugin, settings: Settings) -> None:
        """Spawns the process; OSError if that cannot be."""
        self._plugin = plugin
        self._settings = settings
        ours, theirs = socket.socketpair()
        with theirs:
            self.popen = subprocess.Popen(
                [plugin.interpreter, "-m", "tiny_model_server.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(settings),
                start_new_session=True,  # a Ctrl-C in the terminal is for the front alone
            )
        self._control = Connection(ours.detach())
        self.slots: list[_Slot] = []
        self.ready = False

    def load(self) -> Loaded:
        """Lets the process import, construct and warm up the model; ModelUnavailable says why that failed."""
        plugin = self._plugin
        options = ModelOptions().with_overrides(plugin.overrides)
        spec = {
            "name": plugin.name,
            "path": str(plugin.path),
            "front": os.getpid(),
            "log_level": self._settings.log_level,
            "log_format": self._settings.log_format,
        }
        try:
            self._control.send(spec)
            declared = self._hear("declared", options.load_timeout_s)
            options = ModelOptions().declared(declared).with_overrides(plugin.overrides)
            self._control.send(options.as_dict())
            info = self._hear("ready", options.load_timeout_s)
            self.slots = [_Slot(self._control) for _ in range(options.concurrency)]
        except ValueError as error:
            raise ModelUnavailable(str(error)) from None
        except (EOFError, OSError):
            raise ModelUnavailable(f"its worker {self.end()} while loading") from None
        self.ready = True
        return Loaded(options, info["input_shape"], info["metadata"], info["example"])

    def _hear(self, expected: str, timeout_s: float) -> Any:
        if not self._control.poll(timeout_s):
            raise ModelUnavailable(f"it took longer than load_timeout_s={timeout_s:g} to load")
        kind, content = self._control.recv()
        if kind != expected:
            raise ModelUnavailable(content)
        return content

    def end(self) -> str:
        """How the process ended, as "was killed by SIGSEGV" or "exited with code 3"; waits for it."""
        code = self.popen.wait()
        if code >= 0:
            return f"exited with code {code}"
        hint = " (out of memory, or from outside)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def kill(self) -> None:
        """Kills the process and what it has started."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """After death: ends what its slots wait for, and what the model may have left running."""
        self.kill()
        for slot in self.slots:
            slot.shutdown()
        self._control.close()


class Pool:
    """Runs one model in worker processes that take from a batcher, until stopped."""

    def __init__(self, plugin: Plugin, batcher: Batcher, settings: Settings, changed: Callable[[str | None], None]):
        """``changed`` hears why no worker can be started any more, and None when one runs again."""
        self._plugin = plugin
        self._batcher = batcher
        self._settings = settings
        self._changed = changed
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._processes: dict[int, _Process] = {}
        self._keepers: list[threading.Thread] = []
        self._suspects = threading.Lock()  # inputs that a worker died on run again one at a time
        self.restarts = 0

    def start(self) -> Loaded:
        """Starts all workers and waits until every one is ready; ModelUnavailable says why one is not."""
        first = self._start_keeper(0)
        loaded = first()
        try:
            for wait in [self._start_keeper(index) for index in range(1, loaded.options.workers)]:
                wait()
        except ModelUnavailable:
            self.stop(grace_s=0)
            raise
        return loaded

    def stop(self, grace_s: float) -> None:
        """Lets running batches finish for ``grace_s`` seconds, then kills; returns when all processes are gone."""
        with self._lock:
            self._stopping.set()
            loading = [process for process in self._processes.values() if not process.ready]
        for process in loading:
            process.kill()
        self._batcher.wake()
        deadline = time.monotonic() + grace_s
        for keeper in self._keepers:
            keeper.join(max(0.0, deadline - time.monotonic()))
        for process in self._running():
            process.kill()
        for keeper in self._keepers:
            keeper.join()

    @property
    def pids(self) -> list[int]:
        """The processes that serve now."""
        return [process.popen.pid for process in self._running() if process.ready]

    def _running(self) -> list[_Process]:
        with self._lock:
            return list(self._processes.values())

    def _start_keeper(self, index: int) -> Callable[[], Loaded]:
        ready = threading.Event()
        result: list[Loaded | ModelUnavailable] = []

        def report(outcome: Loaded | ModelUnavailable) -> None:
            result.append(outcome)
            ready.set()

        def wait() -> Loaded:
            ready.wait()
            if isinstance(result[0], ModelUnavailable):
                raise result[0]
            return result[0]

        keeper = threading.Thread(target=self._keep, args=(index, report), name=f"{self._plugin.name}-{index}")
        self._keepers.append(keeper)
        keeper.start()
        return wait

    def _keep(self, index: int, report: Callable[[Loaded | ModelUnavailable], None]) -> None:
        """The life of one worker: spawn, serve until it dies, again. Ends when stopped or when the first load fails."""
        name = self._plugin.name
        failures = 0
        served = False
        while process := self._spawn(index):
            try:
                loaded = process.load()
            except ModelUnavailable as error:
                self._bury(index, process)
                if not served:
                    return report(error)
                failures += 1
                log.error("model %s: a worker cannot be restarted: %s", name, error)
                if not self.pids:
                    self._changed(str(error))
            else:
                born = time.monotonic()
                if served:
                    self._changed(None)
                else:
                    report(loaded)
                served = True
                self._serve_until_death(process, loaded.options)
                self._bury(index, process)
                if not self._stopping.is_set():
                    self.restarts += 1
                    log.error("model %s: worker %d %s; restarting it", name, process.popen.pid, process.end())
                    failures = 0 if time.monotonic() - born > _STABLE_S else failures + 1
            longest = _LONGEST_CRASH_BACKOFF_S if process.ready else _LONGEST_BACKOFF_S
            self._stopping.wait(min(longest, 0.05 * 2**failures) if failures > 1 else 0)
        if not served:
            report(ModelUnavailable("the server is stopping"))

    def _spawn(self, index: int) -> _Process | None:
        """A new process, known to ``stop`` from the start; None when stopping."""
        while True:
            with self._lock:
                if self._stopping.is_set():
                    return None
                try:
                    process = _Process(self._plugin, self._settings)
                except OSError as error:
                    log.error("model %s: cannot spawn a worker: %s", self._plugin.name, error)
                else:
                    self._processes[index] = process
                    return process
            self._stopping.wait(1)

    def _bury(self, index: int, process: _Process) -> None:
        process.kill()
        process.popen.wait()
        process.close()
        with self._lock:
            del self._processes[index]

    def _serve_until_death(self, process: _Process, options: ModelOptions) -> None:
        threads = [threading.Thread(target=self._serve, args=(process, slot, options)) for slot in process.slots]
        for thread in threads:
            thread.start()
        process.popen.wait()
        process.close()
        self._batcher.wake()
        for thread in threads:
            thread.join()

    def _serve(self, process: _Process, slot: _Slot, options: ModelOptions) -> None:
        """Takes batches and runs them in one slot, until the worker is dead or the pool stops."""

        def leave() -> bool:
            return self._stopping.is_set() or process.popen.returncode is not None

        while (batch := self._batcher.take(options.max_batch_size, options.max_wait_ms / 1000, leave)) is not None:
            suspect = batch[0].attempts > 0
            try:
                with self._suspects if suspect else nullcontext():
                    outcomes = slot.run(batch, options.timeout_s)
            except _WorkerHung:
                process.kill()
                message = f"model {self._plugin.name!r} took longer than its timeout_s={options.timeout_s:g}"
                outcomes = [DeadlineExceeded(message)] * len(batch)
            except _WorkerDied:
                self._after_death(process, batch)
                break
            for item, outcome in zip(batch, outcomes, strict=True):
                item.resolve(outcome)
        slot.close()

    def _after_death(self, process: _Process, batch: list[Item]) -> None:
        """Queues the items that the worker held once more, each alone; one that has been alone twice fails."""
        again = []
        for item in batch:
            item.attempts += 1
            if item.attempts > 1:
                how = f"the worker of model {self._plugin.name!r} {process.end()}"
                item.resolve(ModelError(f"{how}, twice: the second time this input ran alone"))
            else:
                again.append(item)
        self._batcher.put_back(again)


def _environment(settings: Settings) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OPENCV_IO_MAX_IMAGE_PIXELS": str(settings.max_image_pixels)}
