"""The package as it is installed: the client alone with little, the server with its extra and its command."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_model_server
from tests.conftest import MODELS, ROOT, Server
from tests.engine import copy_tree
from tests.test_faults import ANSWERS, write_model

pytestmark = pytest.mark.timeout(300)
UV = [sys.executable, "-m", "uv"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    tree = copy_tree(folder / "tree")
    subprocess.run([*UV, "build", "--quiet", "--wheel", "--out-dir", folder, tree], check=True, timeout=280)
    (built,) = folder.glob("*.whl")
    assert built.name.startswith(f"tiny_model_server-{tiny_model_server.__version__}-")
    return built


def environment(folder: Path, *requirements: str) -> Path:
    """The folder of programs of a new virtual environment with these requirements, installed in this order."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [*UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    for requirement in requirements:
        subprocess.run([*install, *requirement.split()], check=True, timeout=280)
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the server."""
    return environment(tmp_path_factory.mktemp("installed") / "venv", f"{wheel}[server]")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("TMS_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_client_alone(wheel: Path, server: Server, tmp_path: Path) -> None:
    programs = environment(tmp_path / "venv", str(wheel))
    code = (
        "import numpy, model_client\n"
        "with model_client.ModelClient('echo') as client:\n"
        "    print(client.run_image(numpy.zeros((2, 2), 'uint8')).shape)\n"
        "from importlib.metadata import distributions\n"
        "print(sorted({one.name.lower() for one in distributions()}))\n"
    )
    ran = run(programs / "python", "-c", code, cwd=tmp_path, TMS_ADDRESS=server.address)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "(2, 2)"
    assert ran.stdout.splitlines()[1] == str(["grpcio", "numpy", "protobuf", "tiny-model-server", "typing_extensions"])
    ran = run(programs / "tiny-model-server", cwd=tmp_path)
    assert ran.returncode == 2
    assert "the server needs: pip install 'tiny-model-server[server]'" in ran.stderr


def test_the_server(installed: Path, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """All is installed: the folder is empty, and the models are elsewhere."""
    command, empty = installed / "tiny-model-server", tmp_path / "empty"
    empty.mkdir()
    models = write_model(tmp_path / "elsewhere", "mine", ANSWERS.format("here") + "\n    example = 'x'")
    for name in ("echo", "batches", "tokens", "misbehave"):
        shutil.copytree(MODELS / name, models / name)
    assert run(command, "--version", cwd=empty).stdout.strip() == tiny_model_server.__version__
    env = {"TMS_MODELS_DIR": str(models)}
    listed = run(command, "list", cwd=empty, **env).stdout.splitlines()
    assert [line.partition("\t")[0] for line in listed] == ["batches", "echo", "mine", "misbehave", "tokens"]
    checked = run(command, "check", "mine", cwd=empty, **env)
    assert checked.returncode == 0, checked.stderr
    assert "answers its example with 'here'" in checked.stdout
    server = start_server(models, command=[command], cwd=empty)
    assert run(command, "health", cwd=empty, TMS_PORT=str(server.port)).returncode == 0
    shutil.copy(ROOT / "tests" / "everywhere" / "calls.py", empty)
    for way, local in (("same host", "1"), ("gRPC", "0")):
        ran = run(installed / "python", "calls.py", server.address, way, cwd=empty, TMS_LOCAL_TRANSPORT=local)
        assert ran.returncode == 0, ran.stderr
    assert server.client("mine").run_text("x") == "here"
    assert server.stop() == 0


def test_what_the_package_brings(wheel: Path, tmp_path: Path) -> None:
    """The contract, and the folders that new models begin as, though neither is a module."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert file.read("tiny_model_server/server.proto") == (ROOT / "server.proto").read_bytes()
    templates = ROOT / "tiny_model_server" / "templates"
    committed = [path for path in templates.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in committed} <= set(names)


def test_a_folder_of_models_becomes_an_image_without_a_clone(
    wheel: Path, installed: Path, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Each step of the Dockerfile, done in a folder and an environment, as test_docker.py needs an engine."""
    project = tmp_path / "project"
    (project / "wheels").mkdir(parents=True)
    shutil.copy(wheel, project / "wheels")
    for name in ("mine", "own"):
        made = run(installed / "tiny-model-server", "new", name, cwd=project)
        assert made.returncode == 0, made.stderr
        (project / "models" / name / "requirements.txt").write_text("h11\n")
    (project / "models" / "_shared").mkdir()
    (project / "models" / "_shared" / "requirements.txt").write_text("h11\n")
    (project / "models" / "own" / ".venv").mkdir()
    command = [installed / "tiny-model-server", "dockerfile", "--wheel", f"wheels/{wheel.name}"]
    printed = run(*command, cwd=project)
    assert printed.returncode == 0, printed.stderr
    image = Image(tmp_path / "image", project)
    image.build(printed.stdout)
    assert image.user == "10001"
    server = start_server(image.app / "models", command=[image.programs / image.command[0], *image.command[1:]],
                          cwd=image.app)  # fmt: skip
    assert [server.client(name).run_text("a b") for name in ("mine", "own")] == [{"words": 2}] * 2
    assert "python:3." in printed.stdout
    assert '-r "/tmp/_shared.txt" -r "/tmp/mine.txt"' in printed.stdout
    released = run(installed / "tiny-model-server", "dockerfile", cwd=project).stdout
    assert f'RUN pip install "tiny-model-server[server]=={tiny_model_server.__version__}"\n' in released
    assert "@" not in released


class Image:
    """What a Dockerfile makes, below a folder: its /app, and an environment in the place of the image's Python."""

    def __init__(self, root: Path, context: Path) -> None:
        self.app, self.user, self.command = root / "app", "", [""]
        self._root, self._context = root, context
        self.programs = environment(root / "python")
        (root / "tmp").mkdir()
        self.app.mkdir()
        pip = self.programs / "pip"
        pip.write_text(f'#!/bin/sh\nexec {shlex.join(UV)} pip "$@" --quiet --python {self.programs / "python"}\n')
        pip.chmod(0o755)

    def build(self, text: str) -> None:
        for line in text.splitlines():
            step, _, rest = line.partition(" ")
            if step == "COPY":
                self._copy(*json.loads(rest))
            elif step == "RUN" and not rest.startswith("useradd"):
                self._run(rest.replace("/tmp/", f"{self._root}/tmp/"))
            elif step == "USER":
                self.user = rest
            elif step == "CMD":
                self.command = json.loads(rest)

    def _copy(self, source: str, target: str) -> None:
        place = self._root / target[1:] if target.startswith("/") else self.app / target
        if source.endswith("/"):
            shutil.copytree(self._context / source, place, symlinks=True)
        else:
            shutil.copy(self._context / source, place)

    def _run(self, command: str) -> None:
        env = os.environ | {"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "TORCH_INDEX": ""}
        subprocess.run(["sh", "-ec", command], cwd=self.app, env=env, check=True, timeout=280)


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
