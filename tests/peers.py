"""The same model on other servers, each in an environment of its own, beside this one (``make bench-peers``).

Prints Markdown tables for BENCHMARKS.md, and draws docs/images.png: mosec, BentoML and LitServe by HTTP (the bytes as
the body, in a form for LitServe), Triton, MLServer and KServe by tritonclient over gRPC, Ray Serve by its gRPC ingress,
and this server by all of these and by ModelClient. "grpcio alone" has no worker: the model is a method of the servicer.
KServe's gRPC runs the model in the server's process, too. Every other server has two workers.

Every caller has a connection of its own; ``ModelClient`` is shared by callers. All servers run at the same time. Those
that use CPU without calls are stopped while others are measured. Logs of calls are off. Each figure is the median of
turns.

``BENCH_SECONDS`` (1) is how long one measurement takes, ``BENCH_TURNS`` (3) how often it is repeated. Arguments are the
peers to measure; without, all.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import bench  # noqa: E402
from tests.peer_servers import (  # noqa: E402
    GRPC,
    GRPC_MALLOC,
    HTTP,
    NEEDS,
    OIP,
    OIP_MALLOC,
    PEERS,
    SAME_HOST,
    Figures,
    Servers,
    Way,
    python,
    this_server,
    to_light,
)
from tiny_model_server.server.grpc_server import PROTOCOLS  # noqa: E402

SECONDS = float(os.environ.get("BENCH_SECONDS", "1"))
TURNS = int(os.environ.get("BENCH_TURNS", "3"))
IDLE_S = 5.0
SPINS = 0.005
"""Cores that a server uses without calls, above which it is stopped while others are measured."""
PAYLOADS = ["20 B text", *("x".join(map(str, shape)) for shape in bench.SHAPES)]
SIDES = [32, 64, 128, 224, 384, 512, 720, 1024, 1440]
CALL_S = 0.0003
"""About the time between two calls of one caller."""
IDEAL = 32 / (2 + 0.1 * 32) * 1000
"""Calls a second of the batching model, if full batches follow each other at once."""
BY_HTTP, BY_OIP = ["mosec", "LitServe", "BentoML"], ["Triton", "MLServer", "KServe"]
BARE = "grpcio alone"
BESIDE = [
    (SAME_HOST, [*BY_HTTP, *BY_OIP, "Ray Serve"]),
    (GRPC, [*BY_OIP, "Ray Serve"]),
    (OIP, BY_OIP),
    (HTTP, BY_HTTP),
    (SAME_HOST, [BARE]),
    (GRPC, [BARE]),
]
"""Each way, and with whom it is compared: with the best of these."""
PLOT = """
import json, sys
import matplotlib
matplotlib.use("agg")
from matplotlib import pyplot
figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
lines = json.load(sys.stdin)
colors = {True: iter(pyplot.cm.tab10.colors), False: iter(pyplot.cm.Dark2.colors)}
for name, points in sorted(lines.items(), key=lambda line: -line[1][-1][1]):
    ours = name.startswith("this server")
    style = dict(linestyle="-", marker="o", linewidth=2.5) if ours else dict(linestyle="--", marker="s", linewidth=1)
    style |= dict(color=next(colors[ours]), markersize=4, label=name)
    axes.plot([side for side, _ in points], [ms for _, ms in points], **style)
