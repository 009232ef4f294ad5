"""Load as applications make it, in a process of its own; every answer is checked by its content.

``checked_load.py WAY ADDRESS CALLERS CONNECT_AGE_S LEAK`` calls until its standard input is closed. WAY is "local",
"gRPC" or "HTTP". It prints a line of JSON each half second: the calls so far by kind. The last line is a whole
``Result``. ``soak.py`` and ``chaos.py`` start it.

No two calls send the same content, so a mixed-up answer is seen. HTTP has callers in threads only: its server does not
know what they are.
"""

import asyncio
import concurrent.futures
import io
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import (  # noqa: E402
    AsyncModelClient,
    DeadlineExceeded,
    InvalidInput,
    ModelClient,
    request_id,
    shared_array,
)
from tiny_model_server import request_ids  # noqa: E402
from tiny_model_server.client.errors import from_status  # noqa: E402

MODELS = ROOT / "tests" / "models_checked"
SHAPES = [(224, 224, 3), (480, 640, 3), (1080, 1920, 3)]
TIMEOUT_S = 30.0
"""Of every call, unless it is meant to be late."""
_PAUSE_S = 1.0
_LATE_S = 0.1
_BEYOND_S = 1.0  # what a call takes that is late or cancelled
_NUMBERS = itertools.count(1)


class Wrong(AssertionError):
    """An answer that is not the one to the request."""


def require(true: bool, *words: object) -> None:
    if not true:
        raise Wrong(" ".join(map(str, words))[:500])


@dataclass
class Failure:
    """A call that failed, and when, by ``time.monotonic``."""

    kind: str
    status: str
    message: str
    begun: float
    ended: float

    def meanwhile(self, times: tuple[float, float]) -> bool:
        """True if the call was under way at some time between the two."""
        return self.begun <= times[1] and self.ended >= times[0]


@dataclass
class Result:
    """What came of a load."""

    calls: Counter[str] = field(default_factory=Counter)
    """Those answered as they should be, by kind."""
    failures: list[Failure] = field(default_factory=list)
    paused: int = 0
    """Further failures, of calls under way while this process stood still for a second: stopped, or without CPU."""
    wrong: list[str] = field(default_factory=list)
    """Answers that are not those to their requests."""
    worst_s: float = 0
    descriptors: list[int] = field(default_factory=list)
    """Of the process before its first call, and when all its clients are closed."""


# ---- clients, all with the methods of AsyncModelClient


class Awaited:
    """An ``AsyncModelClient``."""

    def __init__(self, model: str, address: str, balancing: str = "load") -> None:
        self._client = AsyncModelClient(model, addresses=address, timeout=TIMEOUT_S, balancing=balancing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def cancelled(self, data: Any, after_s: float) -> None:
        """Cancels a call after a while, unless it has failed by then."""
        task = asyncio.ensure_future(self._client.run(data))
        await asyncio.sleep(after_s)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Blocking:
    """A ``ModelClient``. Its calls block the loop, so each caller has a thread and a loop of its own."""

    def __init__(self, model: str, address: str, balancing: str = "load") -> None:
        self._client = ModelClient(model, addresses=address, timeout=TIMEOUT_S, balancing=balancing)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._client, name)

        async def call(*args: Any, **options: Any) -> Any:
            return method(*args, **options)

        return call

    async def run_stream(self, data: Any) -> AsyncIterator[Any]:
        with closing(self._client.run_stream(data)) as values:  # type: ignore[type-var]
            for value in values:
                yield value

    async def map(self, items: Any, **options: Any) -> AsyncIterator[Any]:
        for answer in self._client.map(items, **options):
            yield answer

    async def cancelled(self, data: Any, after_s: float) -> None:
        """Cancels a call after a while, unless it has failed by then."""
        future = self._client.submit(data)
        await asyncio.sleep(after_s)
        future.cancel()
        with suppress(concurrent.futures.CancelledError):
            future.result()


