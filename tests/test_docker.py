"""The image, built and run by a real Docker engine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from model_client import ModelClient
from tests import engine
from tests.conftest import ROOT, wait_for
from tests.engine import docker
from tests.test_faults import ANSWERS, write_model

pytestmark = [
    pytest.mark.skipif(bool(engine.missing()), reason=engine.missing()),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running engine, and the tree whose image it has built; digits is left out, for its torch is not to be had."""
    folder = tmp_path_factory.mktemp("docker")
    with engine.running(folder):
        engine.make_base(folder)
        tree = engine.copy_tree(folder / "tree", "example", "edges", "digits_onnx")
        docker("build", "--build-arg", "TORCH_INDEX=", "-t", "tiny-model-server", str(tree))
        yield tree


def address_of(container: str) -> str:
    return docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", container) + ":50000"


def test_the_image_is_small_and_safe(tree: Path) -> None:
    facts = json.loads(docker("inspect", "tiny-model-server"))[0]
    base = json.loads(docker("inspect", engine.BASE))[0]
    assert facts["Config"]["User"] == "10001"
    assert facts["Size"] - base["Size"] < 600e6
    which = "import shutil; print([tool for tool in ('gcc', 'cc', 'make', 'git') if shutil.which(tool)])"
    assert docker("run", "--rm", "tiny-model-server", "python", "-c", which) == "[]"
    files = docker("run", "--rm", "tiny-model-server", "ls", "-A", "/app").split()
    assert "tests" not in files
    assert ".git" not in files


def test_it_serves_read_only_and_stops_cleanly(tree: Path) -> None:
    options = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    container = docker("run", "-d", *options, "tiny-model-server")
    health = "{{.State.Health.Status}}"
    with ModelClient("edges", addresses=[address_of(container)]) as client:
        assert client.run_image_to_image(np.zeros((8, 8, 3), np.uint8)).shape == (8, 8)
        photo = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
        assert client.run_image_to_image(photo).shape == (16, 16)
        states = {model["name"]: model["state"] for model in client.list_models()}
        assert states == dict.fromkeys(["digits_onnx", "edges", "example"], "READY")
    assert docker("exec", container, "python", "server.py", "health") == '{"ready": true}'
    wait_for(lambda: docker("inspect", "-f", health, container) == "healthy", "the health check", timeout=40)
    begun = time.monotonic()
    docker("stop", container)
    assert time.monotonic() - begun < 8
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container) == "0"
    assert "stopped" in docker("logs", container)


def test_a_mounted_models_folder(tree: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "mounted", ANSWERS.format("from outside"))
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    tmp_path.parent.parent.chmod(0o755)
    container = docker("run", "-d", "-v", f"{tmp_path}:/app/models:ro", "tiny-model-server")
    with ModelClient("mounted", addresses=[address_of(container)]) as client:
        assert client.run_text("x") == "from outside"
        assert [model["name"] for model in client.list_models()] == ["mounted"]


def test_a_change_of_code_installs_nothing_again(tree: Path) -> None:
    def layers() -> list[str]:
        return list(json.loads(docker("inspect", "tiny-model-server"))[0]["RootFS"]["Layers"])

    before = layers()
    model = tree / "models" / "example" / "__init__.py"
    model.write_text(model.read_text() + "\n# changed\n")
    begun = time.monotonic()
    docker("build", "--build-arg", "TORCH_INDEX=", "-t", "tiny-model-server", str(tree))
    assert time.monotonic() - begun < 20
    same = sum(old == new for old, new in zip(before, layers(), strict=True))
    assert len(before) - 3 <= same < len(before)  # but the models, and what comes after


def test_the_printed_dockerfile_needs_no_clone(tree: Path, tmp_path: Path) -> None:
    """A project of its own: one model, and the server as a wheel."""

    def command(*arguments: str) -> str:
        program = [sys.executable, str(ROOT / "server.py"), *arguments]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    build = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, timeout=280)
    command("new", "mine")
    (wheel,) = tmp_path.glob("*.whl")
    printed = command("dockerfile", "--wheel", wheel.name)
    (tmp_path / "Dockerfile").write_text(re.sub("(?m)^FROM .*", f"FROM {engine.BASE}", printed))
    docker("build", "--build-arg", "TORCH_INDEX=", "-t", "my-models", str(tmp_path))
    container = docker("run", "-d", "--read-only", "--tmpfs", "/tmp", "my-models")
    with ModelClient("mine", addresses=[address_of(container)]) as client:
        assert client.run_text("three little words") == {"words": 3}
    assert docker("exec", container, "tiny-model-server", "health") == '{"ready": true}'
    assert docker("exec", container, "id", "-u") == "10001"


def test_make_run_docker_server(tree: Path) -> None:
    settings = ["PORT=50123", "HTTP_PORT=8123", "DOCKER_FLAGS=--build-arg TORCH_INDEX="]
    command = ["make", "run_docker_server", *settings]
    server = subprocess.Popen(command, cwd=tree, env=os.environ, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        with ModelClient("example", "127.0.0.1", 50123, connect_timeout=60) as client:
            assert client.run_text("three little words") == {"words": 3}
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(30)
    wait_for(lambda: not docker("ps", "-q", "--filter", "publish=50123"), "the container to be gone")
