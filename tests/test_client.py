"""ModelClient: addresses, waiting, balancing, errors, and the environments it must work in."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

import model_client
from model_client import ModelClient
from tests.conftest import MODELS, ROOT, Server, only, wait_for
from tiny_model_server.client.addresses import Target


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["localhost:50000"], "dns:///localhost:50000"),
        (["10.0.0.1:1"], "ipv4:10.0.0.1:1"),
        (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["[::1]:5"], "ipv6:[::1]:5"),
        (["127.0.0.1:1", "127.0.0.1:1"], "ipv4:127.0.0.1:1"),
        (["unix:/a", "unix:/b"], "unix:/a,/b"),
    ],
)
def test_targets(addresses: list[str], expected: str) -> None:
    assert Target(addresses).current() == expected


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":50000", "localhost:x", "localhost:70000", "host:0", ""]
)
def test_malformed_addresses_raise_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        ModelClient("x", addresses=[address])


def test_where_the_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMS_ADDRESS", raising=False)
    assert ModelClient("x").addresses == ["localhost:50000"]
    assert ModelClient("x", ip="10.0.0.1").addresses == ["10.0.0.1:50000"]
    assert ModelClient("x", port=7).addresses == ["localhost:7"]
    assert ModelClient("x", "host", 8).addresses == ["host:8"]
    monkeypatch.setenv("TMS_ADDRESS", "a:1, b:2")
    assert ModelClient("x").addresses == ["a:1", "b:2"]
    with pytest.raises(ValueError, match="either addresses, or ip and port"):
        ModelClient("x", ip="a", addresses=["b:1"])
    with pytest.raises(ValueError, match="addresses is empty"):
        ModelClient("x", addresses=[])


def test_ip_and_port(server: Server) -> None:
    with ModelClient("echo", ip="127.0.0.1", port=server.port) as client:
        assert client.run_text("hi") == "hi"
        assert client.get_input_shape() is None
        assert client.health_check() == {"serving": [server.address], "stopped_serving": []}
        states = {model["name"]: model["state"] for model in client.list_models()}
        assert states["echo"] == "READY"
    assert client.run_text("after close it connects again") == "after close it connects again"
    client.close()


def test_nobody_there() -> None:
    client = ModelClient("echo", addresses=["127.0.0.1:1"], connect_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(
        model_client.ServerUnavailable, match=r"no server at 127.0.0.1:1: it was not ready within 0.3 s"
    ):
        client.run_text("x")
    assert time.monotonic() - started < 5
    assert client.health_check() == {"serving": [], "stopped_serving": ["127.0.0.1:1"]}


def test_waits_for_a_server_that_is_still_starting(start_server: Callable[..., Server], tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "__init__.py").write_text(
        "import time\nfrom model_interface import ModelInterface\nclass Model(ModelInterface):\n"
        "    def __init__(self):\n        time.sleep(1)\n    def run(self, data, args):\n        return 'ready'\n"
    )
    server = start_server(models=tmp_path, ready=False)
    assert server.client("slow").health_check()["stopped_serving"] == [server.address]
    with pytest.raises(model_client.ServerUnavailable, match="was not ready within 0.1 s"):
        server.client("slow", connect_timeout=0.1).run_text("x")
    assert server.client("slow", connect_timeout=20).run_text("x") == "ready"


def test_round_robin_over_two_servers_and_one_that_goes(start_server: Callable[..., Server]) -> None:
    servers = [start_server(only("misbehave")), start_server(only("misbehave"))]
    client = ModelClient("misbehave", addresses=[server.address for server in servers])

    def spread(count: int) -> list[int]:
        pids = [client.run(1)["pid"] for _ in range(count)]
        return sorted(pids.count(pid) for pid in set(pids))

    wait_for(lambda: spread(10) == [5, 5], "both servers to be in turn")
    assert client.health_check()["serving"] == client.addresses
    assert servers[0].stop() == 0
    assert spread(10) == [10]
    client.close()


def test_stop_server(start_server: Callable[..., Server]) -> None:
    servers = [start_server(), start_server()]
    with ModelClient(addresses=[server.address for server in servers]) as client:
        client.stop_server()
    assert [server.process.wait(10) for server in servers] == [0, 0]


def test_a_server_that_goes_away_during_use_is_named(start_server: Callable[..., Server]) -> None:
    server = start_server()
    client = server.client("echo")
    assert client.run_text("x") == "x"
    server.stop()
    with pytest.raises(model_client.ServerUnavailable, match=f"no server at {server.address}: it disconnected"):
        client.run_text("x", timeout=0.5)


def test_errors_say_everything(server: Server) -> None:
    with pytest.raises(model_client.ModelNotFound) as caught:
        server.client("nobody").run_text("x")
    error = caught.value
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.model == "nobody"
    assert str(error) == f"{error.details()} (replica {server.address})"
    assert error.replica == server.address
    assert "there is no model 'nobody'" in error.details()


def test_mistakes_in_the_call_raise_before_it_is_made(server: Server) -> None:
    client = server.client("echo")
    with pytest.raises(TypeError, match="args must be a dict, not list"):
        client.run_text("x", ["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="for one text there is run_text"):
        client.run_text_batch("text")
    with pytest.raises(TypeError, match=r"cannot serialize object at \.a\[1\]"):
        client.run({"a": [1, object()]})
    with pytest.raises(FileNotFoundError):
        client.run_image("no/such/file.jpg")


def test_threads_share_a_client(server: Server) -> None:
    client = server.client("echo")
    answers: list[str] = []
    threads = [threading.Thread(target=lambda i=i: answers.append(client.run_text(str(i)))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers, key=int) == [str(i) for i in range(20)]


# Channels that share a connection crash gRPC in one of about 600 rounds.
CLIENTS_THAT_OPEN_TOGETHER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from tiny_model_server.client import channel
from tiny_model_server.client.credentials import Credentials

with ThreadPoolExecutor(2) as threads:
    for _ in range(1500):
        keys = [channel.ChannelKey(sys.argv[1], Credentials(), generation=number) for number in range(2)]
        both = [channel.shared(key) for key in keys]
        found = list(threads.map(lambda one: one.health_check()(timeout=10)[0].status, both))
        assert found == [1, 1]
        for one in both:
            assert one.drop(clients=1)  # closed
"""


