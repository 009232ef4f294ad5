"""Ten models as a new user writes them, in one server: each works at once, and returns what it has."""

import http.server
import io
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, Server

pytest.importorskip("torch", reason="torch is not installed here; some of these models need it")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed here; a model needs it")

MODELS = {
    "iris": """
        from sklearn.datasets import load_iris
        from sklearn.linear_model import LogisticRegression

        class Model(ModelInterface):
            def __init__(self):
                self.iris = load_iris()
                self.model = LogisticRegression(max_iter=1000).fit(self.iris.data, self.iris.target)

            def run(self, data, args):
                label = self.model.predict([data])[0]
                scores = self.model.predict_proba([data])[0]
                return {"label": label, "name": self.iris.target_names[label], "scores": scores}
        """,
    "embeddings": """
        import zlib
        import torch

        class Model(ModelInterface):
            def __init__(self):
                torch.manual_seed(0)
                self.words = torch.nn.EmbeddingBag(1000, 16)

            def run(self, data, args):
                return self.run_batch([data], args)[0]

            def run_batch(self, items, args):
                bags = [torch.tensor([zlib.crc32(word.encode()) % 1000 for word in text.split()]) for text in items]
                return torch.stack([self.words(bag[None])[0] for bag in bags])
        """,
    "network": """
        import torch

        class Model(ModelInterface):
            max_batch_size = 8

            def __init__(self):
                torch.manual_seed(0)
                self.net = torch.nn.Sequential(
                    torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
                )

            def run(self, data, args):
                return self.run_batch([data], args)[0]

            def run_batch(self, items, args):
                images = torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() for image in items])
                return list(self.net(images))
        """,
    "digits": """
        import onnxruntime

        class Model(ModelInterface):
            def __init__(self):
                self.session = onnxruntime.InferenceSession(WEIGHTS)
                self.input = self.session.get_inputs()[0].name

            def run(self, data, args):
                return self.session.run(None, {self.input: data})
        """,
    "shapes": """
        import cv2

        class Model(ModelInterface):
            def run(self, data, args):
                gray = cv2.cvtColor(data, cv2.COLOR_RGB2GRAY)
                contours, _ = cv2.findContours(gray, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
                boxes = [cv2.boundingRect(contour) for contour in contours]
                return {"boxes": boxes, "drawn": cv2.drawContours(data.copy(), contours, -1, (255, 0, 0))}
        """,
    "audio": """
        import io
        import wave
        from dataclasses import dataclass
        from datetime import timedelta
        import numpy as np

        @dataclass
        class Sound:
            length: timedelta
            loudness: np.float32
            channels: set

        class Model(ModelInterface):
            def run(self, data, args):
                with wave.open(io.BytesIO(data)) as sound:
                    samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
                    length = timedelta(seconds=sound.getnframes() / sound.getframerate())
                return Sound(length, np.sqrt((samples / np.float32(32768)) ** 2).mean(), {1})
        """,
    "tokens": """
        class Model(ModelInterface):
            def run(self, data, args):
                for word in data.split()[: args.get("most", 100)]:
                    yield word.upper()
        """,
    "own_venv": """
        import sys

        class Model(ModelInterface):
            def run(self, data, args):
                return {"prefix": sys.prefix, "sum": data.sum()}
        """,
    "motion": """
        import numpy as np

        class Model(ModelInterface):
            def __init__(self):
                self.last = None

            def run(self, data, args):
                last, self.last = self.last, data
                return 0.0 if last is None else np.abs(data.astype(int) - last).mean()
        """,
    "weather": """
        import asyncio
        import urllib.request

        class Model(ModelInterface):
            concurrency = 8

            async def run(self, data, args):
                url = args["url"] + data
                return (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
        """,
}


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    weights = next((ROOT / "models" / "digits_onnx").glob("*.onnx"))
    for name, text in MODELS.items():
        (folder / name).mkdir()
        code = "from model_interface import ModelInterface\n" + text.replace("\n        ", "\n").replace(
            "WEIGHTS", f"{str(weights)!r}"
        )
        (folder / name / "__init__.py").write_text(code)
    own = folder / "own_venv" / ".venv"
    uv = [str(Path(sys.executable).parent / "uv")]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(own)], check=True, timeout=120)
    install = [*uv, "pip", "install", "--quiet", "--python", str(own / "bin" / "python"), "numpy"]
    subprocess.run(install, check=True, timeout=300)
    server = Server(models=folder)
    yield server
    server.stop()


