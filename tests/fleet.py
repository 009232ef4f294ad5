"""Measures fleets: many connections to one replica, many replicas under one client, and all restarted at once.

``make fleet`` prints Markdown tables for BENCHMARKS.md. ``FLEET_SCALE=0.02`` tries the same with few connections and
replicas. Nothing else may run on the machine, because the kernel's count of connections is the whole machine's.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient, ModelClientError  # noqa: E402
from tests.balance import Names, Outcome  # noqa: E402
from tests.conftest import Server, free_port, only, wait_for  # noqa: E402
from tests.fleet_part import DRAIN_S, STUB_MS  # noqa: E402
from tests.test_security import Certificates, tls  # noqa: E402

SCALE = float(os.environ.get("FLEET_SCALE", "1"))
PARTS = 4  # processes of idle connections, or of callers
EACH = 5  # stubs of a process
CALLERS = 16
AGE_S, LONG_AGE_S = 6, 600
SETTLE_S = 8.0
IDLE_S = 12.0  # each connection of AGE_S is renewed twice
CALLS_S = 3.0
EVEN = 0.25


def scaled(count: int, least: int = 1) -> int:
    return max(least, round(count * SCALE))


class Part:
    """A process of ``fleet_part.py``, and the lines that it has printed, as lists of words."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(ROOT / "tests" / "fleet_part.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.lines: list[list[str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(line.split() for line in self.process.stdout)

    def send(self, *words: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()

    def wait_for(self, *words: str) -> None:
        """Waits for a line that begins so."""
        wait_for(lambda: any(tuple(line[: len(words)]) == words for line in self.lines), " ".join(words), 120)

    def result(self) -> dict[str, Any]:
        """The JSON that it prints when its standard input is closed, or on its own."""
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self._reader.join()
        found: dict[str, Any] = json.loads(" ".join(self.lines[-1]))
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


@contextmanager
def parts(arguments: list[tuple[object, ...]], ready: bool = True) -> Iterator[list[Part]]:
    """Processes that end with the block."""
    started: list[Part] = []
    try:
        for each in arguments:
            started.append(Part(*each))
        for part in started if ready else ():
            part.wait_for("ready")
        yield started
    finally:
        for part in started:
            part.kill()


# ---- one replica, many connections


class Cost(NamedTuple):
    """What a process has used so far."""

    cpu_s: float
    at: float

    @classmethod
    def of(cls, *pids: int) -> "Cost":
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return cls(sum(one.user + one.system for one in times), time.monotonic())

    def since(self, before: "Cost") -> float:
        """Cores used."""
        return (self.cpu_s - before.cpu_s) / (self.at - before.at)


def timed(address: str, callers: int, ca: str, seconds: float = CALLS_S) -> list[float]:
    """[p50 ms, p99 ms, calls/s] of callers with a connection each."""
    count = min(callers, PARTS)
    each = [("callers", callers // count, address, seconds, ca)] * count
    with parts(each) as processes:
        for part in processes:
            part.send("go")
        times = [one for part in processes for one in part.result()["times"]]
    return [*(1000 * np.percentile(times, [50, 99])), len(times) / seconds]


def held(count: int, age_s: float, *, secure: bool = False, active: bool = True) -> tuple[str, float]:
    """(row, cores that the idle ones use) of a replica with idle connections of an age, alone and under callers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificates = Certificates(folder)
        settings = tls(certificates.issue("server", "127.0.0.1")) if secure else {}
        ca = str(certificates.ca) if secure else ""
        server = Server(
            only("echo"), TMS_HTTP_PORT="off", TMS_LOCAL_TRANSPORT=0, TMS_MAX_CONNECTION_AGE_S=age_s, **settings
        )
        stack.callback(server.kill)
        front = psutil.Process(server.process.pid)
        timed(server.address, 1, ca, 0.5)  # warm
        memory, descriptors = front.memory_info().rss, front.num_fds()
        each = [("idle", count // PARTS, server.address, 1, ca)] * PARTS if count else []
        idle = stack.enter_context(parts(each))
        clients = [part.process.pid for part in idle]
        time.sleep(SETTLE_S if age_s == AGE_S else 2)
        before, before_clients = Cost.of(front.pid), Cost.of(*clients)
        time.sleep(IDLE_S if age_s == AGE_S else IDLE_S / 2)
        cores, client_cores = Cost.of(front.pid).since(before), Cost.of(*clients).since(before_clients)
        grown, more = front.memory_info().rss - memory, front.num_fds() - descriptors
        one = timed(server.address, 1, ca) if active else [math.nan] * 3
        many = timed(server.address, scaled(200, PARTS), ca) if active else [math.nan] * 3
        cells = [
            f"{count:,}{', TLS' if secure else ''}",
            f"{age_s:g}",
            f"{(memory + grown) / 2**20:.0f}",
            f"{grown / 1024 / count:.0f}" if count else "",
            f"{more:,}",
            f"{100 * cores:.1f}",
            f"{100 * client_cores:.1f}",
            *(f"{value:.2f}" for value in one[:2]),
            *(f"{value:.0f}" for value in (one[2], *many)),
        ]
        return "| " + " | ".join(cells).replace("nan", "") + " |", cores


def idle_table() -> None:
    print(f"\n{scaled(200, PARTS)} callers: a connection each, from {PARTS} processes.\n")
    print(
        "| idle connections | age s | server MiB | KiB a connection | descriptors | server, % of a core "
        "| clients, % of a core | 1 caller: p50 ms | p99 ms | calls/s | callers: p50 ms | p99 ms | calls/s |\n|"
        + " --- |"
        * 13
    )
    few, some, many = (scaled(count, PARTS) for count in (1000, 2500, 5000))
    print(held(0, LONG_AGE_S)[0], flush=True)
    cores: dict[tuple[int, int, bool], float] = {}
    # With 5,000 connections of 6 s, the clients and the server need more than two cores.
    rows = [(few, AGE_S), (few, LONG_AGE_S), (some, AGE_S), (many, LONG_AGE_S)]
    for secure, wanted in ((False, rows), (True, rows[:2])):
        for count, age_s in wanted:
            row, used = held(count, age_s, secure=secure, active=not secure)
            cores[count, age_s, secure] = used / count
            print(row, flush=True)
    print("\n| | ms of the server's CPU for a new connection | us a second for an open one |\n| --- | --- | --- |")
    for name, secure in (("without TLS", False), ("with TLS", True)):
        often, once = (cores[few, age_s, secure] for age_s in (AGE_S, LONG_AGE_S))
        print(f"| {name} | {1000 * (often - once) * AGE_S:.2f} | {1e6 * once:.0f} |")
    print(f"\nDescriptors of a replica 15 s after {few:,} clients made their last call: {silent(few)}")


def silent(count: int) -> int:
    """Descriptors more than before, with clients that have made no call for 15 s."""
    server = Server(only("echo"), TMS_HTTP_PORT="off", TMS_LOCAL_TRANSPORT=0)
    try:
        before = psutil.Process(server.process.pid).num_fds()
        with parts([("idle", count // PARTS, server.address, 0)] * PARTS):
            time.sleep(15)
            return psutil.Process(server.process.pid).num_fds() - before
    finally:
        server.kill()


# ---- many replicas


class Fleet:
    """Stub replicas on one port of several loopback addresses, and what they have printed."""

    def __init__(self, processes: list[Part], port: int) -> None:
        self.processes, self.port = processes, port
        self.since: dict[str, float] = {}
        """When clients could first know of a replica."""
        self.until: dict[str, float] = {}
        self.part: dict[str, Part] = {}

    def start(self, host: str, part: Part) -> None:
        part.send("start", host)
        self.part[host] = part

    def up(self, *hosts: str) -> None:
        """Waits until they serve."""
        for host in hosts:
            self.part[host].wait_for("up", host)
            self.since[host] = time.monotonic()

    def stop(self, host: str) -> None:
        self.until[host] = time.monotonic()
        self.part[host].send("stop", host)

    def kill(self, part: Part) -> None:
        part.kill()
        self.until |= {host: time.monotonic() for host, its in self.part.items() if its is part}

    def connections(self) -> list[tuple[str, float]]:
        """(host, time) of each that was made."""
        lines = [line for part in self.processes for line in list(part.lines)]
        return [(line[1], float(line[2])) for line in lines if line[0] == "connected"]

    def spread(self, second: int) -> float:
        """The coefficient of variation of calls over those replicas that served all this second."""
        calls: Counter[str] = Counter()
        for part in self.processes:
            for line in list(part.lines):
                if line[0] == "calls" and line[2] == str(second):
                    calls[line[1]] += int(line[3])
        serving = [host for host, at in self.since.items() if at < second and self.until.get(host, 1e18) > second + 1]
        return (
            float(np.std(counts) / max(1e-9, np.mean(counts))) if (counts := [calls[host] for host in serving]) else 0
        )


@contextmanager
def fleet(count: int, known: int, age_s: float = 6) -> Iterator[tuple[Fleet, Names, ModelClient]]:
    """``count`` stubs, a DNS server whose name stands for the first ``known`` of them, and a client of that name."""
    port = free_port()
    processes = math.ceil(count / EACH)
    with parts([("stubs", port, age_s)] * processes, ready=False) as started:
        made = Fleet(started, port)
        hosts = [f"127.0.{1 + index // EACH}.{1 + index % EACH}" for index in range(count)]
        for index, host in enumerate(hosts):
            made.start(host, started[index // EACH])
        made.up(*hosts)
        names = Names(hosts[:known])
        with ModelClient("stub", addresses=f"dns://127.0.0.1:{names.port}/stubs.test:{port}") as client:
            yield made, names, client


class Seen(NamedTuple):
    """What a load saw, and when the event began and ended."""

    outcome: Outcome
    begun: float
    ended: float
    end: float


def load(client: ModelClient, event: Callable[[], None], before_s: float, after_s: float) -> Seen:
    """Calls from CALLERS threads, one after the other, while ``event`` happens."""
    outcome, over = Outcome(), threading.Event()
    client.run_text("x")

    def caller() -> None:
        while not over.is_set():
            begun = time.monotonic()
            try:
                client.run_text("x", timeout=30)
            except ModelClientError as error:
                outcome.failures.append(error)
            outcome.latencies.append(time.monotonic() - begun)

    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    time.sleep(before_s)
    begun = time.monotonic()
    event()
    ended = time.monotonic()
    time.sleep(after_s)
    over.set()
    for thread in threads:
        thread.join()
    outcome.stats = client.stats()
    return Seen(outcome, begun, ended, time.monotonic())


def most(times: list[float], window_s: float) -> int:
    """The most of these times in any window."""
    ordered, first, found = sorted(times), 0, 0
    for last, at in enumerate(ordered):
        while ordered[first] < at - window_s:
            first += 1
        found = max(found, last - first + 1)
    return found


def row(name: str, fleet: Fleet, seen: Seen) -> str:
    seconds = {second: fleet.spread(second) for second in range(int(seen.begun) - 3, int(seen.end) - 1)}
    late = [second for second, spread in seconds.items() if second >= int(seen.begun) and spread >= EVEN]
    after = [spread for second, spread in seconds.items() if second > max([seen.ended, *late])]
    before = statistics.mean(spread for second, spread in seconds.items() if second < int(seen.begun))
    by_host: dict[str, list[float]] = {}
    for host, at in fleet.connections():
        if at > seen.begun - 3:
            by_host.setdefault(host, []).append(at)
    p50, p99, worst = (1000 * seen.outcome.percentile(percent) for percent in (50, 99, 100))
    cells = [
        name,
        f"{seen.outcome.calls}",
        f"{len(seen.outcome.failures)}",
        f"{seen.outcome.stats['retries']}",
        *(f"{value:.0f}" for value in (p50, p99, worst)),
        f"{max([most(times, 1) for times in by_host.values()], default=0)}",
        f"{before:.2f}",
        f"{max(seconds.values()):.2f}",
        f"{max(0.0, max(late) + 1 - seen.ended):.0f}" if late else "0",
        f"{statistics.mean(after):.2f}" if after else "-",
    ]
    for failure in {str(failure) for failure in seen.outcome.failures}:
        print(f"  {failure}", file=sys.stderr)
    return "| " + " | ".join(cells) + " |"


def rolling_update(count: int) -> str:
    """Each is replaced in turn by one at another address, as a Deployment does it."""
    with fleet(count, count) as (replicas, names, client):

        def update() -> None:
            for old in list(names.hosts):
                new = old.replace("127.0.", "127.1.")
                replicas.start(new, replicas.part[old])
                replicas.up(new)
                names.hosts = [*(host for host in names.hosts if host != old), new]
                replicas.stop(old)
                time.sleep(0.5)
            time.sleep(DRAIN_S)

        return row(f"rolling update of {count}", replicas, load(client, update, 4, 10))


def zone_loss(count: int) -> str:
    """Half of all are killed at once; DNS still names them for 2 s."""
    with fleet(count, count) as (replicas, names, client):

        def lose() -> None:
            for part in replicas.processes[: len(replicas.processes) // 2]:
                replicas.kill(part)
            time.sleep(2)
            names.hosts = [host for host in names.hosts if host not in replicas.until]

        return row(f"kill -9 of {count // 2} of {count}", replicas, load(client, lose, 8, 10))


def scale_up(few: int, count: int, age_s: float) -> str:
    """DNS names ten times as many from one moment to the next."""
    with fleet(count, few, age_s) as (replicas, names, client):
        late = list(replicas.since)[few:]
        replicas.since |= dict.fromkeys(late, 1e18)

        def grow() -> None:
            names.hosts = list(replicas.since)
            replicas.since |= dict.fromkeys(late, time.monotonic())

        found = load(client, grow, 4, 1.1 * age_s + 6)
        return row(f"{few} to {count}, connections live {age_s:g} s", replicas, found)


def replicas_table() -> None:
    print(f"\nOne ModelClient with {CALLERS} callers; each call takes a replica {STUB_MS} ms.\n")
    print(
        "| what happens | calls | failed | retries | p50 ms | p99 ms | worst ms | most connections in 1 s at a replica "
        "| variation before | worst | uneven for s | variation after |\n|" + " --- |" * 12
    )
    count, few = max(4, round(40 * SCALE)), max(2, round(4 * SCALE))
    print(rolling_update(count), flush=True)
    print(zone_loss(2 * EACH if count < 2 * EACH else count), flush=True)
    print(scale_up(few, count, 6), flush=True)
    print(scale_up(few, count, 30), flush=True)


def client_cores(count: int, age_s: float) -> float:
    """Cores that a client uses that makes one call a second; the DNS server is in the same process."""
    with fleet(count, count, age_s) as (_, _, client):

        def calls(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                client.run_text("x")
                time.sleep(1)

        calls(SETTLE_S)
        before = Cost.of(os.getpid())
        calls(IDLE_S)
        return Cost.of(os.getpid()).since(before)


def client_table() -> None:
    print("\nOne ModelClient that makes one call a second.\n")
    print("| replicas | age s | client, % of a core |\n| --- | --- | --- |")
    for age_s in (AGE_S, LONG_AGE_S):
        for count in (5, scaled(40), scaled(100)):
            print(f"| {count} | {age_s} | {100 * client_cores(count, age_s):.1f} |", flush=True)


# ---- all replicas restart at once


class Attempts:
    """Counts the attempts to connect of all processes of the machine, in steps of 0.1 s, until ``stop``."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            lines = Path("/proc/net/snmp").read_text().splitlines()
            names, values = (line.split() for line in lines if line.startswith("Tcp:"))
            self.times.append((time.monotonic(), int(values[names.index("ActiveOpens")])))

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float, window_s: float) -> tuple[float, int]:
        """(mean a second, most in a window)."""
        inside = [(at, count) for at, count in self.times if begin <= at <= end]
        (first, least), (last, greatest) = inside[0], inside[-1]
        steps = [
            max([other for at, other in inside if at <= begun + 1.05 * window_s], default=count) - count
            for begun, count in inside
        ]
        return (greatest - least) / (last - first), max(steps)


def restart(clients: list[tuple[object, ...]], each: int, hosts: list[str], port: int) -> list[str]:
    """Rows: what a replica sees before all are killed and started again, meanwhile, and afterwards."""

    def start() -> tuple[Fleet, list[Part]]:
        stubs = [Part("stubs", port, 6) for _ in range(math.ceil(len(hosts) / EACH))]
        made = Fleet(stubs, port)
        for index, host in enumerate(hosts):
            made.start(host, stubs[index // EACH])
        return made, stubs

    total = len(clients) * each
    first, old = start()
    first.up(*hosts)
    new: list[Part] = []
    attempts = Attempts()
    try:
        with parts(clients) as processes:
            time.sleep(SETTLE_S)
            killed = time.monotonic()
            for part in old:
                part.kill()
            time.sleep(3)
            second, new = start()
            second.up(*hosts)
            back = time.monotonic()
            time.sleep(22)
            results = [part.result() for part in processes] if clients[0][0] == "client" else []
            end = time.monotonic()
    finally:
        attempts.stop()
        for part in old + new:
            part.kill()
    made = second.connections()
    connected = [at for _, at in made]
    all_back = sorted(connected)[: total * len(hosts)][-1] - back
    first_at = min(connected)
    return [
        seen(f"{total:,}", "before", hosts, attempts, first.connections(), killed - 8, killed),
        seen(f"{total:,}", "while they are gone", hosts, attempts, [], killed, first_at - 0.1),
        seen(f"{total:,}", f"back: all connected after {all_back:.1f} s", hosts, attempts, made, first_at, back + 3),
        seen(f"{total:,}", "3 to 12 s after", hosts, attempts, made, back + 3, back + 12),
        seen(f"{total:,}", "12 to 21 s after", hosts, attempts, made, back + 12, min(end, back + 21)),
        *(calls_row(results) for _ in results[:1]),
    ]


def seen(
    clients: str,
    when: str,
    hosts: list[str],
    attempts: Attempts,
    made: list[tuple[str, float]],
    begin: float,
    end: float,
) -> str:
    """A row: attempts and connections of a replica in this time."""
    mean, highest = attempts.between(begin, end, 1)
    by_host = [[at for host, at in made if host == one and begin <= at <= end] for one in hosts]
    second, tenth = (max(most(times, window) for times in by_host) for window in (1, 0.1))
    count = len(hosts)
    return f"| {clients} | {count} | {when} | {mean / count:.1f} | {highest / count:.0f} | {second} | {tenth} |"


def calls_row(results: list[dict[str, Any]]) -> str:
    """A line under the table: the calls of all clients."""
    times = [one for result in results for one in result["times"]]
    failures = [one for result in results for one in result["failures"]]
    for failure in set(failures):
        print(f"  {failure}", file=sys.stderr)
    return f"\nCalls: {len(times)}, failed: {len(failures)}, worst ms: {1000 * max(times):.0f}\n"


def restart_table() -> None:
    print("\nAll replicas are killed, and start again after 3 s. Connections live for 6 s.\n")
    print(
        "| connections of a replica | replicas | when | attempts/s at a replica | most in 1 s "
        "| connections: most in 1 s | in 0.1 s |\n|" + " --- |" * 7
    )
    port, count = free_port(), scaled(20, 4)
    hosts = [f"127.2.0.{1 + index}" for index in range(max(2, round(10 * SCALE)))]
    addresses = ",".join(f"{host}:{port}" for host in hosts)
    print("\n".join(restart([("client", addresses, 20)] * count, 1, hosts, port)), flush=True)
    each = scaled(1000, PARTS) // PARTS
    print("\n".join(restart([("idle", each, f"{hosts[0]}:{port}", 1)] * PARTS, each, hosts[:1], port)), flush=True)


def main() -> None:
    """Prints the tables, or those that the arguments name."""
    tables = {"idle": idle_table, "replicas": replicas_table, "client": client_table, "restart": restart_table}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
