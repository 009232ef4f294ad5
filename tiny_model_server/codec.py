"""Values to the wire and back, without I/O: trees of JSON with arrays, bytes and encoded images in them.

An encoded value is one JSON text and a list of arrays. In the text, ``{"$array": i}`` stands for array ``i``,
``{"$bytes": i}`` for its bytes and ``{"$image": i}`` for the image file in it; ``{"$float": "nan"}`` (also "inf",
"-inf") is a number that JSON lacks; ``{"$dict": {...}}`` holds a dict whose own keys begin with "$".

A value arrives equal, or ``encode`` raises TypeError. Two things change as they do in JSON: tuples become lists, and
keys of dicts become text. What JSON and numpy lack, ``conversions`` turns into what they have.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple, Union

import numpy as np

from tiny_model_server.conversions import CannotSerialize, convert, convert_array
from tiny_model_server.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]
Buffer = Union[bytes, bytearray, memoryview]

ARRAY = '{"$array": 0}'
"""The text of an encoded value that is nothing but an array."""
MAX_NODES = 1_250_000
"""Values, keys and brackets in the JSON of one request: each may take 100 bytes in memory, and 0.3 us to parse."""

MAX_LISTED = 1 << 27
"""Bytes of the arrays in an answer that is JSON alone: there, each may take 15 times as many."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DTYPES = re.compile(
    r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|<U[1-9]\d{0,7}|\|S[1-9]\d{0,7}"
    r"|<[mM]8(\[\d{0,4}([YMWDhms]|[munpfa]s)\])?"
)
_MAX_DEPTH = 200  # of nested lists and dicts; each level takes two of Python's 1000 frames
_STRING_OR_NODE = re.compile(r'"[^"]*"?|([,:\[{])')
_MAX_DIMENSIONS = 32
_MAX_EMPTY = 1 << 16  # an array of shape [1000, 0] becomes a thousand empty lists in JSON
_SPARE_REFERENCES = 1000
_SPARE_BYTES = 1 << 20
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ARRAY_REFERENCE = re.compile(r'"\$array":\s*(\d{1,9})\b')
_IMAGE_FILE = re.compile(
    rb"""\x89PNG\r\n\x1a\n
    | \xff\xd8\xff  # JPEG
    | GIF8[79]a .{0,1024} \0
    | RIFF .{4} WEBPVP8
    | (II\*\0 .{3} [\0-\x1f] | MM\0\* [\0-\x1f] .{3})  # TIFF: a 32-bit offset, little-endian or big-endian
    | BM .{12} [\x0c(48@l|] \0\0\0  # the sizes that the second header of a bitmap can have""",
    re.DOTALL | re.VERBOSE,
)
"""How files of these kinds begin; each has bytes that a text does not."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
"""How to get the plain value of a subclass, such as an enum: its own str(), int() or float() may return another."""
_INSTEAD_OF_ARRAY = {
    "f": "send array.astype(np.float64)",
    "c": "send array.astype(np.complex128)",
}
"""What to send in place of an array, by the kind of its dtype."""
_AS_FILES = "ask for another format: by HTTP with Accept, such as application/x-npy, by gRPC with accept_arrays"
_CONVERTED = "OTV"  # the kinds of dtypes of objects, of numpy's variable-width texts, and of records and bfloat16


class EncodedImage(bytes):
    """A whole image file (JPEG, PNG, ...), which the worker decodes before the model sees it."""


class Placed(NamedTuple):
    """Describes an array whose bytes lie in memory that this process does not map."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Encoded(NamedTuple):
    """A value ready to be sent: JSON text, and the arrays it refers to (C order, native little-endian)."""

    text: str
    arrays: list[Any]
    shared: Any = None
    """(SharedBuffers, places) if the arrays are ``Placed`` there, where workers can map them."""


def encode(value: Any) -> Encoded:
    """Encodes a tree of JSON values, arrays, numpy scalars, bytes, encoded images, and what can be converted to these.

    Raises TypeError that says what cannot be serialized, where it is, and what to send in its place.
    """
    arrays: list[Array] = []
    if issubclass(type(value), np.ndarray) and value.dtype.kind not in _CONVERTED:
        return Encoded(ARRAY, [portable(value)])
    return Encoded(_json_text(value, arrays, _to_json), arrays)


