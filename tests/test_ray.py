"""The models folder on Ray, where Ray is installed: the same contract, the same client."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import model_client
from model_client import ModelClient
from tests.conftest import MODELS, ROOT, free_port
from tests.test_faults import write_model
from tiny_model_server.settings import ModelOptions

pytestmark = [
    pytest.mark.skipif(
        not importlib.util.find_spec("ray"), reason="not installed here: ray (make test_ray installs it)"
    ),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models, port = tmp_path_factory.mktemp("models"), free_port()
    for name in ("echo", "tokens"):
        (models / name).symlink_to(MODELS / name)
    write_model(
        models, "who", "    workers = 2\n    def run(self, data, args):\n        return __import__('os').getpid()"
    )
    env = os.environ | {"TMS_MODELS_DIR": str(models), "TMS_PORT": str(port), "TMS_HTTP_PORT": "off"}
    command = [sys.executable, "examples/on_ray.py"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    assert any("serving 3 models on Ray" in line for line in process.stdout)
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_values_go_and_come(address: str) -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with ModelClient("echo", addresses=address) as client:
        assert np.array_equal(client.run_image(image), image)
        assert np.array_equal(client.run_image_to_image(image), image)
        for height in (400, 2000):  # large ones go to the end of a message
            large = np.random.default_rng(0).integers(0, 256, (height, 1000, 3), np.uint8)
            assert np.array_equal(client.run_image(large), large)
            assert np.array_equal(client.run_image_to_image(large), large)
            assert np.array_equal(client.run(large), large)
        assert client.run_text("x", {"n": 1}) == {"data": "x", "args": {"n": 1}}
        assert client.run_text_batch(["a", "b"]) == ["a", "b"]
        assert client.get_input_shape() is None
        assert [model["name"] for model in client.list_models()] == ["echo", "tokens", "who"]
    with ModelClient("tokens", addresses=address) as client:
        assert [token["index"] for token in client.run_stream(3)] == [0, 1, 2]


def test_errors_are_the_contracts(address: str) -> None:
    with ModelClient("nobody", addresses=address) as client, pytest.raises(model_client.ModelNotFound, match="echo"):
        client.run_text("x")
    with ModelClient("echo", addresses=address) as client:
        with pytest.raises(model_client.InvalidInput, match="empty"):
            client.run_batch([])
        with pytest.raises(model_client.ModelClientError, match="changed by Ray"):
            client.unload_model()


def test_workers_are_replicas(address: str) -> None:
    with ModelClient("who", addresses=address) as client:
        assert len({client.run_text("x") for _ in range(60)}) == 2
        assert len(client.stats()["replicas"]) == 2


def test_attributes_become_ray_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import on_ray

    grows = ModelOptions(workers=2, max_workers=6, max_batch_size=8)
    assert on_ray.ray_options("x", grows, 0.5, 4) == {
        "name": "x",
        "max_ongoing_requests": 18,
        "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1},
        "autoscaling_config": {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 8},
    }
    fixed = on_ray.ray_options("x", ModelOptions(workers=3, devices=("cpu",)), 1, 4)
    assert fixed["num_replicas"] == 3
    assert fixed["ray_actor_options"]["num_gpus"] == 0
    assert on_ray.ray_options("x", ModelOptions(), 1, 0)["ray_actor_options"]["num_gpus"] == 0
