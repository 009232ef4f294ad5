"""The one door: every protocol comes through here to run models and to ask about them."""

import hmac
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tiny_model_server import tracing
from tiny_model_server.budget import Budget
from tiny_model_server.codec import ARRAY, Encoded, args_json, dtype_name, signature
from tiny_model_server.engine import placement
from tiny_model_server.engine.batcher import Batcher, Chunks, Item, Outcome, Seat
from tiny_model_server.engine.metrics import Metrics
from tiny_model_server.engine.repository import Repository, ServedModel, State
from tiny_model_server.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    ModelUnavailable,
    NotLoaded,
    NowAPipeline,
    Overloaded,
    PermissionDenied,
    ServerError,
    Stopping,
    Unauthenticated,
)
from tiny_model_server.server import callers
from tiny_model_server.settings import Settings, check_option
from tiny_model_server.shared_memory import SharedBuffers

log = logging.getLogger("tiny_model_server.engine")

_LOADS_AT_ONCE = 4
_LARGEST_ARGS = 256 << 20  # bytes, counted for each item of a request


LATER = object()
"""What a handler returns if the answer comes by ``Loop.later``."""


class WouldWait(Exception):
    """The handler would have to wait: call it in a thread that can."""


class Loop(Protocol):
    """A transport that answers many calls from one thread."""

    def later(self, answer: Callable[[], Any]) -> None:
        """Hears from any thread that a call is over; ``answer`` returns what the handler would, or raises."""

    def drive(self, seat: Seat, batcher: Batcher) -> None:
        """Takes care of a borrowed worker that was given work; called from the loop's thread."""


@dataclass
class Call:
    """What a handler knows of the call that it answers, whatever the transport."""

    deadline: float | None = None
    """On the monotonic clock; None if the caller set none."""
    peer: str = ""
    """As gRPC writes it: "ipv4:127.0.0.1:1234", "unix:..."."""
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    on_end: Callable[[Callable[[], None]], bool] = lambda callback: True
    """Registers a function to be called when the call ends, by cancellation too; False if it has ended."""
    repeatable: bool = True
    """False forbids to run the inputs again if a worker dies of them or with them."""
    model: str = ""
    """The model that a router in front chose; it goes before the one that the request names."""
    lane: SharedBuffers | None = None
    """The memory that the caller shares with the workers, if it does."""
    largest: int = 1 << 31
    """Bytes of arrays that a request may have in the memory shared."""
    placed: int = 0
    """How many it has named so far."""
    trailing_bytes: memoryview | None = None
    """The bytes of the request's image or last array, if the transport has left them out of the message."""
    loop: "Loop | None" = None
    """Who calls the handler in a thread that must not wait."""
    trailing: dict[str, str | bytes] = field(default_factory=dict)
    """Metadata to send with the answer's status."""


