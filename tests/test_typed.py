"""Typed models: what the annotations of ``run`` check, what the model gets, and what callers can read of it."""

import dataclasses
import enum
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

import numpy as np
import pydantic
import pytest
from numpy.typing import NDArray

from model_client import InvalidInput, ModelFailed
from model_interface import InvalidInput as Refused
from model_interface import ModelInterface
from tests.conftest import ROOT, Server
from tests.test_workers import own_interpreter
from tiny_model_server.engine.annotations import types_of

MODELS = {
    "boxes": """
        from dataclasses import dataclass, field
        from enum import Enum
        from typing import Literal, Optional, Union

        class Colour(Enum):
            RED = "red"
            BLUE = "blue"

        @dataclass
        class Box:
            width: float
            inner: "list[Box]" = field(default_factory=list)

        @dataclass
        class Request:
            boxes: list[Box]
            colour: Colour = Colour.RED
            mode: Literal["fast", "good"] = "fast"
            name: Optional[str] = None
            either: Union[int, Box] = 3

            def __post_init__(self):
                if len(self.boxes) > 3:
                    raise ValueError("at most 3 boxes")

        @dataclass
        class Options:
            top: int = 5

        class Model(ModelInterface):
            example = {"boxes": [{"width": 1}]}

            def run(self, data: Request, args: Options) -> list[Box]:
                return [type(data).__name__, len(data.boxes), data.colour.name, args.top]
    """,
    "validated": """
        from pydantic import BaseModel, Field, field_validator

        class Box(BaseModel):
            width: float = Field(gt=0)

        class Request(BaseModel):
            boxes: list[Box]

            @field_validator("boxes")
            @classmethod
            def few(cls, boxes):
                if len(boxes) == 7:
                    raise RuntimeError("seven")
                assert len(boxes) < 5, "too many"
                return boxes

        class Options(BaseModel):
            top: int = 5

        class Answer(BaseModel):
            total: float

        class Model(ModelInterface):
            example = {"boxes": []}

            def run(self, data: Request, args: Options) -> Answer:
                return {"total": sum(box.width for box in data.boxes) + args.top}
    """,
    "version1": """
        from typing import Any
        from pydantic.v1 import BaseModel

        class Request(BaseModel):
            width: float

        class Model(ModelInterface):
            def run(self, data: Request, args: Any):
                return [type(data).__name__, data.width]
    """,
    "batch": """
        from typing import TypedDict

        class Item(TypedDict):
            text: str

        class Options(TypedDict, total=False):
            upper: bool

        class Model(ModelInterface):
            max_wait_ms = 200

            def run(self, data, args):
                return "alone"

            def run_batch(self, items: list[Item], args: Options):
                return [[item["text"], len(items), args] for item in items]
    """,
    "image": """
        from typing import Annotated, Any

        class Model(ModelInterface):
            def run(self, image: Annotated[np.ndarray, np.uint8, (None, None, 3)], args: dict[str, Any]) -> np.ndarray:
                return image.shape
    """,
    "two_arrays": """
        from typing import Annotated, TypedDict
        from numpy.typing import NDArray

        class Pair(TypedDict):
            left: Annotated[NDArray[np.float32], (None,)]
            right: Annotated[NDArray[np.int64], (2, None)]

        class Model(ModelInterface):
            def run(self, data: Pair, args) -> NDArray[np.float32]:
                return data["left"] * data["right"].sum()
    """,
    "text": """
        class Model(ModelInterface):
            def run(self, data: str, args: dict) -> str:
                return data.upper()
    """,
    "odd": """
        from dataclasses import dataclass, field
        from typing import Literal, Optional

        def fails():
            raise KeyError("name")

        def leaves():
            raise SystemExit(3)

        @dataclass
        class Request:
            kind: Literal["key", "exit", "value", "fine"]
            other: dict = field(default_factory=dict)

            def __post_init__(self):
                {"key": fails, "exit": leaves, "value": lambda: int("x"), "fine": dict}[self.kind]()

        class Model(ModelInterface):
            example = Request("fine")

            def run(self, data: Optional[Request], args):
                return [type(data).__name__, None if data is None else data.kind]
    """,
    "deep": """
        from typing import Literal, TypedDict, Union

        class Left(TypedDict):
            inner: "Union[Left, Right, None]"
            side: Literal["left"]

        class Right(TypedDict):
            inner: "Union[Left, Right, None]"
            side: Literal["right"]

        class Model(ModelInterface):
            def run(self, data: Union[Left, Right], args):
                return data["side"]
    """,
    "large": """
        from typing import Literal

        class Model(ModelInterface):
            def run(self, data: Literal[tuple(f"the value {number}" for number in range(30_000))], args):
                return data
    """,
    "unreadable": """
        from datetime import datetime

        class Strange(type):
            def __repr__(cls):
                raise RuntimeError("no text")

        class Model(ModelInterface):
            def run(self, data: [int], args: "1 / 0") -> "nothing at all":
                return [data, args]

            def run_batch(self, items: list[dict[int, Strange("Name", (), {})]], args: datetime):
                return [self.run(item, args) for item in items]
    """,
    "later": """
        from typing import AsyncIterator
        from pydantic import BaseModel

        class Request(BaseModel):
            count: int

        class Token(BaseModel):
            text: str

        class Model(ModelInterface):
            example = Request(count=1)

            async def run(self, data: Request, args: dict) -> AsyncIterator[Token]:
                for number in range(data.count):
                    yield Token(text=str(number))
    """,
    "prompted": """
        from typing import TypedDict
        from numpy.typing import NDArray

        class Request(TypedDict):
            prompt: str
            image: NDArray[np.float32]

        class Model(ModelInterface):
            def run(self, data: Request, args):
                return np.asarray(data["image"].mean() + len(data["prompt"]))
    """,
    "wrong_example": """
        class Model(ModelInterface):
            example = {"count": 1}

            def run(self, data: list[int], args):
                return data
    """,
    "untyped": """
        from __future__ import annotations
        from typing import TYPE_CHECKING, Any

        if TYPE_CHECKING:
            from nowhere import Nobody

        class Model(ModelInterface):
            def run(self, data: Nobody, args: dict[str, Any]) -> Nobody:
                return [type(data).__name__, args]
    """,
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    for name, text in MODELS.items():
        write(folder, name, text)
    server = Server(folder)
    yield server
    server.kill()


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    lines = [line[8:] for line in text.splitlines()]
    future = [line for line in lines if "__future__" in line]
    rest = [line for line in lines if line not in future]
    text = "\n".join([*future, "import numpy as np", "from model_interface import ModelInterface", *rest])
    (folder / name / "__init__.py").write_text(text)


def refusal(server: Server, model: str, data: Any, args: dict[str, Any]) -> str:
    with pytest.raises(InvalidInput) as error:
        server.client(model).run(data, args)
    return str(error.value)


IMAGE = np.zeros((4, 5, 3), np.uint8)


def test_run_gets_objects_with_their_defaults(typed: Server) -> None:
    client = typed.client("boxes")
    assert client.run({"boxes": [{"width": 1, "inner": [{"width": 2.5}]}]}) == ["Request", 1, "RED", 5]
    assert client.run({"boxes": [], "colour": "blue"}, {"top": 7}) == ["Request", 0, "BLUE", 7]
    assert typed.client("validated").run({"boxes": [{"width": "2.5"}]}) == {"total": 7.5}
    assert typed.client("version1").run({"width": 2}) == ["Request", 2.0]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("boxes", "a", r"data: must be an object \(Request\), not a text"),
        ("boxes", IMAGE, r"data: must be an object \(Request\), not an array of uint8 of shape \[4, 5, 3\]"),
        ("boxes", {}, r"data.boxes: is missing; it must be a list"),
        ("boxes", {"boxes": [{"width": 1}, {"width": "3"}]}, r"data.boxes.1.width: must be a number, not a text"),
        ("boxes", {"boxes": [{"width": True}]}, r"data.boxes.0.width: must be a number, not True"),
        (
            "boxes",
            {"boxes": [{"width": 1, "inner": [None]}]},
            r"data.boxes.0.inner.0: must be an object \(Box\), not nu",
        ),
        ("boxes", {"boxes": [], "color": "red"}, r"data.color: there is no such field; did you mean colour\?"),
        ("boxes", {"boxes": [], "colour": "green"}, r"data.colour: must be one of 'red', 'blue'"),
        ("boxes", {"boxes": [], "mode": "slow"}, r"data.mode: must be one of 'fast', 'good'"),
        ("boxes", {"boxes": [], "name": 3}, r"data.name: must be a text or null, not 3"),
        ("boxes", {"boxes": [], "either": {"width": None}}, r"data.either.width: must be a number, not null"),
        ("boxes", {"boxes": [], "either": 2.5}, r"data.either: must be a whole number or an object \(Box\), not 2.5"),
        ("boxes", {"boxes": [{"width": 1}] * 4}, r"data: at most 3 boxes"),
        ("validated", {"boxes": [{"width": 1}, {"width": -1}]}, r"data.boxes.1.width: Input should be greater than 0"),
        ("validated", {"boxes": [{"width": 1}] * 5}, r"data.boxes: Assertion failed, too many"),
        ("validated", "a", r"data: Input should be a valid dictionary or instance of Request"),
        ("version1", {}, r"data.width: field required"),
        ("text", IMAGE, r"the model takes a text, not uint8 of shape \[4, 5, 3\]"),
        ("text", [IMAGE], r"data: must be a text, not a list"),
        ("image", "a", r"data: must be an array of uint8 of shape \[any, any, 3\], not a text"),
        ("image", {"image": IMAGE}, r"data: must be an array of uint8 of shape \[any, any, 3\], not an object"),
        ("image", [[[1, 2, 300]]], r"data: must be an array, or a nested list of numbers that are uint8"),
        ("image", [[1, 2, 3]], r"data: must be .* \[any, any, 3\], not an array of uint8 of shape \[1, 3\]"),
        (
            "two_arrays",
            {"left": np.zeros(2, np.float32), "right": np.zeros((3, 1), int)},
            r"data.right: must be .*\[2, ",
        ),
    ],
)
def test_wrong_input_names_the_field(typed: Server, model: str, data: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        typed.client(model).run(data)


class Partial(TypedDict, total=False):
    needed: Required[int]
    free: str


class Whole(TypedDict):
    needed: Mapping[str, Sequence[int]]
    free: NotRequired[bytes]


class Size(enum.IntEnum):
    SMALL = 1


class Pixels(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    pixels: np.ndarray


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "message"),
    [
        (int, 3, True, "data: must be a whole number, not True"),
        (int, 3, 3.0, "data: must be a whole number, not 3.0"),
        (float, 3, "3", "data: must be a number, not a text"),
        (bool, True, 1, "data: must be true or false, not 1"),
        (bytes, b"a", "a", "data: must be bytes, not a text"),
        (None, None, 0, "data: must be null, not 0"),
        (dict, {"a": 1}, [], "data: must be an object, not a list"),
        (list, [1, "a"], {}, "data: must be a list, not an object"),
        (list[float], [1, 2.5], [1, "2"], "data.1: must be a number, not a text"),
        (dict[str, list[int]], {"a": [1]}, {"a": [1, None]}, "data.a.1: must be a whole number, not null"),
        (Partial, {"needed": 1}, {"free": "a"}, "data.needed: is missing; it must be a whole number"),
        (
            Whole,
            {"needed": {"a": [1]}, "free": b""},
            {"needed": {}, "free": ""},
            "data.free: must be bytes, not a text",
        ),
        (Size, 1, 2, "data: must be 1"),
        (Literal[Size.SMALL, "any"], "any", 2, "data: must be one of 1, 'any'"),
        (str | None, "a", 1, "data: must be a text or null, not 1"),
        (list[int] | dict[str, int], {"a": 1}, {"a": "b"}, "data.a: must be a whole number, not a text"),
        (Annotated[int, "any fact"], 1, "a", "data: must be a whole number, not a text"),
        (np.ndarray, np.zeros(3), "a", "data: must be an array, not a text"),
        (
            NDArray[np.floating],
            np.zeros(3),
            np.zeros(3, int),
            "data: must be an array of floats, not an array of int64",
        ),
        (
            Annotated[np.ndarray, "uint8"],
            np.zeros(3, "uint8"),
            [-1],
            "data: must be an array, or a nested list of numb",
        ),
        (
            Annotated[np.ndarray, np.dtype("bool")],
            np.zeros(3, bool),
            [[1], 2],
            "data: must be an array, or a nested lis",
        ),
        (
            Annotated[np.ndarray, (2,)],
            np.zeros(2),
            np.zeros((2, 1)),
            r"data: must be an array of shape \[2\], not an array",
        ),
    ],
)
def test_what_annotations_mean(annotation: Any, good: Any, bad: Any, message: str) -> None:
    types = types_of(typed_as(annotation))
    assert types.problems == []
    np.testing.assert_equal(types.data(good), good)
    with pytest.raises(Refused, match=f"^{message}"):
        types.data(bad)


