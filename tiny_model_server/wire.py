"""Message classes and method paths from the committed descriptor sets, in one private pool.

Generated modules would register in protobuf's default pool, where they clash with other libraries' stubs, and carry
a version stamp; descriptor sets do neither. ``make proto`` writes them from the .proto files.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FOLDER = Path(__file__).parent / "protocols"

pool = descriptor_pool.DescriptorPool()
"""Every schema of ours; give it to reflection."""


class Method(NamedTuple):
    """One RPC: its path ("/server.Server/RunText"), message classes, and which sides stream."""

    path: str
    request: Any
    response: Any
    client_streaming: bool
    server_streaming: bool


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