def decode(encoded: Encoded, image: Callable[[bytes], Any] = EncodedImage) -> Any:
    """The value that was encoded, with the same arrays; InvalidInput if the text is malformed, or one in an array is.

    ``image`` turns an image file into what stands in the value; by default the file itself.
    """
    for array in encoded.arrays:
        _check_texts(array)
    if encoded.text == ARRAY and len(encoded.arrays) == 1:
        return encoded.arrays[0]

    def resolve(name: str, array: Any) -> Any:
        if name == "$array" or isinstance(array, Placed):
            return array
        return image(bytes(raw(array))) if name == "$image" else bytes(raw(array))

    return _resolve(_parse(encoded.text), encoded.arrays, resolve)


def _check_texts(array: Any) -> None:
    if array.dtype.kind != "U" or isinstance(array, Placed) or not array.size:
        return
    if np.frombuffer(raw(array), np.uint32).max() > sys.maxunicode:  # numpy would fail at each look at it
        raise InvalidInput(f"an array of {array.dtype} has characters that Unicode lacks; send UTF-32 in it")


def check(text: str, arrays: Sequence[Any]) -> None:
    """InvalidInput if ``decode`` would refuse the text, or return much more than was sent.

    It reads nothing of the arrays but ``nbytes``.
    """
    if text == ARRAY and len(arrays) == 1:
        return
    value = parse_json(text)
    if "$" not in text and "\\u0024" not in text:
        return
    sizes: list[int] = []
    _resolve(value, arrays, lambda name, array: sizes.append(array.nbytes))
    max_bytes = 2 * sum(array.nbytes for array in arrays) + _SPARE_BYTES
    if len(sizes) > len(arrays) + _SPARE_REFERENCES or sum(sizes) > max_bytes:
        raise InvalidInput(f"the JSON refers {len(sizes)} times to {len(arrays)} arrays; refer to each array once")


def json_only(value: Any) -> str:
    """A JSON text without references, for clients that cannot read arrays.

    Arrays are nested lists, bytes are base64, and numbers that JSON lacks (NaN, infinity) are null. InvalidInput if the
    arrays are too large for that.
    """
    arrays: list[Array] = []
    listed = 0

    def resolve(name: str, array: Any) -> Any:
        nonlocal listed
        if name != "$array":
            return base64.b64encode(raw(array)).decode()
        if (listed := listed + array.nbytes) > MAX_LISTED:
            raise InvalidInput(f"the answer's arrays have more than {MAX_LISTED} bytes, too many for JSON; {_AS_FILES}")
        return lists(array)

    return _json_text(value, arrays, lambda tree: standard_json(_resolve(tree, arrays, resolve)))


def standard_json(value: Any) -> str:
    """The JSON text of a JSON value, with null for the numbers that JSON lacks: NaN and the infinities."""
    try:
        return _to_json(value)
    except ValueError:
        return _to_json(json.loads(json.dumps(value), parse_constant=lambda name: None))


def parse_json(text: str) -> Any:
    """The value of a JSON text that a caller sent; InvalidInput if it is malformed, too large or nested too deeply."""
    if len(text) > MAX_NODES and _has_too_many_nodes(text):
        raise InvalidInput(f"the JSON has more than {MAX_NODES} values, keys and brackets; send arrays as bytes")
    value = _parse(text)
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    return value


def args_json(args: Mapping[str, Any]) -> str:
    """The JSON text of a call's args, which ``parse_args`` reads: arrays are lists in it, bytes are a TypeError."""
    return _json_text(args, None, _to_sorted_json)


def parse_args(text: str) -> dict[str, Any]:
    """A call's args: a JSON object; an empty text, ``""``, ``{}`` and ``null`` are no arguments.

    As in an encoded value, ``{"$float": "nan"}`` is a number, ``{"$dict": {...}}`` a dict with keys that begin so.
    """
    if text in ("", '""', "{}"):
        return {}
    try:
        args = parse_json(text) or {}
    except InvalidInput as error:
        raise InvalidInput(f"args: {error}") from None
    if "$" in text:
        args = decode(Encoded(text, []))
    if not isinstance(args, dict):
        raise InvalidInput(f'args must be a JSON object such as {{"top": 3}}, not {text[:80]!r}')
    return args


