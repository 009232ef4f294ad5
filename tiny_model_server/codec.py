"""Values to the wire and back, pure: trees of JSON with arrays, bytes and encoded images in them.

A packed value is one JSON text and a list of arrays. In the text, ``{"$array": i}`` stands for array ``i``,
``{"$bytes": i}`` for its bytes and ``{"$image": i}`` for the image file in it; ``{"$float": "nan"}`` (also "inf",
"-inf") is a number that JSON lacks; ``{"$dict": {...}}`` holds a dict whose own keys begin with "$".

A value arrives equal, or ``encode`` raises TypeError. Two things change as they do in JSON: tuples become lists, and
keys of dicts become text.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import json
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Union

import numpy as np

from tiny_model_server.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]
Buffer = Union[bytes, bytearray, memoryview]

ARRAY = '{"$array": 0}'
"""The text of a packed value that is nothing but an array."""

_TO_ARRAYS = ("$array", "$bytes", "$image")
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|<U\d{1,9}|\|S\d{1,9}|<[mM]8(\[\d*\w+\])?")

MOST_NODES = 1_250_000
"""Values, keys and brackets in the JSON of one request: each may take 100 bytes in memory, and 0.3 us to parse."""
_NODES = ",:[{"
_DEEPEST = 200  # lists and dicts in each other; walking down them takes two of Python's 1000 frames each
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_MOST_DIMENSIONS = 32
_MOST_EMPTY = 1 << 16
"""Empty lists that an array without elements may be as JSON: shape [1000, 0] is a thousand."""
_SPARE_REFERENCES = 1000
_SPARE_BYTES = 1 << 20
_WIDEST_TEXTS = 1 << 20  # bytes of an array of texts, which has room for its longest text in each place

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes of the header that follows the 14 of the file's
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ARRAY_REFERENCE = re.compile(r'"\$array":\s*(\d{1,9})\b')


class EncodedImage(bytes):
    """A whole image file (JPEG, PNG, ...), which the worker decodes before the model sees it."""


class Placed(NamedTuple):
    """What is known of an array whose bytes lie in memory that this process does not map."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)


class Encoded(NamedTuple):
    """A value ready to travel: JSON text, and the arrays it refers to (C order, native little-endian)."""

    text: str
    arrays: list[Any]
    shared: Any = None
    """(shm.SharedBuffers, places) if the arrays are ``Placed`` there, where workers can map them."""


def encode(value: Any) -> Encoded:
    """Packs a tree of JSON values, arrays, numpy scalars, bytes and encoded images; TypeError names what it can't."""
    arrays: list[Array] = []
    if isinstance(value, np.ndarray):
        return Encoded(ARRAY, [portable(value)])
    return Encoded(_encoded(value, arrays, _to_json), arrays)


def decode(packed: Encoded, image: Callable[[bytes], Any] = EncodedImage) -> Any:
    """The value of a packed text, its arrays being the packed ones; InvalidInput if the text is malformed.

    ``image`` makes of an image file what stands in the value; by default the file itself.
    """
    if packed.text == ARRAY and len(packed.arrays) == 1:
        return packed.arrays[0]
    try:
        return _decode(_parsed(packed.text), packed.arrays, image)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None


def check(text: str, arrays: Sequence[Any]) -> None:
    """InvalidInput if ``decode`` would refuse the text, or make much more of it than was sent.

    It looks at nothing of the arrays but ``nbytes``, and makes no value of them.
    """
    if text == ARRAY and len(arrays) == 1:
        return
    value = parse_json(text)
    if "$" not in text and "\\u0024" not in text:
        return
    sizes: list[int] = []
    try:
        _referred(value, arrays, sizes)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None
    sent = sum(array.nbytes for array in arrays)
    if len(sizes) > len(arrays) + _SPARE_REFERENCES or sum(sizes) > 2 * sent + _SPARE_BYTES:
        raise InvalidInput(
            f"the JSON refers {len(sizes)} times to {len(arrays)} arrays, which makes {sum(sizes)} bytes of {sent}; "
            "refer to each array once"
        )


def json_only(value: Any) -> str:
    """One JSON text without references, for clients that know no arrays.

    Arrays are nested lists, bytes are base64, and numbers that JSON lacks (NaN, infinity) are null.
    """
    arrays: list[Array] = []
    return _encoded(value, arrays, lambda tree: _to_json(_plain(tree, arrays)))


def standard_json(value: Any) -> str:
    """One JSON text of a JSON value, with null for the numbers that JSON lacks: NaN and the infinities."""
    try:
        return _to_json(value)
    except ValueError:
        return _to_json(json.loads(json.dumps(value), parse_constant=lambda name: None))


