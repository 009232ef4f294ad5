"""Message classes and method paths from the committed descriptor sets, in one private pool.

Generated modules would register in protobuf's default pool, where they clash with other libraries' stubs, and carry
a version stamp; descriptor sets do neither. ``make proto`` writes them from the .proto files.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from tiny_model_server.codec import varint
from tiny_model_server.errors import InvalidInput, Overloaded

_FOLDER = Path(__file__).parent / "protocols"

LARGE = 1 << 15
"""Bytes of an array or image that are worth being kept out of messages."""
_MOST_FIELDS = 100  # to be looked through; no caller shall have us look at millions
MOST_ITEMS = 100_000
"""Elements of a repeated field in one request, if TMS_MAX_ITEMS does not say otherwise."""
_FIELDS_PER_ITEM = 12  # an array of two dimensions in an item has ten
_SPARE_FIELDS = 1000
_LARGEST_NUMBERS = 1 << 25  # bytes of the numbers that a message has as varints, which each may be one byte in it
_VARINTS = {"INT64": 16, "UINT64": 16, "SINT64": 16, "INT32": 4, "UINT32": 4, "SINT32": 4, "ENUM": 4, "BOOL": 1}
_TRAILING_FIELDS = {
    "server.ImageArgs": (1, 4),
    "server.RunArgs": (1, 2, 3),
    "server.Response": (2, 3),
    "server.ImageResponse": (2, 4),
}
"""The fields that lead to the bytes of the last array or image."""

pool = descriptor_pool.DescriptorPool()
"""Every schema of ours; give it to reflection."""


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
    """A message but for its last array or image, whose bytes protobuf would copy once more and its parser twice.

    They come at the end, in an occurrence of their own of that field. ``owner`` has what else an array says of itself,
    serialized; an image has said it in the message: parsers join what they find of it.
    """

    message: Any
    owner: bytes
    data: memoryview

    def head(self) -> bytes:
        """All bytes before those of the array."""
        *path, last = _TRAILING_FIELDS[self.message.DESCRIPTOR.full_name]
        head = b"".join((self.owner, _tag(last), varint(len(self.data))))
        for field in reversed(path):
            head = b"".join((_tag(field), varint(len(head) + len(self.data)), head))
        return bytes(self.message.SerializeToString() + head)

    def SerializeToString(self) -> bytes:
        """All bytes, as of any message."""
        return b"".join((self.head(), self.data))


def parse_trailing(kind: Any, data: bytes) -> tuple[Any, memoryview | None]:
    """A message, and the bytes of its last array or image if they are many, at its end, and so left out of it."""
    data, tail = _split_trailing(data, _TRAILING_FIELDS.get(kind.DESCRIPTOR.full_name, ()))
    return kind.FromString(data), tail


def parse(method: Method, data: bytes, call: Any = None, most_items: int = MOST_ITEMS) -> Any:
    """The request in these bytes; InvalidInput if they are not one. Sets ``call.trailing_bytes``.

    Protobuf makes 80 bytes of two, and 16 of one: what would become too much is refused before it is parsed.
    """
    if len(data) > 2 * most_items:  # else there cannot be more
        _Count(method.request.DESCRIPTOR.full_name, most_items).add(data, _fields(method.request.DESCRIPTOR))
    try:
        if call is None or call.lane:  # where a place may be told as well, and is what counts
            return method.request.FromString(data)
        request, call.trailing_bytes = parse_trailing(method.request, data)
        return request
    except DecodeError:
        raise InvalidInput(f"the request is no {method.request.DESCRIPTOR.full_name}") from None


class _Field(NamedTuple):
    """What counts of a length-delimited field: elements if it is repeated, what is in a message, numbers in a list."""

    name: str
    repeated: bool
    fields: "dict[int, _Field] | None"
    width: int


@cache
def _fields(descriptor: Any) -> dict[int, _Field]:
    """The fields of a message that may become much, by number. Ours contain no message of their own kind."""
    fields = {}
    for field in descriptor.fields:
        inner = _fields(field.message_type) if field.message_type else None
        kind = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_")
        # Older protobuf has no is_repeated, newer no label.
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        if repeated or inner is not None:
            fields[field.number] = _Field(field.name, repeated, inner, _VARINTS.get(kind, 0) if repeated else 0)
    return fields


class _Count:
    """Counts what a message has, from its bytes alone; InvalidInput if it is too much."""

    def __init__(self, kind: str, most_items: int) -> None:
        self._kind, self._most_items = kind, most_items
        self._left = most_items * _FIELDS_PER_ITEM + _SPARE_FIELDS
        self._numbers = 0
        self._items: dict[str, int] = {}

    def add(self, data: bytes, fields: dict[int, _Field]) -> None:
        """Counts the fields of a whole message."""
        try:
            at = self._add(data, 0, len(data), fields)
        except IndexError:
            at = -1
        if at != len(data):
            raise InvalidInput(f"the request is no {self._kind}")

    def _add(self, data: bytes, at: int, end: int, fields: dict[int, _Field]) -> int:
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise InvalidInput(f"the request has too many fields for {self._most_items} items (TMS_MAX_ITEMS)")
            tag, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
            kind = tag & 7
            if kind == 0:
                at = at + 1 if data[at] < 0x80 else _varint(data, at)[1]
            elif kind == 2:
                size, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
                if field := fields.get(tag >> 3):
                    self._take(field, data, at, size)
                at += size
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:  # groups, which none of our messages has
                raise IndexError
        return at

    def _take(self, field: _Field, data: bytes, at: int, size: int) -> None:
        if at + size > len(data):
            raise IndexError
        if field.width:
            if self._numbers + size * field.width > _LARGEST_NUMBERS:
                size = int(np.count_nonzero(np.frombuffer(data, np.uint8, size, at) < 0x80))
            self._numbers += size * field.width
            if self._numbers > _LARGEST_NUMBERS:
                raise InvalidInput(f"{field.name} has too many numbers; send them as raw bytes")
            return
        if field.repeated:
            count = self._items[field.name] = self._items.get(field.name, 0) + 1
            if count > self._most_items:
                raise InvalidInput(
                    f"the request has more than {self._most_items} {field.name}, which TMS_MAX_ITEMS allows at most"
                )
        if field.fields and self._add(data, at, at + size, field.fields) != at + size:
            raise IndexError


def _split_trailing(data: bytes, path: tuple[int, ...]) -> tuple[bytes, memoryview | None]:
    """The message without the bytes of the field at the end of ``path``, if they are the last and many; and those."""
    before: list[bytes] = []
    begin = size = 0
    try:
        for field in path if len(data) > LARGE else ():
            start = at = begin
            for _ in range(_MOST_FIELDS):
                start, tag = at, data[at]
                size, at = _varint(data, at + 1)
                if tag > 0x7F or tag & 5:  # none of our fields
                    return data, None
                at += size if tag & 2 else 0
                if at >= len(data):
                    break
            if at != len(data) or data[start] != field << 3 | 2:
                return data, None
            before.append(data[begin:start])
            begin = len(data) - size
    except IndexError:  # malformed, as protobuf will say
        return data, None
    if size <= LARGE or not before:
        return data, None
    rest = before.pop()
    for field, head in zip(reversed(path[:-1]), reversed(before), strict=True):
        rest = b"".join((head, _tag(field), varint(len(rest)), rest))
    return rest, memoryview(data)[begin:]


def _tag(field: int) -> bytes:
    return bytes((field << 3 | 2,))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise IndexError("that is no number")


def serialized(answer: Any, largest: int | None = None) -> bytes:
    """The bytes of a message; more than ``largest`` are an error not to be retried."""
    data: bytes = answer.SerializeToString()
    if largest and len(data) > largest:
        why = f"the answer has {len(data)} bytes, more than TMS_MAX_MESSAGE_MB allows"
        raise Overloaded(why, retry_after_ms=-1)
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
    return {
        method.name: Method(
            f"/{service}/{method.name}",
            method.name,
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.client_streaming,
            method.server_streaming,
        )
        for method in pool.FindServiceByName(service).methods
    }
