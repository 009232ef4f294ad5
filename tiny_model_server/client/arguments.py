"""Checks what an application gives the client, so that a mistake is reported before anything is sent."""

import logging
import math
import os
import re
from collections.abc import AsyncIterable, Mapping
from contextlib import suppress
from numbers import Real
from reprlib import repr as short
from typing import Any

import numpy as np

from tiny_model_server import conversions, local_transport, tracing
from tiny_model_server.client import addresses, channel

log = logging.getLogger("tiny_model_server.client")

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_CONNECT_TIMEOUT_S = 30.0
_VARIABLES = {"ca": "TMS_TLS_CA", "cert": "TMS_CLIENT_CERT", "key": "TMS_CLIENT_KEY", "token": "TMS_TOKEN"}
_LONGEST_S = 2e6  # 23 days; poll counts milliseconds in 31 bits
_URL = re.compile(r"(https?|ftp|s3|gs|file|data):", re.IGNORECASE)
_ONE = (str, bytes, bytearray, os.PathLike, Mapping)
"""What can be iterated over, but is one item."""


def text(value: Any) -> str:
    """A text that can be sent; TypeError or ValueError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"a text is a str, not {short(value)}; an image is sent by run_image, any other value by run")
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
            f"an image is an array HxW or HxWxC, the path of an image file or the bytes of one, not {short(value)}"
        )
    if isinstance(value, str) and (not value or _URL.match(value)):
        raise ValueError(
            f"{value[:80]!r} is not the path of an image file; an image of the web is sent as bytes: "
            "urllib.request.urlopen(url).read()"
        )
    return value


def batch(items: Any, call: str, one: str) -> list[Any]:
    """The items of a batch; TypeError for one item, or for what has no order."""
    with suppress(TypeError):
        if not (isinstance(items, (*_ONE, set, frozenset)) or conversions.is_table(items)):
            return list(items)
    raise TypeError(f"{call} takes a list, not {short(items)}; for {one}")


def images(items: Any) -> list[Any]:
    """The images of a batch; an array of four dimensions is a batch, and one of three if it cannot be an image."""
    shape = items.shape if isinstance(items, np.ndarray) or conversions.is_a(items, conversions.TENSOR) else None
    if shape is not None and (len(shape) < 3 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise TypeError(
            f"run_image_batch takes a list of images, not an array of shape {(*shape,)}; for one image there is "
            "run_image, for several gray ones list(array)"
        )
    return batch(items, "run_image_batch", "one image there is run_image")


def stream(items: Any) -> Any:
    """What ``map`` may take items from, one after the other; TypeError for one item."""
    if isinstance(items, _ONE) or conversions.is_table(items):
        raise TypeError(f"map takes a list or another iterable of items, not {short(items)}")
    return items


def progress(items: Any, name: str) -> Any:
    """The same items, with a bar on stderr that counts them; ImportError if tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'tiny-model-server[progress]'", name="tqdm") from error
    return tqdm(aiter(items) if isinstance(items, AsyncIterable) else items, desc=name, unit="item")


def seconds(timeout: Any, default: float | None = None, name: str = "timeout") -> Any:
    """A time limit, or the default for None; TypeError for what is not a number, ValueError for no positive one."""
    if timeout is None:
        return default
    if isinstance(timeout, (bool, np.bool_)) or not isinstance(timeout, Real):
        raise TypeError(f"{name} is seconds, a number, not {short(timeout)}")
    if math.isnan(timeout) or timeout <= 0:
        raise ValueError(f"{name} is seconds, more than 0, not {timeout}")
    return min(float(timeout), _LONGEST_S)


def count(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``; TypeError or ValueError names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a whole number, not {short(value)}")
    if not least <= value < 1 << 31:
        raise ValueError(f"{name} is at least {least}, not {value}")
    return int(value)


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """A client's options, checked; what the application does not say comes from the environment or is the default."""
    found = {name: given[name] for name in ("balancing", "server_name", "admin_token")}
    for name, variable in _VARIABLES.items():
        found[name] = os.environ.get(variable, "") if given[name] is None else given[name]
    for name in ("balancing", "server_name", "token", "admin_token"):
        _printable(name, found[name])
    found |= {name: str(found[name]) for name in ("ca", "cert", "key")}
    if given["tls"] not in (None, True, False):
        raise TypeError(f"tls is True or False, not {given['tls']!r}")
    found["tls"] = given["tls"] if given["tls"] is not None else bool(found["ca"]) or _switch("TMS_TLS", "0")
    if found["balancing"] not in channel.POLICIES:
        raise ValueError(f"balancing is one of {', '.join(channel.POLICIES)}, not {found['balancing']!r}")
    default = os.environ.get("TMS_ADDRESS") or "localhost:50000"
    found["addresses"] = addresses.parse(given["ip"], given["port"], given["addresses"], default)
    found["timeout"] = seconds(given["timeout"], DEFAULT_TIMEOUT_S)
    found["connect_timeout"] = seconds(given["connect_timeout"], DEFAULT_CONNECT_TIMEOUT_S, "connect_timeout")
    return found


def local_ports(options: Mapping[str, Any]) -> list[int]:
    """The port of the only server, if it is on this host and the local transport may be used; else none."""
    switch = "TMS_LOCAL_TRANSPORT"
    if os.environ.get("TMS_LANE") and not os.environ.get(switch):
        log.warning("TMS_LANE is now called TMS_LOCAL_TRANSPORT; the old name works for one version")
        switch = "TMS_LANE"
    usable = local_transport.available() and not options["tls"] and not tracing.provider()
    host, _, port = options["addresses"][0].rpartition(":")
    alone = len(options["addresses"]) == 1 and host in local_transport.LOOPBACK and port.isdigit()
    return [int(port)] if usable and alone and _switch(switch, "1") else []


def _switch(name: str, default: str) -> bool:
    return (os.environ.get(name) or default).lower() in ("1", "true", "yes", "on")


def _printable(name: str, value: Any) -> None:
    """Checks a text that gRPC gets as it is: a ``server_name`` of another type crashes the process.

    TypeError or ValueError names the option, but not its value, which may be a token.
    """
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"{name} is a text, not a {type(value).__name__}")
    if value and not (value.isascii() and value.isprintable()):
        raise ValueError(f"{name} may have printable ASCII characters alone, as gRPC sends no others")