class Engine:
    """Runs models for all protocols, and knows the state of the whole replica."""

    def __init__(self, settings: Settings) -> None:
        """Finds the models; ``start`` loads them."""
        self.settings = settings
        self._listeners: list[Callable[[], None]] = []
        self.metrics = Metrics()
        self._repository = Repository(settings, self.metrics, self._changed)
        self.calls = 0
        """How many are in work."""
        self.inflight = Budget((settings.max_inflight_mb << 20) or placement.memory() // 4)
        """Counts the bytes of requests under way; every transport takes from it before it reads or parses one."""
        self.ports: frozenset[int] = frozenset()
        """The TCP ports at which it is called; empty if they are not known."""
        self._counting = threading.Lock()
        self._room = threading.Lock()
        self._stopping = threading.Event()
        self.started = False
        """True once every model was loaded or has failed."""
        self.stop_requested = threading.Event()
        """Set by ``request_stop``; the launcher waits for it."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` whenever the state of a model or of the replica changes."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Loads every model, several at once, and returns when each is READY or FAILED."""
        if not self.settings.lazy:
            with ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="load") as loader:
                first = self.models()[: self.settings.max_loaded or None]
                wait([loader.submit(self._try_load, model) for model in first])
        self.started = True
        self._changed()

    def stop(self, grace_s: float) -> None:
        """Refuses calls, finishes what was accepted within ``grace_s`` seconds, and ends all workers."""
        self._stopping.set()
        stoppers = [threading.Thread(target=model.stop, args=(grace_s,)) for model in self.models()]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()

    def request_stop(self) -> None:
        """Asks the launcher to stop the server; returns at once."""
        self.stop_requested.set()

    def authenticate(self, metadata: Mapping[str, str | bytes]) -> None:
        """Unauthenticated unless the server asks for no token, or the caller has it or the admin token."""
        settings = self.settings
        if settings.token and not (_offers(metadata, settings.token) or _offers(metadata, settings.admin_token)):
            raise Unauthenticated("send the server's token (TMS_TOKEN) as metadata 'authorization: Bearer TOKEN'")

    def authorize(self, call: Call) -> None:
        """PermissionDenied unless the caller may stop the server and change its models (TMS_ADMIN)."""
        rule = self.settings.admin_rule
        if rule == "token" and _offers(call.metadata, self.settings.admin_token):
            return
        here = rule in ("local", "host") and callers.on_this_host(call.peer, call.metadata)
        if here and (rule == "host" or callers.by_this_user(call.peer, self.ports)):
            return
        raise PermissionDenied(f"this call may not stop the server or change its models; {self.who_may()} may")

    def authorize_load(self, model: ServedModel, call: Call) -> None:
        """PermissionDenied if a call would bring back a model that was unloaded, and may not."""
        if self.started and not self.settings.lazy and model.state is State.UNLOADED:
            self.authorize(call)

    def who_may(self) -> str:
        """Who may stop the server and change its models, in words."""
        if self.settings.admin_rule == "off":
            missing = self.settings.admin == "token"
            return f"nobody (TMS_ADMIN={self.settings.admin}{', and no TMS_ADMIN_TOKEN is set' if missing else ''})"
        return {
            "token": "only callers with the admin token (TMS_ADMIN_TOKEN) as metadata 'authorization: Bearer TOKEN'",
            "local": "only the server's own user and root, on its host and not through a proxy (TMS_ADMIN=local; "
            "set TMS_ADMIN_TOKEN to let others)",
            "host": "only callers on the server's own host, and not through a proxy (TMS_ADMIN=host; "
            "set TMS_ADMIN_TOKEN to let others)",
        }[self.settings.admin_rule]

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

    def load(self, name: str, workers: int = 0) -> ServedModel:
        """Loads a model, also one whose folder came after the start; see ``ServedModel.load``."""
        if workers:
            try:
                check_option("workers", workers)
            except ValueError as error:
                raise InvalidInput(f"{error}; 0 takes the model's own") from None
        self._repository.find()
        model = self.model(name)
        self._make_room(model)
        model.load(workers)
        return model

    def adopt(self, name: str, path: Path) -> ServedModel:
        """Knows the folder ``path``, wherever it is, as a model of this name; it is to be loaded then."""
        if not (path / "__init__.py").is_file():
            raise InvalidInput(f"{str(path)!r} is no model folder: there is no __init__.py in it")
        return self._repository.add(name, path.resolve())

    def forget(self, name: str, grace_s: float) -> None:
        """Finishes what an adopted model has queued within ``grace_s`` seconds, and knows it no more."""
        self.model(name).stop(grace_s)
        self._repository.remove(name)
        self._changed()

    def reload(self, name: str) -> ServedModel:
        """Replaces a model's workers by new ones; see ``ServedModel.reload``."""
        self._repository.find()
        model = self.model(name)
        self._make_room(model)
        model.reload()
        return model

    def unload(self, name: str) -> ServedModel:
        """Ends a model's workers; see ``ServedModel.unload``."""
        model = self.model(name)
        model.unload()
        return model

    def serving(self, model: ServedModel) -> bool:
        """True if calls to this model can be answered now; a pipeline needs all its stages."""
        return model.state is State.READY and all(self.model(stage).state is State.READY for stage in model.stages)

    @property
    def ready(self) -> bool:
        """True when every model that is meant to be loaded is, and there is one; a lazy server needs one folder."""
        wanted = [model for model in self.models() if model.wanted]
        if "model_mesh" in self.settings.protocols:  # which begins with none, and sends them
            return self.started and all(self.serving(model) for model in wanted)
        if not self.settings.lazy and not wanted:
            return False
        return bool(self.models()) and all(self.serving(model) for model in wanted)

    @property
    def stopping(self) -> bool:
        """True once the server has begun to stop."""
        return self._stopping.is_set()

    def run(
        self,
        name: str,
        data: Encoded,
        args: Mapping[str, Any],
        call: Call,
        *,
        plain: bool = False,
        then: Callable[[Encoded], Any] = lambda outcome: outcome,
    ) -> Any:
        """What ``then`` makes of the model's answer to one input; raises what went wrong.

        ``plain`` asks for JSON alone, arrays in it being nested lists. For a loop it returns LATER or raises WouldWait.
        """
        if call.loop:
            return self._run_later(call.model or name, data, args, call, plain, then)
        (outcome,) = self.run_batch(name, [data], args, call, plain=plain)
        if isinstance(outcome, ServerError):
            raise outcome
        return then(outcome)

    def run_batch(
        self, name: str, items: Sequence[Encoded], args: Mapping[str, Any], call: Call, *, plain: bool = False
    ) -> list[Outcome]:
        """One outcome an input, in order: the model's answer, or the error of that input alone."""
        if not items:
            raise InvalidInput("the batch is empty; send at least one input")
        if len(items) > self.settings.max_items:
            most = self.settings.max_items
            raise InvalidInput(f"the batch has {len(items)} items; TMS_MAX_ITEMS={most} is the most that one may have")
        self._admit()
        try:
            model = self._open(call.model or name, call.deadline)
            args_text = _text(args)
            if len(args_text) * len(items) > _LARGEST_ARGS:
                raise InvalidInput(
                    f"args of {len(args_text)} bytes go along with each of {len(items)} items; send less"
                )
            if not model.stages:
                try:
                    found = self._run(model, items, args_text, call, plain, call.lane if len(items) == 1 else None)
                finally:
                    self._report_load(model, call)
                if not isinstance(found[0], NowAPipeline):
                    return found
            arrived = model.metrics.arrived(len(items))
            outcomes: list[Outcome] = list(items)
            try:
                for stage in model.stages:
                    alive = [index for index, item in enumerate(outcomes) if isinstance(item, Encoded)]
                    values = [item for item in outcomes if isinstance(item, Encoded)]
                    if values:
                        last = plain and stage == model.stages[-1]
                        results = self._run(self._stage(model, stage, call), values, args_text, call, last)
                        for index, outcome in zip(alive, results, strict=True):
                            outcomes[index] = outcome
            except ServerError as error:
                model.metrics.answered(arrived, [error.status] * len(items))
                raise
            finally:
                self._report_load(model, call)
            model.metrics.answered(arrived, [_status(outcome) for outcome in outcomes])
            return outcomes
        finally:
            self._dismiss()

    def run_stream(self, name: str, data: Encoded, args: Mapping[str, Any], call: Call) -> Iterator[Encoded]:
        """What the model yields for one input, as it comes; leaving the iterator ends the model's work on it."""
        self._admit()
        try:
            model = self._open(call.model or name, call.deadline)
            if model.stages:
                raise ModelUnavailable(f"model {name!r} is a pipeline, which does not stream; call it by Run")
            args_text = _text(args)
            item = Item(data, args_text, object(), deadline=call.deadline, once=not call.repeatable)
            item.chunks = Chunks(self.settings.stream_idle_s)
            arrived = model.metrics.arrived(1)
            status = Cancelled.status
            try:
                self._submit(model, [item], call)
                last = False
                while not last:
                    chunk, last = item.next_chunk()
                    if isinstance(chunk, ServerError):
                        raise chunk
                    if not last:
                        yield chunk
                status = "OK"
            except ServerError as error:
                status = error.status
                raise
            finally:
                item.resolve(Cancelled("the caller went away"))
                model.metrics.answered(arrived, [status])
                self._report_load(model, call)
        finally:
            self._dismiss()

    def _run(
        self,
        model: ServedModel,
        values: Sequence[Encoded],
        args: str,
        call: Call,
        plain: bool,
        lane: SharedBuffers | None = None,
    ) -> list[Outcome]:
        arrived = model.metrics.arrived(len(values))
        statuses = [ServerError.status] * len(values)
        try:
            items = self._items(model, values, args, call, plain)
            items[0].lane = lane
            self._submit(model, items, call)
            outcomes = [item.wait() for item in items]
            now = time.monotonic()
            steps = ((("queue", item.enqueued, item.begun), ("compute", item.begun, now)) for item in items)
            tracing.spans(model.name, itertools.chain.from_iterable(steps))
            statuses = [_status(outcome) for outcome in outcomes]
            return outcomes
        except ServerError as error:
            statuses = [error.status] * len(values)
            raise
        finally:
            model.metrics.answered(arrived, statuses)

    def _run_later(
        self,
        name: str,
        data: Encoded,
        args: Mapping[str, Any],
        call: Call,
        plain: bool,
        then: Callable[[Encoded], Any],
    ) -> Any:
        assert call.loop
        model = self.model(name)
        if model.stages or (self.settings.lazy and model.state is not State.READY):
            raise WouldWait
        self._admit()
        arrived = model.metrics.arrived(1)
        try:
            (item,) = self._items(self._open(name, call.deadline), [data], _text(args), call, plain)
        except Exception as error:
            self._dismiss()
            model.metrics.answered(arrived, [getattr(error, "status", ServerError.status)])
            raise

        def answer() -> Any:
            outcome = item.wait()
            self._dismiss()
            model.metrics.answered(arrived, [_status(outcome)])
            if isinstance(outcome, ServerError):
                raise outcome
            return then(outcome)

        item.lane, item.then = call.lane, partial(call.loop.later, answer)
        try:
            if not call.on_end(lambda: item.resolve(Cancelled("the caller went away"))):
                raise Cancelled("the caller went away")
            if seat := model.batcher.borrow(item):
                seat.begin([item])
                call.loop.drive(seat, model.batcher)
            else:
                model.batcher.put([item])
        except NotLoaded as error:
            if not self.settings.lazy:
                item.resolve(error)
                return LATER
            item.then = None  # it was unloaded in the moment before, and loading takes time
            self._dismiss()
            model.metrics.answered(arrived, [Cancelled.status])
            raise WouldWait from None
        except ServerError as error:
            item.resolve(error)
        return LATER

    def _items(self, model: ServedModel, values: Sequence[Encoded], args: str, call: Call, plain: bool) -> list[Item]:
        """An item for each value; InvalidInput if one does not fit what the model declares."""
        loaded, once = model.loaded, not call.repeatable
        mixes = loaded is not None and loaded.options.mix_shapes
        items = []
        for data in values:
            if loaded is not None:
                _check_declared(loaded.metadata.get("inputs") or [], data)
            # What is not repeatable is alone in its batch: that is run again item by item if it fails.
            key: Hashable = object() if once else (args, () if mixes else signature(data))
            items.append(Item(data, args, key, deadline=call.deadline, plain=plain, once=once))
        return items

    def _submit(self, model: ServedModel, items: list[Item], call: Call) -> None:
        def give_up() -> None:
            for item in items:
                item.resolve(Cancelled("the caller went away"))

        if not call.on_end(give_up):
            give_up()
        while True:
            try:
                if len(items) > 1:
                    return model.batcher.put_in_parts(items)
                if items[0].chunks is not None or not model.batcher.run(items[0]):
                    model.batcher.put(items)
                return
            except NotLoaded:
                if not self.settings.lazy:
                    raise
                self._open(model.name, call.deadline)  # it was unloaded in the moment before

    def _report_load(self, model: ServedModel, call: Call) -> None:
        if call.lane:
            return  # that caller has no other replica
        loads = [self.model(stage).metrics for stage in model.stages] or [model.metrics]
        call.trailing["endpoint-load-metrics-bin"] = model.metrics.report(min(load.capacity for load in loads))

    def _open(self, name: str, deadline: float | None) -> ServedModel:
        """The model, which is loaded or begins to be if the server is lazy."""
        model = self.model(name)
        model.used = time.monotonic()
        if self.settings.lazy and model.state in (State.UNLOADED, State.UNLOADING):
            if not self.settings.max_loaded:
                model.open_if_lazy(deadline)
                return model
            if not self._room.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                raise DeadlineExceeded(f"the deadline passed before there was room for model {name!r}")
            try:
                if model.state in (State.UNLOADED, State.UNLOADING):  # else another call was faster
                    self._unload_others(model)
                    model.open_if_lazy(deadline)
            finally:
                self._room.release()
        return model

    def _make_room(self, model: ServedModel) -> None:
        """Unloads the models that were not called for longest, if this one would be one too many."""
        if self.settings.max_loaded:
            with self._room:
                self._unload_others(model)

    def _unload_others(self, model: ServedModel) -> None:
        model.used, model.wanted = time.monotonic(), True
        others = [other for other in self.models() if other.wanted and other is not model and not other.stages]
        others.sort(key=lambda other: other.used, reverse=True)
        for idle in others[self.settings.max_loaded - 1 :]:
            log.info("model %s is unloaded: TMS_MAX_LOADED=%d", idle.name, self.settings.max_loaded)
            idle.unload()

    def _stage(self, pipeline: ServedModel, name: str, call: Call) -> ServedModel:
        stage = self._open(name, call.deadline)
        if stage.stages:
            raise ModelUnavailable(f"{pipeline.name!r} names the stage {name!r}, which is a pipeline itself")
        return stage

    def _admit(self) -> None:
        if self.stopping:
            raise Stopping("the server is stopping")
        with self._counting:
            if self.calls == self.settings.threads:
                raise Overloaded(f"the server has {self.calls} calls in work already")
            self.calls += 1

    def _dismiss(self) -> None:
        with self._counting:
            self.calls -= 1

    def _try_load(self, model: ServedModel) -> None:
        started = time.monotonic()
        try:
            model.load()
            log.info("model %s loaded in %.1f s", model.name, time.monotonic() - started)
        except ServerError:
            pass  # its state and the log say why; the others serve

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _text(args: Mapping[str, Any]) -> str:
    try:
        return args_json(args) if args else ""
    except TypeError as error:
        raise InvalidInput(str(error)) from None


def _status(outcome: Outcome) -> str:
    return outcome.status if isinstance(outcome, ServerError) else "OK"


def _check_declared(inputs: Sequence[Mapping[str, Any]], data: Encoded) -> None:
    """InvalidInput if an array does not fit the only input that the model's metadata declares."""
    if len(inputs) != 1 or len(data.arrays) != 1 or data.text != ARRAY:
        return
    array, dtype, shape = data.arrays[0], inputs[0].get("dtype"), inputs[0].get("shape")
    fits = shape is None or (
        len(shape) == len(array.shape)
        and all(want in (-1, size) for want, size in zip(shape, array.shape, strict=True))
    )
    if not fits or dtype not in (None, dtype_name(array.dtype)):
        raise InvalidInput(
            f"the model takes {dtype or 'any dtype'} of shape {shape or 'any'} (-1: any size), "
            f"not {dtype_name(array.dtype)} of shape {list(array.shape)}"
        )


def _offers(metadata: Mapping[str, str | bytes], token: str) -> bool:
    offered = str(metadata.get("authorization", "")).encode()
    return bool(token) and hmac.compare_digest(offered, f"Bearer {token}".encode())
