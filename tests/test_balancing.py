"""What replicas may do, and what the application sees of it, at a steady load of images of 500 KB."""

import threading
import time

import pytest

from model_client import ModelClient
from tests import balance
from tests.conftest import wait_for


@pytest.mark.parametrize(
    ("scene", "seconds"),
    [
        (balance.kill_one, 4),
        (balance.rolling_restart, 6),  # each replica has a SIGTERM
        (balance.names_gone, 8),
        (balance.one_is_full, 4),
    ],
)
def test_no_call_fails(scene: balance.Scene, seconds: float) -> None:
    outcome = scene(seconds)
    assert outcome.failures == []
    assert outcome.calls >= balance.RATE * seconds


def test_a_frozen_replica_is_left() -> None:
    """By a client that sends much, and by one that sends little."""
    for outcome in balance.freeze_one(60, 5, frozen_s=6, after_s=2):
        assert outcome.failures == []
        assert max(outcome.latencies) < 4  # noticed within three seconds, then answered by another
        assert outcome.stats["retries"] > 0


def test_a_replica_that_fails_fast_is_left() -> None:
    outcome = balance.one_fails_fast(seconds=6)
    by_turns = outcome.calls / 3
    assert 0 < len(outcome.failures) < by_turns / 4
    assert {type(failure).__name__ for failure in outcome.failures} == {"ModelFailed"}


def test_a_slow_replica_gets_less() -> None:
    by_load, by_turns = (balance.one_is_slow(balancing, seconds=3) for balancing in ("load", "round_robin"))
    assert by_load.failures == by_turns.failures == []
    assert by_load.percentile(99) < by_turns.percentile(99) / 2


def test_scaling_is_noticed_within_ten_seconds() -> None:
    with balance.named(2) as (servers, names, address), ModelClient("steady", addresses=address) as client:
        running, counts = threading.Event(), []

        def sizes() -> None:  # how many replicas have answered, of the calls of the last half second
            while not running.is_set():
                before = {name: one["calls"] for name, one in client.stats()["replicas"].items()}
                time.sleep(0.5)
                after = client.stats()["replicas"]
                counts.append(sum(one["calls"] > before.get(name, 0) for name, one in after.items()))

        def change() -> None:
            names.hosts = ["127.0.0.2", "127.0.0.3"]
            begun = time.monotonic()
            wait_for(lambda: counts and counts[-1] == 2, "the new replica's first answer")
            noticed.append(time.monotonic() - begun)
            names.hosts = ["127.0.0.2"]
            begun = time.monotonic()
            wait_for(lambda: counts[-1] == 1, "the last answer of a replica that is gone from DNS")
            noticed.append(time.monotonic() - begun)
            assert servers[1].stop() == 0

        noticed: list[float] = []
        watching = threading.Thread(target=sizes)
        watching.start()
        outcome = balance.steady(client, 3, change, at_s=1)
        running.set()
        watching.join()
        assert outcome.failures == []
        assert len(noticed) == 2
        assert max(noticed) < 10


def test_addresses_in_a_list_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with balance.replicas({}, {}) as servers:
        ports = [server.port for server in servers]
        known = {"first.test": "127.0.0.1", "second.test": "127.0.0.9"}  # the second is not there yet
        look_up = balance.socket.getaddrinfo

        def fake(host: str, *rest: object, **more: object) -> object:
            if known.get(host) == "gone":
                raise OSError("no such name")
            return look_up(known.get(host, host), *rest, **more)

        monkeypatch.setattr("socket.getaddrinfo", fake)
        monkeypatch.setattr("tiny_model_server.client.addresses._LOOKUP_AGE_S", 0.2)
        addresses = [f"first.test:{ports[0]}", f"second.test:{ports[1]}"]
        with ModelClient("steady", addresses=addresses) as client:
            assert client.run_text("x") == 1
            known["second.test"] = "127.0.0.1"
            wait_for(lambda: client.run_text("x") and len(client.stats()["replicas"]) == 2, "the second replica")
            known |= {"first.test": "gone", "second.test": "gone"}
            time.sleep(0.5)
            assert [client.run_text("x") for _ in range(20)] == [1] * 20
        known["first.test"] = known["second.test"] = "gone"
        with (
            ModelClient("steady", addresses=addresses) as client,
            pytest.raises(Exception, match="first.test:.*cannot be looked up|second.test:.*cannot be looked up"),
        ):
            client.run_text("x")
