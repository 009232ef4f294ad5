"""The client: ``ModelClient('name').run_image(image)``, and the same for asyncio. Needs grpcio, protobuf and numpy."""

import asyncio
import atexit
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, NamedTuple, ParamSpec

import grpc
import grpc.aio
import numpy as np

from tiny_model_server import codec, errors, local_transport, schemas, tracing
from tiny_model_server.client import arguments, channel, fork_safety, local
from tiny_model_server.client.credentials import Credentials
from tiny_model_server.client.local import LocalConnection, LocalConnections, shared_array
from tiny_model_server.client.stats import NOBODY, Stats
from tiny_model_server.codec import Array, Encoded
from tiny_model_server.shared_memory import Segment

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
    "shared_array",
]

Image = Array | str | os.PathLike[str] | bytes
"""An array HxW or HxWxC of any numeric dtype, the path of an image file, or the bytes of one."""

DEFAULT_TIMEOUT_S = 60.0
_IN_FLIGHT = 16
_METHODS = ("run", "run_text", "run_image", "run_image_to_image")  # of one item
_MOST_LANES = 64  # of one AsyncModelClient; calls beyond them go by gRPC
_FREED_ONCE = 31 << 20  # bytes; glibc's malloc takes no hint from a block above 32 MiB
_POLL_S = 0.05
_PROBE_S = 1.0
_SERVICE = "server.Server"
_P = ParamSpec("_P")


class ModelClientError(grpc.RpcError):
    """A call that failed: ``code()`` is the gRPC status, ``details()`` what was wrong.

    ``model`` was asked; ``replica`` ("host:port" as it calls itself) answered, or is "" if none did.
    """

    def __init__(self, code: grpc.StatusCode, details: str, model: str = "", replica: str = "") -> None:
        said = f"{model}: {details}" if model and repr(model) not in details else details
        super().__init__(f"{said} (replica {replica})" if replica else said)
        self._code = code
        self._details = details
        self.model = model
        self.replica = replica

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._code, self._details, self.model, self.replica)

    def code(self) -> grpc.StatusCode:
        """The gRPC status."""
        return self._code

    def details(self) -> str:
        """What was wrong."""
        return self._details


class InvalidInput(ModelClientError):
    """INVALID_ARGUMENT: the input is wrong; the message says what would be right."""


class ModelNotFound(ModelClientError):
    """NOT_FOUND: the server has no model of this name."""


class ModelUnavailable(ModelClientError):
    """FAILED_PRECONDITION: the model is known, but could not be loaded or cannot do this."""


class ModelFailed(ModelClientError):
    """INTERNAL: the model raised, or its process died of this input."""


class Overloaded(ModelClientError):
    """RESOURCE_EXHAUSTED: a queue is full, or the message is too large."""


class DeadlineExceeded(ModelClientError):
    """DEADLINE_EXCEEDED: there was no answer within ``timeout``."""


class ServerUnavailable(ModelClientError):
    """UNAVAILABLE: no server is reachable at the addresses."""


class Cancelled(ModelClientError):
    """CANCELLED: the call was cancelled, most often because the client was closed."""


class PermissionDenied(ModelClientError):
    """PERMISSION_DENIED: the server answers this only to its own host or to the admin token."""


class Unauthenticated(ModelClientError):
    """UNAUTHENTICATED: a token or a certificate, the client's or the server's, is missing or wrong."""


_ERRORS = {
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": ModelNotFound,
    "FAILED_PRECONDITION": ModelUnavailable,
    "INTERNAL": ModelFailed,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": ServerUnavailable,
    "CANCELLED": Cancelled,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": Unauthenticated,
}
_STATUS_OF_CODE = {number: name for name, number in errors.CODES.items()}


