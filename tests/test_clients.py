"""The real clients of every contract, unchanged, each in an environment of its own: the scripts in tests/clients."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import MODELS, ROOT, Server
from tests.test_faults import write_model
from tests.test_package import environment

ROWS = (
    "    metadata = {'batch': True, 'inputs': [{'name': 'x', 'dtype': 'float32', 'shape': [3]}],\n"
    "                'outputs': [{'name': 'output', 'dtype': 'float32', 'shape': [3]}]}\n"
    "    def run(self, data, args):\n        return self.run_batch([data], args)[0]\n"
    "    def run_batch(self, items, args):\n        return [item * 2 for item in items]"
)
UPPER = (
    "    metadata = {'name': 'Upper', 'inputs': [{'name': 'input', 'media_types': ['text/plain']}]}\n"
    "    max_batch_size = 4\n"
    "    def run(self, data, args):\n"
    "        if data == 'bad':\n            from model_interface import InvalidInput\n"
    "            raise InvalidInput('bad is bad')\n"
    "        if data == 'boom':\n            raise RuntimeError('boom')\n"
    "        return {'text': data.upper(), 'args': args}"
)
NOS = {
    "means": "    def run(self, data, args):\n        return data.mean((0, 1))",
    "boxes": (
        "    def run(self, data, args):\n        import numpy as np\n        height, width = data.shape[:2]\n"
        "        return {'scores': np.ones(1), 'labels': ['whole'], 'bboxes': np.array([[0, 0, width, height]])}"
    ),
    "lengths": "    def run(self, data, args):\n        return [float(len(data))]",
    "paint": (
        "    def run(self, data, args):\n        import numpy as np\n"
        "        return np.full((2, 2, 3), int(data), 'uint8')"
    ),
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.zeros((4, 8, 3), np.uint8))
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("echo", "declares", "describe", "masks"):
        (folder / name).symlink_to(MODELS / name)
    return write_model(folder, "rows", ROWS)


@pytest.fixture
def python(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The interpreter of a new environment with what the test's marker ``installs`` names."""
    marker = request.node.get_closest_marker("installs")
    assert marker
    return environment(tmp_path / "venv", *marker.args) / "python"


def passes(python: Path, script: str, *arguments: object) -> None:
    command = [str(part) for part in (python, ROOT / "tests" / "clients" / script, *arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


pytestmark = pytest.mark.timeout(300)


@pytest.mark.installs("tritonclient[grpc,http]==2.73.0")
def test_tritonclient(start_server: Callable[..., Server], models: Path, python: Path, photo: Path) -> None:
    server = start_server(models)
    passes(python, "triton_grpc.py", server.address, photo)
    passes(python, "triton_http.py", f"127.0.0.1:{server.http_port}", photo)


@pytest.mark.installs("kserve==0.21.0")
def test_kserve(start_server: Callable[..., Server], models: Path, python: Path) -> None:
    passes(python, "kserve_grpc.py", start_server(models).address)


@pytest.mark.installs("nvidia-pytriton==0.7.0")
def test_pytriton(start_server: Callable[..., Server], models: Path, python: Path) -> None:
    server = start_server(models)
    passes(python, "pytriton_client.py", server.address, f"127.0.0.1:{server.http_port}")


@pytest.mark.installs("open-inference-grpc==2.0.0 protobuf==7.36.2")
def test_open_inference_grpc(start_server: Callable[..., Server], models: Path, python: Path) -> None:
    passes(python, "open_inference_client.py", start_server(models).address)


@pytest.mark.installs("--no-deps caikit==0.28.3", "grpcio<1.79 protobuf<7")
def test_caikits_stubs(start_server: Callable[..., Server], models: Path, python: Path) -> None:
    server = start_server(models, TMS_PROTOCOLS="native,open_inference,model_mesh")
    passes(python, "model_mesh_client.py", server.address, MODELS / "echo")


@pytest.mark.installs("chassisml==1.5.0 chassisml-protobuf==4.0.0")
def test_chassis(start_server: Callable[..., Server], tmp_path: Path, python: Path) -> None:
    server = start_server(write_model(tmp_path / "one", "upper", UPPER), TMS_PROTOCOLS="modzy")
    passes(python, "modzy_client.py", server.port)
    assert server.process.wait(20) == 0


@pytest.mark.installs("--no-deps autonomi-nos==0.0.3", "cloudpickle grpcio grpcio-tools loguru numpy pillow rich")
def test_nos(start_server: Callable[..., Server], tmp_path: Path, python: Path) -> None:
    for name, body in NOS.items():
        write_model(tmp_path / "nos", name, body)
    server = start_server(tmp_path / "nos", TMS_PROTOCOLS="native,nos")
    passes(python, "nos_client.py", server.address, tmp_path / "saved.png")