def test_all_ten_are_ready(ten: Server) -> None:
    states = {model["name"]: (model["state"], model["reason"]) for model in ten.client("").list_models()}
    assert states == dict.fromkeys(MODELS, ("READY", ""))


def test_scikit_learn(ten: Server) -> None:
    answer = ten.client("iris").run([5.1, 3.5, 1.4, 0.2])
    assert (answer["label"], answer["name"]) == (0, "setosa")
    assert answer["scores"].sum() == pytest.approx(1)


def test_sentence_embeddings(ten: Server) -> None:
    one, same, other = ten.client("embeddings").run_text_batch(["a cat", "a cat", "a dog"])
    assert one.shape == (16,)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_torch(ten: Server) -> None:
    images = [np.full((32, 32, 3), value, np.uint8) for value in range(8)]
    answers = ten.client("network").run_image_batch(images)
    assert [answer.shape for answer in answers] == [(4,)] * 8
    np.testing.assert_allclose(answers[5], ten.client("network").run_image(images[5]), rtol=1e-5)


def test_onnx(ten: Server) -> None:
    session = onnxruntime.InferenceSession(next((ROOT / "models" / "digits_onnx").glob("*.onnx")))
    shape = [size if isinstance(size, int) else 1 for size in session.get_inputs()[0].shape]
    data = np.random.default_rng(0).random(shape, np.float32)
    expected = session.run(None, {session.get_inputs()[0].name: data})
    for found, wanted in zip(ten.client("digits").run(data), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_opencv(ten: Server) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:20, 30:50] = 255
    answer = ten.client("shapes").run_image(image)
    assert answer["boxes"] == [[30, 10, 20, 10]]
    assert answer["drawn"].shape == image.shape
    assert (answer["drawn"][10, 30] == (255, 0, 0)).all()


def test_audio(ten: Server) -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.full(4000, 16384, np.int16).tobytes())
    assert ten.client("audio").run(file.getvalue()) == {"length": 0.5, "loudness": 0.5, "channels": [1]}


def test_a_stream_of_tokens(ten: Server) -> None:
    assert list(ten.client("tokens").run_stream("so they come", {"most": 2})) == ["SO", "THEY"]
    assert ten.client("tokens").run_text("all at once") == ["ALL", "AT", "ONCE"]


def test_its_own_environment(ten: Server) -> None:
    answer = ten.client("own_venv").run(np.arange(4))
    assert answer["sum"] == 6
    assert Path(answer["prefix"]).parts[-2:] == ("own_venv", ".venv")


def test_video(ten: Server, tmp_path: Path) -> None:
    video = str(tmp_path / "video.avi")
    writer = cv2.VideoWriter(video, cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for value in (0, 0, 100, 100, 200):
        writer.write(np.full((48, 64, 3), value, np.uint8))
    writer.release()

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        capture = cv2.VideoCapture(video)
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield frame

    motion = list(ten.client("motion").map(frames(), in_flight=1))
    assert [round(value, -1) for value in motion] == [0, 0, 100, 0, 100]


class _Weather(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(0.3)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"sunny in " + self.path[1:].encode())

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def weather() -> Iterator[str]:
    """The address of a server that takes 0.3 s for an answer."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Weather) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_a_model_that_calls_another_server(ten: Server, weather: str) -> None:
    client = ten.client("weather")
    with ThreadPoolExecutor(8) as threads:
        begun = time.monotonic()
        answers = list(threads.map(lambda city: client.run_text(city, {"url": weather}), map(str, range(8))))
        took = time.monotonic() - begun
    assert answers == [f"sunny in {city}" for city in range(8)]
    assert took < 8 * 0.3 / 2, "one call at a time would take 2.4 s"
