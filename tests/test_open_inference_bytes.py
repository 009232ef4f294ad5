"""Open Inference Protocol v2 as a table: datatypes x shapes x rows as inputs of their own or not x gRPC or REST."""

import http.client
import itertools
import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from tests.conftest import Server
from tests.test_faults import write_model
from tiny_model_server import schemas

INFER = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelInfer"]

# Describes what one input is: for a row of its own one answer each, else one of all.
DESCRIBES = """
    metadata = {batch}
    def run(self, data, args):
        import numpy as np
        def described(value):
            if isinstance(value, np.ndarray):
                return ["array", str(value.dtype), list(value.shape), value.ravel().tolist()]
            if isinstance(value, (list, tuple)):
                return [described(item) for item in value]
            if isinstance(value, dict):
                return {{key: described(item) for key, item in value.items()}}
            return [type(value).__name__, value.hex() if isinstance(value, bytes) else value]
        return described(data)
"""
ECHO = """
    metadata = {batch}
    def run(self, data, args):
        return data
"""


@pytest.fixture(scope="module")
def describer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    for name, batch in (("whole", {}), ("rows", {"batch": True})):
        write_model(folder, name, DESCRIBES.format(batch=batch))
        write_model(folder, f"echo_{name}", ECHO.format(batch=batch))
    server = Server(folder)
    yield server
    server.kill()


def png(width: int) -> bytes:
    return cv2.imencode(".png", np.full((2, width, 3), width, np.uint8))[1].tobytes()


def description_of(element: bytes) -> Any:
    """The model's description of one element of BYTES."""
    if element.startswith(b"\x89PNG"):
        width = int.from_bytes(element[16:20], "big")
        return ["array", "uint8", [2, width, 3], [width] * (2 * width * 3)]
    try:
        return ["str", element.decode()]
    except UnicodeDecodeError:
        return ["bytes", element.hex()]


