"""The Node.js example, installed from npm, against a real server: plain, with a token, and over TLS."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, Server
from tests.test_security import Certificates, tls

NEEDED = [tool for tool in ("node", "npm") if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(NEEDED), reason=f"not installed here: {', '.join(NEEDED)}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, with what it needs, in a folder of its own beside server.proto."""
    folder = tmp_path_factory.mktemp("application")
    shutil.copy(ROOT / "server.proto", folder)
    example = shutil.copytree(
        ROOT / "examples" / "node", folder / "examples" / "node", ignore=shutil.ignore_patterns("node_modules")
    )
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(install, cwd=example, check=True, timeout=120)
    return Path(example) / "client.js"


def run(client: Path, *arguments: str, **env: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {name: str(value) for name, value in env.items()}
    command = ["node", str(client), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_images_and_texts(client: Path, server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.full((4, 6, 3), 7, np.uint8))
    ran = run(client, server.address, "describe", "image", str(photo))
    assert json.loads(ran.stdout)["shape"] == [4, 6, 3]
    ran = run(client, server.address, "echo", "text", "Grüße")
    assert json.loads(ran.stdout) == "Grüße"
    ran = run(client, server.address, "nobody", "text", "x")
    assert ran.returncode == 1
    assert ran.stderr.startswith("NOT_FOUND: there is no model 'nobody'")


def test_token_and_tls(client: Path, start_server: Callable[..., Server], tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = start_server(**tls(certificates.issue("server", "127.0.0.1")), TMS_TOKEN="sesame")
    ran = run(client, server.address, "echo", "text", "x", TMS_TLS_CA=certificates.ca, TMS_TOKEN="sesame")
    assert ran.stdout == '"x"\n', ran.stderr
    ran = run(client, server.address, "echo", "text", "x", TMS_TLS_CA=certificates.ca)
    assert "\nUNAUTHENTICATED: send the server's token" in f"\n{ran.stderr}"
