"""inference.GRPCInferenceService: Open Inference Protocol v2, for the clients of KServe, Triton and MLServer.

A tensor is an array; BYTES are texts, encoded images or bytes. Several inputs are a dictionary by name. The request's
parameters are the model's args. An answer that is an array, or a dictionary of arrays, is tensors; all else is JSON in
one BYTES output. If a model's ``metadata`` says ``"batch": True``, the rows of a request are inputs of their own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from tiny_model_server import __version__, codec, schemas
from tiny_model_server.codec import Array, Encoded
from tiny_model_server.engine.call import Call, answers
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.protocols import tensors
from tiny_model_server.protocols.tensors import DATATYPES, Tensor

SCHEMA = "open_inference"
SERVICE = "inference.GRPCInferenceService"
_FIELDS = {
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **{kind: f"{kind.lower()}_contents" for kind in ("BOOL", "UINT64", "INT64", "FP32", "FP64", "BYTES")},
}
"""The fields for typed contents."""
_ONLY_RAW = tensors.DTYPES.keys() - _FIELDS.keys()
_TRITON_TYPES = {kind: f"TYPE_{kind}" for kind in DATATYPES.values()} | {"BYTES": "TYPE_STRING"}
_STATES = dict.fromkeys((State.FAILED, State.UNLOADED), "UNAVAILABLE")
"""What the protocol calls a state, where it has another name for it."""
_ENTRY = 100  # bytes of an input in the dictionary of a row, beside its name and its elements
_MAX_ENTRY_BYTES = 64 << 20  # bytes of all rows' dictionaries


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    return schemas.handlers(OpenInference(engine), SCHEMA, SERVICE)


class OpenInference:
    """The methods of both forms of the protocol; most return the fields of the response."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ServerLive(self, request: Any, call: Call) -> dict[str, Any]:
        return {"live": True}

    def ServerReady(self, request: Any, call: Call) -> dict[str, Any]:
        return {"ready": self._engine.ready and not self._engine.stopping}

    def ModelReady(self, request: Any, call: Call) -> dict[str, Any]:
        return {"ready": self._engine.serving(self._engine.model(request.name))}

    def ServerMetadata(self, request: Any, call: Call) -> dict[str, Any]:
        facts = {"name": "tiny-model-server", "version": __version__}
        return facts | {"extensions": ["model_repository", "model_configuration"]}

    def ModelMetadata(self, request: Any, call: Call) -> dict[str, Any]:
        model = self._engine.model(call.model or request.name)
        facts = {"name": model.name, "versions": ["1"], "platform": "python"}
        return facts | {kind: _declared(model, kind) for kind in ("inputs", "outputs")}

    def ModelConfig(self, request: Any, call: Call) -> dict[str, Any]:
        model = self._engine.model(request.name)
        rows = int(bool(_metadata(model).get("batch")))  # a dimension that counts rows is not part of the configuration
        max_batch_size = model.loaded.options.max_batch_size if rows and model.loaded else 0
        config: dict[str, Any] = {"name": model.name, "max_batch_size": max_batch_size, "backend": "python"}
        for field in ("input", "output"):
            config[field] = [
                {"name": one["name"], "data_type": _TRITON_TYPES[one["datatype"]], "dims": one["shape"][rows:]}
                for one in _declared(model, f"{field}s")
            ]
        return {"config": config}

    def RepositoryIndex(self, request: Any, call: Call) -> dict[str, Any]:
        models = [model for model in self._engine.models() if not request.ready or self._engine.serving(model)]
        facts = [{"name": one.name, "state": _STATES.get(one.state, one.state), "reason": one.reason} for one in models]
        return {"models": [{"version": "1"} | one for one in facts]}

    def RepositoryModelLoad(self, request: Any, call: Call) -> dict[str, Any]:
        self._engine.access.authorize(call)
        model = self._engine.wait(self._engine.load(request.model_name or request.repository_name))
        return {"model_name": model.name, "is_loaded": True}

    def RepositoryModelUnload(self, request: Any, call: Call) -> dict[str, Any]:
        self._engine.access.authorize(call)
        model = self._engine.wait(self._engine.unload(request.model_name or request.repository_name))
        return {"model_name": model.name, "is_unloaded": True}

    def ModelStreamInfer(self, requests: Iterator[Any], call: Call) -> Iterator[Any]:
        answer = schemas.message(SCHEMA, "inference.ModelStreamInferResponse")
        for request in requests:
            try:
                yield answer(infer_response=self.ModelInfer(request, call))
            except ServerError as error:
                failed = {"model_name": request.model_name, "id": request.id}
                yield answer(error_message=message_of(error), infer_response=failed)

    def ModelInfer(self, request: Any, call: Call) -> dict[str, Any]:
        args = {name: _parameter(value) for name, value in request.parameters.items()}
        wanted = [output.name for output in request.outputs]
        found = self.infer(request.model_name, _inputs(request), args, wanted, call)
        kinds = {name: DATATYPES[str(array.dtype)] for name, array in found.items()}
        typed = not request.raw_input_contents and any(tensor.HasField("contents") for tensor in request.inputs)
        typed &= _FIELDS.keys() >= set(kinds.values())
        outputs, raw = [], []
        for name, array in found.items():
            output = {"name": name, "datatype": kinds[name], "shape": array.shape}
            if typed:
                output["contents"] = {_FIELDS[kinds[name]]: array.flat if array.dtype == object else array.ravel().data}
            else:
                raw.append(tensors.raw(array))
            outputs.append(output)
        facts = {"model_name": request.model_name, "model_version": "1", "id": request.id}
        return facts | {"outputs": outputs, "raw_output_contents": raw}

    def infer(
        self, name: str, inputs: Iterable[Tensor], args: Mapping[str, Any], wanted: Sequence[str], call: Call
    ) -> dict[str, Array]:
        """The outputs by name, all or those wanted: arrays of the dtypes in DATATYPES, those of objects being bytes."""
        model = self._engine.model(call.model or name)
        max_items = self._engine.settings.max_items
        values = tensors.arrays(inputs, max_items)
        try:
            if _metadata(model).get("batch"):
                outcomes = self._engine.run_batch(model.name, _rows(values, max_items), args, call)
                answer = _stacked([codec.decode(row) for row in answers(outcomes, "row {}: ")])
            else:
                answer = codec.decode(self._engine.run(model.name, _encoded(values), args, call))
            outputs = _outputs(model, answer)
        except UnicodeEncodeError:
            raise ModelError("the model's answer has half of a surrogate pair, which UTF-8 cannot hold") from None
        if unknown := set(wanted) - outputs.keys():
            raise InvalidInput(f"there is no output {min(unknown)!r}; there are {', '.join(outputs)}")
        return {output: outputs[output] for output in wanted or outputs}


