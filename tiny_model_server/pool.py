"""The workers of one model: spawn, watch, restart, stop. Each worker process has a thread that keeps it alive."""

import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tiny_model_server import devices
from tiny_model_server.awake import Waiter
from tiny_model_server.batcher import Batcher, Item, Outcome, Seat, resolve
from tiny_model_server.codec import Packed, Placed, dtype_of
from tiny_model_server.errors import Cancelled, DeadlineExceeded, ModelError, ModelUnavailable, ServerError, from_status
from tiny_model_server.load import ModelLoad
from tiny_model_server.pipe import Incomplete, Pipe
from tiny_model_server.settings import ModelOptions, Settings
from tiny_model_server.shm import Place, Segment, SharedBuffers
from tiny_model_server.tally import Tally

log = logging.getLogger("tiny_model_server.pool")

_ROOT = Path(__file__).resolve().parent.parent
_LONGEST_BACKOFF_S = 30.0  # between attempts to load
_LONGEST_CRASH_BACKOFF_S = 0.2  # between deaths of workers that could be loaded: inputs that kill must not stop others
_STUCK_S = 5  # a worker that begins a message and does not go on for so long is given up
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
    stages: list[str]


class _WorkerDied(Exception):
    pass


class _WorkerHung(Exception):
    pass


class _Misplaced(Exception):
    """The class declares other workers or devices than the process was spawned for: it must be spawned again."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options


class _Slot:
    """The front's end of a slot: sends a batch to the worker and waits for the outcomes."""

    def __init__(self, control: Connection) -> None:
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of one piece, not of a whole answer
                    ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STUCK_S, 0))
                self.pipe = Pipe(ours)
                self._inbox = Segment()
                undo.callback(self._inbox.close)
                self._outbox = Segment()
                undo.callback(self._outbox.close)
                for fd in (theirs.fileno(), self._inbox.fd, self._outbox.fd):
                    reduction.send_handle(control, fd, 0)
            undo.pop_all()  # from here on, ``close`` does it
        self._new_inbox = False
        self._known: set[int] = set()  # the callers' buffers that the worker maps, by name
        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        self._waiter = Waiter(lambda seconds: poll.poll(None if seconds is None else seconds * 1000))

    def send(self, batch: list[Item]) -> None:
        """Hands a batch, or one item that streams, to the worker; _WorkerDied if it is not there."""
        try:
            self._send(batch)
        except (EOFError, OSError) as error:
            raise _WorkerDied from error

    def ready(self, seconds: float) -> bool:
        """True when the worker has answered, False if it has not within this time."""
        return bool(self._waiter.wait(max(0.0, seconds)))

    def outcomes(self, batch: list[Item], timeout_s: float | None) -> tuple[list[Outcome], float, Tally]:
        """One outcome an item, the worker's seconds, what it counted; _WorkerDied or _WorkerHung if there is none.

        Without ``timeout_s`` the worker must be ``ready``; Incomplete if it has only begun to answer.
        """
        try:
            answers, seconds, kept, tally = self._receive(timeout_s)
        except (EOFError, OSError) as error:
            raise _WorkerDied from error
        self._note_kept(kept, batch)
        return [self._outcome(answer, item.lane) for answer, item in zip(answers, batch, strict=True)], seconds, tally

    def stream(self, item: Item, timeout_s: float) -> tuple[float, Tally]:
        """Puts what the model yields into the item's chunks, each within the time limit, while somebody wants it."""
        try:
            while len(answer := self._receive(timeout_s)) == 3:
                self.pipe.send(item.put_chunk(self._outcome(answer, None)))
            _, seconds, kept, tally = answer
            self._note_kept(kept, [item])
        except (EOFError, OSError) as error:
            raise _WorkerDied from error
        return seconds, tally

    def _send(self, batch: list[Item]) -> None:
        if self._new_inbox:
            old, self._inbox = self._inbox, Segment()
            old.close()
        copied = [array for item in batch if not item.packed.shared for array in item.packed.arrays]
        places = iter(self._inbox.write(copied))
        fresh: dict[int, SharedBuffers] = {}
        items = []
        for item in batch:
            buffers, where = item.packed.shared or (None, [next(places) for _ in item.packed.arrays])
            names = [self._name(one, fresh) for one in (buffers, item.lane)]
            items.append((item.packed.text, where, item.plain, *names))
        gone = [name for name in self._known if name not in SharedBuffers.open_names] if fresh else []
        streams, met = batch[0].chunks is not None, [(one.name, one.caller_owned) for one in fresh.values()]
        message = (batch[0].args, items, streams, self._new_inbox, met, gone)
        fds = [self._inbox.fd] if self._new_inbox else []
        for one in fresh.values():
            fds += one.request, one.response
        self.pipe.send(message, fds)
        if fresh:
            self._known = self._known.difference(gone).union(fresh)

    def _name(self, buffers: SharedBuffers | None, fresh: dict[int, SharedBuffers]) -> int | None:
        """What the worker calls a caller's buffers; they are sent along if the worker does not have them yet."""
        if buffers is None:
            return None
        if buffers.name not in self._known:
            fresh[buffers.name] = buffers
        return buffers.name

    def _note_kept(self, names: set[int | None], batch: list[Item]) -> None:
        self._new_inbox = None in names
        for item in batch:
            if (buffers := item.buffers) and buffers.name in names:
                buffers.retained = True

    def _receive(self, timeout_s: float | None) -> Any:
        if timeout_s is not None and not self.ready(timeout_s):
            raise _WorkerHung
        return self.pipe.receive(wait=timeout_s is not None)[0]

    def _outcome(self, answer: tuple[str | None, str, list[Place]], lane: SharedBuffers | None) -> Outcome:
        status, text, places = answer
        if status:
            return from_status(status, text)
        if lane:
            return Packed(text, [Placed(dtype_of(name), shape) for _, name, shape in places], (lane, places))
        return Packed(text, [array.copy() for array in self._outbox.read(places)])

    def close(self) -> None:
        """Closes socket and segments; after nobody uses them any more."""
        self.pipe.close()
        self._inbox.close()
        self._outbox.close()