def typed_as(annotation: Any) -> type[ModelInterface]:
    def run(self: Any, data: Any, args: Any) -> Any:
        pass

    run.__annotations__["data"] = annotation
    return type("Model", (ModelInterface,), {"run": run})


def test_a_field_of_another_class_may_be_anything_in_the_schema_of_pydantic() -> None:
    types = types_of(typed_as(Pixels))
    assert types.schema["data"]["properties"] == {"pixels": {"title": "Pixels"}}
    assert types.data({"pixels": np.zeros(2)}).pixels.shape == (2,)
    with pytest.raises(Refused, match="data.pixels: Input should be an instance of ndarray"):
        types.data({"pixels": [1]})


def test_two_classes_of_one_name_are_both_checked() -> None:
    other = pydantic.create_model("Box", height=(int, ...))
    holder = pydantic.create_model("Holder", boxes=(list[other], ...))  # type: ignore[valid-type]
    boxes = [dataclasses.make_dataclass("Box", [(name, int)]) for name in ("width", "depth")]
    types = types_of(typed_as(dataclasses.make_dataclass("Pair", [("a", boxes[0]), ("b", boxes[1]), ("c", holder)])))
    assert types.schema["data"]["$defs"].keys() == {"Box", "Box_"}
    assert types.problems == ["data of run: Holder has no JSON schema: there are two classes 'Box'"]
    with pytest.raises(Refused, match="data.b.depth: must be a whole number"):
        types.data({"a": {"width": 1}, "b": {"depth": "x"}, "c": {"boxes": []}})
    with pytest.raises(Refused, match="data.c.boxes.0.height: Field required"):
        types.data({"a": {"width": 1}, "b": {"depth": 1}, "c": {"boxes": [{}]}})


