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
from tests.test_clients import ROWS
from tests.test_faults import write_model
from tiny_model_server import schemas

METHODS = schemas.methods("open_inference", "inference.GRPCInferenceService")
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
        (
            [tensor(np.zeros(1), "FP16", fp32_contents=[1])],
            {},
            "input 'input': FP16 is sent as raw_input_contents only",
        ),
        ([tensor(np.zeros(1), "FP16", bytes_contents=[b"a"])], {}, "FP16 is sent as raw_input_contents only"),
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


def test_a_disabled_protocol(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_PROTOCOLS="native")
    with pytest.raises(grpc.RpcError) as caught:
        call(server, "ServerLive")
    assert caught.value.code() is Code.UNIMPLEMENTED
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
    ran = subprocess.run(
        [sys.executable, "server.py"], env={"TMS_PROTOCOLS": "native,back"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "TMS_PROTOCOLS names back; there are native, open_inference" in ran.stderr
