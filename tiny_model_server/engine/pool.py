"""The workers of one model: spawn, watch, restart, stop. Each worker process has a thread that keeps it alive."""

import errno
import logging
import os
import pickle
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

from tiny_model_server.codec import Encoded, Placed, dtype_of
from tiny_model_server.custom_metrics import CustomMetrics
from tiny_model_server.engine import children, placement
from tiny_model_server.engine.batcher import Batcher, Item, Outcome, Seat, resolve
from tiny_model_server.engine.busy_polling import Waiter
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.engine.worker_connection import Incomplete, Pipe
from tiny_model_server.errors import (
    Cancelled,
    DeadlineExceeded,
    ModelError,
    ModelUnavailable,
    Overloaded,
    ServerError,
    from_status,
)
from tiny_model_server.settings import ModelOptions, Settings
from tiny_model_server.shared_memory import Place, Segment, SharedBuffers

log = logging.getLogger("tiny_model_server.pool")

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = str(Path(__file__).resolve().parent / "worker_path")
_LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.ETOOMANYREFS}
_LONGEST_LACK_BACKOFF_S = 1.0  # between attempts while the server itself lacks something
_LACK_S = 1.0  # a model without a worker for want of such is FAILED after so long
_RETRY_AFTER_MS = 100
_LONGEST_FIRST_MESSAGE = 1 << 30  # of a worker that loads, in bytes
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
    example: Encoded | None
    stages: list[str]


class _WorkerDied(Exception):
    pass


class _WorkerHung(Exception):
    pass


class _Misplaced(Exception):
    """The class declares other workers or devices than the process was spawned for: it must be spawned again."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options


class Lacking(Exception):
    """The server itself lacks descriptors, memory, threads or processes: nobody's fault, to be tried again."""


def lacks(error: BaseException, also: int = 0) -> bool:
    """True if an error says that the server lacks something, not that a worker or a model did something wrong."""
    if isinstance(error, OSError):
        return error.errno in _LACKS or error.errno == also
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return no_thread or isinstance(error, (MemoryError, Lacking))


class _Slot:
    """The front's end of a slot: sends a batch to the worker and waits for the outcomes."""

    def __init__(self, control: Connection) -> None:
        ours, theirs = socket.socketpair()
        self.pipe = Pipe(ours)
        with theirs, ExitStack() as opened:
            opened.callback(ours.close)
            _limit_waits(ours)
            self._inbox = Segment()
            opened.callback(self._inbox.close)
            self._outbox = Segment()
            opened.callback(self._outbox.close)
            for fd in (theirs.fileno(), self._inbox.fd, self._outbox.fd):
                reduction.send_handle(control, fd, 0)
            opened.pop_all()
        self._new_inbox = False
        self._known: set[int] = set()  # the callers' buffers that the worker maps, by name
        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        self._waiter = Waiter(lambda seconds: poll.poll(None if seconds is None else seconds * 1000))

    def send(self, batch: list[Item]) -> None:
        """Hands a batch, or one item that streams, to the worker; _WorkerDied if it is not there.

        Lacking if the server cannot do it now; the worker then is as it was, unless ``pipe.whole`` is False.
        """
        try:
            self._send(batch)
        except (EOFError, OSError, MemoryError) as error:
            raise _lack_or_death(error) from error

    def ready(self, seconds: float) -> bool:
        """True when the worker has answered, False if it has not within this time."""
        return bool(self._waiter.wait(max(0.0, seconds)))

    def outcomes(self, batch: list[Item], timeout_s: float | None) -> tuple[list[Outcome], float, CustomMetrics]:
        """One outcome an item, the worker's seconds, what it counted; _WorkerDied or _WorkerHung if there is none.

        Without ``timeout_s`` the worker must be ``ready``; Incomplete if it has only begun to answer.
        """
        try:
            answers, seconds, kept, tally = self._receive(timeout_s)
        except (EOFError, OSError) as error:
            raise _lack_or_death(error) from error
        self._note_kept(kept, batch)
        return [self._outcome(answer, item.lane) for answer, item in zip(answers, batch, strict=True)], seconds, tally

    def stream(self, item: Item, timeout_s: float) -> tuple[float, CustomMetrics]:
        """Puts what the model yields into the item's chunks, each within the time limit, while somebody wants it."""
        try:
            while len(answer := self._receive(timeout_s)) == 3:
                self.pipe.send(item.put_chunk(self._outcome(answer, None)))
            _, seconds, kept, tally = answer
            self._note_kept(kept, [item])
        except (EOFError, OSError) as error:
            raise _lack_or_death(error) from error
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
            return Encoded(text, [Placed(dtype_of(name), shape) for _, name, shape in places], (lane, places))
        return Encoded(text, [array.copy() for array in self._outbox.read(places)])

    def close(self) -> None:
        """Closes socket and segments; after nobody uses them any more."""
        self.pipe.close()
        self._inbox.close()
        self._outbox.close()