class Http:
    """The same calls by HTTP, of which each ends in the same exceptions."""

    def __init__(self, model: str, address: str, balancing: str = "") -> None:
        self._url = f"http://{address}/models/{model}/run"
        self._session = requests.Session()

    async def close(self) -> None:
        self._session.close()

    def _post(self, kind: str, body: bytes, accept: str, timeout: float = TIMEOUT_S, stream: bool = False) -> Any:
        sent = request_ids.for_call()
        headers = {"Content-Type": kind, "Accept": accept, "X-Request-Id": sent}
        try:
            answer = self._session.post(self._url, body, headers=headers, timeout=timeout, stream=stream)
        except requests.ReadTimeout as error:
            raise from_status("DEADLINE_EXCEEDED", str(error)) from None
        received = answer.headers["X-Request-Id"]
        require(received == sent, "the answer to", sent, "has the id", received)
        if answer.status_code != 200:
            raise from_status(**_fields(answer.json()), request_id=received)
        return answer

    async def run_text(self, text: str) -> Any:
        return self._post("text/plain", text.encode(), "application/json").json()

    async def run_text_batch(self, texts: list[str], return_exceptions: bool = False) -> list[Any]:
        return [await self._or_error(text) for text in texts]

    async def _or_error(self, text: str) -> Any:
        try:
            return await self.run_text(text)
        except InvalidInput as error:
            return error

    async def run_image(self, image: Any) -> Any:
        return self._post("application/x-npy", _npy(image), "application/json").json()

    async def run_image_to_image(self, image: Any) -> Any:
        return np.load(io.BytesIO(self._post("application/x-npy", _npy(image), "application/x-npy").content))

    async def run(self, data: Any, timeout: float = TIMEOUT_S) -> Any:
        return self._post("application/json", _json(data), "application/json", timeout).json()

    async def run_stream(self, data: Any) -> AsyncIterator[Any]:
        name = ""
        with closing(self._post("application/json", _json(data), "text/event-stream", stream=True)) as answer:
            for line in answer.iter_lines():
                field_, _, text = line.decode().partition(": ")
                if field_ == "event":
                    name = text
                elif field_ == "data" and name == "error":
                    raise from_status(**_fields(json.loads(text)))
                elif field_ == "data" and name == "end":
                    return
                elif field_ == "data":
                    yield json.loads(text)
        raise Wrong("a stream of events has no end")

    async def map(self, items: Any, **options: Any) -> AsyncIterator[Any]:
        for item in items:
            yield await self.run_image(item)

    async def cancelled(self, data: Any, after_s: float) -> None:
        """Disconnects after a while."""
        with suppress(DeadlineExceeded):
            await self.run(data, timeout=max(0.01, after_s))


def _fields(error: dict[str, str]) -> dict[str, str]:
    return {"status": error["status"], "details": error["error"]}


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _json(value: Any) -> bytes:
    def array(found: Any) -> Any:
        return {"$array": {"dtype": str(found.dtype), "data": found.tolist()}}

    return json.dumps(value, default=array).encode()


class Clients:
    """A client of each model."""

    def __init__(self, kind: Any, address: str, balancing: str = "load") -> None:
        self.digest, self.inverted, self.numbers = self._all = [
            kind(model, address, balancing) for model in ("digest", "inverted", "numbers")
        ]

    async def close(self) -> None:
        for client in self._all:
            await client.close()


# ---- calls: each sends what no other sends, and checks what it gets


