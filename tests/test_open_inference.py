"""Open Inference Protocol v2: tritonclient in an environment of its own, and requests that no good client sends."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import Server
from tests.test_faults import write_model
from tests.test_package import environment
from tiny_model_server import wire

METHODS = wire.methods("open_inference", "inference.GRPCInferenceService")
Code = grpc.StatusCode


def call(server: Server, method: str, request: Any = None, **fields: Any) -> Any:
    described = METHODS[method]
    with grpc.insecure_channel(server.address) as channel:
        stub = channel.unary_unary(described.path, described.request.SerializeToString, described.response.FromString)
        return stub(described.request(**fields) if request is None else request, timeout=20)


def infer(server: Server, model: str, *inputs: dict[str, Any], **fields: Any) -> Any:
    return call(server, "ModelInfer", model_name=model, inputs=inputs, **fields)


def tensor(array: Any, datatype: str, **contents: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "input", "datatype": datatype, "shape": array.shape}
    return made | ({"contents": contents} if contents else {})


CLIENT = """
import asyncio, queue, sys
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

def tensors(*named, kind=triton):
    made = []
    for name, array in named:
        made.append(kind.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made

address = sys.argv[1]
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("echo")
assert client.get_server_metadata().name == "tiny-model-server"
assert client.get_model_metadata("declares").inputs[0].datatype == "UINT8"
assert client.get_model_config("declares").config.input[0].data_type == 2
for dtype in ("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64").split():
    array = np.arange(24).reshape(2, 4, 3).astype(dtype)
    answer = client.infer("echo", tensors(("image", array)), request_id="seven")
    assert answer.get_response().id == "seven"
    found = answer.as_numpy("output")
    assert found.dtype == array.dtype and (found == array).all(), dtype
text = np.array(["Grüße".encode()], object)
assert client.infer("echo", tensors(("text", text))).as_numpy("output")[0] == text[0]
two = client.infer("echo", tensors(("a", np.ones(3)), ("b", np.zeros((2, 2), "int32"))))
assert two.as_numpy("a").shape == (3,) and two.as_numpy("b").dtype == np.int32
one = client.infer("echo", tensors(("a", np.ones(3)), ("b", np.zeros(2))), outputs=[triton.InferRequestedOutput("b")])
assert one.as_numpy("a") is None and one.as_numpy("b").shape == (2,)
said = client.infer("echo", tensors(("text", text)), parameters={"n": 3, "deep": True, "word": "x"})
assert b'"n": 3' in said.as_numpy("output")[0] and b'"deep": true' in said.as_numpy("output")[0]
picture = np.array([open(sys.argv[2], "rb").read()], object)
assert b'"shape": [4, 8, 3]' in client.infer("describe", tensors(("image", picture))).as_numpy("output")[0]
rows = client.infer("rows", tensors(("x", np.arange(12, dtype="float32").reshape(4, 3))))
assert (rows.as_numpy("output") == np.arange(12, dtype="float32").reshape(4, 3) * 2).all()
try:
    client.infer("nobody", tensors(("x", np.ones(2))))
    raise SystemExit("no error")
except InferenceServerException as error:
    assert "NOT_FOUND" in error.status() and "there is no model" in error.message()
index = {model.name: model.state for model in client.get_model_repository_index().models}
assert index["echo"] == "READY"
client.unload_model("masks")
assert not client.is_model_ready("masks")
client.load_model("masks")
assert client.is_model_ready("masks")

answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)))
for number in range(5):
    client.async_stream_infer("echo", tensors(("x", np.full(2, number))))
client.async_stream_infer("nobody", tensors(("x", np.ones(2))))
for number in range(5):
    result, error = answers.get(timeout=10)
    assert error is None and result.as_numpy("output")[0] == number
result, error = answers.get(timeout=10)
assert "there is no model" in str(error)
client.stop_stream()

async def main():
    async with triton_aio.InferenceServerClient(address) as client:
        answer = await client.infer("echo", tensors(("x", np.ones(3)), kind=triton_aio))
        assert answer.as_numpy("output").tolist() == [1, 1, 1]
