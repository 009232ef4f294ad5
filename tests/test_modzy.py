"""The Modzy container beyond what its client tries: files, several inputs, port, and what cannot be served."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from tests.conftest import MODELS, ROOT, Server, wait_for
from tests.test_faults import write_model
from tiny_model_server import schemas

METHODS = schemas.methods("modzy", "ModzyModel")
MASK = """
    metadata = {
        'version': '1.2.3', 'author': 'tests', 'summary': 'finds', 'required_ram': '2G', 'num_cpus': 1.5,
        'inputs': [{'name': 'photo', 'media_types': ['image/png']}, {'name': 'note', 'media_types': ['text/plain']}],
        'outputs': [{'name': 'mask.png', 'media_type': 'image/png'}, {'name': 'results.json'}],
    }
    def run(self, data, args):
        mask = (data['photo'][..., 0] > 100).astype('uint8') * 255
        return {'mask.png': mask, 'note': data['note'], 'found': int(mask.sum() // 255)}
"""


@pytest.fixture
def call() -> Iterator[Callable[..., Any]]:
    channels: list[grpc.Channel] = []

    def make(server: Server | int, method: str, **fields: Any) -> Any:
        port = server if isinstance(server, int) else server.port
        channels.append(grpc.insecure_channel(f"127.0.0.1:{port}"))
        found = METHODS[method]
        stub = channels[-1].unary_unary(found.path, found.request.SerializeToString, found.response.FromString)
        return stub(found.request(**fields), timeout=30, wait_for_ready=True)

    yield make
    for channel in channels:
        channel.close()


def test_files_in_and_out(start_server: Callable[..., Server], tmp_path: Path, call: Callable[..., Any]) -> None:
    server = start_server(write_model(tmp_path, "mask", MASK), TMS_PROTOCOLS="modzy")
    status = call(server, "Status")
    assert (status.model_info.model_version, status.model_info.model_author) == ("1.2.3", "tests")
    assert (status.description.summary, status.resources.required_ram, status.resources.num_cpus) == (
        "finds",
        "2G",
        1.5,
    )
    assert [list(one.accepted_media_types) for one in status.inputs] == [["image/png"], ["text/plain"]]
    assert [one.media_type for one in status.outputs] == ["image/png", "application/json"]
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1:3, 2:5, 2] = 200  # OpenCV's order: red
    photo = cv2.imencode(".png", pixels)[1].tobytes()
    answer = call(server, "Run", inputs=[{"input": {"photo": photo, "note": b"hi"}}])
    (item,) = answer.outputs
    mask = cv2.imdecode(np.frombuffer(item.output["mask.png"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask, (pixels[..., 2] > 100) * 255)
    assert json.loads(item.output["results.json"]) == {"note": "hi", "found": 6}
    answer = call(server, "Run", inputs=[{"input": {"photo": photo}}])
    assert (answer.status_code, answer.message) == (422, "item 0 has the inputs ['photo']; it must have note, photo")
    answer = call(server, "Run", inputs=[{"input": {"photo": b"\x89PNG broken", "note": b""}}])
    assert answer.status_code == 422
    assert "not an image file" in answer.message
    answer = call(server, "Run", inputs=[{"input": {"photo": photo, "note": b"\xff"}}])
    assert answer.status_code == 422
    assert "not UTF-8" in answer.message


def test_the_platforms_port(tmp_path: Path, call: Callable[..., Any]) -> None:
    folder = write_model(tmp_path, "one", "    def run(self, data, args):\n        return data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"TMS_MODELS_DIR": str(folder), "TMS_PROTOCOLS": "modzy", "TMS_HTTP_PORT": "off", "TMS_LAZY": "1"}
    environment["PSC_MODEL_PORT"] = str(port)
    with subprocess.Popen([sys.executable, "server.py"], cwd=ROOT, env=os.environ | environment) as ran:
        status = call(port, "Status")  # loads the model, which the server did not
        assert (status.status_code, status.status) == (200, "OK")
        assert json.loads(call(port, "Run", inputs=[{"input": {"x": b"1"}}]).outputs[0].output["results.json"]) == "1"
        assert call(port, "Shutdown").status_code == 202
        assert ran.wait(20) == 0


def test_a_wrong_port() -> None:
    environment = os.environ | {"TMS_PROTOCOLS": "modzy", "PSC_MODEL_PORT": "modzy"}
    ran = subprocess.run([sys.executable, "server.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "PSC_MODEL_PORT='modzy' must be a whole number from 0 to 65535" in ran.stderr


def test_one_model_of_several(start_server: Callable[..., Server], call: Callable[..., Any]) -> None:
    status = call(start_server(TMS_PROTOCOLS="modzy"), "Status")
    assert status.status_code == 500
    assert "TMS_MODZY_MODEL must name the one to serve" in status.message
    server = start_server(MODELS, TMS_PROTOCOLS="modzy", TMS_MODZY_MODEL="nobody")
    assert "there is no model 'nobody'" in call(server, "Status").message
    assert call(server, "Run", inputs=[{"input": {"x": b"1"}}]).status_code == 500


def test_a_model_that_cannot_be_loaded(
    start_server: Callable[..., Server], tmp_path: Path, call: Callable[..., Any]
) -> None:
    folder = write_model(tmp_path, "broken", "    def run(self, data, args):\n        pass\n    import no_such_module")
    server = start_server(folder, ready=False, TMS_PROTOCOLS="modzy")
    wait_for(lambda: any("FAILED" in line for line in server.log), "the failure")
    status = call(server, "Status")
    assert status.status_code == 500
    assert "no_such_module" in status.message
