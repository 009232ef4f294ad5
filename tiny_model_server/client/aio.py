"""Carries the calls of an ``AsyncModelClient``. Each event loop has connections of its own."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio

from tiny_model_server.client import errors, fork_safety
from tiny_model_server.client.call import NOT_ANSWERED, Call
from tiny_model_server.client.calls import Request
from tiny_model_server.client.daemons import daemons
from tiny_model_server.client.transport import Transport


class AsyncTransport(Transport):
    """Belongs to one event loop at a time."""

    def loop(self) -> Any:
        """The event loop that runs."""
        return asyncio.get_running_loop()

    async def call(self, request: Request, timeout: float | None = None, retry: bool = True) -> Any:
        """The answer."""
        call = Call(self, request, timeout, retry)
        with fork_safety.in_flight:
            await self._connect(call)
            if (local := self.send(call, wait=False)) and (answer := await local.received()) is not NOT_ANSWERED:
                return answer
            return await self._by_grpc(call)

    async def stream(self, request: Request, timeout: float | None, retry: bool) -> AsyncIterator[Any]:
        """The answers, one by one."""
        call = Call(self, request, timeout, retry)
        with fork_safety.in_flight:
            await self._connect(call)
            while True:
                try:
                    async with self._stub(call) as stub:
                        call.cancel_by(stub(request, **call.options()))
                        async for response in call.handle:
                            call.final = True
                            yield request.decode(*response)
                        call.ended(await call.handle.trailing_metadata())
                        return
                except errors.ELSEWHERE as error:
                    await self._in_daemon(self.redirect, call, error)

    async def close(self) -> None:
        """Ends the calls under way, which fail with ``Cancelled``. A later call connects again."""
        for closing in self.leave():
            await closing

    async def _connect(self, call: Call) -> None:
        if not self.connected:
            fork_safety.asyncio_used = True
            await self._in_daemon(self.connect, call)
        self.channel()

    async def _in_daemon(self, work: Callable[..., Any], *args: Any) -> Any:
        """What blocks, done by a thread. Those of the event loop are the application's."""
        return await asyncio.wrap_future(daemons(fork_safety.generation).submit(partial(work, *args)))

    async def _by_grpc(self, call: Call) -> Any:
        try:
            async with self._stub(call) as stub:
                call.cancel_by(stub(call.request, **call.options()))
                response, trailing = await call.handle, await call.handle.trailing_metadata()
        except errors.ELSEWHERE as error:
            await self._in_daemon(self.redirect, call, error)
            return await self._by_grpc(call)
        call.ended(trailing)
        return call.request.decode(*response)

    @asynccontextmanager
    async def _stub(self, call: Call) -> AsyncIterator[Any]:
        """What makes a call by gRPC, inside the block; raises this client's errors for those of gRPC."""
        stub = self.begin(call)
        try:
            yield stub
        except grpc.aio.UsageError:  # the channel is closed
            raise call.cancelled() from None
        except grpc.RpcError as failed:
            unanswered = failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            error = await self._in_daemon(self.explained, call, failed) if unanswered else self.explained(call, failed)
            raise error from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            raise call.cancelled() from None
        finally:
            if call.handle:
                call.handle.cancel()
            for closing in self.end(call):
                await closing


async def in_order(
    start: Callable[[Any], Coroutine[Any, Any, Any]],
    items: Iterable[Any] | AsyncIterable[Any],
    in_flight: int,
    return_exceptions: bool,
) -> AsyncIterator[Any]:
    """The results of what ``start`` makes of each item, in order, with so many under way at once."""
    pending = deque[asyncio.Task[Any]]()

    async def first() -> Any:
        try:
            return await pending.popleft()
        except errors.ModelClientError as error:
            if return_exceptions:
                return error
            raise

    try:
        async for item in items if isinstance(items, AsyncIterable) else _each(items):
            while pending and (len(pending) >= in_flight or pending[0].done()):
                yield await first()
            pending.append(asyncio.ensure_future(start(item)))
        while pending:
            yield await first()
    finally:
        for task in pending:
            task.cancel()


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
