"""The engine: runs models for all protocols, and knows the state of the whole replica.

One asyncio loop owns all of it. Methods that are coroutines, and ``begin``, belong to the loop. All others may be
called from any thread, and wait for the loop if they have to.
"""

import asyncio
import logging
import os
import queue
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from tiny_model_server import tracing
from tiny_model_server.access import Access
from tiny_model_server.budget import Budget
from tiny_model_server.codec import Encoded, args_json
from tiny_model_server.engine import placement
from tiny_model_server.engine.batcher import Outcome, Stream
from tiny_model_server.engine.buffers import BufferPool, copy_out, place
from tiny_model_server.engine.call import Call, Run, status_of
from tiny_model_server.engine.metrics import Metrics
from tiny_model_server.engine.repository import Repository, ServedModel, State
from tiny_model_server.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    ModelUnavailable,
    NowAPipeline,
    Overloaded,
    ServerError,
    Stopping,
)
from tiny_model_server.settings import Settings, check_option

log = logging.getLogger("tiny_model_server.engine")

_LOADS_AT_ONCE = 4
_LARGEST_ARGS = 256 << 20  # bytes, counted for each item of a request
_LARGE = 1 << 20  # bytes of arrays; to copy fewer costs less than to ask the loop
_T = TypeVar("_T")


