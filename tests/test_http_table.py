"""The table of commands in docs/http.md: each runs as it stands there, with the real curl."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, Server

PAGE = (ROOT / "docs" / "http.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `(curl [^|]+)` \| ([^|]+) \|$", PAGE, re.M)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
MODELS = re.findall(r"`models/(\w+)/__init__\.py`", PAGE)
CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and the models that the page names."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("example", "edges"):
        shutil.copytree(ROOT / "models" / name, folder / "models" / name)
    for name, code in zip(MODELS, BLOCKS, strict=False):
        (folder / "models" / name).mkdir()
        (folder / "models" / name / "__init__.py").write_text(code)
    subprocess.run([sys.executable, "-c", textwrap.dedent(BLOCKS[-1])], cwd=folder, check=True)
    cv2.imwrite(str(folder / "cat.jpg"), np.full((48, 64, 3), 90, np.uint8))
    return folder


@pytest.fixture(scope="module")
def commanded(folder: Path) -> Iterator[Server]:
    server = Server(folder / "models")
    yield server
    server.kill()


def test_the_table_is_complete() -> None:
    """Each kind of body and answer is in it."""
    commands = "\n".join(command for _, command, _ in ROWS)
    assert len(ROWS) == PAGE.count("| `curl ") >= 20
    for part in ("x-npy'", "x-npz'", "image/png", "image/jpeg", "event-stream", "args=", "gzip", "X-Request-Id"):
        assert part in commands
    assert len(BLOCKS) == len(MODELS) + 1


@pytest.mark.skipif(not CURL, reason="curl is not installed here")
@pytest.mark.parametrize(("what", "command", "answer"), ROWS, ids=[row[0] for row in ROWS])
def test_the_command(commanded: Server, folder: Path, what: str, command: str, answer: str) -> None:
    line = command.replace("localhost:8080", f"localhost:{commanded.http_port}")
    line = line.replace("curl ", "curl -sS -D headers ", 1)
    ran = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
    headers = (folder / "headers").read_text().lower()
    assert headers.startswith("http/1.1 200"), ran.stdout
    kind = "application/json" if answer.startswith(("JSON", "`")) else answer
    assert f"content-type: {kind}" in headers
    if answer.startswith("`"):
        assert json.loads(ran.stdout) == json.loads(answer.strip("`"))
    elif answer == "JSON":
        assert json.loads(ran.stdout)
    if "X-Request-Id" in command:
        assert "x-request-id: job-17" in headers
    if "--compressed" in command:
        assert "content-encoding: gzip" in headers
    if file := re.search(r"-o (\S+)", command):
        content = (folder / file[1]).read_bytes()
        begins = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "npy": b"\x93NUMPY", "npz": b"PK"}
        assert content.startswith(begins[file[1].rpartition(".")[2]])
    if "text/event-stream" in command:
        assert ran.stdout == 'data: "a"\n\ndata: "b"\n\nevent: end\ndata: null\n\n'
