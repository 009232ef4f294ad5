"""The client beside old and new packages, and client and server on other systems, which are simulated.

What is the same on every Python is tried by ``make pythons``, which runs the core of these tests on each.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from model_client import DeadlineExceeded, ModelFailed
from tests.conftest import MODELS, ROOT, Server
from tests.test_package import environment

CALLS = ROOT / "tests" / "everywhere" / "calls.py"
SITE = ROOT / "tests" / "everywhere" / "site"
# The oldest that have wheels; where the Python is as old as they are, these are the lower bounds in pyproject.toml.
OLDEST = {
    (3, 11): ("grpcio==1.60.2", "protobuf==4.25.8", "numpy==1.24.4"),
    (3, 12): ("grpcio==1.60.2", "protobuf==4.25.8", "numpy==1.26.4"),
    (3, 13): ("grpcio==1.66.2", "protobuf==4.25.8", "numpy==2.1.3"),
    (3, 14): ("grpcio==1.75.1", "protobuf==5.28.3", "numpy==2.3.3"),
    (3, 15): ("grpcio==1.85.1", "protobuf==5.28.3", "numpy==2.5.2"),
}
WAYS = {"same host": "1", "gRPC": "0"}

pytestmark = pytest.mark.timeout(300)


def python(*command: str | Path, interpreter: str | Path = sys.executable, **env: str) -> str:
    """What a Python with this project on its path printed; it must end well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TMS_")}
    path = os.pathsep.join([*filter(None, [env.pop("PYTHONPATH", "")]), str(ROOT)])
    ran = subprocess.run(
        [str(interpreter), *map(str, command)],
        env=kept | env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def simulated(system: str) -> dict[str, str]:
    """The variables by which a Python, and those that it starts, act as that system."""
    return {"PYTHONPATH": str(SITE), "SIMULATED_SYSTEM": system}


@pytest.fixture(scope="module", params=["oldest", "newest"])
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with only what the client needs."""
    oldest = OLDEST[sys.version_info[:2]]
    needed = {"oldest": oldest, "newest": [one.partition("=")[0] for one in oldest]}[request.param]
    return environment(tmp_path_factory.mktemp("packages") / "venv", " ".join(needed)) / "python"


@pytest.mark.parametrize("way", WAYS)
def test_the_client_beside_old_and_new_packages(server: Server, packages: Path, way: str) -> None:
    assert "answered" in python(CALLS, server.address, way, interpreter=packages, TMS_LOCAL_TRANSPORT=WAYS[way])


def test_the_oldest_packages_are_the_lower_bounds() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = [one.replace("==", ">=").rpartition(".")[0] for one in OLDEST[3, 11]]
    assert [one for one in needed if ";" not in one] == oldest
    assert [one for one in needed if ";" in one] == ["protobuf>=5.28; python_version >= '3.14'"]


@pytest.mark.parametrize("way", WAYS)
def test_no_call_of_the_client_warns(server: Server, way: str) -> None:
    assert "answered" in python("-W", "error", CALLS, server.address, way, TMS_LOCAL_TRANSPORT=WAYS[way])


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_client_on_other_systems(server: Server, system: str) -> None:
    """All calls go by gRPC there, and a ``shared_array`` is an array as others are."""
    assert "answered" in python("-W", "error", CALLS, server.address, "gRPC", **simulated(system))
    code = "import model_client; print(model_client.shared_array((2, 3)).flags.owndata)"
    assert python("-c", code, **simulated(system)) == "True\n"


def test_every_module_can_be_imported_on_macos() -> None:
    modules = ["server", "model_client", "model_interface"]
    for file in sorted((ROOT / "tiny_model_server").rglob("[!_]*.py")):
        if file.parent.name != "worker_path":  # what stands there for others is imported by their names
            modules.append(".".join(file.relative_to(ROOT).with_suffix("").parts))
    python("-W", "error", "-c", f"import {', '.join(modules)}", **simulated("macos"))


def test_the_server_on_macos(start_server: Callable[..., Server], tmp_path: Path) -> None:
    for name in ("echo", "batches", "tokens", "misbehave"):
        (tmp_path / name).symlink_to(MODELS / name)
    server = start_server(tmp_path, **simulated("macos"))
    assert any("serving 4 models" in line and "FAILED" not in line for line in server.log), server.log
    assert "answered" in python(CALLS, server.address, "gRPC")
    assert "answered" in python(CALLS, server.address, "gRPC", **simulated("macos"))
    with server.client("misbehave") as client:
        with pytest.raises(ModelFailed, match="exited with code 7"):
            client.run(1, {"do": "die"})
        with pytest.raises(DeadlineExceeded, match="took longer"):
            client.run(1, {"do": "hang"})
        assert client.run(1)["pid"]
    assert server.stop() == 0
    assert not [line for line in server.log if "Errno" in line or "NameError" in line or "AttributeError" in line]