def _inputs(request: Any) -> Iterator[Tensor]:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(f"there are {len(request.inputs)} inputs, but raw_input_contents has {len(raw)} elements")
    for tensor, data in zip_longest(request.inputs, raw):
        if data is not None and tensor.HasField("contents"):
            raise InvalidInput(f"input {tensor.name[:40]!r} has contents and raw_input_contents; send one of both")
        if data is None and tensor.datatype in _ONLY_RAW:
            raise InvalidInput(f"input {tensor.name[:40]!r}: {tensor.datatype} is sent as raw_input_contents only")
        if data is None:
            data = getattr(tensor.contents, _FIELDS.get(tensor.datatype, "bytes_contents"))
        kind = _parameter(tensor.parameters["content_type"]) if "content_type" in tensor.parameters else ""
        yield Tensor(tensor.name, tensor.datatype, tensor.shape, data, str(kind))


def _parameter(value: Any) -> Any:
    """The value of an InferParameter; None if it has none."""
    chosen = value.WhichOneof("parameter_choice")
    return getattr(value, chosen) if chosen else None


def _encoded(values: Mapping[str, Array], row: int | None = None) -> Encoded:
    """One input as it is, several as a dictionary by name; or a row of them."""
    found = {name: _data(value, row) for name, value in values.items()}
    return codec.encode(found if len(found) > 1 else found.popitem()[1])