class Content:
    """Makes what one caller sends."""

    def __init__(self, seed: int, shared: bool) -> None:
        self.random = random.Random(seed)
        pixels = np.random.default_rng(seed)
        self._images = {shape: (shared_array if shared else np.empty)(shape, np.uint8) for shape in SHAPES}
        for image in self._images.values():
            image[:] = pixels.integers(0, 256, image.shape, np.uint8)

    def tag(self) -> str:
        return f"{os.getpid()}-{next(_NUMBERS)}"

    def text(self) -> str:
        """Short as a rule; some are beyond what the local transport's loop parses itself."""
        return f"{self.tag()} " + "é" * self.random.choice([0, 10, 100, 1000, 30_000])

    def image(self) -> Any:
        """Each row has the call's number in it. The caller's next image overwrites it."""
        image = self._images[self.random.choice(SHAPES)]
        number = next(_NUMBERS)
        image[:, self.random.randrange(image.shape[1])] = [number & 255, number >> 8 & 255, number >> 16 & 255]
        return image

    def numbers(self, most_pause_s: float = 0.05, **more: Any) -> dict[str, Any]:
        """For the model ``numbers``: a stream of so many values."""
        given = {"tag": self.tag(), "count": self.random.randint(1, 20), "seed": self.random.randrange(1 << 20)}
        pause = self.random.uniform(0, most_pause_s)
        return given | {"pause": pause, "size": self.random.choice([1, 100, 3000])} | more


def digest_of(data: str | np.ndarray[Any, Any]) -> dict[str, Any]:
    sent = data.encode() if isinstance(data, str) else data.tobytes()
    return {"size": len(sent), "crc": zlib.crc32(sent), "begins": sent[:24].hex()}


def require_equal(found: Any, expected: Any) -> None:
    require(found == expected, "got", found, "for", expected)


def require_number(found: Any, sent: dict[str, Any], index: int) -> None:
    require((found["tag"], found["index"]) == (sent["tag"], index), "got", found, "as number", index, "of", sent)
    require(np.array_equal(found["array"], np.full(sent["size"], sent["seed"] + index)), "another array for", sent)


async def text(on: Clients, new: Content) -> None:
    sent = new.text()
    require_equal(await on.digest.run_text(sent), digest_of(sent))


async def image(on: Clients, new: Content) -> None:
    sent = new.image()
    require_equal(await on.digest.run_image(sent), digest_of(sent))


async def inverted(on: Clients, new: Content) -> None:
    sent = new.image()
    require(np.array_equal(await on.inverted.run_image_to_image(sent), 255 - sent), "another image")


async def batch(on: Clients, new: Content) -> None:
    """Some items are wrong, and have an error in their places."""
    sent = [new.random.choice(["", "", "", "wrong "]) + new.text() for _ in range(new.random.randint(1, 10))]
    answers = await on.digest.run_text_batch(sent, return_exceptions=True)
    require(len(answers) == len(sent), len(answers), "answers to", len(sent))
    for one, answer in zip(sent, answers, strict=True):
        if one.startswith("wrong"):
            require(isinstance(answer, InvalidInput) and one[:40] in str(answer), "got", answer, "for", one[:40])
        else:
            require_equal(answer, digest_of(one))


async def value(on: Clients, new: Content) -> None:
    sent = {"tag": new.tag(), "arrays": [np.arange(new.random.randrange(1, 50)) for _ in range(3)]}
    answer = await on.digest.run(sent)
    require(answer["tag"] == sent["tag"], "got", answer, "for", sent)
    require(all(map(np.array_equal, answer["arrays"], sent["arrays"])), "got", answer, "for", sent)


async def mapped(on: Clients, new: Content) -> None:
    sent = [new.image().copy() for _ in range(8)]
    answers = [answer async for answer in on.digest.map(sent, in_flight=3)]
    require_equal(answers, [digest_of(one) for one in sent])


async def listed(on: Clients, new: Content) -> None:
    """A generator's values without a stream."""
    sent = new.numbers(0.01)
    answers = await on.numbers.run(sent)
    require(len(answers) == sent["count"], len(answers), "values of", sent)
    for index, answer in enumerate(answers):
        require_number(answer, sent, index)


async def stream(on: Clients, new: Content) -> None:
    sent, count = new.numbers(), 0
    async with aclosing(on.numbers.run_stream(sent)) as values:
        async for found in values:
            require_number(found, sent, count)
            count += 1
    require(count == sent["count"], count, "values of", sent)


