"""Message classes and method paths from the committed descriptor sets, in one private pool.

Generated modules would register in protobuf's default pool, where they clash with other libraries' stubs, and carry
a version stamp; descriptor sets do neither. ``make proto`` writes them from the .proto files.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from tiny_model_server.errors import InvalidInput, Overloaded

_FOLDER = Path(__file__).parent / "protocols"

LARGE = 1 << 15
"""Arrays and images of more bytes are kept out of the message."""
MAX_ITEMS = 100_000
"""Elements that a repeated field may have in one request, unless TMS_MAX_ITEMS is set."""
_FIELDS_PER_ITEM = 12  # an item that is an array of two dimensions has ten
_SPARE_FIELDS = 1000
_MAX_NUMBER_BYTES = 1 << 25  # bytes of memory for the packed numbers of one request
_MAX_SEARCHED = 100  # fields, in the search for trailing bytes; a request may have millions
_VARINT, _BYTES = 0, 2  # wire types
_FIXED_SIZES = {1: 8, 5: 4}  # bytes, by wire type
_Kind = descriptor.FieldDescriptor
_NUMBER_SIZES = dict.fromkeys((_Kind.CPPTYPE_INT32, _Kind.CPPTYPE_UINT32, _Kind.CPPTYPE_ENUM, _Kind.CPPTYPE_BOOL), 4)
_NUMBER_SIZES |= dict.fromkeys((_Kind.CPPTYPE_INT64, _Kind.CPPTYPE_UINT64), 16)
"""Bytes of memory for a packed number, which may have one byte on the wire."""
_TRAILING_FIELDS = {
    "server.ImageArgs": (1, 4),
    "server.RunArgs": (1, 2, 3),
    "server.Response": (2, 3),
    "server.ImageResponse": (2, 4),
}
"""The numbers of the fields that lead to the bytes of the last array or image."""

pool = descriptor_pool.DescriptorPool()
"""All schemas, for gRPC's reflection."""


class Method(NamedTuple):
    """One RPC: its path ("/server.Server/RunText") and name, message classes, and which sides stream."""

    path: str
    name: str
    request: Any
    response: Any
    client_streaming: bool
    server_streaming: bool

    @property
    def kind(self) -> str:
        """As grpc names it: "unary_unary", "unary_stream", "stream_unary" or "stream_stream"."""
        return "_".join("stream" if streams else "unary" for streams in (self.client_streaming, self.server_streaming))


class WithTrailingBytes(NamedTuple):
    """A message without the bytes of its last array or image, which saves copies: one when serialized, two when parsed.

    They come at the end, in a second occurrence of the field that leads to them; parsers merge the two. ``owner`` has
    the other fields of an array's own message, serialized; those of an image stay in the message, and it is empty.
    """

    message: Any
    owner: bytes
    data: memoryview

    def SerializeToString(self) -> bytes:
        """Serializes the message with its trailing bytes."""
        *path, last = _TRAILING_FIELDS[self.message.DESCRIPTOR.full_name]
        head = self.owner + _prefix(last, len(self.data))
        for field in reversed(path):
            head = _prefix(field, len(head) + len(self.data)) + head
        return b"".join((self.message.SerializeToString(), head, self.data))


def parse_trailing(kind: Any, data: bytes) -> tuple[Any, memoryview | None]:
    """(message, trailing bytes): leaves out the bytes of the last array or image, if they are many and last."""
    data, trailing = _split_trailing(data, _TRAILING_FIELDS.get(kind.DESCRIPTOR.full_name, ()))
    return kind.FromString(data), trailing


def parse(method: Method, data: bytes, call: Any = None, max_items: int = MAX_ITEMS) -> Any:
    """Parses a request of a call, counts its bytes, and sets ``trailing_bytes``. InvalidInput if it is not such a one.

    Protobuf may need 40 times a request's bytes in memory. What would need too much is refused before it is parsed.
    """
    kind = method.request.DESCRIPTOR
    if call is not None:
        call.bytes_in += len(data)
    try:
        if call is not None and not call.buffers:  # a place in shared memory goes before the bytes
            data, call.trailing_bytes = _split_trailing(data, _TRAILING_FIELDS.get(kind.full_name, ()))
        if len(data) > 2 * max_items:  # fewer bytes cannot hold too much
            _Counter(max_items).count(kind, data, 0, len(data))
        return method.request.FromString(data)
    except (DecodeError, LookupError):
        raise InvalidInput(f"the request is not a {kind.full_name}") from None


@cache
def _counted_fields(kind: Any) -> dict[int, tuple[str, int, Any]]:
    """The fields that are repeated or messages: their names, bytes in memory for a packed number, message types."""
    return {
        field.number: (field.name, field.is_repeated and _NUMBER_SIZES.get(field.cpp_type, 0), field.message_type)
        for field in kind.fields
        if field.is_repeated or field.message_type
    }


