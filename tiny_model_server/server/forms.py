"""Reads the input of an HTTP call from a form or another body."""

import mimetypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email import message_from_string
from email.message import Message
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from tiny_model_server import codec, json_arrays
from tiny_model_server.codec import Buffer, EncodedImage
from tiny_model_server.errors import InvalidInput
from tiny_model_server.server import npy

_MAX_HEADER_BYTES = 4096  # bytes of a part's headers, and of a Content-Type
_MAX_URL_ENCODED = 1 << 18  # decoding one takes many times its memory
_MAX_FIELDS = 256
_KINDS = {"image": "image/*", "text": "text/plain", "data": "application/json", "args": "application/json"}
"""What the fields of these names hold, whatever type is given for them; numpy's files may stand in their place."""
_NUMPY = ("application/x-npy", "application/x-npz", "application/zip")
_CHARSETS = ("utf-8", "us-ascii", "iso-8859-1", "latin-1", "utf-16")  # Python has others that are slow, or no charsets
_ENDINGS = {".npy": "application/x-npy", ".npz": "application/x-npz"}
_BYTES = "application/octet-stream"
_EXPECTED = (
    "send one of image (a file), text or data (JSON), and args (a JSON object) if needed, as a form; several inputs as "
    "a form, whose fields the model gets by name; or a body of type image/*, text/*, application/json, "
    f"{', '.join(_NUMPY)} or {_BYTES}"
)
_CURL = "curl -d and --data-binary send a form unless -H 'Content-Type: ...' says what the body is"


class _Part(NamedTuple):
    """A field of a form, or a whole body."""

    kind: str
    charset: str
    content: Buffer


def read_input(
    content_type: str, body: bytearray, query: str = "", take: Callable[[int], None] = lambda size: None
) -> tuple[Any, dict[str, Any]]:
    """(data, args) of a body of one type, or of a form. InvalidInput says what is wrong with it.

    The model gets a form's only field of image, text or data as it is, other fields as a dict by their names. ``query``
    is the JSON of args that the URL has. ``take(size)`` is called before a file in the body is expanded to so many
    bytes.
    """
    kind, charset, boundary = _parsed(content_type[:_MAX_HEADER_BYTES])
    if kind == "multipart/form-data":
        fields = _fields(_multipart(body, boundary))
    elif kind == "application/x-www-form-urlencoded":
        fields = _fields(_url_encoded(body))
    else:
        return _value(_Part(kind, charset, body), take), codec.parse_args(query)
    args = _text(fields.pop("args", _Part("", "utf-8", b"")))
    if args and query:
        raise InvalidInput("there are args in the URL and in the form; send them once")
    if not fields:
        raise InvalidInput(_EXPECTED)
    values = {name: _value(part, take) for name, part in fields.items()}
    only = next(iter(values)) if len(values) == 1 else ""
    return values[only] if only in _KINDS else values, codec.parse_args(args or query)


def _fields(parts: Iterable[tuple[str, _Part]]) -> dict[str, _Part]:
    fields: dict[str, _Part] = {}
    for name, part in parts:
        if name in fields:
            raise InvalidInput(f"there are two fields {name[:40]!r}; send one input a request")
        if len(fields) == _MAX_FIELDS:
            raise InvalidInput(f"a form has at most {_MAX_FIELDS} fields; {_EXPECTED}")
        fields[name] = part if part.kind in _NUMPY else part._replace(kind=_KINDS.get(name, part.kind))
    return fields


def _value(part: _Part, take: Callable[[int], None]) -> Any:
    match part.kind.split("/"):
        case ["application", "x-npy"]:
            return npy.read_npy(part.content)
        case ["application", "x-npz" | "zip"]:
            return npy.read_npz(part.content, take)
        case ["application", "json"]:
            return json_arrays.parse(_text(part))
        case ["application", "octet-stream"]:
            return bytes(part.content)
        case ["image", _]:
            return EncodedImage(part.content)
        case ["text", _]:
            return _text(part)
    raise InvalidInput(f"{part.kind[:80]!r} is no type of an input; {_EXPECTED}")


@lru_cache(64)
def _parsed(content_type: str) -> tuple[str, str, bytes]:
    """(type, charset, boundary) of a Content-Type."""
    header = Message()
    header["Content-Type"] = content_type
    with _malformed("Content-Type"):
        return header.get_content_type(), header.get_content_charset("utf-8"), header.get_boundary("").encode()


@contextmanager
def _malformed(what: str) -> Iterator[None]:
    """InvalidInput for headers with a parameter that says, as ``name*=charset''text``, what cannot be decoded."""
    try:
        yield
    except ValueError as error:
        raise InvalidInput(f"malformed {what}: {error}; send it in UTF-8, without a charset in it") from None


def _multipart(body: bytearray, boundary: bytes) -> Iterator[tuple[str, _Part]]:
    """The fields of a multipart body; their contents are views of it."""
    delimiter, content = b"\r\n--" + boundary, memoryview(body)
    at = body.find(delimiter[2:]) + len(delimiter) - 2
    while body[at : at + 2] != b"--":  # that ends the last delimiter
        begin = body.find(b"\r\n\r\n", at, at + _MAX_HEADER_BYTES) + 4
        end = body.find(delimiter, begin)
        if begin < 4 or end < 0:
            raise InvalidInput("malformed form: a part's headers are too long, or it ends before its last boundary")
        headers = message_from_string(_text(_Part("", "utf-8", body[at + 2 : begin])))
        with _malformed("form: a part's headers"):
            name = headers.get_param("name", header="content-disposition")
            part = _Part(_kind(headers), headers.get_content_charset("utf-8"), content[begin:end])
        if headers.get("content-transfer-encoding", "binary").lower() not in ("7bit", "8bit", "binary"):
            raise InvalidInput("a form's files must be sent as they are, without base64 or quoted-printable")
        if not isinstance(name, str) or not name:
            raise InvalidInput("malformed form: a part has no name")
        yield name, part
        at = end + len(delimiter)


def _kind(headers: Message) -> str:
    """The type of a form's part. A file whose type is not given, or is none of an input, has that of its name's end."""
    file, kind = headers.get_filename(), headers.get_content_type() if "content-type" in headers else ""
    if file is None or _is_known(kind):
        return kind or "text/plain"
    kind = _ENDINGS.get(file[-4:].lower()) or mimetypes.guess_type(file)[0] or ""
    return kind if _is_known(kind) else _BYTES


def _is_known(kind: str) -> bool:
    return kind in (*_NUMPY, "application/json") or kind.startswith(("image/", "text/"))


def _url_encoded(body: bytearray) -> Iterable[tuple[str, _Part]]:
    if len(body) > _MAX_URL_ENCODED:
        raise InvalidInput(f"send more than {_MAX_URL_ENCODED} bytes as multipart/form-data; {_CURL}")
    try:
        pairs = parse_qsl(str(body, "utf-8"), keep_blank_values=True, errors="strict", max_num_fields=len(_KINDS))
    except ValueError as error:  # too many fields, or not UTF-8
        raise InvalidInput(f"malformed form: {error}; {_CURL}") from None
    if not {name for name, _ in pairs} <= _KINDS.keys():
        raise InvalidInput(f"{_EXPECTED}; {_CURL}")
    return [(name, _Part("", "utf-8", value.encode())) for name, value in pairs]


def _text(part: _Part) -> str:
    if part.charset not in _CHARSETS:
        raise InvalidInput(f"the charset {part.charset[:40]!r} is not known; send UTF-8")
    try:
        return str(part.content, part.charset)
    except UnicodeDecodeError:
        raise InvalidInput(f"text must be {part.charset.upper()}") from None
