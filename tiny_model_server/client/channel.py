"""gRPC channels: their options, and how the clients of a process share them."""

import atexit
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple

import grpc
import grpc.aio

from tiny_model_server import schemas
from tiny_model_server.client import fork_safety
from tiny_model_server.client.credentials import Credentials

LIVE_SERVICE = "TinyModelServer"
"""The health name that the channels watch: under it, a replica serves from the end of loading until it stops."""

_HEALTH = "grpc.health.v1.Health"
_LARGEST_MESSAGE = (1 << 31) - 1
_RETRY_BUFFER = 1 << 28
_IDLE_S = 10.0
"""A channel without calls for so long closes its connections; the next call opens others."""
_ROUND_ROBIN: dict[str, Any] = {"round_robin": {}}
_EJECTION = {"threshold": 80, "enforcementPercentage": 100, "minimumHosts": 2, "requestVolume": 3}
_BY_LOAD: dict[str, Any] = {
    # A replica that fails nearly all its calls is left alone for a while, at most half of them at a time.
    "outlier_detection_experimental": {
        "interval": "1s",
        "baseEjectionTime": "10s",
        "maxEjectionTime": "60s",
        "maxEjectionPercent": 50,
        "failurePercentageEjection": _EJECTION,
        # Servers renew connections every few seconds, after which a weight counts again only when the blackout is over.
        "childPolicy": [{"weighted_round_robin": {"blackoutPeriod": "0.05s", "weightUpdatePeriod": "0.2s"}}],
    }
}
RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
"""Statuses after which a call is tried again."""
_BACKOFF = {"maxAttempts": 5, "initialBackoff": "0.02s", "maxBackoff": "0.5s", "backoffMultiplier": 2}
_RETRIES = _BACKOFF | {"retryableStatusCodes": RETRIED}
POLICIES = {"load": [_BY_LOAD, _ROUND_ROBIN], "round_robin": [_ROUND_ROBIN]}
"""How calls are balanced: by the load that replicas report, or in turns."""


class ChannelKey(NamedTuple):
    """What clients must have in common to share a channel."""

    target: str
    credentials: Credentials
    balancing: str = "load"
    generation: int = 0
    """Of the process: ``fork_safety.generation``."""
    loop: Any = None
    """The event loop, for ``grpc.aio``; None for ``grpc``."""
    service: str = LIVE_SERVICE
    """The health name that is watched: calls go to the replicas where it serves."""


class SharedChannel:
    """The channel of all clients with one key. It is closed with its last client.

    A channel that is retired takes no more clients or calls: it is closed when the calls in it have ended.
    Whether calls are retried is a property of a gRPC channel, so calls that are not to be repeated have a second one,
    which the first of them opens.
    """

    def __init__(self, key: ChannelKey) -> None:
        self.key = key
        self._clients = self._calls = 0
        self._used = time.monotonic()
        self._retired = self._closed = False
        self._channels: dict[bool, Any] = {}
        self._stubs: dict[tuple[str, bool], Any] = {}

    def stale(self) -> bool:
        """True if later calls must use another channel, since gRPC's idle timer works only once for a channel."""
        return self._retired or (not self._calls and time.monotonic() - self._used > _IDLE_S)

    def add_call(self) -> bool:
        """Counts a call that begins. False if the channel is closed already."""
        with _lock:
            self._calls += not self._closed
            return not self._closed

    def drop(self, *, clients: int = 0, calls: int = 0, retire: bool = False) -> list[Any]:
        """Counts clients or calls that end, and closes the channel with the last; returns what ``close`` does."""
        with _lock:
            self._clients -= clients
            self._calls -= calls
            self._used = time.monotonic()
            if retire or not self._clients:
                self._retire()
            if self._closed or self._calls or not self._retired:
                return []
            self._closed = True
            _open.discard(self)
        return self.close()

    def _retire(self) -> None:
        self._retired = True
        if _shared.get(self.key) is self:
            del _shared[self.key]

    def close(self) -> list[Any]:
        """Closes the channel; calls in it are cancelled. Returns what ``grpc.aio`` has to await."""
        return [opened.close() for opened in self._channels.values()]

    def stub(self, method: schemas.Method, retry: bool) -> Any:
        """gRPC's callable of a method."""
        found = self._stubs.get((method.name, retry))
        if found is None:
            found = self._stubs[method.name, retry] = getattr(self._channel(retry), method.kind)(
                method.path,
                request_serializer=methodcaller("inline"),
                response_deserializer=partial(schemas.parse_trailing, method.response),
            )
        return found

    def health_check(self) -> Callable[..., Any]:
        """Asks a server whether it serves: ``answer, call = health_check()(timeout=1)``. Waits for none by default."""
        check = schemas.methods("health", _HEALTH)["Check"]
        stub = self._channel(True).unary_unary(check.path, check.request.SerializeToString, check.response.FromString)
        return partial(stub.with_call, check.request(service=LIVE_SERVICE))

    def _channel(self, retry: bool) -> Any:
        with _lock:
            if retry not in self._channels:
                self._channels[retry] = open_channel(self.key, retry)
            return self._channels[retry]


