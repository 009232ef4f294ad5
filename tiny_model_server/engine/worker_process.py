"""The front's end of one worker process: starts it, lets it load its model, runs batches in its slots."""

import asyncio
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tiny_model_server.codec import Encoded, Placed, dtype_of
from tiny_model_server.engine import children, placement
from tiny_model_server.engine.batcher import Batcher, Item, Outcome
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.engine.worker_connection import WorkerConnection
from tiny_model_server.errors import (
    DeadlineExceeded,
    ModelError,
    ModelUnavailable,
    Overloaded,
    ServerError,
    from_status,
)
from tiny_model_server.settings import ModelOptions, Settings
from tiny_model_server.shared_memory import Place, SharedBuffers, read_arrays, unnamed_file

log = logging.getLogger("tiny_model_server.worker_process")

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = str(Path(__file__).resolve().parent / "worker_path")
_LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.ETOOMANYREFS}
_RETRY_AFTER_MS = 100
_LOOK_S = 0.05  # how often to look for the end of a process where the system does not report it
_STUCK_S = 5.0  # for a process to end that has closed its connection


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
    """What a worker reported of its model: options in force, input shape (None for any), metadata, example, stages."""

    options: ModelOptions
    input_shape: list[int] | None
    metadata: dict[str, Any]
    example: Encoded | None
    stages: list[str]


