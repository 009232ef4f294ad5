"""Reads the input of an HTTP call from a form or another body."""

from collections.abc import Iterable, Iterator
from email import message_from_bytes
from email.message import Message
from typing import Any
from urllib.parse import parse_qsl

from tiny_model_server import codec, json_arrays
from tiny_model_server.codec import Buffer, EncodedImage
from tiny_model_server.errors import InvalidInput

_MAX_HEADER_BYTES = 4096  # bytes of a part's headers, and of a Content-Type
_MAX_URL_ENCODED = 1 << 18  # decoding one takes many times its memory
_FIELDS = ("image", "text", "data", "args")
_EXPECTED = (
    "send one of image (a file), text or data (JSON), and args (a JSON object) if needed, as a form; "
    "or a body of type image/*, text/plain or application/json"
)


def read_input(content_type: str, body: bytearray) -> tuple[Any, dict[str, Any]]:
    """(data, args) of a form with image=@file, text= or data= (JSON), and args= (JSON); or of a body of one type."""
    fields: dict[str, Buffer] = {}
    for name, content in _fields(content_type, body):
        if name not in _FIELDS:
            raise InvalidInput(_EXPECTED)
        if name in fields:
            raise InvalidInput(f"there are two fields {name!r}; send one input a request")
        fields[name] = content
    args = codec.parse_args(_text(fields.pop("args", b"")))
    if len(fields) != 1:
        raise InvalidInput(_EXPECTED)
    name, content = fields.popitem()
    if name == "image":
        return EncodedImage(content), args
    return _text(content) if name == "text" else json_arrays.parse(_text(content)), args


def _fields(content_type: str, body: bytearray) -> Iterable[tuple[str, Buffer]]:
    """The names and contents of a form's fields; any other body is one field."""
    header = Message()
    header["Content-Type"] = content_type[:_MAX_HEADER_BYTES]
    media_type = header.get_content_type()
    if media_type == "multipart/form-data":
        return _multipart(body, header.get_boundary("").encode())
    if media_type == "application/x-www-form-urlencoded":
        return _url_encoded(body)
    return [("data" if media_type == "application/json" else header.get_content_maintype(), body)]


def _multipart(body: bytearray, boundary: bytes) -> Iterator[tuple[str, memoryview]]:
    """The fields of a multipart body; their contents are views of it."""
    delimiter, content = b"\r\n--" + boundary, memoryview(body)
    at = body.find(delimiter[2:]) + len(delimiter) - 2
    while body[at : at + 2] != b"--":  # that ends the last delimiter
        begin = body.find(b"\r\n\r\n", at, at + _MAX_HEADER_BYTES) + 4
        end = body.find(delimiter, begin)
        if begin < 4 or end < 0:
            raise InvalidInput("malformed form: a part's headers are too long, or it ends before its last boundary")
        headers = message_from_bytes(body[at + 2 : begin])
        if headers.get("content-transfer-encoding", "binary").lower() not in ("7bit", "8bit", "binary"):
            raise InvalidInput("a form's files must be sent as they are, without base64 or quoted-printable")
        yield str(headers.get_param("name", header="content-disposition")), content[begin:end]
        at = end + len(delimiter)


def _url_encoded(body: bytearray) -> Iterable[tuple[str, bytes]]:
    if len(body) > _MAX_URL_ENCODED:
        raise InvalidInput(f"send more than {_MAX_URL_ENCODED} bytes as multipart/form-data")
    try:
        pairs = parse_qsl(_text(body), keep_blank_values=True, errors="strict", max_num_fields=len(_FIELDS))
    except ValueError as error:  # too many fields, or not UTF-8
        raise InvalidInput(f"malformed form: {error}") from None
    return [(name, value.encode()) for name, value in pairs]


def _text(data: Buffer) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("text must be UTF-8") from None
