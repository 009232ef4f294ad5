"""Carries the calls of a ``ModelClient``: they block, or a future has their answer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import grpc

from tiny_model_server.client import addresses, errors, fork_safety
from tiny_model_server.client.call import Call, LocalCall
from tiny_model_server.client.calls import Request
from tiny_model_server.client.daemons import daemons
from tiny_model_server.client.transport import Transport


class BlockingTransport(Transport):
    """Threads may share it."""

    def call(self, request: Request, timeout: float | None = None, retry: bool = True) -> Any:
        """The answer."""
        return self._run(Call(self, request, timeout, retry))

    def stream(self, request: Request, timeout: float | None, retry: bool) -> Iterator[Any]:
        """The answers, one by one."""
        call = Call(self, request, timeout, retry)
        with fork_safety.in_flight:
            self.channel()
            self.connect(call)
            while True:
                try:
                    with self._stub(call) as stub:
                        responses = call.cancel_by(stub(request, **call.options()))
                        for response in responses:
                            call.final = True
                            yield request.decode(*response)
                        call.ended(responses.trailing_metadata())
                        return
                except errors.ELSEWHERE as error:
                    self.redirect(call, error)

    def submit(self, request: Request, timeout: float | None, retry: bool) -> "Future[Any]":
        """The future of the answer."""
        outcome = Future[Any]()
        call = Call(self, request, timeout, retry, outcome)
        return daemons(fork_safety.generation).submit(partial(self._run, call), outcome)

    def ahead(self, request: Request, timeout: float | None, retry: bool) -> "Future[Any] | LocalCall":
        """Like ``submit``. The local transport needs no thread for it."""
        if self.connected and self.locals:
            call = Call(self, request, timeout, retry)
            with fork_safety.in_flight:
                self.channel()
                if local := self.send(call):
                    return local
        return self.submit(request, timeout, retry)

    def on_each(self, request: Request, timeout: float | None) -> list[Any]:
        """The answers of every server."""
        return [one.call(request, timeout) for one in self.each_server()]

    def health(self, timeout: float) -> dict[str, list[str]]:
        """{"serving": addresses, "stopped_serving": addresses}."""
        result: dict[str, list[str]] = {"serving": [], "stopped_serving": []}
        for one in self.each_server():
            silent = one.why_silent(timeout=timeout)
            result["stopped_serving" if silent else "serving"] += one.options["addresses"]
        return result

    def each_server(self) -> Iterator["BlockingTransport"]:
        """A transport to each single server, also to those of TMS_REPLICAS beside the addresses given."""
        if self._has_siblings or not self.connected:
            self.follow()
        known = self.addresses
        for address, host in addresses.replicas(known):
            name = self.options["server_name"] or (host if self.options["tls"] and address not in known else "")
            options = self.options | {"addresses": [address], "server_name": name}
            with closing(BlockingTransport(self.model, options)) as one:
                one.follows = False
                yield one

    def close(self) -> None:
        """Ends the calls under way, which fail with ``Cancelled``. A later call connects again."""
        with fork_safety.in_flight:  # a fork would leave locks held in the child
            self.leave()

    def _run(self, call: Call) -> Any:
        with fork_safety.in_flight:
            self.channel()
            self.connect(call)
            if not (local := self.send(call)):
                return self.by_grpc(call)
        call.cancel_by(local)
        try:
            return local.result()
        finally:
            call.handle = None  # it knows the call: the two would keep a shared array until the collector runs

    def by_grpc(self, call: Call) -> Any:
        """The answer, by gRPC."""
        try:
            with self._stub(call) as stub:
                if call.outcome:
                    done = call.cancel_by(stub.future(call.request, **call.options()))
                    response = done.result()
                else:  # faster, but only closing the channel cancels it
                    response, done = stub.with_call(call.request, **call.options())
        except errors.ELSEWHERE as error:
            self.redirect(call, error)
            return self.by_grpc(call)
        call.ended(done.trailing_metadata())
        return call.request.decode(*response)

    @contextmanager
    def _stub(self, call: Call) -> Iterator[Any]:
        """What makes a call by gRPC, inside the block; raises this client's errors for those of gRPC."""
        stub = self.begin(call)
        try:
            yield stub
        except (grpc.FutureCancelledError, ValueError):  # grpc raises ValueError where the channel is closed
            raise call.cancelled() from None
        except grpc.RpcError as error:
            raise self.explained(call, error) from None
        finally:
            if call.handle:
                call.handle.cancel()
            self.end(call)


def in_order(
    start: Callable[[Any], Any], items: Iterable[Any], in_flight: int, return_exceptions: bool
) -> Iterator[Any]:
    """The results of what ``start`` begins for each item, in order, with so many under way at once."""
    pending = deque[Any]()

    def first() -> Any:
        try:
            return pending.popleft().result()
        except errors.ModelClientError as error:
            if return_exceptions:
                return error
            raise

    try:
        for item in items:
            while pending and (len(pending) >= in_flight or pending[0].done()):
                yield first()
            pending.append(start(item))
        while pending:
            yield first()
    finally:
        for call in pending:
            call.cancel()