sides = [side for side, _ in points]
axes.set(xscale="log", xlabel="side of the square image, pixels (3 bytes each)")
axes.set(yscale="log", ylabel="p50 of one caller, ms")
axes.set_xticks(sides, sides)
axes.minorticks_off()
axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
figure.legend(loc="outside right upper")
axes.grid(alpha=0.3)
figure.savefig(sys.argv[1], dpi=110)
"""
Rows = dict[str, dict[str, list[Figures]]]
"""The turns of each way and payload."""


def in_turns(ways: dict[str, Way], at_once: int, payloads: Iterable[str], seconds: float) -> Rows:
    """Measures every way with every payload."""
    found: Rows = {name: {payload: [] for payload in payloads} for name in ways}
    for payload in payloads:
        for _ in range(TURNS):
            for name, way in ways.items():
                found[name][payload].append(way.measure(payload, at_once, seconds))
    return found


def medians(turns: list[Figures]) -> Figures:
    return Figures(*map(float, np.median(turns, axis=0)))


def head(*cells: str) -> None:
    print("\n|", " | ".join(cells), "|\n|" + " --- |" * len(cells))


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def table(title: str, rows: Rows, cell: str) -> None:
    """Prints a figure of every row, by a format of the medians."""
    head(title, *PAYLOADS)
    for name, turns in rows.items():
        row(name, *(cell.format(**medians(turns[payload])._asdict()) for payload in PAYLOADS))


def ratios(title: str, rows: Rows, figure: str, most: bool) -> None:
    """Prints how many times better each of our ways is than the best other: the median of the turns' ratios."""
    sign = 1 if most else -1
    head(title, *PAYLOADS)
    for name, all_others in BESIDE:
        others = [other for other in all_others if other in rows]
        if not others or name not in rows:
            continue
        cells = []
        for payload in PAYLOADS:
            best = max(others, key=lambda other: sign * getattr(medians(rows[other][payload]), figure))
            pairs = zip(rows[name][payload], rows[best][payload], strict=True)
            ratio = np.median([(getattr(one, figure) / getattr(other, figure)) ** sign for one, other in pairs])
            cells.append(f"{ratio:.2f}" + (f" ({best})" if len(all_others) > 1 else ""))
        row(f"{name}, beside {'the best other' if len(all_others) > 1 else others[0]}", *cells)


def idle(servers: Servers) -> None:
    """Prints the CPU of each server without calls, and marks those that are to be stopped."""
    before = {name: processes.cpu_s() for name, processes in servers.processes.items()}
    time.sleep(IDLE_S)
    head("server", "processes", "% of a core without calls", "stopped while others are measured")
    for name, processes in servers.processes.items():
        cores = (processes.cpu_s() - before[name]) / IDLE_S
        row(name, len(processes.all()), f"{100 * cores:.1f}", "yes" if cores > SPINS else "")
        processes.spins = cores > SPINS
    for processes in servers.processes.values():
        if processes.spins:
            processes.pause()


def batching(ways: dict[str, Way]) -> None:
    """Prints the rates of 64 callers of a model that takes 2 ms a batch and 0.1 ms an item, in batches of up to 32."""
    head("64 callers of the light model", "calls/s", "of the ideal", "p50 ms", "CPU ms a call: server", "caller")
    for name, turns in in_turns(ways, 64, PAYLOADS[:1], 2 * SECONDS).items():
        rate, p50_ms, server_ms, caller_ms = medians(turns[PAYLOADS[0]])
        row(name, f"{rate:.0f}", f"{rate / IDEAL:.2f}", f"{p50_ms:.1f}", f"{server_ms:.3f}", f"{caller_ms:.3f}")


def slopes(ways: dict[str, Way]) -> dict[str, list[tuple[int, float]]]:
    """(side, p50 in ms) of square images of growing size, for each way; medians of turns."""
    payloads = {side: f"{side}x{side}x3" for side in SIDES}
    rows = in_turns(ways, 1, payloads.values(), SECONDS / 2)
    return {
        name: [(side, medians(turns[payload]).p50_ms) for side, payload in payloads.items()]
        for name, turns in rows.items()
    }


def copies(pause_s: float) -> float:
    """GB/s of copies of an image, with a pause before each."""
    image = np.random.default_rng(0).integers(0, 256, (1440, 1440, 3), np.uint8)
    other, times = np.zeros_like(image), []
    for _ in range(300):
        time.sleep(pause_s)
        begun = time.perf_counter()
        np.copyto(other, image)
        times.append(time.perf_counter() - begun)
    return float(image.nbytes / np.median(times) / 1e9)


