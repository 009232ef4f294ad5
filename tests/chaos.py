"""Kills, freezes, restarts and reloads at random, under a load whose every answer is checked (``make chaos``).

``chaos.py SECONDS SEED SCENE...``: so many seconds for all scenes together, five minutes by default. The seed is
printed; it repeats the order of the events and their pauses. Ends with 1 if an answer was wrong, or if a call failed
that may not.

What may fail, and nothing else:

- A stream whose worker was killed ends with INTERNAL.
- A stream whose replica was killed by SIGKILL, or was frozen for more than 2 s, ends with UNAVAILABLE.
- Calls to a model while it is unloaded end with FAILED_PRECONDITION.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402
from tests.balance import Names  # noqa: E402
from tests.checked_load import MODELS, Failure, Result, checked_load  # noqa: E402
from tests.conftest import Server, free_port, wait_for  # noqa: E402
from tests.test_replicas import pids, ready, start  # noqa: E402

STREAMS = ("stream", "abandoned", "broken")
NAMES = ("digest", "inverted", "numbers")
_NOTICED_S = 3.0  # until clients have noticed what happened, see docs/several-servers.md
_SOON_S = 0.5  # a dead process is noticed by its socket


@dataclass
class Event:
    """What happened, from when to when, by ``time.monotonic``, and which calls it may fail with which status."""

    name: str
    begun: float
    ended: float = 0
    kinds: tuple[str, ...] = ()
    status: str = ""

    def excuses(self, failure: Failure) -> bool:
        """True if the call was under way meanwhile, and its failure is one that may be."""
        fits = failure.kind in self.kinds and failure.status == self.status
        return fits and failure.meanwhile((self.begun, self.ended))


class Scene:
    """Servers, their loads, and what can happen to them."""

    ways: tuple[str, ...]
    address: str

    def __init__(self, random: random.Random, stack: ExitStack) -> None:
        self.random = random
        self.events: list[Event] = []

    def happenings(self) -> list[Callable[[], None]]:
        """What can happen: methods that return when it is over."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends the servers by SIGTERM; each must exit with 0."""
        raise NotImplementedError

    @contextmanager
    def event(self, name: str, kinds: tuple[str, ...] = (), status: str = "", noticed_s: float = 0) -> Iterator[None]:
        """Notes what happens in the block, and that calls may fail of it for a while."""
        event = Event(name, time.monotonic(), kinds=kinds, status=status)
        self.events.append(event)
        yield
        event.ended = time.monotonic() + noticed_s

    def model(self, name: str, address: str) -> ModelClient:
        return ModelClient(name, addresses=[address])

    def kill_worker(self) -> None:
        """Kills one worker, or all of a model at once."""
        address, name = self.random.choice(self.serving()), self.random.choice(NAMES)
        count = self.random.choice([1, 1, 9])
        kinds = STREAMS if name == "numbers" else ()
        with self.model(name, address) as client, self.event(f"kill {count} of {name}", kinds, "INTERNAL", _SOON_S):
            for pid in self.random.choice(client.model_info())["worker_pids"][:count]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze_worker(self) -> None:
        address, name = self.random.choice(self.serving()), self.random.choice(NAMES)
        with self.model(name, address) as client, self.event(f"freeze a worker of {name}"):
            for pid in self.random.choice(client.model_info())["worker_pids"][:1]:
                freeze(pid, self.random.uniform(0.1, 1))

    def reload(self) -> None:
        name = self.random.choice(NAMES)
        with self.model(name, self.random.choice(self.serving())) as client, self.event(f"reload {name}"):
            client.reload_model()

    def serving(self) -> list[str]:
        """The addresses of replicas that serve."""
        return [self.address]


