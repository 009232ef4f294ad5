"""Makes inputs that get past the first byte of a parser: changes one part of a valid one and mends what depends on it.

A ``Leaf`` changes bytes without knowing what they are: atheris' own mutator, or ``change`` where there is none.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError

Leaf = Callable[[bytes], bytes]

NUMBERS = [0, 1, 2, 3, 4, 8, 10, 16, 64, 127, 128, 255, 256, 1000, 1 << 15, 1 << 16, 1 << 20, 1 << 24, (1 << 31) - 1]
NUMBERS += [1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30]
NUMBERS += [-one for one in NUMBERS]
FLOATS = [0.0, -0.0, 0.5, 1e-300, 1e300, 3.5e38, -1e39, float("inf"), float("-inf"), float("nan")]
DTYPES = "bool int8 uint8 uint16 int32 uint64 float16 float32 float64 complex64 <U1 <U5 |S3 <M8[ns] <m8[0s] <m8 O V4 x"
WORDS = [
    *DTYPES.split(),
    *"UINT8 INT16 UINT32 INT64 FP16 FP32 FP64 BF16 BOOL BYTES".split(),
    *"echo rows typed letters chatty yields files missing str bytes image image/png text/plain".split(),
    *"image_url text user assistant data args binary_data_size content_type binary_data binary_data_output".split(),
    *"txt2vec img2vec txt2img img2bbox base64 float role content type url job.json input".split(),
    *'{"$array":0} {"$bytes":0} {"$image":0} {"$float":"nan"} {"$dict":{}} {"$array":1} $array [] {} null ""'.split(),
    "\0",
    "\x7f",
    "\u00e9",
    "\u2028",
    "\U0001f600",
    "\\ud800",
    "data:image/png;base64,iVBORw0KGgo=",
    "a" * 5000,
    "[" * 300,
    "9" * 5000,
    "1e999",
    "-",
    "%",
    "/",
    "..",
    "{",
]


def change(rng: Random, data: bytes) -> bytes:
    """Changes bytes anywhere."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((0, 1, 1, 2, 4, 8)))
        word = rng.choice(WORDS).encode(errors="surrogatepass")
        made[at:end] = rng.choice(
            (rng.randbytes(end - at), rng.randbytes(rng.randrange(4)), b"", word, made[at:end] * 2)
        )
    return bytes(made)


Mutate = Callable[[bytes, Random, Leaf], bytes]


def mutated(mutate: Mutate | None, data: bytes, rng: Random, leaf: Leaf) -> bytes:
    """Another input, by a target's own function if it has one."""
    return mutate(data, rng, leaf) if mutate else leaf(data)


def text(value: str, rng: Random, leaf: Leaf) -> str:
    """Another text; JSON often stays JSON."""
    if value[:1] in ("{", "[") and rng.random() < 0.7:
        try:
            return json.dumps(tree(json.loads(value), rng, leaf))
        except (ValueError, RecursionError):
            pass
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    return leaf(value.encode(errors="surrogatepass")).decode(errors="replace")


def number(rng: Random, low: int, high: int) -> int:
    """A number within limits, often one near a power of two."""
    found = rng.choice(NUMBERS) + rng.choice((0, 0, 0, 1, -1))
    return found if low <= found <= high else rng.randrange(0, 300)


# ---- trees of lists, dicts, tuples and plain values


def tree(value: Any, rng: Random, leaf: Leaf) -> Any:
    """The tree with one change somewhere in it."""
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.85:
        return type(value)(_items(list(value), rng, leaf))
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _entries(dict(value), rng, leaf)
    return _plain(value, rng, leaf)


def _items(items: list[Any], rng: Random, leaf: Leaf) -> list[Any]:
    at = rng.randrange(len(items))
    if (kind := rng.random()) < 0.7:
        items[at] = tree(items[at], rng, leaf)
    elif kind < 0.8:
        del items[at]
    elif kind < 0.95:
        items.insert(rng.randrange(len(items) + 1), items[at])
    else:
        items *= rng.choice((2, 3, 50))
    return items[:5000]


def _entries(entries: dict[Any, Any], rng: Random, leaf: Leaf) -> dict[Any, Any]:
    key = rng.choice(list(entries))
    if (kind := rng.random()) < 0.75:
        entries[key] = tree(entries[key], rng, leaf)
    elif kind < 0.85:
        del entries[key]
    else:
        entries[rng.choice(WORDS)] = entries[key]
    return entries


