"""The script behind ``make bench-peers``: every way to call this server, and grpcio alone, for a moment."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from tests import peers
from tests.conftest import wait_for
from tests.peer_servers import PEERS, SHARED, Processes, Servers, this_server, to_light


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers() as started:
        PEERS["grpcio"](started)
        to_light(started, this_server(started, [peers.SAME_HOST, SHARED, peers.GRPC, peers.HTTP]))
        started.wait()
        yield started


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SECONDS": 0.02, "TURNS": 1, "IDLE_S": 0.1, "SIDES": [16, 32, 64]}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(peers, "PAYLOADS", ["20 B text", "24x32x3"])


def rows_of(printed: str) -> dict[str, list[float]]:
    """The numbers of each row of Markdown tables."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {name: [float(number) for cell in cells for number in re.findall(r"[\d.]+", cell)] for name, *cells in rows}


def test_every_way_is_measured_and_compared(servers: Servers, capsys: pytest.CaptureFixture[str]) -> None:
    measured = peers.in_turns(servers.ways, 2, peers.PAYLOADS, peers.SECONDS)
    peers.table("p50 and rate", measured, "{p50_ms:.3f} {rate:.3f} {caller_ms:.3f}")
    rows = rows_of(capsys.readouterr().out)
    for name in servers.ways:
        assert len(rows[name]) == 6, rows
        assert min(rows[name]) > 0, rows
    peers.ratios("times as fast", measured, "p50_ms", most=False)
    peers.ratios("times the calls", measured, "rate", most=True)
    ratios = rows_of(capsys.readouterr().out)
    ours, bare = (peers.medians(measured[name]["20 B text"]).rate for name in (peers.GRPC, peers.BARE))
    assert ratios[f"{peers.GRPC}, beside grpcio alone"][0] == pytest.approx(ours / bare, abs=0.01)
    assert set(ratios) - {"times as fast", "times the calls", "---"} == {
        f"{peers.SAME_HOST}, beside grpcio alone",
        f"{peers.GRPC}, beside grpcio alone",
    }


def test_the_cpu_of_all_processes_of_a_server_is_counted() -> None:
    """Also of those that have ended: two of 0.3 s each."""
    busy = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True); sys.stdin.read()"
    ended = f"subprocess.run([sys.executable, '-c', {busy!r}], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)"
    code = f"import subprocess, sys\n{ended}\nsubprocess.run([sys.executable, '-c', {busy!r}])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as root:
        assert root.stdout
        assert root.stdout.readline() == "done\n"
        processes = Processes(root.pid)
        assert len(processes.all()) == 2
        assert 0.5 < processes.cpu_s() < 2
        root.communicate("")


def stopped(processes: Processes) -> bool:
    return {process.status() for process in processes.all()} == {"stopped"}


def test_servers_that_spin_are_stopped_while_others_are_measured(
    servers: Servers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SPINS", -1.0)
    peers.idle(servers)
    assert capsys.readouterr().out.count("| yes |") == 2
    for name, way in {"grpcio alone": peers.BARE, "this server": peers.GRPC}.items():
        processes = servers.processes[name]
        wait_for(partial(stopped, processes), f"{name} to be stopped")
        assert servers.ways[way].measure("24x32x3", 1, 0.02).rate > 0
        wait_for(partial(stopped, processes), f"{name} to be stopped")
        processes.go_on()
        processes.spins = False


def test_batches_sizes_and_the_fit(servers: Servers, capsys: pytest.CaptureFixture[str]) -> None:
    peers.batching(servers.light)
    rows = rows_of(capsys.readouterr().out)
    assert all(0 < rows[name][1] < 1.2 for name in servers.light), rows
    lines = peers.slopes({peers.GRPC: servers.ways[peers.GRPC]})
    assert [side for side, _ in lines[peers.GRPC]] == [16, 32, 64]
    peers.fits({"two gigabytes a second": [(side, 1 + 3 * side**2 / 2e6) for side in (16, 32, 64)]})
    assert rows_of(capsys.readouterr().out)["two gigabytes a second"] == [2.0, 1.0]


def test_the_error_of_a_caller_is_reported(servers: Servers) -> None:
    servers.processes["grpcio alone"].kill()
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        servers.ways[peers.BARE].measure("20 B text", 2, 0.02)
