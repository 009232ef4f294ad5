"""The processes that load a server for ``load.py``. They import little, so that many of them start soon.

Each prints "ready", reads lines "BEGIN SECONDS" (by ``time.time``), and for each prints what it completed within these
seconds as JSON.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402

FRAMES = 16  # different images of a caller
Calls = Iterator[tuple[int, float]]
"""What an endless load completes: (inputs, seconds that they took)."""


def report(loads: Sequence[Calls], in_turn: bool = False) -> None:
    """Runs each load in a thread of its own, whenever stdin names the seconds, and prints what they completed.

    ``in_turn``: the first load the first time, then the second, and so on.
    """
    for one in loads:
        next(one)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        begin, seconds = map(float, line.split())
        at_once = loads[number : number + 1] if in_turn else loads
        with ThreadPoolExecutor(len(at_once)) as pool:
            found = list(pool.map(partial(within, begin, begin + seconds), at_once))
        done = [completed for each, _ in found for completed in each]
        rate = sum(sum(count for count, _ in each) / (end - begin) for each, end in found)
        p50, p99 = np.percentile([took for _, took in done], [50, 99]) * 1000
        print(json.dumps({"rate": rate, "p50": p50, "p99": p99}), flush=True)


def within(begin: float, end: float, calls: Calls) -> tuple[list[tuple[int, float]], float]:
    """(what the load completes within this time, the end). If that is nothing, the end is when it completes one."""
    done: list[tuple[int, float]] = []
    for completed in calls:
        now = time.time()
        if done and now > end:
            break
        if now >= begin:
            done.append(completed)
            end = max(end, now)
    return done, end


def frames(shape: Sequence[int]) -> list[np.ndarray]:
    """Random images; the first byte of each is its number."""
    made = np.random.default_rng(0).integers(0, 256, (FRAMES, *shape), np.uint8)
    made[:, 0, 0, 0] = range(FRAMES)
    return list(made)


def expect(answer: Any, right: Any) -> None:
    """ValueError if an answer is not what it should be."""
    if answer != right:
        raise ValueError(f"the answer is {answer!r}, and should be {right!r}")


def length_of(data: Any, answer: Any) -> None:
    """Checks an answer of a model that returns the length."""
    expect(answer, len(data))


def first_byte(data: Any, answer: Any) -> None:
    """Checks an answer of the model ``network``."""
    expect(answer[1], data[0, 0, 0])


def one_by_one(client: ModelClient, data: Sequence[Any], check: Callable[[Any, Any], None]) -> Calls:
    """A call for each input, one after the other."""
    run = client.run_text if isinstance(data[0], str) else client.run_image
    while True:
        for one in data:
            begun = time.perf_counter()
            answer = run(one)
            yield 1, time.perf_counter() - begun
            check(one, answer)


def by_map(client: ModelClient, data: Sequence[Any], check: Callable[[Any, Any], None], in_flight: int) -> Calls:
    """``map`` with so many calls at once."""
    begun: deque[tuple[Any, float]] = deque()

    def endless() -> Iterator[Any]:
        while True:
            for one in data:
                begun.append((one, time.perf_counter()))
                yield one

    for answer in client.map(endless(), in_flight=in_flight):
        one, since = begun.popleft()
        check(one, answer)
        yield 1, time.perf_counter() - since


def by_batch(client: ModelClient, data: Sequence[Any], check: Callable[[Any, Any], None], size: int) -> Calls:
    """``run_image_batch`` of so many images."""
    given = [data[number % len(data)] for number in range(size)]
    while True:
        begun = time.perf_counter()
        answers = client.run_image_batch(given)
        yield size, time.perf_counter() - begun
        for one, answer in zip(given, answers, strict=True):
            check(one, answer)


def call(address: str, model: str, payload: str, way: str, at_once: str) -> None:
    """The part that calls a server: ``way`` is "single" in so many threads, "map", or "batch" in two threads."""
    data: list[Any] = (
        frames([int(size) for size in payload.split("x")]) if payload != "text" else ["twenty bytes of text"]
    )
    check = length_of if model == "length" else first_byte
    with ModelClient(model, addresses=[address]) as client:
        if way == "map":
            report([by_map(client, data, check, int(at_once))])
        elif way == "batch":
            report([by_batch(client, data, check, int(at_once)) for _ in range(2)])
        else:
            report([one_by_one(client, data, check) for _ in range(int(at_once))])


if __name__ == "__main__":
    call(*sys.argv[1:])
