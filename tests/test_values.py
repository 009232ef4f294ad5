"""Values on their way: each arrives equal, or the call fails and says what to do."""

import enum
import http.client
import json
import math
import struct
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import cv2
import grpc
import numpy as np
import pytest
import scipy.sparse

import model_client
from tests.conftest import Server
from tests.test_faults import write_model
from tiny_model_server import codec, custom_metrics, schemas
from tiny_model_server.codec import EncodedImage
from tiny_model_server.errors import InvalidInput

StartServer = Callable[..., Server]


class Label(str, enum.Enum):  # noqa: UP042 (the kind that str() changes)
    CAT = "cat"


class Level(enum.IntEnum):
    HIGH = 3


class Colour(enum.Enum):
    RED = 1


class Celsius(float):
    def __str__(self) -> str:
        return "warm"


@dataclass
class Box:
    left: int
    parts: Any = None


Point = namedtuple("Point", "x y")

EQUAL = [
    (Label.CAT, "cat"),
    (Level.HIGH, 3),
    (Celsius(2.5), 2.5),
    (np.str_("grün"), "grün"),
    (np.bytes_(b"\0a"), b"\0a"),
    (np.float32(0.1), float(np.float32(0.1))),
    (np.bool_(True), True),
    (np.longdouble(0.5), 0.5),
    (2**70, 2**70),
    (-0.0, -0.0),
    (1e-320, 1e-320),
    ("\ud83d", "\ud83d"),
    ({"\ud83d": 1}, {"\ud83d": 1}),
    ("a\0", "a\0"),
    (Point(1, [2]), [1, [2]]),
    ((), []),
    (OrderedDict(a=1), {"a": 1}),
    ({Label.CAT: 1, "größe": 2}, {"cat": 1, "größe": 2}),
    ({1: "a", None: "b", False: "c", 2.5: "d"}, {"1": "a", "null": "b", "false": "c", "2.5": "d"}),
    ({"$array": 0, "$x": {"$float": "nan"}}, {"$array": 0, "$x": {"$float": "nan"}}),
    (bytearray(b"abc"), b"abc"),
    pytest.param(memoryview(b"abcdef")[::2], b"ace", id="a strided view"),
    (b"", b""),
    (Colour.RED, 1),
    ({Colour.RED: 1, date(2020, 1, 2): 2}, {"1": 1, "2020-01-02": 2}),
    ({3, 1, 2}, [1, 2, 3]),
    pytest.param(frozenset(["b", "a"]), ["a", "b"], id="frozenset"),  # whose order differs from process to process
    (range(3, 0, -1), [3, 2, 1]),
    (deque([1, 2]), [1, 2]),
    (pytest.param({"a": 1}.keys(), ["a"], id="keys")),
    (date(2020, 1, 2), "2020-01-02"),
    (datetime(2020, 1, 2, 3, 4, tzinfo=UTC), "2020-01-02T03:04:00+00:00"),
    (clock(3, 4, 5), "03:04:05"),
    (timedelta(minutes=1, milliseconds=500), 60.5),
    (np.datetime64("2020-01-02T03:04"), "2020-01-02T03:04"),
    (np.datetime64("NaT"), None),
    (np.timedelta64(1500, "ms"), 1.5),
    (Decimal("0.10"), 0.1),
    (Decimal(2), 2.0),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Path("a") / "b", "a/b"),
    (Box(1, [2]), {"left": 1, "parts": [2]}),
    (pytest.param(np.array([1, "a", None], object), [1, "a", None], id="objects")),
    (pytest.param(np.array([None]), [None], id="None in an array")),
    (pytest.param(np.array(["a\0", "b"], object), ["a\0", "b"], id="NUL")),
]


@pytest.mark.parametrize(("value", "expected"), EQUAL, ids=lambda value: ascii(value)[:30])
def test_a_value_arrives_equal(server: Server, value: Any, expected: Any) -> None:
    for sent in (value, {"in": [value, 1]}):
        answer = server.client("echo").run(sent)
        found = answer["in"][0] if isinstance(answer, dict) and "in" in answer else answer
        assert found == expected
        assert type(found) is type(expected)
        assert str(found) == str(expected)  # in which -0.0 is not 0.0