def framed(elements: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def elements_of(raw: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def by_grpc(server: Server, model: str, tensor: dict[str, Any], raw: bytes | None, typed: Any = None) -> list[Any]:
    """The output's (datatype, shape, raw bytes or numbers)."""
    request = INFER.request(model_name=model, inputs=[tensor | ({"contents": typed} if typed else {})])
    if raw is not None:
        request.raw_input_contents.append(raw)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER.path, INFER.request.SerializeToString, INFER.response.FromString)
        answer = call(request, timeout=30)
    (output,) = answer.outputs
    if answer.raw_output_contents:
        return [output.datatype, list(output.shape), answer.raw_output_contents[0]]
    (contents,) = (value for _, value in output.contents.ListFields())
    return [output.datatype, list(output.shape), framed(contents) if output.datatype == "BYTES" else list(contents)]


def by_rest(server: Server, model: str, tensor: dict[str, Any], raw: bytes | None, data: Any = None) -> list[Any]:
    """The same by HTTP; with raw bytes, the output comes so too."""
    shown = {name: value for name, value in tensor.items() if name != "parameters"}
    parameters = {name: value["string_param"] for name, value in tensor.get("parameters", {}).items()}
    if raw is not None:
        parameters["binary_data_size"] = len(raw)
    else:
        shown["data"] = data
    asked = {"inputs": [shown | {"parameters": parameters}], "parameters": {"binary_data_output": raw is not None}}
    header = json.dumps(asked).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    headers = {"Inference-Header-Content-Length": str(len(header))}
    connection.request("POST", f"/v2/models/{model}/infer", header + (raw or b""), headers)
    answer = connection.getresponse()
    body, length = answer.read(), answer.headers.get("Inference-Header-Content-Length")
    connection.close()
    found = json.loads(body[: int(length)] if length else body)
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {found['error']}")
    (output,) = found["outputs"]
    data = body[int(length) :] if length else output["data"]
    return [output["datatype"], output["shape"], data]


def answered(output: Any) -> Any:
    """The JSON texts in a BYTES output, one a row."""
    datatype, shape, data = output
    assert datatype == "BYTES"
    texts = elements_of(data) if isinstance(data, bytes) else data
    assert shape == [len(texts)]
    return [json.loads(text) for text in texts]


ELEMENTS = {
    "texts": [b"one", "grün".encode(), b"", b"BMW"],
    "image files": [png(3), png(4), png(5), png(3)],
    "bytes": [b"\xff\xfe", b"\x80", b"\xff", b"\xfe\0"],
    "mixed": [b"text", png(3), b"\xff\xfe", b"other"],
}
SHAPES = [[1], [2], [4], [1, 1], [2, 1], [1, 2], [2, 2], [4, 1], []]


@pytest.mark.parametrize(("way", "kind"), list(itertools.product(["raw", "typed", "REST"], ELEMENTS)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", ["whole", "rows"])
def test_bytes(describer: Server, way: str, kind: str, shape: list[int], model: str) -> None:
    elements = ELEMENTS[kind][: math.prod(shape)]
    tensor = {"name": "x", "datatype": "BYTES", "shape": shape}

    def call() -> Any:
        if way == "REST":
            return by_rest(describer, model, tensor, framed(elements))
        if way == "raw":
            return by_grpc(describer, model, tensor, framed(elements))
        return by_grpc(describer, model, tensor, None, {"bytes_contents": elements})

    if model == "rows" and not shape:
        with pytest.raises((grpc.RpcError, RuntimeError), match="the first dimension counts the rows"):
            call()
        return

    def one_or_list(part: Sequence[bytes]) -> Any:
        return description_of(part[0]) if len(part) == 1 else [description_of(element) for element in part]

    each = len(elements) // shape[0] if model == "rows" else len(elements)
    expected = [one_or_list(elements[at : at + each]) for at in range(0, len(elements), each)]
    assert answered(call()) == expected


@pytest.mark.parametrize("model", ["whole", "rows"])
def test_texts_in_json(describer: Server, model: str) -> None:
    for shape, data in (([2], ["a", "grün"]), ([2, 1], [["a"], ["grün"]])):
        tensor = {"name": "x", "datatype": "BYTES", "shape": shape}
        found = answered(by_rest(describer, model, tensor, None, data))
        assert found == ([["str", "a"], ["str", "grün"]] if model == "rows" else [[["str", "a"], ["str", "grün"]]])
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1]}
    for data, message in (([1], "not all of its data are BYTES"), (["\ud83d"], "half of a surrogate pair")):
        with pytest.raises(RuntimeError, match=f"400: .*{message}"):
            by_rest(describer, model, tensor, None, data)
    assert answered(by_rest(describer, model, tensor | {"name": "\udc00"}, None, ["x"])) == [["str", "x"]]


@pytest.mark.parametrize("model", ["whole", "rows"])
@pytest.mark.parametrize("by", [by_grpc, by_rest])
def test_the_content_type_goes_before_what_the_bytes_look_like(describer: Server, by: Any, model: str) -> None:
    for kind, element, expected in (
        ("bytes", png(3), ["bytes", png(3).hex()]),
        ("bytes", b"text", ["bytes", b"text".hex()]),
        ("image/png", png(3), description_of(png(3))),
        ("str", b"text", ["str", "text"]),
    ):
        tensor = {"name": "x", "datatype": "BYTES", "shape": [2]}
        tensor["parameters"] = {"content_type": {"string_param": kind}}
        found = answered(by(describer, model, tensor, framed([element, element])))
        assert found == ([expected, expected] if model == "rows" else [[expected, expected]])
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": {"string_param": "str"}}}
    with pytest.raises((grpc.RpcError, RuntimeError), match="not UTF-8"):
        by(describer, model, tensor, framed([b"\xff"]))


@pytest.mark.parametrize("model", ["whole", "rows"])
@pytest.mark.parametrize("by", [by_grpc, by_rest])
def test_no_elements(describer: Server, by: Any, model: str) -> None:
    for datatype, shape in itertools.product(["BYTES", "FP32"], [[0], [0, 2], [2, 0]]):
        tensor = {"name": "x", "datatype": datatype, "shape": shape}
        if model == "rows":
            with pytest.raises((grpc.RpcError, RuntimeError), match="counts the rows|no elements"):
                by(describer, model, tensor, b"")
        else:
            expected = [] if datatype == "BYTES" else ["array", "float32", shape, []]
            assert answered(by(describer, model, tensor, b"")) == [expected]


NUMBERS: dict[str, tuple[str, list[Any], str]] = {
    "BOOL": ("bool", [True, False, True, True], "bool_contents"),
    "UINT8": ("uint8", [0, 255, 1, 7], "uint_contents"),
    "UINT16": ("uint16", [0, 65535, 1, 7], "uint_contents"),
    "UINT32": ("uint32", [0, 2**32 - 1, 1, 7], "uint_contents"),
    "UINT64": ("uint64", [0, 2**64 - 1, 2**53 + 1, 7], "uint64_contents"),
    "INT8": ("int8", [-128, 127, 1, 7], "int_contents"),
    "INT16": ("int16", [-(2**15), 2**15 - 1, 1, 7], "int_contents"),
    "INT32": ("int32", [-(2**31), 2**31 - 1, 1, 7], "int_contents"),
    "INT64": ("int64", [-(2**63), 2**63 - 1, 2**53 + 1, 7], "int64_contents"),
    "FP16": ("float16", [0.5, -2, 65504, 7], ""),
    "FP32": ("float32", [0.5, -2, 3e38, 7], "fp32_contents"),
    "FP64": ("float64", [0.5, -2, 1e300, 0.1], "fp64_contents"),
}


@pytest.mark.parametrize("datatype", NUMBERS)
@pytest.mark.parametrize("way", ["raw", "typed", "REST raw", "REST JSON"])
@pytest.mark.parametrize("model", ["whole", "rows"])
def test_numbers(describer: Server, datatype: str, way: str, model: str) -> None:
    name, numbers, field = NUMBERS[datatype]
    for shape in ([4], [2, 2], [4, 1], [1, 4], [1, 2, 2]):
        array = np.array(numbers, name).reshape(shape)
        tensor = {"name": "x", "datatype": datatype, "shape": shape}
        if way == "raw":
            found = by_grpc(describer, f"echo_{model}", tensor, array.tobytes())
        elif way == "typed" and field:
            found = by_grpc(describer, f"echo_{model}", tensor, None, {field: numbers})
        elif way == "typed":
            with pytest.raises(grpc.RpcError, match="FP16 is sent as raw_input_contents only"):
                by_grpc(describer, model, tensor, None, {"fp32_contents": numbers})
            return
        elif way == "REST raw":
            found = by_rest(describer, f"echo_{model}", tensor, array.tobytes())
        else:
            found = by_rest(describer, f"echo_{model}", tensor, None, array.tolist())
        assert found[1] == shape
        assert numbers_of(found) == array.ravel().tolist()


def numbers_of(output: list[Any]) -> list[Any]:
    """The numbers of an output, those included that are JSON as no datatype holds them all."""
    datatype, _, data = output
    if datatype == "BYTES":
        return [json.loads(text) for text in (elements_of(data) if isinstance(data, bytes) else data)]
    return np.frombuffer(data, NUMBERS[datatype][0]).tolist() if isinstance(data, bytes) else data


def test_brain_floats(describer: Server) -> None:
    values = np.array([[1.5, -2.0], [0.0, 256.0]], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for model in ("echo_whole", "echo_rows"):
        tensor = {"name": "x", "datatype": "BF16", "shape": [2, 2]}
        datatype, shape, found = by_grpc(describer, model, tensor, raw)
        assert (datatype, shape, found) == ("FP32", [2, 2], values.tobytes())


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [256]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("FP16", [1e6]),
        ("FP32", [1e39]),
        ("FP64", [10**400]),
        ("BOOL", [1]),
        ("INT32", [True]),
        ("INT32", [1.5]),
        ("FP32", ["1"]),
        ("FP32", [None]),
        ("FP32", [{"$float": "nan"}]),
    ],
)
def test_json_that_a_datatype_does_not_hold(describer: Server, datatype: str, data: list[Any]) -> None:
    tensor = {"name": "x", "datatype": datatype, "shape": [1]}
    with pytest.raises(RuntimeError, match=f"400: input 'x': not all of its data are {datatype}"):
        by_rest(describer, "whole", tensor, None, data)


