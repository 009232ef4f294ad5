"""Loads a server by processes of their own, all within the same seconds; for bench_gpu.py and bench_replicas.py."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402
from tests.conftest import Server, wait_for  # noqa: E402


@dataclass
class Found:
    """What some parts completed together. ``cores`` are those that the watched groups of processes used."""

    rate: float
    p50: float
    p99: float
    cores: list[float]
    extra: Any


@contextmanager
def parts(
    commands: Sequence[Sequence[object]], env: dict[str, str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes ``python COMMAND`` that are ready (see load_part.py). They end with the block."""
    with ExitStack() as stack:
        made = []
        for command in commands:
            part = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(_end, part)
            made.append(part)
        for part in made:
            if _line(part) != "ready":
                raise RuntimeError("a part did not become ready: see its error above")
        yield made


def callers(count: int, *arguments: object) -> list[list[object]]:
    """Commands of so many parts; ``load_part.call`` has the arguments."""
    return [[ROOT / "tests" / "load_part.py", *arguments]] * count


def measured(
    running: Sequence[subprocess.Popen[str]],
    seconds: float,
    watched: Sequence[Sequence[int]] = (),
    during: Callable[[float], Any] = time.sleep,
    lead_s: float = 1.0,
) -> Found:
    """Lets the parts work for so many seconds, after ``lead_s``, while ``during`` runs. ``watched`` are pids."""
    begin = time.time() + lead_s
    for part in running:
        assert part.stdin
        part.stdin.write(f"{begin} {seconds}\n")
        part.stdin.flush()
    time.sleep(lead_s)
    before = [_cpu_s(pids) for pids in watched]
    begun = time.perf_counter()
    extra = during(seconds)
    took = time.perf_counter() - begun
    cores = [(_cpu_s(pids) - was) / took for pids, was in zip(watched, before, strict=True)]
    lines = [_line(part) for part in running]
    if not all(lines):
        raise RuntimeError("a part failed: see its error above")
    found = [json.loads(line) for line in lines]
    p50, p99 = (float(np.median([one[name] for one in found])) for name in ("p50", "p99"))
    return Found(sum(one["rate"] for one in found), p50, p99, cores, extra)


def _line(part: subprocess.Popen[str]) -> str:
    assert part.stdout
    return part.stdout.readline().strip()


def _end(part: subprocess.Popen[str]) -> None:
    part.kill()
    part.communicate()


def _cpu_s(pids: Sequence[int]) -> float:
    return float(sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids))


@contextmanager
def tee(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a text to stdout, and to a file if there is to be one."""
    with ExitStack() as stack:
        files = [sys.stdout, *([stack.enter_context(path.open("w"))] if path else [])]

        def write(text: str) -> None:
            for file in files:
                file.write(text)
                file.flush()

        yield write


@contextmanager
def serving(models: Path, replicas: int = 1, **env: object) -> Iterator[Server]:
    """A server of gRPC alone whose replicas are ready; ends with the block."""
    several = {"TMS_REPLICAS": replicas} if replicas > 1 else {}
    server = Server(models, ready=False, **{"TMS_HTTP_PORT": "off", **several, **env})
    try:
        if several:
            server.port = int(server.wait_for_log(r"replicas: gRPC on ports (\d+)")[1])
            server.address = f"127.0.0.1:{server.port}"
        wait_for(lambda: sum("serving" in line for line in server.log[:]) >= replicas, "every replica", timeout=60)
        yield server
    except BaseException:
        print("\n".join(["the server's log ends with:", *server.log[-30:]]), file=sys.stderr)
        raise
    finally:
        server.kill()


def fronts(server: Server) -> list[int]:
    """The processes that listen."""
    found = (re.search(r"listening: gRPC on .* pid (\d+)", line) for line in list(server.log))
    return [int(one[1]) for one in found if one]


def workers(client: ModelClient) -> list[int]:
    """The processes of the client's model, in all replicas."""
    return [pid for one in client.model_info() for pid in one["worker_pids"]]