def test_wrong_args_fail_the_call(typed: Server) -> None:
    none: dict[str, Any] = {"boxes": []}
    assert "args.top: must be a whole number, not a text" in refusal(typed, "boxes", none, {"top": "3"})
    assert "args.topp: there is no such field; did you mean top?" in refusal(typed, "boxes", none, {"topp": 3})
    assert "args.top: Input should be a valid integer" in refusal(typed, "validated", none, {"top": "x"})
    with pytest.raises(InvalidInput, match=r"args\.upper: must be true or false, not 3"):
        typed.client("batch").run_batch([{"text": "a"}, {"text": "b"}], {"upper": 3})


def test_in_a_batch_only_the_wrong_item_fails(typed: Server) -> None:
    first, wrong, last = typed.client("batch").run_batch(
        [{"text": "a"}, {"text": 3}, {"text": "c"}], {"upper": True}, return_exceptions=True
    )
    assert (first, last) == (["a", 2, {"upper": True}], ["c", 2, {"upper": True}])
    assert isinstance(wrong, InvalidInput)
    assert "data.text: must be a text, not 3" in str(wrong)


def test_arrays_are_checked_before_they_queue_and_lists_become_arrays(typed: Server) -> None:
    client = typed.client("image")
    assert client.run(IMAGE) == [4, 5, 3]
    assert client.run([[[1, 2, 3]]]) == [1, 1, 3]
    with pytest.raises(InvalidInput, match=r"the model takes uint8 of shape \[-1, -1, 3\]"):
        client.run(IMAGE.astype(float))


