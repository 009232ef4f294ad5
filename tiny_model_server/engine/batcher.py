"""The bounded queue of one model: items of all callers in, batches out; no waiting while a worker idles."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from tiny_model_server.codec import Encoded
from tiny_model_server.engine.metrics import ModelMetrics
from tiny_model_server.errors import DeadlineExceeded, Overloaded, ServerError
from tiny_model_server.shared_memory import SharedBuffers

Outcome = Encoded | ServerError
_MOST_CHUNKS = 16  # values of a stream that wait for their reader
_LOOK_S = 1.0  # how often who waits for room looks whether its caller is still there
_LONG = 1 << 15  # bytes that a socket surely takes at once


class Chunks:
    """The values of a stream on their way from the worker to a reader, who must take one now and then."""

    def __init__(self, patience_s: float) -> None:
        """``patience_s`` is how long the worker waits for a reader that takes nothing."""
        self.patience_s = patience_s
        self._values: deque[Outcome] = deque()
        self._ended = False
        self._changed = threading.Condition()

    def put(self, value: Outcome, deadline: float | None) -> bool:
        """Adds a value once there is room; False if there is none in time, or the stream has ended."""
        limit = time.monotonic() + self.patience_s
        seconds = (limit if deadline is None else min(limit, deadline)) - time.monotonic()
        with self._changed:
            room = self._changed.wait_for(lambda: self._ended or len(self._values) < _MOST_CHUNKS, seconds)
            if self._ended or not room:
                return False
            self._values.append(value)
            self._changed.notify_all()
            return True

    def end(self, outcome: Outcome) -> None:
        """Adds the last value, the outcome, and wakes whoever waits."""
        with self._changed:
            if not self._ended:
                self._ended = True
                self._values.append(outcome)
                self._changed.notify_all()

    def get(self, deadline: float | None) -> tuple[Outcome, bool] | None:
        """The next value and whether it is the last one, which is the outcome; None if none comes in time."""
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        with self._changed:
            if not self._changed.wait_for(lambda: self._values, seconds):
                return None
            value = self._values.popleft()
            self._changed.notify_all()
            return value, self._ended and not self._values


@dataclass(slots=True, eq=False)
class Item:
    """One input on its way through queue and worker; whoever submitted it waits for its outcome.

    ``args`` is JSON, ``deadline`` on the monotonic clock. ``plain`` asks for JSON without arrays beside it; ``once``
    forbids to run the item again if its worker dies; ``lane`` takes the outcome's arrays.
    """

    packed: Encoded
    args: str
    key: Hashable
    deadline: float | None
    plain: bool = False
    once: bool = False
    lane: SharedBuffers | None = None
    chunks: Chunks | None = None
    attempts: int = 0
    enqueued: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    outcome: Outcome | None = None
    then: Callable[[], None] | None = None
    """Hears that there is an outcome, in the thread that found it."""
    _done: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.begun = self.enqueued
        self._done.acquire()

    def resolve(self, outcome: Outcome) -> None:
        """Gives the item its outcome; only the first one counts."""
        if self.outcome is None:
            self.outcome = outcome
            if self.chunks is not None:
                self.chunks.end(outcome)
            try:
                self._done.release()
            except RuntimeError:  # two threads resolved at once; one of the outcomes stands
                return
            then, self.then = self.then, None  # which knows the item, as the item knew it
            if then:
                then()

    def put_chunk(self, chunk: Outcome) -> bool:
        """Adds a value to a stream, waiting for its reader to keep up; False when nobody wants more."""
        assert self.chunks is not None
        self.once = True
        if self.dead:
            return False
        if self.chunks.put(chunk, self.deadline):
            return not isinstance(chunk, ServerError)
        why = f"the caller read nothing of its stream for {self.chunks.patience_s:g} s (TMS_STREAM_IDLE_S)"
        self.resolve(DeadlineExceeded(why))  # which counts if it has no outcome yet
        return False

    def next_chunk(self) -> tuple[Outcome, bool]:
        """The next value of a stream and whether it is the last one, which is the outcome."""
        assert self.chunks is not None
        if found := self.chunks.get(self.deadline):
            return found
        self.resolve(DeadlineExceeded("the deadline passed before the model had finished"))
        assert self.outcome is not None
        return self.outcome, True

    def wait(self) -> Outcome:
        """The item's outcome, DeadlineExceeded if its deadline comes first."""
        remaining = -1.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        if self._done.acquire(timeout=remaining):
            self._done.release()
        else:
            self.resolve(DeadlineExceeded("the deadline passed before the model answered"))
        assert self.outcome is not None
        return self.outcome

    @property
    def buffers(self) -> SharedBuffers | None:
        """The caller's buffers that a worker needs to run this, if any."""
        return self.packed.shared[0] if self.packed.shared else self.lane

    @property
    def dead(self) -> bool:
        """True when nobody wants the outcome any more."""
        return self.outcome is not None or (self.deadline is not None and self.deadline < time.monotonic())

    @property
    def slow(self) -> bool:
        """True if handing it to a worker may take its time, so that only the worker's own thread should do it."""
        return self.chunks is not None or self.attempts > 0 or len(self.packed.text) + len(self.args) > _LONG


