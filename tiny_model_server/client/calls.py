"""Builds the request of every call and decodes its answer. Sends nothing: both clients and both transports share it."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from tiny_model_server import codec, conversions, local_transport, request_ids, schemas
from tiny_model_server.client import arguments, errors
from tiny_model_server.codec import Array, Encoded
from tiny_model_server.errors import CODES, InvalidInput
from tiny_model_server.shared_memory import Segment

Args = Mapping[str, Any] | None
"""The arguments that a model gets besides its input."""


class HasArray(Protocol):
    """A tensor or an array of another library than numpy."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """The array."""


class HasArrayInterface(Protocol):
    """An image of PIL."""

    @property
    def __array_interface__(self) -> Any:
        """The array, described."""


Image = Array | HasArray | HasArrayInterface | str | os.PathLike[str] | bytes
"""An array HxW or HxWxC of any numeric dtype, the path of an image file, or the bytes of one."""
Source = Segment | memoryview | None
"""Where the bytes are that are not in the message: shared memory, or the trailing bytes."""

METHODS = schemas.methods("server", "server.Server")
STATUSES = {code: name for name, code in CODES.items()}
"""The name of each gRPC status number."""


@dataclass
class Request:
    """A message of ``server.proto``, the arrays whose bytes it still lacks, and how its answer is decoded."""

    method: schemas.Method
    message: Any
    parts: Sequence[tuple[Any, Array]]
    """(the part of the message that describes an array, the array)."""
    decoder: Callable[[Any, Source], Any]
    id: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays that are sent."""
        return [array for _, array in self.parts]

    @property
    def short(self) -> bool:
        """True if the message, without the arrays, can be sent by the local transport without waiting."""
        return bool(self.message.ByteSize() < local_transport.AT_ONCE // 2)

    def inline(self) -> bytes:
        """Serializes the message with all bytes in it, those of the last array at the end."""
        message, parts = self.message, list(self.parts)
        trailing = parts.pop() if parts and self._may_trail() else None
        for part, array in parts:
            part.ClearField("place")
            part.data = bytes(codec.raw(array))
        if not trailing:
            return bytes(message.SerializeToString())
        part, array = trailing
        part.ClearField("place")
        owner = b""
        if self.method.name in ("Run", "RunStream"):  # where the array is one of several
            owner = part.SerializeToString()
            del message.data.arrays[-1]
        serialized = schemas.WithTrailingBytes(message, owner, codec.raw(array)).SerializeToString()
        if owner:
            message.data.arrays.append(part)  # for the next attempt
        return serialized

    def _may_trail(self) -> bool:
        if self.method.name in ("Run", "RunStream"):
            return self.arrays[-1].nbytes > schemas.LARGE
        return self.method.name in ("RunImage", "RunImageToImage")

    def decode(self, answer: Any, source: Source) -> Any:
        """What came of the call, from a message or its bytes; ModelFailed if that is not an answer to this request."""
        try:
            message = self.method.response.FromString(answer) if isinstance(answer, bytes) else answer
            return self.decoder(message, source)
        except (DecodeError, InvalidInput, ValueError, RecursionError) as error:
            why = f"the server's answer cannot be read: {error}"
            raise errors.from_status("INTERNAL", why, getattr(self.message, "model", ""), request_id=self.id) from error

    def placed(self, offsets: Sequence[int]) -> bytes:
        """Serializes the message with the places of the arrays in shared memory."""
        for (part, array), offset in zip(self.parts, offsets, strict=True):
            part.ClearField("data")
            part.place.offset, part.place.length = offset, array.nbytes
        return bytes(self.message.SerializeToString())


def ask(method: str, **fields: Any) -> Request:
    """A request with these fields and without arrays."""
    described = METHODS[method]
    decode = _DECODERS[described.response.DESCRIPTOR.name]
    return Request(described, described.request(**fields), [], decode, request_ids.for_call())


def text(method: str, model: str, value: str, args: Args) -> Request:
    """A request with one text; TypeError or ValueError for what cannot be sent."""
    return ask(method, text=arguments.text(value), model=model, args=_args(args), accept_arrays=True)


def image(method: str, model: str, value: Image, args: Args) -> Request:
    """A request with one image; TypeError, ValueError or ``InvalidInput`` for what is not an image."""
    request = ask(method, model=model, args=_args(args), accept_arrays=True)
    request.parts = [_put_image(request.message.image, value)]
    return request


def value(method: str, model: str, data: Any, args: Args) -> Request:
    """A request with one value; TypeError for what cannot be serialized."""
    request = ask(method, model=model, args=_args(args))
    request.parts = _put_value(request.message.data, data)
    return request


def text_batch(model: str, texts: Iterable[str], args: Args, return_exceptions: bool) -> Request:
    """A request with several texts; see ``text``."""
    checked = [arguments.text(one) for one in arguments.batch(texts, "run_text_batch", "one text there is run_text")]
    request = ask("RunBatchText", texts=checked, model=model, args=_args(args), accept_arrays=True)
    return _batch(request, model, return_exceptions)


def image_batch(model: str, images: Iterable[Image], args: Args, return_exceptions: bool) -> Request:
    """A request with several images; see ``image``."""
    request = ask("RunBatchImage", model=model, args=_args(args), accept_arrays=True)
    request.parts = [_put_image(request.message.images.add(), one) for one in arguments.images(images)]
    return _batch(request, model, return_exceptions)


def value_batch(model: str, items: Iterable[Any], args: Args, return_exceptions: bool) -> Request:
    """A request with several values; see ``value``."""
    request = ask("RunBatch", model=model, args=_args(args))
    listed = arguments.batch(items, "run_batch", "one value there is run")
    request.parts = [part for item in listed for part in _put_value(request.message.items.add(), item)]
    return _batch(request, model, return_exceptions)


def method_for(item: Any) -> str:
    """The client's method that suits the type of an item."""
    if isinstance(item, str):
        return "run_text"
    if isinstance(item, (bytes, os.PathLike)) or (isinstance(item, np.ndarray) and item.ndim in (2, 3)):
        return "run_image"
    if conversions.is_a(item, conversions.IMAGE):
        return "run_image"
    return "run"


def _batch(request: Request, model: str, return_exceptions: bool) -> Request:
    request.decoder = partial(_outcomes, model=model, request_id=request.id, return_exceptions=return_exceptions)
    return request


def _args(args: Args) -> str:
    if args is None:
        return ""
    if not isinstance(args, Mapping):
        raise TypeError(f"args must be a dict, not {type(args).__name__}")
    return codec.args_json(args)


def _put_image(part: Any, image: Image) -> tuple[Any, Array]:
    """Puts an image into its part of a message, except for its bytes."""
    array = _pixels_or_file(image)
    if array.ndim == 1:
        part.encoded = True
    else:
        part.height, part.width, part.channels = (*array.shape, 1)[:3]
        part.dtype = codec.dtype_name(array.dtype)
    return part, array


def _pixels_or_file(given: Image) -> Array:
    """The pixels of an image, HxW or HxWxC, or the bytes of its file, one dimension."""
    given = arguments.image(given)
    if isinstance(given, (str, os.PathLike)):
        try:
            given = Path(given).read_bytes()
        except FileNotFoundError as error:
            why = "there is no such image file; a text is sent by run_text"
            raise FileNotFoundError(error.errno, why, os.fspath(given)) from None
    try:
        if not isinstance(given, (bytes, bytearray, memoryview)):
            return codec.portable(codec.check_image(conversions.as_array(given)))
        if not len(given):
            raise InvalidInput("0 bytes are not an image file")
        return np.frombuffer(given, np.uint8)
    except InvalidInput as error:
        raise errors.from_status("INVALID_ARGUMENT", str(error)) from None


def _put_value(part: Any, data: Any) -> list[tuple[Any, Array]]:
    """Puts a value into its part of a message, except for the bytes of its arrays."""
    encoded = codec.encode(data)
    part.json = encoded.text
    return [(part.arrays.add(dtype=codec.dtype_name(one.dtype), shape=one.shape), one) for one in encoded.arrays]


def _bytes(part: Any, source: Source) -> Any:
    """The bytes of a lone image, or of an array whose bytes do not trail."""
    if isinstance(source, Segment) and part.HasField("place"):
        return source.bytes_at(part.place.offset, part.place.length)
    return source if isinstance(source, memoryview) else part.data


def _decoded(text: str, parts: Sequence[Any], source: Source) -> Any:
    """A value, with copies of its arrays."""
    inner = source if isinstance(source, Segment) else None
    found = [_bytes(part, inner) for part in parts]
    if isinstance(source, memoryview):
        found[-1] = source
    arrays = [codec.array_from(part.dtype, part.shape, data).copy() for part, data in zip(parts, found, strict=True)]
    return codec.decode(Encoded(text, arrays))


def _image_answer(response: Any, source: Source) -> Array:
    found = response.image
    data = _bytes(found, source)
    shape = codec.image_shape(found.height, found.width, found.channels)
    return codec.array_from(found.dtype or "uint8", shape, data).copy()


def _states(response: Any, source: Source) -> list[dict[str, str]]:
    return [{"name": model.name, "state": model.state, "reason": model.reason} for model in response.models]


def _info(info: Any, source: Source) -> dict[str, Any]:
    found = {field.name: getattr(info, field.name) for field in info.DESCRIPTOR.fields}
    found |= {name: json.loads(found[name] or "{}") for name in ("input_shape", "metadata", "schema")}
    return found | {name: list(found[name]) for name in ("worker_pids", "stages")}


_DECODERS: dict[str, Callable[[Any, Source], Any]] = {
    "Response": lambda response, source: _decoded(response.data, response.arrays, source),
    "ImageResponse": _image_answer,
    "ModelStates": _states,
    "ModelInfo": _info,
}


def _outcomes(response: Any, source: Source, *, model: str, request_id: str, return_exceptions: bool) -> list[Any]:
    """The answers of a batch. The first error is raised, unless errors stand in the places of their items."""
    outcomes: list[Any] = []
    for index, item in enumerate(response.items):
        if item.WhichOneof("outcome") == "value":
            outcomes.append(_decoded(item.value.json, item.value.arrays, source))
            continue
        status = STATUSES.get(item.error.code, "UNKNOWN")
        error = errors.from_status(status, f"item {index}: {item.error.message}", model, request_id=request_id)
        if not return_exceptions:
            raise error
        outcomes.append(error)
    return outcomes
