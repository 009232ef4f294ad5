"""The event loop of an async model: runs its coroutines in the worker's main thread, for the threads of its slots.

A slot's thread waits for its coroutine. Meanwhile the loop reads the slot's socket: a message that comes then says that
nobody wants the outcome, and the loop cancels the coroutine. Every outcome goes through a queue, because a future would
keep the answer alive, and with it the shared memory of the input.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor
from types import AsyncGeneratorType
from typing import Any

from tiny_model_server.engine.runner import Calls, attempt, call_directly, end_if_forked, failed, log
from tiny_model_server.engine.worker_connection import WorkerConnection
from tiny_model_server.errors import Cancelled

_END = object()  # stands for the end of an async generator


class EventLoop:
    """One loop for everything that a model does. It runs in the thread that calls ``call`` and ``run_beside``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the model while the loop runs, and awaits what it returns if that is possible.

        Of an async generator, returns the first value.
        """

        async def called() -> Any:
            result = call_directly(function, *arguments)
            if type(result) is AsyncGeneratorType:
                async for value in result:
                    return value
            return await result if _awaitable(result) else result

        return self._loop.run_until_complete(called())

    def run_beside(self, threads: Executor, functions: Iterable[Callable[[], None]]) -> None:
        """Runs functions in threads, and the loop until all have ended, whatever a task of the model raises or does."""
        running = [self._loop.run_in_executor(threads, function) for function in functions]
        ended = asyncio.gather(*running)
        while not ended.done():
            if failed(error := attempt(self._loop.run_until_complete, ended)):
                log.error("the event loop of the model was ended, and goes on", exc_info=error)
        ended.result()

    def calls(self, connection: WorkerConnection) -> AsyncCalls:
        """What a slot with this connection needs."""
        return AsyncCalls(self._loop, connection)


class AsyncCalls(Calls):
    """Awaits what a model's methods return, in the thread of one slot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: WorkerConnection) -> None:
        self._loop, self._connection = loop, connection
        self._outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._task: Any = None
        self._wanted: Any = None

    def __call__(self, result: Any) -> Any:
        """The value or the error of an awaitable; a generator for an async one; else what is given."""
        if type(result) is AsyncGeneratorType:
            return self._values(result)
        if not _awaitable(result):
            return result
        self._loop.call_soon_threadsafe(self._loop.create_task, self._settle(result))
        return self._outcomes.get()

    def all(self, results: list[Any]) -> Any:
        """The values or errors of those results that can be awaited, at once; the others as they are."""
        return self(_all(results)) if any(map(_awaitable, results)) else results

    async def _settle(self, result: Any) -> None:
        self._task = asyncio.current_task()
        self._outcomes.put(await self._attempt(result))

    async def _attempt(self, result: Any) -> Any:
        """The value or the error of an awaitable; Cancelled if it is cancelled because nobody wants it."""
        self._loop.add_reader(self._connection.socket, self._cancel)
        if self.cancelled or self._connection.pending():
            self._cancel()
        outcome = await _attempt(result)
        self._loop.remove_reader(self._connection.socket)
        if self.cancelled and type(outcome) is asyncio.CancelledError:
            return Cancelled("nobody waits for the answer any more")
        return outcome

    def _cancel(self) -> None:
        """Cancels what runs: a message has come, or the front has closed the connection."""
        self._loop.remove_reader(self._connection.socket)
        if not self.cancelled:
            attempt(self._connection.receive)  # if it is closed, the slot's thread notices it as well
        self.cancelled = True
        self._task.cancel()

    def _values(self, generator: Any) -> Generator[Any, None, None]:
        """What an async generator yields. If it raises, the error comes last."""
        self._loop.call_soon_threadsafe(self._loop.create_task, self._drive(generator))
        value = None
        try:
            while (value := self._outcomes.get()) is not _END:
                yield value
                self._loop.call_soon_threadsafe(self._wanted.set)
        finally:
            if value is not _END:
                self._loop.call_soon_threadsafe(self._task.cancel)
                while self._outcomes.get() is not _END:
                    pass

    async def _drive(self, generator: Any) -> None:
        """Hands over the values one by one. One task runs the whole generator, as its context variables need."""
        self._task, self._wanted = asyncio.current_task(), asyncio.Event()
        try:
            while type(value := await self._attempt(generator.__anext__())) is not StopAsyncIteration:
                self._outcomes.put(value)
                await self._wanted.wait()
                self._wanted.clear()
        except asyncio.CancelledError as cancelled:  # by the model, if the thread still takes values
            self._outcomes.put(cancelled)
        finally:
            if failed(error := await _attempt(generator.aclose())):
                log.error("an async generator of the model raised while it was closed", exc_info=error)
            self._outcomes.put(_END)


async def _attempt(result: Any) -> Any:
    """The value of what may be awaited, or the exception that it raises, of whatever class."""
    pid = os.getpid()
    try:
        return await result if _awaitable(result) else result
    except BaseException as error:
        return error
    finally:
        end_if_forked(pid)


async def _all(results: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*map(_attempt, results)))


def _awaitable(result: Any) -> bool:
    return hasattr(type(result), "__await__")
