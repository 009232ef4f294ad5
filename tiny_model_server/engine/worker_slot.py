"""The front's end of a worker's slot: sends one batch at a time to the worker, and receives its outcomes."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tiny_model_server.codec import Encoded, Placed, dtype_of
from tiny_model_server.engine import placement
from tiny_model_server.engine.batcher import Batcher, Item, Outcome
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.engine.worker_connection import WorkerConnection, lacks
from tiny_model_server.errors import DeadlineExceeded, ModelError, Overloaded, ServerError, from_status
from tiny_model_server.settings import ModelOptions
from tiny_model_server.shared_memory import Place, SharedBuffers, read_arrays, unnamed_file

log = logging.getLogger("tiny_model_server.worker_slot")

_RETRY_AFTER_MS = 100
_MOST_IDS = 3  # of a batch that its log lines name
_CANCEL_S = 1.0  # that a batch has to end when it is cancelled after timeout_s; then its worker is killed


class WorkerSlot:
    """One of the batches that a worker process can run at once."""

    def __init__(
        self, name: str, options: ModelOptions, batcher: Batcher, metrics: ModelMetrics, kill: Callable[[], None]
    ) -> None:
        """Opens a connection, of which ``theirs`` is the worker's end, and a response buffer. OSError if it cannot.

        ``kill`` kills the worker process; its supervisor answers what it holds then.
        """
        self.cancels = False
        """True if a batch can be cancelled while it runs."""
        self._name, self._options, self._batcher, self._metrics, self._kill = name, options, batcher, metrics, kill
        self.most = options.max_batch_size
        self._loop = asyncio.get_running_loop()
        self._known: set[int] = set()  # names of the shared buffers that the worker maps
        # Each takes two of its descriptors. It has the front's limit, and leaves half of it to the model.
        self._most_known = max(1, placement.descriptors() // 4 // options.concurrency)
        self.batch: list[Item] = []
        self._held: list[SharedBuffers] = []  # of the batch
        self._begun = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._open = True
        self.retiring = False
        """True when the worker takes no more batches."""
        self.response = unnamed_file()
        try:
            ours, self.theirs = socket.socketpair()
        except OSError:
            os.close(self.response)
            raise
        ours.setblocking(False)
        self._connection = WorkerConnection(ours)
        self._loop.add_reader(ours, self._on_readable)

    def start(self, batch: list[Item]) -> None:
        """Sends a batch, or one item that streams, to the worker."""
        self._begun = now = time.monotonic()
        self.batch = batch
        self._held = [buffers for item in batch for buffers in item.buffers]
        for item in batch:
            item.begun = now
            item.abandoned = self._abandoned if self.cancels else None
        for buffers in self._held:
            buffers.holders += 1
        self._metrics.started([now - item.enqueued for item in batch])
        try:
            self._send(batch)
        except Exception as error:
            self._not_sent(error)
        else:
            self._limit(self._options.timeout_s, self._on_timeout)

    def close(self) -> None:
        """Takes no more batches. The worker ends when all its slots are closed."""
        if self._open:
            self._open = False
            self._batcher.remove(self)
            self._loop.remove_reader(self._connection.socket)
            self._connection.close()
            self._cancel_limit()

    def end(self) -> list[Item]:
        """After the end of the process: reads what it sent before. Returns the items that have no outcome."""
        self.retiring = True
        if self._open:
            self._on_readable()
        self.close()
        batch = self._take_batch()
        os.close(self.response)
        return [item for item in batch if item.outcome is None]

    def _send(self, batch: list[Item]) -> None:
        fresh = {buffers.name: buffers for buffers in self._held if buffers.name not in self._known}
        items: list[Any] = []
        for item in batch:
            request, places = item.value.shared or (None, [])
            names = [buffers and buffers.name for buffers in (request, item.response)]
            items.append((item.value.text, places, item.json_only, *names))
        closed = self._known - SharedBuffers.open_names if fresh else set()
        if len(self._known) > self._most_known:
            closed = self._known - {buffers.name for buffers in self._held}
        met = [(buffers.name, buffers.caller_owned) for buffers in fresh.values()]
        fds = [fd for buffers in fresh.values() for fd in (buffers.request, buffers.response)]
        self._connection.send((batch[0].args, items, batch[0].stream is not None, met, closed, _ids(batch)), fds)
        self._known = (self._known - closed) | fresh.keys()

    def _not_sent(self, error: Exception) -> None:
        """Answers a batch that the worker did not get; if it has died, its supervisor does that."""
        if isinstance(error, OSError) and not lacks(error):
            return self._broken()
        log.error("a batch could not be sent to the worker", exc_info=error)
        outcome: ServerError = ModelError(f"the batch could not be sent: {type(error).__name__}: {error}")
        if lacks(error):
            outcome = Overloaded(f"the server cannot send the input to its worker now: {error}", _RETRY_AFTER_MS)
        for item in self._take_batch():
            item.resolve(outcome)
        self._loop.call_soon(self._idle)

    def _on_readable(self) -> None:
        try:
            message = self._connection.receive()
            while message:
                self._on_message(message[0])
                # The outcome of a stream whose reader has left comes at once after a value.
                message = self._connection.receive() if self._open and self._connection.pending() else None
        except (EOFError, ConnectionError):
            self._broken()
        except Exception as error:
            log.error("the outcomes of a batch cannot be read", exc_info=error)
            kind = ServerError if lacks(error) else ModelError
            for item in self.batch:
                item.resolve(kind(f"the model's answer cannot be read: {type(error).__name__}: {error}"))
            self._broken()

    def _on_message(self, message: Any) -> None:
        if len(message) == 3:
            return self._on_value(message)
        outcomes, seconds, retained, counted = message
        batch = self.batch
        found: list[Outcome] = [self._outcome(*pair) for pair in zip(outcomes, batch, strict=not batch[0].stream)]
        found = found or [Encoded("null", [])]
        self._cancel_limit()
        self._metrics.finished(self._begun, seconds, counted)
        self._take_batch(retained)
        following = self._batcher.next(self.most) if self._open and not self.retiring else []
        if following:
            self.start(following)
        for item, outcome in zip(batch, found, strict=True):  # while the worker is busy again
            item.resolve(outcome)
        if not following:
            self._idle()

    def _idle(self) -> None:
        if self._open and not self.batch and not self.retiring:
            self._batcher.idle(self)

    def _outcome(self, answer: tuple[str | None, str, list[Place]], item: Item) -> Outcome:
        status, text, places = answer
        if status:
            return from_status(status, text)
        if item.response and not item.stream:
            placed = [Placed(dtype_of(name), shape) for _, name, shape in places]
            return Encoded(text, placed, (item.response, places))
        return Encoded(text, read_arrays(self.response, places))

    def _on_value(self, message: tuple[str | None, str, list[Place]]) -> None:
        """A value of a stream: the worker waits until it may go on, which it may when there is room for more."""
        item = self.batch[0]
        item.repeatable = False
        stream, value = item.stream, self._outcome(message, item)
        assert stream
        if item.expired(time.monotonic()):
            return self._resume(item)
        idle_s = stream.idle_s
        self._limit(idle_s, partial(self._not_read, item, idle_s))
        stream.put(value, partial(self._resume, item))
        if isinstance(value, ServerError):
            item.resolve(value)

    def _not_read(self, item: Item, idle_s: float) -> None:
        item.resolve(DeadlineExceeded(f"the caller read nothing of its stream for {idle_s:g} s (TMS_STREAM_IDLE_S)"))

    def _resume(self, item: Item) -> None:
        """Says whether the outcome of an item of the batch is still wanted."""
        if self._open and item in self.batch:
            self._limit(self._options.timeout_s, self._on_timeout)
            try:
                self._connection.send(not item.expired(time.monotonic()))
            except OSError:
                self._broken()

    def _abandoned(self) -> None:
        """Cancels the batch in the worker, if nobody waits for any of its items."""
        if self.batch and all(item.outcome is not None for item in self.batch):
            self._resume(self.batch[0])

    def _on_timeout(self) -> None:
        for item in self.batch:
            item.resolve(
                DeadlineExceeded(f"model {self._name!r} took longer than its timeout_s={self._options.timeout_s:g}")
            )
        if self.cancels:
            self._limit(_CANCEL_S, self._broken)  # the outcomes of the batch prevent it
        else:
            self._broken()

    def _broken(self) -> None:
        """The worker can be of no more use. Its supervisor answers what it holds, when it has ended."""
        self.close()
        self._kill()

    def _take_batch(self, retained: "set[int] | frozenset[int]" = frozenset()) -> list[Item]:
        batch, held = self.batch, self._held
        self.batch, self._held = [], []
        for item in batch if self.cancels else ():
            item.abandoned = None
        for buffers in held:
            buffers.retained |= buffers.name in retained
            buffers.release()
        return batch

    def _limit(self, seconds: float, on_time: Callable[[], None]) -> None:
        self._cancel_limit()
        self._timer = self._loop.call_later(seconds, on_time)

    def _cancel_limit(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def _ids(batch: list[Item]) -> str:
    """The ids of a batch's requests, as the worker's log lines have them: "a,b,c,+5"."""
    ids = list(dict.fromkeys(item.request_id for item in batch))
    return ",".join(ids[:_MOST_IDS] + [f"+{len(ids) - _MOST_IDS}"] * (len(ids) > _MOST_IDS))
