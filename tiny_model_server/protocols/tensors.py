"""Tensors of Open Inference Protocol v2 in requests, as arrays, texts, image files and bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server import codec
from tiny_model_server.codec import Array
from tiny_model_server.errors import InvalidInput

TYPES = {
    "BOOL": ("bool", 1, "bool_contents"),
    "UINT8": ("uint8", 2, "uint_contents"),
    "UINT16": ("uint16", 3, "uint_contents"),
    "UINT32": ("uint32", 4, "uint_contents"),
    "UINT64": ("uint64", 5, "uint64_contents"),
    "INT8": ("int8", 6, "int_contents"),
    "INT16": ("int16", 7, "int_contents"),
    "INT32": ("int32", 8, "int_contents"),
    "INT64": ("int64", 9, "int64_contents"),
    "FP16": ("float16", 10, ""),
    "FP32": ("float32", 11, "fp32_contents"),
    "FP64": ("float64", 12, "fp64_contents"),
    "BYTES": ("object", 13, "bytes_contents"),
    "BF16": ("uint16", 14, ""),
}
"""Datatype: numpy's, Triton's number of it, the typed field that carries it."""
DATATYPES = {dtype: name for name, (dtype, _, _) in TYPES.items() if name != "BF16"}
"""numpy's dtypes: the datatypes that carry them."""
AT_ONCE = 1 << 16
"""Numbers of a typed field that are Python's at the same time, for as such they are larger."""


class Texts(NamedTuple):
    """The elements of a BYTES tensor: texts, image files or bytes."""

    values: list[Any]
    shape: Sequence[int]

    @property
    def size(self) -> int:
        """How many elements there are."""
        return len(self.values)

    def whole(self) -> Any:
        """One value for one element, a list of them for several."""
        return self.values[0] if len(self.values) == 1 else self.values

    def row(self, index: int) -> Any:
        """The same of a part, as the first dimension counts them."""
        each = len(self.values) // self.shape[0]
        return self._replace(values=self.values[index * each : (index + 1) * each]).whole()


def inputs(request: Any, most: int) -> dict[str, "Array | Texts"]:
    """The request's inputs by name; InvalidInput says which is malformed and how.

    BYTES have at most so many elements in all of them together.
    """
    raw = list(request.raw_input_contents)
    if not request.inputs:
        raise InvalidInput("the request has no inputs; send at least one")
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(f"there are {len(request.inputs)} inputs, but raw_input_contents has {len(raw)} elements")
    values: dict[str, Array | Texts] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in values:
            raise InvalidInput(f"there are two inputs {tensor.name[:40]!r}")
        try:
            if raw and tensor.HasField("contents"):
                raise InvalidInput("it has contents, and raw_input_contents beside them; send one of both")
            value = values[tensor.name] = _input(tensor, raw[index] if raw else None, most)
        except InvalidInput as error:
            raise InvalidInput(f"input {tensor.name[:40]!r}: {error}") from None
        most -= value.size if isinstance(value, Texts) else 0
    return values


def _input(tensor: Any, raw: bytes | None, most: int) -> "Array | Texts":
    if tensor.datatype not in TYPES:
        raise InvalidInput(f"datatype {tensor.datatype[:20]!r} is none of {', '.join(TYPES)}")
    dtype, _, field = TYPES[tensor.datatype]
    count = codec.elements(tensor.shape)
    if tensor.datatype == "BYTES":
        if count > most:
            raise InvalidInput(f"shape {list(tensor.shape)} has {count} elements of BYTES; TMS_MAX_ITEMS allows {most}")
        return _texts(tensor, count, raw)
    if raw is not None:
        array = codec.array_from(dtype, tensor.shape, raw)
        return _from_brain_float(array) if tensor.datatype == "BF16" else array
    if not field:
        raise InvalidInput(f"{tensor.datatype} travels only in raw_input_contents")
    found = getattr(tensor.contents, field)
    _check_count(tensor, count, len(found))
    return codec.array_from(dtype, tensor.shape, codec.raw(_numbers(found, np.dtype(dtype))))


def _from_brain_float(array: Array) -> Array:
    bits = array.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _numbers(found: Any, dtype: np.dtype[Any]) -> Array:
    """The numbers of a typed field, a part at a time, for as Python's they are larger."""
    numbers = np.empty(len(found), dtype)
    for at in range(0, len(found), AT_ONCE):
        part = found[at : at + AT_ONCE]
        if dtype.kind in "iu":
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            if wrong := next((number for number in (min(part), max(part)) if not low <= number <= high), None):
                raise InvalidInput(f"{wrong} is no {dtype}, which is from {low} to {high}")
        numbers[at : at + AT_ONCE] = part
    return numbers


def _check_count(tensor: Any, count: int, found: int) -> None:
    if found != count:
        raise InvalidInput(f"shape {list(tensor.shape)} has {count} elements, but there are {found}")


def _texts(tensor: Any, count: int, raw: bytes | None) -> Texts:
    elements = list(tensor.contents.bytes_contents) if raw is None else _elements(raw, count)
    _check_count(tensor, count, len(elements))
    kind = parameter(tensor.parameters["content_type"]) if "content_type" in tensor.parameters else ""
    return Texts([codec.from_bytes(element, str(kind)) for element in elements], tensor.shape)


def _elements(raw: bytes, most: int) -> list[bytes]:
    """The elements in the bytes of a BYTES tensor; one more than ``most`` if there are more."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) <= most:
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise InvalidInput("raw BYTES are elements with a 4-byte little-endian length before each; one is cut off")
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def parameter(value: Any) -> Any:
    """The value of an InferParameter; None if it has none."""
    chosen = value.WhichOneof("parameter_choice")
    return getattr(value, chosen) if chosen else None
