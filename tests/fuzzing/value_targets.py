"""Values, addresses and what replicas report: parsers that are called with texts and bytes alone."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tests.fuzzing import engine as engines
from tests.fuzzing import grpc_targets, mutators, oracle
from tests.fuzzing.mutators import Leaf
from tests.fuzzing.oracle import Finding, Target
from tiny_model_server import codec, json_arrays, schemas
from tiny_model_server.client import addresses, siblings
from tiny_model_server.client.stats import Stats
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.call import Call
from tiny_model_server.errors import InvalidInput
from tiny_model_server.server.siblings import labelled

_Value = schemas.message("server", "server.Value")


def values(data: bytes) -> None:
    """A Value message: what ``check`` lets pass is decoded, and equal after another journey."""
    try:
        message = _Value.FromString(data)
    except DecodeError:
        return
    try:
        arrays = [codec.array_from(one.dtype, one.shape, one.data) for one in message.arrays]
        codec.check(message.json, arrays)
        encoded = Encoded(message.json, arrays)
        value = codec.decode(encoded)
    except InvalidInput:
        return
    codec.signature(encoded)
    again = codec.decode(codec.encode(value))
    if not same(value, again):
        raise Finding(f"{value!r:.200} becomes {again!r:.200}")
    with suppress(InvalidInput):  # too large for JSON
        oracle.strict_json(codec.json_only(value))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, NaN being equal to NaN."""
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return type(other) is float and (one == other or (math.isnan(one) and math.isnan(other)))
    return type(one) is type(other) and bool(one == other)


def _value_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    return mutators.message(_Value, data, rng, leaf)


def _value_seeds() -> Iterator[bytes]:
    more: list[Any] = [
        np.zeros((1, 0), "c8"),
        np.array([1 + 2j]),
        np.array([b"ab"]),
        np.array(["NaT"], "m8[ns]"),
        "\U0001f600",
    ]
    more += [10**30, -0.0, [[[[]]]], {"$dict": {"$array": 0}}, b"", codec.EncodedImage(b"x"), True]
    for value in [*grpc_targets.VALUES, *more]:
        encoded = codec.encode(value)
        parts = [
            {"dtype": codec.dtype_name(one.dtype), "shape": one.shape, "data": bytes(codec.raw(one))}
            for one in encoded.arrays
        ]
        yield _Value(json=encoded.text, arrays=parts).SerializeToString()


def texts(data: bytes) -> None:
    """A text as args, as JSON with arrays in it, and as bytes of any kind."""
    text = data.decode(errors="replace")
    for parse in (codec.parse_args, json_arrays.parse, codec.parse_json):
        with oracle.only(InvalidInput):
            found = parse(text)
            encoded = codec.encode(found)
            if parse is codec.parse_args and not same(codec.parse_args(codec.args_json(found)), _sorted(found)):
                raise Finding(f"args {found!r:.200} change on their way")
            codec.json_only(codec.decode(encoded))
            json_arrays.example(encoded)
    for kind in ("", "image/png", "bytes", "str", "text/plain"):
        with oracle.only(InvalidInput):
            codec.from_bytes(data, kind)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value


_TEXTS = [
    b'{"a": [1, 2.5, null, true], "b": {"c": "x"}}',
    b'{"$array": {"dtype": "uint8", "data": [[1, 2], [3, 4]], "shape": [4]}}',
    b'{"$dict": {"$float": {"$float": "nan"}}}',
    b'[{"$array": {"dtype": "float16", "data": 70000}}, {"$array": {"dtype": "bool", "data": [true]}}]',
    b'"\\ud83d\\ude00 \\ud800"',
    b"123456789012345678901234567890",
    b"[" * 250 + b"]" * 250,
]


def _text_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    if rng.random() < 0.4:
        return leaf(data)
    return mutators.text(data.decode(errors="replace"), rng, leaf).encode(errors="surrogatepass")


