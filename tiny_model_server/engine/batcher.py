"""The bounded queue of one model: items of all callers in, batches out to workers that are idle."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

from tiny_model_server.codec import Encoded
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.errors import DeadlineExceeded, Overloaded, ServerError
from tiny_model_server.shared_memory import SharedBuffers

Outcome = Encoded | ServerError


@dataclass(slots=True, eq=False)
class Item:
    """One input on its way through queue and worker. ``args`` is JSON, ``deadline`` on the monotonic clock."""

    value: Encoded
    args: str
    key: Hashable
    """Only items with equal keys share a batch."""
    deadline: float | None
    done: Callable[["Item"], None]
    """Called once, when there is an outcome."""
    json_only: bool = False
    """The outcome is JSON without arrays."""
    repeatable: bool = True
    """False forbids to run the item again after its worker died."""
    response: SharedBuffers | None = None
    """Where the worker writes the arrays of the outcome."""
    stream: "Stream | None" = None
    request_id: str = ""
    attempts: int = 0
    enqueued: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    abandoned: Callable[[], None] | None = None
    """Called when there is an outcome while a worker is still at work on the item."""
    outcome: Outcome | None = None

    def resolve(self, outcome: Outcome) -> None:
        """Sets the outcome, unless there is one already."""
        if self.outcome is None:
            self.outcome, done, abandoned = outcome, self.done, self.abandoned
            del self.done  # an item and the run to which it belongs would keep each other alive
            done(self)
            if abandoned:
                abandoned()

    @property
    def buffers(self) -> set[SharedBuffers]:
        """The shared buffers that a worker needs for this item."""
        request = self.value.shared[0] if self.value.shared else None
        return {buffers for buffers in (request, self.response) if buffers is not None}

    def expired(self, now: float) -> bool:
        """Whether nobody waits for the outcome any more."""
        return self.outcome is not None or (self.deadline is not None and self.deadline < now)


class Stream:
    """The values that a model yields for one item, between its worker and a reader."""

    MOST = 16
    """Values that wait for the reader. The worker pauses then."""

    def __init__(self, idle_s: float) -> None:
        """``idle_s`` is how long the worker waits for a reader that takes nothing, in seconds."""
        self.idle_s = idle_s
        self.values: deque[Outcome] = deque()
        self._resume: Callable[[], None] | None = None
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, value: Outcome, resume: Callable[[], None]) -> None:
        """Adds a value; ``resume`` is called as soon as there is room for the next one."""
        self.values.append(value)
        self._changed.set()
        self._resume = resume
        if len(self.values) < self.MOST:
            self._go_on()

    def end(self) -> None:
        """Wakes the reader, and the worker: no more values are wanted."""
        self._ended = True
        self._changed.set()
        self._go_on()

    async def get(self) -> list[Outcome]:
        """Waits for values, and returns them; none after the last."""
        while not self.values and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        values = list(self.values)
        self.values.clear()
        self._go_on()
        return values

    def _go_on(self) -> None:
        resume, self._resume = self._resume, None
        if resume:
            resume()


class Worker(Protocol):
    """What takes batches."""

    most: int
    """Most items of a batch."""

    def start(self, batch: list[Item]) -> None:
        """Begins to run a batch. The worker comes back by ``Batcher.next`` or ``Batcher.idle``."""


class Batcher:
    """Items wait here while no worker is idle, or while their batch may still grow (``max_wait_ms``)."""

    def __init__(self, queue_size: int, metrics: ModelMetrics) -> None:
        self.queue_size = queue_size
        self.max_wait_s = 0.0
        self.closed: ServerError | None = None
        """Why no items are accepted."""
        self.depth = 0
        """Items that wait."""
        self._metrics = metrics
        self._groups: OrderedDict[Hashable, deque[Item]] = OrderedDict()  # the group served last is at the end
        self._suspects: deque[Item] = deque()  # their workers died; they run alone, and one at a time
        self._suspect: Item | None = None
        self._workers: list[Worker] = []  # idle ones
        self._timer: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()

    def put(self, items: Sequence[Item], spare: int = 0) -> None:
        """Queues all items or none, and leaves room for ``spare`` more.

        Raises Overloaded if they do not fit, DeadlineExceeded if they would wait too long, ``closed`` if it is set.
        """
        if self.closed:
            raise copy(self.closed)  # one object would keep the frames of all that raise it
        self.check_room(len(items) + spare)
        wait_s, deadline = self._wait_s(), items[0].deadline
        if deadline is not None and self.depth and items[0].enqueued + wait_s > deadline:
            raise DeadlineExceeded(f"{self.depth} items are waiting, which takes about {wait_s:.2f} s")
        for item in items:
            self._groups.setdefault(item.key, deque()).append(item)
        self.depth += len(items)
        self._dispatch()

    def check_room(self, count: int) -> None:
        """Overloaded if the queue has no room for so many items."""
        if not self._fit(count):
            message = f"the queue is full: {self.depth} of {self.queue_size} items are waiting"
            raise Overloaded(message, retry_after_ms=max(1, int(self._wait_s() * 1000)))

    async def put_in_parts(self, items: Sequence[Item]) -> None:
        """Queues many items, a quarter of a queue at a time, and leaves a quarter of it to others.

        Several such batches take turns. If the queue could hold the batch, but not even a part fits now, it is refused
        as by ``put``. Later, items that cannot be queued get the error as their outcome.
        """
        part, spare = max(1, self.queue_size // 4), self.queue_size // 4
        if len(items) <= self.queue_size:
            self.put(items[:part], spare)
            items = items[part:]
        async with self._turn:
            for begin in range(0, len(items), part):
                waiting = [item for item in items[begin : begin + part] if item.outcome is None]
                await self._room_for(len(waiting) + spare)
                self._put_late(waiting, spare)

    async def _room_for(self, count: int) -> None:
        while not (self.closed or self._fit(count)):
            self._room.clear()
            await self._room.wait()

    def _put_late(self, items: list[Item], spare: int) -> None:
        for item in items:
            item.enqueued = time.monotonic()
        try:
            if items:
                self.put(items, spare)
        except ServerError as error:
            for item in items:
                item.resolve(error)

    def idle(self, worker: Worker) -> None:
        """A worker waits for work, and has handed out its results."""
        self._workers.append(worker)
        self._room.set()
        self._dispatch()

    def remove(self, worker: Worker) -> None:
        """A worker does not take batches any more."""
        if worker in self._workers:
            self._workers.remove(worker)

    def next(self, most: int) -> list[Item]:
        """Returns the next batch, of one key. Returns [] if nothing waits, or if the batch may still grow."""
        now = time.monotonic()
        while self._suspects and (self._suspect is None or self._suspect.outcome is not None):
            self.depth -= 1
            self._suspect = self._suspects.popleft()
            if not self._drop(self._suspect, now):
                return [self._suspect]
        batch: list[Item] = []
        while self._groups and not batch:
            key, group = next(iter(self._groups.items()))
            if len(group) < most and not self.closed and (wait_s := group[0].enqueued + self.max_wait_s - now) > 0:
                self._wake_in(wait_s)
                break
            while group and len(batch) < most:
                self.depth -= 1
                if not self._drop(item := group.popleft(), now):
                    batch.append(item)
            self._groups.move_to_end(key)
            if not group:
                del self._groups[key]
        self._room.set()
        return batch

    def requeue(self, items: Sequence[Item]) -> None:
        """Queues items whose worker died, each to be run alone."""
        self._suspects.extend(items)
        self.depth += len(items)
        self._dispatch()

    def close(self, error: ServerError, *, drain: bool) -> None:
        """Refuses new items with ``error``. What is queued still runs (``drain``) or gets the error as well."""
        self.closed = error
        if not drain:
            groups, self._groups = [*self._groups.values(), self._suspects], OrderedDict()
            self._suspects, self.depth = deque(), 0
            for group in groups:
                for item in group:
                    item.resolve(copy(error))
        self._room.set()
        self._dispatch()

    def open(self) -> None:
        """Accepts items."""
        self.closed = None

    def _dispatch(self) -> None:
        while self._workers and self.depth:
            worker = self._workers.pop()
            if not (batch := self.next(worker.most)):
                self._workers.append(worker)
                break
            worker.start(batch)

    def _wake_in(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._dispatch)

    def _fit(self, count: int) -> bool:
        if self.depth + count > self.queue_size:
            self._drop_expired()
        return self.depth + count <= self.queue_size

    def _wait_s(self) -> float:
        """How long a new item would wait for the full batches before it, in seconds."""
        return self.depth // self._metrics.places * self._metrics.batch_s

    def _drop(self, item: Item, now: float) -> bool:
        if expired := item.expired(now):
            item.resolve(DeadlineExceeded("the deadline passed in the queue"))
            self._metrics.dropped += 1
        return expired

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for key, group in list(self._groups.items()):
            alive = deque(item for item in group if not self._drop(item, now))
            self.depth -= len(group) - len(alive)
            if alive:
                self._groups[key] = alive
            else:
                del self._groups[key]
