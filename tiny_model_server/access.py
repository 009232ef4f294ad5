"""Who may call the server, and who may change it: tokens, proxies, and the users of its own host."""

import hmac
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from tiny_model_server.errors import PermissionDenied, Unauthenticated
from tiny_model_server.settings import Settings

_PROXY_HEADERS = frozenset(
    "cf-connecting-ip fastly-client-ip forwarded true-client-ip via x-client-ip x-cluster-client-ip "
    "x-original-forwarded-for x-real-ip".split()
)
_PROXY_PREFIXES = ("x-forwarded", "x-envoy-")
_ESTABLISHED = "01"
_MAPPED = bytes(10) + b"\xff\xff"  # before an address of IPv4 that is written as one of IPv6
Address = IPv4Address | IPv6Address
_WHO_MAY = {
    "token": "only callers with the admin token (TMS_ADMIN_TOKEN) as metadata 'authorization: Bearer TOKEN'",
    "local": "only the server's own user and root, on its host and not through a proxy (TMS_ADMIN=local; "
    "set TMS_ADMIN_TOKEN to let others)",
    "host": "only callers on the server's own host, and not through a proxy (TMS_ADMIN=host; "
    "set TMS_ADMIN_TOKEN to let others)",
}


class Caller(Protocol):
    """What must be known of a call."""

    peer: str
    """As gRPC writes it: "ipv4:127.0.0.1:1234", "unix:..."."""
    metadata: Mapping[str, str | bytes]


class Access:
    """The rules of TMS_TOKEN, TMS_ADMIN and TMS_ADMIN_TOKEN."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ports: frozenset[int] = frozenset()
        """The TCP ports at which the server is called; empty if they are not known."""

    def authenticate(self, metadata: Mapping[str, str | bytes]) -> None:
        """Unauthenticated unless the server asks for no token, or the caller has it or the admin token."""
        tokens = self._settings.token, self._settings.admin_token
        if tokens[0] and not any(_offers(metadata, token) for token in tokens):
            raise Unauthenticated("send the server's token (TMS_TOKEN) as metadata 'authorization: Bearer TOKEN'")

    def authorize(self, call: Caller) -> None:
        """PermissionDenied unless the caller may stop the server and change its models (TMS_ADMIN)."""
        rule = self._settings.admin_rule
        if rule == "token" and _offers(call.metadata, self._settings.admin_token):
            return
        here = rule in ("local", "host") and on_this_host(call.peer, call.metadata)
        if here and (rule == "host" or by_this_user(call.peer, self.ports)):
            return
        raise PermissionDenied(f"this call may not stop the server or change its models; {self.who_may()} may")

    def who_may(self) -> str:
        """Who may stop the server and change its models, in words."""
        if self._settings.admin_rule == "off":
            missing = ", and no TMS_ADMIN_TOKEN is set" if self._settings.admin == "token" else ""
            return f"nobody (TMS_ADMIN={self._settings.admin}{missing})"
        return _WHO_MAY[self._settings.admin_rule]


def _offers(metadata: Mapping[str, str | bytes], token: str) -> bool:
    offered = str(metadata.get("authorization", "")).encode()
    return bool(token) and hmac.compare_digest(offered, f"Bearer {token}".encode())


def is_loopback(host: str) -> bool:
    """True for the text of a loopback address, also for one of IPv4 that is written as one of IPv6."""
    return bool((found := address(host)) and found.is_loopback)


def on_this_host(peer: str, metadata: Mapping[str, str | bytes]) -> bool:
    """True if a call came over loopback or a unix socket, from any user, and not through a proxy.

    ``peer`` is as gRPC writes it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234", "unix:...". The names in ``metadata``
    are in lower case.
    """
    if any(name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIXES) for name in metadata):
        return False
    return peer.startswith("unix:") or is_loopback(_host_and_port(peer)[0])


def by_this_user(peer: str, ports: Collection[int] = ()) -> bool:
    """True if the other end of a connection on this host belongs to a process of this user or of root.

    The mode of a unix socket's file says who may connect, so every caller that did is allowed. For TCP, Linux reports
    the user of each connection; on other systems the result is False. ``ports`` are this server's, if they are known.
    """
    if peer.startswith("unix:"):
        return True
    host, port = _host_and_port(peer)
    users = set(_users(found, int(port), ports)) if (found := address(host)) else set()
    return bool(users) and users <= {os.geteuid(), 0}


def _users(host: Address, port: int, ports: Collection[int]) -> Iterator[int]:
    """The users of the established connections from an address, to one of ``ports`` if any are given.

    They are read from Linux's tables of connections, as proc(5) describes them. Other systems have none.
    """
    begins = {f"{_hex(packed)}:{port:04X}" for packed in (host.packed, _MAPPED + host.packed)}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, begin, end, state, _, _, _, user, *_ = line.split()
                if begin in begins and state == _ESTABLISHED and (not ports or int(end[-4:], 16) in ports):
                    yield int(user)


def _hex(address: bytes) -> str:
    """An address as in Linux's table: 32-bit words, each in the machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(address) // 4}I", address))


def _host_and_port(peer: str) -> tuple[str, str]:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), port


def address(host: str) -> Address | None:
    """The address that a text stands for, None for a name. One of IPv4 may be written as one of IPv6."""
    try:
        found = ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