def parse_json(text: str) -> Any:
    """The value of a JSON text that a caller sent; InvalidInput says where it is malformed, or that it is too much."""
    if len(text) > MOST_NODES and _nodes(text) > MOST_NODES:
        raise InvalidInput(
            f"the JSON has more than {MOST_NODES} values, keys and brackets; send arrays as bytes, or several requests"
        )
    value = _parsed(text)
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(value)
    return value


def args_json(args: Mapping[str, Any]) -> str:
    """The JSON text of a call's args, which ``parse_args`` reads: arrays are lists in it, bytes are a TypeError."""
    return _encoded(args, None, _to_sorted_json)


def parse_args(text: str) -> dict[str, Any]:
    """A call's args: a JSON object; an empty text, ``""``, ``{}`` and ``null`` are no arguments.

    As in a packed value, ``{"$float": "nan"}`` is a number, and ``{"$dict": {...}}`` a dict with keys that begin so.
    """
    if text in ("", '""', "{}"):
        return {}
    args = parse_json(text) or {}
    if "$" in text:
        args = _decoded_args(args)
    if not isinstance(args, dict):
        raise InvalidInput(f'args must be a JSON object such as {{"top": 3}}, not {text[:80]!r}')
    return args


def signature(packed: Encoded) -> tuple[Any, ...]:
    """Equal for two values whose arrays have the same shapes and dtypes, so that they can share a batch."""
    if not packed.arrays:
        return ()
    arrays = packed.arrays
    if packed.text != ARRAY:
        indices = map(int, _ARRAY_REFERENCE.findall(packed.text))
        arrays = [packed.arrays[index] for index in indices if index < len(packed.arrays)]
    return tuple((array.shape, array.dtype) for array in arrays)


def portable(array: Array) -> Array:
    """The same array contiguous and little-endian; TypeError for one that cannot travel (objects, records, masks)."""
    if array.ndim > _MOST_DIMENSIONS or not array.size:
        try:
            elements(array.shape)
        except InvalidInput as error:
            raise TypeError(f"an array cannot travel: {error}; send array.ravel() and its shape") from None
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise TypeError("a masked array cannot travel; send array.filled(VALUE), or data and mask in a dict")
        array = np.ma.getdata(array)
    if array.dtype.kind == "O":
        array = _array_of_texts(array)
    array = np.asarray(array, _portable_dtype(array.dtype))
    return array if array.flags.c_contiguous else np.array(array, order="C")


@lru_cache(256)  # numpy takes its time to make or to name a dtype
def _portable_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind not in "biufcUSmM" or not _DTYPES.fullmatch(dtype_name(little := dtype.newbyteorder("<"))):
        advice = "numbers, bool, str, bytes and times can"
        if dtype.names:
            advice = "send a dict of its columns: {name: array[name] for name in array.dtype.names}"
        elif dtype.kind in "fc":
            advice = "send array.astype(np.float64), or np.complex128 for complex numbers"
        elif dtype.kind == "O":
            advice = "send array.tolist(), or array.astype(float) if it holds numbers"
        elif dtype.kind == "T":
            advice = "send array.astype(str)"
        raise TypeError(f"an array of dtype {dtype} cannot travel; {advice}")
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


def elements(shape: Sequence[int]) -> int:
    """How many elements an array of this shape has; InvalidInput if no array may have it."""
    if len(shape) > _MOST_DIMENSIONS:
        raise InvalidInput(f"an array has at most {_MOST_DIMENSIONS} dimensions, not {len(shape)}")
    if any(size < 0 for size in shape):
        raise InvalidInput(f"shape {list(shape)} has a negative dimension")
    if 0 in shape and math.prod(list(shape)[: list(shape).index(0)]) > _MOST_EMPTY:
        raise InvalidInput(f"shape {list(shape)} has more than {_MOST_EMPTY} rows without elements")
    return math.prod(shape)


def array_from(dtype: str, shape: Sequence[int], data: Buffer) -> Array:
    """A read-only view of ``data`` as an array; InvalidInput if dtype, shape and length don't fit together."""
    kind, expected = _checked(dtype, shape, len(data))
    try:
        if not expected:
            return np.empty(tuple(shape), kind)
        return np.frombuffer(data, kind).reshape(tuple(shape))
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"shape {list(shape)} of {dtype} cannot be made: {error}") from None


def placed(dtype: str, shape: Sequence[int], length: int) -> Placed:
    """An array whose ``length`` bytes lie elsewhere; InvalidInput if dtype, shape and length don't fit together."""
    kind, _ = _checked(dtype, shape, length)
    return Placed(kind, tuple(shape))


