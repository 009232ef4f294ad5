"""What a server that was started with TMS_REPLICAS reports of its replicas: their ports, with each health check."""

import re
from typing import Any, NamedTuple

from tiny_model_server.client import addresses

_MOST = 256
_PORT = re.compile(r"[0-9]{1,5}")


class Replica(NamedTuple):
    """A replica, by the name that it gives itself."""

    host: str
    port: int
    """Its own port, which may be mapped to another one on the way to the client."""
    first: int
    last: int
    """The ports of the first and the last replica, itself included."""


def replica(trailing: Any) -> Replica | None:
    """The replica that has answered a health check with this metadata; None if it is alone."""
    found = {key: value for key, value in trailing or ()}  # noqa: C416 - dict() of old grpcio's metadata fails
    host, _, port = str(found.get("tms-replica", "")).rpartition(":")
    first, _, last = str(found.get("tms-ports", "")).partition("-")
    if not all(_PORT.fullmatch(text) for text in (port, first, last)):
        return None
    one = Replica(host, int(port), int(first), int(last))
    return one if one.first <= one.port <= one.last < one.first + _MOST else None


def siblings(address: str, one: Replica) -> dict[str, Replica]:
    """Where the others are, if ``one`` answers at ``address``, and who must answer there."""
    host, port = addresses.host_and_port(address)
    host = f"[{host}]" if ":" in host else host
    others = {at - one.port + port: one._replace(port=at) for at in range(one.first, one.last + 1) if at != one.port}
    return {f"{host}:{at}": other for at, other in others.items() if 0 < at < 65536}
