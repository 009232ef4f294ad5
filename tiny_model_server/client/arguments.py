"""What an application gives the client: checked at once, so that a mistake is told before anything is sent."""

import ipaddress
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from tiny_model_server.client.channel import host_and_port

_DEFAULT_PORT = 50000
_LONGEST_S = 2e6  # 23 days; poll counts milliseconds in 31 bits
_LONGEST_LABEL = 63  # of a host's name
_HOST = re.compile(r"[^\s/:@?#,\[\]]+")
_URL = re.compile(r"(https?|ftp|s3|gs|file|data):", re.IGNORECASE)


def text(value: Any) -> str:
    """A text that can be sent; TypeError or ValueError for what is none."""
    if not isinstance(value, str):
        raise TypeError(f"a text is a str, not {_named(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair at {error.start}, which UTF-8 cannot hold; "
            "send text.encode('utf-8', 'replace').decode()"
        ) from None
    return str.__str__(value)


def image(value: Any) -> Any:
    """What may be an image: an array, a path or a file's bytes; TypeError or ValueError for what cannot be one."""
    if value is None or isinstance(value, (bool, int, float, complex, Mapping, set)):
        raise TypeError(
            f"an image is an array HxW or HxWxC, the path of an image file or the bytes of one, not {_named(value)}"
        )
    if isinstance(value, str) and (not value or _URL.match(value)):
        raise ValueError(
            f"{value[:80]!r} is not the path of an image file; an image of the web is sent as bytes: "
            "urllib.request.urlopen(url).read()"
        )
    return value


def batch(items: Any, call: str, one: str) -> list[Any]:
    """The items of a batch; TypeError for what is one item, or has no order."""
    if isinstance(items, (str, bytes, bytearray, os.PathLike, Mapping, set, frozenset)) or not _can_iterate(items):
        raise TypeError(f"{call} takes a list, not {_named(items)}; for {one}")
    return list(items)


def images(items: Any) -> list[Any]:
    """The images of a batch; an array of four dimensions is a batch, and one of three if it cannot be an image."""
    if isinstance(items, np.ndarray) and (items.ndim < 3 or (items.ndim == 3 and items.shape[2] in (1, 3, 4))):
        raise TypeError(
            f"run_image_batch takes a list of images, not an array of shape {items.shape}; for one image there is "
            "run_image, for several gray ones list(array)"
        )
    return batch(items, "run_image_batch", "one image there is run_image")


def stream(items: Any) -> Any:
    """What ``map`` may take items from, one after the other."""
    if isinstance(items, (str, bytes, bytearray, os.PathLike, Mapping)):
        raise TypeError(f"map takes a list or another iterable of items, not {_named(items)}")
    return items


def seconds(timeout: Any, name: str = "timeout") -> Any:
    """A time limit, or None; TypeError for what is no number, ValueError for what is no time."""
    if timeout is None:
        return None
    if isinstance(timeout, (bool, np.bool_)) or not isinstance(timeout, Real):
        raise TypeError(f"{name} is seconds, a number, not {_named(timeout)}")
    if math.isnan(timeout) or timeout <= 0:
        raise ValueError(f"{name} is seconds, more than 0, not {timeout}")
    return min(float(timeout), _LONGEST_S)


def count(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``; TypeError or ValueError names what is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a whole number, not {_named(value)}")
    if not least <= value < 1 << 31:
        raise ValueError(f"{name} is at least {least}, not {value}")
    return int(value)


def plain_texts(options: Mapping[str, Any]) -> None:
    """Checks texts that gRPC gets as they are: a ``server_name`` of another type crashes the process.

    TypeError or ValueError names the option, but not its value, which may be a token.
    """
    for name, value in options.items():
        if not isinstance(value, (str, type(None))):
            raise TypeError(f"{name} is a text, not a {type(value).__name__}")
        if value and not (value.isascii() and value.isprintable()):
            raise ValueError(f"{name} may have printable ASCII characters alone, as gRPC sends no others")


def addresses(ip: Any, port: Any, listed: Sequence[str] | str | None, default: str) -> list[str]:
    """The addresses of the servers; TypeError or ValueError says what to write instead."""
    if listed is not None and (ip is not None or port is not None):
        raise ValueError("give either addresses, or ip and port")
    if ip is not None or port is not None:
        return [_only(ip, port)]
    given = default if listed is None else listed
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"addresses is a list of texts such as 'localhost:50000', not {_named(given)}")
    every = given.split(",") if isinstance(given, str) else list(given)
    if not every:
        raise ValueError("addresses is empty; give at least one host:port")
    return [_address(one) for one in every]


def _only(ip: Any, port: Any) -> str:
    if not isinstance(ip, (str, type(None))):
        raise TypeError(f"ip is a text such as 'localhost', not {_named(ip)}; a port is given as port=50000")
    host = (ip or "localhost").strip()
    if port is None and host.startswith("unix:"):
        return host
    bare = host.removeprefix("[").removesuffix("]")
    if "://" in host or (":" in host and not _is_ip(bare)):
        if port is not None and "://" not in host:
            raise ValueError(f"ip={ip!r} has a port already; give it as ip, or as port={port}, or both in addresses")
        return _address(host)
    return _address(f"[{bare}]:{_port(port)}" if ":" in bare else f"{bare}:{_port(port)}")


def _port(port: Any) -> int:
    if port is None:
        return _DEFAULT_PORT
    if isinstance(port, str) and port.isascii() and port.isdigit():
        port = int(port)
    if isinstance(port, bool) or not isinstance(port, (int, np.integer)):
        raise TypeError(f"port is a whole number, not {_named(port)}")
    if not 0 < port < 65536:
        raise ValueError(f"port is from 1 to 65535, not {port}")
    return int(port)


def _address(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"an address is a text such as 'localhost:50000', not {_named(given)}")
    address = given.strip()
    if address.startswith(("unix:", "dns://")):
        return address
    scheme, is_url, rest = address.partition("://")
    if is_url:
        host = rest.partition("/")[0] or "localhost"
        right = host if re.search(r":\d+$", host) else f"{host}:{_DEFAULT_PORT}"
        raise ValueError(f"address {given!r} is a URL of {scheme}; write host:port, as in {right}")
    host, _ = host_and_port(address)
    labels = host.removesuffix(".").split(".")
    named = _HOST.fullmatch(host) and all(0 < len(label) <= _LONGEST_LABEL for label in labels)
    if not (named or _is_ip(host)):
        raise ValueError(f"address {given!r} has no host's name; write host:port, as in localhost:{_DEFAULT_PORT}")
    return address


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _can_iterate(items: Any) -> bool:
    try:
        iter(items)
    except TypeError:
        return False
    return True


def _named(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"{type(value).__name__} {value[:40]!r}" if isinstance(value, (str, bytes)) else f"a {type(value).__name__}"
