"""The client: ``ModelClient('name').run_image(image)``. It needs grpcio, protobuf and numpy, and nothing else."""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from tiny_model_server import codec, errors, wire
from tiny_model_server.channel import open_channel, target
from tiny_model_server.codec import Array, Packed

__all__ = [
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
]

Image = Array | str | os.PathLike[str] | bytes
"""An array HxW or HxWxC of any numeric dtype, the path of an image file, or the bytes of one."""

DEFAULT_TIMEOUT_S = 60.0
_LIVE_SERVICE = "TinyModelServer"
_SERVICE = "server.Server"


class ModelClientError(grpc.RpcError):
    """A call that failed: ``code()`` is the gRPC status, ``details()`` what was wrong, ``model`` who was asked."""

    def __init__(self, code: grpc.StatusCode, details: str, model: str = "") -> None:
        super().__init__(f"{model}: {details}" if model and repr(model) not in details else details)
        self._code = code
        self._details = details
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._code, self._details, self.model)

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
    """PERMISSION_DENIED or UNAUTHENTICATED: the server answers this only to its own host or to the right token."""


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
    "UNAUTHENTICATED": PermissionDenied,
}
_STATUS_OF_CODE = {number: name for name, number in errors.CODES.items()}


class ModelClient:
    """A client of one model, connected to one server or balanced over several. Threads may share it.

    Every call takes ``args`` (a dict for the model) and ``timeout`` (seconds, from the call to its answer), and raises
    a ``ModelClientError`` if it fails. Answers are what the model returned: JSON values with numpy arrays in them.
    """

    def __init__(
        self,
        model: str = "",
        ip: str | None = None,
        port: int | None = None,
        *,
        addresses: Sequence[str] | str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        connect_timeout: float = 30.0,
        admin_token: str = "",
    ) -> None:
        """Connects when the first call is made.

        Args:
            model: the model's name; may stay empty for calls that need none.
            ip: host of the only server (with ``port``; "localhost" and 50000 if just one of them is given).
            port: see ``ip``.
            addresses: "host:port" of every server, as a list or separated by commas; without it and ``ip`` and
                ``port``, TMS_ADDRESS, else localhost:50000.
            timeout: seconds that a call may take if it does not say otherwise.
            connect_timeout: seconds to wait for a server that is not there or still loading its models.
            admin_token: lets ``stop_server`` work from another host.

        Raises ValueError for a malformed address.
        """
        self.model = model
        self.addresses = _addresses(ip, port, addresses)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._metadata = [("authorization", f"Bearer {admin_token}")] if admin_token else None
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._connected = False
        self._calls: dict[str, Any] = {}
        if len(self.addresses) == 1:
            target(self.addresses)  # a malformed address is told here, not at the first call

    # ---- running the model

    def run_image(self, image: Image, args: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The model's answer to one image. An array HxWx1 arrives as HxW; files are decoded by the server."""
        return self._run("RunImage", "ImageArgs", {"image": _image(image)}, args, timeout)

    def run_text(self, text: str, args: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The model's answer to one text."""
        return self._run("RunText", "TextArgs", {"text": text}, args, timeout)

    def run(self, data: Any, args: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The model's answer to any value: JSON values, with numpy arrays of any dtype and rank, and bytes, in it."""
        request = self._request("RunArgs", {"data": _value(codec.pack(data))}, args)
        return _answer(self._call("Run", request, timeout))

    def run_image_to_image(
        self, image: Image, args: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Array:
        """The image, HxW or HxWxC of any numeric dtype, that the model makes of an image."""
        request = self._request("ImageArgs", {"image": _image(image)}, args)
        found = self._call("RunImageToImage", request, timeout).image
        return codec.image_from(found.height, found.width, found.channels, found.dtype, found.data).copy()

    def run_image_batch(
        self,
        images: Sequence[Image],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """One answer an image, in order.

        If some fail, the first one's error is raised, or, with ``return_exceptions``, errors stand in their places.
        """
        fields = {"images": [_image(image) for image in images]}
        return self._run_batch("RunBatchImage", "BatchImageArgs", fields, args, timeout, return_exceptions)

    def run_text_batch(
        self,
        texts: Sequence[str],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """One answer a text, in order; see ``run_image_batch``."""
        if isinstance(texts, str):
            raise TypeError("run_text_batch takes a list of texts; for one text there is run_text")
        fields = {"texts": list(texts)}
        return self._run_batch("RunBatchText", "BatchTextArgs", fields, args, timeout, return_exceptions)

    def run_batch(
        self,
        items: Sequence[Any],
        args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """One answer a value, in order; see ``run`` and ``run_image_batch``."""
        fields = {"items": [_value(codec.pack(item)) for item in items]}
        return self._run_batch("RunBatch", "BatchRunArgs", fields, args, timeout, return_exceptions)

    def run_stream(
        self, data: Any, args: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator[Any]:
        """The model's answers as it makes them; leaving the loop early ends the model's work. See ``run``."""
        request = self._request("RunArgs", {"data": _value(codec.pack(data))}, args)
        timeout = self._timeout if timeout is None else timeout
        channel, call = self._connect("RunStream", timeout)
        responses = call(request, timeout=timeout, metadata=self._metadata)
        try:
            for response in responses:
                yield _answer(response)
        except grpc.RpcError as error:
            raise self._explain(error, channel, timeout) from None
        finally:
            responses.cancel()

    def get_input_shape(self, timeout: float | None = None) -> list[int] | None:
        """The shape that the model wants, or None when any will do."""
        shape = _data(self._call("GetInputShape", _message("StringArg")(data=self.model), timeout))
        return None if shape is None else list(shape)

    # ---- changing the model: for callers on the servers' own host, or with the admin token

    def load_model(self, workers: int = 0, timeout: float = 300) -> list[dict[str, Any]]:
        """Loads the model on every server, with this many workers (0: as it says itself); see ``model_info``."""
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

    # ---- asking about the servers

    def list_models(self, timeout: float | None = None) -> list[dict[str, str]]:
        """{"name", "state", "reason"} of every model; states are UNLOADED, LOADING, READY, FAILED, UNLOADING."""
        answer = self._call("GetModelStates", _message("EmptyArgs")(), timeout)
        return [{"name": model.name, "state": model.state, "reason": model.reason} for model in answer.models]

    def health_check(self, timeout: float | None = None) -> dict[str, list[str]]:
        """{"serving": addresses, "stopped_serving": addresses}: which servers take calls now. Waits for none."""
        result: dict[str, list[str]] = {"serving": [], "stopped_serving": []}
        for address in self.addresses:
            serving = self._is_serving(address, 2.0 if timeout is None else timeout)
            result["serving" if serving else "stopped_serving"].append(address)
        return result

    def stop_server(self, timeout: float | None = None) -> None:
        """Stops every server of ``addresses``; PermissionDenied from another host without the admin token."""
        self._each("StopServer", _message("EmptyArgs")(), timeout)

    # ---- the connection

    def close(self) -> None:
        """Ends the connection; calls in flight fail with ``Cancelled``. A later call connects again."""
        with self._lock:
            channel, self._channel, self._calls, self._connected = self._channel, None, {}, False
        if channel:
            channel.close()

    def __enter__(self) -> "ModelClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ModelClient({self.model!r}, addresses={self.addresses!r})"

    def _each(self, method: str, request: Any, timeout: float | None) -> list[Any]:
        answers = []
        for address in self.addresses:
            with ModelClient(self.model, addresses=[address], timeout=self._timeout) as one:
                one._metadata = self._metadata
                answers.append(one._call(method, request, timeout))
        return answers

    def _on_each(self, method: str, request: Any, timeout: float | None) -> list[dict[str, Any]]:
        return [
            {
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
            for info in self._each(method, request, timeout)
        ]

    def _run(self, method: str, kind: str, fields: dict[str, Any], args: Any, timeout: float | None) -> Any:
        request = self._request(kind, fields | {"accept_arrays": True}, args)
        return _answer(self._call(method, request, timeout))

    def _run_batch(
        self, method: str, kind: str, fields: dict[str, Any], args: Any, timeout: float | None, in_place: bool
    ) -> list[Any]:
        if kind != "BatchRunArgs":
            fields = fields | {"accept_arrays": True}
        answer = self._call(method, self._request(kind, fields, args), timeout)
        outcomes: list[Any] = []
        for index, item in enumerate(answer.items):
            if item.WhichOneof("outcome") == "value":
                outcomes.append(codec.unpack(Packed(item.value.json, _arrays(item.value.arrays))))
                continue
            status = _STATUS_OF_CODE.get(item.error.code, "UNKNOWN")
            error = _error(status, f"item {index}: {item.error.message}", self.model)
            if not in_place:
                raise error
            outcomes.append(error)
        return outcomes

    def _request(self, kind: str, fields: dict[str, Any], args: Mapping[str, Any] | None) -> Any:
        return _message(kind)(**fields, model=self.model, args=_args(args))

    def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        channel, call = self._connect(method, timeout)
        remaining = max(0.001, deadline - time.monotonic())
        try:
            return call(request, timeout=remaining, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explain(error, channel, timeout) from None
        except ValueError:  # what grpc raises for a call on a channel that another thread has closed
            raise Cancelled(grpc.StatusCode.CANCELLED, "the client was closed", self.model) from None

    def _connect(self, method: str, timeout: float) -> tuple[grpc.Channel, Any]:
        """The channel and the method's callable, after waiting for a server that is still starting."""
        with self._lock:
            if self._channel is None:
                self._channel = open_channel(self.addresses)
            channel = self._channel
            if method not in self._calls:
                described = wire.methods("server", _SERVICE)[method]
                kind = channel.unary_stream if described.server_streaming else channel.unary_unary
                self._calls[method] = kind(
                    described.path,
                    request_serializer=described.request.SerializeToString,
                    response_deserializer=described.response.FromString,
                )
            call = self._calls[method]
        if not self._connected:
            patience = min(timeout, self._connect_timeout)
            try:
                grpc.channel_ready_future(channel).result(timeout=patience)
            except grpc.FutureTimeoutError:
                raise self._unreachable(f"was not ready within {patience:g} s") from None
            self._connected = True
        return channel, call

    def _explain(self, error: Any, channel: grpc.Channel, timeout: float) -> ModelClientError:
        status, details = error.code().name, error.details() or "no details"
        if status == "DEADLINE_EXCEEDED" and not self._any_serving():
            return self._unreachable(f"went away, and did not come back within {timeout:g} s")
        return _error(status, details, self.model)

    def _unreachable(self, what: str) -> ModelClientError:
        details = f"no server at {', '.join(self.addresses)}: it {what}"
        return ServerUnavailable(grpc.StatusCode.UNAVAILABLE, details, self.model)

    def _any_serving(self) -> bool:
        return any(self._is_serving(address, 0.5) for address in self.addresses)

    def _is_serving(self, address: str, timeout: float) -> bool:
        request = wire.message("health", "grpc.health.v1.HealthCheckRequest")(service=_LIVE_SERVICE)
        response = wire.message("health", "grpc.health.v1.HealthCheckResponse")
        try:
            with open_channel([address]) as channel:
                check = channel.unary_unary(
                    "/grpc.health.v1.Health/Check", type(request).SerializeToString, response.FromString
                )
                return bool(check(request, timeout=timeout, wait_for_ready=False).status == response.SERVING)
        except (grpc.RpcError, ValueError):
            return False


def _addresses(ip: str | None, port: int | None, addresses: Sequence[str] | str | None) -> list[str]:
    if addresses is not None and (ip is not None or port is not None):
        raise ValueError("give either addresses, or ip and port")
    if ip is not None or port is not None:
        host = ip or "localhost"
        return [f"[{host}]:{port or 50000}" if ":" in host else f"{host}:{port or 50000}"]
    if addresses is None:
        addresses = os.environ.get("TMS_ADDRESS") or "localhost:50000"
    listed = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    if not listed:
        raise ValueError("addresses is empty; give at least one host:port")
    return [address.strip() for address in listed]


def _message(name: str) -> Any:
    return wire.message("server", f"{_SERVICE.partition('.')[0]}.{name}")


def _args(args: Mapping[str, Any] | None) -> str:
    if args is None:
        return ""
    if not isinstance(args, Mapping):
        raise TypeError(f"args must be a dict, not {type(args).__name__}")
    return codec.plain_json(args)


def _image(image: Image) -> Any:
    kind = _message("NumpyImage")
    if isinstance(image, (str, os.PathLike)):
        image = Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return kind(data=bytes(image), encoded=True)
    try:
        array = codec.require_image(np.asarray(image))
    except errors.InvalidInput as error:
        raise InvalidInput(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
    height, width, channels = (*array.shape, 1)[:3]
    return kind(
        height=height, width=width, channels=channels, dtype=codec.dtype_name(array.dtype), data=bytes(codec.raw(array))
    )


def _value(packed: Packed) -> Any:
    array = _message("Array")
    arrays = [
        array(dtype=codec.dtype_name(item.dtype), shape=item.shape, data=bytes(codec.raw(item)))
        for item in packed.arrays
    ]
    return _message("Value")(json=packed.text, arrays=arrays)


def _arrays(messages: Any) -> list[Array]:
    # Copied, so that what the application gets is its own to write to.
    return [codec.array_from(array.dtype, array.shape, array.data).copy() for array in messages]


def _answer(response: Any) -> Any:
    return codec.unpack(Packed(response.data, _arrays(response.arrays)))


def _data(response: Any) -> Any:
    return json.loads(response.data)


def _error(status: str, details: str, model: str) -> ModelClientError:
    return _ERRORS.get(status, ModelClientError)(grpc.StatusCode[status], details, model)