class _Process:
    """One worker process, from spawn to death."""

    def __init__(self, plugin: Plugin, settings: Settings, index: int, options: ModelOptions) -> None:
        """Spawns the process for worker ``index`` under these options; OSError if that cannot be."""
        self._plugin = plugin
        self._settings = settings
        self._index = index
        self._placed = _placement(index, options)
        ours, theirs = socket.socketpair()
        with theirs, devices.on_all_cores():
            self.popen = subprocess.Popen(
                [plugin.interpreter, "-m", "tiny_model_server.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(settings) | self._placed,
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
            options = ModelOptions().declared(declared["options"]).with_overrides(plugin.overrides)
            facts = declared["metadata"], declared["example"], declared["stages"]
            if declared["stages"]:
                return Loaded(options, None, *facts)
            if _placement(self._index, options) != self._placed:
                raise _Misplaced(options)
            self._control.send((options, devices.threads_for(options.workers)))
            input_shape = self._hear("ready", options.load_timeout_s)
            for _ in range(options.concurrency):
                self.slots.append(_Slot(self._control))
        except ValueError as error:
            raise ModelUnavailable(str(error)) from None
        except (EOFError, OSError):
            raise ModelUnavailable(f"its worker {self.end()} while loading") from None
        self.ready = True
        return Loaded(options, input_shape, *facts)

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
        except (ProcessLookupError, PermissionError):  # macOS forbids it for a process that has ended
            pass

    def hang_up(self) -> None:
        """After death: ends what its slots wait for, and what the model may have left running."""
        self.kill()
        for slot in self.slots:
            slot.pipe.shutdown()

    def close(self) -> None:
        """After death, when nobody uses its slots any more: closes all descriptors."""
        self.kill()
        for slot in self.slots:
            slot.close()
        self._control.close()


class Pool:
    """Runs one model in worker processes that take from a batcher, until stopped."""

    def __init__(
        self,
        plugin: Plugin,
        batcher: Batcher,
        load: ModelLoad,
        settings: Settings,
        changed: Callable[[str | None], None],
    ) -> None:
        """``changed`` hears why no worker can be started any more, and None when one runs again."""
        self.name = plugin.name
        self.load = load
        self._plugin = plugin
        self._batcher = batcher
        self._options = ModelOptions().with_overrides(plugin.overrides)
        self._settings = settings
        self._changed = changed
        self._stopping = threading.Event()
        self._draining = False
        self._served = False
        self._lock = threading.Lock()
        self._processes: dict[int, _Process] = {}
        self._keepers: list[threading.Thread] = []
        self.suspects = threading.Lock()  # inputs that a worker died on run again one at a time

    def start(self) -> Loaded:
        """Starts all workers and waits until every one is ready; ModelUnavailable says why one is not."""
        loaded = self._start_keeper(0)()
        if loaded.stages:
            return loaded
        self.load.serves(loaded.options.max_batch_size, loaded.options.workers * loaded.options.concurrency)
        try:
            for wait in [self._start_keeper(index) for index in range(1, loaded.options.workers)]:
                wait()
        except ModelUnavailable:
            self.stop(grace_s=0)
            raise
        return loaded

    def stop(self, grace_s: float, *, drain: bool = False) -> None:
        """Lets running batches finish for ``grace_s`` seconds, then kills; returns when all processes are gone.

        With ``drain``, workers first run what the closed batcher still holds.
        """
        deadline = time.monotonic() + grace_s
        self._draining = drain
        if not (drain and self._served):
            self._stop_taking()
        self._batcher.wake()
        for keeper in self._keepers:
            keeper.join(max(0.0, deadline - time.monotonic()))
        self._stop_taking()
        for process in self._running():
            process.kill()
        for keeper in self._keepers:
            keeper.join()

    def _stop_taking(self) -> None:
        with self._lock:
            self._stopping.set()
            loading = [process for process in self._processes.values() if not process.ready]
        for process in loading:
            process.kill()
        self._batcher.wake()

    @property
    def stopping(self) -> bool:
        """True when nothing more is to be run."""
        return self._stopping.is_set()

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
                if loaded.stages:
                    self._bury(index, process)
                    return report(loaded)
            except _Misplaced as error:
                self._options = error.options
                self._bury(index, process)
                continue
            except ModelUnavailable as error:
                self._bury(index, process)
                if not served:
                    return report(error)
                if self._stopping.is_set():
                    break
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
                served = self._served = True
                self._serve_until_death(process, loaded.options)
                self._bury(index, process)
                if not self._leaving():
                    self.load.restarted()
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
                if self._leaving():
                    return None
                try:
                    process = _Process(self._plugin, self._settings, index, self._options)
                except OSError as error:
                    log.error("model %s: cannot spawn a worker: %s", self._plugin.name, error)
                else:
                    self._processes[index] = process
                    return process
            self._stopping.wait(1)

    def _leaving(self) -> bool:
        return self._stopping.is_set() or (self._draining and self._batcher.depth == 0)

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
        process.hang_up()
        self._batcher.wake()
        for thread in threads:
            thread.join()

    def _serve(self, process: _Process, slot: _Slot, options: ModelOptions) -> None:
        """Takes batches and runs them in one slot, until the worker is dead or the pool stops."""
        shift = _Shift(self, process, slot, options)
        while (batch := self._batcher.take(options.max_wait_ms / 1000, shift)) is not None:
            if batch:
                with self.suspects if batch[0].attempts else nullcontext():
                    shift.begin(batch)
                    resolve(shift.finish())
                    batch.clear()
            else:
                resolve(shift.finish())
                self._batcher.take_back(shift)
        slot.pipe.shutdown()  # at which the worker ends

    def after_death(self, process: _Process, batch: list[Item]) -> None:
        """Queues the items that the worker held once more, each alone; one that has been alone twice fails."""
        again = []
        for item in batch:
            item.attempts += 1
            if item.attempts == 1 and not item.once:
                again.append(item)
                continue
            twice = ", twice: the second time this input ran alone" if item.attempts > 1 else ""
            item.resolve(ModelError(f"the worker of model {self.name!r} {process.end()}{twice}"))
        self._batcher.put_back(again)


class _Shift(Seat):
    """Runs batches in one slot, one after the other: in the thread that keeps it, or in that of who has borrowed it."""

    def __init__(self, pool: Pool, process: _Process, slot: _Slot, options: ModelOptions) -> None:
        self._pool, self._process, self._slot, self._options = pool, process, slot, options
        self.most = options.max_batch_size
        self._batch: list[Item] = []
        self._started = 0.0
        self._broken = False

    def fileno(self) -> int:
        """The descriptor of the socket to the worker."""
        return self._slot.pipe.fileno()

    def leave(self) -> bool:
        """True when the pool stops, or the worker is of no more use."""
        return self._pool.stopping or self._broken or self._process.popen.returncode is not None

    def begin(self, batch: list[Item]) -> None:
        """Hands a batch to the worker."""
        now = time.monotonic()
        for item in batch:
            item.begun = now
        self._batch = batch = self._hold(batch)
        self._started, self.limit = now, now + self._options.timeout_s
        if not batch:
            return
        try:
            self._slot.send(batch)
        except Exception as error:
            self._fail(error)
        self._pool.load.started([now - item.enqueued for item in batch])

    def wait(self, deadline: float) -> bool:
        """Waits until ``finish`` will not, or not for long; False if ``deadline`` comes first."""
        return (
            self._broken or not self._batch or deadline >= self.limit or self._slot.ready(deadline - time.monotonic())
        )

    def finish(self, *, ready: bool = False) -> Iterable[tuple[Item, Outcome]]:
        """The items to be resolved and their outcomes; waits for the worker.

        If it is known to be ``ready``, nothing is waited for: Incomplete if it has only begun to answer.
        """
        batch, slot, options = self._batch, self._slot, self._options
        if self._broken or not batch:
            return ()
        try:
            if batch[0].chunks is not None:
                seconds, tally = slot.stream(batch[0], options.timeout_s)
                outcomes: list[Outcome] = [Packed("null", [])]
            else:
                outcomes, seconds, tally = slot.outcomes(batch, None if ready else self.limit - time.monotonic())
        except Incomplete:
            raise
        except Exception as error:
            self._fail(error)
            return ()
        self._pool.load.finished(self._started, seconds, tally)
        self._batch = []
        self._release(batch)
        return zip(batch, outcomes, strict=True)

    def _hold(self, batch: list[Item]) -> list[Item]:
        """The items of the batch whose callers are there; their buffers stay open until ``_release``."""
        held = []
        for item in batch:
            if item.buffers is None or item.buffers.hold():
                held.append(item)
            else:
                item.resolve(Cancelled("the caller went away"))
        return held

    def _release(self, batch: list[Item]) -> None:
        for item in batch:
            if item.buffers is not None:
                item.buffers.release()

    def _fail(self, error: Exception) -> None:
        """Gives the items of a batch that came to nothing their outcomes, or another chance."""
        self._broken = True
        batch, self._batch, name = self._batch, [], self._pool.name
        self._process.kill()
        self._release(batch)
        if isinstance(error, _WorkerDied):
            return self._pool.after_death(self._process, batch)
        outcome: ServerError
        if isinstance(error, _WorkerHung):
            outcome = DeadlineExceeded(f"model {name!r} took longer than its timeout_s={self._options.timeout_s:g}")
        else:  # no memory for the batch, an answer that cannot be read: nobody may hang on it
            log.error("model %s: a batch could not be handed over or read back", name, exc_info=error)
            outcome = ModelError(f"the batch could not be handed over: {type(error).__name__}: {error}")
        for item in batch:
            item.resolve(outcome)


def resident_memory(pid: int) -> int:
    """Bytes of a process that are in memory; 0 if it is gone or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _placement(index: int, options: ModelOptions) -> dict[str, str]:
    return devices.environment(index, options.workers, options.devices, os.environ, devices.gpus())


def _environment(settings: Settings) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OPENCV_IO_MAX_IMAGE_PIXELS": str(settings.max_image_pixels)}