asyncio.run(main())
"""
ROWS = (
    "    metadata = {'batch': True, 'inputs': [{'name': 'x', 'dtype': 'float32', 'shape': [3]}]}\n"
    "    def run(self, data, args):\n        return self.run_batch([data], args)[0]\n"
    "    def run_batch(self, items, args):\n        return [item * 2 for item in items]"
)


@pytest.mark.timeout(200)
def test_tritonclient(start_server: Callable[..., Server], tmp_path: Path) -> None:
    import cv2

    from tests.conftest import MODELS

    models = tmp_path / "models"
    models.mkdir()
    for name in ("echo", "declares", "describe", "masks"):
        (models / name).symlink_to(MODELS / name)
    write_model(models, "rows", ROWS)
    server = start_server(models)
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((4, 8, 3), np.uint8))
    programs = environment(tmp_path / "venv", "tritonclient[grpc]==2.73.0")
    command = [programs / "python", "-c", CLIENT, server.address, tmp_path / "photo.png"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_typed_contents_are_answered_typed(server: Server) -> None:
    answer = infer(server, "echo", tensor(np.zeros((2, 2)), "FP32", fp32_contents=[1, 2, 3, 4]), id="x")
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape), list(output.contents.fp32_contents)) == ("FP32", [2, 2], [1, 2, 3, 4])
    assert not answer.raw_output_contents
    answer = infer(server, "echo", tensor(np.zeros(1), "BYTES", bytes_contents=["ü".encode()]))
    assert answer.outputs[0].contents.bytes_contents[0] == "ü".encode()
    half = np.array([1.5, -2], np.float16)
    answer = infer(server, "echo", tensor(half, "FP16"), raw_input_contents=[half.tobytes()])
    assert answer.raw_output_contents[0] == half.tobytes()
    brain = np.array([1.5], np.float32).view(np.uint32) >> 16
    answer = infer(server, "echo", tensor(brain, "BF16"), raw_input_contents=[brain.astype(np.uint16).tobytes()])
    assert answer.raw_output_contents[0] == np.array([1.5], np.float32).tobytes()


@pytest.mark.parametrize(
    ("inputs", "fields", "message"),
    [
        ([], {}, "has no inputs"),
        ([tensor(np.zeros(2), "FP31", fp32_contents=[1, 2])], {}, "datatype 'FP31' is none of BOOL"),
        ([tensor(np.zeros(3), "FP32", fp32_contents=[1, 2])], {}, r"shape \[3\] has 3 elements, but there are 2"),
        ([tensor(np.zeros(2), "FP32")], {"raw_input_contents": [b"123"]}, "input 'input'"),
        ([tensor(np.zeros(2), "FP32")], {"raw_input_contents": [b"", b""]}, "there are 1 inputs, but"),
        (
            [tensor(np.zeros(1), "FP32", fp32_contents=[1])],
            {"raw_input_contents": [b"1234"]},
            "send one of both",
        ),
        ([tensor(np.zeros(1), "FP16", fp32_contents=[1])], {}, "travels only in raw_input_contents"),
        ([tensor(np.zeros(1), "BYTES")], {"raw_input_contents": [struct.pack("<I", 9) + b"x"]}, "cut off"),
        ([tensor(np.zeros(2), "UINT8", uint_contents=[1, 300])], {}, "300"),
        ([{"name": "x", "datatype": "FP32", "shape": [-1]}], {"raw_input_contents": [b"1234"]}, "negative"),
        ([{"name": "x", "datatype": "FP32", "shape": [1 << 40, 1 << 40]}], {"raw_input_contents": [b"1"]}, "input 'x'"),
        ([tensor(np.zeros(1), "INT8", int_contents=[1])] * 2, {}, "two inputs 'input'"),
        (
            [tensor(np.zeros(1), "INT8", int_contents=[1])],
            {"outputs": [{"name": "other"}]},
            "there is no output 'other'; there are output",
        ),
    ],
)
def test_malformed_requests(server: Server, inputs: list[Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        infer(server, "echo", *inputs, **fields)
    assert caught.value.code() is Code.INVALID_ARGUMENT


def test_statuses(start_server: Callable[..., Server], tmp_path: Path) -> None:
    write_model(tmp_path, "rows", ROWS)
    server = start_server(tmp_path)
    three = np.zeros((2, 4), np.float32)
    for model, status in [("nobody", Code.NOT_FOUND), ("rows", Code.OK)]:
        for method in ("ModelReady", "ModelMetadata", "ModelConfig"):
            try:
                call(server, method, name=model)
                code = Code.OK
            except grpc.RpcError as error:
                code = error.code()
            assert code is status
    with pytest.raises(grpc.RpcError, match="the first dimension counts the rows"):
        infer(server, "rows", tensor(np.float32(1), "FP32", fp32_contents=[1]))
    call(server, "RepositoryModelUnload", repository_name="rows")  # as KServe's client fills it
    assert call(server, "ModelReady", name="rows").ready is False
    with pytest.raises(grpc.RpcError) as caught:
        infer(server, "rows", tensor(three, "FP32", fp32_contents=[0] * 8))
    assert caught.value.code() is Code.FAILED_PRECONDITION
    assert call(server, "RepositoryModelLoad", model_name="rows").is_loaded
    assert [model.name for model in call(server, "RepositoryIndex", ready=True).models] == ["rows"]


@given(
    datatype=st.sampled_from(["BOOL", "INT8", "UINT64", "FP16", "FP32", "BYTES", "BF16", "", "x"]),
    shape=st.lists(st.integers(-2, 1 << 62), max_size=4),
    raw=st.lists(st.binary(max_size=40), max_size=3),
    kind=st.text(max_size=12),
)
@example(datatype="BOOL", shape=[0, 1 << 21, 1 << 21, 1 << 21], raw=[], kind="")
def test_no_request_harms_the_server(
    server: Server, datatype: str, shape: list[int], raw: list[bytes], kind: str
) -> None:
    parameters = {"content_type": {"string_param": kind}}
    one = {"name": "input", "datatype": datatype, "shape": shape, "parameters": parameters}
    try:
        infer(server, "echo", one, raw_input_contents=raw)
    except grpc.RpcError as error:
        assert error.code() is Code.INVALID_ARGUMENT, error.details()


def test_a_closed_door(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_DOORS="native")
    with pytest.raises(grpc.RpcError) as caught:
        call(server, "ServerLive")
    assert caught.value.code() is Code.UNIMPLEMENTED
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
    ran = subprocess.run(
        [sys.executable, "server.py"], env={"TMS_DOORS": "native,back"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "TMS_DOORS names back; there are native, open_inference" in ran.stderr
