"""inference.GRPCInferenceService: Open Inference Protocol v2, for the clients of KServe, Triton and MLServer.

A tensor is an array; BYTES are texts, encoded images or bytes. Several inputs are a dictionary by name. The request's
parameters are the model's args. An answer that is an array, or a dictionary of arrays, is tensors; all else is JSON in
one BYTES output. If a model's ``metadata`` says ``"batch": True``, the rows of a request are inputs of their own.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tiny_model_server import __version__, codec, wire
from tiny_model_server.codec import Array
from tiny_model_server.engine import Call, Engine
from tiny_model_server.errors import InvalidInput, ServerError, message_of
from tiny_model_server.repository import ServedModel, State

SCHEMA = "open_inference"
SERVICE = "inference.GRPCInferenceService"

# Datatype: numpy's, Triton's number of it, the typed field that carries it.
_TYPES = {
    "BOOL": ("bool", 1, "bool_contents"),
    "UINT8": ("uint8", 2, "uint_contents"),
    "UINT16": ("uint16", 3, "uint_contents"),
    "UINT32": ("uint32", 4, "uint_contents"),
    "UINT64": ("uint64", 5, "uint64_contents"),
    "INT8": ("int8", 6, "int_contents"),
    "INT16": ("int16", 7, "int_contents"),
    "INT32": ("int32", 8, "int_contents"),
    "INT64": ("int64", 9, "int64_contents"),
    "FP16": ("float16", 10, ""),
    "FP32": ("float32", 11, "fp32_contents"),
    "FP64": ("float64", 12, "fp64_contents"),
    "BYTES": ("object", 13, "bytes_contents"),
    "BF16": ("uint16", 14, ""),
}
_DATATYPES = {dtype: name for name, (dtype, _, _) in _TYPES.items() if name != "BF16"}


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    door = _OpenInference(engine)
    return {name: getattr(door, name) for name in wire.methods(SCHEMA, SERVICE)}


class _OpenInference:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._methods = wire.methods(SCHEMA, SERVICE)
        self._tensor = wire.message(SCHEMA, "inference.InferTensor")

    def _answer(self, method: str, **fields: Any) -> Any:
        return self._methods[method].response(**fields)

    def ServerLive(self, request: Any, call: Call) -> Any:
        return self._answer("ServerLive", live=True)

    def ServerReady(self, request: Any, call: Call) -> Any:
        return self._answer("ServerReady", ready=self._engine.ready and not self._engine.stopping)

    def ModelReady(self, request: Any, call: Call) -> Any:
        return self._answer("ModelReady", ready=self._engine.serving(self._engine.model(request.name)))

    def ServerMetadata(self, request: Any, call: Call) -> Any:
        extensions = ["model_repository", "model_configuration"]
        return self._answer("ServerMetadata", name="tiny-model-server", version=__version__, extensions=extensions)

    def ModelMetadata(self, request: Any, call: Call) -> Any:
        model = self._engine.model(call.model or request.name)
        inputs, outputs = _declared(model, "inputs"), _declared(model, "outputs")
        return self._answer(
            "ModelMetadata", name=model.name, versions=["1"], platform="python", inputs=inputs, outputs=outputs
        )

    def ModelConfig(self, request: Any, call: Call) -> Any:
        model = self._engine.model(request.name)
        batch = model.loaded is not None and bool(model.loaded.metadata.get("batch"))
        rows = 1 if batch else 0  # where rows are inputs of their own, their number is not said here

        def tensors(kind: str) -> list[dict[str, Any]]:
            return [
                {"name": one["name"], "data_type": _TYPES[one["datatype"]][1], "dims": one["shape"][rows:]}
                for one in _declared(model, kind)
            ]

        most = model.loaded.options.max_batch_size if batch and model.loaded else 0
        config = {"name": model.name, "max_batch_size": most, "backend": "python"}
        return self._answer("ModelConfig", config=config | {"input": tensors("inputs"), "output": tensors("outputs")})

    def RepositoryIndex(self, request: Any, call: Call) -> Any:
        models = [
            {"name": model.name, "version": "1", "state": _repository_state(model), "reason": model.reason}
            for model in self._engine.models()
            if not request.ready or self._engine.serving(model)
        ]
        return self._answer("RepositoryIndex", models=models)

    def RepositoryModelLoad(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        name = self._engine.load(request.model_name or request.repository_name).name
        return self._answer("RepositoryModelLoad", model_name=name, is_loaded=True)

    def RepositoryModelUnload(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        name = self._engine.unload(request.model_name or request.repository_name).name
        return self._answer("RepositoryModelUnload", model_name=name, is_unloaded=True)

    def ModelStreamInfer(self, requests: Iterator[Any], call: Call) -> Iterator[Any]:
        for request in requests:
            try:
                yield self._answer("ModelStreamInfer", infer_response=self.ModelInfer(request, call))
            except ServerError as error:
                failed = self._methods["ModelInfer"].response(model_name=request.model_name, id=request.id)
                yield self._answer("ModelStreamInfer", error_message=message_of(error), infer_response=failed)

    def ModelInfer(self, request: Any, call: Call) -> Any:
        model = self._engine.model(call.model or request.model_name)
        args = {name: _parameter(value) for name, value in request.parameters.items()}
        values = _inputs(request)
        if model.loaded is not None and model.loaded.metadata.get("batch"):
            items = [codec.pack(_one_or_all(row)) for row in _rows(values)]
            outcomes = self._engine.run_batch(model.name, items, args, call)
            answer = _stacked([_value(outcome, f"row {index}: ") for index, outcome in enumerate(outcomes)])
        else:
            answer = _value(self._engine.run(model.name, codec.pack(_one_or_all(values)), args, call))
        raw = bool(request.raw_input_contents) or not any(tensor.HasField("contents") for tensor in request.inputs)
        return self._response(request, _outputs(model, answer), raw)

    def _response(self, request: Any, outputs: dict[str, Array], raw: bool) -> Any:
        wanted = [output.name for output in request.outputs] or list(outputs)
        for name in wanted:
            if name not in outputs:
                raise InvalidInput(f"there is no output {name!r}; there are {', '.join(outputs)}")
        typed = not raw and all(_TYPES[_datatype(outputs[name])][2] for name in wanted)
        answer = self._answer("ModelInfer", model_name=request.model_name, model_version="1", id=request.id)
        for name in wanted:
            array = outputs[name]
            datatype = _datatype(array)
            tensor = answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
            if typed:
                getattr(tensor.contents, _TYPES[datatype][2]).extend(array.ravel().tolist())
            elif datatype == "BYTES":
                answer.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in array.ravel()))
            else:
                answer.raw_output_contents.append(bytes(codec.raw(array)))
        return answer


def _inputs(request: Any) -> dict[str, Any]:
    """The request's inputs by name; InvalidInput says which is malformed and how."""
    raw = list(request.raw_input_contents)
    if not request.inputs:
        raise InvalidInput("the request has no inputs; send at least one")
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(f"there are {len(request.inputs)} inputs, but raw_input_contents has {len(raw)} elements")
    values: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in values:
            raise InvalidInput(f"there are two inputs {tensor.name!r}")
        try:
            if raw and tensor.HasField("contents"):
                raise InvalidInput("it has contents, and raw_input_contents beside them; send one of both")
            values[tensor.name] = _input(tensor, raw[index] if raw else None)
        except InvalidInput as error:
            raise InvalidInput(f"input {tensor.name!r}: {error}") from None
    return values


