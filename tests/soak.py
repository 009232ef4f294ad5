"""Ten minutes of checked load by each transport, with what the processes hold; fails if that grows (``make soak``).

Prints a table for BENCHMARKS.md. ``soak.py LENGTH_S ROW_S MOST_MIB MOST_COUNT WAY...`` makes a shorter run, in which
the processes may grow by so much. With TEST_LEAK_KB and TEST_LEAK_CLIENTS, the model and the client leak, which must
make it fail.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.checked_load import MODELS, LoadProcess, Result, checked_load  # noqa: E402
from tests.conftest import Server, wait_for  # noqa: E402

WAYS = ("local", "gRPC", "HTTP")
_SAMPLES_A_ROW = 10
_SURE = 3.0  # standard errors


@dataclass
class Held:
    """What the processes of one transport hold at one moment."""

    front_mib: float
    workers_mib: float
    shared_mib: float
    """Of the files in memory that the front has open."""
    front_descriptors: int
    shared_files: int
    workers_descriptors: int
    front_threads: int
    client_mib: float
    client_descriptors: int
    client_threads: int

    @classmethod
    def by(cls, front: psutil.Process, client: psutil.Process) -> "Held":
        """Now, by the front with its workers and by the process with all clients."""
        workers = [(0, 0)]
        for one in front.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it was replaced
                workers.append((one.memory_info().rss, one.num_fds()))
        files = _shared_files(front.pid)
        return cls(
            front.memory_info().rss / (1 << 20),
            sum(rss for rss, _ in workers) / (1 << 20),
            sum(files) / (1 << 20),
            front.num_fds(),
            len(files),
            sum(count for _, count in workers),
            front.num_threads(),
            client.memory_info().rss / (1 << 20),
            client.num_fds(),
            client.num_threads(),
        )


NAMES = [field.name for field in fields(Held)]


def _shared_files(pid: int) -> list[int]:
    """The bytes that each file in memory takes which the process has open."""
    sizes: dict[int, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if os.readlink(link).startswith("/memfd:"):
                found = link.stat()
                sizes[found.st_ino] = found.st_blocks * 512
    return list(sizes.values())


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """By how much a line through the values rises, at least, from the first to the last time; 0 if it may be noise."""
    if len(values) < 4:
        raise ValueError(f"{len(values)} samples are too few")
    (slope, _), ((variance, _), _) = np.polyfit(times, values, 1, cov="unscaled")
    centred = np.asarray(values) - np.polyval(np.polyfit(times, values, 1), times)
    error = float(np.sqrt(variance * np.sum(centred**2) / (len(values) - 2)))
    return max(0.0, (float(slope) - _SURE * error) * (times[-1] - times[0]))


def faults(way: str, times: Sequence[float], samples: Sequence[Held], most_mib: float, most_count: float) -> list[str]:
    """What grew by more than that in the second half of a run."""
    half = len(samples) // 2
    found = []
    for name in NAMES:
        most = most_mib if name.endswith("mib") else most_count
        by = growth(times[half:], [getattr(sample, name) for sample in samples[half:]])
        if by > most:
            found.append(f"{way}: {name} grew by {by:.1f} or more in {times[-1] - times[half]:.0f} s")
    return found


def result_faults(way: str, result: Result) -> list[str]:
    """Failed calls, wrong answers, and what the client's process did not give back."""
    found = [f"{way}: wrong answer: {one}" for one in result.wrong[:5]]
    found += [f"{way}: {one}" for one in result.failures[:5]]
    before, after = result.descriptors
    if after > before + _DESCRIPTORS_OF_GRPC:
        found.append(f"{way}: the client's process had {before} descriptors before its first call, {after} in the end")
    return found


_DESCRIPTORS_OF_GRPC = 10 + (os.cpu_count() or 1)  # its pollers, which stay when all channels are closed


class Soak:
    """A server and the load by one transport, and what was seen of them."""

    def __init__(self, way: str, stack: ExitStack) -> None:
        self.way = way
        self.server = Server(MODELS)
        stack.callback(self.server.kill)
        self._front = psutil.Process(self.server.process.pid)
        port = self.server.http_port if way == "HTTP" else self.server.port
        leak = "TEST_LEAK_CLIENTS" in os.environ
        load = checked_load(way, f"127.0.0.1:{port}", connect_s=0.2 if leak else 1, leak=leak)
        self.load: LoadProcess = stack.enter_context(load)
        self.times: list[float] = []
        self.samples: list[Held] = []

    def sample(self) -> None:
        self.times.append(time.monotonic())
        self.samples.append(Held.by(self._front, psutil.Process(self.load.process.pid)))

    def row(self, minute: float) -> str:
        last = self.samples[-1]
        cells = [f"{getattr(last, name):.0f}" for name in NAMES]
        return f"| {self.way} | {minute:g} | {self.load.calls.total()} | " + " | ".join(cells) + " |"

    def finish(self, most_mib: float, most_count: float) -> list[str]:
        """Ends the load; returns the faults."""
        result = self.load.stop()
        print(f"{self.way}:", ", ".join(f"{count} {kind}" for kind, count in sorted(result.calls.items())))
        if result.paused:
            print(f"{self.way}: {result.paused} calls failed while the whole load stood still")
        found = result_faults(self.way, result) + faults(self.way, self.times, self.samples, most_mib, most_count)
        if (code := self.server.stop()) != 0:
            found.append(f"{self.way}: the server ended with {code}")
        return found


def main(length: str = "600", row: str = "60", most_mib: str = "8", most_count: str = "3", *ways: str) -> int:
    """Prints a row for each transport and ``row_s``; returns 1 if there was a fault."""
    length_s, row_s = float(length), float(row)
    with ExitStack() as stack:
        soaks = [Soak(way, stack) for way in ways or WAYS]
        for soak in soaks:
            wait_for(lambda soak=soak: soak.load.calls.total(), "the first answers", 300)
        print(
            "| transport | minute | calls |",
            " | ".join(name.replace("_", " ").replace("mib", "MiB") for name in NAMES),
            "|",
        )
        print("|" + " --- |" * (3 + len(NAMES)))
        rows = round(length_s / row_s)
        for number in range(rows * _SAMPLES_A_ROW + 1):
            begun = time.monotonic()
            for soak in soaks:
                soak.sample()
                if number % _SAMPLES_A_ROW == 0:
                    print(soak.row(number // _SAMPLES_A_ROW * row_s / 60), flush=True)
            time.sleep(max(0.0, begun + row_s / _SAMPLES_A_ROW - time.monotonic()))
        print()
        found = [fault for soak in soaks for fault in soak.finish(float(most_mib), float(most_count))]
    print("\n".join(found) or "Nothing grew, no call failed, and every answer was right.")
    return bool(found)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # ends the servers
    sys.exit(main(*sys.argv[1:]))
