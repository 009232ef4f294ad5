"""Mistakes in what an application gives the client raise at once, with what to write instead."""

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_client
from model_client import AsyncModelClient, ModelClient
from tests.conftest import Server

NOWHERE = "127.0.0.1:1"
AT_ONCE_S = 5  # a client without a server waits 30 s

Calls = ModelClient | AsyncModelClient
IMAGE = np.zeros((4, 6, 3), np.uint8)

MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "text None": (lambda c: c.run_text(None), TypeError, "a text is a str, not None"),
    "text 5": (lambda c: c.run_text(5), TypeError, "a text is a str, not 5"),
    "text bytes": (lambda c: c.run_text(b"x"), TypeError, "not b'x'"),
    "text surrogate": (lambda c: c.run_text("a\ud83d"), ValueError, "half of a surrogate pair at 1"),
    "texts surrogate": (lambda c: c.run_text_batch(["\ud83d"]), ValueError, "half of a surrogate pair"),
    "texts str": (lambda c: c.run_text_batch("abc"), TypeError, "for one text there is run_text"),
    "texts None": (lambda c: c.run_text_batch(None), TypeError, "takes a list, not None"),
    "texts of 5": (lambda c: c.run_text_batch(["a", 5]), TypeError, "a text is a str, not 5"),
    "texts set": (lambda c: c.run_text_batch({"a"}), TypeError, "takes a list, not {"),
    "image None": (lambda c: c.run_image(None), TypeError, "the path of an image file or the bytes of one, not None"),
    "image 5": (lambda c: c.run_image(5), TypeError, "HxW or HxWxC"),
    "image dict": (lambda c: c.run_image({"a": 1}), TypeError, "not {'a': 1}"),
    "image URL": (lambda c: c.run_image("https://example.com/a.jpg"), ValueError, r"urlopen\(url\)\.read\(\)"),
    "image data URL": (lambda c: c.run_image("data:image/png;base64,AAAA"), ValueError, "not the path of an image"),
    "image empty path": (lambda c: c.run_image(""), ValueError, "not the path of an image file"),
    "image no file": (lambda c: c.run_image("no/such/file.jpg"), FileNotFoundError, "no/such/file.jpg"),
    "image empty": (lambda c: c.run_image(b""), model_client.InvalidInput, "(no|not an) image file"),
    "image objects": (lambda c: c.run_image(np.zeros((2, 2), object)), model_client.InvalidInput, "array of numbers"),
    "image masked": (lambda c: c.run_image(np.ma.masked_equal(np.zeros((2, 2)), 0)), TypeError, r"\.filled\("),
    "image to image": (lambda c: c.run_image_to_image(None), TypeError, "an image is"),
    "images array": (lambda c: c.run_image_batch(IMAGE), TypeError, r"not an array of shape \(4, 6, 3\)"),
    "images gray": (lambda c: c.run_image_batch(IMAGE[..., 0]), TypeError, "for one image there is run_image"),
    "images str": (lambda c: c.run_image_batch("a.jpg"), TypeError, "takes a list, not 'a.jpg'"),
    "images path": (lambda c: c.run_image_batch(Path("a.jpg")), TypeError, "for one image there is run_image"),
    "images None": (lambda c: c.run_image_batch([IMAGE, None]), TypeError, "an image is"),
    "items str": (lambda c: c.run_batch("abc"), TypeError, "for one value there is run"),
    "items dict": (lambda c: c.run_batch({"a": 1}), TypeError, "not {'a': 1}"),
    "items 5": (lambda c: c.run_batch(5), TypeError, "takes a list, not 5"),
    "items 0-d": (lambda c: c.run_batch(np.array(5)), TypeError, "takes a list"),
    "value": (lambda c: c.run(iter([1])), TypeError, "cannot serialize list_iterator"),
    "args list": (lambda c: c.run_text("x", ["a"]), TypeError, "args must be a dict, not list"),
    "args object": (lambda c: c.run(1, {"a": object()}), TypeError, r"cannot serialize object at \.a"),
    "args bytes": (lambda c: c.run_image(IMAGE, {"a": b"x"}), TypeError, "in args at"),
    "timeout text": (lambda c: c.run_text("x", timeout="5"), TypeError, "timeout is seconds, a number, not '5'"),
    "timeout True": (lambda c: c.run(1, timeout=True), TypeError, "timeout is seconds"),
    "timeout 0": (lambda c: c.run_image(IMAGE, timeout=0), ValueError, "more than 0, not 0"),
    "timeout -1": (lambda c: c.run_text_batch(["x"], timeout=-1), ValueError, "more than 0, not -1"),
    "timeout NaN": (lambda c: c.run_batch([1], timeout=math.nan), ValueError, "more than 0, not nan"),
    "timeout images": (lambda c: c.run_image_batch([IMAGE], timeout=()), TypeError, r"not \(\)"),
    "timeout shape": (lambda c: c.get_input_shape(timeout=-1), ValueError, "more than 0"),
    "timeout models": (lambda c: c.list_models(timeout="x"), TypeError, "timeout is seconds"),
}