def signature(encoded: Encoded) -> tuple[Any, ...]:
    """Equal for two values whose arrays have the same shapes and dtypes, so that they can share a batch."""
    arrays = encoded.arrays
    if arrays and encoded.text != ARRAY:
        indices = map(int, _ARRAY_REFERENCE.findall(encoded.text))
        arrays = [arrays[index] for index in indices if index < len(arrays)]
    return tuple((array.shape, array.dtype) for array in arrays)


def portable(array: Array) -> Array:
    """The same array, contiguous and little-endian; TypeError if it holds objects or records, or has a mask."""
    array = _plain(array)
    array = np.asarray(array, _portable_dtype(array.dtype))
    return array if array.flags.c_contiguous else np.array(array, order="C")


def _plain(array: Array) -> Array:
    """The array without a mask; TypeError if it masks anything, or has too many dimensions or rows without elements."""
    if array.ndim > _MAX_DIMENSIONS or not array.size:
        try:
            elements(array.shape)
        except InvalidInput as error:
            raise CannotSerialize(f"this array ({error})", "send array.ravel() and its shape") from None
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise CannotSerialize("a masked array", "send array.filled(VALUE), or data and mask in a dict")
        array = np.ma.getdata(array)
    return array


@lru_cache(256)  # numpy is slow to make or to name a dtype
def _portable_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind in "biufcUSmM" and _DTYPES.fullmatch(dtype_name(little := dtype.newbyteorder("<"))):
        return little
    instead = _INSTEAD_OF_ARRAY.get(dtype.kind, "numbers, bool, str, bytes and times can be sent")
    raise CannotSerialize(f"an array of dtype {dtype}", instead)


@lru_cache(256)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The wire's name of a dtype: numpy's name for numbers, its type string for text, bytes and times."""
    return dtype.name if dtype.kind in "biufc" else dtype.str


def has_shape(array: Array | Placed, wanted: Sequence[int] | None) -> bool:
    """Whether an array has this shape, in which -1 stands for any size; None is any shape."""
    return wanted is None or (
        len(wanted) == len(array.shape) and all(want in (-1, size) for want, size in zip(wanted, array.shape))
    )


@lru_cache(256)
def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of this name on the wire; InvalidInput if there is none."""
    if _DTYPES.fullmatch(name):
        return np.dtype(name)
    raise InvalidInput(f"unknown dtype {name[:40]!r}; use a numpy name such as uint8, float32 or int64")


def raw(array: Array) -> memoryview:
    """The bytes of a portable array, without a copy."""
    return array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(b"")


def elements(shape: Sequence[int]) -> int:
    """How many elements an array of this shape has; InvalidInput if no array may have it."""
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidInput(f"an array has at most {_MAX_DIMENSIONS} dimensions, not {len(shape)}")
    if any(size < 0 for size in shape):
        raise InvalidInput(f"shape {list(shape)} has a negative dimension")
    count = math.prod(shape)
    if not count and (math.prod(takewhile(bool, shape)) > _MAX_EMPTY or math.prod(filter(None, shape)) >= 1 << 31):
        raise InvalidInput(f"shape {list(shape)} has more than {_MAX_EMPTY} rows without elements, or too long ones")
    return count


def array_from(dtype: str, shape: Sequence[int] | None, data: Buffer) -> Array:
    """A read-only view of ``data`` as an array; the rest as for ``placed``."""
    checked = placed(dtype, shape, len(data))
    return np.ndarray(checked.shape, checked.dtype, data)


def placed(dtype: str, shape: Sequence[int] | None, length: int) -> Placed:
    """An array whose ``length`` bytes lie elsewhere; without a shape it has one dimension.

    InvalidInput if dtype, shape and length don't fit together.
    """
    shape = (length,) if shape is None else shape
    elements(shape)
    array = Placed(dtype_of(dtype), tuple(shape))
    if array.nbytes != length:
        raise InvalidInput(f"shape {list(shape)} of {dtype} needs {array.nbytes} bytes, but there are {length}")
    return array


def image_shape(height: int, width: int, channels: int) -> tuple[int, ...]:
    """HxW (one channel) or HxWxC; InvalidInput if one of them is not positive."""
    if min(height, width, channels) < 1:
        raise InvalidInput(f"an image needs positive height, width and channels, not {height}x{width}x{channels}")
    return (height, width) if channels == 1 else (height, width, channels)


