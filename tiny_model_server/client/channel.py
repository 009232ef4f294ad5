"""The client's channels: target, service config and options; the only place that makes one."""

import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc

from tiny_model_server import schemas, tracing
from tiny_model_server.client.credentials import Credentials

LIVE_SERVICE = "TinyModelServer"
"""The health name that the channels watch: under it, a replica serves from the end of loading until it stops."""

_HEALTH = "grpc.health.v1.Health"
_LARGEST_MESSAGE = (1 << 31) - 1
_RETRY_BUFFER = 1 << 28
_LOOKUP_AGE_S = 5.0
_ROUND_ROBIN: dict[str, Any] = {"round_robin": {}}
_BY_LOAD: dict[str, Any] = {
    # A replica that fails nearly all its calls is left alone for a while, at most half of them at a time.
    "outlier_detection_experimental": {
        "interval": "1s",
        "baseEjectionTime": "10s",
        "maxEjectionTime": "60s",
        "maxEjectionPercent": 50,
        "failurePercentageEjection": {
            "threshold": 80,
            "enforcementPercentage": 100,
            "minimumHosts": 2,
            "requestVolume": 5,
        },
        # Servers renew connections every few seconds, after which a weight counts again only when the blackout is over.
        "childPolicy": [{"weighted_round_robin": {"blackoutPeriod": "0.05s", "weightUpdatePeriod": "0.2s"}}],
    }
}
RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
"""Statuses after which a call is tried again."""
_RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.02s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": RETRIED,
}
POLICIES = {"load": [_BY_LOAD, _ROUND_ROBIN], "round_robin": [_ROUND_ROBIN]}
"""How calls are balanced: by the load that replicas report, or in turns."""


def open_channel(grpc_or_aio: Any, target: str, trust: Credentials, policy: str = "load", retry: bool = True) -> Any:
    """A channel of ``grpc`` or ``grpc.aio`` that balances over the target's healthy addresses.

    Without ``retry`` only calls that no server has begun are tried again.
    """
    credentials, more = trust.credentials(), trust.options(target)
    options = _options(POLICIES[policy], retry) + more
    kind, with_credentials = (
        (grpc_or_aio.secure_channel, [credentials]) if credentials else (grpc_or_aio.insecure_channel, [])
    )
    if grpc_or_aio is grpc:
        return tracing.traced(kind(target, *with_credentials, options=options))
    return kind(
        target, *with_credentials, options=options, interceptors=tracing.interceptors("aio_client_interceptors")
    )


class Target:
    """gRPC's target for a client's addresses.

    gRPC looks a single name up itself, again and again. It takes no list of names, so those of a list are looked up
    here: again while calls are made, and if that fails the last answer stays.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        """ValueError if an address is malformed."""
        self._addresses = list(addresses)
        self._lock = threading.Lock()
        self._looked_up = 0.0
        self._fixed = _fixed_target(self._addresses)
        self._current = ""

    def current(self) -> str:
        """The target as known now; OSError if no name could ever be looked up."""
        if self._fixed:
            return self._fixed
        if not self._current:
            self._look_up()
        elif time.monotonic() - self._looked_up > _LOOKUP_AGE_S and self._lock.acquire(blocking=False):
            self._looked_up = time.monotonic()
            threading.Thread(target=self._look_up_again, name="lookup", daemon=True).start()
        return self._current

    def _look_up_again(self) -> None:
        try:
            self._look_up()
        except OSError:
            pass  # the last answer stays
        finally:
            self._lock.release()

    def _look_up(self) -> None:
        found, problem = [], None
        for address in self._addresses:
            try:
                found += _resolve(*host_and_port(address))
            except OSError as error:
                problem = OSError(f"{address} cannot be looked up: {error.strerror or error}")
        if problem and (self._current or not found):
            raise problem
        self._current = _ip_target(found)
        self._looked_up = time.monotonic()


def replicas(addresses: Sequence[str]) -> list[tuple[str, str]]:
    """(address, host name) of every server: a name that stands for several hosts is replaced by each of their IPs."""
    every: list[tuple[str, str]] = []
    for address in addresses:
        if "://" in address or address.startswith("unix:"):
            every.append((address, ""))
            continue
        host, port = host_and_port(address)
        try:
            found = _ip_target(_resolve(host, port)).partition(":")[2].split(",")
        except OSError:
            found = []
        every += [(one, host) for one in found] if len(found) > 1 else [(address, host)]
    return every


def first_refusal(addresses: Sequence[str], trust: Credentials) -> str | None:
    """The first reason why a server that is there and this client cannot trust each other, None if there is none."""
    for address, name in replicas(addresses):
        if name and (why := trust.refusal(*host_and_port(address), name)):
            return f"{address}: {why}"
    return None


def health_check(opened: Any) -> Callable[..., Any]:
    """Asks a channel's server whether it lives: ``health_check(channel)(timeout=1).status``; never waits for one."""
    request = schemas.message("health", "grpc.health.v1.HealthCheckRequest")(service=LIVE_SERVICE)
    response = schemas.message("health", "grpc.health.v1.HealthCheckResponse")
    check = opened.unary_unary(f"/{_HEALTH}/Check", type(request).SerializeToString, response.FromString)
    return partial(check, request)


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of "host:port" or "[::1]:port"; ValueError if it is neither."""
    host, colon, port = address.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"address {address!r} must be host:port, as in localhost:50000 or [::1]:50000")
    return host, int(port)


def _fixed_target(addresses: Sequence[str]) -> str | None:
    """The target of addresses that need no lookup of ours; None if they need it."""
    if not addresses:
        raise ValueError("no address; give at least one host:port")
    if all(address.startswith("unix:") for address in addresses):
        return "unix:" + ",".join(address.removeprefix("unix:") for address in addresses)
    if len(addresses) == 1 and addresses[0].startswith("dns://"):
        return addresses[0]
    pairs = [host_and_port(address) for address in addresses]
    if all(_is_ip(host) for host, _ in pairs):
        return _ip_target(pairs)
    if len(pairs) == 1:
        return f"dns:///{pairs[0][0]}:{pairs[0][1]}"
    return None


def _ip_target(pairs: Sequence[tuple[str, int]]) -> str:
    pairs = list(dict.fromkeys(pairs))
    v6 = [f"[{host}]:{port}" for host, port in pairs if ":" in host]
    v4 = [f"{host}:{port}" for host, port in pairs if ":" not in host]
    # gRPC takes no mix; a host of both kinds is reached by its IPv4 address.
    return "ipv4:" + ",".join(v4) if v4 else "ipv6:" + ",".join(v6)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({(str(address[0]), port) for *_, address in found})


def _options(policy: list[dict[str, Any]], retry: bool) -> list[tuple[str, Any]]:
    method = {"name": [{}], "waitForReady": True} | ({"retryPolicy": _RETRIES} if retry else {})
    service_config = {
        "loadBalancingConfig": policy,
        "healthCheckConfig": {"serviceName": LIVE_SERVICE},
        "methodConfig": [method, {"name": [{"service": _HEALTH}], "waitForReady": False}],
        # Retries stop when half of these tokens are used up by failures; a success gives back a tenth.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 0.1},
    }
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.service_config_disable_resolution", 1),  # no TXT records: this configuration is the one
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
        ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for these addresses
        # Where channels share a connection and ask for its health, gRPC may crash as they open together.
        ("grpc.use_local_subchannel_pool", 1),
    ]
