"""Values to the wire and back, pure: trees of JSON with arrays, bytes and encoded images in them.

A packed value is one JSON text and a list of arrays. In the text, ``{"$array": i}`` stands for array ``i``,
``{"$bytes": i}`` for its bytes and ``{"$image": i}`` for the image file in it; ``{"$float": "nan"}`` (also "inf",
"-inf") is a number that JSON lacks; ``{"$dict": {...}}`` holds a dict whose own keys begin with "$".
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]
Buffer = bytes | bytearray | memoryview

ARRAY = '{"$array": 0}'
"""The text of a packed value that is nothing but an array."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|<U\d{1,9}|\|S\d{1,9}|<[mM]8(\[\d*\w+\])?")

_IMAGE_FILES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
_to_json = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make an encoder for each call
_decoder = json.JSONDecoder()
_ARRAY_REFERENCE = re.compile(r'"\$array":\s*(\d{1,9})\b')


class EncodedImage(bytes):
    """A whole image file (JPEG, PNG, ...), which the worker decodes before the model sees it."""


class Packed(NamedTuple):
    """A value ready to travel: JSON text, and the arrays it refers to (C order, native little-endian)."""

    text: str
    arrays: list[Array]
    shared: Any = None
    """(shm.Pair, places) if the arrays lie in memory that workers can map; else they are copied there."""


def pack(value: Any) -> Packed:
    """Packs a tree of JSON values, arrays, numpy scalars, bytes and encoded images; TypeError names what it can't."""
    arrays: list[Array] = []
    if isinstance(value, np.ndarray):
        return Packed(ARRAY, [portable(value)])
    try:
        return Packed(_to_json(_encode(value, arrays, "")), arrays)
    except RecursionError:
        raise TypeError("the value is nested too deeply, or contains itself") from None


def unpack(packed: Packed, image: Callable[[bytes], Any] = EncodedImage) -> Any:
    """The value of a packed text, its arrays being the packed ones; InvalidInput if the text is malformed.

    ``image`` makes of an image file what stands in the value; by default the file itself.
    """
    if packed.text == ARRAY and len(packed.arrays) == 1:
        return packed.arrays[0]
    try:
        return _decode(parse_json(packed.text), packed.arrays, image)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None


def plain_json(value: Any) -> str:
    """One JSON text without references: arrays as nested lists, bytes as base64; for clients that know no arrays."""
    arrays: list[Array] = []
    try:
        return json.dumps(_plain(_encode(value, arrays, ""), arrays))
    except RecursionError:
        raise TypeError("the value is nested too deeply, or contains itself") from None


def standard_json(value: Any) -> str:
    """One JSON text of a JSON value, with null for the numbers that JSON lacks: NaN and the infinities."""
    try:
        return _to_json(value)
    except ValueError:
        return _to_json(json.loads(json.dumps(value), parse_constant=lambda name: None))


def parse_json(text: str) -> Any:
    """The value of a JSON text; InvalidInput says where it is malformed."""
    try:
        try:
            value, end = _decoder.raw_decode(text)  # quicker, but knows no spaces around the value
        except ValueError:
            end = -1
        return value if end == len(text) else json.loads(text)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidInput(f"malformed JSON: {error}") from None


def parse_args(text: str) -> dict[str, Any]:
    """A call's args: a JSON object; an empty text, ``""``, ``{}`` and ``null`` are no arguments."""
    if text in ("", '""', "{}"):
        return {}
    args = parse_json(text) or {}
    if not isinstance(args, dict):
        raise InvalidInput(f'args must be a JSON object such as {{"top": 3}}, not {text[:80]!r}')
    return args


def signature(packed: Packed) -> tuple[Any, ...]:
    """Equal for two values whose arrays have the same shapes and dtypes, so that they can share a batch."""
    if not packed.arrays:
        return ()
    arrays = packed.arrays
    if packed.text != ARRAY:
        indices = map(int, _ARRAY_REFERENCE.findall(packed.text))
        arrays = [packed.arrays[index] for index in indices if index < len(packed.arrays)]
    return tuple((array.shape, array.dtype) for array in arrays)


def portable(array: Array) -> Array:
    """The same array contiguous and little-endian; TypeError for a dtype that cannot travel (objects, records)."""
    array = np.asarray(array, _portable_dtype(array.dtype))
    return array if array.flags.c_contiguous else np.array(array, order="C")


@lru_cache(256)  # numpy takes its time to make or to name a dtype
def _portable_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if not _DTYPES.fullmatch(dtype_name(little := dtype.newbyteorder("<"))):
        raise TypeError(f"an array of dtype {dtype} cannot travel; numbers, bool, str, bytes and times can")
    return little


@lru_cache(256)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The wire's name of a dtype: numpy's name for numbers, its type string for text, bytes and times."""
    return dtype.name if dtype.kind in "biufc" else dtype.str


@lru_cache(256)
def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of this name on the wire; InvalidInput if it is none."""
    if not _DTYPES.fullmatch(name):
        raise InvalidInput(f"unknown dtype {name[:40]!r}; use a numpy name such as uint8, float32 or int64")
    try:
        return np.dtype(name)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"unknown dtype {name[:40]!r}: {error}") from None