def refused(call: Callable[[], Any], kind: Any, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=message):
        call()
    assert time.monotonic() - begun < AT_ONCE_S


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_at_once(mistake: str) -> None:
    call, kind, message = MISTAKES[mistake]
    with ModelClient("m", addresses=NOWHERE) as client:
        refused(lambda: call(client), kind, message)

    async def by_asyncio() -> None:
        async with AsyncModelClient("m", addresses=NOWHERE) as client:
            await call(client)

    refused(lambda: asyncio.run(by_asyncio()), kind, message)


SUBMITTED: list[tuple[Callable[[ModelClient], Any], type[Exception], str]] = [
    (lambda c: c.submit_text(None), TypeError, "a text is a str"),  # type: ignore[arg-type]
    (lambda c: c.submit_image("http://x/y.png"), ValueError, "urlopen"),
    (lambda c: c.submit_image_to_image(5), TypeError, "an image is"),  # type: ignore[arg-type]
    (lambda c: c.submit(object()), TypeError, "cannot serialize object"),
    (lambda c: c.submit(1, timeout="1"), TypeError, "timeout is seconds"),  # type: ignore[arg-type]
    (lambda c: c.submit_text_batch("ab"), TypeError, "takes a list"),
    (lambda c: c.submit_image_batch(IMAGE), TypeError, "not an array of shape"),
    (lambda c: c.submit_batch("ab"), TypeError, "takes a list"),
    (lambda c: next(c.map("abc")), TypeError, "map takes a list or another iterable"),
    (lambda c: next(c.map({"a": 1})), TypeError, "not {'a': 1}"),
    (lambda c: next(c.map(5)), TypeError, "iterable"),  # type: ignore[arg-type]
    (lambda c: next(c.map([1], timeout=math.nan)), ValueError, "more than 0"),
    (lambda c: next(c.map([1], method="run_batch")), ValueError, "method is one of run, run_text"),
    (lambda c: next(c.map([5], method="run_text")), TypeError, "a text is a str"),
    (lambda c: next(c.map([1], in_flight=0)), ValueError, "in_flight"),
    (lambda c: next(c.run_stream(map(str, [1]))), TypeError, "cannot serialize map"),
    (lambda c: next(c.run_stream(1, timeout=-1)), ValueError, "more than 0"),
    (lambda c: next(c.map([1], in_flight="4")), TypeError, "in_flight is a whole number, not '4'"),  # type: ignore[arg-type]
    (lambda c: next(c.map([1], in_flight=math.nan)), TypeError, "in_flight is a whole number"),  # type: ignore[arg-type]
    (lambda c: c.load_model("2"), TypeError, "workers is a whole number, not '2'"),  # type: ignore[arg-type]
    (lambda c: c.load_model(True), TypeError, "workers is a whole number, not True"),
    (lambda c: c.health_check(timeout=-1), ValueError, "timeout is seconds, more than 0"),
    (lambda c: c.health_check(timeout="1"), TypeError, "timeout is seconds"),  # type: ignore[arg-type]
    (lambda c: c.model_info(timeout="1"), TypeError, "timeout is seconds"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("index", range(len(SUBMITTED)))
def test_so_is_one_in_calls_that_do_not_wait(index: int) -> None:
    call, kind, message = SUBMITTED[index]
    with ModelClient("m", addresses=NOWHERE) as client:
        refused(lambda: call(client), kind, message)


STREAMED: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda c: c.map("abc"), TypeError, "map takes a list"),
    (lambda c: c.map([1], timeout="1"), TypeError, "timeout is seconds"),
    (lambda c: c.run_stream(map(str, [1])), TypeError, "cannot serialize map"),
    (lambda c: c.run_stream(1, timeout=0), ValueError, "more than 0"),
]


def test_async_streams_and_maps_report_it_too() -> None:
    async def first(answers: Any) -> None:
        async for _ in answers:
            return

    async def calls() -> None:
        async with AsyncModelClient("m", addresses=NOWHERE) as client:
            for call, kind, message in STREAMED:
                with pytest.raises(kind, match=message):
                    await first(call(client))

    asyncio.run(calls())


