"""Connects a client, and begins and ends its calls: what the blocking and the asyncio client share."""

import threading
import time
from typing import Any

import grpc

from tiny_model_server.client import addresses, arguments, errors, fork_safety
from tiny_model_server.client.call import Call, LocalCall
from tiny_model_server.client.channel import ChannelKey, SharedChannel, shared
from tiny_model_server.client.credentials import Credentials
from tiny_model_server.client.local import LocalConnections
from tiny_model_server.client.stats import Stats

_SERVING = 1
_PROBE_S = 1.0  # how long a server is asked why a call was not answered


class Transport:
    """Carries one client's calls: by the local transport, or by a gRPC channel that it shares with other clients."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        """Connects to nothing yet. ValueError or OSError if certificates cannot be used."""
        self.model, self.options = model, options
        files = Credentials(*(options[name] for name in ("tls", "ca", "cert", "key", "server_name")))
        self.credentials = files.read()
        token = options["admin_token"] or options["token"]
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.stats = Stats()
        self.local: LocalConnections | None = None
        self.connected = False
        """True once a server has answered."""
        self._local_port = arguments.local_port(options)
        self._target = addresses.Target(options["addresses"])
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._silence: str | None = None
        """Why no server answered when one was last asked, at ``_probed``."""
        self._probed = 0.0
        self._channel: SharedChannel | None = None
        self._closing: list[Any] = []
        """What ``grpc.aio`` has to await of channels that this client has left."""
        self._calls: set[Call] = set()
        """Those under way by gRPC."""

    def loop(self) -> Any:
        """The event loop that the channel belongs to; None if there is none."""
        return None

    def channel(self) -> SharedChannel:
        """The channel for this process, event loop and the addresses as known now."""
        key = self._key(self.loop())
        with self._lock:
            if not self._channel or key != self._channel.key or self._channel.stale():
                self._move(key)
            return self._channel  # type: ignore[return-value]

    def _key(self, loop: Any) -> ChannelKey:
        if fork_safety.unusable:
            raise RuntimeError(
                "this process was forked while its parent was in a call, or after it used AsyncModelClient, so gRPC "
                "cannot work in it; fork before, or start processes by spawn or forkserver"
            )
        try:
            target = self._target.current()
        except OSError as error:
            raise self._unreachable(str(error)) from None
        return ChannelKey(target, self.credentials, self.options["balancing"], fork_safety.generation, loop)

    def _move(self, key: ChannelKey) -> None:
        old, self._channel = self._channel, shared(key)
        if not old or (old.key.generation, old.key.loop) != (
            key.generation,
            key.loop,
        ):  # after a fork, or in another loop
            self._calls.clear()
            if self.local:
                self.local.close(calls=False)
            self.local = LocalConnections(self._local_port, dict(self.metadata)) if self._local_port else None
        else:
            self._closing += old.drop(clients=1)

    def send(self, call: Call, *, wait: bool = True) -> LocalCall | None:
        """The call, under way by the local transport; None if gRPC must make it.

        Without ``wait``, what would block is left to gRPC, too.
        """
        connections = self.local
        if not connections or not (wait or call.request.short):
            return None
        if not (taken := connections.take(call.request.arrays, wait=wait)):
            return None
        local = LocalCall(call, connections, taken)
        return local if local.send() else None

    def begin(self, call: Call) -> Any:
        """Counts a call by gRPC, after ``channel()``; returns what makes it."""
        while not (channel := self._channel or self.channel()).add_call():
            self.channel()  # it was closed meanwhile
        call.channel = channel
        with self._lock:
            self._calls.add(call)
        return channel.stub(call.request.method, call.retry)

    def end(self, call: Call) -> list[Any]:
        """Ends what ``begin`` began; returns what ``grpc.aio`` has to await."""
        with self._lock:
            ours = call in self._calls
            self._calls.discard(call)
            closing, self._closing = self._closing, []
        return [*closing, *call.channel.drop(calls=1)] if ours else closing

    def leave(self) -> list[Any]:
        """Cancels this client's calls, and leaves its channel; returns what ``grpc.aio`` has to await."""
        with self._lock:
            calls, self._calls = self._calls, set()
            closing, self._closing = self._closing, []
            channel, self._channel = self._channel, None
            local, self.local = self.local, None
            self.connected = False
        if local:
            local.close()
        for call in calls:
            if call.handle:
                call.handle.cancel()
            closing += call.channel.drop(calls=1, retire=not call.handle)
        return closing + channel.drop(clients=1) if channel else closing

    def connect(self, call: Call) -> None:
        """Blocks until a server is ready, at the first call."""
        if self.connected:
            return
        patience = min(call.timeout, self.options["connect_timeout"])
        deadline = time.monotonic() + patience
        if self.why_silent(timeout=patience):
            self._check_refusal()
            if why := self.why_silent(timeout=max(0.001, deadline - time.monotonic()), wait_for_ready=True):
                self._check_refusal()
                why = self.why_silent(timeout=_PROBE_S) or why
                raise self._unreachable(f"it was not ready within {patience:g} s ({why}){_remedy(why)}")
        self.connected = True

    def why_silent(self, **options: Any) -> str | None:
        """Asks for a server's health, and blocks. Returns gRPC's reason why no server answers; None if one does."""
        channel = shared(self._key(None))  # that of blocking clients; asyncio's borrow it
        try:
            return None if channel.health_check()(**options).status == _SERVING else "it is not serving"
        except grpc.RpcError as error:
            silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return (error.details() or "no details") if silent else None
        finally:
            channel.drop(clients=1)

    def explained(self, call: Call, failed: Any) -> errors.ModelClientError:
        """This client's error for gRPC's. If no server answered in time, blocks for a moment to find out why."""
        error = call.failed(failed.trailing_metadata(), failed.code().name, failed.details() or "no details")
        unanswered = isinstance(error, errors.DeadlineExceeded) and not error.replica
        if unanswered and (why := self._why_unanswered()):
            return self._unreachable(f"it disconnected, and did not come back within {call.timeout:g} s ({why})")
        return error

    def _why_unanswered(self) -> str | None:
        with self._probing:  # many calls may end at once, and one of them asks for all
            if time.monotonic() - self._probed > _PROBE_S:
                self._silence, self._probed = self.why_silent(timeout=_PROBE_S), time.monotonic()
            return self._silence

    def _unreachable(self, why: str) -> errors.ModelClientError:
        details = f"no server at {', '.join(self.options['addresses'])}: {why}"
        return errors.from_status("UNAVAILABLE", details, self.model)

    def _check_refusal(self) -> None:
        """Raises Unauthenticated if a server is there, but TLS with it fails."""
        for address, name in addresses.replicas(self.options["addresses"]):
            if name and (why := self.credentials.refusal(*addresses.host_and_port(address), name)):
                raise errors.from_status("UNAUTHENTICATED", f"{address}: {why}", self.model)


def _remedy(why: str) -> str:
    """What to do about gRPC's reason why no server answers."""
    if "http1" in why:
        return "; this is a port of HTTP: give that of gRPC, which is 50000 by default"
    return "; start a server there: python server.py" if "refused" in why else ""