def freeze(pid: int, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


class Workers(Scene):
    """One server, by the local transport and by gRPC; its workers die, and its models come and go."""

    ways = ("local", "gRPC")

    def __init__(self, random: random.Random, stack: ExitStack) -> None:
        super().__init__(random, stack)
        self._server = Server(MODELS, TMS_MODEL_NUMBERS_WORKERS=2)
        stack.callback(self._server.kill)
        self.address = self._server.address

    def happenings(self) -> list[Callable[[], None]]:
        return [self.kill_worker, self.kill_worker, self.freeze_worker, self.reload, self.resize, self.unload]

    def resize(self) -> None:
        name, workers = self.random.choice(NAMES), self.random.randint(1, 3)
        with self.model(name, self.address) as client, self.event(f"{workers} workers of {name}"):
            client.load_model(workers=workers)

    def unload(self) -> None:
        with (
            self.model("inverted", self.address) as client,
            self.event("unload inverted, load it", ("inverted",), "FAILED_PRECONDITION"),
        ):
            client.unload_model()
            time.sleep(self.random.uniform(0, 0.5))
            client.load_model()

    def stop(self) -> None:
        assert self._server.stop() == 0


class Fleet(Scene):
    """Three replicas under one name, by gRPC; they are killed, stopped, frozen, and scaled."""

    ways = ("gRPC",)

    def __init__(self, random: random.Random, stack: ExitStack) -> None:
        super().__init__(random, stack)
        self._port = free_port()
        self._servers: dict[str, Server] = {}
        stack.callback(lambda: [server.kill() for server in self._servers.values()])
        self._hosts = [f"127.0.0.{number}" for number in (2, 3, 4)]
        for host in self._hosts:
            self._start(host)
        self._names = Names(self._hosts.copy())
        self.address = f"dns://127.0.0.1:{self._names.port}/replicas.test:{self._port}"

    def _start(self, host: str) -> None:
        more = {"TMS_HOST": host, "TMS_PORT": self._port, "TMS_HTTP_PORT": "off", "TMS_MAX_CONNECTION_AGE_S": 3}
        self._servers[host] = Server(MODELS, **more)

    def happenings(self) -> list[Callable[[], None]]:
        found = [self.kill, self.terminate, self.freeze, self.scale]
        return [*found, self.kill_worker, self.reload]

    def serving(self) -> list[str]:
        return [f"{host}:{self._port}" for host in self._servers]

    def kill(self) -> None:
        """Kills one or two at once, and starts them again."""
        hosts = self.random.sample(list(self._servers), self.random.choice([1, 1, 2]))
        with self.event(f"kill -9 of {', '.join(hosts)}", STREAMS, "UNAVAILABLE", _SOON_S):
            for host in hosts:
                self._servers.pop(host).kill()
        for host in hosts:
            self._start(host)

    def terminate(self) -> None:
        host = self.random.choice(list(self._servers))
        with self.event(f"SIGTERM of {host}"):
            assert self._servers.pop(host).stop() == 0
            self._start(host)

    def freeze(self) -> None:
        host, seconds = self.random.choice(list(self._servers)), self.random.choice([0.5, 1, 4, 6])
        streams = STREAMS if seconds > 2 else ()
        with self.event(f"freeze {host} for {seconds} s", streams, "UNAVAILABLE", _NOTICED_S):
            freeze(self._servers[host].process.pid, seconds)

    def scale(self) -> None:
        """One more, and one less."""
        host = "127.0.0.5" if "127.0.0.5" not in self._servers else "127.0.0.2"
        leaves = self.random.choice(list(self._servers))
        with self.event(f"scale: {host} comes, {leaves} leaves"):
            if host not in self._servers:
                self._start(host)
            self._names.hosts = [*{*self._names.hosts, host} - {leaves}]
            time.sleep(self.random.uniform(0, 2))
            if leaves != host:
                assert self._servers.pop(leaves).stop() == 0

    def stop(self) -> None:
        for server in self._servers.values():
            server.process.send_signal(signal.SIGTERM)
        assert [server.process.wait(20) for server in self._servers.values()] == [0] * len(self._servers)


class Replicas(Scene):
    """``--replicas 3``, by the local transport and by gRPC; replicas and workers are killed and frozen."""

    ways = ("local", "gRPC")

    def __init__(self, random: random.Random, stack: ExitStack) -> None:
        super().__init__(random, stack)
        self._server = start(Server, 3, TMS_MODELS_DIR=MODELS)
        stack.callback(self._server.kill)
        self.address = self._server.address

    def happenings(self) -> list[Callable[[], None]]:
        return [self.kill, self.kill, self.freeze, self.kill_worker, self.reload]

    def kill(self) -> None:
        port, pid = self.random.choice(sorted(pids(self._server).items()))
        with self.event(f"kill -9 of replica {port - self._server.port + 1}", STREAMS, "UNAVAILABLE", _SOON_S):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pids(self._server)[port] != pid, "another process", timeout=60)
        if self.random.random() < 0.7:  # or the next event comes while it still loads its models
            wait_for(lambda: ready(self._server)["ready"], "every replica", timeout=60)

    def freeze(self) -> None:
        """For less than gRPC's clients take to notice; those of the local transport wait for it in any case."""
        port, pid = self.random.choice(sorted(pids(self._server).items()))
        with self.event(f"freeze replica {port - self._server.port + 1}"):
            freeze(pid, self.random.uniform(0.1, 1))

    def stop(self) -> None:
        assert self._server.stop() == 0


