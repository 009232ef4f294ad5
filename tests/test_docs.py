"""Every code block and command of the pages in docs/, run as a reader would, in a copy of the tree."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from model_client import DeadlineExceeded, ModelClient, ServerUnavailable
from tests.conftest import ROOT
from tests.engine import copy_tree
from tests.test_security import Certificates

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
FILE = re.compile(r"`(models/\w+/__init__\.py)`")
SERVE = "python server.py"
ELSEWHERE = {  # commands that need an engine, a cluster or a network, and the test that runs them
    "make docker": "test_docker.py: the same build, without torch",
    "make docker DOCKER_FLAGS='--build-arg TORCH_INDEX='": "test_docker.py: built with these flags",
    "make run_docker_server": "test_docker.py: test_make_run_docker_server",
    'docker run --rm -p 50000:50000 -v "$PWD/models:/app/models:ro" tiny-model-server': "test_docker.py: mounted",
    "docker compose -f examples/monitoring/compose.yaml up": "test_monitoring.py: what it mounts, and all queries",
    "kubectl apply -k k8s/": "make test_k8s",
    "kubectl apply -k k8s/overlays/gpu": "test_manifests.py: no node here has a GPU",
    "kubectl apply -k k8s/overlays/queue": "test_manifests.py: KEDA is not to be had here",
    "make ray": "test_ray.py",
    "make run": "what a new clone is tried with",
    "make run TORCH_INDEX=https://download.pytorch.org/whl/cpu": "the same; that index is not to be had here",
    "make test": "CI",
}


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("TMS_")}
        self.env |= {"PATH": path, "PYTHONPATH": str(folder), "VENV": sys.prefix, "TMS_HOST": "127.0.0.1"}

    def read(self, page: str) -> None:
        if SERVE not in page.replace(f"{SERVE} check", ""):
            self.serve()
        for block in BLOCK.finditer(page):
            kind, text = block[2], textwrap.dedent(block[3])
            if kind == "sh":
                for line in text.splitlines():
                    self.command(re.sub(r"\s+#.*", "", line).strip())
            elif "class Model(" in text:
                file = self.folder / FILE.findall(page[: block.start()])[-1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            else:
                assert kind == "python", f"no test knows how to run {kind}"
                self.run([sys.executable, "-c", text])

    def command(self, line: str) -> None:
        if line.endswith(SERVE):
            self.serve(**dict(setting.split("=") for setting in line.removesuffix(SERVE).split()))
        elif line not in ELSEWHERE:
            assert not line.startswith(("docker", "kubectl")), f"which test runs {line!r}?"
            self.run(["bash", "-euo", "pipefail", "-c", line])

    def run(self, command: list[str]) -> None:
        ran = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, f"{command[-1]}\n{ran.stdout}{ran.stderr}"
        if "# " in command[-1] and "print(" in command[-1]:  # print(...)  # what is printed
            said = re.findall(r"print\(.*\)  # (.*)", command[-1])
            assert ran.stdout.splitlines() == said

    def serve(self, **settings: str) -> None:
        self.stop()
        ca = self.folder / "ca.pem" if "TMS_TLS_CERT" in settings else None
        for _ in range(5):  # the docs' port may be what another process's connection happens to have
            self.server = subprocess.Popen([sys.executable, "server.py"], cwd=self.folder, env=self.env | settings)
            with ModelClient("", "localhost", 50000, ca=ca, token=settings.get("TMS_TOKEN", "")) as client:
                while self.server.poll() is None:
                    try:
                        client.list_models(timeout=1)
                        return
                    except (ServerUnavailable, DeadlineExceeded):
                        pass
            time.sleep(1)
        raise AssertionError("the server does not start")

    def stop(self) -> None:
        if self.server:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(20)


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    copy_tree(folder, "example")
    (folder / "tests").symlink_to(ROOT / "tests")
    cv2.imwrite(str(folder / "cat.jpg"), np.full((48, 64, 3), 90, np.uint8))
    made = Reader(folder)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    with reader(tmp_path) as one:
        one.read(page.read_text())


def test_the_readmes_commands(tmp_path: Path) -> None:
    """Its Python is run by test_client_ways.py (the calls) and test_cli.py (the model)."""
    text = (ROOT / "README.md").read_text()
    with reader(tmp_path) as one:
        certificates = Certificates(tmp_path)
        certificates.issue("server", "localhost")
        application = (
            "from model_client import ModelClient\nassert ModelClient('example').run_text('a b') == {'words': 2}\n"
        )
        (tmp_path / "application.py").write_text(application)
        (model,) = [block[3] for block in BLOCK.finditer(text) if "self.greeting" in block[3]]
        (tmp_path / "models" / "greeter").mkdir()
        (tmp_path / "models" / "greeter" / "__init__.py").write_text(model)
        one.serve()
        for block in BLOCK.finditer(text):
            for line in block[3].splitlines() if block[2] == "sh" else []:
                if line.startswith(("npm", "node")) and not shutil.which("npm"):
                    continue  # test_node.py tells that it is missing
                one.command(re.sub(r"\s+#.*", "", line).strip())
            if "application.py" in block[3]:
                one.serve()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "BENCHMARKS.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        if target and not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_commands_of_other_tests_are_still_in_the_docs() -> None:
    pages = "\n".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    assert all(command in pages for command in ELSEWHERE)
    assert shutil.which("make")
