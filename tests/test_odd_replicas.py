"""What a client sees of replicas that are slow for large inputs only, or lack a model."""

import asyncio
from collections.abc import Iterator

import pytest

from model_client import AsyncModelClient, ModelClient, ModelClientError, ModelNotFound, ModelUnavailable
from tests import odd_replicas
from tests.balance import addresses
from tests.conftest import Server, wait_for


@pytest.fixture(scope="module")
def one_lacks() -> Iterator[list[Server]]:
    with odd_replicas.one_lacks() as servers:
        yield servers


def test_small_calls_beside_a_replica_that_is_slow_for_large_ones() -> None:
    for outcome in odd_replicas.slow_for_large(seconds=4):
        assert outcome.failures == []
        assert outcome.percentile(75) < 0.1  # a third of the calls would wait longer if replicas took turns


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
        wait_for(lambda: answers(client), "an answer of the only replica that has the model")
        assert [client.run_text("x") for _ in range(20)] == [1] * 20


def answers(client: ModelClient) -> bool:
    try:
        return client.run_text("x") == 1
    except ModelUnavailable:
        return False