def places(data: bytes) -> None:
    """Addresses that an application gives: whole, or as host and port. Nothing is looked up."""
    text = data.decode(errors="replace")
    host, _, port = text.partition("|")
    for arguments in ((host, port or None, None), (None, None, text), (None, None, text.split(";"))):
        try:
            found = addresses.parse(*arguments, "localhost:50000")
        except (TypeError, ValueError) as error:
            if not isinstance(error, UnicodeError) and str(error):
                continue
            raise
        for one in found:
            if not one.startswith(("unix:", "dns://")):
                name, number = addresses.host_and_port(one)
                assert name
                assert 0 < number < 65536
        with oracle.only(ValueError):  # for a unix socket among hosts
            addresses.Target(found)


def _image_mutated(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    """Most numbers in an image's headers have two or four bytes: sizes, offsets, lengths."""
    if rng.random() < 0.5 or len(data) < 8:
        return leaf(data)
    at, size = rng.randrange(len(data) - 4), rng.choice((2, 4, 4, 8))
    number = rng.choice(mutators.NUMBERS) % (1 << 8 * size)
    return data[:at] + number.to_bytes(size, rng.choice(("big", "little"))) + data[at + size :]


_PLACES = [b"localhost:50000", b"[::1]:50000;10.0.0.1:1", b"host|50000", b"::1|80", b"unix:/tmp/x", b"dns:///a.b:1"]
_PLACES += [b"a.example.com:443,b:1", b"[fe80::1%eth0]:1", "m\u00fcnchen.de:1".encode(), b"1.2.3.4|99999"]


def reports(data: bytes) -> None:
    """Trailing metadata of a server: lines ``key: value``; and the metrics of a sibling after an empty line."""
    head, _, rest = data.partition(b"\n\n")
    pairs = [line.partition(b": ") for line in head.split(b"\n")]
    trailing = [(key.decode("ascii", "ignore"), value.decode("ascii", "ignore")) for key, _, value in pairs]
    one = siblings.replica(trailing)
    if one:
        for address, other in siblings.siblings("[::1]:50000", one).items():
            addresses.host_and_port(address)
            assert one.first <= other.port <= one.last
    stats = Stats()
    stats.add("RunText", 0.1, trailing, "OK")
    json.dumps(stats.snapshot())
    labelled({1: rest, 2: b'# HELP a b\n# TYPE a counter\na{x="1"} 1\n', 3: None})


_REPORTS = [
    b'tms-replica: 127.0.0.1:50001\ntms-ports: 50000-50003\ntms-retries: 2\n\n# HELP a b\n# TYPE a gauge\na{x="1"} 1\n',
    b"tms-replica: [::1]:50001\ntms-ports: 50001-50001",
    b"tms-replica: h:1\ntms-ports: 1-256",
]


def images(data: bytes) -> None:
    """An image file, which a worker decodes by OpenCV."""
    with suppress(InvalidInput):
        engines.engine().run("echo", codec.encode(codec.EncodedImage(data)), {}, Call())


def _image_seeds() -> list[bytes]:
    import cv2

    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    endings = ("png", "jpg", "bmp", "webp", "tiff", "gif", "ppm", "hdr", "jp2", "ras", "pfm", "exr", "avif")
    made = []
    for ending in endings:
        with suppress(cv2.error):
            pixels_of = pixels.astype(np.float32) if ending in ("hdr", "exr", "pfm") else pixels
            can, file = cv2.imencode(f".{ending}", pixels_of)
            made += [file.tobytes()] if can else []
    return [*made, cv2.imencode(".png", pixels[..., 0].astype(np.uint16))[1].tobytes(), made[0][:40]]


def targets() -> Iterator[Target]:
    """Those of this file."""
    yield Target("images", images, _image_seeds(), ("engine/runner.py",), _image_mutated)
    yield Target("values", values, list(_value_seeds()), ("codec.py", "conversions.py"), _value_mutated)
    yield Target("texts", texts, _TEXTS, ("codec.py", "json_arrays.py"), _text_mutated)
    yield Target("addresses", places, _PLACES, ("client/addresses.py",))
    modules = ("client/siblings.py", "client/stats.py", "server/siblings.py")
    yield Target("reports", reports, _REPORTS, modules)