class _Message:
    """A message of the contract, and the bytes that belong into some of its parts: sent along, or put elsewhere."""

    def __init__(self, message: Any, parts: Sequence[tuple[Any, Array]] = ()) -> None:
        self._message = message
        self._parts = parts

    @property
    def short(self) -> bool:
        """True if the message without those bytes can be sent by the short cut without waiting."""
        return bool(self._message.ByteSize() < local_transport.AT_ONCE // 2)

    @property
    def arrays(self) -> list[Array]:
        """Where the bytes are now."""
        return [array for _, array in self._parts]

    def inline(self) -> bytes:
        """The message with all bytes in it."""
        kind, message = self._message.DESCRIPTOR.name, self._message
        ended = kind == "ImageArgs" or (
            kind == "RunArgs" and bool(self._parts) and self.arrays[-1].nbytes > schemas.LARGE
        )
        for part, array in self._parts:
            part.ClearField("place")
            if not ended or part is not self._parts[-1][0]:
                part.data = bytes(codec.raw(array))
        if not ended:
            data: bytes = message.SerializeToString()
            return data
        part, array = self._parts[-1]
        owner = b""
        if kind == "RunArgs":
            owner = part.SerializeToString()
            message = type(message).FromString(message.SerializeToString())
            del message.data.arrays[-1]
        return schemas.WithTrailingBytes(message, owner, codec.raw(array)).SerializeToString()

    def placed(self, offsets: Sequence[int]) -> bytes:
        """The message, which tells where the bytes are in what they were put into."""
        for (part, array), offset in zip(self._parts, offsets, strict=True):
            part.ClearField("data")
            part.place.offset, part.place.length = offset, array.nbytes
        data: bytes = self._message.SerializeToString()
        return data


_Source = Segment | memoryview | None
"""Where the bytes are that a message lacks: shared memory; or the bytes of its last array or image."""


class _Request(NamedTuple):
    method: str
    message: _Message
    decode: Callable[[Any, _Source], Any]


class _Calls:
    """What can be asked of a model; each way of calling says in ``_start`` how, and what comes of it."""

    model: str

    def _start(self, request: _Request, timeout: float | None, retry: bool = True) -> Any:
        raise NotImplementedError

    def run_image(
        self, image: Image, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> Any:
        """The model's answer to one image. An array HxWx1 arrives as HxW; files are decoded by the server."""
        request = self._image_request("RunImage", image, args, _answer)
        return self._start(request, arguments.seconds(timeout), retry)

    def run_text(
        self, text: str, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> Any:
        """The model's answer to one text."""
        request = self._request("RunText", "TextArgs", {"text": arguments.text(text)}, args)
        return self._start(request, arguments.seconds(timeout), retry)

    def run(
        self, data: Any, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> Any:
        """The model's answer to any value: JSON values, with numpy arrays of any dtype and rank, and bytes, in it."""
        return self._start(self._value_request("Run", data, args), arguments.seconds(timeout), retry)

    def run_image_to_image(
        self, image: Image, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> Any:
        """The image, HxW or HxWxC of any numeric dtype, that the model makes of an image."""
        request = self._image_request("RunImageToImage", image, args, _image_answer)
        return self._start(request, arguments.seconds(timeout), retry)

    def run_image_batch(
        self,
        images: Sequence[Image],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer an image, in order.

        If some fail, the first one's error is raised, or, with ``return_exceptions``, errors stand in their places.
        """
        described = [_image_parts(image) for image in arguments.images(images)]
        fields = {"images": [message for message, _ in described]}
        message = _message("BatchImageArgs")(**fields, model=self.model, args=_args(args), accept_arrays=True)
        parts = list(zip(message.images, (array for _, array in described), strict=True))
        request = _Request("RunBatchImage", _Message(message, parts), _answer)
        return self._start(self._batch(request, return_exceptions), arguments.seconds(timeout), retry)

    def run_text_batch(
        self,
        texts: Sequence[str],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer a text, in order; see ``run_image_batch``."""
        listed = [
            arguments.text(text) for text in arguments.batch(texts, "run_text_batch", "one text there is run_text")
        ]
        request = self._request("RunBatchText", "BatchTextArgs", {"texts": listed}, args)
        return self._start(self._batch(request, return_exceptions), arguments.seconds(timeout), retry)

    def run_batch(
        self,
        items: Sequence[Any],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> Any:
        """One answer a value, in order; see ``run`` and ``run_image_batch``."""
        listed = arguments.batch(items, "run_batch", "one value there is run")
        message = _message("BatchRunArgs")(model=self.model, args=_args(args))
        parts = [part for item in listed for part in _fill(message.items.add(), codec.encode(item))]
        request = _Request("RunBatch", _Message(message, parts), _answer)
        return self._start(self._batch(request, return_exceptions), arguments.seconds(timeout), retry)

    def get_input_shape(self, timeout: float | None = None) -> Any:
        """The shape that the model wants, a list of ints, or None when any will do."""
        request = _Request("GetInputShape", _Message(_message("StringArg")(data=self.model)), _data)
        return self._start(request, arguments.seconds(timeout))

    def list_models(self, timeout: float | None = None) -> Any:
        """{"name", "state", "reason"} of every model; states are UNLOADED, LOADING, READY, FAILED, UNLOADING."""
        request = _Request("GetModelStates", _Message(_message("EmptyArgs")()), _states)
        return self._start(request, arguments.seconds(timeout))

    def _any(
        self, data: Any, args: Mapping[str, Any] | None, timeout: float | None, retry: bool, method: str | None
    ) -> Any:
        """Calls by the method named, or by the one that the kind of the data suggests."""
        if method is None:
            method = "run"
            if isinstance(data, str):
                method = "run_text"
            elif isinstance(data, (bytes, os.PathLike)) or (isinstance(data, np.ndarray) and data.ndim in (2, 3)):
                method = "run_image"
        if method not in _METHODS:
            raise ValueError(f"method is one of {', '.join(_METHODS)}, not {method!r}")
        return getattr(self, method)(data, args, timeout, retry=retry)

    def _request(self, method: str, kind: str, fields: dict[str, Any], args: Mapping[str, Any] | None) -> _Request:
        message = _message(kind)(**fields, model=self.model, args=_args(args), accept_arrays=True)
        return _Request(method, _Message(message), _answer)

    def _image_request(self, method: str, image: Image, args: Any, decode: Callable[..., Any]) -> _Request:
        described, pixels = _image_parts(image)
        message = _message("ImageArgs")(image=described, model=self.model, args=_args(args), accept_arrays=True)
        return _Request(method, _Message(message, [(message.image, pixels)]), decode)

    def _value_request(self, method: str, data: Any, args: Mapping[str, Any] | None) -> _Request:
        message = _message("RunArgs")(model=self.model, args=_args(args))
        return _Request(method, _Message(message, _fill(message.data, codec.encode(data))), _answer)

    def _batch(self, request: _Request, in_place: bool) -> _Request:
        def decode(response: Any, source: _Source) -> list[Any]:
            outcomes: list[Any] = []
            for index, item in enumerate(response.items):
                if item.WhichOneof("outcome") == "value":
                    outcomes.append(codec.decode(Encoded(item.value.json, _arrays(item.value.arrays, source))))
                    continue
                status = _STATUS_OF_CODE.get(item.error.code, "UNKNOWN")
                error = _error(status, f"item {index}: {item.error.message}", self.model)
                if not in_place:
                    raise error
                outcomes.append(error)
            return outcomes

        return request._replace(decode=decode)


class _Client(_Calls):
    """What the blocking and the asyncio client share: where the servers are, the channels there, what went wrong."""

    _grpc: Any

    def __init__(
        self,
        model: str = "",
        ip: str | None = None,
        port: int | None = None,
        *,
        addresses: Sequence[str] | str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        connect_timeout: float = 30.0,
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
            ip: host of the only server (with ``port``; "localhost" and 50000 if just one of them is given).
            port: see ``ip``.
            addresses: of every server, as a list or separated by commas: "host:port", where the host may be a name that
                stands for many; "unix:/path"; or one "dns://nameserver/host:port". Without it and ``ip`` and ``port``,
                TMS_ADDRESS, else localhost:50000.
            timeout: seconds that a call may take if it does not say otherwise.
            connect_timeout: seconds to wait for a server that is not there or still loading its models.
            balancing: "load", by what the servers report of theirs, away from those that fail; or "round_robin".
            tls: True for TLS with the system's authorities (or TMS_TLS=1); implied by ``ca``.
            ca: PEM file of the authority of the servers' certificates (or TMS_TLS_CA).
            cert: PEM file of the client's own certificate (or TMS_CLIENT_CERT), with ``key`` (or TMS_CLIENT_KEY).
            key: see ``cert``.
            server_name: the name in the servers' certificates, if it is not that of the address.
            token: what servers with TMS_TOKEN ask for (or TMS_TOKEN).
            admin_token: lets calls that change the server work from another host.

        Raises ValueError for a malformed address or certificates that do not fit, OSError for files that are not there.
        """
        if not isinstance(model, str):
            raise TypeError(f"model is the name of a model, not a {type(model).__name__}")
        arguments.text(model)
        if tls not in (None, True, False):
            raise TypeError(f"tls is True or False, not {tls!r}")
        timeout = arguments.seconds(DEFAULT_TIMEOUT_S if timeout is None else timeout)
        connect_timeout = arguments.seconds(30.0 if connect_timeout is None else connect_timeout, "connect_timeout")
        env = os.environ
        ca = ca if ca is not None else env.get("TMS_TLS_CA", "")
        self.model = model
        self.addresses = arguments.addresses(ip, port, addresses, env.get("TMS_ADDRESS") or "localhost:50000")
        self._options: dict[str, Any] = {
            "addresses": self.addresses,
            "timeout": timeout,
            "connect_timeout": connect_timeout,
            "balancing": balancing,
            "tls": tls
            if tls is not None
            else bool(ca) or env.get("TMS_TLS", "0").lower() in ("1", "true", "yes", "on"),
            "ca": str(ca),
            "cert": str(cert if cert is not None else env.get("TMS_CLIENT_CERT", "")),
            "key": str(key if key is not None else env.get("TMS_CLIENT_KEY", "")),
            "server_name": server_name,
            "token": token if token is not None else env.get("TMS_TOKEN", ""),
            "admin_token": admin_token,
        }
        arguments.plain_texts(
            {name: self._options[name] for name in ("balancing", "server_name", "token", "admin_token")}
        )
        if balancing not in channel.POLICIES:
            raise ValueError(f"balancing is one of {', '.join(channel.POLICIES)}, not {balancing!r}")
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._credentials = Credentials(*(self._options[name] for name in ("tls", "ca", "cert", "key", "server_name")))
        self._credentials.check()
        token = admin_token or self._options["token"]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._target = channel.Target(self.addresses)
        self._stats = Stats()
        self._lock = threading.Lock()
        self._place: tuple[Any, ...] = ()
        port = local.port_of(self.addresses) if _short_cut(self._credentials) else None
        self._lane_port = port
        self._lanes: LocalConnections | None = None
        self._channels: dict[bool, Any] = {}
        self._stubs: dict[tuple[str, bool], Any] = {}
        self._connected = False
        self._last_deadline = 0.0
        _reuse_freed_memory()
        _clients.add(self)

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
        return self._stats.snapshot()

    def _loop(self) -> Any:
        """What a channel is bound to beside its process."""
        return None

    def _close_channels(self, channels: Sequence[Any], after_s: float) -> None:
        raise NotImplementedError

    def _stub(self, method: str, retry: bool, timeout: float) -> tuple[Any, Any]:
        """The channel and the callable of a method; a new channel where the addresses, process or loop have changed."""
        if fork_safety.unusable:
            raise RuntimeError(
                "this process was forked while its parent was in a call, or after it used AsyncModelClient, so gRPC "
                "cannot work in it; fork before, or start processes by spawn or forkserver"
            )
        try:
            target = self._target.current()
        except OSError as error:
            raise self._unreachable(str(error)) from None
        place = (target, fork_safety.generation, self._loop())
        with self._lock:
            if place != self._place:
                self._leave(place)
            if retry not in self._channels:
                policy = self._options["balancing"]
                self._channels[retry] = channel.open_channel(self._grpc, target, self._credentials, policy, retry)
            opened = self._channels[retry]
            if (method, retry) not in self._stubs:
                described = schemas.methods("server", _SERVICE)[method]
                self._stubs[method, retry] = getattr(opened, described.kind)(
                    described.path,
                    request_serializer=_Message.inline,
                    response_deserializer=partial(schemas.parse_trailing, described.response),
                )
            self._last_deadline = max(self._last_deadline, time.monotonic() + timeout)
            return opened, self._stubs[method, retry]

    def _leave(self, place: tuple[Any, ...]) -> None:
        """Lets go of the channels to another place, when the calls in them are over."""
        channels, self._channels, self._stubs = list(self._channels.values()), {}, {}
        if self._place[1:] == place[1:]:
            self._close_channels(channels, max(0.0, self._last_deadline - time.monotonic()))
        else:
            _abandoned.extend(channels)  # of the process or loop that was: to end them there is not for this one
            self._connected = False
        if self._lanes:
            self._lanes.close(calls=False)
        self._lanes = LocalConnections(self._lane_port, dict(self._metadata)) if self._lane_port else None
        if self._lanes:  # an application may drop a client without closing it, as it may drop an open file
            weakref.finalize(self, self._lanes.close).atexit = False
        self._place = place

    def _let_go(self) -> list[Any]:
        """Ends the short cut; returns the channels, which are to be closed."""
        with self._lock:
            channels, self._channels, self._stubs = list(self._channels.values()), {}, {}
            lanes, self._lanes = self._lanes, None
            self._place, self._connected = (), False
        if lanes:
            lanes.close()
        return channels

    def _sent(self, retry: bool) -> tuple[tuple[str, str], ...]:
        return self._metadata if retry else (*self._metadata, ("tms-retry", "no"))

    def _ended(self, method: str, begun: float, trailing: Any, status: str = "OK") -> str:
        return self._stats.add(method, time.monotonic() - begun, trailing, status)

    def _error(self, failed: Any, method: str, begun: float) -> ModelClientError:
        """The error of ours for gRPC's."""
        status = failed.code().name
        replica = self._ended(method, begun, failed.trailing_metadata(), status)
        details = failed.details() or "no details"
        return _error(status, details, self.model, "" if replica == NOBODY else replica)

    def _unreachable(self, why: str) -> ModelClientError:
        details = f"no server at {', '.join(self.addresses)}: {why}"
        return ServerUnavailable(grpc.StatusCode.UNAVAILABLE, details, self.model)

    def _refused(self) -> None:
        """Raises Unauthenticated if a server is there, but it and this client do not trust each other."""
        if why := channel.first_refusal(self.addresses, self._credentials):
            raise Unauthenticated(grpc.StatusCode.UNAUTHENTICATED, why, self.model)

    def _never_ready(self, patience: float, why: str) -> ModelClientError:
        return self._unreachable(f"it was not ready within {patience:g} s ({why})")

    def _gone(self, timeout: float, why: str) -> ModelClientError:
        return self._unreachable(f"it went away, and did not come back within {timeout:g} s ({why})")


class _Sent:
    """A call under way by the short cut, to be asked for its end as a future is, by one thread."""

    def __init__(
        self,
        client: _Client,
        request: _Request,
        deadline: float,
        retry: bool,
        lanes: LocalConnections,
        taken: LocalConnection,
    ) -> None:
        self._client, self._request, self._retry = client, request, retry
        self._lanes, self._lane, self._process = lanes, taken, fork_safety.generation
        self._described = schemas.methods("server", _SERVICE)[request.method]
        self.begun, self._deadline = time.monotonic(), deadline
        self._cancelled = False

    def begin(self) -> bool:
        """Sends the request; False if that cannot be."""
        try:
            message = self._request.message.placed(self._lane.place(self._request.message.arrays))
        except (OSError, ValueError) as error:
            self._lanes.give_up(f"memory cannot be shared: {error}")
            self.cancel()
            return False
        try:
            self._lane.send(self._described.path.encode(), message, self._remaining(), self._retry)
        except OSError:
            pass  # to receive says what it was
        return True

    def receive(self) -> tuple[Any] | None:
        """What came of the call; None if gRPC is to make it again, with all that it does for a call."""
        usable, client, taken = False, self._client, self._lane
        try:
            answer = taken.receive(self._remaining())
            usable = True
            status = _STATUS_OF_CODE.get(answer.code & ~local_transport.FINAL, "UNKNOWN")
            if status in channel.RETRIED and self._retry and not answer.code & local_transport.FINAL:
                return None
            self._ended(status)
            if answer.code:
                raise _error(status, answer.body.decode(), client.model, taken.server)
            return (self._request.decode(self._described.response.FromString(answer.body), answer.outbox),)
        except TimeoutError:
            self._ended("DEADLINE_EXCEEDED")
            raise _error("DEADLINE_EXCEEDED", "Deadline Exceeded", client.model, taken.server) from None
        except OSError as error:
            if self._cancelled or self._lanes is not client._lanes:
                raise Cancelled(grpc.StatusCode.CANCELLED, "the client was closed", client.model) from None
            if self._retry:
                return None
            self._ended("UNAVAILABLE")
            raise _error("UNAVAILABLE", f"the server went away: {error}", client.model, taken.server) from None
        finally:
            self._lanes.give_back(taken, usable=usable)

    async def received(self) -> tuple[Any] | None:
        """As ``receive``, while the event loop goes on."""
        loop = asyncio.get_running_loop()
        came, fd = asyncio.Event(), self._lane.fileno()
        loop.add_reader(fd, came.set)
        try:
            try:
                async with asyncio.timeout(self._remaining()):
                    await came.wait()
            finally:
                loop.remove_reader(fd)
        except TimeoutError:
            pass  # receive says so
        except asyncio.CancelledError:
            self.cancel()
            raise
        return await asyncio.to_thread(self.receive) if came.is_set() and not self._lane.whole() else self.receive()

    def done(self) -> bool:
        """True if ``result`` would not wait."""
        return self._lane.answered()

    def result(self) -> Any:
        """The answer, or the error raised; gRPC makes the call if need be."""
        with fork_safety.in_flight:
            if self._process != fork_safety.generation:
                raise Cancelled(grpc.StatusCode.CANCELLED, "it was begun before a fork", self._client.model)
            found = self.receive()
        return found[0] if found else self._client._start(self._request, self._remaining(), self._retry)

    def cancel(self) -> None:
        """Ends the call, from any thread; in a child of its process, it is not ours to end."""
        self._cancelled = True
        if self._process == fork_safety.generation:
            self._lanes.give_back(self._lane, usable=False)

    def _remaining(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _ended(self, status: str) -> None:
        self._client._ended(self._request.method, self.begun, (("tms-replica", self._lane.server),), status)


class _Submitter(_Calls):
    """The way of calling that returns futures, or what is like them."""

    def __init__(self, client: "ModelClient", submit: Callable[[_Request, float | None, bool], Any]) -> None:
        self._submit = submit
        self.model = client.model

    def _start(self, request: _Request, timeout: float | None, retry: bool = True) -> Any:
        return self._submit(request, timeout, retry)


def _submitting(run: Callable[Concatenate[Any, _P], Any]) -> Callable[Concatenate[Any, _P], "Future[Any]"]:
    """The method that starts what ``run`` does, with its arguments."""

    @wraps(run)
    def submit(client: "ModelClient", /, *args: _P.args, **kwargs: _P.kwargs) -> "Future[Any]":
        return run(_Submitter(client, client._submit), *args, **kwargs)  # type: ignore[no-any-return]

    submit.__doc__ = f"Starts ``{run.__name__}``, and returns the future of its answer."
    return submit


class ModelClient(_Client):
    """A client of one model, connected to one server or balanced over several. Threads may share it.

    Every call takes ``args`` (a dict for the model), ``timeout`` (seconds, from the call to its answer) and ``retry``
    (False: what a server may have begun is not done again), and raises a ``ModelClientError`` if it fails. Answers are
    what the model returned: JSON values with numpy arrays in them.
    """

    _grpc = grpc

    def run_stream(
        self, data: Any, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> Iterator[Any]:
        """The model's answers as it makes them; leaving the loop early ends the model's work. See ``run``."""
        timeout, request = arguments.seconds(timeout), self._value_request("RunStream", data, args)
        with fork_safety.in_flight:
            begun, timeout, opened, stub = self._connect(request, timeout, retry)
            responses = stub(request.message, timeout=timeout, metadata=self._sent(retry))
            try:
                for response in responses:
                    yield request.decode(*response)
                self._ended(request.method, begun, responses.trailing_metadata())
            except grpc.RpcError as error:
                raise self._explained(error, request, begun, timeout, opened) from None
            finally:
                responses.cancel()

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
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
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
        with ``return_exceptions``, yielded. ``progress`` shows a bar on stderr (needs tqdm).
        """
        in_flight = arguments.count("in_flight", in_flight, 1)
        timeout, items = arguments.seconds(timeout), arguments.stream(items)
        if progress:
            from tqdm.auto import tqdm

            items = tqdm(items, desc=self.model, unit="item")
        ahead, pending = _Submitter(self, self._ahead), deque[Any]()

        def first() -> Any:
            try:
                return pending.popleft().result()
            except ModelClientError as error:
                if return_exceptions:
                    return error
                raise

        try:
            for item in items:
                while pending and (len(pending) >= in_flight or pending[0].done()):
                    yield first()
                pending.append(ahead._any(item, args, timeout, retry, method))
            while pending:
                yield first()
        finally:
            for call in pending:
                call.cancel()

    # ---- changing the model: for callers on the servers' own host, or with the admin token

    def load_model(self, workers: int = 0, timeout: float = 300) -> list[dict[str, Any]]:
        """Loads the model on every server, with this many workers (0: as it says itself); see ``model_info``."""
        workers = arguments.count("workers", workers, -(1 << 31))  # its bounds are the server's to say
        return self._on_each("LoadModel", _message("LoadArgs")(model=self.model, workers=workers), timeout)

    def unload_model(self, timeout: float = 300) -> list[dict[str, Any]]:
        """Unloads the model on every server, after it has answered what is queued."""
        return self._on_each("UnloadModel", _message("ModelName")(model=self.model), timeout)

    def reload_model(self, timeout: float = 300) -> list[dict[str, Any]]:
        """Replaces the model's workers on every server by new ones from its files; no call fails meanwhile."""
        return self._on_each("ReloadModel", _message("ModelName")(model=self.model), timeout)

    def model_info(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """What each server tells of the model: state, reason, worker_pids, queue_depth, metadata, and more."""
        return self._on_each("GetModelInfo", _message("ModelName")(model=self.model), timeout)

    @contextmanager
    def loaded(self, workers: int = 0, timeout: float = 300) -> Iterator["ModelClient"]:
        """Loads the model on every server, and unloads it on leaving: ``with client.loaded(): ...``."""
        self.load_model(workers, timeout)
        try:
            yield self
        finally:
            self.unload_model(timeout)

    # ---- the servers

    def health_check(self, timeout: float | None = None) -> dict[str, list[str]]:
        """{"serving": addresses, "stopped_serving": addresses}: which servers take calls now. Waits for none."""
        timeout = arguments.seconds(timeout)
        result: dict[str, list[str]] = {"serving": [], "stopped_serving": []}
        for one in self._each_server():
            address = one.addresses[0]
            try:
                opened, _ = one._stub("GetPID", True, 2.0)
                good = channel.health_check(opened)(timeout=2.0 if timeout is None else timeout).status == 1
            except (grpc.RpcError, OSError):
                good = False
            result["serving" if good else "stopped_serving"].append(address)
        return result

    def stop_server(self, timeout: float | None = None) -> None:
        """Stops every server of ``addresses``; PermissionDenied from another host without the admin token."""
        self._each("StopServer", _message("EmptyArgs")(), _data, timeout)

    def close(self) -> None:
        """Ends the connection; calls in flight fail with ``Cancelled``. A later call connects again."""
        for opened in self._let_go():
            opened.close()

    def __enter__(self) -> "ModelClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, request: _Request, timeout: float | None, retry: bool = True, outcome: "Future[Any] | None" = None
    ) -> Any:
        with fork_safety.in_flight:
            begun, timeout, opened, stub = self._connect(request, timeout, retry)
            if sent := self._send(request, begun + timeout, retry):
                if outcome:
                    outcome.add_done_callback(lambda future: sent.cancel() if future.cancelled() else None)
                if found := sent.receive():
                    return found[0]
            remaining = max(0.001, begun + timeout - time.monotonic())
            try:
                response, call = stub.with_call(request.message, timeout=remaining, metadata=self._sent(retry))
            except grpc.RpcError as error:
                raise self._explained(error, request, begun, timeout, opened) from None
            except ValueError:  # what grpc raises for a call on a channel that another thread has closed
                raise Cancelled(grpc.StatusCode.CANCELLED, "the client was closed", self.model) from None
            self._ended(request.method, begun, call.trailing_metadata())
        return request.decode(*response)

    def _send(self, request: _Request, deadline: float, retry: bool) -> "_Sent | None":
        """The call, under way by the short cut; None if gRPC is to make it."""
        if not (lanes := self._lanes) or not (taken := lanes.take(request.message.arrays)):
            return None
        sent = _Sent(self, request, deadline, retry, lanes, taken)
        return sent if sent.begin() else None

    def _ahead(self, request: _Request, timeout: float | None, retry: bool) -> "Future[Any] | _Sent":
        """Starts a call; by the short cut no thread waits for its answer but the one that wants it."""
        if self._connected:
            with fork_safety.in_flight:
                begun, timeout, _, _ = self._connect(request, timeout, retry)
                if sent := self._send(request, begun + timeout, retry):
                    return sent
        return self._submit(request, timeout, retry)

    def _submit(self, request: _Request, timeout: float | None, retry: bool) -> "Future[Any]":
        outcome: Future[Any] = Future()
        since = time.monotonic()
        job = partial(self._wait, request, timeout, retry, outcome, since)
        if self._connected and self._lanes and self._lanes.begin(job):
            return outcome
        if self._connected:
            self._begin(request, timeout, retry, outcome)
        else:  # waiting for a server is not for the caller's thread
            threading.Thread(target=self._begin, args=(request, timeout, retry, outcome), daemon=True).start()
        return outcome

    def _wait(
        self, request: _Request, timeout: float | None, retry: bool, outcome: "Future[Any]", since: float
    ) -> None:
        """Makes a call in this thread, whose end resolves the outcome; ``since`` it was asked for, its time runs."""
        waited, timeout = time.monotonic() - since, self._timeout if timeout is None else timeout
        answer: Any = None
        error: BaseException | None = None
        try:
            answer = self._start(request, max(0.001, timeout - waited), retry, outcome)
        except Exception as failed:
            error = failed
        if outcome.set_running_or_notify_cancel():
            outcome.set_exception(error) if error else outcome.set_result(answer)

    def _begin(self, request: _Request, timeout: float | None, retry: bool, outcome: "Future[Any]") -> None:
        """Starts a call, whose end resolves the outcome."""

        def settle(answer: Any, error: BaseException | None) -> None:
            fork_safety.end()
            if outcome.set_running_or_notify_cancel():
                outcome.set_exception(error) if error else outcome.set_result(answer)

        fork_safety.begin()
        try:
            begun, timeout, opened, stub = self._connect(request, timeout, retry)
            remaining = max(0.001, begun + timeout - time.monotonic())
            call = stub.future(request.message, timeout=remaining, metadata=self._sent(retry))
        except Exception as error:
            settle(None, error)
            return

        def finish(call: Any) -> None:
            answer: Any = None
            error: BaseException | None = None
            try:
                response = call.result()
                self._ended(request.method, begun, call.trailing_metadata())
                answer = request.decode(*response)
            except grpc.FutureCancelledError:  # by close(), or by who has the future
                error = Cancelled(grpc.StatusCode.CANCELLED, "the client was closed", self.model)
            except ModelClientError as failed:  # of an item in a batch
                error = failed
            except grpc.RpcError as failed:
                error = self._explained(failed, request, begun, timeout, opened)
            except Exception as failed:
                error = failed
            settle(answer, error)

        call.add_done_callback(finish)
        outcome.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)

    def _connect(self, request: _Request, timeout: float | None, retry: bool) -> tuple[float, float, Any, Any]:
        """(time, timeout, channel, callable), after waiting for a server that is still starting."""
        begun, timeout = time.monotonic(), self._timeout if timeout is None else timeout
        opened, stub = self._stub(request.method, retry, timeout)
        if not self._connected:
            patience = min(timeout, self._connect_timeout)
            self._wait_until_ready(opened, patience)
            self._connected = True
        return begun, timeout, opened, stub

    def _wait_until_ready(self, opened: Any, patience: float) -> None:
        deadline = time.monotonic() + patience
        while why := self._why_silent(opened, max(0.001, deadline - time.monotonic())):
            self._refused()
            if time.monotonic() > deadline:
                raise self._never_ready(patience, why)
            time.sleep(_POLL_S)

    def _why_silent(self, opened: Any, timeout: float) -> str | None:
        """Why no server answers, None if one does."""
        try:
            channel.health_check(opened)(timeout=timeout)
        except grpc.RpcError as error:
            return _why_silent(error)
        return None

    def _explained(self, failed: Any, request: _Request, begun: float, timeout: float, opened: Any) -> ModelClientError:
        error = self._error(failed, request.method, begun)
        unanswered = isinstance(error, DeadlineExceeded) and not error.replica
        if unanswered and (why := self._why_silent(opened, _PROBE_S)):
            return self._gone(timeout, why)
        return error

    def _close_channels(self, channels: Sequence[Any], after_s: float) -> None:
        for opened in channels:
            timer = threading.Timer(after_s, opened.close)
            timer.daemon = True
            timer.start()

    def _each_server(self) -> Iterator["ModelClient"]:
        for address, host in channel.replicas(self.addresses):
            name = self._credentials.server_name or (
                host if self._credentials.tls and address not in self.addresses else ""
            )
            with ModelClient(self.model, **self._options | {"addresses": [address], "server_name": name}) as one:
                yield one

    def _each(self, method: str, message: Any, decode: Callable[..., Any], timeout: float | None) -> list[Any]:
        timeout = arguments.seconds(timeout)
        return [one._start(_Request(method, _Message(message), decode), timeout) for one in self._each_server()]

    def _on_each(self, method: str, message: Any, timeout: float | None) -> list[dict[str, Any]]:
        return self._each(method, message, _info, timeout)


def _in_thread(name: str) -> Any:
    """The coroutine function that does what a method of ``ModelClient`` does, without blocking the loop."""

    async def call(self: "AsyncModelClient", *args: Any, **kwargs: Any) -> Any:
        with ModelClient(self.model, **self._options) as blocking:
            return await asyncio.to_thread(getattr(blocking, name), *args, **kwargs)

    call.__name__, call.__doc__ = name, getattr(ModelClient, name).__doc__
    return call


class AsyncModelClient(_Client):
    """``ModelClient`` for asyncio: the same calls, to be awaited. Each event loop has connections of its own."""

    _grpc = grpc.aio

    load_model = _in_thread("load_model")
    unload_model = _in_thread("unload_model")
    reload_model = _in_thread("reload_model")
    model_info = _in_thread("model_info")
    health_check = _in_thread("health_check")
    stop_server = _in_thread("stop_server")

    async def run_stream(
        self, data: Any, args: Mapping[str, Any] | None = None, timeout: float | None = None, *, retry: bool = True
    ) -> AsyncIterator[Any]:
        """The model's answers as it makes them: ``async for``; see ``ModelClient.run_stream``."""
        timeout, request = arguments.seconds(timeout), self._value_request("RunStream", data, args)
        with fork_safety.in_flight:
            begun, timeout, opened, stub = await self._connect(request, timeout, retry)
            responses = stub(request.message, timeout=timeout, metadata=self._sent(retry))
            try:
                async for response in responses:
                    yield request.decode(*response)
                self._ended(request.method, begun, await responses.trailing_metadata())
            except grpc.RpcError as error:
                raise await self._explained(error, request, begun, timeout, opened) from None
            finally:
                responses.cancel()

    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        method: str | None = None,
        in_flight: int = _IN_FLIGHT,
        return_exceptions: bool = False,
        retry: bool = True,
    ) -> AsyncIterator[Any]:
        """One answer an item, in order, as ``ModelClient.map``; the items may come from an async iterator."""
        in_flight = arguments.count("in_flight", in_flight, 1)
        timeout, items = arguments.seconds(timeout), arguments.stream(items)
        pending = deque[asyncio.Task[Any]]()

        async def first() -> Any:
            try:
                return await pending.popleft()
            except ModelClientError as error:
                if return_exceptions:
                    return error
                raise

        try:
            async for item in _each_of(items):
                while pending and (len(pending) >= in_flight or pending[0].done()):
                    yield await first()
                pending.append(asyncio.ensure_future(self._any(item, args, timeout, retry, method)))
            while pending:
                yield await first()
        finally:
            for task in pending:
                task.cancel()

    async def close(self) -> None:
        """Ends the connection; calls in flight fail with ``Cancelled``. A later call connects again."""
        for opened in self._let_go():
            await opened.close()

    async def __aenter__(self) -> "AsyncModelClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _loop(self) -> Any:
        return asyncio.get_running_loop()

    async def _start(self, request: _Request, timeout: float | None, retry: bool = True) -> Any:
        with fork_safety.in_flight:
            begun, timeout, opened, stub = await self._connect(request, timeout, retry)
            if (sent := self._send(request, begun + timeout, retry)) and (found := await sent.received()):
                return found[0]
            remaining = max(0.001, begun + timeout - time.monotonic())
            try:
                call = stub(request.message, timeout=remaining, metadata=self._sent(retry))
                response, trailing = await call, await call.trailing_metadata()
            except grpc.RpcError as error:
                raise await self._explained(error, request, begun, timeout, opened) from None
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                raise Cancelled(grpc.StatusCode.CANCELLED, "the client was closed", self.model) from None
            self._ended(request.method, begun, trailing)
        return request.decode(*response)

    def _send(self, request: _Request, deadline: float, retry: bool) -> _Sent | None:
        """The call, under way by the short cut; None if gRPC is to make it, for nothing here may wait."""
        if not (lanes := self._lanes) or lanes.busy >= _MOST_LANES or not request.message.short:
            return None
        if not (taken := lanes.take(request.message.arrays, connect=False)):
            lanes.prepare(request.message.arrays)
            return None
        sent = _Sent(self, request, deadline, retry, lanes, taken)
        return sent if sent.begin() else None

    async def _connect(self, request: _Request, timeout: float | None, retry: bool) -> tuple[float, float, Any, Any]:
        begun, timeout = time.monotonic(), self._timeout if timeout is None else timeout
        if not self._connected:
            fork_safety.polled = True
            try:
                await asyncio.to_thread(self._target.current)
            except OSError:
                pass  # said by _stub
        opened, stub = self._stub(request.method, retry, timeout)
        if not self._connected:
            patience = min(timeout, self._connect_timeout)
            deadline = begun + patience
            while why := await self._why_silent(opened, max(0.001, deadline - time.monotonic())):
                await asyncio.to_thread(self._refused)
                if time.monotonic() > deadline:
                    raise self._never_ready(patience, why)
                await asyncio.sleep(_POLL_S)
            self._connected = True
        return begun, timeout, opened, stub

    async def _explained(
        self, failed: Any, request: _Request, begun: float, timeout: float, opened: Any
    ) -> ModelClientError:
        error = self._error(failed, request.method, begun)
        unanswered = isinstance(error, DeadlineExceeded) and not error.replica
        if unanswered and (why := await self._why_silent(opened, _PROBE_S)):
            return self._gone(timeout, why)
        return error

    async def _why_silent(self, opened: Any, timeout: float) -> str | None:
        try:
            await channel.health_check(opened)(timeout=timeout)
        except grpc.RpcError as error:
            return _why_silent(error)
        return None

    def _close_channels(self, channels: Sequence[Any], after_s: float) -> None:
        for opened in channels:
            self._loop().call_later(after_s, lambda opened=opened: asyncio.ensure_future(opened.close()))


_abandoned: list[Any] = []
"""Channels of another process or event loop, kept so that nothing tries to close them here."""


_clients: weakref.WeakSet[_Client] = weakref.WeakSet()


@atexit.register
def _close_clients() -> None:
    # At the interpreter's end gRPC's threads are gone, and a channel that is still open would wait for them for ever.
    for client in list(_clients):
        if isinstance(client, ModelClient):
            client.close()


def _why_silent(error: Any) -> str | None:
    """What gRPC says of a server that is not there; None if the error is the answer of one that is."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return error.details() or "no details"
    return None


async def _each_of(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


@cache
def _message(name: str) -> Any:
    return schemas.message("server", f"{_SERVICE.partition('.')[0]}.{name}")


def _short_cut(trust: Credentials) -> bool:
    wanted = os.environ.get("TMS_LOCAL_TRANSPORT") or os.environ.get("TMS_LANE", "1")
    return (
        wanted.lower() in ("1", "true", "yes", "on")
        and local_transport.available()
        and not trust.tls
        and not tracing.provider()
    )


def _args(args: Mapping[str, Any] | None) -> str:
    if args is None:
        return ""
    if not isinstance(args, Mapping):
        raise TypeError(f"args must be a dict, not {type(args).__name__}")
    return codec.args_json(args)


@cache
def _reuse_freed_memory() -> None:
    """Lets glibc's malloc keep large blocks that were freed: fresh pages cost more than the copy of an image.

    Freeing one large block raises malloc's dynamic mmap threshold; elsewhere this does nothing.
    """
    np.empty(_FREED_ONCE, np.uint8)


def _image_parts(image: Image) -> tuple[Any, Array]:
    """The message of an image without its data, and the data; a file's bytes as an array."""
    kind, image = _message("NumpyImage"), arguments.image(image)
    if isinstance(image, (str, os.PathLike)):
        image = Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        if not len(image):
            raise InvalidInput(grpc.StatusCode.INVALID_ARGUMENT, "0 bytes that are no image file")
        return kind(encoded=True), np.frombuffer(image, np.uint8)
    try:
        array = codec.require_image(image if isinstance(image, np.ndarray) else np.asarray(image))
    except errors.InvalidInput as error:
        raise InvalidInput(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
    height, width, channels = (*array.shape, 1)[:3]
    described = kind(height=height, width=width, channels=channels, dtype=codec.dtype_name(array.dtype))
    return described, array


def _fill(value: Any, packed: Encoded) -> list[tuple[Any, Array]]:
    """Puts a packed value into its message, but for the arrays' bytes: those are returned with their places in it."""
    value.json = packed.text
    return [(value.arrays.add(dtype=codec.dtype_name(one.dtype), shape=one.shape), one) for one in packed.arrays]


def _arrays(messages: Any, source: _Source) -> list[Array]:
    found = [_bytes(array, None if isinstance(source, memoryview) else source) for array in messages]
    if isinstance(source, memoryview):
        found[-1] = source
    named = zip(messages, found, strict=True)
    return [codec.array_from(one.dtype, one.shape, data).copy() for one, data in named]


def _bytes(message: Any, source: _Source) -> bytes | memoryview:
    if isinstance(source, memoryview):
        return source
    if source is not None and message.HasField("place"):
        return source.bytes_at(message.place.offset, message.place.length)
    data: bytes = message.data
    return data


def _answer(response: Any, source: _Source) -> Any:
    return codec.decode(Encoded(response.data, _arrays(response.arrays, source)))


def _data(response: Any, source: _Source) -> Any:
    return json.loads(response.data)


def _image_answer(response: Any, source: _Source) -> Array:
    found = response.image
    data = _bytes(found, source)
    return codec.image_from(found.height, found.width, found.channels, found.dtype, data).copy()


def _states(response: Any, source: _Source) -> list[dict[str, str]]:
    return [{"name": model.name, "state": model.state, "reason": model.reason} for model in response.models]


def _info(info: Any, source: _Source) -> dict[str, Any]:
    return {
        "name": info.name,
        "state": info.state,
        "reason": info.reason,
        "worker_pids": list(info.worker_pids),
        "max_batch_size": info.max_batch_size,
        "queue_depth": info.queue_depth,
        "input_shape": json.loads(info.input_shape),
        "metadata": json.loads(info.metadata),
        "stages": list(info.stages),
    }


def _error(status: str, details: str, model: str, replica: str = "") -> ModelClientError:
    return _ERRORS.get(status, ModelClientError)(grpc.StatusCode[status], details, model, replica)