ARRAYS = {
    "big-endian": np.arange(4, dtype=">i4"),
    "Fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "backwards": np.arange(6)[::-2],
    "broadcast": np.broadcast_to(np.float32(2), (2, 3)),
    "0-d": np.array(5, np.int16),
    "no rows": np.zeros((0, 3), np.uint8),
    "empty rows": np.zeros((3, 0), np.uint8),
    "NaT": np.array(["2020-01-01", "NaT"], "datetime64[s]"),
    "NaN": np.array([np.nan, np.inf, -np.inf, -0.0]),
    "complex": np.array([1 + 2j, complex(np.nan, 0)], np.complex64),
    "texts": np.array(["a", "grün", "\ud83d"]),
    "bytes": np.array([b"a\0b", b""]),
    "no mask": np.ma.masked_array([1.0, 2.0], mask=[False, False]),
    "object texts": np.array([["setosa", "virginica"]], object),
    "complex number": np.asarray(1j),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_arrives_equal(server: Server, kind: str) -> None:
    array = ARRAYS[kind]
    for answer in (server.client("echo").run(array), server.client("echo").run({"x": array})["x"]):
        assert answer.shape == array.shape
        assert answer.tolist() == array.tolist() or repr(answer.tolist()) == repr(array.tolist())
        assert answer.dtype.kind == ("U" if array.dtype.kind == "O" else array.dtype.kind)


REFUSED = [
    (np.ma.masked_array([1.0, -9999.0], mask=[False, True]), r"masked array at the top: send array\.filled"),
    (np.ma.masked, "masked array"),
    ({"a": np.ma.masked_array([1], mask=[True])}, r"masked array at \.a: send array\.filled\(VALUE\)"),
    ((x for x in ()), r"generator at the top: send list\(value\)"),
    ({"a": [map(str, [])]}, r"map at \.a\[0\]: send list\(value\)"),
    (print, "a dict of its parts"),
    (lambda: 1, "function at the top: call it"),
    (scipy.sparse.csr_array(np.eye(2)), r"csr_array at the top: send value\.toarray\(\)"),
    (scipy.sparse.coo_matrix(np.eye(2)), r"value\.toarray\(\)"),
    (range(10**8), r"np\.arange"),
    (range(10**30), "range of more than 1048576 numbers at the top: send np.arange"),
    (Decimal("0.12345678901234567890"), r"Decimal with more digits than a float.*str\(value\)"),
    (Decimal("sNaN"), "Decimal at the top: to convert it raised ValueError"),
    (np.timedelta64(1, "M"), "timedelta64 at the top: to convert it raised TypeError"),
    (np.zeros(2, "V3"), "an array of dtype"),
    ({1: "a", "1": "b"}, "keys that become the same text"),
    ({"x": {True: 1, "true": 2}}, r"same text at \.x"),
    ({None: 1, "null": 2}, "use texts as keys"),
    ({(1, 2): 3}, "a key of type tuple"),
    (np.longdouble(1) / 3, r"more digits than a float.*float\(value\)"),
    (np.array([object()]), r"object at \[0\]"),
    (np.zeros(2, np.longdouble), r"astype\(np\.float64\)"),
    (memoryview(np.arange(3)), r"np\.asarray\(view\)"),
    ("\ud83d\ude00", "both halves of a surrogate pair"),
    (10**5000, "cannot serialize the value"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=lambda value: type(value).__name__)
def test_what_would_change_is_refused(server: Server, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        server.client("echo").run(value)


def test_one_long_text_does_not_widen_an_array_of_many() -> None:
    texts = np.array(["x" * 1_000_000, *["y"] * 1000], object)
    encoded = codec.encode(texts)
    assert encoded.arrays == []
    assert codec.decode(encoded) == texts.tolist()


def test_a_long_key_is_not_copied_for_each_member() -> None:
    value = {"k" * 1_000_000: {str(index): None for index in range(20_000)}}
    assert codec.decode(codec.encode(value)) == value  # 20 GB if it were


ANSWERS = """
    def run(self, data, args):
        import enum, numpy as np
        class Label(str, enum.Enum):
            CAT = "cat"
        return {
            "label": {"label": Label.CAT, Label.CAT: 1},
            "masked": np.ma.masked_array([1.0, -9999.0], mask=[False, True]),
            "all masked": np.ma.masked_array([1.0], mask=[True]).mean(),
            "whole": np.ma.masked_array([1.0, 2.0], mask=False),
            "objects": np.array(["setosa", "virginica"], object),
            "keys": {1: "a", "1": "b"},
            "nan": {"score": float("nan"), "row": np.array([1, np.inf], np.float32), "z": np.array(0j)},
            "array": np.array([1, np.nan, -np.inf], np.float32),
        }[args["answer"]]
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = Server(write_model(tmp_path_factory.mktemp("models"), "answers", ANSWERS))
    yield server
    server.kill()


def test_answers_arrive_equal_or_fail(answers: Server) -> None:
    client = answers.client("answers")
    assert client.run(0, {"answer": "label"}) == {"label": "cat", "cat": 1}
    assert client.run(0, {"answer": "whole"}).tolist() == [1.0, 2.0]
    assert client.run(0, {"answer": "objects"}).tolist() == ["setosa", "virginica"]
    for answer, message in (("masked", r"\.filled\("), ("all masked", r"\.filled\("), ("keys", "the same text")):
        with pytest.raises(model_client.ModelFailed, match=message):
            client.run(0, {"answer": answer})
    found = client.run(0, {"answer": "nan"})
    assert math.isnan(found["score"])
    assert found["row"].tolist() == [1, math.inf]


def post(server: Server, path: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    """The status and the answer, which is JSON as the standard has it: without NaN and Infinity."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    found = json.loads(answer.read(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    connection.close()
    return answer.status, found


def test_json_has_null_for_numbers_that_it_lacks(answers: Server) -> None:
    form = "application/x-www-form-urlencoded"
    found = post(answers, "/models/answers/run", b'data=0&args={"answer":"nan"}', form)
    assert found == (200, {"score": None, "row": [1, None], "z": [0, 0]})
    assert post(answers, "/models/answers/run", b'data=0&args={"answer":"array"}', form) == (200, [1, None, None])
    one = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    for answer, data in (("array", [1, None, None]), ("nan", ['{"score": null, "row": [1.0, null], "z": [0.0, 0.0]}'])):
        request = json.dumps({"inputs": [one], "parameters": {"answer": answer}}).encode()
        status, found = post(answers, "/v2/models/answers/infer", request)
        assert status == 200
        assert found["outputs"][0]["data"] == data
    methods = schemas.methods("server", "server.Server")
    text = methods["RunText"]
    with grpc.insecure_channel(answers.address) as channel:  # an old client, which knows no arrays
        call = channel.unary_unary(text.path, text.request.SerializeToString, text.response.FromString)
        old = call(text.request(model="answers", text="x", args='{"answer": "array"}'), timeout=20)
    assert old.data == "[1.0, null, null]"


@pytest.mark.parametrize("literal", ["NaN", "-Infinity", "[1, Infinity]", '{"a": NaN}'])
def test_json_with_numbers_that_it_lacks_is_refused(server: Server, literal: str) -> None:
    status, answer = post(server, "/models/echo/run", literal.encode())
    assert (status, answer["status"]) == (400, "INVALID_ARGUMENT")
    assert '{"$float": "nan"}' in answer["error"]
    run = schemas.methods("server", "server.Server")["Run"]
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(run.path, run.request.SerializeToString, run.response.FromString)
        for fields in ({"data": {"json": literal}}, {"data": {"json": "1"}, "args": f'{{"a": {literal}}}'}):
            with pytest.raises(grpc.RpcError, match="is not JSON; send null, or") as caught:
                call(run.request(model="echo", **fields), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_args_arrive_equal_or_fail(server: Server) -> None:
    client = server.client("echo")
    args = {"inf": math.inf, "deep": [{"x": -math.inf}], "$own": {"$float": "nan"}, "n": None, "label": Label.CAT}
    assert client.run_text("x", args)["args"] == args | {"label": "cat"}
    scalars = {"id": UUID(int=1), "day": date(2020, 1, 2), "path": Path("a"), "colour": Colour.RED, "set": {2, 1}}
    found = {"id": str(UUID(int=1)), "day": "2020-01-02", "path": "a", "colour": 1, "set": [1, 2]}
    assert client.run_text("x", scalars)["args"] == found
    assert math.isnan(client.run_text("x", {"nan": math.nan})["args"]["nan"])
    assert client.run_text("x", {"row": np.array([1.5, np.inf])})["args"] == {"row": [1.5, math.inf]}
    for wrong, message in (
        ({"a": b"x"}, r"bytes of dtype uint8 in args at \.a"),
        ({"a": 1j}, "complex128 in args at .a"),
        ({"a": (x for x in ())}, "cannot serialize generator at .a"),
        ({1: 2, "1": 3}, "the same text"),
        ({"a": np.array([1j])}, "complex128 in args"),
    ):
        with pytest.raises(TypeError, match=message):
            client.run_text("x", wrong)  # type: ignore[arg-type]


def file_of(ending: str, params: tuple[int, ...] = ()) -> bytes:
    return cv2.imencode(ending, np.zeros((5, 7, 3), np.uint8), params)[1].tobytes()


GIF = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
SNIFFED = [
    (file_of(".png"), True),
    (file_of(".jpg"), True),
    (file_of(".bmp"), True),
    (file_of(".webp"), True),
    (file_of(".tiff"), True),
    (b"MM\0*\0\0\0\x08" + b"\0" * 9, True),
    (GIF, True),
    (GIF.replace(b"89a", b"87a"), True),
    (b"BMW is a maker of cars", False),
    (b"BM", False),
    (b"BM\xff\xfe" + b"\0" * 30, False),
    (b"GIF89a is a format of images, and GIF87a another", False),
    (b"GIF89a", False),
    (b"RIFF-raff", False),
    (b"RIFF\x04\0\0\0WAVE", False),
    (b"RIFF+or+WEBP", False),
    (b"\x89PNG", False),
    (b"II*\0", False),
    (b"II*\0\xff\xff\xff\xff", False),
    ("Grüße".encode(), False),
    (b"", False),
    (b"\xff\xd8", False),
    (b"\xff\xfe\0", False),
    (b"\0\0text with NULs", False),
]


@pytest.mark.parametrize(("data", "is_image"), SNIFFED, ids=lambda value: ascii(value)[:24])
def test_only_whole_signatures_make_an_image(data: bytes, is_image: bool) -> None:
    found = codec.from_bytes(data)
    assert isinstance(found, EncodedImage) == is_image
    assert (found if isinstance(found, bytes) else found.encode()) == data
    assert isinstance(codec.from_bytes(data, "image/png"), EncodedImage)
    assert type(codec.from_bytes(data, "bytes")) is bytes


def test_a_text_that_begins_as_a_file_does_is_a_text(server: Server) -> None:
    infer = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelInfer"]
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(infer.path, infer.request.SerializeToString, infer.response.FromString)
        one = {"name": "x", "datatype": "BYTES", "shape": [1]}
        raw = struct.pack("<I", 3) + b"BMW"
        answer = call(infer.request(model_name="echo", inputs=[one], raw_input_contents=[raw]), timeout=20)
    assert answer.raw_output_contents[0] == raw


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_metrics_take_finite_numbers(number: float) -> None:
    for add in (custom_metrics.count, custom_metrics.observe):
        with pytest.raises(ValueError, match="finite number"):
            add("some", number)
    with pytest.raises(TypeError, match="takes a number"):
        custom_metrics.count("some", "3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        custom_metrics.count("some", -1)
    custom_metrics.count("some", np.float32(2))
    custom_metrics.observe("other", np.int64(2))
    assert custom_metrics.drain() == ({"some": 2.0}, {"other": [2.0]})


def test_references_are_checked_without_making_values() -> None:
    class Shared:
        nbytes = 1 << 30

    codec.check('{"a": {"$array": 0}, "b": {"$dict": {"$x": [{"$float": "inf"}]}}}', [Shared()])
    for text, message in (
        ('[{"$bytes": 0}, {"$bytes": 0}, {"$bytes": 0}]', "refers 3 times to 1 arrays"),
        ('{"\\u0024bytes": 1}', "refers to none"),
        ('{"$float": ["nan"]}', "must be one of"),
        ('{"a": 1, "$b": 2}', "unknown reference"),
    ):
        with pytest.raises(InvalidInput, match=message):
            codec.check(text, [Shared()])
