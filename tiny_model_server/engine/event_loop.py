"""The event loop of an async model: runs its coroutines in the worker's main thread, for the threads of its slots.

A slot's thread waits for its coroutine. Meanwhile the loop reads the slot's socket: a message that comes then says that
nobody wants the outcome, and the loop cancels the coroutine. Every outcome goes through a queue, because a future would
keep the answer alive, and with it the shared memory of the input.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Awaitable, Callable, Generator
from types import AsyncGeneratorType
from typing import Any

from tiny_model_server.engine.runner import Calls, attempt, call_directly, end_if_forked, failed, log
from tiny_model_server.engine.worker_connection import WorkerConnection
from tiny_model_server.errors import Cancelled

_END = object()  # stands for the end of an async generator


class EventLoop:
    """One loop for everything that a model does. It runs in the thread that calls ``call`` and ``run``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._stopped = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the model while the loop runs, and awaits what it returns if that is possible.

        Of an async generator, returns the first value.
        """

        async def called() -> Any:
            result = call_directly(function, *arguments)
            if type(result) is AsyncGeneratorType:
                async for value in result:
                    await result.aclose()
                    return value
            return await result if _awaitable(result) else result

        return self._loop.run_until_complete(called())

    def run(self) -> None:
        """Runs the loop until ``stop`` is called. What a task of the model raises or does does not end it."""
        while not self._stopped:
            if failed(error := attempt(self._loop.run_forever)):
                log.error("a task of the model raised", exc_info=error)

    def stop(self) -> None:
        """Ends ``run``. From any thread."""
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def calls(self, connection: WorkerConnection) -> AsyncCalls:
        """What a slot with this connection needs."""
        return AsyncCalls(self._loop, connection)


class AsyncCalls(Calls):
    """Awaits what a model's methods return, in the thread of one slot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: WorkerConnection) -> None:
        self._loop, self._connection = loop, connection
        self._outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._task: asyncio.Task[None] | None = None
        self._wanted: asyncio.Event | None = None

    def __call__(self, result: Any) -> Any:
        """The value of an awaitable; it raises what that raises. A generator for an async one. Else what is given."""
        if type(result) is AsyncGeneratorType:
            return self._values(result)
        if not _awaitable(result):
            return result
        self._start(self._settle, result)
        return _raised(self._outcomes.get())

    def all(self, results: list[Any]) -> list[Any]:
        """The values or errors of those results that can be awaited, at once; the others as they are."""
        if not any(map(_awaitable, results)):
            return results
        return list(self(_all(results)))

    def _start(self, work: Callable[[Any], Any], result: Any) -> None:
        def start() -> None:
            self._task = self._loop.create_task(work(result))

        self._loop.call_soon_threadsafe(start)

    async def _settle(self, result: Awaitable[Any]) -> None:
        self._outcomes.put(await self._attempt(result))

    async def _attempt(self, result: Awaitable[Any]) -> Any:
        """The value or the error of an awaitable; Cancelled if it is cancelled because nobody wants it."""
        if self.cancelled and self._task:
            self._task.cancel()
        else:
            self._loop.add_reader(self._connection.socket, self._cancel)
        outcome = await _attempt(result)
        self._loop.remove_reader(self._connection.socket)
        if self.cancelled and type(outcome) is asyncio.CancelledError:
            return Cancelled("nobody waits for the answer any more")
        return outcome

    def _cancel(self) -> None:
        """Cancels what runs: a message has come, or the front has closed the connection."""
        self._loop.remove_reader(self._connection.socket)
        self.cancelled = True
        attempt(self._connection.receive)  # if it is closed, the slot's thread notices it as well
        if self._task:
            self._task.cancel()

    def _values(self, generator: Any) -> Generator[Any, None, None]:
        """What an async generator yields. If it raises, the error comes last."""
        self._start(self._drive, generator)
        value = None
        try:
            while (value := self._outcomes.get()) is not _END:
                yield value
                assert self._wanted
                self._loop.call_soon_threadsafe(self._wanted.set)
        finally:
            if value is not _END:
                assert self._task
                self._loop.call_soon_threadsafe(self._task.cancel)
                while self._outcomes.get() is not _END:
                    pass

    async def _drive(self, generator: Any) -> None:
        """Hands over the values one by one. One task runs the whole generator, as its context variables need."""
        self._wanted = asyncio.Event()
        try:
            while type(value := await self._attempt(generator.__anext__())) is not StopAsyncIteration:
                self._outcomes.put(value)
                await self._wanted.wait()
                self._wanted.clear()
        finally:
            if failed(error := await _attempt(generator.aclose())):
                log.error("an async generator of the model raised while it was closed", exc_info=error)
            self._outcomes.put(_END)


async def _attempt(result: Awaitable[Any]) -> Any:
    """The value of an awaitable, or the exception that it raises, of whatever class."""
    pid = os.getpid()
    try:
        return await result
    except BaseException as error:
        return error
    finally:
        end_if_forked(pid)


async def _all(results: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*(_attempt(one) if _awaitable(one) else _given(one) for one in results)))


async def _given(result: Any) -> Any:
    return result


def _awaitable(result: Any) -> bool:
    return hasattr(type(result), "__await__")


def _raised(outcome: Any) -> Any:
    """The outcome, which is raised if it is an error."""
    if not failed(outcome):
        return outcome
    try:
        raise outcome
    finally:
        del outcome  # its traceback has this frame
