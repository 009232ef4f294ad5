"""The contract on the wire: old clients, malformed requests, other languages, reflection, health."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, Server, wait_for
from tiny_model_server import schemas

BIN = Path(sys.executable).parent


class RawClient:
    """Calls by path, with messages of whatever pool; checks nothing itself."""

    def __init__(self, server: Server, pool: descriptor_pool.DescriptorPool) -> None:
        self.channel = grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)])
        self.service = pool.FindServiceByName("server.Server")
        self.pool = pool

    def message(self, name: str, **fields: Any) -> Any:
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"server.{name}"))(**fields)

    def call(self, method: str, request: Any, timeout: float = 10) -> Any:
        response = message_factory.GetMessageClass(self.service.methods_by_name[method].output_type)
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return response.FromString(self.send(f"/server.Server/{method}", data, timeout))

    def send(self, path: str, data: bytes, timeout: float = 10) -> bytes:
        return self.channel.unary_unary(path)(data, timeout=timeout)

    def refusal(self, method: str, request: Any) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, request)
        return caught.value.code().name, caught.value.details()


@pytest.fixture(scope="module")
def legacy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("proto") / "legacy.binpb"
    protoc(f"--descriptor_set_out={out}", "-I", "tests", "legacy.proto")
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    client = RawClient(server, pool)
    yield client
    client.channel.close()


@pytest.fixture(scope="module")
def raw(server: Server) -> Any:
    schemas.load("server")
    client = RawClient(server, schemas.pool)
    yield client
    client.channel.close()


def protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], cwd=ROOT, check=True)


def image(client: RawClient, array: np.ndarray) -> Any:
    height, width, channels = (*array.shape, 1)[:3]
    fields = {"height": height, "width": width, "channels": channels, "dtype": str(array.dtype)}
    return client.message("NumpyImage", data=array.tobytes(), **fields)


def test_old_clients_get_what_they_always_got(legacy: RawClient, server: Server) -> None:
    empty, name = legacy.message("EmptyArgs"), legacy.message("StringArg", data="declares")
    an_image = image(legacy, np.arange(6, dtype=np.uint8).reshape(2, 3))

    def data(method: str, request: Any) -> Any:
        return json.loads(legacy.call(method, request).data)

    # With no arguments old clients send the JSON text "" as args.
    assert data("RunText", legacy.message("TextArgs", text="hi", model="echo", args='""')) == "hi"
    assert data("RunImage", legacy.message("ImageArgs", image=an_image, model="echo")) == [[0, 1, 2], [3, 4, 5]]
    texts = legacy.message("BatchTextArgs", texts=["a", "b"], model="echo", args='{"x": 1}')
    assert data("RunBatchText", texts) == [{"data": "a", "args": {"x": 1}}, {"data": "b", "args": {"x": 1}}]
    images = legacy.message("BatchImageArgs", images=[an_image, an_image], model="echo")
    assert data("RunBatchImage", images) == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert "echo" in data("ListModels", empty)
    assert data("GetInputShape", name) == [224, 224, 3]
    assert data("GetPID", empty) == {"pid": server.process.pid}
    assert data("GetPID", name) == {"pid": server.process.pid}  # a StringArg where EmptyArgs is declared
    assert data("GetNumParallelWorkers", empty) == {"num_workers": 1}


def test_old_fields_keep_names_numbers_and_types(legacy: RawClient) -> None:
    for old in legacy.service.file.message_types_by_name.values():
        new = schemas.pool.FindMessageTypeByName(old.full_name)
        for field in old.fields:
            same = new.fields_by_number[field.number]
            assert (same.name, same.type, same.is_repeated) == (field.name, field.type, field.is_repeated)


def test_old_clients_get_failures_as_statuses(legacy: RawClient) -> None:
    unknown = legacy.message("TextArgs", text="hi", model="nobody")
    assert legacy.refusal("RunText", unknown)[0] == "NOT_FOUND"
    batch = legacy.message("BatchTextArgs", texts=["a", "b"], model="misbehave", args='{"do": "invalid"}')
    assert legacy.refusal("RunBatchText", batch) == ("INVALID_ARGUMENT", "item 0: the image is upside down")


def test_old_clients_can_stop_the_server(start_server: Callable[..., Server], legacy: RawClient) -> None:
    server = start_server()
    client = RawClient(server, legacy.pool)
    assert json.loads(client.call("StopServer", legacy.message("EmptyArgs")).data) == {"stopping": True}
    assert server.process.wait(10) == 0
    client.channel.close()


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"height": 2, "width": 3, "channels": 1, "data": b"12345"}, "needs 6 bytes, but there are 5"),
    ({"height": 2, "width": 3, "channels": 3, "data": b"1", "dtype": "float32"}, "needs 72 bytes, but there are 1"),
    ({"height": -2, "width": -3, "channels": 1, "data": b"123456"}, "positive height, width and channels"),
    ({"height": 2, "width": 3, "data": b"123456"}, "positive height, width and channels, not 2x3x0"),
    ({"height": 2**31 - 1, "width": 2**31 - 1, "channels": 2**31 - 1, "data": b"1"}, "but there are 1"),
    ({"height": 1, "width": 1, "channels": 1, "data": b"1", "dtype": "object"}, "unknown dtype 'object'"),
    ({"height": 1, "width": 1, "channels": 1, "data": b"1", "dtype": "i4,f4"}, "unknown dtype 'i4,f4'"),
    ({"height": 1, "width": 1, "channels": 1, "data": b"1", "dtype": "\x00"}, "unknown dtype"),
    ({}, "positive height, width and channels, not 0x0x0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_REQUESTS)
def test_malformed_images(raw: RawClient, fields: dict[str, Any], message: str) -> None:
    request = raw.message("ImageArgs", image=raw.message("NumpyImage", **fields), model="echo")
    status, details = raw.refusal("RunImage", request)
    assert status == "INVALID_ARGUMENT"
    assert message in details
    batch = raw.message("BatchImageArgs", images=[request.image], model="echo")
    assert "item 0: " in raw.refusal("RunBatchImage", batch)[1]


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("RunText", "[1]", "args must be a JSON object"),
        ("RunText", "{", "malformed JSON"),
        ("RunText", "[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_args(raw: RawClient, method: str, args: str, message: str) -> None:
    status, details = raw.refusal(method, raw.message("TextArgs", text="x", model="echo", args=args))
    assert status == "INVALID_ARGUMENT"
    assert message in details


@pytest.mark.parametrize(
    ("text", "arrays", "message"),
    [
        ("", [], "malformed JSON"),
        ("{", [], "malformed JSON"),
        ('{"$array": 0}', [], "refers to none of the 0 arrays"),
        ('{"$array": -1}', [("uint8", [1], b"1")], "refers to none of the 1 arrays"),
        ('{"$array": true}', [("uint8", [1], b"1")], "refers to none"),
        ('{"$wrong": 0}', [], "unknown reference '$wrong'"),
        ('{"$float": "1"}', [], "must be one of nan"),
        ('{"$array": 0}', [("uint8", [-1], b"1")], "negative dimension"),
        ('{"$array": 0}', [("uint8", [2**62, 2**62], b"1")], "but there are 1"),
        ('{"$array": 0}', [("float32", [], b"1")], "needs 4 bytes"),
        ('{"$array": 0}', [("uint8", [0, 2**62, 2**62], b"")], "too long ones"),
        ('{"$array": 0}', [("uint8", [1] * 65, b"1")], "at most 32 dimensions"),
        ('{"$array": 0}', [("<U999999999", [1], b"1")], "unknown dtype"),
        ('{"$image": 0}', [("uint8", [1], b"1")], "not an image file"),
        ("[" * 100_000, [], "nested too deeply"),
    ],
)
def test_malformed_values(raw: RawClient, text: str, arrays: list[Any], message: str) -> None:
    value = raw.message("Value", json=text)
    for dtype, shape, data in arrays:
        value.arrays.add(dtype=dtype, shape=shape, data=data)
    status, details = raw.refusal("Run", raw.message("RunArgs", data=value, model="echo"))
    assert status == "INVALID_ARGUMENT", details
    assert message in details


def test_what_is_no_message_at_all(raw: RawClient) -> None:
    assert raw.refusal("RunText", b"\xff\xff\xff") == ("INVALID_ARGUMENT", "the request is not a server.TextArgs")
    assert raw.refusal("RunText", b"\x0a\x02\xff\xfe")[0] == "INVALID_ARGUMENT"  # no UTF-8
    with pytest.raises(grpc.RpcError) as caught:
        raw.send("/server.Server/NoSuchCall", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_MAX_MESSAGE_MB=1)
    raw = RawClient(server, schemas.pool)
    status, details = raw.refusal("RunText", raw.message("TextArgs", text="x" * 2_000_000, model="echo"))
    assert (status, "larger than max" in details) == ("RESOURCE_EXHAUSTED", True)
    assert raw.call("RunText", raw.message("TextArgs", text="x", model="echo")).data == '"x"'
    raw.channel.close()


def test_a_long_error_message_still_arrives(raw: RawClient) -> None:
    status, details = raw.refusal("RunText", raw.message("TextArgs", text="x", model="ü" * 100_000))
    assert status == "NOT_FOUND"
    assert len(details) < 1100


numbers = st.one_of(st.integers(-3, 5), st.integers(-(2**31), 2**31 - 1))
dtypes = st.one_of(st.sampled_from(["uint8", "float32", "", "<U2", "object", "V8"]), st.text(max_size=8))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
jsons = st.one_of(
    texts, st.sampled_from(["", '""', "null", "{}", '{"$array": 0}', '{"$image":1}', "[1, NaN]", "1e999"])
)
models = st.sampled_from(["echo", "describe", "nobody", "", "../echo"])
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}


@given(st.data())
def test_any_request_gets_a_status_of_the_right_set(raw: RawClient, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(["RunText", "RunImage", "RunBatchImage", "RunImageToImage", "Run", "RunBatch"]))
    fields: dict[str, Any] = {"model": data.draw(models), "args": data.draw(jsons)}

    def an_image() -> Any:
        size = [data.draw(numbers) for _ in range(3)]
        content, dtype = data.draw(st.binary(max_size=40)), data.draw(dtypes)
        names = dict(zip(("height", "width", "channels"), size, strict=True))
        return raw.message("NumpyImage", **names, data=content, dtype=dtype, encoded=data.draw(st.booleans()))

    def value() -> Any:
        found = raw.message("Value", json=data.draw(jsons))
        for _ in range(data.draw(st.integers(0, 2))):
            shape = data.draw(st.lists(st.one_of(st.integers(-2, 4), st.integers(-(2**63), 2**63 - 1)), max_size=4))
            found.arrays.add(dtype=data.draw(dtypes), shape=shape, data=data.draw(st.binary(max_size=40)))
        return found

    if method == "RunText":
        request = raw.message("TextArgs", text=data.draw(texts), **fields)
    elif method in ("RunImage", "RunImageToImage"):
        request = raw.message("ImageArgs", image=an_image(), **fields)
    elif method == "RunBatchImage":
        request = raw.message(
            "BatchImageArgs", images=[an_image() for _ in range(data.draw(st.integers(0, 2)))], **fields
        )
    elif method == "Run":
        request = raw.message("RunArgs", data=value(), **fields)
    else:
        request = raw.message("BatchRunArgs", items=[value() for _ in range(data.draw(st.integers(0, 2)))], **fields)
    try:
        raw.call(method, request)
        status = "OK"
    except grpc.RpcError as error:
        status = error.code().name
        assert error.details()
    assert status in ALLOWED
    assert raw.call("RunText", raw.message("TextArgs", text="good", model="echo")).data == '"good"'


@given(method=st.sampled_from(sorted(schemas.methods("server", "server.Server"))), noise=st.binary(max_size=60))
def test_any_bytes_get_a_status_of_the_right_set(raw: RawClient, method: str, noise: bytes) -> None:
    if method == "StopServer":
        return
    try:
        raw.send(f"/server.Server/{method}", noise)
    except grpc.RpcError as error:
        assert error.code().name in ALLOWED
    assert raw.call("RunText", raw.message("TextArgs", text="good", model="echo")).data == '"good"'


def grpcurl(server: Server, *arguments: str) -> str:
    ran = subprocess.run(
        [BIN / "grpcurl", "-plaintext", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_grpcurl_lists_describes_and_calls(server: Server) -> None:
    listed = grpcurl(server, server.address, "list").split()
    assert {"server.Server", "grpc.health.v1.Health"} <= set(listed)
    assert "server.Server.RunImageToImage" in grpcurl(server, server.address, "list", "server.Server")
    assert "repeated .server.Array arrays" in grpcurl(server, server.address, "describe", "server.Response")
    text = grpcurl(server, "-d", '{"text": "hi", "model": "echo"}', server.address, "server.Server/RunText")
    assert json.loads(text) == {"data": '"hi"'}
    pixels = base64.b64encode(bytes(6)).decode()
    an_image = {"height": 2, "width": 3, "channels": 1, "data": pixels}
    request = json.dumps({"image": an_image, "model": "describe"})
    answer = json.loads(json.loads(grpcurl(server, "-d", request, server.address, "server.Server/RunImage"))["data"])
    assert answer["shape"] == [2, 3]
    health = grpcurl(server, "-d", '{"service": "echo"}', server.address, "grpc.health.v1.Health/Check")
    assert json.loads(health) == {"status": "SERVING"}


@pytest.mark.skipif(not shutil.which("protoc"), reason="needs protoc (Debian: protobuf-compiler)")
@pytest.mark.parametrize("language", ["cpp", "java", "csharp", "ruby", "php", "objc"])
def test_other_languages_generate_from_server_proto_alone(language: str, tmp_path: Path) -> None:
    (tmp_path / "server.proto").write_text((ROOT / "server.proto").read_text())
    subprocess.run(["protoc", f"--{language}_out=.", "server.proto"], cwd=tmp_path, check=True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) > 1


def test_a_generated_stub_calls_the_server(server: Server, tmp_path: Path) -> None:
    protoc(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", "-I", ".", "server.proto")
    code = (
        "import grpc, server_pb2 as m, server_pb2_grpc as s\n"
        f"stub = s.ServerStub(grpc.insecure_channel('{server.address}'))\n"
        "print(stub.RunText(m.TextArgs(text='hi', model='echo')).data)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert ran.stdout.strip() == '"hi"'


def test_health_by_watch(start_server: Callable[..., Server]) -> None:
    server = start_server()
    request = schemas.message("health", "grpc.health.v1.HealthCheckRequest")
    response = schemas.message("health", "grpc.health.v1.HealthCheckResponse")
    with grpc.insecure_channel(server.address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", None, response.FromString)
        for name in ("", "TinyModelServer", "echo"):
            assert check(request(service=name).SerializeToString()).status == response.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(request(service="nobody").SerializeToString())
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", None, response.FromString)
        seen = watch(request(service="echo").SerializeToString())
        assert next(seen).status == response.SERVING
        unknown = watch(request(service="nobody").SerializeToString())
        assert next(unknown).status == response.SERVICE_UNKNOWN
        unknown.cancel()
        server.process.terminate()
        assert [answer.status for answer in seen] == [response.NOT_SERVING]
    assert server.process.wait(10) == 0


def test_many_watchers_take_no_threads_from_callers(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_THREADS=2)
    request = schemas.message("health", "grpc.health.v1.HealthCheckRequest")(service="echo").SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watches = [watch(request) for _ in range(100)]
        assert all(next(stream) for stream in watches)
        assert server.client("echo").run_text("x", timeout=5) == "x"
        for stream in watches:
            stream.cancel()
    wait_for(lambda: server.client("echo").health_check()["serving"], "health after the watchers left")
