"""Measures calls a second and CPU a call against ``TMS_REPLICAS``, with a model that does nothing.

``python tests/bench_replicas.py [--replicas 1,2,4] [--seconds 1.5] [--callers 1,2] [--out FILE]``, or ``make
bench-replicas``, prints a Markdown table for BENCHMARKS.md. Without ``--replicas``: 1, 2, 4 and 8, as far as there are
cores.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import load  # noqa: E402

MODEL = """
from model_interface import ModelInterface
class Model(ModelInterface):
    def run(self, data, args):
        return len(data)
"""
PAYLOADS = {"20 B text": "text", "480x640x3": "480x640x3"}
WAYS = {"gRPC": "0", "same host": "1"}
THREADS = 4  # of a caller
LEAD_S = 2.0  # at most, in which callers find all replicas
HEAD = (
    "| replicas | payload | way | callers | calls/s | of one replica | p50 ms | p99 ms "
    "| CPU ms: callers | fronts | workers | cores of a front |\n|" + " --- |" * 12
)


def models() -> Path:
    """A folder with the model."""
    folder = ROOT / "build" / "replicas-models"
    (folder / "length").mkdir(parents=True, exist_ok=True)
    (folder / "length" / "__init__.py").write_text(MODEL)
    return folder


@dataclass(frozen=True)
class Effort:
    """How long each figure takes, and how many callers for each replica are tried, of which the fastest count."""

    seconds: float
    callers: list[int]


def best(
    address: str, payload: str, way: str, replicas: int, watched: list[list[int]], effort: Effort
) -> tuple[int, load.Found]:
    """(callers, what they found) of as many callers as get most."""
    tries = []
    lead_s = min(LEAD_S, 2 * effort.seconds)
    for each in effort.callers:
        commands = load.callers(each * replicas, address, "length", payload, "single", THREADS)
        with load.parts(commands, {**os.environ, "TMS_LOCAL_TRANSPORT": way}) as parts:
            pids = [[part.pid for part in parts], *watched]
            tries.append((len(parts), load.measured(parts, effort.seconds, pids, lead_s=lead_s)))
    return max(tries, key=lambda one: one[1].rate)


def rows(replicas: int, effort: Effort) -> Iterator[tuple[tuple[str, str], tuple[int, load.Found]]]:
    """What each payload gets by each way from so many replicas."""
    with load.serving(models(), replicas, TMS_MODEL_LENGTH_WORKERS=replicas, TMS_DRAIN_DELAY_S=0) as server:
        with server.client("length") as client:
            client.run_text("x")
            load.wait_for(lambda: len(load.workers(client)) == replicas, "a worker of each replica")
            watched = [load.workers(client), *([pid] for pid in load.fronts(server))]
        for name, payload in PAYLOADS.items():
            for how, way in WAYS.items():
                yield (name, how), best(server.address, payload, way, replicas, watched, effort)


def table(counts: list[int], effort: Effort) -> Iterator[str]:
    """The lines of the Markdown table, as they are measured."""
    yield HEAD
    first: dict[tuple[str, str], float] = {}
    for count in counts:
        for payload, (callers, found) in rows(count, effort):
            ratio = found.rate / first.setdefault(payload, found.rate)
            callers_cores, workers_cores, *fronts = found.cores
            cpu = [f"{1000 * cores / found.rate:.3f}" for cores in (callers_cores, sum(fronts), workers_cores)]
            rate = [f"{found.rate:.0f}", f"{ratio:.2f}", f"{found.p50:.2f}", f"{found.p99:.2f}"]
            cells = [count, *payload, f"{callers} x {THREADS}", *rate, *cpu, f"{min(fronts):.2f} to {max(fronts):.2f}"]
            yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Prints the table."""
    cores = len(os.sched_getaffinity(0))
    most = ",".join(str(count) for count in (1, 2, 4, 8) if count <= cores)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", default=most)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--callers", default="1,2", help="processes for each replica; the fastest count")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    counts, callers = ([int(count) for count in text.split(",")] for text in (given.replicas, given.callers))
    with load.tee(given.out) as write:
        write(f"{cores} cores.\n\n")
        for line in table(counts, Effort(given.seconds, callers)):
            write(line + "\n")


if __name__ == "__main__":
    main()
