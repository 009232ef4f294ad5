"""Answers that are cut off when a part of them has come: the call is made once more, unless it must not be."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from model_client import AsyncModelClient, ModelClient, ServerUnavailable
from tests.conftest import Server, only

IMAGE = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
AFTER = 1 << 20  # bytes of answers


class Cutting:
    """A port that leads to a server; it resets its first ``cuts`` connections after ``AFTER`` bytes of answers."""

    def __init__(self, to: int, cuts: int) -> None:
        self._to, self.cuts = to, cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._copy, args=(near, far), daemon=True).start()
                threading.Thread(target=self._copy_back, args=(far, near), daemon=True).start()

    @staticmethod
    def _copy(near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError), far:
            while data := near.recv(1 << 16):
                far.sendall(data)

    def _copy_back(self, far: socket.socket, near: socket.socket) -> None:
        count = 0
        with contextlib.suppress(OSError), near:
            while (data := far.recv(1 << 16)) and not (self.cuts and count > AFTER):
                near.sendall(data)
                count += len(data)
            if data:
                self.cuts -= 1
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
        far.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    server = Server(only("echo"))
    yield server
    server.kill()


def blocking(address: str, **options: Any) -> Any:
    with ModelClient("echo", addresses=[address]) as client:
        return client.run_image_to_image(IMAGE, **options)


def submitted(address: str, **options: Any) -> Any:
    with ModelClient("echo", addresses=[address]) as client:
        return client.submit_image_to_image(IMAGE, **options).result()


def awaited(address: str, **options: Any) -> Any:
    async def call() -> Any:
        async with AsyncModelClient("echo", addresses=[address]) as client:
            return await client.run_image_to_image(IMAGE, **options)

    return asyncio.run(call())


@pytest.mark.parametrize("run", [blocking, submitted, awaited])
def test_a_call_is_made_once_more(echo: Server, run: Callable[..., Any]) -> None:
    with contextlib.closing(Cutting(echo.port, 1)) as cutting:
        assert np.array_equal(run(cutting.address), IMAGE)
        assert cutting.cuts == 0


@pytest.mark.parametrize("run", [blocking, submitted, awaited])
@pytest.mark.parametrize(("cuts", "options", "left"), [(1, {"retry": False}, 0), (5, {}, 3)])
def test_but_not_if_it_must_not_run_twice_and_not_for_ever(
    echo: Server, run: Callable[..., Any], cuts: int, options: dict[str, Any], left: int
) -> None:
    with contextlib.closing(Cutting(echo.port, cuts)) as cutting:
        with pytest.raises(ServerUnavailable):
            run(cutting.address, **options)
        assert cutting.cuts == left
