"""One suite over every protocol: the same scenarios, and answers that belong together."""

import json
import pickle
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Server, wait_for
from tests.test_faults import write_model
from tiny_model_server import schemas
from tiny_model_server.server.grpc_server import PROTOCOLS

PROBE = """
    metadata = {'batch': True}
    timeout_s = 1.5
    queue_size = 4
    def run(self, data, args):
        import time
        import numpy as np
        from model_interface import InvalidInput
        if isinstance(data, np.ndarray):
            return {'sum': int(data.sum()), 'shape': 'x'.join(map(str, data.shape))}
        word, _, seconds = data.partition(' ')
        if word == 'bad':
            raise InvalidInput('this is bad')
        if word == 'boom':
            raise RuntimeError('boom')
        time.sleep(float(seconds or 0))
        return {'text': data.upper()}
"""
PIXELS = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)


class Refused(Exception):
    """A call that was answered with an error: its gRPC status, or the code that stands for it."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Protocol:
    """How one protocol is called; ``run`` gives one answer an input."""

    statuses: dict[str, str] = {}
    timeout = 20.0
    loads = False  # True if a call loads a model that is not loaded

    def __init__(self, server: Server) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)])

    def call(self, schema: str, service: str, called: str, **fields: Any) -> Any:
        found = schemas.methods(schema, service)[called]
        stub = self.channel.unary_unary(found.path, found.request.SerializeToString, found.response.FromString)
        try:
            return stub(found.request(**fields), timeout=self.timeout, metadata=self.metadata())
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from None

    def metadata(self) -> list[tuple[str, str]]:
        return []

    def expected(self, status: str) -> str:
        return self.statuses.get(status, status)

    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        raise NotImplementedError

    def ready(self) -> bool:
        raise NotImplementedError


class Native(Protocol):
    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        if isinstance(inputs[0], str):
            fields: dict[str, Any] = {"texts": inputs}
        else:
            shapes = [dict(zip(("height", "width", "channels"), one.shape, strict=True)) for one in inputs]
            fields = {"images": [{**shape, "data": one.tobytes()} for shape, one in zip(shapes, inputs, strict=True)]}
        method = "RunBatchText" if isinstance(inputs[0], str) else "RunBatchImage"
        answer = self.call("server", "server.Server", method, model=model, **fields)
        found: list[Any] = json.loads(answer.data)
        return found

    def ready(self) -> bool:
        with self.server.client("echo") as client:
            return client.health_check() == {"serving": [self.server.address], "stopped_serving": []}


class OpenInference(Protocol):
    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        if isinstance(inputs[0], str):
            tensor: dict[str, Any] = {"name": "x", "datatype": "BYTES", "shape": [len(inputs)]}
            tensor["contents"] = {"bytes_contents": [text.encode() for text in inputs]}
            fields: dict[str, Any] = {"inputs": [tensor]}
        else:
            stacked = np.stack(inputs)
            fields = {"inputs": [{"name": "x", "datatype": "UINT8", "shape": stacked.shape}]}
            fields["raw_input_contents"] = [stacked.tobytes()]
        answer = self.call("open_inference", "inference.GRPCInferenceService", "ModelInfer", model_name=model, **fields)
        columns = {}
        for index, output in enumerate(answer.outputs):
            kind = {"INT64": "int64_contents", "BYTES": "bytes_contents"}[output.datatype]
            if output.HasField("contents"):
                columns[output.name] = list(getattr(output.contents, kind))
            else:
                columns[output.name] = list(_elements(output.datatype, answer.raw_output_contents[index]))
        return _rows(columns)

    def ready(self) -> bool:
        return bool(self.call("open_inference", "inference.GRPCInferenceService", "ServerReady").ready)


class ModelMesh(OpenInference):
    """Inference as its sidecar passes it on: the model in the metadata, another name in the request."""

    def metadata(self) -> list[tuple[str, str]]:
        return [("mm-model-id", self.model)]

    model = "echo"

    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        self.model = model
        return super().run("the-name-of-the-service", inputs)


class Rest(Protocol):
    statuses = {
        "INVALID_ARGUMENT": "400",
        "NOT_FOUND": "404",
        "FAILED_PRECONDITION": "409",
        "RESOURCE_EXHAUSTED": "429",
        "INTERNAL": "500",
        "DEADLINE_EXCEEDED": "504",
    }

    def http(self, path: str, body: bytes | None = None, **headers: str) -> bytes:
        url = f"http://127.0.0.1:{self.server.http_port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
                read: bytes = answer.read()
                return read
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(str(error.code), json.loads(error.read())["error"]) from None

    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        binary = b""
        if isinstance(inputs[0], str):
            tensor = {"name": "x", "datatype": "BYTES", "shape": [len(inputs)], "data": inputs}
        else:
            binary = np.stack(inputs).tobytes()
            tensor = {"name": "x", "datatype": "UINT8", "shape": [len(inputs), *inputs[0].shape]}
            tensor["parameters"] = {"binary_data_size": len(binary)}
        header = json.dumps({"inputs": [tensor]}).encode()
        length = {"Inference-Header-Content-Length": str(len(header))}
        answer = json.loads(self.http(f"/v2/models/{model}/infer", header + binary, **length))
        return _rows({output["name"]: output["data"] for output in answer["outputs"]})

    def ready(self) -> bool:
        return bool(json.loads(self.http("/v2/health/ready"))["ready"])


class Modzy(Protocol):
    """One model; what is an error of the server elsewhere is the item's error here, in words."""

    statuses = {
        "INVALID_ARGUMENT": "422",
        "NOT_FOUND": "",
        "INTERNAL": "item",
        "DEADLINE_EXCEEDED": "item",
        "RESOURCE_EXHAUSTED": "500",
    }
    loads = True

    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        items = []
        for one in inputs:
            if isinstance(one, str):
                items.append({"input": {"input": one.encode()}})
            else:
                import cv2

                items.append({"input": {"input": cv2.imencode(".png", one[..., ::-1])[1].tobytes()}})
        answer = self.call("modzy", "ModzyModel", "Run", inputs=items)
        if answer.status_code != 200:
            raise Refused(str(answer.status_code), answer.message)
        for item in answer.outputs:
            if not item.success:
                raise Refused("item", item.output["error"].decode())
        return [json.loads(item.output["results.json"]) for item in answer.outputs]

    def ready(self) -> bool:
        return bool(self.call("modzy", "ModzyModel", "Status").status_code == 200)


