"""What a plain POST brings, as a form or as a body of one kind, and how the page is shown the answer."""

import base64
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tiny_model_server import codec, image_files
from tiny_model_server.codec import Buffer, EncodedImage
from tiny_model_server.errors import InvalidInput

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what callers send wrong is their answer, no log line

_MOST_FIELDS = 16
_LONGEST_KIND = 1000  # characters of a Content-Type
_AT_ONCE = 1 << 20  # bytes of which escapes are read at the same time
_HEX = np.full(256, 16, np.uint8)  # the values of hexadecimal digits by their characters
for _value, _digit in enumerate(b"0123456789abcdef"):
    _HEX[_digit] = _HEX[ord(chr(_digit).upper())] = _value
_LONGEST_LIST = 32  # items of an array that the page shows as they are


def read_input(kind: str, body: bytearray) -> tuple[Any, dict[str, Any]]:
    """(data, args) of a form with image=@file, text= or data= (JSON), and args= (JSON); or of a body of one kind."""
    media, options = parse_options_header(kind[:_LONGEST_KIND])
    fields: dict[str, Buffer] = {}
    if media == b"multipart/form-data":
        fields = _Multipart(body, options.get(b"boundary", b"")).fields
    elif media == b"application/x-www-form-urlencoded":
        fields = _url_encoded(bytes(body))
    elif media.startswith(b"image/"):
        fields = {"image": body}
    elif media in (b"application/json", b"text/plain"):
        fields = {"data" if media == b"application/json" else "text": body}
    args = codec.parse_args(_text(fields.pop("args", b"")))
    parsers: dict[str, Callable[[Buffer], Any]] = {"image": EncodedImage, "text": _text, "data": _json}
    field, content = fields.popitem() if len(fields) == 1 else ("", b"")
    if parse := parsers.get(field):
        return parse(content), args
    raise InvalidInput(
        "send one of image (a file), text or data (JSON), and args (a JSON object) if you like, as a form; "
        "or a body of type image/*, text/plain or application/json"
    )


class _Multipart:
    """The fields of a body multipart/form-data by name; their contents are parts of its memory."""

    def __init__(self, body: bytearray, boundary: bytes) -> None:
        """Reads the body in linear time; InvalidInput if it is malformed or has too many fields."""
        self.fields: dict[str, Buffer] = {}
        self._body = memoryview(body)
        self._headers: dict[bytes, bytes] = {}
        self._header, self._ended = b"", False
        self._content: list[memoryview] = []
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._take_name,
            "on_header_value": self._take_value,
            "on_part_data": self._take_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            parser = MultipartParser(boundary, callbacks)
            parser.write(body)  # type: ignore[arg-type]  # all at once, so that each callback has the whole of a thing
        except FormParserError as error:
            raise InvalidInput(f"malformed multipart body: {error}") from None
        if not self._ended and (self.fields or self._content):
            raise InvalidInput("the multipart body ends before its last boundary")

    def _begin(self) -> None:
        self._headers, self._content = {}, []

    def _take_name(self, data: Any, start: int, end: int) -> None:
        self._header = bytes(self._body[start:end]).lower()

    def _take_value(self, data: Any, start: int, end: int) -> None:
        self._headers[self._header] = bytes(self._body[start:end])

    def _take_content(self, data: Any, start: int, end: int) -> None:
        self._content.append(self._body[start:end])

    def _end_part(self) -> None:
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").lower()
        if encoding not in (b"7bit", b"8bit", b"binary"):
            raise InvalidInput(f"Content-Transfer-Encoding {encoding.decode('latin-1')!r} is not taken; send binary")
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        _add(self.fields, name, self._content[0] if len(self._content) == 1 else b"".join(self._content))

    def _end(self) -> None:
        self._ended = True


def _url_encoded(body: bytes) -> dict[str, Buffer]:
    fields: dict[str, Buffer] = {}
    if body.count(b"&") >= _MOST_FIELDS:
        raise InvalidInput(f"a form may have {_MOST_FIELDS} fields at most")
    for pair in filter(None, body.split(b"&")):
        name, _, value = pair.partition(b"=")
        _add(fields, _text(_unquoted(name)), _unquoted(value))
    return fields


def _unquoted(data: bytes) -> bytes:
    """Bytes for their escapes, a part at a time. The standard library makes an object of each escape."""
    parts, at = [], 0
    while at < len(data):
        part = data[at : at + _AT_ONCE]
        cut = part.rfind(b"%", -2)  # an escape that goes on in the next part
        if cut > 0 and at + len(part) < len(data):
            part = part[:cut]
        at += len(part)
        parts.append(_unquoted_part(part.replace(b"+", b" ")))
    return b"".join(parts)


def _unquoted_part(part: bytes) -> bytes:
    found = np.frombuffer(part, np.uint8)
    begins = np.flatnonzero(found[:-2] == ord("%")) if len(part) > 2 else np.empty(0, np.intp)
    high, low = _HEX[found[begins + 1]], _HEX[found[begins + 2]]
    right = (high < 16) & (low < 16)
    begins, values = begins[right], (high << 4 | low)[right]
    kept, made = np.ones(len(found), bool), found.copy()
    made[begins] = values
    kept[begins + 1] = kept[begins + 2] = False
    return made[kept].tobytes()


def _add(fields: dict[str, Buffer], name: str, content: Buffer) -> None:
    if name in fields:
        raise InvalidInput(f"there are two fields {name[:40]!r}; send one input a request")
    if len(fields) == _MOST_FIELDS:
        raise InvalidInput(f"a form may have {_MOST_FIELDS} fields at most")
    fields[name] = content


def _text(data: Buffer) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("text must be UTF-8") from None


def _json(data: Buffer) -> Any:
    return codec.parse_json(_text(data))


def view(value: Any) -> Any:
    """An answer as the page shows it: small arrays as lists, others by their facts, a picture if they may be one."""
    if isinstance(value, dict):
        return {key: view(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [view(item) for item in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if not isinstance(value, np.ndarray) or value.size <= _LONGEST_LIST:
        return json.loads(codec.json_only(value))
    facts: dict[str, Any] = {"array": f"{codec.dtype_name(value.dtype)} {'x'.join(map(str, value.shape))}"}
    if value.dtype.kind in "biuf":
        with np.errstate(all="ignore"):
            facts |= {"min": float(np.nanmin(value)), "max": float(np.nanmax(value)), "mean": float(np.nanmean(value))}
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3)):
            facts["png"] = "data:image/png;base64," + base64.b64encode(image_files.image_file(value)).decode()
    return facts