SCENES = {"workers": Workers, "fleet": Fleet, "replicas": Replicas}


@dataclass
class Outcome:
    """What came of a scene."""

    seconds: float
    events: list[Event]
    results: list[Result]
    excused: Counter[str] = field(default_factory=Counter)
    """Failures that may be, by event, kind and status."""
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for result in self.results:
            self.faults += [f"wrong answer: {one}" for one in result.wrong]
            for failure in result.failures:
                found = next((event for event in self.events if event.excuses(failure)), None)
                if found:
                    self.excused[f"{failure.kind} {failure.status}"] += 1
                else:
                    self.faults.append(f"failed: {failure}")

    def count(self, *kinds: str) -> int:
        return sum(result.calls[kind] for result in self.results for kind in kinds or result.calls)

    def row(self, name: str) -> str:
        worst = max(result.worst_s for result in self.results)
        cells = [name, f"{self.seconds:.0f}", len(self.events), self.count(), self.count(*STREAMS)]
        cells += [", ".join(f"{count} {what}" for what, count in sorted(self.excused.items())) or "0"]
        return "| " + " | ".join(map(str, [*cells, len(self.faults), f"{worst:.1f}"])) + " |"


def play(scene_class: type[Scene], seconds: float, seed: int, least: int = 1) -> Outcome:
    """Runs a scene for so long, and until there were ``least`` events."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        scene = scene_class(chance, stack)
        loads = [stack.enter_context(checked_load(way, scene.address)) for way in scene.ways]
        for load in loads:
            wait_for(lambda load=load: load.calls.total(), "the first answers")
        begun = time.monotonic()
        order: list[Callable[[], None]] = []
        while time.monotonic() < begun + seconds or len(scene.events) < least:
            order = order or chance.sample(scene.happenings(), len(scene.happenings()))
            order.pop(0)()
            event = scene.events[-1]
            print(f"  {event.begun - begun:6.1f} s, at {event.begun:.1f}: {event.name}", file=sys.stderr)
            time.sleep(chance.uniform(0.1, 1.5))
        results = [load.stop() for load in loads]
        scene.stop()
        return Outcome(time.monotonic() - begun, scene.events, results)


def main(seconds: str = "300", seed: str = "", *names: str) -> int:
    """Prints the table; returns 1 if there was a fault."""
    chosen, failed = int(seed or random.randrange(10_000)), False
    print(f"Seed {chosen}.\n", flush=True)
    print("| scene | seconds | events | calls | of these streams | failures that may be | others | worst s |")
    print("|" + " --- |" * 8, flush=True)
    for name in names or SCENES:
        outcome = play(SCENES[name], float(seconds) / len(names or SCENES), chosen)
        print(outcome.row(name), flush=True)
        if paused := sum(result.paused for result in outcome.results):
            print(f"  {paused} calls failed while the whole load stood still", file=sys.stderr)
        for fault in outcome.faults[:20]:
            print(f"  {fault}", file=sys.stderr)
        failed |= bool(outcome.faults)
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # ends the servers
    sys.exit(main(*sys.argv[1:]))
