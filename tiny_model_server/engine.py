"""The one door: every protocol comes through here to run models and to ask about them."""

import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote

from tiny_model_server.batcher import Item, Outcome, cancelled
from tiny_model_server.codec import ARRAY, Packed, dtype_name, signature
from tiny_model_server.errors import (
    InvalidInput,
    ModelUnavailable,
    Overloaded,
    PermissionDenied,
    ServerError,
    Stopping,
)
from tiny_model_server.repository import Repository, ServedModel, State
from tiny_model_server.settings import Settings

log = logging.getLogger("tiny_model_server.engine")

_LOADS_AT_ONCE = 4


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


class Engine:
    """Runs models for all protocols, and knows the state of the whole replica."""

    def __init__(self, settings: Settings) -> None:
        """Finds the models; ``start`` loads them."""
        self.settings = settings
        self._listeners: list[Callable[[], None]] = []
        self._repository = Repository(settings, self._changed)
        self._admitted = threading.BoundedSemaphore(settings.threads)
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
        with ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="load") as loader:
            wait([loader.submit(self._try_load, model) for model in self.models() if model.state is State.UNLOADED])
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

    def authorize(self, call: Call) -> None:
        """PermissionDenied unless the caller is on this host or has the admin token."""
        token = self.settings.admin_token
        offered = call.metadata.get("authorization", "")
        if _is_local(call.peer) or (token and hmac.compare_digest(str(offered).encode(), f"Bearer {token}".encode())):
            return
        raise PermissionDenied(
            "only callers on the server's own host may do this, or those who send the admin token (TMS_ADMIN_TOKEN) "
            "as metadata 'authorization: Bearer TOKEN'"
        )

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

    @property
    def ready(self) -> bool:
        """True when there is a model and all are READY."""
        return bool(self.models()) and all(model.state is State.READY for model in self.models())

    @property
    def stopping(self) -> bool:
        """True once the server has begun to stop."""
        return self._stopping.is_set()

    def run(self, name: str, data: Packed, args: Mapping[str, Any], call: Call, *, plain: bool = False) -> Packed:
        """The model's answer to one input; raises what went wrong.

        ``plain`` asks for JSON alone, arrays in it being nested lists.
        """
        (outcome,) = self.run_batch(name, [data], args, call, plain=plain)
        if isinstance(outcome, ServerError):
            raise outcome
        return outcome

    def run_batch(
        self, name: str, items: Sequence[Packed], args: Mapping[str, Any], call: Call, *, plain: bool = False
    ) -> list[Outcome]:
        """One outcome an input, in order: the model's answer, or the error of that input alone."""
        if not items:
            raise InvalidInput("the batch is empty; send at least one input")
        if self.stopping:
            raise Stopping("the server is stopping")
        model = self.model(name)
        args_text = json.dumps(args, sort_keys=True) if args else ""
        loaded = model.loaded
        mixes = loaded is not None and loaded.options.mix_shapes
        if loaded is not None:
            for data in items:
                _check_declared(loaded.metadata.get("inputs") or [], data)
        queued = [
            Item(data, args_text, (args_text, () if mixes else signature(data)), deadline=call.deadline, plain=plain)
            for data in items
        ]
        if not self._admitted.acquire(blocking=False):
            raise Overloaded(f"the server has {self.settings.threads} calls in work already")
        try:
            return self._run(model, queued, call)
        finally:
            self._admitted.release()

    def _run(self, model: ServedModel, items: list[Item], call: Call) -> list[Outcome]:
        def give_up() -> None:
            for item in items:
                item.resolve(cancelled())

        model.submit(items)
        if not call.on_end(give_up):
            give_up()
        return [item.wait() for item in items]

    def _try_load(self, model: ServedModel) -> None:
        started = time.monotonic()
        try:
            model.load()
            log.info("model %s loaded in %.1f s", model.name, time.monotonic() - started)
        except ModelUnavailable:
            pass  # its state and the log say why; the others serve

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _check_declared(inputs: Sequence[Mapping[str, Any]], data: Packed) -> None:
    """InvalidInput if an array does not fit the only input that the model's metadata declares."""
    if len(inputs) != 1 or len(data.arrays) != 1 or data.text != ARRAY:
        return
    array, dtype, shape = data.arrays[0], inputs[0].get("dtype"), inputs[0].get("shape")
    fits = shape is None or (
        len(shape) == array.ndim and all(want in (-1, size) for want, size in zip(shape, array.shape, strict=True))
    )
    if not fits or dtype not in (None, dtype_name(array.dtype)):
        raise InvalidInput(
            f"the model takes {dtype or 'any dtype'} of shape {shape or 'any'} (-1: any size), "
            f"not {dtype_name(array.dtype)} of shape {list(array.shape)}"
        )


def _is_local(peer: str) -> bool:
    kind, _, address = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        host = ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return (getattr(host, "ipv4_mapped", None) or host).is_loopback