def _checked(dtype: str, shape: Sequence[int], length: int) -> tuple[np.dtype[Any], int]:
    kind, count = dtype_of(dtype), elements(shape)
    expected = count * kind.itemsize
    if expected != length:
        raise InvalidInput(f"shape {list(shape)} of {dtype} needs {expected} bytes, but there are {length}")
    if count and not expected:
        raise InvalidInput(f"shape {list(shape)} of {dtype} has elements of no bytes")
    return kind, expected


def image_shape(height: int, width: int, channels: int) -> tuple[int, ...]:
    """HxW (one channel) or HxWxC; InvalidInput if one of them is not positive."""
    if min(height, width, channels) < 1:
        raise InvalidInput(f"an image needs positive height, width and channels, not {height}x{width}x{channels}")
    return (height, width) if channels == 1 else (height, width, channels)


def image_from(height: int, width: int, channels: int, dtype: str, data: Buffer) -> Array:
    """An image HxW (one channel) or HxWxC; InvalidInput if the fields don't fit each other."""
    return array_from(dtype or "uint8", image_shape(height, width, channels), data)


def from_bytes(data: bytes, kind: str = "") -> Any:
    """An EncodedImage, text or bytes: as ``kind`` says, "image...", "bytes" or a media type; or by what ``data`` is."""
    if kind.startswith("image") or (not kind and is_image_file(data)):
        return EncodedImage(data)
    if kind in ("bytes", "raw", "application/octet-stream"):
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        if kind:
            raise InvalidInput(f"content type {kind!r}, but the text is not UTF-8") from None
        return data


def is_image_file(data: bytes) -> bool:
    """True for the whole signature of an image file (PNG, JPEG, GIF, BMP, WebP, TIFF) in what is no printable text."""
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):  # no text begins so
        return True
    found = data.startswith((b"GIF87a", b"GIF89a"))
    if data[:2] == b"BM":
        begin, header = int.from_bytes(data[10:14], "little"), int.from_bytes(data[14:18], "little")
        found = header in _BMP_HEADERS and 14 + header <= begin <= len(data)
    elif data[:4] == b"RIFF":
        found = data[8:12] == b"WEBP" and 12 <= int.from_bytes(data[4:8], "little") + 8 <= len(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        order = "little" if data[:2] == b"II" else "big"
        found = 8 <= int.from_bytes(data[4:8], order) < len(data)  # type: ignore[arg-type]
    return found and not _is_printable(data)


def _is_printable(data: bytes) -> bool:
    try:
        return not any(char < " " and char not in "\t\n\r\f" for char in set(data.decode()))
    except UnicodeDecodeError:
        return False


def require_image(array: Array) -> Array:
    """The array, portable, as an image of numbers: HxW or HxWxC; InvalidInput for anything else."""
    check_image(array)
    return portable(array)


def check_image(array: Array | Placed) -> None:
    """InvalidInput unless the array is an image of numbers: HxW or HxWxC."""
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or 0 in array.shape:
        raise InvalidInput(
            f"an image is an array of numbers of shape HxW or HxWxC, not {array.dtype} of shape {array.shape}"
        )


def _nodes(text: str) -> int:
    """How many values, keys and brackets a JSON text has, or just more than are allowed; texts may hold commas."""
    if (most := sum(map(text.count, _NODES))) <= MOST_NODES:
        return most
    nodes = at = 0
    while True:
        quote = text.find('"', at)
        end = quote if quote >= 0 else len(text)
        nodes += sum(text.count(char, at, end) for char in _NODES)
        if nodes > MOST_NODES or not (string := _STRING.match(text, end)):
            return nodes
        at = string.end()


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEEPEST):
        members = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        if not (level := [one for one in members if isinstance(one, (dict, list))]):
            return
    raise InvalidInput(f"the JSON is nested too deeply; it may be {_DEEPEST} deep")


def _parsed(text: str) -> Any:
    try:
        try:
            value, end = _decoder.raw_decode(text)  # quicker, but knows no spaces around the value
        except ValueError:
            end = -1
        return value if end == len(text) else _decoder.decode(text)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidInput(f"malformed JSON: {error}") from None


def _no_json(name: str) -> Any:
    raise InvalidInput(
        f'malformed JSON: {name} is no JSON; send null, or {{"$float": "nan"}} (also "inf", "-inf") in args and in '
        "values with arrays"
    )


