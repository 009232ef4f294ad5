"""Answers in the format that the caller accepts: JSON, an image file, numpy's files, text or bytes."""

import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tiny_model_server import codec, image_files
from tiny_model_server.server import events, npy

JSON = "application/json"
_Make = Callable[[], bytes | str]
_RANGE = re.compile(r"\s*([\w.+*-]+(?:/[\w.+*-]+)?)\s*((?:;[^,;]*)*)", re.ASCII)
_QUALITY = re.compile(r";\s*q\s*=\s*([^;\s]*)", re.I)
_ACCEPTS_GZIP = re.compile(r"(?:^|,)\s*gzip(?![^,;\s])(?!\s*;\s*q=0(?:\.0*)?(?![.\d]))", re.I)
_MAX_RANGES = 64
_MIN_COMPRESSED = 1 << 15  # bytes; compressing a smaller answer takes longer than sending it
_LEVEL = 1  # of gzip: levels above take several times the time, for little
_IMAGE_FILES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}  # how they begin


@lru_cache(64)
def accepted(header: str) -> Sequence[str]:
    """The formats that an Accept header asks for, the best first. HTTPException 400 or 406 if there is none.

    Of formats with one quality, that whose range the header names first is better, then that which stands first here.
    """
    ranges = _ranges(header.strip() or "*/*")
    found = []
    for kind in _FORMATS:
        names = (kind, kind.partition("/")[0] + "/*", "*/*")
        if (name := next((name for name in names if name in ranges), "")) and ranges[name] > 0:
            found.append((-ranges[name], list(ranges).index(name), kind))
    if not found:
        raise HTTPException(406, f"Accept names no format of answers; there are {', '.join(_FORMATS)}")
    return tuple(kind for _, _, kind in sorted(found, key=lambda one: one[:2]))


def answer(value: Any, formats: Sequence[str]) -> Response:
    """The response with a model's answer in the first format that it fits; HTTPException 406 if there is none."""
    for kind in formats:
        if make := _FORMATS[kind](value):
            try:
                return Response(make(), media_type=kind)
            except ValueError as error:
                raise HTTPException(406, f"the answer does not fit: {error}") from None
    fitting = ", ".join(kind for kind, fits in _FORMATS.items() if fits(value))
    raise HTTPException(406, f"the answer is of type {type(value).__name__}, which can be sent as {fitting}")


def json_response(value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON, also for what JSON alone lacks: arrays are lists in it."""
    return Response(codec.json_only(value) + "\n", code, headers, JSON)


def compressed(request: Request, response: Response) -> Response:
    """The response, compressed if it is large JSON and its caller accepts gzip."""
    large = len(response.body) >= _MIN_COMPRESSED and response.media_type == JSON
    if large and _ACCEPTS_GZIP.search(request.headers.get("accept-encoding", "")):
        response.body = gzip.compress(response.body, _LEVEL)
        response.headers.update({"Content-Encoding": "gzip", "Content-Length": str(len(response.body))})
        response.headers.add_vary_header("Accept-Encoding")
    return response


def _ranges(header: str) -> dict[str, float]:
    """The qualities of what an Accept header names, in its order. HTTPException 400 if it is malformed."""
    found = {}
    for part in header.split(",", _MAX_RANGES)[:_MAX_RANGES]:
        match = _RANGE.fullmatch(part)
        quality = _QUALITY.search(match[2]) if match else None
        if not match or (quality and not re.fullmatch(r"0(\.\d{0,3})?|1(\.0{0,3})?", quality[1], re.ASCII)):
            raise HTTPException(400, f"malformed Accept: {part[:80]!r}; send types with q from 0 to 1: image/png;q=0.5")
        found[match[1].lower()] = float(quality[1]) if quality else 1.0
    return found


def _image(kind: str, value: Any) -> _Make | None:
    """An image file of an image, of what a dict has as "image", or of the bytes of such a file."""
    image = value.get("image") if isinstance(value, dict) else value
    if isinstance(image, bytes) and image.startswith(_IMAGE_FILES[kind]):
        return lambda: image
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "biuf" or not image.size:
        return None
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    return partial(image_files.image_file, image, kind) if is_image else None


def _npz(value: Any) -> _Make | None:
    """A .npz of a dict of arrays; numbers and texts in it are arrays without dimensions."""
    if not isinstance(value, dict) or not all(
        isinstance(one, np.ndarray | int | float | str) for one in value.values()
    ):
        return None
    try:
        return partial(npy.npz_file, {name: codec.portable(np.asarray(one)) for name, one in value.items()})
    except TypeError:  # an int that numpy cannot hold
        return None


_FORMATS: dict[str, Callable[[Any], _Make | None]] = {
    JSON: lambda value: lambda: codec.json_only(value) + "\n",
    "image/png": partial(_image, "image/png"),
    "image/jpeg": partial(_image, "image/jpeg"),
    "application/x-npy": lambda value: partial(npy.npy_file, value) if isinstance(value, np.ndarray) else None,
    "application/x-npz": _npz,
    "application/zip": _npz,
    "text/plain": lambda value: (lambda: value) if isinstance(value, str) else None,
    "application/octet-stream": lambda value: (lambda: value) if isinstance(value, bytes) else None,
    events.MEDIA_TYPE: lambda value: None,  # it has to be asked for before the model runs
}
"""What makes the body of each format; None for a value that does not fit it."""