WRONG_PLACES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"server_name": 5}, TypeError, "server_name is a text, not a int"),  # gRPC would crash the process
    ({"server_name": "ü"}, ValueError, "printable ASCII"),
    ({"token": b"x"}, TypeError, "token is a text, not a bytes"),
    ({"token": "grün"}, ValueError, "token may have printable ASCII"),
    ({"admin_token": 5}, TypeError, "admin_token is a text"),
    ({"admin_token": "a\nb"}, ValueError, "admin_token may have printable ASCII"),
    ({"balancing": ["load"]}, TypeError, "balancing is a text, not a list"),
    ({"tls": "no"}, TypeError, "tls is True or False, not 'no'"),
    ({"model": "a\ud83d"}, ValueError, "half of a surrogate pair"),
    ({"ip": "localhost:50001", "port": 50002}, ValueError, "is a whole address; leave out port=50002"),
    ({"ip": "[::1]:50001", "port": 50002}, ValueError, "is a whole address"),
    ({"ip": "unix:/tmp/x", "port": 50002}, ValueError, "is a whole address"),
    ({"ip": "http://localhost:50001"}, ValueError, "must be host:port"),
    ({"ip": "http://localhost", "port": 50001}, ValueError, "must be host:port"),
    ({"ip": "my host", "port": 50001}, ValueError, "must be host:port"),
    ({"ip": "a:1,b:2"}, ValueError, "must be host:port"),
    ({"ip": "local/host"}, ValueError, "must be host:port"),
    ({"ip": 50001}, TypeError, "a port is given as port=50000"),
    ({"port": 0}, ValueError, "must be host:port"),
    ({"port": 70000}, ValueError, "must be host:port"),
    ({"port": "http"}, ValueError, "must be host:port"),
    ({"port": 1.5}, TypeError, "port is a whole number"),
    ({"port": True}, TypeError, "port is a whole number"),
    ({"addresses": "grpc://host:50001"}, ValueError, "must be host:port"),
    ({"addresses": "https://host/path"}, ValueError, "must be host:port"),
    ({"addresses": "::1:50001"}, ValueError, "must be host:port"),
    ({"addresses": "localhost"}, ValueError, "must be host:port"),
    ({"addresses": "a:1,,b:2"}, ValueError, "must be host:port"),
    ({"addresses": "my host:50001"}, ValueError, "must be host:port"),
    ({"addresses": "user@host:50001"}, ValueError, "must be host:port"),
    ({"addresses": "a..b:50001"}, ValueError, "must be host:port"),
    ({"addresses": f"{'a' * 64}:50001"}, ValueError, "must be host:port"),
    ({"addresses": ["localhost:99999"]}, ValueError, "must be host:port"),
    ({"addresses": [50001]}, TypeError, "an address is a text"),
    ({"addresses": 50001}, TypeError, "addresses is a list of texts"),
    ({"addresses": b"localhost:1"}, TypeError, "addresses is a list of texts"),
    ({"addresses": []}, ValueError, "addresses is empty"),
    ({"addresses": "a:1", "port": 1}, ValueError, "either addresses, or ip and port"),
    ({"model": 5}, TypeError, "model is the name of a model"),
    ({"timeout": "5"}, TypeError, "timeout is seconds"),
    ({"timeout": math.nan}, ValueError, "timeout is seconds, more than 0"),
    ({"connect_timeout": -1}, ValueError, "connect_timeout is seconds, more than 0"),
    ({"connect_timeout": "x"}, TypeError, "connect_timeout is seconds"),
]


@pytest.mark.parametrize("index", range(len(WRONG_PLACES)))
@pytest.mark.parametrize("kind", [ModelClient, AsyncModelClient])
def test_a_wrong_place_raises_at_once(kind: Any, index: int) -> None:
    options, error, message = WRONG_PLACES[index]
    refused(lambda: kind(**{"model": "m"} | options), error, message)


@pytest.mark.parametrize(
    ("options", "addresses"),
    [
        ({"ip": "localhost:50001"}, ["localhost:50001"]),
        ({"ip": "localhost:50001", "port": 50001}, ["localhost:50001"]),
        ({"ip": "[::1]:50001"}, ["[::1]:50001"]),
        ({"ip": "unix:/tmp/x"}, ["unix:/tmp/x"]),
        ({"ip": "::1", "port": 50001}, ["[::1]:50001"]),
        ({"ip": "[::1]"}, ["[::1]:50000"]),
        ({"ip": "10.0.0.1"}, ["10.0.0.1:50000"]),
        ({"ip": "my_host.example.com.", "port": "50001"}, ["my_host.example.com.:50001"]),
        ({"port": np.int64(50001)}, ["localhost:50001"]),
        ({"addresses": " a:1 , b:2"}, ["a:1", "b:2"]),
        ({"addresses": ["unix:/tmp/x"]}, ["unix:/tmp/x"]),
        ({"addresses": "dns://8.8.8.8/host:50001"}, ["dns://8.8.8.8/host:50001"]),
    ],
)
def test_right_places(options: dict[str, Any], addresses: list[str]) -> None:
    assert ModelClient("m", **options).addresses == addresses
    assert AsyncModelClient("m", **options).addresses == addresses


def test_the_address_as_second_argument_is_the_address(server: Server) -> None:
    with ModelClient("echo", server.address) as client:
        assert client.run_text("x", timeout=math.inf) == "x"
        assert client.run_text("y", timeout=np.float32(20)) == "y"
        assert len(client.run_image_batch(np.zeros((2, 4, 6, 3), np.uint8))) == 2
        assert len(client.run_image_batch(np.zeros((3, 4, 6), np.uint8))) == 3
        assert client.run_batch(iter([1, 2])) == [1, 2]  # type: ignore[arg-type]
        with pytest.raises(model_client.InvalidInput, match="the batch is empty"):
            client.run_batch([])