class _Process:
    """One worker process, from spawn to death."""

    def __init__(self, plugin: Plugin, settings: Settings, index: int, options: ModelOptions) -> None:
        """Spawns the process for worker ``index`` under these options; ModelUnavailable or OSError if it can't be."""
        self._plugin = plugin
        self._settings = settings
        self._index = index
        self._placed = _placement(index, options)
        self.popen, self._control = _start(plugin, _environment(plugin, settings) | self._placed)
        self.pid = 0
        """The worker, once it has told; ``popen`` is its guardian."""
        self.slots: list[_Slot] = []
        self.ready = False

    def load(self) -> Loaded:
        """Lets the process import, construct and warm up the model; ModelUnavailable says why that failed.

        Lacking, or an error of the same kind, if the server itself lacks something.
        """
        plugin = self._plugin
        options = ModelOptions().with_overrides(plugin.overrides)
        spec = {
            "name": plugin.name,
            "path": str(plugin.path),
            "log_level": self._settings.log_level,
            "log_format": self._settings.log_format,
        }
        try:
            self._control.send(spec)
            declared = self._hear("declared", options.load_timeout_s)
            self.pid = declared["pid"]
            options = ModelOptions().declared(declared["options"]).with_overrides(plugin.overrides)
            facts = declared["metadata"], declared["example"], declared["stages"]
            if declared["stages"]:
                return Loaded(options, None, *facts)
            if _placement(self._index, options) != self._placed:
                raise _Misplaced(options)
            self._control.send((options, placement.threads_for(options.workers)))
            input_shape = self._hear("ready", options.load_timeout_s)
            for _ in range(options.concurrency):
                self.slots.append(_Slot(self._control))
        except (ModelUnavailable, _Misplaced):
            raise
        except ValueError as error:
            raise ModelUnavailable(str(error)) from None
        except (EOFError, OSError) as error:
            if lacks(error):
                raise
            raise ModelUnavailable(self._end_of_loading(error)) from None
        except (pickle.UnpicklingError, KeyError, TypeError, AttributeError, ImportError, IndexError) as error:
            raise ModelUnavailable(self._end_of_loading(error)) from None
        return Loaded(options, input_shape, *facts)

    def _hear(self, expected: str, timeout_s: float) -> Any:
        if not self._control.poll(timeout_s):
            raise ModelUnavailable(f"it took longer than load_timeout_s={timeout_s:g} to load")
        kind, content = pickle.loads(self._control.recv_bytes(_LONGEST_FIRST_MESSAGE))
        if kind != expected:
            raise ModelUnavailable(str(content))
        return content

    def _end_of_loading(self, error: Exception) -> str:
        """Why a worker that did not say anything sensible while loading failed."""
        try:
            self.popen.wait(_STUCK_S)
        except subprocess.TimeoutExpired:
            return f"its worker closed or spoilt the connection to the server while loading ({error!r})"
        return f"its worker {self.end()} while loading"

    def end(self) -> str:
        """How the process ended, as "was killed by SIGSEGV" or "exited with code 3"; waits for it."""
        code = self.popen.wait()
        if code >= 0:
            return f"exited with code {code}"
        hint = " (out of memory, or from outside)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def kill(self) -> None:
        """Kills the worker and what it has started: its guardian does it, who may have been stopped by the model."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.popen.send_signal(number)

    def hang_up(self) -> None:
        """Ends what its slots wait for, and the connection by which its guardian knows that the front is there."""
        for slot in self.slots:
            slot.pipe.shutdown()
        self._control.close()

    def close(self) -> None:
        """Closes its slots, after death, when nobody uses them any more."""
        for slot in self.slots:
            slot.close()


class Pool:
    """Runs one model in worker processes that take from a batcher, until stopped."""

    def __init__(
        self,
        plugin: Plugin,
        batcher: Batcher,
        load: ModelMetrics,
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
        return [process.pid for process in self._running() if process.ready]

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
        try:
            keeper.start()
        except RuntimeError as error:
            raise ModelUnavailable(f"the server cannot watch over a worker: {error}") from None
        self._keepers.append(keeper)
        return wait

    def _keep(self, index: int, report: Callable[[Loaded | ModelUnavailable], None]) -> None:
        """The life of one worker: spawn, serve until it dies, again. Ends when stopped or when the first load fails."""
        life = _Life()
        while not self._leaving():
            try:
                if self._live(index, life, report):
                    return
            except _Misplaced as error:
                self._options = error.options
            except ModelUnavailable as error:
                if not life.served:
                    return report(error)
                self._failed(life, error)
            except Exception as error:  # of the server itself; whatever it is, the model is to come back
                if not life.served and not self._may_pass(life, error):
                    reason = f"the server cannot start a worker: {type(error).__name__}: {error}"
                    return report(ModelUnavailable(reason))
                self._lacked(life, error)
            self._stopping.wait(life.pause_s)
        if not life.served:
            report(ModelUnavailable("the server is stopping"))

    def _live(self, index: int, life: "_Life", report: Callable[[Loaded | ModelUnavailable], None]) -> bool:
        """One process, from spawn to death; True if there shall be no other."""
        process = self._spawn(index)
        if process is None:
            return False
        loaded = None
        try:
            loaded = process.load()
            if not loaded.stages:
                self._serve_until_death(process, loaded, life, report)
        finally:
            self._bury(index, process)
        if loaded.stages:
            report(loaded)
            return True
        if not self._leaving():
            self.load.restarted()
            log.error("model %s: worker %d %s; restarting it", self.name, process.pid, process.end())
            life.died()
        return False

    def _failed(self, life: "_Life", error: ModelUnavailable) -> None:
        """Notes that a worker could not be restarted, as far as its model can tell."""
        if self._stopping.is_set():
            return
        life.failed()
        log.error("model %s: a worker cannot be restarted: %s", self.name, error)
        if not self.pids:
            self._tell(str(error))

    def _may_pass(self, life: "_Life", error: Exception) -> bool:
        """True if a first load is to be tried again after an error of the server itself."""
        return lacks(error, errno.EAGAIN) and time.monotonic() - life.begun < self._options.load_timeout_s

    def _lacked(self, life: "_Life", error: Exception) -> None:
        """Notes an error of the server itself, which is nobody's failure and may pass at any moment."""
        if lacks(error, errno.EAGAIN):
            log.error("model %s: the server cannot run a worker now, and tries again: %s: %s", self.name,
                      type(error).__name__, error)  # fmt: skip
        else:
            log.error("model %s: an error while a worker was looked after", self.name, exc_info=error)
        life.lacked()
        if life.served and not self.pids and time.monotonic() - life.lacks_since >= _LACK_S:
            self._tell(f"the server cannot start a worker: {error}")

    def _tell(self, reason: str | None) -> None:
        try:
            self._changed(reason)
        except Exception:
            log.exception("model %s: its state could not be told", self.name)

    def _spawn(self, index: int) -> _Process | None:
        """A new process, known to ``stop`` from the start; None when stopping."""
        with self._lock:
            if self._leaving():
                return None
            process = self._processes[index] = _Process(self._plugin, self._settings, index, self._options)
            return process

    def _leaving(self) -> bool:
        return self._stopping.is_set() or (self._draining and self._batcher.depth == 0)

    def _bury(self, index: int, process: _Process) -> None:
        process.kill()
        process.hang_up()
        process.popen.wait()
        process.close()
        with self._lock:
            self._processes.pop(index, None)
        children.forget(process.popen)

    def _serve_until_death(
        self, process: _Process, loaded: Loaded, life: "_Life", report: Callable[[Loaded | ModelUnavailable], None]
    ) -> None:
        threads = [threading.Thread(target=self._serve, args=(process, slot, loaded.options)) for slot in process.slots]
        begun = []
        try:
            for thread in threads:
                thread.start()
                begun.append(thread)
            process.ready = True
            first = not life.served
            life.serves()
            self._served = True
            if first:
                report(loaded)
            else:
                self._tell(None)
            process.popen.wait()
        finally:
            process.kill()
            process.hang_up()
            process.popen.wait()
            self._batcher.wake()
            for thread in begun:
                thread.join()

    def _serve(self, process: _Process, slot: _Slot, options: ModelOptions) -> None:
        """Takes batches and runs them in one slot, until the worker is dead or the pool stops."""
        shift = _Shift(self, process, slot, options)
        try:
            while self._serve_once(shift, options):
                pass
        finally:
            slot.pipe.shutdown()  # at which the worker ends

    def _serve_once(self, shift: "_Shift", options: ModelOptions) -> bool:
        batch: list[Item] | None = []
        try:
            batch = self._batcher.take(options.max_wait_ms / 1000, shift)
            if batch:
                with self.suspects if batch[0].attempts else nullcontext():
                    shift.begin(batch)
                    resolve(shift.finish())
                    batch.clear()
            elif batch is not None:
                resolve(shift.finish())
                self._batcher.take_back(shift)
            return batch is not None
        except Exception as error:  # no caller is to wait for what this thread has dropped
            log.exception("model %s: an error while a batch was looked after", self.name)
            for item in batch or []:
                item.resolve(ServerError(f"the server failed: {type(error).__name__}: {error}"))
            shift.give_up()
            return True

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


