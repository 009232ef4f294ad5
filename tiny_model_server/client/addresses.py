"""Where the servers are: checks addresses, looks up names, and makes gRPC's target of them."""

import ipaddress
import math
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as short
from typing import Any

_DEFAULT_PORT = 50000
_LOOKUP_AGE_S = 5.0
_LABEL = r"[^\s/:@?#,\[\].]{1,63}"
_ADDRESS = re.compile(rf"(?:\[([^\]]+)\]|({_LABEL}(?:\.{_LABEL})*\.?)):([0-9]{{1,5}})")

Pair = tuple[str, int]
"""Host and port."""


def parse(ip: Any, port: Any, listed: Any, default: str) -> list[str]:
    """The addresses that a client was given; TypeError or ValueError says what to write instead."""
    if ip is not None or port is not None:
        if listed is not None:
            raise ValueError("give either addresses, or ip and port")
        listed = [_joined(ip, port)]
    given = default if listed is None else listed
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"addresses is a list of texts such as 'localhost:50000', not {short(given)}")
    every = given.split(",") if isinstance(given, str) else list(given)
    if not every:
        raise ValueError("addresses is empty; give at least one host:port")
    return [_address(one) for one in every]


def _joined(ip: Any, port: Any) -> str:
    """The address of a host and a port; without a port, ``ip`` may be a whole address."""
    if not isinstance(ip, (str, type(None))):
        raise TypeError(f"ip is a text such as 'localhost', not {short(ip)}; a port is given as port=50000")
    if isinstance(port, bool) or not isinstance(port, (Integral, str, type(None))):
        raise TypeError(f"port is a whole number, not {short(port)}")
    host = (ip or "localhost").strip()
    if is_ip(host) and ":" in host:
        host = f"[{host}]"
    if port is not None and (_ADDRESS.fullmatch(host) or host.startswith(("unix:", "dns://"))):
        if host.endswith(f":{port}"):
            return host
        raise ValueError(f"{host!r} is a whole address; leave out port={port}, or give the host alone")
    if port is None:
        return host if ":" in host and not host.endswith("]") else f"{host}:{_DEFAULT_PORT}"
    return f"{host}:{port}"


def _address(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"an address is a text such as 'localhost:50000', not {short(given)}")
    address = given.strip()
    if not address.startswith(("unix:", "dns://")):
        host_and_port(address)
    return address


def host_and_port(address: str) -> Pair:
    """The parts of "host:port" or "[::1]:port"; ValueError if it is neither."""
    found = _ADDRESS.fullmatch(address)
    v6, name, port = found.groups() if found else ("", "", "0")
    if not (name or is_ip(v6)) or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r} must be host:port, as in localhost:50000 or [::1]:50000")
    return name or v6, int(port)


def is_ip(host: str) -> bool:
    """True for an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Target:
    """gRPC's target for a client's addresses.

    gRPC looks up a single name itself, again and again. It takes no list of names, so those of a list are looked up
    here: again while calls are made. If that fails, the last answer stays.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        """ValueError if an address is malformed."""
        self._addresses = addresses
        self._found = _fixed_target(addresses)
        self._look_up_after = math.inf if self._found else 0.0

    def current(self) -> str:
        """The target with the addresses found last. Raises OSError if no name was ever found."""
        if not self._found:
            self._look_up()
        elif time.monotonic() > self._look_up_after:
            self._look_up_after = time.monotonic() + _LOOKUP_AGE_S
            threading.Thread(target=self._look_up, name="lookup", daemon=True).start()
        return self._found

    def _look_up(self) -> None:
        found, problem = [], None
        for address in self._addresses:
            try:
                found += _resolve(*host_and_port(address))
            except OSError as error:
                problem = OSError(f"{address} cannot be looked up: {error.strerror or error}")
        if problem and not (found or self._found):
            raise problem
        if not (problem and self._found):
            self._found = "{}:{}".format(*_family(found))
        self._look_up_after = time.monotonic() + _LOOKUP_AGE_S


def replicas(addresses: Sequence[str]) -> list[tuple[str, str]]:
    """(address, host name) of every server: a name that stands for several hosts is replaced by each of their IPs."""
    every: list[tuple[str, str]] = []
    for address in addresses:
        if "://" in address or address.startswith("unix:"):
            every.append((address, ""))
            continue
        host, port = host_and_port(address)
        try:
            found = _family(_resolve(host, port))[1].split(",")
        except OSError:
            found = []
        every += [(one, host) for one in found] if len(found) > 1 else [(address, host)]
    return every


def _fixed_target(addresses: Sequence[str]) -> str:
    """The target of addresses that gRPC can look up itself; "" if it cannot."""
    if all(address.startswith("unix:") for address in addresses):
        return "unix:" + ",".join(address.removeprefix("unix:") for address in addresses)
    if len(addresses) == 1 and addresses[0].startswith("dns://"):
        return addresses[0]
    pairs = [host_and_port(address) for address in addresses]
    if all(is_ip(host) for host, _ in pairs):
        return "{}:{}".format(*_family(pairs))
    return f"dns:///{pairs[0][0]}:{pairs[0][1]}" if len(pairs) == 1 else ""


def _family(pairs: Iterable[Pair]) -> tuple[str, str]:
    """("ipv4" or "ipv6", the addresses with commas). gRPC accepts no mix; if there are both, IPv4 is used."""
    pairs = list(dict.fromkeys(pairs))
    v6 = [f"[{host}]:{port}" for host, port in pairs if ":" in host]
    v4 = [f"{host}:{port}" for host, port in pairs if ":" not in host]
    return ("ipv4", ",".join(v4)) if v4 else ("ipv6", ",".join(v6))


def _resolve(host: str, port: int) -> list[Pair]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({(str(address[0]), port) for *_, address in found})