_lock = threading.Lock()
_shared: dict[ChannelKey, SharedChannel] = {}
"""The channels that new clients join."""
_open: set[SharedChannel] = set()
"""All channels. Those of another process or event loop stay here, because they must not be closed in this one."""


def shared(key: ChannelKey) -> SharedChannel:
    """The channel with this key, which counts the caller as a client."""
    with _lock:
        found = _shared.get(key)
        if found and found.stale():
            found._retire()
        if key not in _shared:
            _shared[key] = SharedChannel(key)
            _open.add(_shared[key])
        _shared[key]._clients += 1
        return _shared[key]


@atexit.register
def _close_all() -> None:
    # At the interpreter's end gRPC's threads are gone, and a channel that is still open would wait for them for ever.
    for channel in list(_open):
        if not channel.key.loop and channel.key.generation == fork_safety.generation:
            channel.close()


def open_channel(key: ChannelKey, retry: bool = True) -> Any:
    """A new channel that balances over the target's healthy addresses.

    Without ``retry`` only calls that no server has begun are tried again.
    """
    credentials = key.credentials.credentials()
    options = _options(key, retry) + key.credentials.options(key.target)
    library: Any = grpc.aio if key.loop else grpc
    if credentials:
        return library.secure_channel(key.target, credentials, options=options)
    return library.insecure_channel(key.target, options=options)


def _options(key: ChannelKey, retry: bool) -> list[tuple[str, Any]]:
    wait = key.service == LIVE_SERVICE  # where none serves a model, one of the others says why
    method = {"name": [{}], "waitForReady": wait} | ({"retryPolicy": _RETRIES} if retry else {})
    service_config = {
        "loadBalancingConfig": POLICIES[key.balancing],
        "healthCheckConfig": {"serviceName": key.service},
        "methodConfig": [method, {"name": [{"service": _HEALTH}], "waitForReady": False}],
        # Retries stop when half of these tokens are used up by failures. A success gives one back, so that they go on
        # where one replica of two fails all its calls. gRPC takes 1 for 0, and 1.0 for what it is.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1.0},
    }
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.service_config_disable_resolution", 1),  # so that no TXT record replaces this configuration
        ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 2000),  # how long one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
        # A frozen replica is noticed after both together.
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 1500),
        ("grpc.http2.ping_timeout_ms", 1500),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # The health checks keep a connection in use, so that pings end only with the connection.
        ("grpc.client_idle_timeout_ms", int(1100 * _IDLE_S)),
        ("grpc.enable_http_proxy", 0),  # HTTP proxies are not for these addresses
        # Where channels share a connection and ask for its health, gRPC may crash as they open together.
        ("grpc.use_local_subchannel_pool", 1),
    ]
