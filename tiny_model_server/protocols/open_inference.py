"""inference.GRPCInferenceService: Open Inference Protocol v2, for the clients of KServe, Triton and MLServer.

A tensor is an array; BYTES are texts, encoded images or bytes. Several inputs are a dictionary by name. The request's
parameters are the model's args. An answer that is an array, or a dictionary of arrays, is tensors; all else is JSON in
one BYTES output. If a model's ``metadata`` says ``"batch": True``, the rows of a request are inputs of their own.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiny_model_server import __version__, codec, schemas
from tiny_model_server.codec import Array, Encoded
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.protocols import tensors

SCHEMA = "open_inference"
SERVICE = "inference.GRPCInferenceService"
_ENTRY = 100  # bytes of an input in the dictionary of a row, beside its name and its elements
_LARGEST_ENTRIES = 64 << 20  # bytes of all rows' dictionaries


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    door = _OpenInference(engine)
    return {name: getattr(door, name) for name in schemas.methods(SCHEMA, SERVICE)}


class _OpenInference:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._methods = schemas.methods(SCHEMA, SERVICE)
        self._tensor = schemas.message(SCHEMA, "inference.InferTensor")

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

        def described(kind: str) -> list[dict[str, Any]]:
            return [
                {"name": one["name"], "data_type": tensors.TYPES[one["datatype"]][1], "dims": one["shape"][rows:]}
                for one in _declared(model, kind)
            ]

        most = model.loaded.options.max_batch_size if batch and model.loaded else 0
        config = {"name": model.name, "max_batch_size": most, "backend": "python"}
        return self._answer(
            "ModelConfig", config=config | {"input": described("inputs"), "output": described("outputs")}
        )

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
        args = {name: tensors.parameter(value) for name, value in request.parameters.items()}
        most = self._engine.settings.max_items
        values = tensors.inputs(request, most)
        if model.loaded is not None and model.loaded.metadata.get("batch"):
            items = _rows(values, most)
            outcomes = self._engine.run_batch(model.name, items, args, call)
            answer = _stacked([_value(outcome, f"row {index}: ") for index, outcome in enumerate(outcomes)])
        else:
            wholes = {name: _of(value) for name, value in values.items()}
            answer = _value(self._engine.run(model.name, _packed(wholes), args, call))
        raw = bool(request.raw_input_contents) or not any(tensor.HasField("contents") for tensor in request.inputs)
        return self._response(request, _outputs(model, answer), raw)

    def _response(self, request: Any, outputs: dict[str, Array], raw: bool) -> Any:
        wanted = [output.name for output in request.outputs] or list(outputs)
        for name in wanted:
            if name not in outputs:
                raise InvalidInput(f"there is no output {name!r}; there are {', '.join(outputs)}")
        typed = not raw and all(tensors.TYPES[_datatype(outputs[name])][2] for name in wanted)
        answer = self._answer("ModelInfer", model_name=request.model_name, model_version="1", id=request.id)
        for name in wanted:
            array = outputs[name]
            datatype = _datatype(array)
            tensor = answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
            if typed:
                field, flat = getattr(tensor.contents, tensors.TYPES[datatype][2]), array.ravel()
                for at in range(0, flat.size, tensors.AT_ONCE):
                    field.extend(flat[at : at + tensors.AT_ONCE].tolist())
            elif datatype == "BYTES":
                answer.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in array.ravel()))
            else:
                answer.raw_output_contents.append(bytes(codec.raw(array)))
        return answer


def _packed(values: Mapping[str, Any]) -> Encoded:
    """One input as it is, several as a dictionary by name."""
    return codec.encode(next(iter(values.values())) if len(values) == 1 else values)


def _rows(values: Mapping[str, Array | tensors.Texts], most: int) -> list[Encoded]:
    counts = {name: value.shape[0] if len(value.shape) else 0 for name, value in values.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InvalidInput(f"the first dimension counts the rows; it must be the same in every input, not {counts}")
    rows = next(iter(counts.values()))
    if rows > most:
        raise InvalidInput(f"there are {rows} rows; TMS_MAX_ITEMS allows {most}")
    if any(value.size == 0 for value in values.values()):
        raise InvalidInput("the rows of an input have no elements")
    if len(values) > 1 and rows * sum(len(name) + _ENTRY for name in values) > _LARGEST_ENTRIES:
        raise InvalidInput(f"{rows} rows of {len(values)} inputs are too many for one request; send fewer rows")
    return [_packed({name: _of(value, row) for name, value in values.items()}) for row in range(rows)]


def _of(value: Array | tensors.Texts, row: int | None = None) -> Any:
    if isinstance(value, tensors.Texts):
        return value.whole() if row is None else value.row(row)
    return value if row is None else value[row]


def _value(outcome: Any, where: str = "") -> Any:
    if isinstance(outcome, ServerError):
        raise type(outcome)(f"{where}{outcome}")
    return codec.decode(outcome)


def _stacked(answers: Sequence[Any]) -> Any:
    """The answers to rows as one: dictionaries are stacked by key, everything else as one column."""
    first = answers[0]
    if (
        isinstance(first, dict)
        and first
        and all(isinstance(one, dict) and one.keys() == first.keys() for one in answers)
    ):
        return {key: _column([one[key] for one in answers]) for key in first}
    return _column(answers)


def _column(answers: Sequence[Any]) -> Array:
    """One value a row: arrays and numbers are stacked; other values, nested dictionaries too, are one JSON a row."""
    if all(isinstance(one, (np.ndarray, int, float)) for one in answers):
        arrays = [np.asarray(one) for one in answers]
        if len({array.shape for array in arrays}) == 1 and (stacked := _stack(arrays)) is not None:
            return stacked
    return np.array([_json(one) for one in answers], object)


def _stack(arrays: Sequence[Array]) -> Array | None:
    """The arrays as one; None if no datatype carries it, or a number would change beside fractions."""
    if len({array.dtype.kind for array in arrays}) == 1:
        stacked = np.stack(arrays)
        sendable = stacked.dtype.kind in "US" or (stacked.dtype != object and str(stacked.dtype) in tensors.DATATYPES)
        return stacked if sendable else None  # an object is a number that no dtype holds
    listed = [array.tolist() for array in arrays]
    stacked = np.array(listed)
    return stacked if stacked.dtype != object and stacked.tolist() == listed else None


def _outputs(model: ServedModel, answer: Any) -> dict[str, Array]:
    names = [output["name"] for output in _declared(model, "outputs")]
    if isinstance(answer, dict) and answer and all(isinstance(value, np.ndarray) for value in answer.values()):
        return {_utf8(name).decode(): _sendable(value) for name, value in answer.items()}
    array = answer if isinstance(answer, np.ndarray) else np.array([_json(answer)], object)
    return {names[0] if len(names) == 1 else "output": _sendable(array)}


def _sendable(array: Array) -> Array:
    if array.dtype.kind == "U":
        return np.array([_utf8(text) for text in array.ravel().tolist()], object).reshape(array.shape)
    if array.dtype.kind == "S":
        return array.astype(object)
    if array.dtype != object and str(array.dtype) not in tensors.DATATYPES:
        return np.array([_json(array)], object)
    return array


def _json(value: Any) -> bytes:
    return _utf8(value) if isinstance(value, str) else codec.json_only(value).encode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ModelError("the model's answer has half of a surrogate pair, which a text in UTF-8 cannot hold") from None


def _datatype(array: Array) -> str:
    return tensors.DATATYPES[str(array.dtype)]


def _declared(model: ServedModel, kind: str) -> list[dict[str, Any]]:
    """The inputs or outputs that a model's metadata declares, in the protocol's terms; one that fits most if none."""
    metadata = model.loaded.metadata if model.loaded else {}
    rows = [-1] if metadata.get("batch") else []
    found = [
        {
            "name": one.get("name", kind[:-1]),
            "datatype": tensors.DATATYPES.get(str(one.get("dtype", "uint8")), "BYTES"),
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