class Misplaced(Exception):
    """The class declares other workers or devices than the process was started for. It must be started again."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options


def lacks(error: BaseException, *also: int) -> bool:
    """Whether the server itself lacks descriptors, memory or processes: nobody's fault, to be tried again."""
    if isinstance(error, OSError):
        return error.errno in _LACKS or error.errno in also
    return isinstance(error, MemoryError)


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(self, plugin: Plugin, settings: Settings, index: int, options: ModelOptions) -> None:
        """Starts the process of worker ``index``. ModelUnavailable or OSError if it cannot be started."""
        self._plugin, self._settings, self._index = plugin, settings, index
        self._placement = _placement(index, options)
        self._popen, self._control = _start(plugin, _environment(plugin, settings) | self._placement)
        self._loop = asyncio.get_running_loop()
        self._pidfd: int | None = None
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """How the process ended, as "was killed by SIGSEGV" or "exited with code 3"."""
        self.pid = 0
        """The worker's. The process that was started is its guardian."""
        self.slots: list[WorkerSlot] = []
        self.serves = False
        self._watch()

    async def load(self) -> Loaded:
        """Lets the process import, construct and warm up the model. ModelUnavailable gives the reason of a failure."""
        plugin = self._plugin
        options = ModelOptions().with_overrides(plugin.overrides)
        log_settings = {"log_level": self._settings.log_level, "log_format": self._settings.log_format}
        try:
            self._control.send({"name": plugin.name, "path": str(plugin.path), **log_settings})
            declared = await self._receive("declared", options.load_timeout_s)
            self.pid = declared["pid"]
            options = ModelOptions().declared(declared["options"]).with_overrides(plugin.overrides)
            facts = declared["metadata"], declared["example"], declared["stages"]
            if declared["stages"]:
                return Loaded(options, None, *facts)
            if _placement(self._index, options) != self._placement:
                raise Misplaced(options)
            self._control.send((options, placement.threads_for(options.workers)))
            return Loaded(options, await self._receive("ready", options.load_timeout_s), *facts)
        except (ModelUnavailable, Misplaced):
            raise
        except ValueError as error:
            raise ModelUnavailable(str(error)) from None
        except Exception as error:  # the worker has ended, or the model has written into its connection
            if lacks(error):
                raise
            raise ModelUnavailable(await self._end_of_loading(error)) from None

    def serve(self, options: ModelOptions, batcher: Batcher, metrics: ModelMetrics) -> None:
        """Gives the worker its slots, which take batches from now on. OSError if descriptors are missing."""
        theirs: list[int] = []
        try:
            for _ in range(options.concurrency):
                self.slots.append(WorkerSlot(self, options, batcher, metrics, theirs))
            self._control.send("slots", theirs)
        finally:
            for fd in theirs[::2]:
                os.close(fd)
        self.serves = True
        for slot in self.slots:
            batcher.idle(slot)

    def kill(self) -> None:
        """Kills the worker and what it has started: its guardian does it, which the model may have stopped."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._popen.send_signal(number)

    def retire(self) -> None:
        """Lets the worker end in good order: it closes its model."""
        for slot in self.slots:
            slot.close()

    async def end(self) -> list[Item]:
        """Kills the process, waits for its end and closes what belongs to it. Returns the items that it held."""
        self.kill()
        await asyncio.shield(self.ended)
        items = [item for slot in self.slots for item in slot.end()]
        self._control.close()
        children.forget(self._popen)
        return items

    async def _receive(self, expected: str, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                while (message := self._control.receive()) is None:
                    await _readable(self._control.socket)
        except TimeoutError:
            raise ModelUnavailable(f"it took longer than load_timeout_s={timeout_s:g} to load") from None
        kind, content = message[0]
        if kind != expected:
            raise ModelUnavailable(str(content))
        return content

    async def _end_of_loading(self, error: Exception) -> str:
        """Why a worker failed that reported no reason."""
        done, _ = await asyncio.wait([self.ended], timeout=_STUCK_S)
        if not done:
            return f"its worker closed or spoilt the connection to the server while loading ({error!r})"
        return f"its worker {self.ended.result()} while loading"

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self._popen.pid)
            self._loop.add_reader(self._pidfd, self._look)
        except (AttributeError, OSError):  # the system has no such thing, or no descriptor is free
            self._loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        code = self._popen.poll()
        if code is None:
            if self._pidfd is None:
                self._loop.call_later(_LOOK_S, self._look)
            return
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        hint = " (out of memory, or from outside)" if code == -signal.SIGKILL else ""
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}{hint}"
        if not self.ended.done():
            self.ended.set_result(how)


class WorkerSlot:
    """One of the batches that a worker process can run at once."""

    def __init__(
        self,
        process: WorkerProcess,
        options: ModelOptions,
        batcher: Batcher,
        metrics: ModelMetrics,
        theirs: list[int],
    ) -> None:
        """Adds the worker's descriptors to ``theirs``: a socket, which the caller closes, and the outbox."""
        self._process, self._batcher, self._metrics = process, batcher, metrics
        self.most = options.max_batch_size
        self._timeout_s = options.timeout_s
        self._loop = asyncio.get_running_loop()
        self._known: set[int] = set()  # names of the shared buffers that the worker maps
        self.batch: list[Item] = []
        self._begun = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._open = True
        self.retiring = False
        """True when the worker takes no more batches."""
        self._outbox = unnamed_file()
        try:
            ours, other = socket.socketpair()
        except OSError:
            os.close(self._outbox)
            raise
        ours.setblocking(False)
        theirs += other.detach(), self._outbox
        self._connection = WorkerConnection(ours)
        self._loop.add_reader(ours, self._on_readable)

    def start(self, batch: list[Item]) -> None:
        """Sends a batch, or one item that streams, to the worker."""
        self._begun = now = time.monotonic()
        self.batch = batch
        for item in batch:
            item.begun = now
            for buffers in item.buffers:
                buffers.holders += 1
        self._metrics.started([now - item.enqueued for item in batch])
        try:
            self._send(batch)
        except Exception as error:
            self._not_sent(error)
        else:
            self._limit(self._timeout_s, self._on_timeout)

    def close(self) -> None:
        """Takes no more batches. The worker ends when all its slots are closed."""
        if self._open:
            self._open = False
            self._batcher.remove(self)
            self._loop.remove_reader(self._connection.socket)
            self._connection.close()
            self._cancel_limit()

    def end(self) -> list[Item]:
        """After the end of the process: reads what it sent before. Returns the items that have no outcome."""
        if self._open:
            self._on_readable()
        self.close()
        batch = self._take_batch()
        os.close(self._outbox)
        return [item for item in batch if item.outcome is None]

    def _send(self, batch: list[Item]) -> None:
        fresh: dict[int, SharedBuffers] = {}
        items: list[Any] = []
        for item in batch:
            for buffers in item.buffers:
                if buffers.name not in self._known:
                    fresh[buffers.name] = buffers
            request, places = item.value.shared or (None, [])
            names = [buffers and buffers.name for buffers in (request, item.response)]
            items.append((item.value.text, places, item.json_only, *names))
        closed = self._known - SharedBuffers.open_names if fresh else set()
        met = [(buffers.name, buffers.caller_owned) for buffers in fresh.values()]
        fds = [fd for buffers in fresh.values() for fd in (buffers.request, buffers.response)]
        self._connection.send((batch[0].args, items, batch[0].stream is not None, met, closed), fds)
        self._known = (self._known - closed) | fresh.keys()

    def _not_sent(self, error: Exception) -> None:
        """Answers a batch that the worker did not get; if it has died, its supervisor does that."""
        if not lacks(error):
            if isinstance(error, OSError):
                return self._broken()
            log.error("a batch could not be sent to the worker", exc_info=error)
        outcome: ServerError = ModelError(f"the batch could not be sent: {type(error).__name__}: {error}")
        if lacks(error):
            log.error("the server lacks something to send a batch: %s", error)
            outcome = Overloaded(f"the server cannot send the input to its worker now: {error}", _RETRY_AFTER_MS)
        for item in self._take_batch():
            item.resolve(outcome)
        self._loop.call_soon(self._idle)

    def _on_readable(self) -> None:
        try:
            if message := self._connection.receive():
                self._on_message(message[0])
        except Exception as error:
            if not isinstance(error, (EOFError, ConnectionError)):
                self._unreadable(error)
            self._broken()

    def _on_message(self, message: Any) -> None:
        if len(message) == 3:
            return self._on_value(message)
        outcomes, seconds, retained, counted = message
        batch = self.batch
        found: list[Outcome] = [self._outcome(*pair) for pair in zip(outcomes, batch, strict=not batch[0].stream)]
        found = found or [Encoded("null", [])]
        self._cancel_limit()
        self._metrics.finished(self._begun, seconds, counted)
        self._take_batch(retained)
        following = self._batcher.next(self.most) if self._open and not self.retiring else []
        if following:
            self.start(following)
        for item, outcome in zip(batch, found, strict=True):  # while the worker is busy again
            item.resolve(outcome)
        if not following:
            self._idle()

    def _idle(self) -> None:
        if self._open and not self.batch and not self.retiring:
            self._batcher.idle(self)

    def _outcome(self, answer: tuple[str | None, str, list[Place]], item: Item) -> Outcome:
        status, text, places = answer
        if status:
            return from_status(status, text)
        if item.response and not item.stream:
            placed = [Placed(dtype_of(name), shape) for _, name, shape in places]
            return Encoded(text, placed, (item.response, places))
        return Encoded(text, read_arrays(self._outbox, places))

    def _on_value(self, message: tuple[str | None, str, list[Place]]) -> None:
        """A value of a stream: the worker waits until it may go on, which it may when there is room for more."""
        item = self.batch[0]
        item.repeatable = False
        stream, value = item.stream, self._outcome(message, item)
        assert stream
        if item.expired(time.monotonic()):
            return self._resume()
        idle_s = stream.idle_s
        self._limit(idle_s, partial(self._not_read, item, idle_s))
        stream.put(value, self._resume)
        if isinstance(value, ServerError):
            item.resolve(value)

    def _not_read(self, item: Item, idle_s: float) -> None:
        item.resolve(DeadlineExceeded(f"the caller read nothing of its stream for {idle_s:g} s (TMS_STREAM_IDLE_S)"))

    def _resume(self) -> None:
        if self._open and self.batch:
            self._limit(self._timeout_s, self._on_timeout)
            try:
                self._connection.send(not self.batch[0].expired(time.monotonic()))
            except OSError:
                self._broken()

    def _on_timeout(self) -> None:
        name = self._process._plugin.name
        for item in self.batch:
            item.resolve(DeadlineExceeded(f"model {name!r} took longer than its timeout_s={self._timeout_s:g}"))
        self._broken()

    def _unreadable(self, error: Exception) -> None:
        """Answers items whose outcomes are lost."""
        log.error("the outcomes of a batch cannot be read", exc_info=error)
        kind = ServerError if lacks(error) else ModelError
        for item in self.batch:
            item.resolve(kind(f"the model's answer cannot be read: {type(error).__name__}: {error}"))

    def _broken(self) -> None:
        """The worker can be of no more use. Its supervisor answers what it holds, when it has ended."""
        self.close()
        self._process.kill()

    def _take_batch(self, retained: "set[int] | frozenset[int]" = frozenset()) -> list[Item]:
        batch, self.batch = self.batch, []
        for item in batch:
            for buffers in item.buffers:
                buffers.retained |= buffers.name in retained
                buffers.release()
        return batch

    def _limit(self, seconds: float, on_time: Callable[[], None]) -> None:
        self._cancel_limit()
        self._timer = self._loop.call_later(seconds, on_time)

    def _cancel_limit(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


async def _readable(end: socket.socket) -> None:
    """Waits until something can be received."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(end, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(end)


def _placement(index: int, options: ModelOptions) -> dict[str, str]:
    return placement.environment(index, options.workers, options.devices, os.environ, placement.gpus())


def _environment(plugin: Plugin, settings: Settings) -> dict[str, str]:
    env = os.environ | {"OPENCV_IO_MAX_IMAGE_PIXELS": str(settings.max_image_pixels)}
    if plugin.interpreter == sys.executable:  # a model's own has its own packages, and must not see the server's
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return env


def _start(plugin: Plugin, env: dict[str, str]) -> tuple["subprocess.Popen[bytes]", WorkerConnection]:
    """A guardian, below which a worker starts, and the front's end of its control connection."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as opened:
        opened.callback(ours.close)
        ours.setblocking(False)
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
        return popen, WorkerConnection(ours)