def _data(array: Array, row: int | None) -> Any:
    """An array of numbers, or a row of it; of BYTES one element, or a list of several."""
    if array.dtype != object:
        return array if row is None else array[row]
    listed = (array if row is None else array[row : row + 1]).ravel().tolist()
    return listed[0] if len(listed) == 1 else listed


def _rows(values: Mapping[str, Array], max_items: int) -> list[Encoded]:
    counts = {name: array.shape[0] if array.ndim and array.size else 0 for name, array in values.items()}
    rows = min(counts.values())
    if not rows or rows != max(counts.values()):
        raise InvalidInput(f"the first dimension counts the rows; it must be the same in every input, not {counts}")
    if rows > max_items:
        raise InvalidInput(f"there are {rows} rows; TMS_MAX_ITEMS allows {max_items}")
    if len(values) > 1 and rows * sum(len(name) + _ENTRY for name in values) > _MAX_ENTRY_BYTES:
        raise InvalidInput(f"{rows} rows of {len(values)} inputs are too many for one request; send fewer rows")
    return [_encoded(values, row) for row in range(rows)]


def _stacked(rows: Sequence[Any]) -> Any:
    """The answers to rows as one: dictionaries are stacked by key, everything else as one column."""
    keys = rows[0].keys() if isinstance(rows[0], dict) else ()
    if keys and all(isinstance(one, dict) and one.keys() == keys for one in rows):
        return {key: _column([one[key] for one in rows]) for key in keys}
    return _column(rows)


def _column(rows: Sequence[Any]) -> Array:
    """One value a row: arrays and numbers are stacked if none changes; other values are one JSON a row."""
    arrays = [np.asarray(one) for one in rows if isinstance(one, (np.ndarray, int, float))]
    if len(arrays) == len(rows) and len({array.shape for array in arrays}) == 1:
        stacked = np.stack(arrays)
        alike = len({array.dtype.kind for array in arrays}) == 1
        has_datatype = stacked.dtype.kind in "US" or (stacked.dtype != object and str(stacked.dtype) in DATATYPES)
        if has_datatype and (alike or stacked.tolist() == [array.tolist() for array in arrays]):
            return stacked
    return np.array([_json(one) for one in rows], object)


def _outputs(model: ServedModel, answer: Any) -> dict[str, Array]:
    if isinstance(answer, dict) and answer and all(isinstance(value, np.ndarray) for value in answer.values()):
        return {name.encode().decode(): _sendable(array) for name, array in answer.items()}
    declared = _declared(model, "outputs")
    array = answer if isinstance(answer, np.ndarray) else np.array([_json(answer)], object)
    return {declared[0]["name"] if len(declared) == 1 else "output": _sendable(array)}


def _sendable(array: Array) -> Array:
    """The array, or texts as bytes, or one JSON text in place of what no datatype holds."""
    if array.dtype.kind == "U":
        return np.array([text.encode() for text in array.flat], object).reshape(array.shape)
    if array.dtype.kind == "S":
        return array.astype(object)
    return array if str(array.dtype) in DATATYPES else np.array([_json(array)], object)


def _json(value: Any) -> bytes:
    return (value if isinstance(value, str) else codec.json_only(value)).encode()


def _metadata(model: ServedModel) -> dict[str, Any]:
    return model.loaded.metadata if model.loaded else {}


def _declared(model: ServedModel, kind: str) -> list[dict[str, Any]]:
    """The inputs or outputs that a model declares, in the protocol's terms; if none, one that fits most models."""
    rows = [-1] if _metadata(model).get("batch") else []
    if declared := _metadata(model).get(kind):
        return [
            {
                "name": one.get("name", kind[:-1]),
                "datatype": DATATYPES.get(str(one.get("dtype", "uint8")), "BYTES"),
                "shape": [*rows, *(one.get("shape") or [-1])],
            }
            for one in declared
        ]
    if kind == "outputs":
        return [{"name": "output", "datatype": "BYTES", "shape": rows or [1]}]
    shape = (model.loaded and model.loaded.input_shape) or [-1, -1, -1]
    return [{"name": "input", "datatype": "UINT8", "shape": [*rows, *shape]}]