def _input(tensor: Any, raw: bytes | None) -> Any:
    if tensor.datatype not in _TYPES:
        raise InvalidInput(f"datatype {tensor.datatype!r} is none of {', '.join(_TYPES)}")
    dtype, _, field = _TYPES[tensor.datatype]
    if any(size < 0 for size in tensor.shape):
        raise InvalidInput(f"shape {list(tensor.shape)} has a negative dimension")
    if tensor.datatype == "BYTES":
        return _texts(tensor, list(tensor.contents.bytes_contents) if raw is None else _elements(raw))
    if raw is not None:
        array = codec.array_from(dtype, tensor.shape, raw)
        return (array.astype(np.uint32) << 16).view(np.float32) if tensor.datatype == "BF16" else array
    if not field:
        raise InvalidInput(f"{tensor.datatype} travels only in raw_input_contents")
    found = getattr(tensor.contents, field)
    _check_count(tensor, len(found))
    try:
        return codec.array_from(dtype, tensor.shape, codec.raw(np.array(list(found), dtype)))
    except OverflowError as error:
        raise InvalidInput(str(error)) from None


def _check_count(tensor: Any, found: int) -> None:
    count = 1
    for size in tensor.shape:
        count *= size
    if found != count:
        raise InvalidInput(f"shape {list(tensor.shape)} has {count} elements, but there are {found}")


