"""Message classes and method paths from the committed descriptor sets, in one private pool.

Generated modules would register in protobuf's default pool, where they clash with other libraries' stubs, and carry
a version stamp; descriptor sets do neither. ``make proto`` writes them from the .proto files.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from tiny_model_server.errors import InvalidInput, Overloaded

_FOLDER = Path(__file__).parent / "protocols"

_LARGE = 1 << 15

pool = descriptor_pool.DescriptorPool()
"""Every schema of ours; give it to reflection."""


class Method(NamedTuple):
    """One RPC: its path ("/server.Server/RunText"), message classes, and which sides stream."""

    path: str
    request: Any
    response: Any
    client_streaming: bool
    server_streaming: bool


def parse(method: Method, data: bytes, call: Any = None) -> Any:
    """The request in these bytes; InvalidInput if they are none.

    Of an image that stands at their end, as our clients write it, the pixels stay where they are, as ``call.pixels``;
    protobuf would copy them twice.
    """
    try:
        if call is not None and method.request.DESCRIPTOR.name == "ImageArgs" and (found := _pixels_at_end(data)):
            call.pixels = memoryview(data)[found[1] :]
            data = data[: found[0]]
        return method.request.FromString(data)
    except DecodeError:
        raise InvalidInput(f"the request is no {method.request.DESCRIPTOR.full_name}") from None


def _pixels_at_end(data: bytes) -> tuple[int, int] | None:
    """Where the last field begins and where its pixels do, if it is an image (1) with large data (4) and no more."""
    at = 0
    try:
        while at < len(data):
            field, tag = at, data[at]
            size, at = _varint(data, at + 1)
            if tag & 7 == 2 and at + size == len(data) and tag == 0x0A and size > _LARGE and data[at] == 0x22:
                length, pixels = _varint(data, at + 1)
                return (field, pixels) if pixels + length == len(data) else None
            at += size if tag & 7 == 2 else 0
    except IndexError:
        pass  # malformed, as protobuf will say
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] > 0x7F:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def serialized(answer: Any, largest: int) -> bytes:
    """The bytes of an answer; more than ``largest`` are an error not to be retried."""
    data: bytes = answer.SerializeToString()
    if len(data) > largest:
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
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.client_streaming,
            method.server_streaming,
        )
        for method in pool.FindServiceByName(service).methods
    }