async def abandoned(on: Clients, new: Content) -> None:
    """A stream that its caller leaves midway."""
    sent = new.numbers(count=1000)
    leave_at, count = new.random.randint(1, 10), 0
    async with aclosing(on.numbers.run_stream(sent)) as values:
        async for found in values:
            require_number(found, sent, count)
            count += 1
            if count == leave_at:
                break
    require(count == leave_at, count, "values, not", leave_at, "of", sent)


async def broken(on: Clients, new: Content) -> None:
    """A stream whose model raises midway."""
    fails_at, count = new.random.randint(1, 5), 0
    sent = new.numbers(count=10, fails_at=fails_at)
    try:
        async with aclosing(on.numbers.run_stream(sent)) as values:
            async for found in values:
                require_number(found, sent, count)
                count += 1
    except InvalidInput as error:
        require(sent["tag"] in str(error), "got", error, "for", sent)
        require(count == fails_at, count, "values before the error, not", fails_at)
    else:
        raise Wrong(f"a stream that fails at {fails_at} ended after {count}")


async def invalid(on: Clients, new: Content) -> None:
    tag = new.tag()
    with request_id(f"id {tag}"):
        try:
            answer = await on.digest.run_text(f"wrong {tag}")
        except InvalidInput as error:
            require(tag in str(error), "got", error, "for", tag)
            require(error.request_id == f"id {tag}", "got", error.request_id, "for", tag)
        else:
            raise Wrong(f"wrong {tag} was answered: {answer}")


async def late(on: Clients, new: Content) -> None:
    """An answer after the deadline is no wrong one; a client that stands still may get it."""
    try:
        await on.numbers.run(new.numbers(count=1, pause=_BEYOND_S), timeout=_LATE_S)
    except DeadlineExceeded:
        return
    raise TimeoutError("a late call was answered")


async def cancelled(on: Clients, new: Content) -> None:
    """With an image, which lies in buffers that the next call uses."""
    more = {} if isinstance(on.numbers, Http) else {"image": new.image().copy()}
    sent = new.numbers(count=1, pause=_BEYOND_S, **more)
    await on.numbers.cancelled(sent, new.random.uniform(0, _BEYOND_S / 2))


Kind = Callable[[Clients, Content], Awaitable[None]]
KINDS: dict[Kind, int] = {
    text: 8,
    image: 8,
    inverted: 4,
    batch: 4,
    value: 2,
    mapped: 2,
    listed: 1,
    stream: 3,
    abandoned: 2,
    broken: 1,
    invalid: 1,
    late: 1,
    cancelled: 2,
}
"""Every kind of call, and how often it is made beside the others."""


# ---- the load


