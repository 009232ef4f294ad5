"""Small requests that would become much: each is refused before it is built, and nobody else notices."""

import http.client
import json
import pickle
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import model_client
from tests.conftest import Server
from tests.test_faults import write_model
from tiny_model_server import codec, schemas
from tiny_model_server.errors import InvalidInput
from tiny_model_server.protocols import nos, open_inference, tensors
from tiny_model_server.schemas import varint

NATIVE = schemas.methods("server", "server.Server")
INFER = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelInfer"]
MODZY = schemas.methods("modzy", "ModzyModel")["Run"]
PREDICT = schemas.methods("nos", "nos.inference.InferenceService")["Predict"]
MODEL_SIZE = schemas.methods("model_mesh", "mmesh.ModelRuntime")["modelSize"]
SLACK = 100 << 20  # bytes beside four times the request
BUSY_S = 3.0  # half a second on a machine with nothing else to do
MODELS = {
    "echo": "    def run(self, data, args):\n        return data",
    "rows": '    metadata = {"batch": True}\n    def run(self, data, args):\n        return data',
    "other": "    def run(self, data, args):\n        return data",
}


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def shape(*sizes: int) -> bytes:
    return field(3, b"".join(map(varint, sizes)))


def run(text: bytes, *arrays: bytes) -> bytes:
    return field(1, field(1, text) + b"".join(field(2, array) for array in arrays)) + field(2, b"echo")


def array(dtype: bytes, sizes: tuple[int, ...], data: bytes = b"") -> bytes:
    return field(1, dtype) + field(2, b"".join(map(varint, sizes))) + field(3, data)


def infer(model: bytes, *tensors_: bytes, raw: bytes | None = None) -> bytes:
    ends = b"" if raw is None else field(7, raw)
    return field(1, model) + b"".join(field(5, tensor) for tensor in tensors_) + ends


def tensor(datatype: bytes, dims: bytes, contents: bytes = b"", name: bytes = b"x") -> bytes:
    return field(1, name) + field(2, datatype) + dims + (field(5, contents) if contents else b"")


MB = bytes(1 << 20)
MANY = bytes(16_000_000)  # empty elements of BYTES
HUGE = b"".join(varint(1 << 62) for _ in range(200_000))
PARAMETERS = b"".join(field(4, field(1, b"k%d" % i) + field(2, b"\x10\x01")) for i in range(200_000))
FEW = bytes(50_000)
LONG_NAMES = [tensor(b"UINT8", shape(50_000, 1), name=b"n" * 1_000_000 + end) for end in (b"a", b"b")]

