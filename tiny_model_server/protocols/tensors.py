"""Tensors of Open Inference Protocol v2 as arrays; those of BYTES hold texts, image files and bytes as objects."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server import codec
from tiny_model_server.codec import Array, Buffer
from tiny_model_server.errors import InvalidInput

DTYPES = {
    "BOOL": "bool",
    **{kind: kind.lower() for kind in "UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64".split()},
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
    "BF16": "float32",
}
"""numpy's dtypes by the protocol's datatypes."""
DATATYPES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
"""The datatypes by numpy's dtypes."""


class Tensor(NamedTuple):
    """One input of a request."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: Any
    """Raw bytes, or a sequence of numbers or, for BYTES, of bytes."""
    content_type: str = ""
    """For BYTES: "str", "bytes" or "image..."; by default what each element looks like."""


def arrays(tensors: Iterable[Tensor], max_texts: int) -> dict[str, Array]:
    """The inputs by name; InvalidInput says which is malformed, or that they have more elements of BYTES."""
    found: dict[str, Array] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise InvalidInput(f"there are two inputs {tensor.name[:40]!r}")
        try:
            found[tensor.name] = array = _array(tensor, max_texts)
        except InvalidInput as error:
            raise InvalidInput(f"input {tensor.name[:40]!r}: {error}") from None
        max_texts -= array.size if tensor.datatype == "BYTES" else 0
    if not found:
        raise InvalidInput("the request has no inputs; send at least one")
    return found


def raw(array: Array) -> bytes:
    """The elements of an output as raw bytes; those of BYTES have their lengths before them."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in array.flat)
    return bytes(codec.raw(array))


def _array(tensor: Tensor, max_texts: int) -> Array:
    _, datatype, shape, data, content_type = tensor
    if datatype not in DTYPES:
        raise InvalidInput(f"datatype {datatype[:20]!r} is none of {', '.join(DTYPES)}")
    count = codec.elements(shape)
    if datatype == "BYTES" and count > max_texts:
        raise InvalidInput(f"{count} elements of BYTES are too many; TMS_MAX_ITEMS allows {max_texts}")
    if isinstance(data, (bytes, memoryview)):
        if datatype == "BF16":  # the upper halves of FP32
            return (codec.array_from("uint16", shape, data).astype(np.uint32) << 16).view(np.float32)
        if datatype != "BYTES":
            return codec.array_from(DTYPES[datatype], shape, data)
        data = _split(data, count)
    if len(data) != count:
        raise InvalidInput(f"shape {list(shape)} has {count} elements, but there are {len(data)}")
    if datatype == "BYTES":
        data = (codec.from_bytes(element, content_type) for element in data)
    try:
        return np.fromiter(data, DTYPES[datatype], count).reshape(tuple(shape))
    except OverflowError as error:
        raise InvalidInput(f"not all of its data are {datatype}: {error}") from None


def _split(data: Buffer, count: int) -> list[bytes]:
    """The elements in the raw bytes of BYTES; at most one more than ``count``."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) <= count:
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        if at > len(data):
            raise InvalidInput("raw BYTES are elements with a 4-byte little-endian length before each; one is cut off")
        elements.append(bytes(data[begin:at]))
    return elements
