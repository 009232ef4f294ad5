"""Open Inference Protocol v2 by HTTP (/v2/...), with the extension by which tensors follow the JSON as bytes.

A request becomes a message of the gRPC form, whose handlers answer it; tensors travel raw in it.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Buffer
from tiny_model_server.engine.engine import Call
from tiny_model_server.errors import InvalidInput

METHODS = schemas.methods("open_inference", "inference.GRPCInferenceService")
LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes of a body are JSON; the tensors follow."""

_ROUTES = [
    (re.compile(pattern), method)
    for pattern, method in [
        ("GET /v2", "ServerMetadata"),
        ("GET /v2/health/live", "ServerLive"),
        ("GET /v2/health/ready", "ServerReady"),
        ("GET /v2/models/(?P<name>[^/]+)(/versions/[^/]+)?", "ModelMetadata"),
        ("GET /v2/models/(?P<name>[^/]+)(/versions/[^/]+)?/ready", "ModelReady"),
        ("GET /v2/models/(?P<name>[^/]+)(/versions/[^/]+)?/config", "ModelConfig"),
        ("POST /v2/models/(?P<model_name>[^/]+)(/versions/[^/]+)?/infer", "ModelInfer"),
        ("POST /v2/repository/index", "RepositoryIndex"),
        ("POST /v2/repository/models/(?P<model_name>[^/]+)/load", "RepositoryModelLoad"),
        ("POST /v2/repository/models/(?P<model_name>[^/]+)/unload", "RepositoryModelUnload"),
    ]
]
_MOST_TENSORS = 1000
_MOST_PARAMETERS = 1000
_DEEPEST = 32  # lists in lists, as many as an array has dimensions
_DTYPES = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"} | {
    name: name.lower() for name in "UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64".split()
}


class Answer(NamedTuple):
    """An HTTP answer: status, content type, headers beside it, body."""

    status: int
    kind: str
    headers: dict[str, str]
    body: bytes


class Rest:
    """The HTTP form of the handlers of the gRPC form."""

    def __init__(self, handlers: Mapping[str, Callable[[Any, Call], Any]]) -> None:
        self._handlers = handlers

    def find(self, command: str, path: str) -> tuple[str, dict[str, str]]:
        """(method of the gRPC form, its fields that the path names) of a request; "" if there is no such method."""
        asked = f"{command} {path.rstrip('/')}"
        for route, method in _ROUTES:
            if match := route.fullmatch(asked):
                return method, {name: value for name, value in match.groupdict().items() if value}
        return "", {}

    def answer(
        self, method: str, fields: dict[str, str], headers: Mapping[str, str], body: Buffer, call: Call
    ) -> Answer:
        """Answers what ``find`` found; ServerError says what was wrong. ``headers`` have names in lower case."""
        if method == "ModelInfer":
            return self._infer(fields["model_name"], headers, body, call)
        request = METHODS[method].request(**fields)
        if method == "RepositoryIndex":
            request.ready = _header(body or b"{}").get("ready") is True
        answer = _plain(self._handlers[method](request, call))
        if method == "RepositoryIndex":
            answer = answer["models"]
        elif method == "ModelConfig":
            answer = answer["config"]
        ok = method not in ("ServerReady", "ModelReady") or answer["ready"]
        return Answer(200 if ok else 503, "application/json", {}, codec.standard_json(answer).encode())

    def _infer(self, name: str, headers: Mapping[str, str], body: Buffer, call: Call) -> Answer:
        if headers.get("content-encoding", "identity") != "identity":
            raise InvalidInput(f"Content-Encoding {headers['content-encoding']!r} is not taken; send the body as it is")
        length = headers.get(LENGTH.lower(), str(len(body)))
        if not (length.isascii() and length.isdigit() and int(length) <= len(body)):
            raise InvalidInput(f"{LENGTH} is {length!r}; it must be the bytes of JSON in a body of {len(body)}")
        header = _header(memoryview(body)[: int(length)])
        parameters = _object(header, "parameters")
        all_binary = parameters.pop("binary_data_output", False) is True
        request = METHODS["ModelInfer"].request(model_name=name, id=_of(header, "id", str, ""))
        _fill(request.parameters, parameters)
        binary, at = memoryview(body)[int(length) :], 0
        for tensor in _objects(header, "inputs"):
            described = _object(tensor, "parameters")
            size = described.pop("binary_data_size", None)
            if size is None:
                raw = _raw(tensor)
            elif type(size) is not int or not 0 <= size <= len(binary) - at:
                raise InvalidInput(f"binary_data_size is {size!r}, but {len(binary) - at} bytes are left in the body")
            else:
                raw, at = bytes(binary[at : at + size]), at + size
            request.raw_input_contents.append(raw)
            added = request.inputs.add(name=_of(tensor, "name", str, ""), datatype=_of(tensor, "datatype", str, ""))
            _fill(added.parameters, described)
            try:
                added.shape.extend(_of(tensor, "shape", list, []))
            except (TypeError, ValueError) as error:
                raise InvalidInput(f"the shape of input {added.name!r} must be whole numbers: {error}") from None
        if at != len(binary):
            raise InvalidInput(f"{len(binary) - at} bytes of the body belong to no input")
        as_binary = {}
        for output in _objects(header, "outputs"):
            request.outputs.add(name=_of(output, "name", str, ""))
            as_binary[request.outputs[-1].name] = _object(output, "parameters").get("binary_data") is True
        return _inferred(self._handlers["ModelInfer"](request, call), as_binary, all_binary)


