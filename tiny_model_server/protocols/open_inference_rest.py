"""Open Inference Protocol v2 by HTTP (/v2/...), with the extension by which tensors follow the JSON as bytes."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from starlette.responses import Response

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Array, Buffer
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import InvalidInput
from tiny_model_server.protocols import open_inference, tensors
from tiny_model_server.protocols.tensors import Tensor

LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes of a body are JSON; the tensors follow."""

_MODEL = "/v2/models/(?P<name>[^/]+)(?:/versions/[^/]+)?"
_ROUTES = {
    "ServerMetadata": "GET /v2",
    "ServerLive": "GET /v2/health/live",
    "ServerReady": "GET /v2/health/ready",
    "ModelMetadata": f"GET {_MODEL}",
    "ModelReady": f"GET {_MODEL}/ready",
    "ModelConfig": f"GET {_MODEL}/config",
    "ModelInfer": f"POST {_MODEL.replace('name', 'model_name')}/infer",
    "RepositoryIndex": "POST /v2/repository/index",
    "RepositoryModelLoad": "POST /v2/repository/models/(?P<model_name>[^/]+)/load",
    "RepositoryModelUnload": "POST /v2/repository/models/(?P<model_name>[^/]+)/unload",
}
_PARTS = {"RepositoryIndex": "models", "ModelConfig": "config"}  # the field of a response that is the whole JSON
_JSON_TYPES: dict[str, set[type]] = {"O": {str}, "b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
"""The types of elements in JSON, by the kind of numpy's dtype."""
_MAX_DIMENSIONS = 32


class Rest:
    """The HTTP form of the protocol."""

    def __init__(self, engine: Engine) -> None:
        self._servicer = open_inference.OpenInference(engine)
        self._methods = schemas.methods(open_inference.SCHEMA, open_inference.SERVICE)

    def find(self, command: str, path: str) -> tuple[str, dict[str, str]]:
        """(method of the gRPC form, its fields that the path names) of a request; "" if there is no such method."""
        for method, pattern in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{command} {path.rstrip('/')}"):
                return method, match.groupdict()
        return "", {}

    def answer(
        self, method: str, fields: dict[str, str], headers: Mapping[str, str], body: Buffer, call: Call
    ) -> Response:
        """Answers what ``find`` found; ServerError says what was wrong. ``headers`` have names in lower case."""
        if method == "ModelInfer":
            return self._infer(fields["model_name"], headers, body, call)
        request = self._methods[method].request(**fields)
        if method == "RepositoryIndex":
            request.ready = _get(_parsed(body or b"{}"), "ready", bool)
        found = getattr(self._servicer, method)(request, call)
        status = 503 if found.get("ready") is False else 200
        return _json(found[_PARTS[method]] if method in _PARTS else found, status)

    def _infer(self, name: str, headers: Mapping[str, str], body: Buffer, call: Call) -> Response:
        length = headers.get(LENGTH.lower(), str(len(body)))
        if not (length.isascii() and length.isdigit() and int(length) <= len(body)):
            raise InvalidInput(f"{LENGTH} is {length!r}; it must be the bytes of JSON in a body of {len(body)}")
        header, binary = _parsed(memoryview(body)[: int(length)]), memoryview(body)[int(length) :]
        args = _get(header, "parameters", dict)
        all_binary = args.pop("binary_data_output", False)
        as_binary = {
            _get(output, "name", str): _get(output, "parameters", dict).get("binary_data", False)
            for output in _get(header, "outputs", list)
        }
        outputs = self._servicer.infer(name, _inputs(header, binary), args, list(as_binary), call)
        shown = {"model_name": name, "model_version": "1", "id": _get(header, "id", str)}
        return _answer(shown, outputs, as_binary or dict.fromkeys(outputs, all_binary))


def _inputs(header: Any, binary: memoryview) -> Iterator[Tensor]:
    for tensor in _get(header, "inputs", list):
        name, datatype, shape = _get(tensor, "name", str), _get(tensor, "datatype", str), _get(tensor, "shape", list)
        if not all(type(size) is int for size in shape):
            raise InvalidInput(f"the shape of input {name[:40]!r} must be whole numbers")
        parameters = _get(tensor, "parameters", dict)
        size = parameters.get("binary_data_size")
        if type(size) not in (int, type(None)) or not 0 <= (size or 0) <= len(binary):
            raise InvalidInput(f"binary_data_size is {size!r}, but {len(binary)} bytes are left in the body")
        data = _elements(name, datatype, _get(tensor, "data", list)) if size is None else binary[:size]
        binary = binary[size or 0 :]
        yield Tensor(name, datatype, shape, data, str(parameters.get("content_type", "")))
    if len(binary):
        raise InvalidInput(f"{len(binary)} bytes of the body belong to no input")


def _elements(name: str, datatype: str, data: list[Any]) -> list[Any]:
    """The elements of nested or flat lists; texts as bytes. InvalidInput if one is not of the datatype."""
    for _ in range(_MAX_DIMENSIONS):
        if list not in (kinds := set(map(type, data))):
            break
        data = list(chain.from_iterable(one if isinstance(one, list) else (one,) for one in data))
    dtype = np.dtype(tensors.DTYPES.get(datatype, "object"))
    fits = kinds <= _JSON_TYPES[dtype.kind]
    if not fits or (dtype.kind == "f" and max(map(abs, data), default=0) > float(np.finfo(dtype).max)):
        raise InvalidInput(f"input {name[:40]!r}: not all of its data are {datatype[:20]}; send others as bytes")
    try:
        return [text.encode() for text in data] if dtype.kind == "O" else data
    except UnicodeEncodeError:
        raise InvalidInput(f"input {name[:40]!r}: a text has half of a surrogate pair") from None


def _answer(shown: dict[str, Any], outputs: Mapping[str, Array], as_binary: Mapping[str, Any]) -> Response:
    binary, shown["outputs"] = [], []
    for name, array in outputs.items():
        output = {"name": name, "datatype": tensors.DATATYPES[str(array.dtype)], "shape": array.shape}
        if as_binary[name] is True:
            binary.append(tensors.raw(array))
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = _texts(array) if array.dtype == object else codec.lists(array.ravel())
        shown["outputs"].append(output)
    response = _json({name: value for name, value in shown.items() if value != ""})
    if not binary:
        return response
    headers = {LENGTH: str(len(response.body))}
    return Response(b"".join([response.body, *binary]), 200, headers, "application/octet-stream")


def _json(value: Any, status: int = 200) -> Response:
    return Response(codec.standard_json(value), status, media_type="application/json")


def _texts(array: Array) -> list[str]:
    try:
        return [element.decode() for element in array.flat]
    except UnicodeDecodeError:
        raise InvalidInput("the output holds bytes that are not text; ask for it with binary_data") from None


def _parsed(text: Buffer) -> Any:
    try:
        return codec.parse_json(str(text, "utf-8"))
    except UnicodeDecodeError:
        raise InvalidInput(f"the JSON must be UTF-8; if tensors follow it, {LENGTH} must say where it ends") from None


def _get(found: Any, key: str, kind: type) -> Any:
    """The value of an object's key, which must be of this kind; an empty one if there is none."""
    value = found.get(key, kind()) if isinstance(found, dict) else None
    if not isinstance(value, kind):
        raise InvalidInput(f"{key} must be a {kind.__name__} in an object")
    return value