def raw(array: Array) -> memoryview:
    """The bytes of a portable array, without a copy."""
    return array.reshape(-1).view(np.uint8).data if array.size and array.itemsize else memoryview(b"")


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def array_from(dtype: str, shape: Sequence[int], data: Buffer) -> Array:
    """A read-only view of ``data`` as an array; InvalidInput if dtype, shape and length don't fit together."""
    kind = dtype_of(dtype)
    if any(size < 0 for size in shape):
        raise InvalidInput(f"shape {list(shape)} has a negative dimension")
    if len(shape) > 32:
        raise InvalidInput(f"an array has at most 32 dimensions, not {len(shape)}")
    expected = math.prod(shape) * kind.itemsize
    if expected != len(data):
        raise InvalidInput(f"shape {list(shape)} of {dtype} needs {expected} bytes, but there are {len(data)}")
    try:
        if not expected:
            return np.empty(tuple(shape), kind)
        return np.frombuffer(data, kind).reshape(tuple(shape))
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"shape {list(shape)} of {dtype} cannot be made: {error}") from None


def image_from(height: int, width: int, channels: int, dtype: str, data: Buffer) -> Array:
    """An image HxW (one channel) or HxWxC; InvalidInput if the fields don't fit each other."""
    if min(height, width, channels) < 1:
        raise InvalidInput(f"an image needs positive height, width and channels, not {height}x{width}x{channels}")
    return array_from(dtype or "uint8", (height, width) if channels == 1 else (height, width, channels), data)


def from_bytes(data: bytes, kind: str = "") -> Any:
    """An EncodedImage, text or bytes: as ``kind`` says, "image...", "bytes" or a media type; or by what ``data`` is."""
    if kind.startswith("image") or (not kind and data.startswith(_IMAGE_FILES)):
        return EncodedImage(data)
    if kind in ("bytes", "raw", "application/octet-stream"):
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        if kind:
            raise InvalidInput(f"content type {kind!r}, but the text is not UTF-8") from None
        return data


def require_image(array: Array) -> Array:
    """The array, portable, as an image of numbers: HxW or HxWxC; InvalidInput for anything else."""
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or 0 in array.shape:
        raise InvalidInput(
            f"an image is an array of numbers of shape HxW or HxWxC, not {array.dtype} of shape {array.shape}"
        )
    return portable(array)


def _encode(value: Any, arrays: list[Array], path: str) -> Any:
    if value is None or type(value) in (str, bool, int):
        return value
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {"$float": str(number)}
    if isinstance(value, (list, tuple)):
        return [_encode(item, arrays, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        keys = {_key(key, path): key for key in value}
        encoded = {name: _encode(value[key], arrays, f"{path}.{name}") for name, key in keys.items()}
        return {"$dict": encoded} if any(name.startswith("$") for name in encoded) else encoded
    if isinstance(value, (bytes, bytearray, memoryview)):
        arrays.append(np.frombuffer(value, np.uint8))
        return {"$image" if isinstance(value, EncodedImage) else "$bytes": len(arrays) - 1}
    if isinstance(value, np.ndarray):
        try:
            arrays.append(portable(value))
        except TypeError as error:
            raise TypeError(f"{error} (at {path or 'the top'})") from None
        return {"$array": len(arrays) - 1}
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (str, int)):  # subclasses: enums, numpy strings
        return str(value) if isinstance(value, str) else int(value)
    raise TypeError(f"{type(value).__name__} cannot travel (at {path or 'the top'}); JSON values and numpy arrays can")


def _key(key: Any, path: str) -> str:
    if isinstance(key, str):
        return str(key)
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    if isinstance(key, (np.bool_, np.integer, np.floating)):
        return json.dumps(key.item())
    raise TypeError(f"a {type(key).__name__} cannot be a key (at {path or 'the top'}); a str can")


def _decode(value: Any, arrays: Sequence[Array], image: Callable[[bytes], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays, image) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name in ("$array", "$bytes", "$image"):
            if type(inner) is not int or not 0 <= inner < len(arrays):
                raise InvalidInput(f'{{"{name}": {inner!r}}} refers to none of the {len(arrays)} arrays sent')
            array = arrays[inner]
            if name == "$array":
                return array
            return image(bytes(raw(array))) if name == "$image" else bytes(raw(array))
        if name == "$float":
            if inner not in _FLOATS:
                raise InvalidInput(f'{{"$float": {inner!r}}} must be one of {", ".join(_FLOATS)}')
            return _FLOATS[inner]
        if name == "$dict" and isinstance(inner, dict):
            return {key: _decode(item, arrays, image) for key, item in inner.items()}
    if any(key.startswith("$") for key in value):
        raise InvalidInput(f"unknown reference {next(key for key in value if key.startswith('$'))!r} in the JSON")
    return {key: _decode(item, arrays, image) for key, item in value.items()}


def _plain(value: Any, arrays: Sequence[Array]) -> Any:
    if isinstance(value, list):
        return [_plain(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name == "$array":
            return _lists(arrays[inner])
        if name in ("$bytes", "$image"):
            return base64.b64encode(raw(arrays[inner])).decode()
        if name == "$float":
            return _FLOATS[inner]
        if name == "$dict":
            value = inner
    return {key: _plain(item, arrays) for key, item in value.items()}


def _lists(array: Array) -> Any:
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], axis=-1).tolist()
    if array.dtype.kind == "S":
        return np.char.decode(array, "latin-1").tolist()
    if array.dtype.kind in "mM":
        return array.astype(str).tolist()
    return array.tolist()