class _Life:
    """What has become of the processes of one worker so far, and how long to wait for the next attempt."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.served = False
        self.pause_s = 0.0
        self.lacks_since = 0.0
        self._failures = 0
        self._lacks = 0

    def serves(self) -> None:
        """Notes that a process serves."""
        self.served = True
        self.begun = time.monotonic()
        self._lacks = 0

    def died(self) -> None:
        """Notes that a process which served has died."""
        self._failures = 0 if time.monotonic() - self.begun > _STABLE_S else self._failures + 1
        self._wait(self._failures, _LONGEST_CRASH_BACKOFF_S)

    def failed(self) -> None:
        """Notes that a process could not load the model."""
        self._failures += 1
        self._wait(self._failures, _LONGEST_BACKOFF_S)

    def lacked(self) -> None:
        """Notes that the server itself could not do its part."""
        if not self._lacks:
            self.lacks_since = time.monotonic()
        self._lacks += 1
        self._wait(self._lacks + 1, _LONGEST_LACK_BACKOFF_S)

    def _wait(self, times: int, longest_s: float) -> None:
        self.pause_s = min(longest_s, 0.05 * 2 ** min(times, 30)) if times > 1 else 0.0


class _Shift(Seat):
    """Runs batches in one slot, one after the other: in the thread that keeps it, or in that of who has borrowed it."""

    def __init__(self, pool: Pool, process: _Process, slot: _Slot, options: ModelOptions) -> None:
        self._pool, self._process, self._slot, self._options = pool, process, slot, options
        self.most = options.max_batch_size
        self._batch: list[Item] = []
        self._started = 0.0
        self._broken = self._sent = False

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
        self._sent = False
        if not batch:
            return
        try:
            self._slot.send(batch)
            self._sent = True
        except Exception as error:
            self._fail(error)
        self._pool.load.started([now - item.enqueued for item in batch])

    def wait(self, deadline: float) -> bool:
        """Waits until ``finish`` will not, or not for long; False if ``deadline`` comes first."""
        if self._broken or not self._batch or deadline >= self.limit:
            return True
        return self._slot.ready(deadline - time.monotonic())

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
                outcomes: list[Outcome] = [Encoded("null", [])]
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

    def give_up(self) -> None:
        """Lets the worker be replaced, after an error that left nobody knowing what it does."""
        self._broken = True
        batch, self._batch = self._batch, []
        self._release(batch)
        self._process.kill()

    def _fail(self, error: Exception) -> None:
        """Gives the items of a batch that came to nothing their outcomes, or another chance."""
        batch, self._batch, name = self._batch, [], self._pool.name
        self.limit = 0.0  # who waits for the worker need not
        lacking = lacks(error)
        self._broken = not (lacking and self._slot.pipe.whole)
        if self._broken:
            self._process.kill()
        self._release(batch)
        if isinstance(error, _WorkerDied):
            return self._pool.after_death(self._process, batch)
        outcome: ServerError
        if isinstance(error, _WorkerHung):
            outcome = DeadlineExceeded(f"model {name!r} took longer than its timeout_s={self._options.timeout_s:g}")
        elif lacking and not self._sent:  # not run, so the caller may come again
            log.error("model %s: the server lacks something to hand a batch over: %s", name, error)
            outcome = Overloaded(f"the server cannot hand the input over now: {error}", _RETRY_AFTER_MS)
        elif lacking:
            log.error("model %s: the server lacks something to read an answer: %s", name, error)
            outcome = ServerError(f"the server cannot read the model's answer now: {error}")
        else:  # an answer that cannot be read: nobody may hang on it
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
    return placement.environment(index, options.workers, options.devices, os.environ, placement.gpus())


def _environment(plugin: Plugin, settings: Settings) -> dict[str, str]:
    env = os.environ | {"OPENCV_IO_MAX_IMAGE_PIXELS": str(settings.max_image_pixels)}
    if plugin.interpreter == sys.executable:  # a model's own has its own packages, and must not see the server's
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return env


def _start(plugin: Plugin, env: dict[str, str]) -> tuple["subprocess.Popen[bytes]", Connection]:
    """A guardian below which a worker starts, and the front's end of its control socket."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as opened:
        opened.callback(ours.close)
        _limit_waits(ours)
        try:
            with placement.on_all_cores():
                popen = children.spawn(
                    [plugin.interpreter, _WORKER, str(theirs.fileno())],
                    env,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C in the terminal is for the front alone
                )
        except OSError as error:
            if lacks(error, errno.EAGAIN):
                raise
            raise ModelUnavailable(f"its interpreter {plugin.interpreter} cannot be started: {error}") from None
        opened.pop_all()
        return popen, Connection(ours.detach())


def _limit_waits(end: socket.socket) -> None:
    """Lets no read or write of one piece (not of a whole message) take longer than _STUCK_S."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STUCK_S, 0))


def _lack_or_death(error: Exception) -> Exception:
    return Lacking(str(error) or type(error).__name__) if lacks(error) else _WorkerDied()
