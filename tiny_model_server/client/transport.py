"""Connects a client, and begins and ends its calls: what the blocking and the asyncio client share."""

import math
import socket
import threading
import time
from concurrent import futures
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from tiny_model_server.client import addresses, arguments, errors, fork_safety, siblings
from tiny_model_server.client.call import Call, LocalCall
from tiny_model_server.client.channel import LIVE_SERVICE, ChannelKey, SharedChannel, shared
from tiny_model_server.client.credentials import Credentials
from tiny_model_server.client.daemons import daemons
from tiny_model_server.client.local import LocalConnections
from tiny_model_server.client.stats import Stats

_SERVING = 1
_FOLLOW_S = 0.5  # that a first call waits until the other replicas are found
_FOLLOW_AGAIN_S = 10.0  # between looks for those that were not found
_PROBE_S = 1.0  # how long a server is asked why a call was not answered
_CUT_OFF = ("Stream removed", "Socket closed", "ping timeout", "keepalive", "recvmsg", "sendmsg")
"""How gRPC's words begin, by its version, if a connection ended."""


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
        self.locals: list[LocalConnections] = []
        """Those to each replica on this host that the local transport may reach."""
        self._turn = 0
        self.follows = True
        """Whether calls go to the other replicas of a server as well."""
        self.connected = False
        """True once a server has answered."""
        self.addresses: list[str] = options["addresses"]
        """Those given, and those of replicas that were found beside them."""
        self._target = addresses.Target(self.addresses)
        self._local_ports = arguments.local_ports(options)
        self._has_siblings = False
        self._follow_after = math.inf
        """When to look for replicas that were not found yet, by ``time.monotonic``."""
        self._following = threading.Lock()
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._silence: str | None = None
        """Why no server answered when one was last asked, at ``_probed``."""
        self._probed = 0.0
        self._service = LIVE_SERVICE
        """The health name of the replicas that calls go to; the model's, once some replica could not run it."""
        self._searched = 0.0
        """When replicas that can run it were last looked for."""
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
        key = self._key(self.loop(), self._service)
        with self._lock:
            if not self._channel or key != self._channel.key or self._channel.stale():
                self._move(key)
            return self._channel  # type: ignore[return-value]

    def _key(self, loop: Any, service: str = LIVE_SERVICE) -> ChannelKey:
        if fork_safety.unusable:
            raise RuntimeError(
                "this process was forked while its parent was in a call, or after it used AsyncModelClient, so gRPC "
                "cannot work in it; fork before, or start processes by spawn or forkserver"
            )
        try:
            target = self._target.current()
            if time.monotonic() > self._follow_after:
                self._follow_after = math.inf
                daemons(fork_safety.generation).submit(self.follow)
        except OSError as error:
            raise self._unreachable(str(error)) from None
        return ChannelKey(target, self.credentials, self.options["balancing"], fork_safety.generation, loop, service)

    def _move(self, key: ChannelKey) -> None:
        old, self._channel = self._channel, shared(key)
        if not old or (old.key.generation, old.key.loop) != (
            key.generation,
            key.loop,
        ):  # after a fork, or in another loop
            self._calls.clear()
            for local in self.locals:
                local.close(calls=False)
            self.locals = []
        else:
            self._closing += old.drop(clients=1)
        new = self._local_ports[len(self.locals) :]
        self.locals = self.locals + [LocalConnections(port, dict(self.metadata)) for port in new]

    def send(self, call: Call, *, wait: bool = True) -> LocalCall | None:
        """The call, under way by the local transport; None if gRPC must make it.

        Without ``wait``, what would block is left to gRPC, too.
        """
        if not self.locals or self._service != LIVE_SERVICE or not (wait or call.request.short):
            return None
        for connections in self._in_turn():
            if taken := connections.take(call.request.arrays, wait=wait):
                local = LocalCall(call, connections, taken)
                return local if local.send() else None
        return None

    def _in_turn(self) -> list[LocalConnections]:
        """The replicas on this host: first one with the fewest calls of this client."""
        if len(self.locals) == 1:
            return self.locals
        self._turn += 1
        first = self._turn % len(self.locals)
        return sorted(self.locals[first:] + self.locals[:first], key=lambda one: len(one.busy))

    def begin(self, call: Call) -> Any:
        """Counts a call by gRPC, after ``channel()``; returns what makes it."""
        while (channel := self._channel or self.channel()).key.service != self._service or not channel.add_call():
            self.channel()  # other replicas are to be used, or it was closed meanwhile
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
            connections, self.locals = self.locals, []
            self.connected = False
        for local in connections:
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
                raise self._unreachable(f"it was not ready within {patience:g} s ({why}){self._remedy(why)}")
        if self._has_siblings and self.follows:
            futures.wait([daemons(fork_safety.generation).submit(self.follow)], _FOLLOW_S)
        self.connected = True

    def redirect(self, call: Call, error: errors.ModelClientError) -> None:
        """Raises the call's error, unless other replicas may answer it, which the next attempt will use. Blocks.

        They are those that serve the model, if the error is that one does not; and all, if none serves it any more, or
        if a server died in the middle of a large answer, after which gRPC does not retry.
        """
        used, cut_off = call.channel.key.service, error.details().startswith(_CUT_OFF)
        with self._probing:
            if isinstance(error, errors.ServerUnavailable):
                if used != LIVE_SERVICE:
                    self._service = LIVE_SERVICE
            elif not call.refused and self.follows and self.model and time.monotonic() - self._searched > _PROBE_S:
                silent = self.why_silent(self.model, timeout=min(_PROBE_S, call.remaining()))
                self._service = LIVE_SERVICE if silent else self.model
                self._searched = time.monotonic()
        # A client that was closed meanwhile has no channel, and is not to open it again.
        if call.final or call.refused or not self._channel or (used == self._service == LIVE_SERVICE and not cut_off):
            raise error
        call.final = True

    def why_silent(self, service: str = LIVE_SERVICE, **options: Any) -> str | None:
        """Asks for a server's health, and blocks. Returns gRPC's reason why no server answers; None if one does.

        With the name of a model, only servers that serve it are asked.
        """
        channel = shared(self._key(None, service))  # that of blocking clients; asyncio's borrow it
        try:
            answer, done = channel.health_check()(**options)
            self._has_siblings = siblings.replica(done.trailing_metadata()) is not None
            return None if answer.status == _SERVING else "it is not serving"
        except grpc.RpcError as error:
            silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return (error.details() or "no details") if silent else None
        finally:
            channel.drop(clients=1)

    def follow(self) -> None:
        """Finds the other replicas of each server that was started with TMS_REPLICAS. Blocks.

        One that does not answer is looked for again while calls are made. One that was found stays.
        """
        with fork_safety.in_flight, self._following:
            known, again = list(self.addresses), False
            for address in self.addresses:  # any of them knows all of its server
                one = self._replica_at(address)
                for other, expected in siblings.siblings(address, one).items() if one else ():
                    if other not in known and self._replica_at(other) == expected:
                        known.append(other)
                    again |= other not in known
            if known != self.addresses:
                target = addresses.Target(known)
                target.current()  # looks up names here, so that no call waits for it
                if self._local_ports:
                    self._local_ports = [addresses.host_and_port(address)[1] for address in known]
                self.addresses, self.credentials, self._target = known, self._named(known[0]), target
            self._follow_after = time.monotonic() + _FOLLOW_AGAIN_S if again else math.inf

    def _replica_at(self, address: str) -> siblings.Replica | None:
        """What the replica at an address of one host reports of itself; None if it is alone, or does not answer."""
        found = addresses.replicas([address])
        if len(found) > 1 or not found[0][1]:
            return None
        target = addresses.Target([address]).current()
        channel = shared(self._key(None)._replace(target=target, credentials=self._named(address)))
        try:
            return siblings.replica(channel.health_check()(timeout=_PROBE_S)[1].trailing_metadata())
        except grpc.RpcError:
            return None
        finally:
            channel.drop(clients=1)

    def _named(self, address: str) -> Credentials:
        """The credentials for a target of IPs, whose certificates carry the name in an address."""
        name = self.options["server_name"] or addresses.host_and_port(address)[0]
        return replace(self.credentials, server_name=name) if self.credentials.tls else self.credentials

    def explained(self, call: Call, failed: Any) -> errors.ModelClientError:
        """This client's error for gRPC's. If no server answered in time, blocks for a moment to find out why."""
        if isinstance(failed, errors.ModelClientError):  # of an answer that cannot be read
            return failed
        error = call.failed(failed.trailing_metadata(), failed.code().name, failed.details() or "no details")
        unanswered = isinstance(error, errors.DeadlineExceeded) and not error.replica
        if unanswered and (why := self._why_unanswered()):
            why = f"it disconnected, and did not come back within {call.timeout:g} s ({why})"
            return self._unreachable(why, call.request.id)
        return error

    def _why_unanswered(self) -> str | None:
        with self._probing:  # many calls may end at once, and one of them asks for all
            if time.monotonic() - self._probed > _PROBE_S:
                self._silence, self._probed = self.why_silent(timeout=_PROBE_S), time.monotonic()
            return self._silence

    def _unreachable(self, why: str, request_id: str = "") -> errors.ModelClientError:
        details = f"no server at {', '.join(self.addresses)}: {why}"
        return errors.from_status("UNAVAILABLE", details, self.model, request_id=request_id)

    def _remedy(self, why: str) -> str:
        """What to do about gRPC's reason why no server answers, which holds for one IP address of a name only."""
        if "http1" in why or any(map(_speaks_http, self.options["addresses"])):
            return "; this is a port of HTTP: give that of gRPC, which is 50000 by default"
        if "unhealthy" in why:
            return "; a server is there, and loads its models: wait longer, with connect_timeout and timeout"
        return "; start a server there: python server.py" if "refused" in why else ""

    def _check_refusal(self) -> None:
        """Raises Unauthenticated if a server is there, but TLS with it fails."""
        for address, name in addresses.replicas(self.options["addresses"]):
            if name and (why := self.credentials.refusal(*addresses.host_and_port(address), name)):
                raise errors.from_status("UNAUTHENTICATED", f"{address}: {why}", self.model)


def _speaks_http(address: str) -> bool:
    with suppress(OSError, ValueError), socket.create_connection(addresses.host_and_port(address), _PROBE_S) as probe:
        probe.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        return probe.recv(5) == b"HTTP/"
    return False
