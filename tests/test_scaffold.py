"""The first minutes: a new model's folder, its Dockerfile, the contract, and a start where something is missing."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_client import InvalidInput
from tests.conftest import ROOT, Server
from tests.test_cli import run
from tiny_model_server import scaffold

PROGRAM = str(ROOT / "server.py")


def test_each_kind_of_new_model_passes_check_at_once(tmp_path: Path) -> None:
    models = tmp_path / "made" / "models"
    assert scaffold.kinds() == ["batch", "image", "onnx", "stream", "text", "torch"]
    for kind in scaffold.kinds():
        made = run("new", f"my_{kind}", "--kind", kind, "--models", str(models))
        assert made.returncode == 0, made.stderr
        assert f"python server.py check my_{kind} --models {models}" in made.stdout
        assert ("pip install -r" in made.stdout) == (models / f"my_{kind}" / "requirements.txt").exists()
    checked = run("check", "--models", str(models), timeout=110)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for kind, line in zip(scaffold.kinds(), checked.stdout.splitlines()[:-1], strict=True):
        assert re.match(rf"my_{kind} +READY .* answers its example with [\[{{]", line)


def test_new_models_answer_and_refuse(start_server: Callable[..., Server], tmp_path: Path) -> None:
    for kind in ("text", "image", "batch", "stream"):
        assert run("new", kind, "--kind", kind, TMS_MODELS_DIR=tmp_path).returncode == 0
    server = start_server(tmp_path)
    assert server.client("text").run_text("a b") == {"words": 2}
    assert list(server.client("stream").run_stream("a b c", {"most": 2})) == ["a", "b"]
    assert [answer["best"] for answer in server.client("batch").run_batch([[1, 2, 3, 4], [9, 2, 3, 4]])] == [2, 0]
    wrong = {
        "text": (1, "data: must be a text"),
        "image": (np.zeros((2, 2)), r"uint8 of shape \[-1, -1, 3\]"),
        "batch": ([1, 2], r"data: must be an array of numbers of shape \[4\]"),
        "stream": (None, "data: must be a text"),
    }
    for name, (data, message) in wrong.items():
        with pytest.raises(InvalidInput, match=message):
            server.client(name).run(data)
    with pytest.raises(InvalidInput, match="the text has no words"):
        server.client("text").run_text("")
    with pytest.raises(InvalidInput, match="args.most: must be a whole number"):
        server.client("stream").run_text("a", {"most": "all"})


def test_a_new_model_overwrites_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "mine" / "__init__.py"
    kept.parent.mkdir()
    kept.write_text("kept")
    refused = run("new", "mine", "--models", str(tmp_path))
    assert refused.returncode == 2
    assert f"{tmp_path}/mine exists already; nothing was changed" in refused.stderr
    assert [file.read_text() for file in tmp_path.rglob("*.*")] == ["kept"]


def test_the_contract_is_printed() -> None:
    assert run("proto").stdout == (ROOT / "server.proto").read_text()


def test_without_its_packages_the_server_says_which_command_to_use() -> None:
    ran = subprocess.run([sys.executable, "-S", PROGRAM], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert re.fullmatch(r"error: No module named '\w+', in \S+; use (\S+/bin/python server.py, or )?make serve.*\n",
                        ran.stderr)  # fmt: skip


@pytest.mark.parametrize("package", ["grpc", "uvicorn", "numpy"])
def test_without_one_of_its_packages_it_says_so_too(package: str) -> None:
    arguments = ["server.py", "check", "example"]
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {arguments}; "
    code += f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert re.match(rf"error: .*\b{package}\b.*; use .*make serve", ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_python_that_is_too_old_is_named() -> None:
    code = f"import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path({PROGRAM!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert re.match(r"error: the server needs Python 3.11 or newer; \S+ is Python 3.9; use ", ran.stderr)
    assert "Traceback" not in ran.stderr


def test_the_demo_asks_no_server_but_its_own(server: Server) -> None:
    """The port of the demo's settings is another server's, which has none of the example models."""

    def demo(**settings: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("TMS_")}
        command = [sys.executable, "examples/demo.py"]
        return subprocess.run(command, cwd=ROOT, env=env | settings, capture_output=True, text=True, check=False)

    ran = demo(TMS_PORT=str(server.port), TMS_HOST="127.0.0.1")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"example: +\{'shape': \[427, 640, 3\]", ran.stdout)
    assert "language: ['en', 'de', 'es']" in ran.stdout
    ran = demo(TMS_STRICT="maybe")
    assert ran.returncode == 1
    assert "TMS_STRICT='maybe' must be 0 or 1\nthe server has ended" in ran.stderr
