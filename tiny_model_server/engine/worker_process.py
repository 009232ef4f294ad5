"""The front's end of one worker process: starts it, lets it load its model, and ends it."""

import asyncio
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiny_model_server.codec import ARRAY, Encoded, dtype_name, has_shape
from tiny_model_server.engine import children, placement
from tiny_model_server.engine.batcher import Batcher, Item
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.engine.worker_connection import WorkerConnection, lacks
from tiny_model_server.engine.worker_output import KEPT, WorkerOutput
from tiny_model_server.engine.worker_slot import WorkerSlot
from tiny_model_server.errors import InvalidInput, ModelUnavailable
from tiny_model_server.settings import ModelOptions, Settings

log = logging.getLogger("tiny_model_server.worker_process")

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = str(Path(__file__).resolve().parent / "worker_path")
_LOOK_S = 0.05  # how often to look for the end of a process where the system does not report it
_STUCK_S = 5.0  # for a process to end that has closed its connection


@dataclass(frozen=True)
class Plugin:
    """A model folder: what a worker imports."""

    name: str
    path: Path
    overrides: dict[str, Any]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT), compare=False)
    """The last lines that its workers have logged and printed."""

    @property
    def interpreter(self) -> str:
        """The Python of the folder's own .venv if it has one, else the server's."""
        own = self.path / ".venv" / "bin" / "python"
        return str(own) if own.exists() else sys.executable


@dataclass(frozen=True)
class Loaded:
    """What a worker reported of its model: options in force, input shape (None for any), metadata, example, stages.

    ``schema``: the JSON schemas of "data", "args" and "answer".
    ``is_async``: it runs on an event loop, so that its calls can be cancelled.
    """

    options: ModelOptions
    input_shape: list[int] | None
    metadata: dict[str, Any]
    example: Encoded | None
    stages: list[str]
    schema: dict[str, Any]
    is_async: bool = False

    def check_input(self, value: Encoded, what: str = "") -> None:
        """InvalidInput, which begins with ``what``, if an array does not fit the only input that is declared."""
        inputs = self.metadata.get("inputs") or []
        if len(inputs) != 1 or len(value.arrays) != 1 or value.text != ARRAY:
            return
        array, dtype, shape = value.arrays[0], inputs[0].get("dtype"), inputs[0].get("shape")
        if not has_shape(array, shape) or dtype not in (None, dtype_name(array.dtype)):
            wanted = f"{dtype or 'any dtype'} of shape {shape or 'any'} (-1: any size)" if dtype != "str" else "a text"
            found = f"{dtype_name(array.dtype)} of shape {list(array.shape)}"
            raise InvalidInput(f"{what}the model takes {wanted}, not {found}")


class Misplaced(Exception):
    """The class declares other workers or devices than the process was started for. It must be started again."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(self, plugin: Plugin, settings: Settings, index: int, options: ModelOptions) -> None:
        """Starts the process of worker ``index``, counted in all replicas. ModelUnavailable or OSError if it cannot."""
        self._plugin, self._settings, self._index = plugin, settings, index
        self._placement = self._place(options)
        self._popen, self._control, output = _start(plugin, _environment(plugin, settings) | self._placement)
        self._output = WorkerOutput(output, {"model": plugin.name, "worker": index}, plugin.lines)
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
        plugin, settings = self._plugin, self._settings
        options = ModelOptions(**plugin.overrides)
        log_as = (settings.log_level, settings.log_format, self._output.mark, self._output.origin)
        try:
            self._control.send({"name": plugin.name, "path": str(plugin.path), "log": log_as})
            declared = await self._receive("declared", options.load_timeout_s)
            self.pid = self._output.origin["pid"] = declared["pid"]
            options = replace(ModelOptions().declared(declared["options"]), **plugin.overrides)
            facts = {name: declared[name] for name in ("metadata", "example", "stages", "schema", "is_async")}
            loaded = Loaded(options, None, **facts)
            if loaded.stages:
                return loaded
            if loaded.example is not None:
                loaded.check_input(loaded.example, "its example does not fit its metadata: ")
            if self._place(options) != self._placement:
                raise Misplaced(options)
            self._control.send((options, placement.threads_for(self._workers(options))))
            return replace(loaded, input_shape=await self._receive("ready", options.load_timeout_s))
        except (ModelUnavailable, Misplaced):
            raise
        except (ValueError, InvalidInput) as error:
            raise ModelUnavailable(str(error)) from None
        except Exception as error:  # the worker has ended, or the model has written into its connection
            if lacks(error):
                raise
            raise ModelUnavailable(await self._end_of_loading(error)) from None

    def serve(self, loaded: Loaded, batcher: Batcher, metrics: ModelMetrics) -> None:
        """Gives the worker its slots, which take batches from now on. OSError if descriptors are missing."""
        name, options = self._plugin.name, loaded.options
        try:
            for _ in range(options.concurrency):
                self.slots.append(WorkerSlot(name, options, batcher, metrics, self.kill))
                self.slots[-1].cancels = loaded.is_async
            self._control.send("slots", [fd for slot in self.slots for fd in (slot.theirs.fileno(), slot.response)])
        finally:
            for slot in self.slots:
                slot.theirs.close()
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
        self._output.close()
        self._control.close()
        children.forget(self._popen)
        return items

    def _place(self, options: ModelOptions) -> dict[str, str]:
        workers, found = self._workers(options), placement.gpus()
        return placement.environment(self._index, workers, options.devices, os.environ, found)

    def _workers(self, options: ModelOptions) -> int:
        """The model's workers in all replicas."""
        return max(options.workers, self._settings.sharing)

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
        if not self.ended.done():
            self.ended.set_result(children.how_ended(code))


async def _readable(end: socket.socket) -> None:
    """Waits until something can be received."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(end, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(end)


def _environment(plugin: Plugin, settings: Settings) -> dict[str, str]:
    env = os.environ | {"OPENCV_IO_MAX_IMAGE_PIXELS": str(settings.max_image_pixels)}
    if plugin.interpreter == sys.executable:  # a model's own has its own packages, and must not see the server's
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return env


def _start(plugin: Plugin, env: dict[str, str]) -> tuple["subprocess.Popen[bytes]", WorkerConnection, int]:
    """A guardian, below which a worker starts, and the front's ends of its control connection and of its output."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as opened, ExitStack() as given:
        opened.callback(ours.close)
        ours.setblocking(False)
        reader, writer = os.pipe()
        opened.callback(os.close, reader)
        given.callback(os.close, writer)
        try:
            with placement.on_all_cores():
                popen = children.spawn(
                    [plugin.interpreter, _WORKER, str(theirs.fileno())],
                    env,
                    stdin=subprocess.DEVNULL,
                    stdout=writer,
                    stderr=writer,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C in the terminal is for the front alone
                )
        except OSError as error:
            if lacks(error, errno.EAGAIN):
                raise
            raise ModelUnavailable(f"its interpreter {plugin.interpreter} cannot be started: {error}") from None
        opened.pop_all()
        return popen, WorkerConnection(ours), reader