class Seat:
    """Where one worker's thread waits for batches. While it waits, another thread may use the worker instead."""

    most = 1
    """Items of a batch."""
    limit = 0.0
    """When, on the monotonic clock, the worker will have taken too long for what it has."""
    lent = late = False

    def fileno(self) -> int:
        """What can be read from when the worker is done."""
        raise NotImplementedError

    def leave(self) -> bool:
        """True if the worker's thread is to go."""
        raise NotImplementedError

    def begin(self, batch: list[Item]) -> None:
        """Hands a batch to the worker."""
        raise NotImplementedError

    def wait(self, deadline: float) -> bool:
        """Waits until ``finish`` will not, or not for long; False if ``deadline`` comes first."""
        raise NotImplementedError

    def finish(self, *, ready: bool = False) -> Iterable[tuple[Item, Outcome]]:
        """The items to be resolved and their outcomes; waits for the worker.

        If it is known to be ``ready``, nothing is waited for: pipe.Incomplete if it has only begun to answer.
        """
        raise NotImplementedError


def resolve(finished: Iterable[tuple[Item, Outcome]]) -> None:
    """Gives items their outcomes."""
    for item, outcome in finished:
        item.resolve(outcome)


class Batcher:
    """A queue that is bounded, grouped by key, and taken from in batches by any number of threads."""

    def __init__(self, queue_size: int, load: ModelMetrics) -> None:
        self.queue_size = queue_size
        self._load = load
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._room = threading.Condition(lock)  # for those who wait until the queue has some
        self._groups: dict[Hashable, deque[Item]] = {}
        self._idle: list[Seat] = []
        self._lent = 0
        self._depth = 0
        self._closed: ServerError | None = None

    def put(self, items: Sequence[Item], spare: int = 0) -> None:
        """Queues all items or none: Overloaded if they don't fit, the closing error if the queue is closed.

        They leave room for ``spare`` items of others.
        """
        with self._changed:
            self._refuse_closed()
            if not self._fit(items, spare):
                message = f"the queue is full: {self._depth} of {self.queue_size} items are waiting"
                raise Overloaded(message, retry_after_ms=max(1, int(self._wait_s() * 1000)))
            wait_s, deadline = self._wait_s(), items[0].deadline
            if deadline is not None and self._depth and items[0].enqueued + wait_s > deadline:
                raise DeadlineExceeded(f"{self._depth} items are waiting, which takes about {wait_s:.2f} s")
            self._put(items)

    def put_in_parts(self, items: Sequence[Item]) -> None:
        """Queues many items, at most half a queue of them at once; returns when the last one is queued.

        All such batches together leave a quarter of the queue to others, and wait for each other.

        A batch that the whole queue could hold is refused as by ``put`` if not even its first part fits. Once a part is
        queued, items that come to nothing get the error as their outcome.
        """
        if len(items) <= self.queue_size:
            try:
                return self.put(items)
            except Overloaded:
                pass  # then a part at a time
        share = max(1, self.queue_size // 2)
        size = max(1, share // 2)
        if len(items) > self.queue_size:  # to be sent again would not make it fit
            self._put_with_patience(items[:size])
        else:
            self.put(items[:size], spare=self.queue_size // 4)
        for begin in range(size, len(items), size):
            if begin >= share:
                items[begin - share].wait()
            part = [item for item in items[begin : begin + size] if not item.dead]
            try:
                self._put_with_patience(part)
            except ServerError as error:
                for item in items[begin:]:
                    item.resolve(error)
                return

    def _put_with_patience(self, items: Sequence[Item]) -> None:
        """Queues all items as soon as they fit. Those whose deadline passes before get that as their outcome."""
        with self._room:
            while True:
                items = [item for item in items if item.outcome is None]
                now = time.monotonic()
                if items and items[0].deadline is not None and items[0].deadline <= now:
                    raise DeadlineExceeded("the deadline passed before the queue had room")
                self._refuse_closed()
                if self._fit(items, self.queue_size // 4):
                    for item in items:
                        item.enqueued = item.begun = now
                    return self._put(items)
                self._room.wait(min(_LOOK_S, items[0].deadline - now) if items[0].deadline else _LOOK_S)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise self._closed

    def _fit(self, items: Sequence[Item], spare: int) -> bool:
        most = self.queue_size - spare - len(items)
        if self._depth > most:
            self._drop_dead()
        return self._depth <= most

    def _put(self, items: Sequence[Item]) -> None:
        for item in items:
            self._groups.setdefault(item.key, deque()).append(item)
        self._depth += len(items)
        self._wake(len(items))

    def borrow(self, item: Item) -> Seat | None:
        """A worker that waits for work, for who runs this item there at once; None if there is none."""
        with self._changed:
            if self._closed or self._groups or not self._idle or item.slow:
                return None
            seat = self._idle.pop()
            seat.lent = True
            self._lent += 1
            return seat

    def run(self, item: Item) -> bool:
        """Runs an item in this thread, on a worker that waits for work; False if none does. Spares two hand-overs."""
        if not (seat := self.borrow(item)):
            return False
        seat.begin([item])
        if item.deadline is None or seat.wait(item.deadline):
            resolve(seat.finish())
            self.take_back(seat)
        else:
            item.resolve(DeadlineExceeded("the deadline passed before the model answered"))
            self.abandon(seat)
        return True

    def more(self, seat: Seat) -> list[Item]:
        """The next batch for who has borrowed a seat; none, and the seat is taken back, if only its own thread should
        take what waits, or nothing does.
        """
        with self._changed:
            batch = [] if seat.leave() else self._next(seat.most, quick=True)
            if not batch:
                self._take_back(seat)
            return batch

    def take_back(self, seat: Seat) -> None:
        """Ends the lending of a seat."""
        with self._changed:
            self._take_back(seat)

    def abandon(self, seat: Seat) -> None:
        """Leaves a seat that was borrowed while its worker works: its own thread will finish that."""
        with self._changed:
            seat.late = True
            self._changed.notify_all()

    def put_back(self, items: Sequence[Item]) -> None:
        """Queues items of a worker that died again, each to be run alone and before all others."""
        with self._changed:
            for item in items:
                item.key = object()  # equal to no other key
                self._groups[item.key] = deque([item])
            self._depth += len(items)
            self._wake(len(items))

    def take(self, max_wait_s: float, seat: Seat) -> list[Item] | None:
        """The next batch, of one key and at most ``seat.most`` items, as soon as there is one.

        None when ``seat.leave()`` becomes true (call ``wake`` then) or the queue is closed and empty. No item at all
        when a borrower has left the seat in the middle: finish that, and call ``take_back``.
        """
        with self._changed:
            self._stand_up(seat)
            while seat.lent or not seat.leave():
                if seat.late:
                    return []
                if not seat.lent:
                    if batch := self._next(seat.most, max_wait_s):
                        return batch
                    if self._closed and not self._groups:
                        return None
                    if not max_wait_s:
                        self._idle.append(seat)
                self._changed.wait(self._patience(max_wait_s))
                self._stand_up(seat)
            return None

    def _stand_up(self, seat: Seat) -> None:
        if seat in self._idle:
            self._idle.remove(seat)

    def _next(self, most: int, max_wait_s: float = 0, *, quick: bool = False) -> list[Item]:
        """A batch from the group that waits for longest; none if it may grow, or is slow but shall be quick."""
        batch: list[Item] = []
        while self._groups and not batch:
            key = min(self._groups, key=lambda key: self._groups[key][0].enqueued)
            group = self._groups[key]
            grows = max_wait_s and len(group) < most and not self._closed
            if (grows and group[0].enqueued + max_wait_s > time.monotonic()) or (quick and group[0].slow):
                break
            while group and len(batch) < most and not (quick and group[0].slow):
                item = group.popleft()
                self._depth -= 1
                if not self._drop(item):
                    batch.append(item)
            if not group:
                del self._groups[key]
        self._room.notify_all()
        return batch

    def _patience(self, max_wait_s: float) -> float | None:
        """How long the group that waits for longest may wait for company; None if nothing waits."""
        if not (max_wait_s and self._groups):
            return None
        oldest = min(group[0].enqueued for group in self._groups.values())
        return max(0.0, oldest + max_wait_s - time.monotonic())

    def _take_back(self, seat: Seat) -> None:
        seat.lent = seat.late = False
        self._lent -= 1
        leaving = seat.leave()
        if not leaving:  # else, of a dead worker or a pool that stops, nobody is to borrow it again
            self._idle.append(seat)
        if self._groups or self._closed or leaving:
            self._changed.notify_all()

    def _wake(self, most: int) -> None:
        if not self._lent:
            self._changed.notify(most)
        elif self._idle:  # one of those that wait may have lent its worker; who has borrowed one looks for more
            self._changed.notify_all()

    def _wait_s(self) -> float:
        """How long a new item would wait for the full batches before it."""
        return self._depth // self._load.places * self._load.batch_s

    def close(self, error: ServerError, *, drain: bool) -> None:
        """Refuses new items with ``error`` from now on; what is queued is still run (``drain``) or gets it too."""
        with self._changed:
            self._closed = error
            if not drain:
                for group in self._groups.values():
                    for item in group:
                        item.resolve(error)
                self._groups.clear()
                self._depth = 0
            self._changed.notify_all()
            self._room.notify_all()

    def open(self) -> None:
        """Accepts items (again)."""
        with self._changed:
            self._closed = None

    def wake(self) -> None:
        """Lets every waiting ``take`` look at its ``leave`` again."""
        with self._changed:
            self._changed.notify_all()

    @property
    def depth(self) -> int:
        """Items waiting."""
        return self._depth

    def _drop(self, item: Item) -> bool:
        if item.dead:
            item.resolve(DeadlineExceeded("the deadline passed in the queue"))
            self._load.drop()
            return True
        return False

    def _drop_dead(self) -> None:
        for key, group in list(self._groups.items()):
            alive = deque(item for item in group if not self._drop(item))
            self._depth -= len(group) - len(alive)
            if alive:
                self._groups[key] = alive
            else:
                del self._groups[key]