def test_typed_numbers_that_a_datatype_does_not_hold(describer: Server) -> None:
    for datatype, contents in (("INT8", {"int_contents": [128]}), ("UINT16", {"uint_contents": [1 << 16]})):
        with pytest.raises(grpc.RpcError, match="out of bounds for u?int") as caught:
            by_grpc(describer, "whole", {"name": "x", "datatype": datatype, "shape": [1]}, None, contents)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


ANSWERS = """
    metadata = {"batch": True}
    def run(self, data, args):
        import numpy as np
        return {
            "mixed": [1, 0.5][data % 2],
            "large": [2**53 + 1, 0.5][data % 2],
            "huge": 2**70 + data,
            "nan": {"a": float("nan"), "b": data},
            "half": "\\ud83d",
            "labels": np.array(["a", "bb"][: 1 + data]),
            "labels2": np.array([["a", "bb"][data]], object),
        }[args["answer"]]
"""


def test_answers_to_rows_stay_equal(tmp_path: Path, start_server: Any) -> None:
    server = start_server(write_model(tmp_path, "answers", ANSWERS))

    def ask(answer: str) -> list[Any]:
        request = INFER.request(model_name="answers", inputs=[{"name": "x", "datatype": "UINT8", "shape": [2]}])
        request.raw_input_contents.append(b"\0\1")
        request.parameters["answer"].string_param = answer
        with grpc.insecure_channel(server.address) as channel:
            call = channel.unary_unary(INFER.path, INFER.request.SerializeToString, INFER.response.FromString)
            found = call(request, timeout=30)
        return [(one.datatype, raw) for one, raw in zip(found.outputs, found.raw_output_contents, strict=True)]

    assert ask("mixed") == [("FP64", np.array([1, 0.5]).tobytes())]
    assert ask("large") == [("BYTES", framed([b"9007199254740993", b"0.5"]))]
    assert ask("huge") == [("BYTES", framed([b"1180591620717411303424", b"1180591620717411303425"]))]
    assert ask("nan")[1] == ("INT64", np.array([0, 1]).tobytes())
    assert ask("labels") == [("BYTES", framed([b'["a"]', b'["a", "bb"]']))]
    assert ask("labels2") == [("BYTES", framed([b"a", b"bb"]))]
    with pytest.raises(grpc.RpcError, match="half of a surrogate pair") as caught:
        ask("half")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