def test_clients_of_one_process_that_open_together(server: Server) -> None:
    target = Target([server.address]).current()
    command = [sys.executable, "-c", CLIENTS_THAT_OPEN_TOGETHER, target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_images_of_other_libraries(server: Server) -> None:
    from PIL import Image

    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert np.array_equal(server.client("echo").run_image(image), np.asarray(image))  # type: ignore[arg-type]


OLDEST_PROTOBUF = "4.25.8" if sys.version_info < (3, 14) else "5.28.3"


@pytest.mark.parametrize("protobuf", [OLDEST_PROTOBUF, "5.29.5", "6.33.5", "7.36.2"])
def test_protobuf_versions(server: Server, protobuf: str, tmp_path: Path) -> None:
    """The client beside other versions of protobuf; only they and the client's files are on the path."""
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*uv, f"protobuf=={protobuf}"], check=True, timeout=100)
    code = (
        "import sys, numpy, google.protobuf, model_client\n"
        f"assert google.protobuf.__version__ == '{protobuf}', google.protobuf.__version__\n"
        f"client = model_client.ModelClient('echo', addresses=['{server.address}'])\n"
        "image = numpy.arange(12, dtype='float32').reshape(2, 2, 3)\n"
        "assert (client.run_image(image) == image).all()\n"
        "assert client.run_batch([{'a': image}])[0]['a'].dtype == image.dtype\n"
        "assert client.health_check()['serving']\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'cv2', 'torch', 'onnxruntime'}))\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"  # an application needs none of these


def test_models_folder_is_where_the_tests_think(server: Server) -> None:
    names = [model["name"] for model in server.client().list_models()]
    assert names == sorted(path.name for path in MODELS.iterdir() if (path / "__init__.py").exists())


def test_errors_can_be_pickled(server: Server) -> None:
    with pytest.raises(model_client.ModelNotFound) as caught:
        server.client("nobody").run_text("x")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.code(), again.details()) == (caught.value.code(), caught.value.details())
