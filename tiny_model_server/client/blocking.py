"""Carries the calls of a ``ModelClient``: they block, or a future has their answer."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any

import grpc

from tiny_model_server.client import addresses, errors, fork_safety
from tiny_model_server.client.calls import Request
from tiny_model_server.client.channel import SharedChannel
from tiny_model_server.client.local import daemons
from tiny_model_server.client.local_call import LocalCall
from tiny_model_server.client.transport import PROBE_S, Call, Transport, why_silent


class BlockingTransport(Transport):
    """Threads may share it."""

    def call(self, request: Request, timeout: float | None = None, retry: bool = True) -> Any:
        """The answer."""
        return self._run(Call(self, request, timeout, retry))

    def stream(self, request: Request, timeout: float | None, retry: bool) -> Iterator[Any]:
        """The answers, one by one."""
        call = Call(self, request, timeout, retry)
        with fork_safety.in_flight:
            self._connect(call)
            stub = self.begin(call)
            try:
                with self._translated(call):
                    call.handle = stub(request, **call.options())
                    for response in call.handle:
                        yield request.decode(*response)
                    call.ended(call.handle.trailing_metadata())
            finally:
                if call.handle:
                    call.handle.cancel()
                self._end(call)

    def submit(self, request: Request, timeout: float | None, retry: bool) -> "Future[Any]":
        """The future of the answer."""
        call, outcome = Call(self, request, timeout, retry), Future[Any]()
        if not self.connected:  # waiting for a server is not for the caller's thread
            threading.Thread(target=self._start, args=(call, outcome), daemon=True).start()
        elif not self.local or not daemons(fork_safety.generation).begin(
            lambda: _settle(outcome, lambda: self._run(call, outcome))
        ):
            self._start(call, outcome)
        return outcome

    def ahead(self, request: Request, timeout: float | None, retry: bool) -> "Future[Any] | LocalCall":
        """As ``submit``, but by the local transport no thread waits for the answer until it is asked for."""
        if self.connected and self.local:
            call = Call(self, request, timeout, retry)
            with fork_safety.in_flight:
                self._connect(call)
                if local := self._send(call):
                    return local
        return self.submit(request, timeout, retry)

    def on_each(self, request: Request, timeout: float | None) -> list[Any]:
        """The answers of every server."""
        return [one.call(request, timeout) for one in self.each_server()]

    def health(self, timeout: float) -> dict[str, list[str]]:
        """{"serving": addresses, "stopped_serving": addresses}."""
        result: dict[str, list[str]] = {"serving": [], "stopped_serving": []}
        for one in self.each_server():
            try:
                good = one.channel().health_check()(timeout=timeout).status == 1
            except (grpc.RpcError, OSError):
                good = False
            result["serving" if good else "stopped_serving"] += one.options["addresses"]
        return result

    def each_server(self) -> Iterator["BlockingTransport"]:
        """A transport to each single server."""
        known = self.options["addresses"]
        for address, host in addresses.replicas(known):
            name = self.options["server_name"] or (host if self.options["tls"] and address not in known else "")
            options = self.options | {"addresses": [address], "server_name": name}
            with closing(BlockingTransport(self.model, options)) as one:
                yield one

    def close(self) -> None:
        """Ends the calls under way, which fail with ``Cancelled``. A later call connects again."""
        for channel in self.leave():
            channel.close()

    def _run(self, call: Call, outcome: "Future[Any] | None" = None) -> Any:
        with fork_safety.in_flight:
            self._connect(call)
            if not (local := self._send(call)):
                return self._by_grpc(call)
        if outcome:
            outcome.add_done_callback(lambda future: local.cancel() if future.cancelled() else None)
        return local.result()

    def _send(self, call: Call) -> LocalCall | None:
        """The call, under way by the local transport; None if gRPC is to make it."""
        if not (connections := self.local) or not (taken := connections.take(call.request.arrays)):
            return None
        local = LocalCall(call, connections, taken, self._by_grpc)
        return local if local.send() else None

    def _by_grpc(self, call: Call) -> Any:
        stub = self.begin(call)
        try:
            with self._translated(call):
                response, done = stub.with_call(call.request, **call.options())
        finally:
            self._end(call)
        call.ended(done.trailing_metadata())
        return call.request.decode(*response)

    def _start(self, call: Call, outcome: "Future[Any]") -> None:
        """Starts a call by gRPC, whose end resolves the outcome."""

        def answer() -> Any:
            with self._translated(call):
                response = call.handle.result()
            call.ended(call.handle.trailing_metadata())
            return call.request.decode(*response)

        def finish(handle: Any) -> None:
            self._end(call)
            fork_safety.end()
            _settle(outcome, answer)

        fork_safety.begin()
        try:
            self._connect(call)
            stub = self.begin(call)
            with self._translated(call):
                call.handle = stub.future(call.request, **call.options())
        except Exception as error:
            fork_safety.end()
            _settle(outcome, _raising(error))
            return
        call.handle.add_done_callback(finish)
        outcome.add_done_callback(lambda future: call.handle.cancel() if future.cancelled() else None)

    def _connect(self, call: Call) -> None:
        """Waits for a server that is still starting, at the first call."""
        channel = self.channel()
        if self.connected:
            return
        patience = min(call.timeout, self.options["connect_timeout"])
        deadline = time.monotonic() + patience
        if why := self._why_silent(channel, timeout=patience):
            self.check_refusal()
            remaining = max(0.001, deadline - time.monotonic())
            if self._why_silent(channel, timeout=remaining, wait_for_ready=True):
                raise self.never_ready(patience, self._why_silent(channel, timeout=PROBE_S) or why)
        self.connected = True

    def _why_silent(self, channel: SharedChannel, **options: Any) -> str | None:
        """Why no server answers, None if one does."""
        try:
            channel.health_check()(**options)
        except grpc.RpcError as error:
            return why_silent(error)
        return None

    @contextmanager
    def _translated(self, call: Call) -> Iterator[None]:
        """Raises this client's errors for those of gRPC."""
        try:
            yield
        except (grpc.FutureCancelledError, ValueError):  # grpc raises ValueError where the channel is closed
            raise call.closed() from None
        except grpc.RpcError as failed:
            error = call.failed(failed)
            unanswered = isinstance(error, errors.DeadlineExceeded) and not error.replica
            if unanswered and (why := self._why_silent(call.channel, timeout=PROBE_S)):
                error = call.gone(why)
            raise error from None

    def _end(self, call: Call) -> None:
        for channel in self.end(call):
            channel.close()


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


def _settle(outcome: "Future[Any]", work: Callable[[], Any]) -> None:
    """Resolves a future by what ``work`` returns or raises."""
    answer: Any = None
    error: BaseException | None = None
    try:
        answer = work()
    except Exception as failed:
        error = failed
    if outcome.set_running_or_notify_cancel():
        outcome.set_exception(error) if error else outcome.set_result(answer)


def _raising(error: Exception) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work
