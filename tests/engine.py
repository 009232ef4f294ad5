"""A Docker engine for the tests, started where one can be, and a base image made where no registry is reached."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

BASE = "python:3.11-slim"
NEEDED = ["docker", "dockerd", "containerd", "mmdebstrap", "iptables"]


def missing() -> str:
    """Why no engine can be started here; empty if one can."""
    if os.geteuid():
        return "a Docker engine is started by root"
    tools = [tool for tool in NEEDED if not shutil.which(tool)]
    return f"not installed here: {', '.join(tools)}" if tools else ""


def docker(*arguments: str, check: bool = True, timeout: float = 600) -> str:
    """What a docker command printed, errors included."""
    ran = subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ran.returncode == 0 or not check, f"docker {' '.join(arguments)}:\n{ran.stdout[-4000:]}"
    return ran.stdout.strip()


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """An engine of the test's own in ``folder``, named by DOCKER_HOST; nothing of it stays."""
    socket = folder / "docker.sock"
    os.environ["DOCKER_HOST"] = f"unix://{socket}"
    command = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "-H", f"unix://{socket}"]
    with (folder / "log").open("wb") as log:
        engine = subprocess.Popen(
            [*map(str, command), "--pidfile", str(folder / "pid"), "--bip", "10.99.0.1/24"], stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 60
        while "Server Version" not in docker("info", check=False):
            assert engine.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < end, "the engine does not answer"
            time.sleep(0.2)
        yield
    finally:
        for container in docker("ps", "-aq", check=False).split():
            docker("rm", "-f", container, check=False)
        engine.send_signal(signal.SIGTERM)
        engine.wait(60)
        del os.environ["DOCKER_HOST"]
        subprocess.run(["ip", "link", "delete", "docker0"], check=False, capture_output=True)


def make_base(folder: Path) -> None:
    """Debian with Python as the base image, with the authorities that this machine trusts."""
    tar = folder / "base.tar"
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    bootstrap = ["mmdebstrap", "--variant=minbase", f"--include={packages}", "--quiet", "bookworm", str(tar)]
    subprocess.run([*bootstrap, "/etc/apt/sources.list.d/debian.sources"], check=True, timeout=300)
    docker("import", str(tar), "debian-python")
    tar.unlink()
    context = folder / "base"
    context.mkdir()
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", context)
    (context / "Dockerfile").write_text(
        "FROM debian-python\nCOPY ca-certificates.crt /etc/ssl/certs/\n"
        "RUN ln -s python3 /usr/bin/python && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED\n"
    )
    docker("build", "-t", BASE, str(context))


def copy_tree(folder: Path, *models: str) -> Path:
    """The project as a clone has it, with these of the example models."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [file for file in listed.split("\0") if file and (ROOT / file).exists()]
    for file in files:
        if not file.startswith(("models/", "tests/")) or file.split("/")[1] in models:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
    return folder