def _inferred(answer: Any, as_binary: Mapping[str, bool], all_binary: bool) -> Answer:
    outputs, tail = [], []
    for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        output = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if as_binary.get(tensor.name, all_binary):
            tail.append(raw)
            output["parameters"] = {"binary_data_size": len(raw)}
        else:
            output["data"] = list(_texts(raw)) if tensor.datatype == "BYTES" else _numbers(tensor.datatype, raw)
        outputs.append(output)
    told = {"model_name": answer.model_name, "model_version": answer.model_version, "outputs": outputs}
    header = codec.standard_json(told | ({"id": answer.id} if answer.id else {})).encode()
    if not tail:
        return Answer(200, "application/json", {}, header)
    return Answer(200, "application/octet-stream", {LENGTH: str(len(header))}, b"".join([header, *tail]))


def _numbers(datatype: str, raw: bytes) -> list[Any]:
    listed: list[Any] = codec.lists(np.frombuffer(raw, _DTYPES[datatype]))
    return listed


def _texts(raw: bytes) -> Iterator[str]:
    at = 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        try:
            yield raw[at + 4 : at + 4 + size].decode()
        except UnicodeDecodeError:
            raise InvalidInput("the output holds bytes that are no text; ask for it with binary_data") from None
        at += 4 + size


def _raw(tensor: Mapping[str, Any]) -> bytes:
    """A tensor's ``data``, nested lists or flat, as it travels raw."""
    data, datatype = tensor.get("data"), _of(tensor, "datatype", str, "")
    where = f"input {_of(tensor, 'name', str, '')[:40]!r}"
    if not isinstance(data, list):
        raise InvalidInput(f"{where} needs data, a list, or the parameter binary_data_size")
    flat = _flat(data)
    if datatype == "BYTES":
        if not all(isinstance(one, str) for one in flat):
            raise InvalidInput(f"{where}: BYTES in JSON are texts; send others with binary_data_size")
        try:
            return b"".join(struct.pack("<I", len(one)) + one for one in (text.encode() for text in flat))
        except UnicodeEncodeError:
            raise InvalidInput(f"{where}: a text has half of a surrogate pair, which UTF-8 cannot hold") from None
    if datatype not in _DTYPES:
        raise InvalidInput(f"{where}: datatype {datatype[:20]!r} is none of BYTES, {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[datatype])
    kinds: tuple[type, ...] = (bool,) if dtype.kind == "b" else (int, float) if dtype.kind == "f" else (int,)
    if not set(map(type, flat)) <= set(kinds):
        raise InvalidInput(f"{where}: these are no {datatype}")
    if dtype.kind in "iu" and flat and not (np.iinfo(dtype).min <= min(flat) and max(flat) <= np.iinfo(dtype).max):
        raise InvalidInput(f"{where}: its data are no {datatype}: the least is {min(flat)}, the greatest {max(flat)}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
    except OverflowError as error:  # an int that no float holds
        raise InvalidInput(f"{where}: its data are no {datatype}: {error}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"{where}: its data are no {datatype}: a number is too large")
    return array.tobytes()


def _flat(data: list[Any]) -> list[Any]:
    """The elements of lists in lists."""
    for _ in range(_DEEPEST):
        if list not in set(map(type, data)):
            return data
        data = list(chain.from_iterable(one if isinstance(one, list) else (one,) for one in data))
    raise InvalidInput(f"data are lists in lists, at most {_DEEPEST} deep")


def _header(text: Buffer) -> dict[str, Any]:
    try:
        header = codec.parse_json(str(text, "utf-8"))
    except UnicodeDecodeError:
        raise InvalidInput(
            f"the JSON must be UTF-8; where tensors follow it, {LENGTH} must say where it ends"
        ) from None
    if not isinstance(header, dict):
        raise InvalidInput("the body must be a JSON object")
    return header


def _of(header: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = header.get(key, default)
    if not isinstance(value, kind):
        raise InvalidInput(f"{key} must be a {kind.__name__}")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidInput(f"{key} has half of a surrogate pair, which UTF-8 cannot hold")
    return value


def _object(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    return dict(_of(header, key, dict, {}))


def _objects(header: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _of(header, key, list, [])
    if len(found) > _MOST_TENSORS:
        raise InvalidInput(f"{key} are at most {_MOST_TENSORS}, not {len(found)}")
    if not all(isinstance(one, dict) for one in found):
        raise InvalidInput(f"{key} must be a list of objects")
    return found


def _fill(parameters: Any, values: Mapping[str, Any]) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    if len(values) > _MOST_PARAMETERS:
        raise InvalidInput(f"there are {len(values)} parameters; {_MOST_PARAMETERS} are allowed")
    for name, value in values.items():
        if type(value) not in kinds:
            raise InvalidInput(f"parameter {name[:40]!r} must be a bool, a number or a text")
        try:
            setattr(parameters[name], kinds[type(value)], value)
        except ValueError as error:
            raise InvalidInput(f"parameter {name[:40]!r}: {error}") from None


def _plain(message: Any) -> Any:
    """A message as JSON has it, numbers as numbers, enums by name."""
    if not hasattr(message, "DESCRIPTOR"):
        return message
    answer: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            answer[field.name] = [_plain(one) for one in value]
        elif field.enum_type:
            answer[field.name] = field.enum_type.values_by_number[value].name
        else:
            answer[field.name] = _plain(value)
    return answer