class Nos(Protocol):
    loads = True

    def run(self, model: str, inputs: list[Any]) -> list[Any]:
        predict = {"model_name": model}
        if isinstance(inputs[0], str):
            return [self.predict(method="txt2vec", text_request={"text": one}, **predict) for one in inputs]
        data = pickle.dumps(list(inputs), protocol=4)
        found = self.predict(method="img2bbox", image_request={"image_bytes": data}, **predict)
        return _rows(found)

    def predict(self, **fields: Any) -> Any:
        return pickle.loads(self.call("nos", "nos.inference.InferenceService", "Predict", **fields).result)

    def ready(self) -> bool:
        return "echo" in self.call("nos", "nos.inference.InferenceService", "ListModels").models


KINDS = [Native, OpenInference, ModelMesh, Rest, Modzy, Nos]


def _elements(datatype: str, raw: bytes) -> Iterator[Any]:
    if datatype != "BYTES":
        yield from np.frombuffer(raw, np.int64).tolist()
        return
    while raw:
        size = int.from_bytes(raw[:4], "little")
        yield raw[4 : 4 + size]
        raw = raw[4 + size :]


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    plain = {name: [one.decode() if isinstance(one, bytes) else one for one in col] for name, col in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_model(tmp_path_factory.mktemp("models"), "probe", PROBE)
    write_model(folder, "echo", "    def run(self, data, args):\n        return data")
    server = Server(folder, TMS_PROTOCOLS=",".join(PROTOCOLS), TMS_MODZY_MODEL="probe")
    yield server
    server.kill()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def protocol(everything: Server, request: pytest.FixtureRequest) -> Iterator[Protocol]:
    made: Protocol = request.param(everything)
    yield made
    made.channel.close()


def refusal(protocol: Protocol, model: str, inputs: list[Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        protocol.run(model, inputs)
    return caught.value


def test_a_good_call(protocol: Protocol) -> None:
    assert protocol.run("probe", ["Grüße"]) == [{"text": "GRÜSSE"}]


def test_a_batch(protocol: Protocol) -> None:
    texts = [f"number {n / 1e6}" for n in range(4)]
    assert protocol.run("probe", texts) == [{"text": text.upper()} for text in texts]


def test_big_images(protocol: Protocol) -> None:
    images = [PIXELS, PIXELS // 2]
    assert protocol.run("probe", images) == [{"sum": int(image.sum()), "shape": "1080x1920x3"} for image in images]


def test_an_unknown_model(protocol: Protocol) -> None:
    if isinstance(protocol, Modzy):
        pytest.skip("this protocol names no model")
    refused = refusal(protocol, "nobody", ["x"])
    assert refused.status == protocol.expected("NOT_FOUND")
    assert "there is no model 'nobody'; there are: echo, probe" in refused.message


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("bad", "INVALID_ARGUMENT", "this is bad"),
        ("boom", "INTERNAL", "model 'probe' raised RuntimeError: boom"),
        ("sleep 30", "DEADLINE_EXCEEDED", "took longer than its timeout_s=1.5"),
    ],
)
def test_a_bad_input(protocol: Protocol, text: str, status: str, message: str) -> None:
    refused = refusal(protocol, "probe", [text])
    assert refused.status == protocol.expected(status)
    assert message in refused.message
    assert protocol.run("probe", ["good"]) == [{"text": "GOOD"}]


def test_an_unloaded_model(protocol: Protocol, everything: Server) -> None:
    with everything.client("probe") as client:
        client.unload_model()
        try:
            if protocol.loads:
                assert protocol.run("probe", ["x"]) == [{"text": "X"}]
            else:
                refused = refusal(protocol, "probe", ["x"])
                assert refused.status == protocol.expected("FAILED_PRECONDITION")
                assert "'probe' is not loaded" in refused.message
        finally:
            client.load_model()
    assert protocol.run("probe", ["x"]) == [{"text": "X"}]


def test_overload(protocol: Protocol, everything: Server) -> None:
    """One at work and four queued are what this model holds; the next is refused at once."""
    with everything.client("probe") as client:
        held = [client.submit_text(f"sleep 0.{n or 5}") for n in range(5)]
        wait_for(lambda: client.model_info()[0]["queue_depth"] == 4, "a full queue")
        started = time.monotonic()
        refused = refusal(protocol, "probe", ["x"])
        assert time.monotonic() - started < 0.5
        assert refused.status == protocol.expected("RESOURCE_EXHAUSTED")
        assert "queue" in refused.message
        assert [future.result() for future in held] == [{"text": f"SLEEP 0.{n or 5}"} for n in range(5)]
    assert protocol.run("probe", ["x"]) == [{"text": "X"}]


def test_the_callers_deadline(protocol: Protocol) -> None:
    if isinstance(protocol, Rest):
        pytest.skip("HTTP has no deadline; the server's own is 60 s")
    protocol.timeout = 0.3
    started = time.monotonic()
    # Caller and server watch the same deadline; the server's word for it may come just before the caller's own.
    words = {"DEADLINE_EXCEEDED", protocol.expected("DEADLINE_EXCEEDED")}
    assert refusal(protocol, "probe", ["sleep 1"]).status in words
    assert time.monotonic() - started < 0.8
    protocol.timeout = 20
    assert protocol.run("probe", ["x"]) == [{"text": "X"}]


def dropped(server: Server) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(r'tms_dropped_total\{model="probe"\} (\S+)', text)
    return float(found[1]) if found else 0.0


def test_a_caller_that_goes(protocol: Protocol, everything: Server) -> None:
    """What it asked for is not run, if it was not begun; the others do not notice."""
    if isinstance(protocol, Rest):
        pytest.skip("this protocol has no channel to close; test_http.py has a caller that goes")
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(protocol.run("probe", ["sleep 1"]))
        except (Refused, ValueError) as error:
            answers.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    with everything.client("probe") as client:
        for thread in asking:
            thread.start()
        wait_for(lambda: client.model_info()[0]["queue_depth"] == 1, "one at work, one queued")
        before = dropped(everything)
        protocol.channel.close()
        wait_for(lambda: dropped(everything) == before + 1, "the queued input to be dropped")
        for thread in asking:
            thread.join()
        assert client.run_text("good") == {"text": "GOOD"}
    assert all(isinstance(answer, Exception) for answer in answers)


def test_readiness(protocol: Protocol) -> None:
    assert protocol.ready()


def test_which_protocols_are_open(start_server: Callable[..., Server], everything: Server) -> None:
    assert any("protocols: native, open_inference, model_mesh, modzy, nos" in line for line in everything.log)
    server = start_server()
    for kind in (Modzy, Nos):
        protocol = kind(server)
        with pytest.raises(Refused, match="UNIMPLEMENTED"):
            protocol.ready()
        protocol.channel.close()
    closed = Rest(start_server(TMS_PROTOCOLS="native"))
    with pytest.raises(Refused, match="404"):
        closed.ready()
    closed.channel.close()


# Requests of all shapes to all protocols. What stops or unloads is left out, as is what would load from paths.
LEFT_OUT = {"StopServer", "Shutdown", "runtimeStatus", "UnloadModel", "RepositoryModelUnload", "DeleteModel"}
METHODS = {
    method.path: method
    for protocol in PROTOCOLS.values()
    for name, method in schemas.methods(protocol.SCHEMA, protocol.SERVICE).items()
    if name not in LEFT_OUT and not method.client_streaming
}
NAMES = st.sampled_from(["probe", "echo", "nobody", "", "../echo", "txt2vec", "img2vec"])


def value_of(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type:
        return message_of(field.message_type, depth + 1)
    if field.enum_type:
        return st.integers(-1, 30)
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return st.one_of(st.binary(max_size=40), st.just(pickle.dumps(np.zeros(2))))
        texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
        return st.one_of(NAMES, texts, st.sampled_from(["FP32", "BYTES", "uint8", '{"$array": 0}', "[1, NaN]"]))
    if kind == field.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return st.floats(width=32)
    bits = 32 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    whole = st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else st.integers(0, (1 << bits) - 1)
    return st.one_of(st.integers(0, 4), whole)


def message_of(descriptor: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Dictionaries of any of a message's fields, as protobuf's constructors take them."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if depth > 3 or field.name in ("workers", "num_replicas"):  # thousands of processes are no malformed request
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = (value_of(field.message_type.fields_by_name[part], depth) for part in ("key", "value"))
            fields[field.name] = st.dictionaries(key, value, max_size=2)
        elif field.is_repeated:
            fields[field.name] = st.lists(value_of(field, depth), max_size=3)
        elif not field.containing_oneof:
            fields[field.name] = value_of(field, depth)
        else:
            one = field.containing_oneof.fields[0]
            fields[one.name] = value_of(one, depth)
    return st.fixed_dictionaries({}, optional=fields)


ALLOWED = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}


@given(st.data())
def test_no_request_harms_any_protocol(everything: Server, data: st.DataObject) -> None:
    method = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    fields = data.draw(message_of(method.request.DESCRIPTOR))
    content = data.draw(st.one_of(st.just(method.request(**fields).SerializeToString()), st.binary(max_size=60)))
    with grpc.insecure_channel(everything.address) as channel:
        try:
            if method.server_streaming:
                list(channel.unary_stream(method.path)(content, timeout=20))
            else:
                channel.unary_unary(method.path)(content, timeout=20)
        except grpc.RpcError as error:
            # A model may raise on what it is sent, here on values that are neither text nor array.
            failed = error.code().name == "INTERNAL" and "model 'probe' raised" in error.details()
            assert failed or error.code().name in ALLOWED, error
        assert channel.unary_unary("/server.Server/ListModels")(b"", timeout=5)


JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(st.just("x"), JSONS),
        "datatype": st.one_of(st.sampled_from(["FP32", "INT8", "UINT64", "BOOL", "BYTES", "BF16"]), JSONS),
        "shape": st.one_of(st.lists(st.integers(-1, 1 << 62), max_size=3), st.just([2]), JSONS),
        "data": st.one_of(st.lists(st.integers(-300, 300), max_size=3), JSONS),
        "parameters": st.one_of(st.fixed_dictionaries({"binary_data_size": st.integers(-1, 50)}), JSONS),
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.one_of(st.lists(TENSORS, max_size=2), JSONS),
        "outputs": st.one_of(st.lists(TENSORS, max_size=2), JSONS),
        "parameters": JSONS,
        "id": JSONS,
    },
)


@given(
    model=st.sampled_from(["probe", "echo", "nobody", "%2e%2e", ""]),
    request=st.one_of(REQUESTS, JSONS),
    binary=st.binary(max_size=12),
    length=st.sampled_from([None, "-1", "x", "999999", "0", "2"]),
)
def test_no_body_harms_the_rest_form(everything: Server, model: str, request: Any, binary: bytes, length: Any) -> None:
    header = json.dumps(request).encode()
    protocol = Rest(everything)
    headers = {"Inference-Header-Content-Length": length or str(len(header))}
    try:
        protocol.http(f"/v2/models/{model}/infer", header + binary, **headers)
    except Refused as error:
        failed = error.status == "500" and "model 'probe' raised" in error.message
        assert failed or error.status in ("400", "404"), error
    assert protocol.ready()
    protocol.channel.close()