# json.dumps would make an encoder for each call.
_to_json = json.JSONEncoder(allow_nan=False).encode
_to_sorted_json = json.JSONEncoder(allow_nan=False, sort_keys=True).encode
_decoder = json.JSONDecoder(parse_constant=_no_json)


class _CannotTravel(Exception):
    """Raised where a value cannot be encoded; each level above adds where that is."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.advice = f"; {advice}" if advice else ""
        self.path = ""

    def __str__(self) -> str:
        return f"{self.args[0]} (at {self.path or 'the top'}){self.advice}"


def _encoded(value: Any, arrays: list[Array] | None, to_text: Callable[[Any], str]) -> str:
    try:
        return to_text(_encode(value, arrays))
    except RecursionError:
        raise TypeError("the value is nested too deeply, or contains itself") from None
    except _CannotTravel as error:
        raise TypeError(str(error)) from None
    except ValueError as error:  # of an int with more digits than Python writes
        raise TypeError(f"the value cannot travel: {error}") from None


def _encode(value: Any, arrays: list[Array] | None) -> Any:
    """The value as JSON with references to ``arrays``; where these are None, arrays are lists.

    What is JSON already is returned as it is, so that a large tree is not in memory twice.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _text(value)
    if value is None or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        if kinds <= {int, bool} or (kinds == {float} and all(map(math.isfinite, value))):
            return value
        return _encode_list(value, arrays)
    if isinstance(value, Mapping):
        return _encode_dict(value, arrays)
    return _encode_other(value, arrays)


def _encode_list(value: Sequence[Any], arrays: list[Array] | None) -> Any:
    encoded: list[Any] = []
    try:
        for item in value:
            encoded.append(_encode(item, arrays))
    except _CannotTravel as error:
        error.path = f"[{len(encoded)}]{error.path}"
        raise
    return value if type(value) is list and all(map(operator.is_, encoded, value)) else encoded


def _encode_dict(value: Mapping[Any, Any], arrays: list[Array] | None) -> Any:
    keys = {_key(key): key for key in value}
    if len(keys) != len(value):
        raise _CannotTravel("a dict whose keys become the same text cannot travel", "use texts as keys")
    encoded: dict[str, Any] = {}
    name = ""
    try:
        for name, key in keys.items():
            encoded[name] = _encode(value[key], arrays)
    except _CannotTravel as error:
        error.path = f".{name[:40]}{error.path}"
        raise
    if any(name.startswith("$") for name in encoded):
        return {"$dict": encoded}
    same = type(value) is dict and all(map(operator.is_, encoded.values(), value.values()))
    return value if same and all(map(operator.is_, keys, keys.values())) else encoded


def _encode_other(value: Any, arrays: list[Array] | None) -> Any:
    if isinstance(value, np.ndarray):
        return _encode_array(value, arrays)
    kind = type(value).__name__
    if isinstance(value, (bytes, bytearray, memoryview)):
        if arrays is None:
            raise _CannotTravel(f"{kind} cannot be in args", "send it as data, or as text")
        arrays.append(np.frombuffer(_one_run(value), np.uint8))
        return {"$image" if isinstance(value, EncodedImage) else "$bytes": len(arrays) - 1}
    if isinstance(value, np.floating):
        number = float(value)
        if number != value and not np.isnan(value):
            raise _CannotTravel(f"{kind} has more digits than a float", "send float(value)")
        return _encode(number, arrays)
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    # Subclasses, such as enums and numpy's texts: what str(), int() and float() make of them may be something else.
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return _encode(float.__float__(value), arrays)
    raise _CannotTravel(f"{kind} cannot travel", _advice(value))


def _encode_array(value: Array, arrays: list[Array] | None) -> Any:
    try:
        array = portable(value)
    except TypeError as error:
        raise _CannotTravel(str(error)) from None
    if arrays is None:
        if array.dtype.kind not in "biufU":
            raise _CannotTravel(f"an array of dtype {array.dtype} cannot be in args", "send it as data")
        return _encode(array.tolist(), arrays)
    arrays.append(array)
    return {"$array": len(arrays) - 1}


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        if _SURROGATES.search(text):
            advice = "send text.encode('utf-16', 'surrogatepass').decode('utf-16')"
            raise _CannotTravel("a text with both halves of a surrogate pair cannot travel", advice) from None
    return text


def _one_run(value: bytes | bytearray | memoryview) -> Any:
    if not isinstance(value, memoryview) or (value.format == "B" and value.c_contiguous and value.ndim == 1):
        return value
    if value.format != "B" or value.ndim != 1:
        raise _CannotTravel("a memoryview of other things than bytes cannot travel", "send np.asarray(view)")
    return bytes(value)


