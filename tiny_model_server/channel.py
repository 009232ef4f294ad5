"""The client's channels: target, service config and options; the only place that makes one."""

import ipaddress
import json
import socket
from collections.abc import Sequence
from typing import Any

import grpc

_LARGEST_MESSAGE = (1 << 31) - 1
_RETRY_BUFFER = 1 << 28
_LIVE_SERVICE = "TinyModelServer"


def open_channel(addresses: Sequence[str]) -> grpc.Channel:
    """A channel that balances round robin over the addresses ("host:port", or "unix:/path") that are healthy."""
    return grpc.insecure_channel(target(addresses), options=_options())


def target(addresses: Sequence[str]) -> str:
    """gRPC's target for these addresses; names in a list of several are resolved here. ValueError if one is wrong."""
    if not addresses:
        raise ValueError("no address; give at least one host:port")
    if all(address.startswith("unix:") for address in addresses):
        return "unix:" + ",".join(address.removeprefix("unix:") for address in addresses)
    pairs = [_host_and_port(address) for address in addresses]
    if len(pairs) == 1 and not _is_ip(pairs[0][0]):
        return f"dns:///{pairs[0][0]}:{pairs[0][1]}"
    resolved = list(dict.fromkeys(found for host, port in pairs for found in _resolve(host, port)))
    v6 = [f"[{host}]:{port}" for host, port in resolved if ":" in host]
    v4 = [f"{host}:{port}" for host, port in resolved if ":" not in host]
    if v4 and v6:
        v6 = []  # gRPC takes no mix; a host of both kinds is reached by its IPv4 address
    return "ipv4:" + ",".join(v4) if v4 else "ipv6:" + ",".join(v6)


def _options() -> list[tuple[str, Any]]:
    service_config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": _LIVE_SERVICE},
        "methodConfig": [
            {
                "name": [{}],
                "waitForReady": True,
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.02s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
        ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
        ("grpc.keepalive_time_ms", 10000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.http2.ping_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for these addresses
    ]


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"address {address!r} must be host:port, as in localhost:50000 or [::1]:50000")
    return host, int(port)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"host {host!r} cannot be resolved: {error}") from None
    return [(str(address[0]), port) for *_, address in found]
