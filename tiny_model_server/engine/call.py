"""A call on its way through the engine: what a protocol knows of it, and its inputs with their outcomes."""

import asyncio
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

from tiny_model_server import logs, request_ids
from tiny_model_server.codec import Encoded, signature
from tiny_model_server.engine.batcher import Item, Outcome, Stream
from tiny_model_server.engine.repository import ServedModel
from tiny_model_server.errors import ServerError
from tiny_model_server.shared_memory import SharedBuffers


@dataclass
class Call:
    """What a protocol knows of the call that it answers, whatever the transport."""

    deadline: float | None = None
    """On the monotonic clock; None if the caller set none."""
    peer: str = ""
    """As gRPC writes it: "ipv4:127.0.0.1:1234", "unix:..."."""
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    on_end: Callable[[Callable[[], None]], bool] = lambda callback: True
    """Registers a function to be called when the call ends, by cancellation too; False if it has ended."""
    repeatable: bool = True
    """False forbids to run the inputs again if a worker dies of them or with them."""
    model: str = ""
    """The model that a router in front chose. It takes precedence over the one that the request names."""
    buffers: SharedBuffers | None = None
    """The memory that the caller shares with the workers, if it does."""
    largest: int = 1 << 31
    """Bytes of arrays that a request may have in the shared memory."""
    placed: int = 0
    """How many it has named so far."""
    trailing_bytes: memoryview | None = None
    """The bytes of the request's image or last array, if they follow the message instead of being in it."""
    trailing: dict[str, str | bytes] = field(default_factory=dict)
    """Metadata to send with the answer's status."""
    served: str = ""
    """The model that was called."""
    queue_s: float = 0.0
    """From its arrival until the first of its inputs began to run."""
    model_s: float = 0.0
    """From then until the last one's outcome."""
    bytes_in: int = 0
    bytes_out: int = 0

    def __post_init__(self) -> None:
        self.id = request_ids.checked(self.metadata.get(request_ids.HEADER))
        """The one that the caller has given it, else a new one."""

    def named(self, model: str) -> str:
        """The model that it is for: ``model``, as the request names it, unless a router in front chose another."""
        self.served = self.model or model
        return self.served

    def log_access(self, method: str, status: str) -> None:
        """Adds a line to the access log, if there is one."""
        if not logs.access.disabled:
            times = {"queue_ms": round(1000 * self.queue_s, 3), "model_ms": round(1000 * self.model_s, 3)}
            sizes = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}
            ends = {"peer": self.peer, "request_id": self.id}
            fields = {"status": status, "model": self.served[:80], **times, **sizes, **ends}
            logs.access.info("%s", method, extra={"fields": fields})


@dataclass(eq=False)
class Run:
    """One run of a model: one or more inputs, of which each gets an outcome."""

    name: str
    values: Sequence[Encoded]
    args: str
    call: Call
    done: Callable[["Run"], None]
    """Called on the loop when there are outcomes."""
    json_only: bool = False
    response: SharedBuffers | None = None
    """Where the arrays of a single input's outcome go."""
    stream: Stream | None = None
    items: list[Item] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    """All of them in the end, none before."""
    error: ServerError | None = None
    """Why the run as a whole was refused."""
    task: "asyncio.Task[None] | None" = None
    """What the run waits for before its items are queued."""
    finished: Callable[["Run"], None] = lambda run: run.done(run)
    """What the engine does at the end; it calls ``done``."""
    admitted: bool = False
    model: ServedModel | None = None
    since: float = 0.0
    report: bytes = b""
    """The load report for the caller."""

    def make_items(self, model: ServedModel) -> list[Item]:
        """An item for each value. InvalidInput if one does not fit what the model declares."""
        loaded, repeatable = model.loaded, self.call.repeatable
        mixes = loaded is not None and loaded.options.mix_shapes
        items = []
        for value in self.values:
            if loaded:
                loaded.check_input(value)
            # A stream is alone in its batch, and what is not repeatable: a batch that fails is run again item by item.
            alone = self.stream or not repeatable
            key: Hashable = object() if alone else (self.args, () if mixes else signature(value))
            item = Item(value, self.args, key, self.call.deadline, self._resolved, self.json_only)
            item.repeatable, item.response, item.stream = repeatable, self.response, self.stream
            item.request_id = self.call.id
            items.append(item)
        self.items = items
        self._waiting = len(items)
        return items

    async def next_values(self) -> list[Outcome]:
        """What the model has yielded since the last time, at least one value; nothing after the last. An error ends it.

        For the loop, and a run with a stream.
        """
        assert self.stream
        values = await self.stream.get()
        return values or [outcome for outcome in self.outcomes if isinstance(outcome, ServerError)]

    def note_times(self, now: float) -> None:
        """Adds to the call's times in queue and in the model; for the access log."""
        if self.items:
            begun = min((item.begun for item in self.items if item.begun), default=now)
            self.call.queue_s += begun - min(item.enqueued for item in self.items)
            self.call.model_s += now - begun

    def finish(self, outcomes: list[Outcome]) -> None:
        """Reports the outcomes, unless that was done before."""
        if not self.outcomes:
            self.outcomes = outcomes
            self.finished(self)

    def refuse(self, error: ServerError) -> None:
        """Ends the run as a whole: nothing of it is done."""
        self.error = error
        self.cancel(error)

    def cancel(self, error: ServerError) -> None:
        """Ends the run: each input that has no outcome gets the error."""
        if self.task:
            self.task.cancel()
        for item in self.items:
            item.resolve(error)
        self.finish([error] * len(self.values))

    def _resolved(self, item: Item) -> None:
        self._waiting -= 1
        if not self._waiting:
            self.finish([item.outcome for item in self.items if item.outcome is not None])


def answers(outcomes: Iterable[Outcome], where: str = "") -> list[Encoded]:
    """The outcomes, if all are answers. Else raises the first error; ``where``, as in "item {}: ", says of which."""
    found = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ServerError):
            error = copy(outcome)  # other inputs may have the same
            error.args = (f"{where.format(index)}{outcome}",)
            raise error
        found.append(outcome)
    return found


def status_of(outcome: Outcome) -> str:
    """The gRPC status of an outcome, by name."""
    return outcome.status if isinstance(outcome, ServerError) else "OK"