def fits(lines: dict[str, list[tuple[int, float]]]) -> None:
    """Prints what a byte more costs each way: the slope of a line through its points."""
    at_once, paused = copies(0), copies(CALL_S)
    head("way", "GB/s beyond the first byte", "r2 of the line")
    row("a copy in memory", f"{at_once:.1f} ({paused:.1f} with {CALL_S * 1000:g} ms between copies)", "")
    for name, points in lines.items():
        sizes, times = [3 * side * side for side, _ in points], [ms for _, ms in points]
        slope, _ = np.polyfit(sizes, times, 1)
        fit = np.corrcoef(sizes, times)[0, 1] ** 2
        row(name, f"{1 / slope / 1e6:.2g}" if fit > 0.5 else "no slope", f"{fit:.3f}")


def protocols() -> None:
    """Prints what enabling the other protocols costs a call: one protocol and all of them, in turns."""
    rows: Rows = {}
    with contextlib.ExitStack() as stack:

        def started(protocols: str, names: list[str]) -> dict[str, Way]:
            servers = stack.enter_context(Servers())
            this_server(servers, names, TMS_PROTOCOLS=protocols)
            servers.wait()
            return servers.ways

        of = {"native": GRPC_MALLOC, "open_inference": OIP_MALLOC}
        every = started(",".join(PROTOCOLS), list(of.values()))
        for protocol, way in of.items():
            ways = {f"{protocol} alone": started(protocol, [way])[way], f"{protocol} with all others": every[way]}
            rows |= in_turns(ways, 1, PAYLOADS, SECONDS)
    table("p50 in ms of one caller", rows, "{p50_ms:.3f}")


def draw(lines: dict[str, list[tuple[int, float]]]) -> None:
    """Writes the plot."""
    command = [str(python("plot")), "-c", PLOT, str(ROOT / "docs" / "images.png")]
    subprocess.run(command, input=json.dumps(lines), text=True, check=True)


def measured_from() -> None:
    """Prints commit, machine and versions."""
    ask = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(f"commit {commit}, {os.cpu_count()} cores, Python {platform.python_version()}, {SECONDS:g} s each,")
    print(", ".join(needs.split()[0] for needs in NEEDS.values()))


def terminated(*_: object) -> None:
    """Ends the servers, too. A second signal does not stop that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("terminated")


def main(names: list[str]) -> None:
    """Measures every server in turns, prints the tables and writes the plot."""
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, terminated)
    measured_from()
    with Servers() as servers:
        for name in names or PEERS:
            PEERS[name](servers)
            servers.wait()
        to_light(servers, this_server(servers))
        servers.wait()
        idle(servers)
        alone = in_turns(servers.ways, 1, PAYLOADS, SECONDS)
        eight = in_turns(servers.ways, 8, PAYLOADS, SECONDS)
        table("p50 in ms of one caller", alone, "{p50_ms:.2f}")
        table("calls a second of eight", eight, "{rate:.0f}")
        table("CPU ms a call of one caller: server + caller", alone, "{server_ms:.2f} + {caller_ms:.2f}")
        table("CPU ms a call of eight: server + caller", eight, "{server_ms:.2f} + {caller_ms:.2f}")
        ratios("one caller: times as fast", alone, "p50_ms", most=False)
        ratios("eight: times as many calls a second", eight, "rate", most=True)
        ratios("eight: CPU a call of the other server / of this one", eight, "server_ms", most=False)
        batching(servers.light)
        lines = slopes({name: way for name, way in servers.ways.items() if "malloc" not in name})
        fits(lines)
    protocols()
    draw(lines)
    print(f"\nThe run took {(time.monotonic() - begun) / 60:.1f} min.")


if __name__ == "__main__":
    main(sys.argv[1:])
