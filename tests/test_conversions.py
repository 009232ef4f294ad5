"""Values of other libraries: tensors, images, tables and models of data arrive as JSON values and arrays."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import PIL.Image
import pydantic
import pydantic.v1
import pytest

import model_client
from tests.conftest import ROOT, Server
from tests.test_faults import write_model
from tests.test_values import post
from tiny_model_server import codec

torch = pytest.importorskip("torch", reason="tensors are torch's", exc_type=ImportError)


@dataclass
class Found:
    label: str
    scores: Any
    children: list[Any] = field(default_factory=list)


class Request(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    day: date
    scores: Any
    inner: "Request | None" = None


class OldRequest(pydantic.v1.BaseModel):
    scores: Any
    inner: Any = None


class Foreign:
    """An array of another library, as JAX and TensorFlow have them."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self._array)


class Table:
    """As pyarrow has it, which is not here: an array by itself, without the names."""

    __module__ = "pyarrow.lib"
    column_names = ("n", "m")
    columns = (Foreign([1]), Foreign([2]))

    def __getitem__(self, name: str) -> Any:
        return self.columns[self.column_names.index(name)]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the names would be lost")


class OnlyDlpack:
    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def raster(mode: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 9).convert(mode)


ROWS = np.array([[1, 2], [3, 4]], np.float32)
TABLE = pd.DataFrame({"n": [1, 2], "text": ["a", "b"], "gap": pd.array([1, None], "Int64"), 3: [0.5, np.inf]})
ARRIVE = {
    "tensor": (torch.from_numpy(ROWS), ROWS),
    "gradient": (torch.tensor(ROWS, requires_grad=True) * 1, ROWS),
    "parameter": (torch.nn.Parameter(torch.tensor(ROWS)), ROWS),
    "view": (torch.tensor(ROWS).T, ROWS.T),
    "bfloat16": (torch.tensor(ROWS).bfloat16(), ROWS),
    "float8": (torch.tensor(ROWS).to(torch.float8_e4m3fn), ROWS),
    "conjugate": (torch.tensor([1 + 2j]).conj(), np.array([1 - 2j], np.complex64)),
    "integer": (torch.tensor(7), np.array(7)),
    "bool": (torch.tensor([True]), np.array([True])),
    "size": (torch.zeros(2, 3).shape, [2, 3]),
    "dtypes": ([ROWS.dtype, torch.zeros(1).dtype, torch.zeros(1).device], ["float32", "torch.float32", "cpu"]),
    "bfloat16 of numpy": (ROWS.astype(ml_dtypes.bfloat16), ROWS),
    "bfloat16 of JAX": (Foreign(ROWS.astype(ml_dtypes.bfloat16)), ROWS),
    "array": (Foreign(ROWS), ROWS),
    "texts of TensorFlow": (Foreign(np.array([b"a", b"bc"], object)), [b"a", b"bc"]),
    "dlpack": (OnlyDlpack(ROWS), ROWS),
    "RGB": (raster("RGB"), np.asarray(raster("RGB"))),
    "gray": (raster("L"), np.asarray(raster("L"))),
    "alpha": (raster("RGBA"), np.asarray(raster("RGBA"))),
    "palette": (raster("P"), np.asarray(raster("P").convert("RGB"))),
    "bits": (raster("1"), np.asarray(raster("1"))),
    "CMYK": (raster("CMYK"), np.asarray(raster("CMYK").convert("RGB"))),
    "table": (
        TABLE,
        {"n": np.array([1, 2]), "text": np.array(["a", "b"]), "gap": np.array([1, np.nan]), "3": TABLE[3].to_numpy()},
    ),
    "table of pyarrow": (Table(), {"n": np.array([1]), "m": np.array([2])}),
    "column": (TABLE["n"], np.array([1, 2])),
    "categories": (pd.Series(["x", "y", "x"], dtype="category"), np.array(["x", "y", "x"])),
    "gaps": (pd.Series(["x", None, 1, pd.NA, pd.NaT], dtype=object), ["x", None, 1, None, None]),
    "days": (pd.Series([date(2020, 1, 2)]), ["2020-01-02"]),
    "zone": (pd.Series(pd.to_datetime(["2020-01-02T03:00Z"])), ["2020-01-02T03:00:00+00:00"]),
    "moment": (pd.Timestamp("2020-01-02T03:04:05.000000006"), "2020-01-02T03:04:05.000000006"),
    "took": (pd.Timedelta(1500, "ms"), 1.5),
    "index": (pd.Index(["a", "b"]), np.array(["a", "b"])),
    "records": (np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), {"a": np.array([1], "i4"), "b": np.array([2.0])}),
    "texts of any length": (np.array(["a", "bc"], np.dtypes.StringDType()), np.array(["a", "bc"])),
    "dataclass": (
        Found("cat", torch.tensor(ROWS), [Found("ear", {2, 1})]),
        {"label": "cat", "scores": ROWS, "children": [{"label": "ear", "scores": [1, 2], "children": []}]},
    ),
    "pydantic": (
        Request(day=date(2020, 1, 2), scores=torch.tensor(ROWS), inner=Request(day=date(2020, 1, 3), scores=None)),
        {"day": "2020-01-02", "scores": ROWS, "inner": {"day": "2020-01-03", "scores": None, "inner": None}},
    ),
    "pydantic 1": (
        OldRequest(scores=ROWS, inner=OldRequest(scores=1)),
        {"scores": ROWS, "inner": {"scores": 1, "inner": None}},
    ),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return isinstance(found, np.ndarray) and found.dtype == expected.dtype and repr(found) == repr(expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return type(found) is list and len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


@pytest.mark.parametrize("kind", ARRIVE)
def test_the_client_sends_values_of_other_libraries(server: Server, kind: str) -> None:
    value, expected = ARRIVE[kind]
    client = server.client("echo")
    assert same(client.run(value), expected)
    assert same(client.run({"in": [value, 1]}), {"in": [expected, 1]})
    assert same(client.run_batch([value, [value]]), [expected, [expected]])


MODEL = """
    mix_shapes = True
    def run(self, data, args):
        from tests.test_conversions import ARRIVE
        import PIL.Image
        if args.get("image"):
            return PIL.Image.fromarray(data).transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        if args.get("stream"):
            return (value for value in [ARRIVE[data][0], [ARRIVE[data][0]]])
        return ARRIVE[data][0]

    def run_batch(self, items, args):
        import pandas, torch, pydantic
        if args.get("table"):
            return pandas.DataFrame({"a": items, "b": items})
        if args.get("model"):
            return pydantic.create_model("Two", a=int, b=int)(a=1, b=2)
        if args.get("rows"):
            return torch.arange(len(items))
        return [self.run(item, args) for item in items]
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_model(tmp_path_factory.mktemp("models"), "returns", MODEL), PYTHONPATH=str(ROOT))
    yield server
    server.kill()


def test_models_return_values_of_other_libraries(answers: Server) -> None:
    client = answers.client("returns", timeout=60)
    kinds = list(ARRIVE)
    for kind, found in zip(kinds, client.map(kinds), strict=True):
        assert same(found, ARRIVE[kind][1]), kind
    for kind, found in zip(kinds, client.run_batch(kinds), strict=True):
        assert same(found, ARRIVE[kind][1]), kind
    for kind in ("gradient", "table", "pydantic"):
        assert same(list(client.run_stream(kind, {"stream": 1})), [ARRIVE[kind][1], [ARRIVE[kind][1]]])


def test_http_gets_json_of_them(answers: Server) -> None:
    for kind, expected in (
        ("bfloat16", [[1, 2], [3, 4]]),
        ("table", {"n": [1, 2], "text": ["a", "b"], "gap": [1, None], "3": [0.5, None]}),
        ("pydantic 1", {"scores": [[1, 2], [3, 4]], "inner": {"scores": 1, "inner": None}}),
        ("zone", ["2020-01-02T03:00:00+00:00"]),
    ):
        assert post(answers, "/models/returns/run", f'"{kind}"'.encode()) == (200, expected)


def test_images_of_other_libraries(answers: Server) -> None:
    client = answers.client("returns")
    pixels = np.asarray(raster("RGB"))
    for image in (raster("RGB"), torch.tensor(pixels), raster("P").convert("RGB")):
        flipped = client.run_image_to_image(image, {"image": 1})
        assert np.array_equal(flipped, np.asarray(image)[:, ::-1])
    for image, (found,) in ((one, client.run_image_batch([one], {"image": 1})) for one in (raster("L"), raster("P"))):
        assert np.array_equal(found, np.asarray(image.convert("RGB") if image.mode == "P" else image)[:, ::-1])
    (found,) = client.map([raster("RGB")], {"image": 1})
    assert np.array_equal(found, pixels[:, ::-1])


def test_a_table_is_one_value_and_no_list_of_items(answers: Server) -> None:
    client = answers.client("returns")
    for whole in ("table", "model"):
        results = client.run_batch(["x", "y"], {whole: 1}, return_exceptions=True)
        assert all("must return a sequence: not" in str(result) for result in results)
    assert client.run_batch(["x", "y"], {"rows": 1}) == [0, 1]
    for table in (TABLE, OldRequest(scores=1)):
        with pytest.raises(TypeError, match="run_batch takes a list"):
            client.run_batch(table)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="map takes a list"):
            client.map(table)
    with pytest.raises(TypeError, match="for one image there is run_image"):
        client.run_image_batch(torch.zeros(4, 6, 3))
    assert len(client.run_image_batch(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), {"image": 1})) == 2


class Hostile:
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise SystemExit("no")


class Rude:
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("weights are not there")


class NoPath:
    def __fspath__(self) -> Any:
        return 3


class Someday(date):
    def isoformat(self) -> str:
        raise KeyError("day")


class Unnamed:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Unbound:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("working outside of a request")


@dataclass
class Lazy:
    value: Any

    def __getattribute__(self, name: str) -> Any:
        raise OSError("it is on the disk")


class Validated(pydantic.BaseModel):
    value: int

    @pydantic.model_serializer
    def dump(self) -> Any:
        raise ValueError("not now")


FAIL = [
    (Rude(), r"Rude at \.a\[1\]: to convert it raised ValueError: weights are not there"),
    (NoPath(), r"NoPath at \.a\[1\]: to convert it raised TypeError"),
    (Someday(2020, 1, 2), r"Someday at \.a\[1\]: to convert it raised KeyError"),
    (Unnamed(), r"Unnamed at \.a\[1\]: send JSON values, numpy arrays, or a dict of its parts"),
    (Unbound(), r"Unbound at \.a\[1\]: send JSON values"),
    (Lazy(1), r"Lazy at \.a\[1\]: to convert it raised OSError"),
    (Validated(value=1), r"Validated at \.a\[1\]: to convert it raised PydanticSerializationError"),
    (torch.ones(2, 2).to_sparse(), r"Tensor at \.a\[1\]: .*to_dense\(\)"),
    (torch.ones(2, device="meta"), r"Tensor at \.a\[1\]: to convert it raised NotImplementedError"),
    (TABLE[["n", "n"]], r"two columns of one name at \.a\[1\]"),
    (Found("x", (one for one in [])), r"generator at \.a\[1\]\.scores: send list"),
    (Found, r"type at \.a\[1\]"),
    (range(1 << 70), r"a range of more than 1048576 numbers at \.a\[1\]: send np.arange"),
]


@pytest.mark.parametrize(("value", "message"), FAIL, ids=lambda value: type(value).__name__)
def test_what_cannot_be_converted_says_where_it_is(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"cannot serialize .*{message}"):
        codec.encode({"a": [0, value]})


def test_what_contains_itself_is_refused() -> None:
    itself = Found("x", None)
    itself.children.append(itself)
    array = np.array([None])
    array[0] = array
    for value in (itself, array):
        with pytest.raises(TypeError, match="nested too deeply, or contains itself"):
            codec.encode(value)


def test_a_model_that_ends_the_process_while_it_is_converted_fails_alone(tmp_path: Any) -> None:
    code = """
        def run(self, data, args):
            from tests.test_conversions import Hostile
            return Hostile() if data == "hostile" else data
    """
    server = Server(write_model(tmp_path, "hostile", code), PYTHONPATH=str(ROOT))
    try:
        client = server.client("hostile", timeout=60)
        pids = client.model_info()[0]["worker_pids"]
        with pytest.raises(model_client.ModelFailed, match="cannot be encoded: SystemExit|no"):
            client.run("hostile")
        assert client.run("next") == "next"
        assert client.model_info()[0]["worker_pids"] == pids
    finally:
        server.kill()


def test_nothing_is_imported_to_look_at_a_value() -> None:
    code = (
        "import sys, dataclasses, datetime, enum, pathlib, uuid\n"
        "from tiny_model_server import codec\n"
        "class Colour(enum.Enum): RED = 1\n"
        "codec.encode([Colour.RED, {1}, uuid.UUID(int=1), datetime.date(2020, 1, 1), pathlib.Path('x'), 1j])\n"
        "print(sorted({'torch', 'pandas', 'PIL', 'pydantic', 'scipy', 'ml_dtypes', 'decimal'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
