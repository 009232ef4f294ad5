"""Every kind of call to the server of the test models at the address given, by the client and packages on the path.

With "same host" after the address, the calls must have gone by unix socket and shared memory, else by gRPC.
"""

import asyncio
import pickle
import sys
import time
from pathlib import Path

import numpy as np

import model_client
from model_client import AsyncModelClient, ModelClient, shared_array

ADDRESS, WAY = sys.argv[1:]
SMALL = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
LARGE = np.random.default_rng(0).integers(0, 256, (1200, 1000, 3), np.uint8)
TREE = {"arrays": [np.arange(5), LARGE.astype(np.float32)], "bytes": b"\0x", "number": 1.5, "none": None}


def equal(one: object, other: object) -> bool:
    """True for trees of equal values whose arrays have the same dtype."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


def error_of(call, *args, **kwargs):
    """The error that a call ends with."""
    try:
        call(*args, **kwargs)
    except model_client.ModelClientError as error:
        return error
    raise AssertionError("no error")


def one_at_a_time(client: ModelClient) -> None:
    assert client.run_text("Grüße") == "Grüße"
    assert client.run_text("x" * 100_000, {"n": 1}) == {"data": "x" * 100_000, "args": {"n": 1}}
    for _ in range(3):
        for image in (SMALL, LARGE, SMALL[..., 0], SMALL.astype(np.float64)):
            assert equal(client.run_image(image), image)
            assert equal(client.run_image_to_image(image), image)
    assert equal(client.run(TREE), TREE)
    answer = client.run_image(LARGE)
    answer[0] = 0  # it belongs to the application
    assert client.get_input_shape() is None


def batches(client: ModelClient) -> None:
    assert equal(client.run_image_batch([SMALL, LARGE, SMALL]), [SMALL, LARGE, SMALL])
    assert client.run_text_batch(["a", "b"]) == ["a", "b"]
    assert equal(client.run_batch([1, TREE, None]), [1, TREE, None])
    with ModelClient("batches", addresses=[ADDRESS]) as other:
        first, second = other.run_batch([-1, 2], return_exceptions=True)
        assert isinstance(first, model_client.InvalidInput), first
        assert second[0] == 2


def several(client: ModelClient) -> None:
    assert equal(client.submit_image(LARGE).result(60), LARGE)
    futures = [client.submit_text("a"), client.submit(TREE), client.submit_image_batch([SMALL, SMALL])]
    assert equal([future.result(60) for future in futures], ["a", TREE, [SMALL, SMALL]])
    assert list(client.map(map(str, range(40)))) == [str(number) for number in range(40)]
    assert equal(list(client.map([SMALL, LARGE] * 5, in_flight=4)), [SMALL, LARGE] * 5)


def streams() -> None:
    with ModelClient("tokens", addresses=[ADDRESS]) as client:
        assert [part["index"] for part in client.run_stream(3)] == [0, 1, 2]
        for part in client.run_stream(1000):
            assert equal(part["array"], np.full(100_000, 0))
            break
        assert isinstance(error_of(lambda: list(client.run_stream(3, {"fail_at": 1}))), model_client.InvalidInput)


def shared(client: ModelClient) -> None:
    array = shared_array(LARGE.shape, np.uint8)
    assert not array.any()
    for value in (1, 2):
        array[...] = value
        assert equal(client.run_image(array), np.full(LARGE.shape, value, np.uint8))


def the_server(client: ModelClient) -> None:
    (info,) = client.model_info()
    assert (info["name"], info["state"]) == ("echo", "READY")
    assert client.health_check() == {"serving": [ADDRESS], "stopped_serving": []}
    assert {"name": "echo", "state": "READY", "reason": ""} in client.list_models()


def errors() -> None:
    with ModelClient("nobody", addresses=[ADDRESS]) as client:
        error = error_of(client.run_text, "x")
        assert isinstance(error, model_client.ModelNotFound)
        assert pickle.loads(pickle.dumps(error)).details() == error.details()
    with ModelClient("misbehave", addresses=[ADDRESS]) as client:
        assert isinstance(error_of(client.run, 1, {"do": "invalid"}), model_client.InvalidInput)
        assert isinstance(error_of(client.run, 1, {"do": "raise"}), model_client.ModelFailed)
    with ModelClient("batches", addresses=[ADDRESS]) as client:
        assert isinstance(error_of(client.run, 1, {"sleep": 2}, timeout=0.3), model_client.DeadlineExceeded)
        assert client.run(1)[0] == 1


def pickled(client: ModelClient) -> None:
    with pickle.loads(pickle.dumps(client)) as again:
        assert again.run_text("p") == "p"


async def with_asyncio() -> None:
    async with AsyncModelClient("echo", addresses=[ADDRESS]) as client:
        for _ in range(3):
            calls = [client.run_image(SMALL) for _ in range(20)]
            assert equal(await asyncio.gather(*calls, client.run_text("t")), [SMALL] * 20 + ["t"])
            assert equal(await client.run_image(LARGE), LARGE)
        assert equal(await client.run(TREE), TREE)
        assert equal(await client.run_image_batch([SMALL, LARGE]), [SMALL, LARGE])
        assert [answer async for answer in client.map(["a", "b", "c"], in_flight=2)] == ["a", "b", "c"]
        assert (await client.model_info())[0]["state"] == "READY"
        assert await client.health_check() == {"serving": [ADDRESS], "stopped_serving": []}
        assert equal(await client.run_image(shared_array((8, 8))), np.zeros((8, 8), np.uint8))
    async with AsyncModelClient("tokens", addresses=[ADDRESS]) as client:
        assert [part["index"] async for part in client.run_stream(3)] == [0, 1, 2]
    async with AsyncModelClient("nobody", addresses=[ADDRESS]) as client:
        try:
            await client.run_text("x")
        except model_client.ModelNotFound:
            return
        raise AssertionError("no error")


def on_the_same_host() -> bool:
    """True if the server has a caller on its unix socket, which is named by its port."""
    port = ADDRESS.rpartition(":")[2]
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(fields[-1] == f"@tiny-model-server:{port}" and fields[5] == "03" for fields in lines)


def main() -> None:
    begun = time.monotonic()
    with ModelClient("echo", addresses=[ADDRESS]) as client:
        one_at_a_time(client)
        if WAY == "same host":
            assert on_the_same_host()
        batches(client)
        several(client)
        shared(client)
        the_server(client)
        pickled(client)
        stats = client.stats()
        assert stats["calls"] > 50, stats
        assert not stats["failed"], stats
    assert client.run_text("again") == "again"  # a closed client connects once more
    client.close()
    streams()
    errors()
    asyncio.run(with_asyncio())
    print(f"all calls are answered: {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
