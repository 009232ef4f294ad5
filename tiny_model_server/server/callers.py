"""Where a call comes from: through a proxy or not, from this host or not, and from which of its users."""

import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import unquote

_PROXY_HEADERS = frozenset(
    "cf-connecting-ip fastly-client-ip forwarded true-client-ip via x-client-ip x-cluster-client-ip "
    "x-original-forwarded-for x-real-ip".split()
)
_PROXY_PREFIXES = ("x-forwarded", "x-envoy-")
_ESTABLISHED = "01"
_MAPPED = bytes(10) + b"\xff\xff"  # before an address of IPv4 that is written as one of IPv6
_Address = IPv4Address | IPv6Address


def forwarded(metadata: Mapping[str, str | bytes]) -> bool:
    """True if the headers say that the call came through a proxy; their names are in lower case."""
    return any(name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIXES) for name in metadata)


def is_loopback(host: str) -> bool:
    """True for the text of a loopback address, also for one of IPv4 that is written as one of IPv6."""
    found = _address(host)
    return found is not None and found.is_loopback


def is_address(host: str) -> bool:
    """True for the text of an address, False for a name."""
    return _address(host) is not None


def on_this_host(peer: str, metadata: Mapping[str, str | bytes]) -> bool:
    """True if a call came over loopback or a unix socket, whoever sent it, and not through a proxy.

    ``peer`` is as gRPC writes it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234", "unix:...".
    """
    return not forwarded(metadata) and (peer.startswith("unix:") or is_loopback(_host_and_port(peer)[0]))


def by_this_user(peer: str, ports: Collection[int] = ()) -> bool:
    """True if the other end of a connection on this host belongs to a process of this user or of root.

    The mode of a unix socket's file says who may connect, so every caller that did is allowed. For TCP, Linux reports
    the user of each connection; on other systems the result is False. ``ports`` are this server's, if they are known.
    """
    if peer.startswith("unix:"):
        return True
    host, port = _host_and_port(peer)
    found = _address(host)
    users = set(_users(found, int(port), ports)) if found else set()
    return bool(users) and users <= {os.geteuid(), 0}


def _users(host: _Address, port: int, ports: Collection[int]) -> Iterator[int]:
    """The users of the established connections that begin at an address, and lead to one of ``ports`` if there are."""
    begins = {f"{_hex(packed)}:{port:04X}" for packed in (host.packed, _MAPPED + host.packed)}
    for line in _connections():
        _, begin, end, state, _, _, _, user, *_ = line.split()
        if begin in begins and state == _ESTABLISHED and (not ports or int(end[-4:], 16) in ports):
            yield int(user)


def _connections() -> Iterator[str]:
    """The lines of Linux's tables of TCP connections, as proc(5) describes them; none on other systems."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            yield from Path("/proc/net", table).read_text().splitlines()[1:]


def _hex(address: bytes) -> str:
    """An address as in Linux's table: 32-bit words, each in the machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(address) // 4}I", address))


def _host_and_port(peer: str) -> tuple[str, str]:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), port


def _address(host: str) -> _Address | None:
    try:
        found = ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
