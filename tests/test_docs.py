"""Every code block and command of the README and of docs/, run as a reader would, in a copy of the tree."""

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

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
FILE = re.compile(r"`(models/\w+/__init__\.py)`")
SERVE = re.compile(r"((?:TMS_\w+=\S+ )*)(?:python server\.py|tiny-model-server)((?: serve| --).*)?")
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
    "pip install tiny-model-server": "test_package.py: test_the_client_alone",
    "pip install 'tiny-model-server[server]'": "test_package.py: test_the_server",
    "docker build -t my-models .": "test_package.py: each step of the Dockerfile",
    "docker run --rm --init -p 50000:50000 -p 8080:8080 my-models": "the same",
}
APPLICATION = "from model_client import ModelClient\nassert ModelClient('example').run_text('a b') == {'words': 2}\n"


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[bytes] | None = None
        path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("TMS_")}
        self.env |= {"PATH": path, "PYTHONPATH": str(folder), "VENV": sys.prefix, "TMS_HOST": "127.0.0.1"}
        self.env["TMS_DRAIN_DELAY_S"] = "0"  # the pages stop servers often

    def read(self, page: str) -> None:
        if blocks := [block for block in BLOCK.finditer(page) if block[2] != "text"]:
            self.serve()
        for block in blocks:
            kind, text = block[2], textwrap.dedent(block[3])
            if kind == "sh":
                for line in text.splitlines():
                    self.command(re.sub(r"\s+#.*", "", line).strip())
            elif "class Model(" in text or FILE.search(page[: block.start()][-80:]):
                file = self.folder / FILE.findall(page[: block.start()])[-1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            else:
                assert kind == "python", f"no test knows how to run {kind}"
                self.run([sys.executable, "-W", "error", "-c", text])

    def command(self, line: str) -> None:
        line = line.replace(" -t 10s ", " -t 3s ")  # a shorter load test
        if found := SERVE.fullmatch(line):
            self.serve(*(found[2] or "").split(), **dict(setting.split("=") for setting in found[1].split()))
        elif line.startswith(("npm", "node")) and not shutil.which("npm"):
            pass  # test_node.py reports that it is missing
        elif line not in ELSEWHERE:
            assert not line.startswith(("docker", "kubectl")), f"which test runs {line!r}?"
            self.run(["bash", "-euo", "pipefail", "-c", line])

    def run(self, command: list[str]) -> None:
        ran = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, f"{command[-1]}\n{ran.stdout}{ran.stderr}"
        if printed := re.findall(r"print\(.*\)  # (.*)", command[-1]):
            assert ran.stdout.splitlines() == printed

    def serve(self, *flags: str, **settings: str) -> None:
        self.stop()
        ca = self.folder / "ca.pem" if "TMS_TLS_CERT" in settings else None
        for _ in range(5):  # the docs' port may be what another process's connection happens to have
            command = [sys.executable, "server.py", *flags]
            self.server = subprocess.Popen(command, cwd=self.folder, env=self.env | settings)
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
    Certificates(folder).issue("server", "localhost")
    (folder / "application.py").write_text(APPLICATION)
    command = folder / "bin" / "tiny-model-server"  # as pip installs it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tiny_model_server "$@"\n')
    command.chmod(0o755)
    made = Reader(folder)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.usefixtures("default_ports")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    with reader(tmp_path) as one:
        one.read(page.read_text())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", [*PAGES, ROOT / "BENCHMARKS.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), f"{target}#{anchor}"


def anchors(page: str) -> list[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    return [
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", page, re.M)
    ]


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in readme] == []


def test_commands_of_other_tests_are_still_in_the_docs() -> None:
    pages = "\n".join(page.read_text() for page in PAGES)
    assert all(command in pages for command in ELSEWHERE)
    assert shutil.which("make")