def _elements(raw: bytes) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise InvalidInput("raw BYTES are elements with a 4-byte little-endian length before each; one is cut off")
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def _texts(tensor: Any, elements: list[bytes]) -> Any:
    """One value for one element, a list of them for several."""
    _check_count(tensor, len(elements))
    kind = _parameter(tensor.parameters["content_type"]) if "content_type" in tensor.parameters else ""
    values = [codec.from_bytes(element, str(kind)) for element in elements]
    return values[0] if len(values) == 1 else values


def _parameter(value: Any) -> Any:
    chosen = value.WhichOneof("parameter_choice")
    return getattr(value, chosen) if chosen else None


def _one_or_all(values: dict[str, Any]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values


def _rows(values: dict[str, Any]) -> list[dict[str, Any]]:
    listed = {name: [value] if isinstance(value, (str, bytes)) else value for name, value in values.items()}
    counts = {name: len(value) if np.ndim(value) or isinstance(value, list) else 0 for name, value in listed.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InvalidInput(f"the first dimension counts the rows; it must be the same in every input, not {counts}")
    return [{name: value[row] for name, value in listed.items()} for row in range(next(iter(counts.values())))]


def _value(outcome: Any, where: str = "") -> Any:
    if isinstance(outcome, ServerError):
        raise type(outcome)(f"{where}{outcome}")
    return codec.unpack(outcome)


def _stacked(answers: Sequence[Any]) -> Any:
    """The answers to rows as one: arrays and numbers stacked, dictionaries by key; other answers one JSON a row."""
    first = answers[0]
    if (
        isinstance(first, dict)
        and first
        and all(isinstance(one, dict) and one.keys() == first.keys() for one in answers)
    ):
        return {key: _stacked([one[key] for one in answers]) for key in first}
    if (
        all(isinstance(one, (np.ndarray, int, float)) for one in answers)
        and len({np.shape(one) for one in answers}) == 1
    ):
        return np.stack([np.asarray(one) for one in answers])
    return np.array([_json(one) for one in answers], object)


def _outputs(model: ServedModel, answer: Any) -> dict[str, Array]:
    names = [output["name"] for output in _declared(model, "outputs")]
    if isinstance(answer, dict) and answer and all(isinstance(value, np.ndarray) for value in answer.values()):
        return {name: _sendable(value) for name, value in answer.items()}
    array = answer if isinstance(answer, np.ndarray) else np.array([_json(answer)], object)
    return {names[0] if len(names) == 1 else "output": _sendable(array)}


def _sendable(array: Array) -> Array:
    if array.dtype.kind == "U":
        return np.array([text.encode() for text in array.ravel().tolist()], object).reshape(array.shape)
    if array.dtype.kind == "S":
        return array.astype(object)
    if array.dtype != object and str(array.dtype) not in _DATATYPES:
        return np.array([_json(array)], object)
    return array


def _json(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else codec.plain_json(value).encode()


def _datatype(array: Array) -> str:
    return _DATATYPES[str(array.dtype)]


def _declared(model: ServedModel, kind: str) -> list[dict[str, Any]]:
    """The inputs or outputs that a model's metadata declares, in the protocol's terms; one that fits most if none."""
    metadata = model.loaded.metadata if model.loaded else {}
    rows = [-1] if metadata.get("batch") else []
    found = [
        {
            "name": one.get("name", kind[:-1]),
            "datatype": _DATATYPES.get(str(one.get("dtype", "uint8")), "BYTES"),
            "shape": [*rows, *(one.get("shape") or [-1])],
        }
        for one in metadata.get(kind) or []
    ]
    if found or kind == "outputs":
        return found or [{"name": "output", "datatype": "BYTES", "shape": rows or [1]}]
    shape = (model.loaded.input_shape if model.loaded else None) or [-1, -1, -1]
    return [{"name": "input", "datatype": "UINT8", "shape": [*rows, *shape]}]


def _repository_state(model: ServedModel) -> str:
    return {State.FAILED: "UNAVAILABLE", State.UNLOADED: "UNAVAILABLE"}.get(model.state, str(model.state))
