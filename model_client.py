"""The client: ``ModelClient('name').run_image(image)``, and the same for asyncio. Needs grpcio, protobuf and numpy."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from tiny_model_server.client import aio, arguments, blocking, calls
from tiny_model_server.client.calls import Args, Image
from tiny_model_server.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    ModelClientError,
    ModelFailed,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    PermissionDenied,
    ServerUnavailable,
    Unauthenticated,
)
from tiny_model_server.client.local import shared_array
from tiny_model_server.client.transport import Transport
from tiny_model_server.request_ids import request_id

__all__ = [
    "AsyncModelClient",
    "Cancelled",
    "DeadlineExceeded",
    "InvalidInput",
    "ModelClient",
    "ModelClientError",
    "ModelFailed",
    "ModelNotFound",
    "ModelUnavailable",
    "Overloaded",
    "PermissionDenied",
    "ServerUnavailable",
    "Unauthenticated",
    "request_id",
    "shared_array",
]

Seconds = float | None
"""A time limit; None: the client's own."""
_IN_FLIGHT = 16
_METHODS = ("run", "run_text", "run_image", "run_image_to_image")  # of one item
_FREED_ONCE = 31 << 20  # bytes; glibc's malloc takes no hint from a block above 32 MiB
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Calls:
    """What a model can be asked. ``start`` makes the calls: it returns the answer, its future or its coroutine."""

    def __init__(self, model: str, start: Callable[[calls.Request, Seconds, bool], Any]) -> None:
        self.model, self._start = model, start

    def _call(self, request: calls.Request, timeout: Seconds, retry: bool = True) -> Any:
        return self._start(request, arguments.seconds(timeout), retry)

    def run_image(self, image: Image, args: Args = None, timeout: Seconds = None, *, retry: bool = True) -> Any:
        """The model's answer to one image. An array HxWx1 arrives as HxW; files are decoded by the server."""
        return self._call(calls.image("RunImage", self.model, image, args), timeout, retry)

    def run_text(self, text: str, args: Args = None, timeout: Seconds = None, *, retry: bool = True) -> Any:
        """The model's answer to one text."""
        return self._call(calls.text("RunText", self.model, text, args), timeout, retry)

    def run(self, data: Any, args: Args = None, timeout: Seconds = None, *, retry: bool = True) -> Any:
        """The model's answer to any value: JSON values with arrays, bytes, tensors and more in it (docs/client.md)."""
        return self._call(calls.value("Run", self.model, data, args), timeout, retry)

    def run_image_to_image(
        self, image: Image, args: Args = None, timeout: Seconds = None, *, retry: bool = True
    ) -> Any:
        """The image, HxW or HxWxC of any numeric dtype, that the model makes of an image."""
        return self._call(calls.image("RunImageToImage", self.model, image, args), timeout, retry)

    def run_image_batch(
        self,
        images: Sequence[Image],
        args: Args = None,
        timeout: Seconds = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer an image, in order.

        If some fail, the first one's error is raised, or, with ``return_exceptions``, errors stand in their places.
        """
        return self._call(calls.image_batch(self.model, images, args, return_exceptions), timeout, retry)

    def run_text_batch(
        self,
        texts: Sequence[str],
        args: Args = None,
        timeout: Seconds = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer a text, in order; see ``run_image_batch``."""
        return self._call(calls.text_batch(self.model, texts, args, return_exceptions), timeout, retry)

    def run_batch(
        self,
        items: Sequence[Any],
        args: Args = None,
        timeout: Seconds = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer a value, in order; see ``run`` and ``run_image_batch``."""
        return self._call(calls.value_batch(self.model, items, args, return_exceptions), timeout, retry)

    def get_input_shape(self, timeout: Seconds = None) -> Any:
        """The shape that the model wants, a list of ints, or None when any will do."""
        return self._call(calls.ask("GetInputShape", data=self.model), timeout)

    def list_models(self, timeout: Seconds = None) -> Any:
        """{"name", "state", "reason"} of every model; states are UNLOADED, LOADING, READY, FAILED, UNLOADING."""
        return self._call(calls.ask("GetModelStates"), timeout)

    def _run_any(self, method: str | None, item: Any, args: Args, timeout: Seconds, retry: bool) -> Any:
        """Calls the method named, or the one that suits the type of the item."""
        name = method or calls.method_for(item)
        if name not in _METHODS:
            raise ValueError(f"method is one of {', '.join(_METHODS)}, not {method!r}")
        return getattr(self, name)(item, args, timeout, retry=retry)


class _Client(_Calls):
    """What the blocking and the asyncio client share."""

    _transport: Transport
    _transport_class: Any

    def __init__(
        self,
        model: str = "",
        ip: str | None = None,
        port: int | None = None,
        *,
        addresses: Sequence[str] | str | None = None,
        timeout: float = arguments.DEFAULT_TIMEOUT_S,
        connect_timeout: float = arguments.DEFAULT_CONNECT_TIMEOUT_S,
        balancing: str = "load",
        tls: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        server_name: str = "",
        token: str | None = None,
        admin_token: str = "",
    ) -> None:
        """Connects when the first call is made.

        Args:
            model: the model's name; may stay empty for calls that need none.
            ip: host of the only server (with ``port``; "localhost" and 50000 if just one of them is given), or its
                whole address, such as "host:port".
            port: see ``ip``.
            addresses: of every server, as a list or separated by commas: "host:port", where the host may be a name that
                stands for many; "unix:/path"; or one "dns://nameserver/host:port". Without it and ``ip`` and ``port``,
                TMS_ADDRESS, else localhost:50000.
            timeout: seconds that a call may take if it does not say otherwise.
            connect_timeout: seconds to wait for a server that is not there or still loading its models.
            balancing: "load", by the load that the servers report, away from those that fail; or "round_robin".
            tls: True for TLS with the system's authorities (or TMS_TLS=1); implied by ``ca``.
            ca: PEM file of the authority of the servers' certificates (or TMS_TLS_CA).
            cert: PEM file of the client's own certificate (or TMS_CLIENT_CERT), with ``key`` (or TMS_CLIENT_KEY).
            key: see ``cert``.
            server_name: the name in the servers' certificates, if it is not that of the address.
            token: what servers with TMS_TOKEN ask for (or TMS_TOKEN).
            admin_token: lets calls that change the server work from another host.

        Raises ValueError for a malformed address or certificates that do not fit, OSError for files that are not there.
        """
        given = dict(locals())
        if not isinstance(model, str):
            raise TypeError(f"model is the name of a model, not a {type(model).__name__}")
        self._options = arguments.options(given)
        self.addresses: list[str] = self._options["addresses"]
        self._transport = transport = self._transport_class(arguments.text(model), self._options)
        super().__init__(transport.model, transport.call)
        _reuse_freed_memory()

    def __getstate__(self) -> dict[str, Any]:
        """Where the servers are, and how to call them; a client that is unpickled connects anew."""
        return self._options | {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, addresses={self.addresses!r})"

    def stats(self) -> dict[str, Any]:
        """{"calls", "failed", "retries", "replicas"}; of each replica the same, with p50_ms and p99_ms of late calls.

        A call counts for the replica that answered it in the end, "(none)" if none did.
        """
        return self._transport.stats.snapshot()


def _submitting(run: Callable[Concatenate[Any, _P], Any]) -> Callable[Concatenate[Any, _P], "Future[Any]"]:
    """The method that starts what ``run`` does, with its arguments."""

    @wraps(run)
    def submit(client: "ModelClient", /, *args: _P.args, **kwargs: _P.kwargs) -> "Future[Any]":
        future: Future[Any] = run(_Calls(client.model, client._transport.submit), *args, **kwargs)
        return future

    submit.__doc__ = f"Starts ``{run.__name__}``, and returns the future of its answer."
    return submit


class ModelClient(_Client):
    """A client of one model, connected to one server or balanced over several. Threads may share it.

    Every call takes ``args`` (a dict for the model), ``timeout`` (seconds, from the call to its answer) and ``retry``
    (False: what a server may have begun is not done again), and raises a ``ModelClientError`` if it fails. Answers are
    what the model returned: JSON values with numpy arrays in them.

    Clients of the same servers share their connections. Use ``close()`` or ``with`` to end them.
    """

    _transport: blocking.BlockingTransport
    _transport_class = blocking.BlockingTransport

    def run_stream(self, data: Any, args: Args = None, timeout: Seconds = None, *, retry: bool = True) -> Iterator[Any]:
        """The model's answers as it makes them; leaving the loop early ends the model's work. See ``run``."""
        request = calls.value("RunStream", self.model, data, args)
        return self._transport.stream(request, arguments.seconds(timeout), retry)

    # ---- several at once

    submit_image = _submitting(_Calls.run_image)
    submit_text = _submitting(_Calls.run_text)
    submit = _submitting(_Calls.run)
    submit_image_to_image = _submitting(_Calls.run_image_to_image)
    submit_image_batch = _submitting(_Calls.run_image_batch)
    submit_text_batch = _submitting(_Calls.run_text_batch)
    submit_batch = _submitting(_Calls.run_batch)

    def map(
        self,
        items: Iterable[Any],
        args: Args = None,
        timeout: Seconds = None,
        *,
        method: str | None = None,
        in_flight: int = _IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        retry: bool = True,
    ) -> Iterator[Any]:
        """One answer an item, in order, while up to ``in_flight`` calls run at once, over all replicas.

        Items are taken as places become free, so they may be a camera's frames without end. Each is called by
        ``method`` ("run_image", "run_text", "run", "run_image_to_image"); without it texts by run_text, arrays of two
        or three dimensions, paths and bytes by run_image, all else by run. An error is raised in its item's turn, or,
        with ``return_exceptions``, yielded. ``progress`` shows a bar on stderr (needs tqdm: the extra
        "progress").
        """
        in_flight = arguments.count("in_flight", in_flight, 1)
        timeout, items = arguments.seconds(timeout), arguments.stream(items)
        if progress:
            items = arguments.progress(items, self.model)
        ahead = _Calls(self.model, self._transport.ahead)

        def start(item: Any) -> Any:
            return ahead._run_any(method, item, args, timeout, retry)

        return blocking.in_order(start, items, in_flight, return_exceptions)

    # ---- changing the model: for callers on the servers' own host, or with the admin token

    def load_model(self, workers: int = 0, timeout: float = 300) -> list[dict[str, Any]]:
        """Loads the model on every server, with this many workers (0: as it says itself); see ``model_info``."""
        workers = arguments.count("workers", workers, -(1 << 31))  # its bounds are the server's to say
        return self._on_each(calls.ask("LoadModel", model=self.model, workers=workers), timeout)

    def unload_model(self, timeout: float = 300) -> list[dict[str, Any]]:
        """Unloads the model on every server, after it has answered what is queued."""
        return self._on_each(calls.ask("UnloadModel", model=self.model), timeout)

    def reload_model(self, timeout: float = 300) -> list[dict[str, Any]]:
        """Replaces the model's workers on every server by new ones from its files; no call fails meanwhile."""
        return self._on_each(calls.ask("ReloadModel", model=self.model), timeout)

    def model_info(self, timeout: Seconds = None) -> list[dict[str, Any]]:
        """What each server reports of the model: state, reason, worker_pids, queue_depth, metadata, and more."""
        return self._on_each(calls.ask("GetModelInfo", model=self.model), timeout)

    @contextmanager
    def loaded(self, workers: int = 0, timeout: float = 300) -> Iterator["ModelClient"]:
        """Loads the model on every server, and unloads it on leaving: ``with client.loaded(): ...``."""
        self.load_model(workers, timeout)
        try:
            yield self
        finally:
            self.unload_model(timeout)

    # ---- the servers

    def health_check(self, timeout: Seconds = None) -> dict[str, list[str]]:
        """{"serving": addresses, "stopped_serving": addresses}: which servers take calls now. Waits for none."""
        return self._transport.health(arguments.seconds(timeout, 2.0))

    def stop_server(self, timeout: Seconds = None) -> None:
        """Stops every server of ``addresses``; PermissionDenied from another host without the admin token."""
        self._on_each(calls.ask("StopServer"), timeout)

    def close(self) -> None:
        """Ends this client's connections; its calls in flight fail with ``Cancelled``. A later call connects again."""
        self._transport.close()

    def __enter__(self) -> "ModelClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _on_each(self, request: calls.Request, timeout: Seconds) -> list[Any]:
        return self._transport.on_each(request, arguments.seconds(timeout))


def _in_thread(run: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], Coroutine[Any, Any, _T]]:
    """The coroutine function that does what a method of ``ModelClient`` does, without blocking the loop."""

    @wraps(run)
    async def call(self: "AsyncModelClient", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with ModelClient(self.model, **self._options) as client:
            return await asyncio.to_thread(run, client, *args, **kwargs)

    return call


class AsyncModelClient(_Client):
    """``ModelClient`` for asyncio: the same calls, to be awaited. Each event loop has connections of its own."""

    _transport: aio.AsyncTransport
    _transport_class = aio.AsyncTransport

    load_model = _in_thread(ModelClient.load_model)
    unload_model = _in_thread(ModelClient.unload_model)
    reload_model = _in_thread(ModelClient.reload_model)
    model_info = _in_thread(ModelClient.model_info)
    health_check = _in_thread(ModelClient.health_check)
    stop_server = _in_thread(ModelClient.stop_server)

    def run_stream(
        self, data: Any, args: Args = None, timeout: Seconds = None, *, retry: bool = True
    ) -> AsyncIterator[Any]:
        """The model's answers as it makes them: ``async for``; see ``ModelClient.run_stream``."""
        request = calls.value("RunStream", self.model, data, args)
        return self._transport.stream(request, arguments.seconds(timeout), retry)

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        args: Args = None,
        timeout: Seconds = None,
        *,
        method: str | None = None,
        in_flight: int = _IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        retry: bool = True,
    ) -> AsyncIterator[Any]:
        """One answer an item, in order, as ``ModelClient.map``; the items may come from an async iterator."""
        in_flight = arguments.count("in_flight", in_flight, 1)
        timeout, items = arguments.seconds(timeout), arguments.stream(items)
        if progress:
            items = arguments.progress(items, self.model)

        def start(item: Any) -> Any:
            return self._run_any(method, item, args, timeout, retry)

        return aio.in_order(start, items, in_flight, return_exceptions)

    async def close(self) -> None:
        """Ends this client's connections; its calls in flight fail with ``Cancelled``. A later call connects again."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncModelClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


@cache
def _reuse_freed_memory() -> None:
    """Lets glibc's malloc keep large blocks that were freed: fresh pages cost more than the copy of an image.

    Freeing one large block raises malloc's dynamic mmap threshold; elsewhere this does nothing.
    """
    np.empty(_FREED_ONCE, np.uint8)