def test_the_fault_of_a_validator_is_the_models(typed: Server) -> None:
    with pytest.raises(ModelFailed, match="seven"):
        typed.client("validated").run({"boxes": [{"width": 1}] * 7})
    assert typed.client("validated").run({"boxes": []}) == {"total": 5}


def test_what_is_not_understood_is_not_checked(typed: Server) -> None:
    assert typed.client("untyped").run("a", {"anything": 1}) == ["str", {"anything": 1}]
    (line,) = [line for line in typed.log if "model untyped:" in line]
    assert "WARNING" in line
    assert "parameter 1 of run is not checked: NameError: name 'Nobody' is not defined" in line
    assert typed.client("unreadable").run({"a": 1}, {"b": 2}) == [{"a": 1}, {"b": 2}]
    text = "\n".join(line for line in typed.log if "model unreadable:" in line)
    for reason in ("unhashable type: 'list'", "parameter 2 of run is not checked: ZeroDivisionError"):
        assert reason in text
    warned = {line.split("model ")[1].split(":")[0] for line in typed.log if "WARNING" in line}
    assert warned == {"untyped", "unreadable", "large"}


def test_callers_see_json_schemas(typed: Server) -> None:
    (info,) = typed.client("boxes").model_info()
    data, args, answer = (info["schema"][name] for name in ("data", "args", "answer"))
    assert data["required"] == ["boxes"]
    assert data["properties"]["boxes"] == {"type": "array", "items": {"$ref": "#/$defs/Box"}}
    assert data["$defs"]["Box"]["properties"]["inner"]["items"] == {"$ref": "#/$defs/Box"}
    assert data["properties"]["colour"] == {"enum": ["red", "blue"]}
    assert args["properties"] == {"top": {"type": "integer", "default": 5}}
    assert answer["type"] == "array"
    (info,) = typed.client("validated").model_info()
    assert info["schema"]["data"]["$defs"]["Box"]["properties"]["width"]["exclusiveMinimum"] == 0
    assert info["schema"]["answer"]["properties"]["total"]["type"] == "number"
    (info,) = typed.client("image").model_info()
    image = {"type": "array", "x-dtype": "uint8", "x-shape": [-1, -1, 3]}
    assert info["schema"] == {"data": image, "args": {}, "answer": {"type": "array"}}
    (info,) = typed.client("untyped").model_info()
    assert info["schema"] == {}
    assert {model["name"]: model["schema"] for model in get(typed, "/models")["models"]}["image"]["data"] == image