def _array_of_texts(array: Array) -> Array:
    """An array of objects that are all texts, as pandas and scikit-learn have them, as an array of texts."""
    listed = array.ravel().tolist()
    if not listed or not all(isinstance(text, str) for text in listed):
        return array
    room = 4 * len(listed) * max(map(len, listed))
    if room > _WIDEST_TEXTS and room > 16 * sum(map(len, listed)):
        return array  # for one long text among short ones a list is better
    texts = np.array(listed, dtype=str)
    return texts.reshape(array.shape) if texts.tolist() == listed else array  # numpy drops NULs at a text's end


def _advice(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return "send its .value or its .name"
    if isinstance(value, (set, frozenset)):
        return "send sorted(value), a list"
    if isinstance(value, (datetime.date, datetime.time)):
        return "send value.isoformat()"
    if isinstance(value, os.PathLike):
        return "send str(value)"
    if dataclasses.is_dataclass(value):
        return "send dataclasses.asdict(value)"
    if hasattr(value, "__array__"):
        return "send np.asarray(value)"
    return "JSON values and numpy arrays can"


def _key(key: Any) -> str:
    if type(key) is str and key.isascii():
        return key
    if isinstance(key, str):
        return _text(str.__str__(key))
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    if isinstance(key, (np.bool_, np.integer, np.floating)):
        return json.dumps(_encode_other(key, None))
    raise _CannotTravel(f"a {type(key).__name__} cannot be a key", "a text can")


def _decode(value: Any, arrays: Sequence[Array], image: Callable[[bytes], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays, image) for item in value]
    if not isinstance(value, dict):
        return value
    name, inner = _reference(value, len(arrays))
    if name == "$array" or (name in _TO_ARRAYS and isinstance(arrays[inner], Placed)):
        return arrays[inner]
    if name == "$bytes":
        return bytes(raw(arrays[inner]))
    if name == "$image":
        return image(bytes(raw(arrays[inner])))
    if name == "$float":
        return _FLOATS[inner]
    return {key: _decode(item, arrays, image) for key, item in inner.items()}


def _referred(value: Any, arrays: Sequence[Any], found: list[int]) -> None:
    """Adds to ``found`` the bytes of each array that a tree of JSON refers to; InvalidInput as in ``_decode``."""
    if isinstance(value, dict):
        name, inner = _reference(value, len(arrays))
        if name in _TO_ARRAYS:
            found.append(arrays[inner].nbytes)
        elif name != "$float":
            _referred(list(inner.values()), arrays, found)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (dict, list)):
                _referred(item, arrays, found)


def _reference(value: dict[str, Any], count: int) -> tuple[str, Any]:
    """The name of a reference and what it is to; "" and the dict itself if the dict is none."""
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name in _TO_ARRAYS:
            if type(inner) is not int or not 0 <= inner < count:
                raise InvalidInput(f'{{"{name}": {_short(inner)}}} refers to none of the {count} arrays sent')
            return name, inner
        if name == "$float":
            if not isinstance(inner, str) or inner not in _FLOATS:
                raise InvalidInput(f'{{"$float": {_short(inner)}}} must be one of {", ".join(_FLOATS)}')
            return name, inner
        if name == "$dict" and isinstance(inner, dict):
            return name, inner
    if unknown := next((key for key in value if key.startswith("$")), ""):
        raise InvalidInput(f"unknown reference {unknown[:40]!r} in the JSON")
    return "", value


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else type(value).__name__


def _decoded_args(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded_args(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name == "$float" and isinstance(inner, str) and inner in _FLOATS:
            return _FLOATS[inner]
        if name == "$dict" and isinstance(inner, dict):
            value = inner
    return {key: _decoded_args(item) for key, item in value.items()}


def _plain(value: Any, arrays: Sequence[Array]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, inner),) = value.items()
        if name == "$array":
            return lists(arrays[inner])
        if name in ("$bytes", "$image"):
            return base64.b64encode(raw(arrays[inner])).decode()
        if name == "$float":
            return None
        if name == "$dict":
            value = inner
    return {key: _plain(item, arrays) for key, item in value.items()}


def lists(array: Array) -> Any:
    """An array as nested lists of what JSON has; numbers that it lacks are None."""
    if array.dtype.kind == "c":
        return lists(np.stack([array.real, array.imag], axis=-1))
    if array.dtype.kind == "S":
        return np.char.decode(array, "latin-1").tolist()
    if array.dtype.kind in "mM":
        return array.astype(str).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        whole = array.astype(object)
        whole[~np.isfinite(array)] = None
        return whole.tolist()
    return array.tolist()
