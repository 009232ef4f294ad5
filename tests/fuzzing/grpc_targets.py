"""Requests of the five gRPC protocols, health, and metadata: what a caller sends to the gRPC port."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np

from tests.fuzzing import engine as engines
from tests.fuzzing import mutators, oracle
from tests.fuzzing.mutators import Leaf
from tests.fuzzing.oracle import Finding, Target
from tiny_model_server import codec, schemas
from tiny_model_server.client import calls
from tiny_model_server.errors import ServerError
from tiny_model_server.server import health
from tiny_model_server.server.grpc_server import PROTOCOLS, GrpcServer

PEERS = ("ipv4:127.0.0.1:4321", "unix:", "ipv6:%5B::1%5D:99", "ipv4:10.1.2.3:80", "ipv6:[fe80::1%25eth0]:7", "")
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db0"
    "0000000049454e44ae426082"
)
VALUES: list[Any] = [
    "text",
    {"a": PIXELS, "b": [1, 2.5, None, True], "c": {"d": b"bytes"}},
    [np.float32([1, 2]), np.array(["x", "yz"]), float("nan")],
    {"$x": 1, "t": np.array([0], "M8[s]")},
    codec.EncodedImage(PNG),
    np.zeros((2, 2), np.float32),
    {"name": "n", "count": 2, "prices": [1.5], "parts": {"p": [1, None]}},
]


class _Ended(Exception):
    """The call was aborted, as grpcio's context does it."""


class _Context:
    """A servicer context of grpcio, which takes only what gRPC can send."""

    def __init__(self, metadata: Mapping[str, str | bytes], peer: str, seconds: float | None) -> None:
        self._metadata, self._peer, self._seconds = metadata, peer, seconds
        self.status = ""

    def time_remaining(self) -> float | None:
        return self._seconds

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return list(self._metadata.items())

    def peer(self) -> str:
        return self._peer

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        for key, value in metadata:
            sound = isinstance(value, bytes) if key.endswith("-bin") else value.isascii() and value.isprintable()
            if not sound:
                raise Finding(f"metadata that gRPC cannot send: {key}={value!r}")

    def set_code(self, code: Any) -> None:
        self.status = code.name

    def set_details(self, details: str) -> None:
        oracle.status(self.status, details)

    def abort(self, code: Any, details: str) -> None:
        raise _Ended(details)


@cache
def server(**settings: Any) -> GrpcServer:
    """The gRPC face of the inline engine. It is bound to a port, and not started."""
    engine = engines.engine(**settings)
    return GrpcServer(engine, engine.settings)


@cache
def _behaviours(protocol: str, **settings: Any) -> list[tuple[schemas.Method, Callable[[Any, Any], Any]]]:
    face, module = server(**settings), PROTOCOLS[protocol]
    handlers = module.handlers(face._engine)
    methods = schemas.methods(module.SCHEMA, module.SERVICE).values()
    return [
        (one, (face._streaming if one.server_streaming else face._unary)(one, handlers[one.name])) for one in methods
    ]


def call(
    protocol: str,
    number: int,
    data: bytes,
    metadata: Mapping[str, str | bytes],
    peer: str = PEERS[0],
    seconds: float | None = 20.0,
    **settings: Any,
) -> list[bytes]:
    """The answers, serialized, to one call; an error that gRPC would send is no answer."""
    methods = _behaviours(protocol, **settings)
    method, answer = methods[number % len(methods)]
    context = _Context(metadata, peer, seconds)
    with suppress(_Ended):
        found = answer(iter([data, data]) if method.client_streaming else data, context)
        answers: list[bytes] = list(found) if method.server_streaming else [found]
        for one in answers:
            method.response.FromString(one)
        return answers
    return []


_FEW = 20
_METADATA: list[dict[str, str | bytes]] = [{}, {"mm-model-id": "rows"}, {"tms-retry": "no"}, {"mm-model-id": "echo"}]


def _run(protocol: str, data: bytes, **settings: Any) -> None:
    """The first byte is the method's number, the second one says which metadata comes along, the rest is a message.

    If its highest bit is set, few items are allowed, so that short messages are counted before they are parsed.
    """
    if len(data) >= 2:
        settings |= {"max_items": _FEW} if data[1] & 0x80 else {}
        call(protocol, data[0], data[2:], _METADATA[data[1] % len(_METADATA)], **settings)


def _mutated(protocol: str, data: bytes, rng: Random, leaf: Leaf) -> bytes:
    methods = [method for method, _ in _behaviours(protocol)]
    if len(data) < 2 or rng.random() < 0.03:
        return bytes([rng.randrange(len(methods)), rng.randrange(4)]) + data[2:]
    kind = methods[data[0] % len(methods)].request
    return data[:2] + mutators.message(kind, data[2:], rng, leaf)