def from_bytes(data: bytes, kind: str = "") -> Any:
    """An EncodedImage, text or bytes, as ``kind`` ("image...", "bytes" or a media type) or else ``data`` says."""
    if kind.startswith("image") or (not kind and _IMAGE_FILE.match(data)):
        return EncodedImage(data)
    if kind in ("bytes", "raw", "application/octet-stream"):
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        if kind:
            raise InvalidInput(f"content type {kind!r}, but the text is not UTF-8") from None
        return data


def check_image(array: Any) -> Any:
    """The same array; InvalidInput unless it is an image of numbers: HxW or HxWxC."""
    if array.dtype.kind not in "biuf" or len(array.shape) not in (2, 3) or 0 in array.shape:
        raise InvalidInput(f"an image is an array of numbers, HxW or HxWxC, not {array.dtype} of shape {array.shape}")
    return array


def whole_file(file: bytes) -> bytes:
    """The image file. InvalidInput for a PNG that is cut off: OpenCV makes room for all bytes that it announces."""
    at, kind = len(_PNG), b""
    while file.startswith(_PNG) and at < len(file) and kind != b"IEND":
        size, kind = int.from_bytes(file[at : at + 4], "big"), file[at + 4 : at + 8]
        at += 12 + size
    if at > len(file) > len(_PNG):
        raise InvalidInput(f"{len(file)} bytes are not an image file: this PNG announces at least {at}")
    return file


def lists(array: Array) -> Any:
    """An array as nested lists of what JSON has: complex numbers are pairs, and times are texts."""
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], axis=-1)
    elif array.dtype.kind == "S":
        array = np.char.decode(array, "latin-1")
    return array.astype(str).tolist() if array.dtype.kind in "mM" else array.tolist()


def _has_too_many_nodes(text: str) -> bool:
    """True if the JSON has more than MAX_NODES commas, colons and opening brackets outside of its strings."""
    if sum(map(text.count, ",:[{")) <= MAX_NODES:
        return False
    unescaped = text.replace("\\\\", "").replace('\\"', "")
    nodes = (token for token in _STRING_OR_NODE.finditer(unescaped) if token.lastindex)
    return next(islice(nodes, MAX_NODES, None), None) is not None


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        members = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        if not (level := [one for one in members if isinstance(one, (dict, list))]):
            return
    raise InvalidInput(f"the JSON is nested too deeply; it may be {_MAX_DEPTH} deep")