ATTACKS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "wide JSON": (NATIVE["Run"].path, lambda: run(b"[" + b"[]," * 3_000_000 + b"1]")),
    "wide JSON of dicts": (NATIVE["Run"].path, lambda: run(b"[" + b'{"a":1},' * 1_000_000 + b"1]")),
    "deep JSON": (NATIVE["Run"].path, lambda: run(b"[" * 3_000_000)),
    "deep dicts": (NATIVE["Run"].path, lambda: run(b'{"a":' * 400_000)),
    "wide JSON in a stream": (NATIVE["RunStream"].path, lambda: run(b"[" + b"{}," * 3_000_000 + b"1]")),
    "wide args": (
        NATIVE["RunText"].path,
        lambda: field(2, b"echo") + field(3, b'{"a":[' + b"{}," * 3_000_000 + b"1]}"),
    ),
    "deep args": (NATIVE["RunText"].path, lambda: field(2, b"echo") + field(3, b'{"a":' * 400_000)),
    "texts": (NATIVE["RunBatchText"].path, lambda: field(1, b"") * 2_000_000 + field(2, b"echo")),
    "items": (NATIVE["RunBatch"].path, lambda: field(1, field(1, b"1")) * 1_000_000 + field(2, b"echo")),
    "images": (NATIVE["RunBatchImage"].path, lambda: field(1, b"\x30\x01") * 300_000 + field(2, b"echo")),
    "arrays": (NATIVE["Run"].path, lambda: run(b"1", *[b""] * 1_000_000)),
    "arrays in items": (
        NATIVE["RunBatch"].path,
        lambda: field(1, field(1, b"1") + field(2, b"") * 100_000) * 9 + field(2, b"echo"),
    ),
    "unknown fields": (NATIVE["Run"].path, lambda: b"\xf8\x01\x01" * 3_000_000 + field(2, b"echo")),
    "text of one message again and again": (NATIVE["RunText"].path, lambda: field(1, b"") * 3_000_000),
    "references to nothing": (
        NATIVE["Run"].path,
        lambda: run(b"[" + b'{"$array":0},' * 300_000 + b"1]", array(b"uint8", (0,))),
    ),
    "references to an array": (
        NATIVE["Run"].path,
        lambda: run(b"[" + b'{"$bytes":0},' * 2000 + b"1]", array(b"uint8", (1 << 20,), MB)),
    ),
    "references to an image": (
        NATIVE["Run"].path,
        lambda: run(b"[" + b'{"\\u0024image":0},' * 100 + b"1]", array(b"uint8", (1 << 20,), MB)),
    ),
    "dimensions": (NATIVE["Run"].path, lambda: run(b'{"$array":0}', field(1, b"uint8") + field(2, HUGE))),
    "small dimensions": (
        NATIVE["Run"].path,
        lambda: run(b'{"$array":0}', field(1, b"uint8") + field(2, b"\1" * 8_000_000)),
    ),
    "elements of no bytes": (NATIVE["Run"].path, lambda: run(b'{"$array":0}', array(b"<U0", (1 << 33,)))),
    "empty rows": (NATIVE["Run"].path, lambda: run(b'{"$array":0}', array(b"uint8", (1 << 40, 0)))),
    "tensor's dimensions": (
        INFER.path,
        lambda: infer(b"echo", tensor(b"BYTES", field(3, HUGE), field(8, b"a"))),
    ),
    "dimensions of numbers": (INFER.path, lambda: infer(b"echo", tensor(b"FP32", field(3, HUGE)), raw=b"")),
    "rows": (INFER.path, lambda: infer(b"rows", tensor(b"UINT8", shape(3_000_000, 0)), raw=b"")),
    "few rows": (INFER.path, lambda: infer(b"rows", tensor(b"UINT8", shape(60_000, 0)), raw=b"")),
    "more rows than allowed": (
        INFER.path,
        lambda: infer(b"rows", tensor(b"UINT8", shape(200_000, 1)), raw=bytes(200_000)),
    ),
    "rows with long names": (
        INFER.path,
        lambda: infer(b"rows", *LONG_NAMES, raw=FEW) + field(7, FEW),
    ),
    "parameters": (INFER.path, lambda: PARAMETERS + infer(b"echo", tensor(b"BYTES", shape(1), field(8, b"a")))),
    "inputs": (INFER.path, lambda: infer(b"echo") + field(5, b"") * 1_000_000),
    "raw contents": (INFER.path, lambda: infer(b"echo") + field(7, b"") * 1_000_000),
    "typed numbers": (
        INFER.path,
        lambda: infer(b"echo", tensor(b"INT64", shape(9_000_000), field(3, b"\1" * 9_000_000))),
    ),
    "typed bytes": (INFER.path, lambda: infer(b"echo", tensor(b"BYTES", shape(1), field(8, b"") * 1_000_000))),
    "raw bytes": (INFER.path, lambda: infer(b"echo", tensor(b"BYTES", shape(4_000_000)), raw=MANY)),
    "raw bytes of another shape": (
        INFER.path,
        lambda: infer(b"echo", tensor(b"BYTES", shape(1)), raw=MANY),
    ),
    "Modzy's items": (MODZY.path, lambda: field(1, b"") * 1_000_000),
    "Modzy's inputs": (MODZY.path, lambda: field(1, field(1, b"") * 1_000_000)),
    "unknown fields to ModelMesh": (MODEL_SIZE.path, lambda: b"\xf8\x01\x01" * 3_000_000),
    "pickle of lists": (
        PREDICT.path,
        lambda: PREDICT.request(
            method="img2vec", model_name="echo", image_request={"image_bytes": b"\x80\x04" + b"]" * 5_000_000 + b"."}
        ).SerializeToString(),
    ),
    "pickle of a large bytearray": (
        PREDICT.path,
        lambda: PREDICT.request(
            method="img2vec",
            model_name="echo",
            image_request={"image_bytes": b"\x80\x05\x96" + struct.pack("<Q", 4 << 30) + b"."},
        ).SerializeToString(),
    ),
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    for name, body in MODELS.items():
        write_model(folder, name, body)
    server = Server(folder, TMS_PROTOCOLS="native,open_inference,modzy,nos,model_mesh", TMS_MODZY_MODEL="echo")
    yield server
    server.kill()