def _seeds(protocol: str, *requests: tuple[str, bytes]) -> list[bytes]:
    names = [method.name for method, _ in _behaviours(protocol)]
    every = [bytes([number, 0]) for number in range(len(names))]
    return every + [bytes([names.index(name), flag]) + request for name, request in requests for flag in (0, 0x80)]


def native_requests() -> Iterator[tuple[str, bytes]]:
    """(method, message) of the native protocol, as the client makes them."""
    made = [calls.text("RunText", model, "hello", {"top": 3, "$f": float("nan")}) for model in engines.MODELS]
    made += [calls.image(name, "echo", image, None) for name in ("RunImage", "RunImageToImage") for image in IMAGES]
    made += [
        calls.image("RunImageToImage", "masks", IMAGES[0], {}),
        calls.text_batch("echo", ["x"] * 30, None, True),
    ]
    for name in ("Run", "RunStream"):
        made += [calls.value(name, model, value, {"a": 1}) for value in VALUES for model in ("echo", "yields", "typed")]
    made += [calls.value_batch("echo", VALUES, None, True), calls.image_batch("echo", IMAGES[:2], None, True)]
    made += [calls.text_batch("letters", ["a", "b"], None, True), calls.value("Run", "echo", LARGE, None)]
    made += [calls.image("RunImage", "echo", LARGE, None), calls.value("Run", "echo", {"a": PIXELS, "b": LARGE}, None)]
    for one in made:
        yield one.method.name, one.inline()
    for name, fields in (("GetModelInfo", {"model": "echo"}), ("LoadModel", {"model": "echo", "workers": 2})):
        yield name, schemas.methods("server", "server.Server")[name].request(**fields).SerializeToString()


IMAGES: list[Any] = [PIXELS, PIXELS[..., 0].astype(np.float32), PNG]
LARGE = np.zeros((schemas.LARGE + 64) // 3 * 3, np.uint8).reshape(-1, 1, 3)


def _native() -> list[bytes]:
    return _seeds("native", *native_requests())


def infer_requests() -> Iterator[bytes]:
    """Inference requests of Open Inference Protocol v2."""
    from tiny_model_server.protocols.open_inference import _FIELDS

    request = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelInfer"].request
    raw = np.arange(4)
    for datatype, field in _FIELDS.items():
        items = [b"a", PNG] if datatype == "BYTES" else [0, 1]
        one = {"name": "x", "datatype": datatype, "shape": [2], "contents": {field: items}}
        yield request(model_name="rows", id="1", inputs=[one]).SerializeToString()
    for datatype, dtype in (("FP16", "f2"), ("FP32", "f4"), ("INT64", "i8"), ("UINT8", "u1"), ("BF16", "u2")):
        one = {"name": "x", "datatype": datatype, "shape": [2, 2]}
        data = raw.astype(dtype).tobytes()
        outputs = [{"name": "output"}]
        yield request(model_name="echo", inputs=[one], raw_input_contents=[data], outputs=outputs).SerializeToString()
    texts = b"\2\0\0\0hi" + len(PNG).to_bytes(4, "little") + PNG
    parameters = {"content_type": {"string_param": "str"}}
    two = [{"name": name, "datatype": "BYTES", "shape": [2], "parameters": parameters} for name in "xy"]
    for parameter in ({"bool_param": True}, {"int64_param": 5}, {"double_param": 0.5}, {"string_param": "s"}):
        fields = {"inputs": two, "raw_input_contents": [texts, texts], "parameters": {"p": parameter}}
        yield request(model_name="rows", **fields).SerializeToString()


def _open_inference() -> list[bytes]:
    requests = [("ModelInfer", one) for one in infer_requests()]
    return _seeds("open_inference", *requests, ("ModelStreamInfer", requests[0][1]))


def _model_mesh() -> list[bytes]:
    kinds = {method.name: method.request for method, _ in _behaviours("model_mesh")}
    known = {"modelId": "m", "modelPath": str(engines.FOLDER / "echo"), "modelType": "t", "modelKey": "{}"}
    made = []
    for name, kind in kinds.items():
        fields = {field.name: known[field.name] for field in kind.DESCRIPTOR.fields}
        made += [(name, kind(**fields).SerializeToString())]
    return _seeds("model_mesh", *made)


def _modzy() -> list[bytes]:
    request = {method.name: method.request for method, _ in _behaviours("modzy")}["Run"]
    item = {"input": {"image": PNG, "job.json": b'{"a": 1}'}}
    made = [request(inputs=[item, {"input": {"input": b"text"}}], explain=True), request(inputs=[item] * 2)]
    return _seeds("modzy", *(("Run", one.SerializeToString()) for one in made))


def pickles() -> Iterator[bytes]:
    """What clients of nos send: arrays, images of PIL, and lists of them."""
    from PIL import Image

    arrays = [PIXELS, np.asfortranarray(PIXELS[..., 0].astype(np.float32)), np.float16(2).reshape(())]
    images = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])]
    for protocol in (2, 3, 4, 5):
        yield from (pickle.dumps(one, protocol) for one in [*arrays, *images, [*arrays[:1], images[0]]])