class Load:
    """Callers in threads and on event loops, until ``end``."""

    def __init__(self, way: str, address: str, callers: int, connect_s: float, leak: bool) -> None:
        self.result = Result()
        self.end = threading.Event()
        self._way, self._address, self._leak = way, address, leak
        self._connect_s = connect_s
        self._leaked: list[Clients] = []
        self._pauses: list[tuple[float, float]] = []
        makers = [self._blocking, self._asyncio, self._newcomers]
        self._threads = [threading.Thread(target=maker, args=(callers,)) for maker in makers]

    def run(self) -> Result:
        """Prints the calls so far twice a second until standard input is closed; returns what came of them."""
        self.result.descriptors.append(psutil.Process().num_fds())
        for thread in self._threads:
            thread.start()
        closed = threading.Thread(target=sys.stdin.read)
        closed.start()
        while closed.is_alive():
            before = time.monotonic()
            closed.join(0.5)
            if time.monotonic() > before + 0.5 + _PAUSE_S:
                self._pauses.append((before, time.monotonic()))
            print(json.dumps(self.result.calls.copy()), flush=True)
        self.end.set()
        for thread in self._threads:
            thread.join()
        judged = [failure for failure in self.result.failures if not any(map(failure.meanwhile, self._pauses))]
        self.result.paused = len(self.result.failures) - len(judged)
        self.result.failures = judged
        self.result.descriptors.append(psutil.Process().num_fds())
        return self.result

    def _blocking(self, callers: int) -> None:
        kind = Http if self._way == "HTTP" else Blocking
        clients = Clients(kind, self._address)
        threads = []
        for seed in range(callers):
            own = Clients(kind, self._address) if kind is Http else clients  # a session is for one thread
            calls = self._calls(own, Content(seed, shared=bool(seed % 2)))
            threads.append(threading.Thread(target=asyncio.run, args=(calls,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        asyncio.run(clients.close())

    def _asyncio(self, callers: int) -> None:
        async def run() -> None:
            clients = Clients(Awaited, self._address)
            callers_ = [self._calls(clients, Content(100 + seed, shared=False)) for seed in range(callers)]
            await asyncio.gather(*callers_)
            await clients.close()

        if self._way != "HTTP":
            asyncio.run(run())

    async def _calls(self, clients: Clients, content: Content) -> None:
        while not self.end.is_set():
            (kind,) = content.random.choices(list(KINDS), list(KINDS.values()))
            await self._call(kind, clients, content)

    def _newcomers(self, callers: int) -> None:
        """Clients that come, make some calls, and leave."""
        content = Content(1000, shared=False)
        kinds = [Http] if self._way == "HTTP" else [Blocking, Awaited][: 1 if self._leak else 2]
        for kind in itertools.cycle(kinds):
            asyncio.run(self._visit(kind, content))
            if self.end.wait(self._connect_s):
                return

    async def _visit(self, kind: Any, content: Content) -> None:
        # With the other way to balance it shares no channel with the other callers.
        clients = Clients(kind, self._address, "round_robin")
        for call in (text, image, stream):
            await self._call(call, clients, content)
        if self._leak:
            self._leaked.append(clients)
        else:
            await clients.close()

    async def _call(self, kind: Kind, clients: Clients, content: Content) -> None:
        begun = time.monotonic()
        try:
            await kind(clients, content)
            self.result.calls[kind.__name__] += 1
        except Wrong as error:
            self.result.wrong.append(f"{kind.__name__}: {error}")
        except Exception as error:
            status = error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__
            self.result.failures.append(Failure(kind.__name__, status, str(error)[:300], begun, time.monotonic()))
        self.result.worst_s = max(self.result.worst_s, time.monotonic() - begun)


class LoadProcess:
    """A process of this file, as the one that starts it sees it."""

    def __init__(self, way: str, address: str, callers: int = 4, connect_s: float = 1, leak: bool = False) -> None:
        command = [sys.executable, __file__, way, address, str(callers), str(connect_s), "leak" if leak else ""]
        env = os.environ | {"TMS_LOCAL_TRANSPORT": "1" if way == "local" else "0"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True)
        self.calls: Counter[str] = Counter()
        """The calls so far, by kind."""
        self._last = "{}"
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for self._last in lines:
                found = json.loads(self._last)
                self.calls = Counter(found.get("calls", found))

    def stop(self) -> Result:
        """Ends the load, and returns what came of it."""
        assert self.process.stdin
        self.process.stdin.close()
        self._reader.join()
        assert self.process.wait(60) == 0, "the load failed: see above"
        found = json.loads(self._last)
        failures = [Failure(**one) for one in found.pop("failures")]
        return Result(**found | {"failures": failures, "calls": Counter(found["calls"])})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


@contextmanager
def checked_load(*args: Any, **options: Any) -> Iterator[LoadProcess]:
    """A load that ends with the block, if not before."""
    process = LoadProcess(*args, **options)
    try:
        yield process
    finally:
        process.kill()


def main(way: str, address: str, callers: str, connect_s: str, leak: str) -> None:
    """Runs the load."""
    result = Load(way, address, int(callers), float(connect_s), bool(leak)).run()
    print(json.dumps(vars(result) | {"failures": [vars(failure) for failure in result.failures]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
