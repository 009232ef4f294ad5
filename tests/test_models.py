"""The example models, served for real, on real photographs and digits."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

import model_client
from tests.conftest import ROOT, Server
from tests.test_open_inference import infer
from tiny_model_server import codec

PHOTOGRAPHS = Path(skimage.data.__file__).parent


@pytest.fixture(scope="module")
def examples() -> Iterator[Server]:
    server = Server(models=ROOT / "models")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def flower() -> np.ndarray:
    return load_sample_images().images[1]


def test_all_are_ready(examples: Server) -> None:
    states = {model["name"]: (model["state"], model["reason"]) for model in examples.client().list_models()}
    names = "digits digits_onnx edges example language ocr optical_flow".split()
    assert states == dict.fromkeys(names, ("READY", ""))


def test_example(examples: Server, flower: np.ndarray) -> None:
    answer = examples.client("example").run_image(flower, {"bins": 8})
    assert answer["shape"] == list(flower.shape)
    assert answer["mean"] == pytest.approx(flower.mean())
    assert answer["histogram"].sum() == flower.size
    assert examples.client("example").run_text("three little words") == {"words": 3}
    with pytest.raises(model_client.InvalidInput, match="takes an image or a text, not a int"):
        examples.client("example").run(3)


def test_digits_have_the_accuracy_that_is_recorded(examples: Server) -> None:
    digits = load_digits()
    _, unseen = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    images = list(digits.images[unseen] / 16)
    torch = examples.client("digits").run_image_batch(images)
    onnx = examples.client("digits_onnx").run_image_batch(images)
    accuracy = np.mean([answer["digit"] == digits.target[i] for answer, i in zip(torch, unseen, strict=True)])
    for name in ("digits", "digits_onnx"):
        assert f'"accuracy": {accuracy:.4f}' in (ROOT / "models" / name / "__init__.py").read_text()
    for one, other in zip(torch, onnx, strict=True):  # one network, two frameworks
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert examples.client("digits").get_input_shape() == [8, 8]


def test_digits_take_images_of_any_size(examples: Server) -> None:
    digit = (load_digits().images[3] * 255 / 16).astype(np.uint8)
    large = cv2.cvtColor(cv2.resize(digit, (80, 80), interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB)
    for name in ("digits", "digits_onnx"):
        assert examples.client(name).run_image(large)["digit"] == 3
        with pytest.raises(model_client.InvalidInput, match="HxW or HxWx3"):
            examples.client(name).run_image(np.zeros((8, 8, 2), np.uint8))


def test_edges(examples: Server, flower: np.ndarray) -> None:
    answer = examples.client("edges").run_image_to_image(flower, {"low": 50, "high": 150})
    assert np.array_equal(answer, cv2.Canny(flower, 50, 150))
    with pytest.raises(model_client.InvalidInput, match="uint8"):
        examples.client("edges").run_image_to_image(flower.astype(np.float32))


def test_optical_flow_sees_a_known_shift(examples: Server, flower: np.ndarray) -> None:
    first, second = flower[:, :-5], flower[:, 5:]  # what was at x is at x - 5 now
    flow = examples.client("optical_flow").run([first, second])
    assert (flow.shape, flow.dtype) == ((*first.shape[:2], 2), np.float32)
    assert np.median(flow[..., 0]) == pytest.approx(-5, abs=0.2)
    assert np.median(flow[..., 1]) == pytest.approx(0, abs=0.2)
    stacked = examples.client("optical_flow").run_image_to_image(np.dstack([first, second]))
    assert stacked.shape == flow.shape
    assert np.median(stacked[..., 0]) == pytest.approx(-5, abs=0.2)
    with pytest.raises(model_client.InvalidInput, match="one shape"):
        examples.client("optical_flow").run([first, second[:100]])


def test_language(examples: Server) -> None:
    texts = {"en": "Where is the railway station?", "de": "Wo ist der Bahnhof?", "fr": "Où se trouve la gare ?"}
    answers = examples.client("language").run_text_batch(list(texts.values()), {"top": 2})
    assert [answer[0]["language"] for answer in answers] == list(texts)
    assert all(len(answer) == 2 for answer in answers)
    with pytest.raises(model_client.InvalidInput, match="not empty"):
        examples.client("language").run_text(" ")


def test_ocr_reads_a_photographed_page(examples: Server, flower: np.ndarray) -> None:
    lines = examples.client("ocr").run_image(PHOTOGRAPHS / "page.png")
    text = " ".join(line["text"] for line in lines)
    assert "Region-based segmentation" in text
    assert "determine markers of the coins" in text
    assert all(line["box"].shape == (4, 2) for line in lines)
    assert examples.client("ocr").run_image(flower) == []


def test_every_example_by_open_inference(examples: Server, flower: np.ndarray) -> None:
    """The same answers as by ModelClient: arrays as tensors, all else as JSON; parameters are the args."""
    flower = np.ascontiguousarray(flower[:200, :300])
    digit = (load_digits().images[3] / 16).astype(np.float32)
    pair = np.dstack([flower[:, :-5], flower[:, 5:]])
    page = np.fromfile(PHOTOGRAPHS / "page.png", np.uint8)

    def answer(model: str, datatype: str, data: np.ndarray, **args: int) -> Any:
        encoded = datatype == "BYTES"
        raw = struct.pack("<I", data.nbytes) + data.tobytes() if encoded else data.tobytes()
        one = {"name": "input", "datatype": datatype, "shape": [1] if encoded else data.shape}
        parameters = {name: {"int64_param": value} for name, value in args.items()}
        found = infer(examples, model, one, raw_input_contents=[raw], parameters=parameters)
        (output,), (content,) = found.outputs, found.raw_output_contents
        if output.datatype == "BYTES":
            return json.loads(content[4:])
        dtype = {"UINT8": np.uint8, "FP32": np.float32}[output.datatype]
        return np.frombuffer(content, dtype).reshape(tuple(output.shape))

    def same(one: Any, other: Any) -> None:
        assert json.loads(codec.json_only(one)) == json.loads(codec.json_only(other))

    same(answer("example", "UINT8", flower, bins=8), examples.client("example").run_image(flower, {"bins": 8}))
    for name in ("digits", "digits_onnx"):
        same(answer(name, "FP32", digit), examples.client(name).run_image(digit))
    edges = examples.client("edges").run_image(flower, {"low": 50, "high": 150})
    assert np.array_equal(answer("edges", "UINT8", flower, low=50, high=150), edges)
    assert np.array_equal(answer("optical_flow", "UINT8", pair), examples.client("optical_flow").run_image(pair))
    words = np.frombuffer(b"Wo ist der Bahnhof?", np.uint8)
    language = examples.client("language").run_text("Wo ist der Bahnhof?", {"top": 2})
    same(answer("language", "BYTES", words, top=2), language)
    same(answer("ocr", "BYTES", page), examples.client("ocr").run_image(PHOTOGRAPHS / "page.png"))
