"""``make pythons``: the core of the tests on every other Python that is on this machine, or can be had from a package.

A Python is looked for on the PATH and in pyenv. Where Pythons are missing, root installs Debian's newest release with
them into a folder (mmdebstrap). Their tests run in that folder, with the machine's network, users and processes. A
Python that cannot be had is skipped with the reason. Environments stay in build/pythons for the next time.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "pythons"
VERSIONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
CORE = [
    "tests/test_codec.py",
    "tests/test_calls.py",
    "tests/test_client.py",
    "tests/test_everywhere.py::test_the_client_beside_old_and_new_packages",
    "tests/test_everywhere.py::test_no_call_of_the_client_warns",
    # These depend on gRPC and protobuf alone.
    "--deselect=tests/test_client.py::test_clients_of_one_process_that_open_together",
    "--deselect=tests/test_client.py::test_protobuf_versions",
]
REQUIREMENTS = ["requirements.txt", "tests/requirements-core.txt"]
MODELS = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("models/*/requirements.txt"))
AT_ONCE = 2
_DEBIAN = BUILD / "sid"
_UV = BUILD / "uv"  # a copy, for Debian's folder shows nothing but this tree
_AUTHORITIES = ["PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]
_DEBIAN_S, _INSTALL_S, _TESTS_S = 300, 600, 1200  # on a busy machine


class Missing(Exception):
    """A Python that cannot be had here; the text says why."""


class Python:
    """One interpreter, and how commands are run with it."""

    def __init__(self, version: str, program: str, inside: Path | None = None) -> None:
        self.version = version
        self._program = program
        self._inside = inside
        self.log = BUILD / f"{version}.log"

    def run(self, *command: str, limit_s: float) -> bool:
        """True if the command ended well in time; what it prints goes to the log."""
        other = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        env = {name: value for name, value in os.environ.items() if name not in other}
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*self._way(), *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=env | {"UV_CACHE_DIR": str(BUILD / "cache")},
            )
            try:
                return process.wait(limit_s) == 0
            except subprocess.TimeoutExpired:
                log.write(f"took longer than {limit_s:g} s\n".encode())
                os.killpg(process.pid, 9)
                process.wait()
                return False

    def _way(self) -> list[str]:
        """In a folder of its own: mounts that vanish with the last process that sees them."""
        if not self._inside:
            return []
        mounts = " && ".join(f'mount --rbind "{place}" "$0{place}"' for place in ("/proc", "/dev", "/sys", str(ROOT)))
        enter = f'{mounts} && exec chroot "$0" sh -c \'cd "$0" && exec "$@"\' "{ROOT}" "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", enter, str(self._inside)]

    def environment(self) -> str | None:
        """The program of its environment with what the core tests need; None if that cannot be installed."""
        folder = BUILD / self.version
        program = str(folder / "bin" / "python")
        made = os.path.lexists(program) or self.run(
            self._program, "-m", "venv", "--without-pip", str(folder), limit_s=60
        )
        return program if made and self.install(program, *REQUIREMENTS) else None

    def install(self, program: str, *files: str, option: str = "--quiet") -> bool:
        """True if what these files name can be installed, with an option of uv."""
        needed = [part for file in files for part in ("-r", file)]
        return self.run(str(_UV), "pip", "install", option, "--python", program, *needed, limit_s=_INSTALL_S)


@cache
def on_this_machine(version: str) -> str | None:
    """The program of an interpreter of this version that is on the PATH or in pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    programs = [*sorted(map(str, pyenv.glob(f"{version}.*/bin/python"))), shutil.which(f"python{version}")]
    for program in filter(None, programs):
        ran = subprocess.run([program, "-c", "import venv, ensurepip"], capture_output=True, check=False, timeout=60)
        if ran.returncode == 0:
            return program
    return None