def test_validation_that_fails_oddly_fails_that_call_alone(typed: Server) -> None:
    client = typed.client("odd")
    with pytest.raises(InvalidInput, match="data: invalid literal for int"):
        client.run({"kind": "value"})
    with pytest.raises(InvalidInput, match="data.kind: must be one of 'key', 'exit'"):
        client.run({"kind": "else"})
    for kind, reason in {"key": "KeyError: 'name'", "exit": "SystemExit: 3"}.items():
        with pytest.raises(ModelFailed, match=reason):
            client.run({"kind": kind})
    assert client.run({"kind": "fine"}) == ["Request", "fine"]
    assert client.run(None) == ["NoneType", None]
    assert client.model_info()[0]["state"] == "READY"


@pytest.mark.parametrize("innermost", ["left", "middle"])
def test_time_does_not_double_with_each_level(typed: Server, innermost: str) -> None:
    value: dict[str, Any] = {"inner": None, "side": innermost}
    for level in range(190):
        value = {"inner": value, "side": "right" if level % 2 else "left"}
    if innermost == "left":
        assert typed.client("deep").run(value, timeout=20) == "right"
    else:
        with pytest.raises(InvalidInput, match=r"data\.inner\.inner"):
            typed.client("deep").run(value, timeout=20)


def test_a_long_schema_is_left_out(typed: Server) -> None:
    (info,) = typed.client("large").model_info()
    assert info["schema"] == {}
    (line,) = [line for line in typed.log if "model large:" in line]
    assert "characters, more than 262144" in line
    assert typed.client("large").run("the value 29999") == "the value 29999"
    with pytest.raises(InvalidInput, match="data: must be one of 'the value 0', ") as error:
        typed.client("large").run("the value 30000")
    assert len(error.value.details()) < 400