class _Counter:
    """Counts what a message has, from its bytes alone."""

    def __init__(self, max_items: int) -> None:
        self._max_items, self._max_fields = max_items, max_items * _FIELDS_PER_ITEM + _SPARE_FIELDS
        self._left: dict[str, int] = {}

    def count(self, kind: Any, data: bytes, begin: int, end: int) -> None:
        """InvalidInput if the message has too much, LookupError if it is malformed."""
        counted = _counted_fields(kind)
        for tag, _, at, after in _fields(data, begin, end):
            self._take("fields", 1, self._max_fields)
            if tag & 7 != _BYTES or (tag >> 3) not in counted:
                continue
            name, number_size, inner = counted[tag >> 3]
            if number_size:
                numbers = int(np.count_nonzero(np.frombuffer(data, np.uint8)[at:after] < 0x80))  # ends of varints
                self._take("packed numbers", numbers * number_size, _MAX_NUMBER_BYTES)
            else:
                self._take(name, 1, self._max_items)
            if inner:
                self.count(inner, data, at, after)

    def _take(self, what: str, size: int, limit: int) -> None:
        self._left[what] = left = self._left.get(what, limit) - size
        if left < 0:
            raise InvalidInput(f"the request has too many {what}; TMS_MAX_ITEMS allows {self._max_items} items")


def _split_trailing(data: bytes, path: tuple[int, ...]) -> tuple[bytes, memoryview | None]:
    """(serialized message, trailing bytes): splits off the field at the end of ``path``, if it is last and large."""
    heads: list[bytes] = []
    begin = 0
    try:
        for number in path if len(data) > LARGE else ():
            *_, (tag, start, at, after) = islice(_fields(data, begin, len(data)), _MAX_SEARCHED)
            if tag != number << 3 | _BYTES or after != len(data):
                return data, None
            heads.append(data[begin:start])
            begin = at
    except (LookupError, ValueError):  # malformed: protobuf will report it
        return data, None
    if not heads or len(data) - begin <= LARGE:
        return data, None
    rest = heads.pop()
    for number, head in zip(reversed(path[:-1]), reversed(heads), strict=True):
        rest = b"".join((head, _prefix(number, len(rest)), rest))
    return rest, memoryview(data)[begin:]


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: their tags, where these are, and where the contents begin and end.

    LookupError for malformed bytes, and for groups, which no schema here has.
    """
    while at < end:
        start, size = at, 0
        tag, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        if tag & 7 == _BYTES:
            size, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        elif tag & 7 == _VARINT:
            _, at = _varint(data, at)
        else:
            size = _FIXED_SIZES[tag & 7]
        if at + size > end:
            raise IndexError("a field ends after its message")
        yield tag, start, at, at + size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        value |= (data[at + index] & 0x7F) << 7 * index
        if data[at + index] < 0x80:
            return value, at + index + 1
    raise IndexError("a number has more than ten bytes")


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _prefix(field: int, size: int) -> bytes:
    """The tag and the length before the content of a length-delimited field."""
    return bytes((field << 3 | _BYTES,)) + varint(size)


def serialized(answer: Any, max_bytes: int | None = None) -> bytes:
    """Serializes a message. Overloaded, not to be retried, if it has more than ``max_bytes`` bytes."""
    data: bytes = answer.SerializeToString()
    if max_bytes and len(data) > max_bytes:
        raise Overloaded(f"the answer has {len(data)} bytes, more than TMS_MAX_MESSAGE_MB allows", retry_after_ms=-1)
    return data


@cache
def load(schema: str) -> None:
    """Adds the descriptor set ``protocols/<schema>.binpb`` to the pool."""
    files = descriptor_pb2.FileDescriptorSet.FromString((_FOLDER / f"{schema}.binpb").read_bytes())
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())


@cache
def message(schema: str, name: str) -> Any:
    """The class of a message by its full name, as in ``message("server", "server.TextArgs")``."""
    load(schema)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


@cache
def methods(schema: str, service: str) -> dict[str, Method]:
    """The methods of a service by their names, as in ``methods("server", "server.Server")["RunText"]``."""
    load(schema)
    kind, found = message_factory.GetMessageClass, {}
    for one in pool.FindServiceByName(service).methods:
        path, streams = f"/{service}/{one.name}", (one.client_streaming, one.server_streaming)
        found[one.name] = Method(path, one.name, kind(one.input_type), kind(one.output_type), *streams)
    return found


def handlers(servicer: Any, schema: str, service: str) -> dict[str, Callable[[Any, Any], Any]]:
    """The servicer's methods by their names; if one returns a dictionary, it has the fields of the response."""

    def answer(method: Method, request: Any, call: Any) -> Any:
        found = getattr(servicer, method.name)(request, call)
        return method.response(**found) if isinstance(found, dict) else found

    return {name: partial(answer, method) for name, method in methods(schema, service).items()}