def _plain(value: Any, rng: Random, leaf: Leaf) -> Any:
    match rng.randrange(10):
        case 0:
            return rng.choice((None, True, False, [], {}, "", [[]], [None]))
        case 1:
            return rng.choice(NUMBERS)
        case 2:
            return rng.choice(FLOATS)
        case 3:
            return [value] * rng.choice((1, 2, 40))
        case 4:
            return {rng.choice(WORDS): value}
    if isinstance(value, str):
        return text(value, rng, leaf)
    if isinstance(value, bytes):
        return leaf(value)
    return rng.choice(WORDS) if rng.random() < 0.5 else number(rng, -(1 << 70), 1 << 70)


# ---- messages of protobuf


def message(kind: Any, data: bytes, rng: Random, leaf: Leaf) -> bytes:
    """A message with one field changed, added, repeated or left out; now and then, malformed bytes."""
    try:
        found = kind.FromString(data)
    except DecodeError:
        return leaf(data)
    if rng.random() < 0.1:
        return leaf(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_field(found, rng, leaf)
    made: bytes = found.SerializeToString()
    return made


def _change_field(found: Any, rng: Random, leaf: Leaf) -> None:
    fields = found.DESCRIPTOR.fields
    if not fields:
        return
    present = [field for field, _ in found.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.8 else list(fields))
    if field in present and rng.random() < 0.08:
        found.ClearField(field.name)
    elif field.message_type and field.message_type.GetOptions().map_entry:
        _change_map(getattr(found, field.name), field, rng, leaf)
    elif field.is_repeated:
        _change_repeated(getattr(found, field.name), field, rng, leaf)
    elif field.message_type:
        getattr(found, field.name).SetInParent()
        _change_field(getattr(found, field.name), rng, leaf)
    else:
        setattr(found, field.name, _scalar(field, getattr(found, field.name), rng, leaf))


def _change_map(entries: Any, field: Any, rng: Random, leaf: Leaf) -> None:
    key_field, value_field = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
    key = rng.choice(sorted(entries)) if entries and rng.random() < 0.6 else _scalar(key_field, "", rng, leaf)
    if value_field.message_type:
        _change_field(entries[key], rng, leaf)
    else:
        entries[key] = _scalar(value_field, entries.get(key, value_field.default_value), rng, leaf)


def _change_repeated(items: Any, field: Any, rng: Random, leaf: Leaf) -> None:
    kind, at = rng.random(), rng.randrange(len(items)) if len(items) else -1
    if at < 0 or kind < 0.2:
        if field.message_type:
            items.add().CopyFrom(items[at]) if at >= 0 else _change_field(items.add(), rng, leaf)
        else:
            items.append(_scalar(field, items[at] if at >= 0 else field_default(field), rng, leaf))
    elif kind < 0.3:
        del items[at]
    elif kind < 0.35 and len(items) < 500:
        items.extend(list(items) * rng.choice((1, 3)))
    elif field.message_type:
        _change_field(items[at], rng, leaf)
    else:
        items[at] = _scalar(field, items[at], rng, leaf)


def field_default(field: Any) -> Any:
    """A value of a repeated field's type."""
    return {Field.CPPTYPE_STRING: b"" if field.type == Field.TYPE_BYTES else "", Field.CPPTYPE_BOOL: False}.get(
        field.cpp_type, 0
    )


_LIMITS = {
    Field.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    Field.CPPTYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
    Field.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    Field.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    Field.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def _scalar(field: Any, value: Any, rng: Random, leaf: Leaf) -> Any:
    if field.type == Field.TYPE_BYTES:
        return leaf(value) if rng.random() < 0.7 else value * rng.choice((0, 2, 3))
    if field.cpp_type == Field.CPPTYPE_STRING:
        return text(value, rng, leaf)
    if field.cpp_type in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return not value
    return value ^ 1 if rng.random() < 0.2 else number(rng, *_LIMITS[field.cpp_type])


# ---- pieces with their lengths before them


def pieces(data: bytes) -> list[bytes]:
    """Splits bytes of which each piece has its length before it, in two bytes; the last one may be cut off."""
    found, at = [], 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        found.append(data[at + 2 : end])
        at = end
    return found


def joined(found: list[bytes]) -> bytes:
    """The bytes that ``pieces`` splits."""
    return b"".join(len(one[:65535]).to_bytes(2, "big") + one[:65535] for one in found)
