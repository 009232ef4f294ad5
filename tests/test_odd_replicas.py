"""What a client sees of replicas that are slow, lack a model, have a wrong health, are far away or at a wrong time."""

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_client import (
    AsyncModelClient,
    DeadlineExceeded,
    ModelClient,
    ModelClientError,
    ModelNotFound,
    ModelUnavailable,
)
from tests import network, odd_replicas
from tests.balance import MODELS, addresses
from tests.conftest import Server, wait_for

StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def one_lacks() -> Iterator[list[Server]]:
    with odd_replicas.one_lacks() as servers:
        yield servers


def test_small_calls_beside_a_replica_that_is_slow_for_large_ones() -> None:
    for outcome in odd_replicas.slow_for_large(seconds=4):
        assert outcome.failures == []
        assert outcome.percentile(75) < 0.2  # if replicas took turns, a third of the large calls would take as long


def test_a_replica_goes_on_with_the_models_that_have_not_failed(one_lacks: list[Server]) -> None:
    failed, ready = odd_replicas.failed_model(one_lacks, seconds=3)
    assert failed.failures == ready.failures == []
    counts = [one["calls"] for one in ready.stats["replicas"].values()]
    assert len(counts) == 3
    assert min(counts) > sum(counts) / 10


@pytest.mark.parametrize(("model", "error"), [("failed", ModelUnavailable), ("unknown", ModelNotFound)])
def test_every_kind_of_call_leaves_a_replica_that_lacks_the_model(
    one_lacks: list[Server], model: str, error: type[ModelClientError]
) -> None:
    async def by_asyncio(known: list[str]) -> None:
        async with AsyncModelClient(model, addresses=known) as client:
            assert await asyncio.gather(*(client.run_text("x") for _ in range(9))) == [1] * 9
        async with AsyncModelClient(model, addresses=known) as client:
            for _ in range(9):
                assert [value async for value in client.run_stream("x")] == [1]

    known = addresses(one_lacks)
    asyncio.run(by_asyncio(known))
    with ModelClient(model, addresses=known) as client:
        assert [list(client.run_stream("x")) for _ in range(9)] == [[1]] * 9
    with ModelClient(model, addresses=known) as client:
        futures = [client.submit_text("x") for _ in range(30)]
        assert [future.result() for future in futures] == [1] * 30
    with ModelClient(model, addresses=known) as client, pytest.raises(error):
        [client.run_text("x", retry=False) for _ in range(30)]
    with ModelClient(model, addresses=known[:1]) as client, pytest.raises(error):
        client.run_text("x")


def test_a_model_that_no_replica_has_is_reported_at_once_and_found_again(one_lacks: list[Server]) -> None:
    with ModelClient("failed", addresses=addresses(one_lacks)) as client:
        assert [client.run_text("x") for _ in range(20)] == [1] * 20
        client.unload_model()
        for _ in range(3):
            with pytest.raises(ModelUnavailable):
                client.run_text("x", timeout=5)
        with one_lacks[1].client("failed") as one:
            one.load_model()
        # It is looked for once a second. Before it is found, some calls go there by turns.
        wait_for(lambda: all(answers(client) for _ in range(9)), "answers of the only replica that has the model")
        assert [client.run_text("x") for _ in range(20)] == [1] * 20


def test_what_a_model_cannot_do_is_not_tried_elsewhere(one_lacks: list[Server]) -> None:
    with ModelClient("steady", addresses=addresses(one_lacks)) as client:
        with pytest.raises(ModelUnavailable, match="not an image"):
            client.run_image_to_image(np.zeros((9, 9), np.uint8))
        assert client.stats()["calls"] == 1


def test_a_client_that_is_closed_while_replicas_are_looked_for_stays_closed() -> None:
    stub = odd_replicas.Stub(status=grpc.StatusCode.NOT_FOUND)
    answer = stub.check(b"", None)
    with odd_replicas.stubs(stub) as known, ModelClient("stub", addresses=known) as client:
        client.list_models()
        looked_for, closed = threading.Event(), threading.Event()

        def check(*_: object) -> bytes:
            looked_for.set()
            closed.wait(5)
            return answer

        stub.check = check  # type: ignore[method-assign]
        future = client.submit_text("x")
        assert looked_for.wait(5)
        client.close()
        closed.set()
        with pytest.raises(ModelNotFound):
            future.result(5)
        assert stub.counts["RunText"] == 1