def _nos() -> list[bytes]:
    request = {method.name: method.request for method, _ in _behaviours("nos")}["Predict"]
    made = [
        request(method="img2vec", model_name="echo", image_request={"image_bytes": one}).SerializeToString()
        for one in pickles()
    ]
    made += [request(method="txt2vec", model_name="letters", text_request={"text": "hi"}).SerializeToString()]
    return _seeds("nos", *(("Predict", one) for one in made))


# ---- metadata, and health


def _metadata(data: bytes) -> None:
    """Lines: the caller's address, the seconds left, then ``key: value``; those of keys that end in -bin are bytes."""
    peer, _, rest = data.partition(b"\n")
    seconds, _, rest = rest.partition(b"\n")
    pairs = [line.partition(b": ") for line in rest.split(b"\n") if line]
    metadata: dict[str, str | bytes] = {}
    for key, _, value in pairs:  # as gRPC lets them through
        name = key.decode("ascii", "ignore").lower()
        metadata[name] = value if name.endswith("-bin") else value.decode("ascii", "ignore")
    request = schemas.methods("server", "server.Server")["RunText"].request(text="x", model="echo").SerializeToString()
    settings: dict[str, Any] = {} if len(seconds) % 2 else {"token": "secret", "admin": "token", "admin_token": "root"}
    left = float(seconds) if seconds.replace(b".", b"", 1).isdigit() and len(seconds) < 12 else None
    where = PEERS[peer[0] % len(PEERS)] if len(peer) == 1 else peer.decode("utf-8", "ignore")
    names = [method.name for method, _ in _behaviours("native", **settings)]
    face = server(**settings)
    with suppress(ServerError):
        face._engine.access.authenticate(metadata)
    for name, message in (("RunText", request), ("StopServer", b"")):
        call("native", names.index(name), message, metadata, where, left, **settings)


_METADATA_SEEDS = [
    b"ipv4:127.0.0.1:4321\n20\nx-request-id: abc\nauthorization: Bearer secret",
    b"ipv6:%5B::1%5D:99\n20.5\ngrpc-previous-rpc-attempts: 2\ntms-retry: no\nmm-model-id: echo",
    b"unix:\n5\nmm-model-id-bin: echo\nx-forwarded-for: 1.2.3.4\nvia: x",
    b"ipv4:127.0.0.1:4321\n0.001\nauthorization: Bearer root\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-1-01",
    b"ipv4:10.1.2.3:80\n9999999999\nforwarded: for=1\nx-request-id: " + b"a" * 128,
]


def _health(data: bytes) -> None:
    face = server()._health
    with suppress(ServerError):
        face._service(data)


def targets() -> Iterator[Target]:
    """A target for each protocol."""
    common = ("schemas.py", "server/grpc_server.py", "codec.py")
    makers = {
        "native": (_native, ("protocols/native.py", *common)),
        "open_inference": (_open_inference, ("protocols/open_inference.py", "protocols/tensors.py")),
        "model_mesh": (_model_mesh, ("protocols/model_mesh.py",)),
        "modzy": (_modzy, ("protocols/modzy.py", "image_files.py")),
        "nos": (_nos, ("protocols/nos.py",)),
    }
    for name, (seeds, modules) in makers.items():
        yield Target(name, partial(_run, name), seeds(), modules, partial(_mutated, name))
    files = partial(_run, "modzy", modzy_model="files")
    yield Target("modzy_files", files, _modzy(), ("protocols/modzy.py",), partial(_mutated, "modzy"))
    modules = ("access.py", "request_ids.py", "engine/call.py", "errors.py")
    yield Target("metadata", _metadata, _METADATA_SEEDS, modules)
    service = schemas.methods("health", health.SERVICE)["Check"].request(service="echo").SerializeToString()
    yield Target("health", _health, [b"", service], ("server/health.py",))