def test_lists_of_texts_do_not_become_arrays(typed: Server) -> None:
    with pytest.raises(InvalidInput, match="must be an array, or a nested list of numbers that are uint8"):
        typed.client("image").run([["a" * 1_000_000, *("b" for _ in range(100_000))]])


def test_async_models_stream_what_they_are_typed_to(typed: Server) -> None:
    client = typed.client("later")
    assert list(client.run_stream({"count": 2})) == [{"text": "0"}, {"text": "1"}]
    with pytest.raises(InvalidInput, match=r"data\.count: Input should be a valid integer"):
        list(client.run_stream({"count": "many"}))
    (info,) = client.model_info()
    assert info["schema"]["answer"]["items"]["properties"]["text"]["type"] == "string"


def test_the_example_is_checked_when_the_model_is_loaded(typed: Server) -> None:
    (info,) = typed.client("wrong_example").model_info()
    assert info["state"] == "FAILED"
    assert "its example does not fit the annotations of run: data: must be a list, not an object" in info["reason"]


def test_open_inference_sends_typed_inputs_by_name(typed: Server) -> None:
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["abc"]},
        {"name": "image", "datatype": "FP32", "shape": [2], "data": [1, 2]},
    ]
    described = get(typed, "/v2/models/prompted")["inputs"]
    assert [(one["name"], one["datatype"]) for one in described] == [("prompt", "BYTES"), ("image", "FP32")]
    url = f"http://127.0.0.1:{typed.http_port}/v2/models/prompted/infer"
    with urllib.request.urlopen(url, json.dumps({"inputs": inputs}).encode(), timeout=10) as response:
        (output,) = json.load(response)["outputs"]
    assert output["data"] == [4.5]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", ["3.9", "3.13", "3.14"])
def test_a_models_own_python_checks_the_same(start_server: Callable[..., Server], tmp_path: Path, version: str) -> None:
    for name in ("boxes", "validated", "two_arrays"):
        write(tmp_path, name, MODELS[name])
    own_interpreter(tmp_path / "boxes", version, "numpy", "pydantic")
    for name in ("validated", "two_arrays"):
        (tmp_path / name / ".venv").symlink_to(tmp_path / "boxes" / ".venv")
    server = start_server(tmp_path)
    assert server.client("boxes").run({"boxes": [{"width": 1}]}) == ["Request", 1, "RED", 5]
    message = refusal(server, "boxes", {"boxes": [{"width": 1, "inner": [{"width": "3"}]}]}, {})
    assert "data.boxes.0.inner.0.width: must be a number, not a text" in message
    assert "data.boxes.0.width: Input should be a" in refusal(server, "validated", {"boxes": [{"width": "x"}]}, {})
    arrays = {"left": np.zeros(2, np.float32), "right": np.zeros((3, 1), int)}
    assert "data.right: must be an array of int64 of shape [2, any]" in refusal(server, "two_arrays", arrays, {})
    assert not [line for line in server.log if "WARNING" in line]


def test_type_checkers_accept_typed_models(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "typed-models.md").read_text()
    batch = """
    def run_batch(self, items: list[Request], args: Options) -> list[list[np.ndarray]]:
        return [self.run(item, args) for item in items]
    """
    (tmp_path / "typed.py").write_text(page.split("```python\n")[1].split("```")[0] + batch)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", ROOT / ".mypy_cache"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "typed.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert ran.returncode == 0, ran.stdout


def test_open_inference_describes_typed_arrays(typed: Server) -> None:
    (described,) = get(typed, "/v2/models/image")["inputs"]
    assert described == {"name": "input", "datatype": "UINT8", "shape": [-1, -1, 3]}
    found = get(typed, "/v2/models/two_arrays")
    left = {"name": "left", "datatype": "FP32", "shape": [-1]}
    assert found["inputs"] == [left, {"name": "right", "datatype": "INT64", "shape": [2, -1]}]
    assert found["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1]}]


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=10) as response:
        return json.load(response)