def test_the_search_for_other_replicas_keeps_the_deadline() -> None:
    stub = odd_replicas.Stub(status=grpc.StatusCode.NOT_FOUND)
    over = threading.Event()
    with odd_replicas.stubs(stub) as known, ModelClient("stub", addresses=known) as client:
        client.list_models()
        stub.check = lambda *_: over.wait(10) and b""  # type: ignore[method-assign]
        begun = time.monotonic()
        with pytest.raises(ModelNotFound):
            client.run_text("x", timeout=0.2)
        assert time.monotonic() - begun < 0.7  # the search alone would take 1 s
        over.set()


def answers(client: ModelClient) -> bool:
    try:
        return client.run_text("x") == 1
    except ModelClientError:
        return False


@pytest.mark.parametrize("health", ["not serving", "hangs", "unimplemented", "flips"])
def test_a_wrong_health_fails_no_call_and_makes_no_storm(health: str) -> None:
    outcome, stub = odd_replicas.wrong_health(health, seconds=2.5, rate=30)
    assert outcome.failures == []
    assert (stub.counts["Run"] > 0) == (health in ("unimplemented", "flips"))
    assert stub.counts["Watch"] < 8  # of connections that become 3 s old


def test_a_replica_that_says_serving_and_answers_unavailable_is_left() -> None:
    outcome, stub = odd_replicas.wrong_health(status=grpc.StatusCode.UNAVAILABLE, seconds=5, rate=30)
    assert len(outcome.failures) <= 1  # a call is tried five times, in turns, before the replica is left
    assert outcome.stats["retries"] < outcome.calls / 4
    assert stub.counts["Watch"] < 8


def test_retries_do_not_end_while_another_replica_answers() -> None:
    """Round robin leaves no replica, so a third of all attempts fail for as long as the client lives."""
    failing = odd_replicas.Stub(status=grpc.StatusCode.UNAVAILABLE)
    with (
        odd_replicas.stubs(failing, odd_replicas.Stub(), odd_replicas.Stub()) as known,
        ModelClient("stub", addresses=known, balancing="round_robin") as client,
    ):
        found = list(client.map(["x"] * 2000, in_flight=64, return_exceptions=True))
    assert failing.counts["RunText"] > 600
    assert sum(isinstance(one, Exception) for one in found) < 20  # five attempts that all went to the failing one


def test_a_replica_that_says_it_does_not_serve_is_not_called_though_no_other_is_left() -> None:
    with (
        odd_replicas.stubs(stub := odd_replicas.Stub("not serving")) as known,
        ModelClient("stub", addresses=known, connect_timeout=1) as client,
    ):
        with pytest.raises(ModelClientError, match="unhealthy"):
            client.run_text("x")
        stub.health = "serving"
        wait_for(lambda: answers(client), "an answer once it says that it serves")


@pytest.mark.skipif(bool(network.missing()), reason=network.missing())
def test_a_network_that_is_lossy_and_far_fails_no_call() -> None:
    outcome = odd_replicas.far(loss=0.01, delay_ms=25, seconds=3, rate=5)
    assert outcome.failures == []
    assert min(outcome.latencies) > 0.05  # the network has the delay
    assert outcome.percentile(50) < 1.5
    assert outcome.stats["retries"] <= 1  # no connection is taken for a dead one


needs_clock = pytest.mark.skipif(bool(odd_replicas.Clock.missing()), reason=odd_replicas.Clock.missing())


@needs_clock
def test_a_clock_that_steps_fails_no_call() -> None:
    outcome, replica = odd_replicas.clock_of_a_replica(seconds=6, rate=30)
    hours = {line[11:13] for line in replica.log if "/server.Server/Run " in line}
    assert len(hours) >= 3, hours  # its own, the next and the one before
    assert outcome.failures == []
    assert outcome.stats["retries"] == 0
    outcome = odd_replicas.clock_of_the_client(seconds=4)
    assert outcome.failures == []
    assert outcome.stats["retries"] == 0


@needs_clock
def test_deadlines_and_metrics_know_nothing_of_the_clock(start_server: StartServer, tmp_path: Path) -> None:
    clock = odd_replicas.Clock(tmp_path)
    env = clock.env | {"TMS_MODEL_STEADY_ARGS": '{"ms": 1500}', "TMS_MODEL_STEADY_TIMEOUT_S": 3}
    server = start_server(MODELS, **env)
    with server.client("steady") as client:
        for seconds in odd_replicas.STEPS_S:
            done = client.submit_text("x")
            clock.step(seconds)
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                client.run_text("x", timeout=0.5)
            assert 0.4 < time.monotonic() - begun < 1.4
            assert done.result() == 1  # neither the call nor its worker was ended by the step
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert min(values.values()) >= 0
    assert all(value < 60 for name, value in values.items() if name.endswith("_seconds_sum")), values
