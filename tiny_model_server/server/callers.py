"""Where a call comes from: through a proxy or not, from this host or not, and by which of its users."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import unquote

_PROXY_HEADERS = frozenset(
    "cf-connecting-ip fastly-client-ip forwarded true-client-ip via x-client-ip x-cluster-client-ip "
    "x-original-forwarded-for x-real-ip".split()
)
_PROXY_PREFIXES = ("x-forwarded", "x-envoy-")
_ESTABLISHED = "01"
_CONNECTIONS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # of Linux; proc(5) has the format
_Address = IPv4Address | IPv6Address


def forwarded(metadata: Mapping[str, str | bytes]) -> bool:
    """True if the headers say that the call came through a proxy; their names are in lower case."""
    return any(name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIXES) for name in metadata)


def is_loopback(host: str) -> bool:
    """True for the text of a loopback address, also for one of IPv4 that is written as one of IPv6."""
    try:
        return _unmapped(ip_address(host)).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """True for the text of an address, False for a name."""
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def on_this_host(peer: str, metadata: Mapping[str, str | bytes]) -> bool:
    """True if a call came over loopback or a unix socket, whoever sent it, and not through a proxy.

    ``peer`` is as gRPC writes it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234", "unix:...".
    """
    found = _address(peer)
    return not forwarded(metadata) and (peer.startswith("unix:") or bool(found and found[0].is_loopback))


def by_this_user(peer: str, ports: Collection[int] = ()) -> bool:
    """True if the other end of a connection on this host belongs to a process of this user or of root.

    The mode of a unix socket's file says who may connect, so every caller that did is let in. For TCP, Linux tells the
    user of each connection; False where the system does not tell. ``ports`` are this server's, if they are known.
    """
    if peer.startswith("unix:"):
        return True
    found = _address(peer)
    users = set(_users(*found, ports)) if found else set()
    return bool(users) and users <= {os.geteuid(), 0}


def _users(host: _Address, port: int, ports: Collection[int]) -> Iterator[int]:
    """The users of the established connections that begin at an address, and lead to one of ``ports`` if there are."""
    mapped = [IPv6Address(b"\0" * 10 + b"\xff" * 2 + host.packed)] if host.version == 4 else []
    begins = {f"{_hex(one)}:{port:04X}" for one in (host, *mapped)}
    for table in _CONNECTIONS:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:  # this system has no such table
            continue
        for line in lines:
            _, begin, end, state, _, _, _, user, *_ = line.split()
            if begin in begins and state == _ESTABLISHED and (not ports or int(end[-4:], 16) in ports):
                yield int(user)


def _hex(host: _Address) -> str:
    """An address as in Linux's table: 32-bit words, each in the machine's order."""
    words = [host.packed[at : at + 4] for at in range(0, len(host.packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def _address(peer: str) -> tuple[_Address, int] | None:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _unmapped(ip_address(host.strip("[]"))), int(port)
    except ValueError:
        return None


def _unmapped(host: _Address) -> _Address:
    return getattr(host, "ipv4_mapped", None) or host
