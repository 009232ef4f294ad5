"""The workers of one model: a supervisor for each starts it, waits for its end, and starts another one."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tiny_model_server.engine.batcher import Batcher, Item
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.engine.worker_connection import lacks
from tiny_model_server.engine.worker_process import Loaded, Misplaced, Plugin, WorkerProcess
from tiny_model_server.errors import ModelError, ModelUnavailable
from tiny_model_server.settings import ModelOptions, Settings

log = logging.getLogger("tiny_model_server.pool")

_LACK_S = 1.0  # a model that has no worker for so long because the server lacks something is FAILED
_STABLE_S = 10.0  # a worker that lived this long and then died is replaced at once
_LOOK_S = 0.005  # while the pool stops
_LONGEST_BACKOFF_S = {"load": 30.0, "crash": 0.2, "lack": 1.0}  # a crash is an input's fault, and must not stop others


class Pool:
    """Runs one model in worker processes that take batches from a batcher, until stopped."""

    def __init__(
        self,
        plugin: Plugin,
        batcher: Batcher,
        metrics: ModelMetrics,
        settings: Settings,
        changed: Callable[[str | None], None],
    ) -> None:
        """``changed`` gets the reason when no worker can be started any more, and None when one runs again."""
        self._plugin, self._batcher, self._metrics = plugin, batcher, metrics
        self._settings, self._changed = settings, changed
        self._options = ModelOptions(**plugin.overrides)
        self._stopping = asyncio.Event()
        self._processes: set[WorkerProcess] = set()
        self._supervisors: list[asyncio.Task[None]] = []

    async def start(self) -> Loaded:
        """Starts all workers and waits until each is ready. ModelUnavailable gives the reason why one is not.

        With several replicas, each starts its part of the workers, and at least one.
        """
        first, step = max(0, self._settings.replica - 1), self._settings.sharing
        loaded = await self._start_worker(first)
        if not loaded.stages:
            options, others = loaded.options, range(first + step, loaded.options.workers, step)
            self._metrics.set_capacity(options.max_batch_size, (1 + len(others)) * options.concurrency)
            self._batcher.max_wait_s = options.max_wait_ms / 1000
            try:
                await asyncio.gather(*(self._start_worker(index) for index in others))
            except ModelUnavailable:
                await self.stop(0)
                raise
        return loaded

    async def stop(self, grace_s: float, *, drain: bool = False) -> None:
        """Lets running batches finish for ``grace_s`` seconds, then kills. Returns when all processes have ended.

        With ``drain``, workers run what the closed batcher still holds first.
        """
        deadline = time.monotonic() + grace_s
        while drain and self.pids and self._batcher.depth and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        self._stopping.set()
        for process in self._processes:
            if not process.serves:
                process.kill()
        slots = [slot for process in self._processes for slot in process.slots]
        for slot in slots:
            self._batcher.remove(slot)
            slot.retiring = True
        while any(slot.batch for slot in slots) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        for process in self._processes:
            process.retire()
        if self._supervisors:
            await asyncio.wait(self._supervisors, timeout=max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()
        await asyncio.gather(*self._supervisors)

    @property
    def pids(self) -> list[int]:
        """The worker processes that serve now."""
        return [process.pid for process in self._processes if process.serves]

    async def _start_worker(self, index: int) -> Loaded:
        started: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        self._supervisors.append(asyncio.create_task(self._supervise(index, started)))
        return await started

    async def _supervise(self, index: int, started: "asyncio.Future[Loaded]") -> None:
        """Keeps worker ``index`` running. Ends when the pool stops, or when the first load fails."""
        begun, failures, lacking_since = time.monotonic(), 0, 0.0
        while not self._stopping.is_set():
            cause = "crash"
            try:
                lived_s = await self._run_worker(index, started)
                if started.done() and started.result().stages:
                    return
                failures, lacking_since = (failures + 1 if lived_s < _STABLE_S else 0), 0.0
            except Misplaced as error:
                self._options = error.options
                continue
            except ModelUnavailable as error:
                if not started.done():
                    return started.set_exception(error)
                log.error("model %s: a worker cannot be restarted: %s", self._plugin.name, error)
                cause, failures = "load", failures + 1
                self._failed(str(error))
            except Exception as error:  # of the server itself; whatever it is, the model is to come back
                reason = f"the server cannot start a worker: {type(error).__name__}: {error}"
                passes = lacks(error, errno.EAGAIN)
                if not started.done() and not (passes and time.monotonic() - begun < self._options.load_timeout_s):
                    return started.set_exception(ModelUnavailable(reason))
                log.error("model %s: the server cannot run a worker now, and tries again: %s: %s", self._plugin.name,
                          type(error).__name__, error, exc_info=None if passes else error)  # fmt: skip
                cause, failures, lacking_since = "lack", failures + 1, lacking_since or time.monotonic()
                if started.done() and time.monotonic() - lacking_since >= _LACK_S:
                    self._failed(reason)
            await self._pause(failures, _LONGEST_BACKOFF_S[cause])
        if not started.done():
            started.set_exception(ModelUnavailable("the server is stopping"))

    async def _run_worker(self, index: int, started: "asyncio.Future[Loaded]") -> float:
        """Runs one process until its end. Returns how long it served, in seconds."""
        process = WorkerProcess(self._plugin, self._settings, index, self._options)
        self._processes.add(process)
        try:
            loaded = await process.load()
            if not loaded.stages:
                process.serve(loaded, self._batcher, self._metrics)
            begun = time.monotonic()
            if started.done():
                self._changed(None)
            else:
                started.set_result(loaded)
            if not loaded.stages:
                await process.ended
        finally:
            items = await process.end()
            self._processes.discard(process)
            self._after_death(items, process.ended.result())
        if not self._stopping.is_set() and not loaded.stages:
            self._metrics.worker_restarts += 1
            log.error("model %s: worker %d %s; restarting it", self._plugin.name, process.pid, process.ended.result())
        return time.monotonic() - begun

    def _after_death(self, items: list[Item], how: str) -> None:
        """Queues items whose worker died once more, each alone. One that died alone, too, fails."""
        again = []
        for item in items:
            item.attempts += 1
            if item.attempts == 1 and item.repeatable:
                again.append(item)
                continue
            twice = ", twice: the second time this input ran alone" if item.attempts > 1 else ""
            item.resolve(ModelError(f"the worker of model {self._plugin.name!r} {how}{twice}"))
        if again:
            self._batcher.requeue(again)

    def _failed(self, reason: str) -> None:
        if not self.pids and not self._stopping.is_set():
            self._changed(reason)

    async def _pause(self, failures: int, longest_s: float) -> None:
        """Waits before the next attempt, not before the first one, and not when the pool stops."""
        seconds = min(longest_s, 0.05 * 2 ** min(failures, 10)) if failures > 1 else 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def resident_memory(pid: int) -> int:
    """Bytes of a process that are in memory; 0 if it has ended or the system does not report it."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