def _parse(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise InvalidInput("the JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidInput(f"malformed JSON: {error}") from None


def _not_json(name: str) -> Any:
    raise InvalidInput(f'malformed JSON: {name} is not JSON; send null, or {{"$float": "nan"}} (also "inf", "-inf")')


# json.dumps would make an encoder for each call.
_to_json = json.JSONEncoder(allow_nan=False).encode
_to_sorted_json = json.JSONEncoder(allow_nan=False, sort_keys=True).encode
_decoder = json.JSONDecoder(parse_constant=_not_json)


def _resolve(value: Any, arrays: Sequence[Any], resolve: Callable[[str, Any], Any]) -> Any:
    """The tree with what ``resolve(name, array)`` returns in place of each reference to an array."""
    if isinstance(value, list):
        return [_resolve(item, arrays, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    name, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if name in ("$array", "$bytes", "$image"):
        if type(inner) is not int or not 0 <= inner < len(arrays):
            raise InvalidInput(f'a "{name}" in the JSON refers to none of the {len(arrays)} arrays sent')
        return resolve(name, arrays[inner])
    if name == "$float":
        if not isinstance(inner, str) or inner not in _FLOATS:
            raise InvalidInput(f'a "$float" in the JSON must be one of {", ".join(_FLOATS)}')
        return _FLOATS[inner]
    if name == "$dict" and isinstance(inner, dict):
        value = inner
    elif unknown := next((key for key in value if key.startswith("$")), ""):
        raise InvalidInput(f"unknown reference {unknown[:40]!r} in the JSON")
    return {key: _resolve(item, arrays, resolve) for key, item in value.items()}


def _json_text(value: Any, arrays: list[Array] | None, to_text: Callable[[Any], str]) -> str:
    try:
        return to_text(_encode(value, arrays))
    except RecursionError:
        raise TypeError("the value is nested too deeply, or contains itself") from None
    except ValueError as error:  # of an int with more digits than Python writes
        raise CannotSerialize("the value", str(error)) from None


def _encode(value: Any, arrays: list[Array] | None) -> Any:
    """The value as JSON with references to ``arrays``; where these are None, arrays are lists."""
    kind = type(value)  # isinstance would ask the value for its __class__, which may be a model's code
    if kind is str:
        return value if value.isascii() else _checked_text(value)
    if value is None or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if issubclass(kind, (list, tuple)):
        kinds = set(map(type, value))
        if kinds <= {int, bool} or (kinds == {float} and all(map(math.isfinite, value))):
            return value
        return list(_encode_members(enumerate(value), arrays).values())
    if issubclass(kind, Mapping):
        return _encode_dict(value, arrays)
    return _encode_other(value, arrays)


def _encode_members(members: Iterable[tuple[Any, Any]], arrays: list[Array] | None) -> dict[Any, Any]:
    encoded = {}
    for key, value in members:
        try:
            encoded[key] = _encode(value, arrays)
        except CannotSerialize as error:
            error.path = (f"[{key}]" if isinstance(key, int) else f".{key[:40]}") + error.path
            raise
    return encoded


def _encode_dict(value: Mapping[Any, Any], arrays: list[Array] | None) -> Any:
    keys = list(map(_key, value))
    encoded = _encode_members(zip(keys, value.values()), arrays)
    if len(encoded) != len(keys):
        raise CannotSerialize("a dict with keys that become the same text", "use texts as keys")
    return {"$dict": encoded} if any(key.startswith("$") for key in keys) else encoded


def _encode_other(value: Any, arrays: list[Array] | None) -> Any:
    kind = type(value)
    if issubclass(kind, np.ndarray):
        if value.dtype.kind in _CONVERTED:
            value = convert_array(_plain(value))
            if not isinstance(value, np.ndarray):
                return _encode(value, arrays)
        return _encode_array("$array", portable(value), arrays)
    if issubclass(kind, memoryview):
        if value.format != "B" or value.ndim != 1:
            raise CannotSerialize("a memoryview of other things than bytes", "send np.asarray(view)")
        return _encode(value.tobytes(), arrays)
    if issubclass(kind, (bytes, bytearray)):
        name = "$image" if issubclass(kind, EncodedImage) else "$bytes"
        return _encode_array(name, np.frombuffer(value, np.uint8), arrays)
    if issubclass(kind, (np.bool_, np.integer, np.floating)) and not issubclass(kind, np.timedelta64):
        number = float(value) if issubclass(kind, np.floating) else value.item()
        if number != value and not np.isnan(value):
            raise CannotSerialize(f"{kind.__name__} with more digits than a float", "send float(value)")
        return _encode(number, arrays)
    for base, plain in _PLAIN.items():
        if issubclass(kind, base):
            return _encode(plain(value), arrays)
    return _encode(convert(value), arrays)


def _encode_array(name: str, array: Array, arrays: list[Array] | None) -> Any:
    if arrays is not None:
        arrays.append(array)
        return {name: len(arrays) - 1}
    if name != "$array" or array.dtype.kind not in "biufU":
        raise CannotSerialize(f"{name[1:]} of dtype {array.dtype} in args", "send it as data")
    return _encode(array.tolist(), arrays)


def _checked_text(text: str) -> str:
    """The text; TypeError if it would not arrive equal, because JSON joins the halves of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        if _SURROGATE_PAIR.search(text):
            instead = "send text.encode('utf-16', 'surrogatepass').decode('utf-16')"
            raise CannotSerialize("a text with both halves of a surrogate pair", instead) from None
    return text


def _key(key: Any) -> Any:
    kind = type(key)
    if issubclass(kind, str):
        return _encode(key, None)
    if key is None or issubclass(kind, (bool, int, float, np.bool_, np.integer, np.floating)):
        return json.dumps(_encode(key, None))
    with suppress(CannotSerialize):
        if isinstance(found := convert(key), (str, int, float)):
            return _key(found)
    raise CannotSerialize(f"a key of type {kind.__name__}", "use a text")