class Engine:
    """Runs models for all protocols, and knows the state of the whole replica."""

    def __init__(self, settings: Settings) -> None:
        """Finds the models; ``start`` loads them."""
        self.settings = settings
        self.on_change: Callable[[], None] = lambda: None
        """Called on the loop whenever the state of a model or of the replica changes."""
        self.metrics = Metrics()
        self._repository = Repository(settings, self.metrics, lambda: self.on_change())
        self.calls = 0
        """How many are at work."""
        self.inflight = Budget(((settings.max_inflight_mb << 20) or placement.memory() // 4) // settings.sharing)
        """Counts the bytes of requests under way; every transport takes from it before it reads or parses one."""
        self.access = Access(settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._buffers = BufferPool(self._on_loop)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._room = asyncio.Lock()  # one unloads others at a time, for TMS_MAX_LOADED
        self.stopping = False
        """True once the server has begun to stop."""
        self.started = False
        """True once every model was loaded or has failed."""
        self.stop_requested = asyncio.Event()
        """Set by ``request_stop``; the owner of the loop waits for it."""

    # ---- for the loop

    async def start(self) -> None:
        """Takes the running loop. Loads every model, several at once; each is READY or FAILED then."""
        await self.use_loop()
        if not self.settings.lazy:
            turns = asyncio.Semaphore(_LOADS_AT_ONCE)
            await asyncio.gather(
                *(self._try_load(model, turns) for model in self.models()[: self.settings.max_loaded or None])
            )
        self.started = True
        self.on_change()

    async def use_loop(self) -> None:
        """Lets the running loop own the engine, from the first call on."""
        self._loop = asyncio.get_running_loop()

    async def stop(self, grace_s: float) -> None:
        """Refuses calls, finishes what was accepted within ``grace_s`` seconds, and ends all workers."""
        self.stopping = True
        await asyncio.gather(*(model.stop(grace_s) for model in self.models()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._buffers.close()

    def begin(self, run: Run) -> None:
        """Starts a call. ``run.done`` gets its outcomes; nothing is raised."""
        run.finished = self._answer
        if self.stopping:
            return run.refuse(Stopping("the server is stopping"))
        if self.calls == self.settings.threads:
            return run.refuse(self._overloaded())
        self.calls += 1
        run.admitted = True
        self._start(run)

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"the server has {self.calls} calls in work already")

    def _start(self, run: Run) -> None:
        try:
            model = run.model = self.model(run.name)
            run.since = model.metrics.arrived(len(run.values))
            model.used = time.monotonic()
            if model.stages:
                self._spawn(run, self._run_stages(run, model))
            elif self._is_to_load(model):
                self._spawn(run, self._load_and_put(run, model))
            else:
                self._put(run, model)
        except ServerError as error:
            run.refuse(error)

    def _answer(self, run: Run) -> None:
        """Counts the outcomes of a run, and reports them to who waits for them."""
        if self.settings.access_log:
            run.note_times(time.monotonic())
        if model := run.model:
            model.metrics.answered(run.since, [status_of(outcome) for outcome in run.outcomes])
            if isinstance(run.outcomes[0], NowAPipeline):
                run.outcomes, run.items, run.model = [], [], None
                return self._start(run)
            stages = [self.model(name).metrics for name in model.stages if name in self._repository.names]
            run.report = model.metrics.report(min(metrics.capacity for metrics in stages or [model.metrics]))
        self.calls -= run.admitted
        run.done(run)

    def _put(self, run: Run, model: ServedModel) -> None:
        items = run.make_items(model)
        try:
            model.batcher.put(items)
        except Overloaded:
            if len(items) == 1:
                raise
            self._spawn(run, model.batcher.put_in_parts(items))

    async def _load_and_put(self, run: Run, model: ServedModel) -> None:
        await self._begin_to_load(model)
        self._put(run, model)

    async def _begin_to_load(self, model: ServedModel) -> None:
        while self._is_to_load(model):
            async with self._room if self.settings.max_loaded else nullcontext():
                await self._make_room(model)
                await model.begin_to_load()

    async def _run_stages(self, run: Run, pipeline: ServedModel) -> None:
        outcomes: list[Outcome] = list(run.values)
        for stage in pipeline.stages:
            if self.model(stage).stages:
                raise ModelUnavailable(f"{pipeline.name!r} names the stage {stage!r}, which is a pipeline itself")
            alive = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Encoded)]
            values = [outcome for outcome in outcomes if isinstance(outcome, Encoded)]
            if values:
                json_only = run.json_only and stage == pipeline.stages[-1]
                results = await self._run_stage(stage, values, run, json_only)
                for index, result in zip(alive, results, strict=True):
                    outcomes[index] = result
        if run.stream and isinstance(outcomes[0], Encoded):
            run.stream.put(outcomes[0], lambda: None)
        run.finish(outcomes)

    async def _run_stage(self, name: str, values: list[Encoded], run: Run, json_only: bool) -> list[Outcome]:
        over: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        buffers = self._buffers.take()

        def done(part: Run) -> None:
            if not over.done():  # the call may have been cancelled in the same moment
                over.set_result(part)

        try:
            part = Run(name, place(values, buffers), run.args, run.call, done, json_only)
            part.finished = self._answer
            self._start(part)
            try:
                await over
            finally:
                part.cancel(Cancelled("the call was cancelled"))
            if part.error:
                raise part.error
            return part.outcomes
        finally:
            self._buffers.give_back(buffers)

    def _spawn(self, run: Run, work: Coroutine[Any, Any, None]) -> None:
        """Does what has to wait for something in a task, which ends with the call."""

        def over(task: "asyncio.Task[None]") -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                if not isinstance(error, ServerError):
                    log.error("a call failed", exc_info=error)
                    error = ServerError(f"a fault in the server: {type(error).__name__}: {error}")
                run.refuse(error)

        run.task = asyncio.ensure_future(work)
        self._tasks.add(run.task)
        run.task.add_done_callback(over)

    def _is_to_load(self, model: ServedModel) -> bool:
        return self.settings.lazy and model.state in (State.UNLOADED, State.UNLOADING)

    async def _make_room(self, model: ServedModel) -> None:
        """Unloads the models that were not called for longest, if this one would be one too many."""
        if not self.settings.max_loaded:
            return
        model.used, model.wanted = time.monotonic(), True
        others = [other for other in self.models() if other.wanted and other is not model and not other.stages]
        others.sort(key=lambda other: other.used, reverse=True)
        for idle in others[self.settings.max_loaded - 1 :]:
            log.info("model %s is unloaded: TMS_MAX_LOADED=%d", idle.name, self.settings.max_loaded)
            await idle.unload()

    async def _try_load(self, model: ServedModel, turns: asyncio.Semaphore) -> None:
        async with turns:
            started = time.monotonic()
            try:
                await model.load()
                log.info("model %s loaded in %.1f s", model.name, time.monotonic() - started)
            except ServerError:
                pass  # its state and the log give the reason; the others serve
            except Exception:  # of the server itself; the others serve
                log.exception("model %s: it could not be loaded", model.name)

    async def load(self, name: str, workers: int = 0, *, anew: bool = False) -> ServedModel:
        """Loads a model, also one whose folder came after the start; see ``ServedModel.load``."""
        if workers:
            try:
                check_option("workers", workers)
            except ValueError as error:
                raise InvalidInput(f"{error}; 0 takes the model's own") from None
        self._repository.find()
        model = self.model(name)
        async with self._room:
            await self._make_room(model)
        await model.load(workers, anew=anew)
        return model

    async def reload(self, name: str) -> ServedModel:
        """Replaces a model's workers by new ones."""
        return await self.load(name, anew=True)

    async def loaded(self, name: str) -> ServedModel:
        """The model once it is loaded, as its first call loads it with TMS_LAZY. ModelUnavailable if it cannot be."""
        model = self.model(name)
        if model.loaded and not self._is_to_load(model):
            return model
        if self.calls == self.settings.threads:
            raise self._overloaded()
        self.calls += 1  # who waits holds a thread, as who runs a model does
        try:
            await self._begin_to_load(model)
            if model.loaded is None:
                await model.settle()
        finally:
            self.calls -= 1
        return model

    async def unload(self, name: str) -> ServedModel:
        """Ends a model's workers; see ``ServedModel.unload``."""
        model = self.model(name)
        await model.unload()
        return model

    async def forget(self, name: str, grace_s: float) -> None:
        """Finishes what an adopted model has queued within ``grace_s`` seconds, and knows it no more."""
        await self.model(name).stop(grace_s)
        self._repository.remove(name)
        self.on_change()

    async def adopt(self, name: str, path: Path) -> ServedModel:
        """Knows the folder ``path``, wherever it is, as a model of this name; it is to be loaded then."""
        if not os.path.isfile(path / "__init__.py"):  # that of Path raises an error if the name is too long
            raise InvalidInput(f"{str(path)!r} is not a model folder: there is no __init__.py in it")
        return self._repository.add(name, path.resolve())

    # ---- for any thread

    def run(
        self, name: str, value: Encoded, args: Mapping[str, Any], call: Call, *, json_only: bool = False
    ) -> Encoded:
        """The model's answer to one input. Raises what went wrong.

        ``json_only`` asks for JSON alone, arrays in it being nested lists.
        """
        (outcome,) = self.run_batch(name, [value], args, call, json_only=json_only)
        return _or_raise(outcome)

    def run_batch(
        self, name: str, values: Sequence[Encoded], args: Mapping[str, Any], call: Call, *, json_only: bool = False
    ) -> list[Outcome]:
        """One outcome an input, in order: the model's answer, or the error of that input alone."""
        model, text = self.model(call.named(name)), self.check_batch(values, args)
        self._check_room(model, values)
        buffers = self._buffers.take()
        answered: queue.SimpleQueue[Run] = queue.SimpleQueue()
        try:
            response = (call.buffers or buffers) if len(values) == 1 else None
            run = Run(call.served, place(values, buffers), text, call, answered.put, json_only, response)
            self._begin_from_thread(run)
            try:
                answered.get(timeout=_remaining(call.deadline))
            except queue.Empty:
                self._on_loop(run.cancel, DeadlineExceeded("the deadline passed before the model answered"))
                answered.get()
            call.trailing["endpoint-load-metrics-bin"] = run.report
            if run.error:
                raise run.error
            if tracing.provider():
                _trace(run)
            return [copy_out(one) if isinstance(one, Encoded) and response is buffers else one for one in run.outcomes]
        finally:
            self._buffers.give_back(buffers)

    def run_stream(self, name: str, value: Encoded, args: Mapping[str, Any], call: Call) -> Iterator[Encoded]:
        """What the model yields for one input, as it comes. Leaving the iterator ends the model's work on it."""
        with self.streaming(name, value, args, call) as run:
            while found := self.wait(run.next_values(), call.deadline):
                yield from map(_or_raise, found)

    async def stream_values(self, run: Run) -> AsyncGenerator[Encoded, None]:
        """The same of a run that is ``streaming``, for a loop that is not the engine's: no thread waits."""
        while found := await asyncio.wrap_future(self.submit(run.next_values())):
            for outcome in found:
                yield _or_raise(outcome)

    @contextmanager
    def streaming(
        self, name: str, value: Encoded, args: Mapping[str, Any], call: Call, *, json_only: bool = False
    ) -> Iterator[Run]:
        """Begins a run whose values are read from its stream. The end of the block ends the model's work on it."""
        model, text = self.model(call.named(name)), self.check_batch([value], args)
        self._check_room(model, [value])
        buffers = self._buffers.take()
        try:
            stream = Stream(self.settings.stream_idle_s)
            values = place([value], buffers)
            run = Run(call.served, values, text, call, lambda run: stream.end(), json_only, stream=stream)
            self._begin_from_thread(run)
            try:
                yield run
            finally:
                self._on_loop(run.cancel, Cancelled("the caller disconnected"))
                call.trailing["endpoint-load-metrics-bin"] = run.report
        finally:
            self._on_loop(self._buffers.give_back, buffers)  # after the end of the run, which may be queued still

    def request_stop(self) -> None:
        """Asks the owner of the loop to stop the server; returns at once."""
        self._on_loop(self.stop_requested.set)

    def models(self) -> list[ServedModel]:
        """All models found, by name."""
        return self._repository.models()

    def model(self, name: str) -> ServedModel:
        """The model of this name; ModelNotFound if there is none."""
        return self._repository.model(name)

    def input_shape(self, name: str) -> list[int] | None:
        """The shape that a model wants, None for any; ModelUnavailable if it is not loaded."""
        model = self.model(name)
        if model.loaded is None:
            raise ModelUnavailable(f"model {name!r} is {model.state}: {model.reason or 'ask again when it is READY'}")
        return model.loaded.input_shape

    def serving(self, model: ServedModel) -> bool:
        """True if calls to this model can be answered now; a pipeline needs all its stages."""
        return model.state is State.READY and all(self.model(stage).state is State.READY for stage in model.stages)

    @property
    def ready(self) -> bool:
        """True when every model that is meant to be loaded is, and there is one; a lazy server needs one folder."""
        wanted = [model for model in self.models() if model.wanted]
        enough = self.models() if self.settings.lazy else wanted
        if "model_mesh" in self.settings.protocols:  # which begins with none, and sends them
            return self.started and all(map(self.serving, wanted))
        return bool(enough) and all(map(self.serving, wanted))

    def check_batch(self, values: Sequence[Encoded], args: Mapping[str, Any]) -> str:
        """The args as JSON. InvalidInput if a call may not have so many inputs, or such args."""
        if not values:
            raise InvalidInput("the batch is empty; send at least one input")
        if len(values) > (most := self.settings.max_items):
            raise InvalidInput(f"the batch has {len(values)} items; TMS_MAX_ITEMS={most} is the most that one may have")
        try:
            text = args_json(args) if args else ""
        except TypeError as error:
            raise InvalidInput(str(error)) from None
        if len(text) * len(values) > _LARGEST_ARGS:
            raise InvalidInput(f"args of {len(text)} bytes go along with each of {len(values)} items; send less")
        return text

    def authorize_load(self, model: ServedModel, call: Call) -> None:
        """PermissionDenied if a call would bring back a model that was unloaded, and may not."""
        if self.started and not self.settings.lazy and model.state is State.UNLOADED:
            self.access.authorize(call)

    def _check_room(self, model: ServedModel, values: Sequence[Encoded]) -> None:
        """Overloaded if the queue is full; asked before large arrays are copied."""

        async def check() -> None:
            model.batcher.check_room(1)

        if sum(array.nbytes for value in values if not value.shared for array in value.arrays) > _LARGE:
            self.wait(check())

    def _begin_from_thread(self, run: Run) -> None:
        def cancel() -> None:
            if not run.outcomes:
                self._on_loop(run.cancel, Cancelled("the caller disconnected"))

        self._on_loop(self.begin, run)
        if not run.call.on_end(cancel):
            cancel()

    def submit(self, work: Coroutine[Any, Any, _T]) -> "Future[_T]":
        """Lets the loop do something; its result is the future's."""
        assert self._loop
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, _T], deadline: float | None = None, call: Call | None = None) -> _T:
        """Lets the loop do something, as in ``engine.wait(engine.load("name"))``, and waits for its result.

        It ends with the ``call`` for which it is done.
        """
        future = self.submit(work)

        def cancel() -> None:
            future.cancel()

        if call and not call.on_end(cancel):
            cancel()
        try:
            return future.result(_remaining(deadline))
        except FutureCancelled:
            raise Cancelled("the call was cancelled") from None
        except TimeoutError:
            future.cancel()
            raise DeadlineExceeded("the deadline passed before the model had finished") from None

    def _on_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            assert self._loop
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            raise Stopping("the server is stopping") from None


def _or_raise(outcome: Outcome) -> Encoded:
    if isinstance(outcome, ServerError):
        raise outcome
    return outcome


def _trace(run: Run) -> None:
    attributes = {"tms.model": run.name, tracing.REQUEST_ID: run.call.id}
    for item in run.items:
        steps = ("queue", item.enqueued, item.begun), ("compute", item.begun, time.monotonic())
        tracing.spans(attributes, steps)


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
