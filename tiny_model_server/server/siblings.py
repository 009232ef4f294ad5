"""The other replicas of TMS_REPLICAS: asks them for health and metrics, at their HTTP ports."""

import asyncio
import re
import socket
from collections.abc import Mapping
from contextlib import closing

from tiny_model_server.server import tls
from tiny_model_server.settings import Settings

_PATIENCE_S = 1.0
_MOST_BYTES = 1 << 26
_LENGTH = re.compile(rb"content-length: *(\d{1,9})\r\n", re.IGNORECASE)
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1" if socket.has_dualstack_ipv6() else "127.0.0.1"}


def own_host(settings: Settings) -> str:
    """Where a process on this host reaches the server: TMS_HOST, or loopback if that stands for all addresses."""
    return _ANY_HOST.get(settings.host, settings.host)


def authority(host: str, port: int) -> str:
    """The two as one text, in which an address of IPv6 has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Siblings:
    """The replicas beside this one; none without TMS_REPLICAS."""

    def __init__(self, settings: Settings) -> None:
        self.own = settings.replica
        numbers = range(1, settings.sharing + 1) if settings.replica else ()
        first = (settings.http_port or 0) - settings.replica
        self._ports = {number: first + number for number in numbers if number != self.own}
        self._host, self._settings = own_host(settings), settings

    def __bool__(self) -> bool:
        """True if there are any."""
        return bool(self._ports)

    async def ask(self, path: str) -> dict[int, bytes | None]:
        """What each, by its number, answers for itself to GET ``path``; None if it does not, or not with 200."""
        bodies = await asyncio.gather(*(self._get(port, path) for port in self._ports.values()))
        return dict(zip(self._ports, bodies, strict=True))

    async def _get(self, port: int, path: str) -> bytes | None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                context = tls.own_context(self._settings)
                reader, writer = await asyncio.open_connection(self._host, port, ssl=context)
                with closing(writer):
                    writer.write(f"GET {path}?own HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = _LENGTH.search(head)
                    if head.split()[1] != b"200" or not length or int(length[1]) > _MOST_BYTES:
                        return None
                    return await reader.readexactly(int(length[1]))
        except (OSError, EOFError, asyncio.LimitOverrunError):  # it is being replaced, or too busy
            return None


def labelled(texts: Mapping[int, bytes | None]) -> bytes:
    """One text in Prometheus' format of those of several replicas: each series gets the label ``replica``."""
    families: dict[str, list[str]] = {}  # by the line with which they begin; a family's series stand together
    for number, text in sorted(texts.items()):
        lines: list[str] = []
        for line in (text or b"").decode(errors="replace").splitlines():
            if line.startswith("# HELP"):
                lines = families.setdefault(line, [])
            elif not line.startswith("#"):
                lines.append(line.replace("{", f'{{replica="{number}",', 1))  # each series has labels
            elif line not in lines:
                lines.append(line)
    return "".join(f"{line}\n" for first, lines in families.items() for line in (first, *lines)).encode()