def from_debian(versions: Sequence[str]) -> Path:
    """A folder with Debian's newest release, and with those of these Pythons that Debian has."""
    if all((_DEBIAN / "usr" / "bin" / f"python{version}").exists() for version in versions):
        return _DEBIAN
    if os.geteuid() or not all(map(shutil.which, ("mmdebstrap", "unshare", "chroot"))):
        raise Missing("not on the PATH and not in pyenv; only root with mmdebstrap can get it from Debian")
    shutil.rmtree(_DEBIAN, ignore_errors=True)
    command = ["mmdebstrap", "--quiet", "--variant=minbase", '--aptopt=Acquire::Check-Valid-Until "false"']
    for version in versions:
        command.append(f'--customize-hook=chroot "$1" apt-get install --quiet --yes python{version}-venv || true')
    try:
        ran = subprocess.run(
            [*command, "sid", str(_DEBIAN)], capture_output=True, text=True, check=False, timeout=_DEBIAN_S
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"mmdebstrap took longer than {_DEBIAN_S} s") from None
    if ran.returncode:
        shutil.rmtree(_DEBIAN, ignore_errors=True)
        lines = [line for line in ran.stderr.splitlines() if line.startswith("E:")]
        raise Missing("; ".join(lines[:3]) or f"mmdebstrap ended with {ran.returncode}")
    for place in ("/proc", "/dev", "/sys", str(ROOT)):
        (_DEBIAN / place[1:]).mkdir(parents=True, exist_ok=True)
    authorities = [os.environ[name] for name in _AUTHORITIES if name in os.environ]
    for file in {"/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt", *authorities}:
        if Path(file).is_file():
            (_DEBIAN / file[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, _DEBIAN / file[1:])
    return _DEBIAN


def find(version: str, debian: Callable[[], Path]) -> Python:
    """The interpreter of this version; Missing says why there is none."""
    if program := on_this_machine(version):
        return Python(version, program)
    program, folder = f"/usr/bin/python{version}", debian()
    if not (folder / program[1:]).exists():
        raise Missing(f"Debian has no python{version}-venv")
    return Python(version, program, folder)


def core_tests(version: str, debian: Callable[[], Path], tests: Sequence[str]) -> str:
    """The outcome of the core tests on this Python. It begins with "passed", "FAILED" or "skipped"."""
    begun = time.monotonic()
    try:
        python = find(version, debian)
    except Missing as why:
        return f"skipped: {why}"
    python.log.write_bytes(b"")
    if not (program := python.environment()):
        return f"FAILED: requirements cannot be installed, see {python.log}"
    if not python.install(program, *MODELS, option="--dry-run"):
        return f"FAILED: the models' requirements have no wheels, see {python.log}"
    good = python.run(program, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, limit_s=_TESTS_S)
    text = python.log.read_text(errors="replace")
    counts = re.findall(r"^(?:=+ )?(\d+ .* in [\d.]+s.*?)(?: =+)?$", text, re.MULTILINE)
    took = f"{counts[-1] if counts else 'no summary'}; {time.monotonic() - begun:.0f} s in all"
    if not good:
        print(f"---- {version}: the end of {python.log}", *text.splitlines()[-60:], sep="\n", flush=True)
    return f"{'passed' if good else 'FAILED'}: {took}"


def main() -> int:
    """Prints a line for each Python; 1 if the tests fail on one of them."""
    own = ".".join(map(str, sys.version_info[:2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--versions", default=",".join(one for one in VERSIONS if one != own))
    parser.add_argument("tests", nargs="*", default=CORE)
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.copy2(Path(sys.prefix) / "bin" / "uv", _UV)
    versions = sorted(options.versions.split(","), key=lambda version: on_this_machine(version) is None)
    missing = [version for version in versions if not on_this_machine(version)]
    failed = False
    with ThreadPoolExecutor(AT_ONCE) as threads:
        # Debian is made while those tests run whose Pythons are here.
        debian = threads.submit(from_debian, missing)
        every = threads.map(lambda version: core_tests(version, debian.result, options.tests), versions)
        for version, came in zip(versions, every, strict=True):
            print(f"Python {version}: {came}", flush=True)
            failed = failed or came.startswith("FAILED")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
