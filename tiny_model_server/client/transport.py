"""What the blocking and the asyncio client share: where their calls go, and what becomes of each call."""

import threading
import time
from contextlib import suppress
from typing import Any

import grpc

from tiny_model_server import tracing
from tiny_model_server.client import addresses, arguments, errors, fork_safety
from tiny_model_server.client.calls import Request
from tiny_model_server.client.channel import Place, SharedChannel, shared
from tiny_model_server.client.credentials import Credentials
from tiny_model_server.client.local import LocalConnections
from tiny_model_server.client.stats import NOBODY, Stats

PROBE_S = 1.0
"""How long a server is asked why a call was not answered."""


class Transport:
    """Carries one client's calls: by the local transport, or by a gRPC channel that it shares with other clients."""

    library: Any = grpc

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        """Connects to nothing yet. ValueError or OSError if certificates cannot be used."""
        self.model, self.options = model, options
        self.credentials = Credentials(*(options[name] for name in ("tls", "ca", "cert", "key", "server_name")))
        self.credentials.check()
        token = options["admin_token"] or options["token"]
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.stats = Stats()
        self.local: LocalConnections | None = None
        self.connected = False
        """True once a server has answered."""
        self._local_port = arguments.local_port(options)
        self._target = addresses.Target(options["addresses"])
        self._lock = threading.Lock()
        self._place: Place | None = None
        self._channel: SharedChannel | None = None
        self._unused: list[SharedChannel] = []
        """Channels that nobody uses any more and that are still to be closed."""
        self._calls: set[Call] = set()
        """Those under way by gRPC."""

    def loop(self) -> Any:
        """The event loop that the channel belongs to; None if there is none."""
        return None

    def _look_up(self) -> None:
        with suppress(OSError):  # channel() reports it
            self._target.current()

    def channel(self) -> SharedChannel:
        """The channel for this process, event loop and the addresses as known now."""
        if fork_safety.unusable:
            raise RuntimeError(
                "this process was forked while its parent was in a call, or after it used AsyncModelClient, so gRPC "
                "cannot work in it; fork before, or start processes by spawn or forkserver"
            )
        try:
            target = self._target.current()
        except OSError as error:
            raise self.unreachable(str(error)) from None
        balancing = self.options["balancing"]
        place = Place(self.library, target, self.credentials, balancing, fork_safety.generation, self.loop())
        with self._lock:
            if not self._channel or place != self._place or self._channel.stale():
                self._move(place)
            return self._channel  # type: ignore[return-value]

    def _move(self, place: Place) -> None:
        old, self._channel = self._channel, shared(place)
        elsewhere, self._place = self._place is None or self._place[-2:] != place[-2:], place
        if elsewhere:  # what there is belongs to another process or event loop
            self._calls.clear()
            self.connected = False
            if self.local:
                self.local.close(calls=False)
            self.local = LocalConnections(self._local_port, dict(self.metadata)) if self._local_port else None
        elif old and old.drop(clients=1):
            self._unused.append(old)

    def begin(self, call: "Call") -> Any:
        """Counts a call by gRPC; returns what makes it."""
        while not (channel := self.channel()).add_call():
            pass  # it was closed meanwhile
        call.channel = channel
        with self._lock:
            self._calls.add(call)
        return channel.stub(call.request.method, call.retry)

    def end(self, call: "Call") -> list[SharedChannel]:
        """Ends what ``begin`` began; returns the channels that are to be closed."""
        with self._lock:
            ours = call in self._calls
            self._calls.discard(call)
            unused, self._unused = self._unused, []
        return [*unused, call.channel] if ours and call.channel.drop(calls=1) else unused

    def leave(self) -> list[SharedChannel]:
        """Cancels this client's calls; returns the channels that are to be closed."""
        with self._lock:
            calls, self._calls = self._calls, set()
            closing, self._unused = self._unused, []
            channel, self._channel, self._place = self._channel, None, None
            local, self.local = self.local, None
            self.connected = False
        if local:
            local.close()
        for call in calls:
            call.cancel()
        closing += [call.channel for call in calls if call.channel.drop(calls=1)]
        return [*closing, channel] if channel and channel.drop(clients=1) else closing

    def unreachable(self, why: str) -> errors.ModelClientError:
        """The error where no server is reached."""
        details = f"no server at {', '.join(self.options['addresses'])}: {why}"
        return errors.from_status("UNAVAILABLE", details, self.model)

    def never_ready(self, patience: float, why: str) -> errors.ModelClientError:
        """The error where no server answers in time; another one if TLS is what fails."""
        self.check_refusal()
        return self.unreachable(f"it was not ready within {patience:g} s ({why})")

    def check_refusal(self) -> None:
        """Raises Unauthenticated if a server is there, but TLS between it and this client fails."""
        if why := addresses.first_refusal(self.options["addresses"], self.credentials):
            raise errors.from_status("UNAUTHENTICATED", why, self.model)


class Call:
    """One call: its request and its time limit, and what came of it."""

    def __init__(self, transport: Transport, request: Request, timeout: float | None, retry: bool) -> None:
        self.request, self.retry = request, retry
        self.timeout: float = transport.options["timeout"] if timeout is None else timeout
        self.begun = time.monotonic()
        self.handle: Any = None
        """gRPC's call, where it can be cancelled."""
        self.channel: SharedChannel
        self._transport = transport
        self._span, self._trace = tracing.client_span(request.method.path)

    def remaining(self) -> float:
        """Seconds until the deadline, never 0."""
        return max(0.001, self.begun + self.timeout - time.monotonic())

    def options(self) -> dict[str, Any]:
        """Time limit and metadata, as gRPC takes them."""
        once = () if self.retry else (("tms-retry", "no"),)
        return {"timeout": self.remaining(), "metadata": (*self._transport.metadata, *once, *self._trace)}

    def cancel(self) -> None:
        """Ends the call when its client is closed. A blocking call ends when its channel closes."""
        if self.handle is not None:
            self.handle.cancel()
        else:
            self.channel.drop(retire=True)

    def ended(self, trailing: Any, status: str = "OK") -> str:
        """Counts the call, which has ended with this trailing metadata; returns the replica that answered."""
        if self._span:
            self._span.set_attribute("rpc.status", status)
            self._span.end()
        return self._transport.stats.add(self.request.method.name, time.monotonic() - self.begun, trailing, status)

    def error(self, status: str, details: str, replica: str = "") -> errors.ModelClientError:
        """The exception that the application gets."""
        return errors.from_status(status, details, self._transport.model, replica)

    def closed(self) -> errors.ModelClientError:
        """The exception where the client was closed."""
        return self.error("CANCELLED", "the client was closed")

    def failed(self, error: Any) -> errors.ModelClientError:
        """Counts the call, which has failed with gRPC's error; returns ours."""
        status = error.code().name
        replica = self.ended(error.trailing_metadata(), status)
        return self.error(status, error.details() or "no details", "" if replica == NOBODY else replica)

    def gone(self, why: str) -> errors.ModelClientError:
        """The exception where the servers have gone."""
        return self._transport.unreachable(f"it went away, and did not come back within {self.timeout:g} s ({why})")


def why_silent(error: Any) -> str | None:
    """gRPC's reason why no server answers; None if the error is a server's answer."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return error.details() or "no details"
    return None