class Watch:
    """The memory of a server's front, and how long others wait for it, while it is attacked."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._status = Path(f"/proc/{server.process.pid}/status")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.waits: list[float] = []

    def __enter__(self) -> "Watch":
        Path(f"/proc/{self._server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._kib("VmRSS")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        """Bytes of memory that the front had more at its peak."""
        return (self._kib("VmHWM") - self._before) << 10

    def _kib(self, name: str) -> int:
        lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
        return int(lines[name].split()[0])

    def _ask(self) -> None:
        text = NATIVE["RunText"]
        health = schemas.methods("health", "grpc.health.v1.Health")["Check"]
        with grpc.insecure_channel(self._server.address) as channel:
            calls = [
                (channel.unary_unary(text.path), text.request(text="x", model="other").SerializeToString()),
                (channel.unary_unary(health.path), b""),
            ]
            while not self._end.is_set():
                for call, request in calls:
                    begun = time.monotonic()
                    call(request, timeout=60)
                    self.waits.append(time.monotonic() - begun)
                self._end.wait(0.02)


def send(server: Server, path: str, body: bytes) -> bytes:
    """The answer's bytes; a stream's first."""
    with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
        if path == NATIVE["RunStream"].path:
            return next(iter(channel.unary_stream(path)(body, timeout=60)))
        return channel.unary_unary(path)(body, timeout=60)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_would_become_much_is_refused(victim: Server, attack: str) -> None:
    path, make = ATTACKS[attack]
    body = make()
    with Watch(victim) as watch:
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            send(victim, path, body)
        took = time.monotonic() - begun
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert watch.grown < 4 * len(body) + SLACK, f"{watch.grown >> 20} MiB"
    assert max(watch.waits) < BUSY_S
    assert took < 20


LARGE = {
    "an array": lambda: run(b'{"a":{"$array":0}}', array(b"uint8", (4 << 20,), bytes(4 << 20))),
    "a text with commas": lambda: run(json.dumps(", [{: " * 400_000).encode()),
    "a text with quotes": lambda: run(json.dumps('",\\"' * 400_000).encode()),
    "numbers": lambda: run(json.dumps([7] * 1_000_000).encode()),
    "a long key": lambda: run(json.dumps({"k" * 1_000_000: dict.fromkeys(map(str, range(50_000)))}).encode()),
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_large_but_does_not_become_more_is_answered(victim: Server, kind: str) -> None:
    body = LARGE[kind]()
    with Watch(victim) as watch:
        answer = NATIVE["Run"].response.FromString(send(victim, NATIVE["Run"].path, body))
    sent = NATIVE["Run"].request.FromString(body).data
    assert json.loads(answer.data) == json.loads(sent.json)
    assert [one.data for one in answer.arrays] == [one.data for one in sent.arrays]
    assert watch.grown < 10 * len(body) + SLACK, f"{watch.grown >> 20} MiB"


def post(server: Server, path: str, body: bytes, kind: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


FORM = "multipart/form-data; boundary=b0"
JSON = "application/json"


def form(**parts: bytes) -> bytes:
    heads = {name: f'--b0\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() for name in parts}
    return b"".join(heads[name] + content + b"\r\n" for name, content in parts.items()) + b"--b0--\r\n"


def rest(data: bytes, datatype: str = "FP32") -> bytes:
    return b'{"inputs":[{"name":"x","datatype":"%s","shape":[1],"data":%s}]}' % (datatype.encode(), data)


POSTS: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "wide JSON": ("/models/echo/run", JSON, lambda: b"[" + b"{}," * 3_000_000 + b"1]"),
    "deep JSON": ("/models/echo/run", JSON, lambda: b"[" * 3_000_000),
    "wide form": ("/models/echo/run", FORM, lambda: form(data=b"[" + b"[]," * 3_000_000 + b"1]")),
    "wide args": ("/models/echo/run", FORM, lambda: form(text=b"x", args=b'{"a":[' + b"[]," * 3_000_000 + b"1]}")),
    "wide REST": ("/v2/models/echo/infer", JSON, lambda: rest(b"[" + b"[]," * 3_000_000 + b"1]")),
    "deep REST": ("/v2/models/echo/infer", JSON, lambda: rest(b"[" * 900 + b"1," * 300_000 + b"1" + b"]" * 900)),
    "one long text": (
        "/v2/models/echo/infer",
        JSON,
        lambda: rest(b'["' + b"x" * 1_000_000 + b'"' + b',""' * 1000 + b"]"),
    ),
    "REST texts": ("/v2/models/echo/infer", JSON, lambda: rest(b'["",' + b'"",' * 300_000 + b'""]', "BYTES")),
    "REST inputs": ("/v2/models/echo/infer", JSON, lambda: b'{"inputs":[' + b"{}," * 400_000 + b"{}]}"),
    "REST parameters": (
        "/v2/models/echo/infer",
        JSON,
        lambda: b'{"inputs":[{}],"parameters":{%s}}' % b",".join(b'"%d":1' % i for i in range(300_000)),
    ),
}


@pytest.mark.parametrize("attack", POSTS)
def test_so_is_what_comes_by_http(victim: Server, attack: str) -> None:
    path, kind, make = POSTS[attack]
    body = make()
    with Watch(victim) as watch:
        status, answer = post(victim, path, body, kind)
    assert status in (400, 413, 429), answer
    assert watch.grown < 4 * len(body) + SLACK, f"{watch.grown >> 20} MiB"
    assert max(watch.waits) < BUSY_S


def test_a_number_of_items_is_allowed(start_server: Callable[..., Server], tmp_path: Path) -> None:
    for name, body in MODELS.items():
        write_model(tmp_path, name, body)
    server = start_server(tmp_path, TMS_MAX_ITEMS=10)
    with server.client("echo") as client:
        assert client.run_text_batch(["x"] * 10) == ["x"] * 10
        assert client.run_batch([{"a": 1}] * 10) == [{"a": 1}] * 10
        for call in (client.run_text_batch, client.run_batch):
            with pytest.raises(model_client.InvalidInput, match="TMS_MAX_ITEMS"):
                call(["x"] * 11)
    for rows in (10, 11):
        request = infer(b"rows", tensor(b"UINT8", shape(rows, 1)), raw=bytes(rows))
        if rows == 10:
            assert INFER.response.FromString(send(server, INFER.path, request)).raw_output_contents[0] == bytes(rows)
        else:
            with pytest.raises(grpc.RpcError, match="TMS_MAX_ITEMS"):
                send(server, INFER.path, request)


def test_args_go_along_with_each_item_and_so_are_counted(victim: Server) -> None:
    args = {"a": "x" * 1_000_000}
    with victim.client("echo") as client:
        assert client.run_text_batch(["x"] * 2, args) == ["x"] * 2
        with pytest.raises(model_client.InvalidInput, match="go along with each of 1000 items"):
            client.run_text_batch(["x"] * 1000, args)


def test_counting_is_as_protobuf_reads() -> None:
    method = NATIVE["RunBatchText"]
    good = method.request(texts=["a", "b"] * 20, model="m", args="{}", accept_arrays=True).SerializeToString()
    assert len(schemas.parse(method, good, None, 40).texts) == 40
    for bad in (good + b"\x0a\x7f", good + b"\x0b", good + b"\x0e", good + b"\xff" * 11, good[:-1] + b"\x80"):
        with pytest.raises(InvalidInput, match=r"is not a server\.BatchTextArgs"):
            schemas.parse(method, bad, None, 40)
    with pytest.raises(InvalidInput, match="too many texts"):
        schemas.parse(method, good, None, 39)


def test_a_pickle_that_names_an_image_again_and_again_is_refused() -> None:
    np = pytest.importorskip("numpy")
    image = np.asfortranarray(np.zeros((1000, 1000, 3), np.uint8))
    assert len(nos._images(pickle.dumps([image] * 2, protocol=4))) == 2
    with pytest.raises(InvalidInput, match="send each of them once"):
        nos._images(pickle.dumps([image] * 100, protocol=4))


def test_nodes_are_counted_outside_of_texts() -> None:
    many = "," * (codec.MAX_NODES + 1)
    assert codec.parse_json(json.dumps(many)) == many
    for text in (f"[{many}", f'["{many}"{many}'):
        with pytest.raises(InvalidInput, match="more than"):
            codec.parse_json(text)
    assert codec.parse_json(json.dumps(['\\",' * codec.MAX_NODES, "x"]))[1] == "x"


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, '{"a":' * 199 + "{}" + "}" * 199, "[" + "[]," * 1000 + "1]"])
def test_json_may_be_so_deep(victim: Server, text: str) -> None:
    assert post(victim, "/models/echo/run", text.encode(), JSON) == (200, json.loads(text))
    for deeper in (f"[{text}", f"[{text}]", f'{{"a": {text}}}'):
        status, answer = post(victim, "/models/echo/run", deeper.encode(), JSON)
        if text.startswith("[[],") and deeper != f"[{text}":
            assert status == 200
        else:
            assert (status, answer["status"]) == (400, "INVALID_ARGUMENT"), answer


def test_typed_numbers_become_an_array() -> None:
    numbers = list(range(200_000))
    request = INFER.request(inputs=[{"name": "x", "datatype": "UINT32", "shape": [len(numbers)]}])
    request.inputs[0].contents.uint_contents.extend(numbers)
    found = tensors.arrays(open_inference._inputs(request), 10)["x"]
    assert found.tolist() == numbers
