"""ModzyModel: the Modzy container's one model, described by its ``metadata``.

An item's inputs are bytes by name: image files, texts or bytes, by what they are or what the metadata's media types
say; one input is the model's data, several are a dictionary. The answer is ``results.json``; arrays in it that the
metadata names as outputs with an image media type are files of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiny_model_server import codec, image_files, schemas
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import InvalidInput, ModelUnavailable, ServerError, message_of

SCHEMA = "modzy"
SERVICE = "ModzyModel"

_CODES = {200: "OK", 202: "Accepted", 403: "Forbidden", 422: "Unprocessable Entity", 500: "Internal Server Error"}
RESULTS = "results.json"


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    return schemas.handlers(_Modzy(engine), SCHEMA, SERVICE)


class _Modzy:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def Status(self, request: Any, call: Call) -> dict[str, Any]:
        try:
            described = _described(self._loaded(call))
        except ServerError as error:
            return _answer(500, message_of(error))
        return _answer(200, "The model is ready.", **described)

    def Run(self, request: Any, call: Call) -> dict[str, Any]:
        args = {name: True for name in ("explain", "detect_drift") if getattr(request, name)}
        try:
            model = self._loaded(call)
            items = [_item(index, one.input, model) for index, one in enumerate(request.inputs)]
            outcomes = self._engine.run_batch(model.name, items, args, call)
            outputs = [_output(outcome, model) for outcome in outcomes]
        except ServerError as error:
            return _answer(422 if isinstance(error, InvalidInput) else 500, message_of(error))
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServerError)]
        if len(errors) == len(items) and all(isinstance(error, InvalidInput) for error in errors):
            return _answer(422, f"no input can be processed: {message_of(errors[0])}", outputs=outputs)
        return _answer(200, "Success with errors." if errors else "Success.", outputs=outputs)

    def Shutdown(self, request: Any, call: Call) -> dict[str, Any]:
        try:
            self._engine.access.authorize(call)
        except ServerError as error:
            return _answer(403, message_of(error))
        self._engine.request_stop()
        return _answer(202, "The model is shutting down.")

    def _loaded(self, call: Call) -> ServedModel:
        models, name = self._engine.models(), self._engine.settings.modzy_model
        if not name and len(models) != 1:
            raise ModelUnavailable(f"there are {len(models)} models; TMS_MODZY_MODEL must name the one to serve")
        model = self._engine.model(name or models[0].name)
        if model.state is State.READY:
            return model
        self._engine.authorize_load(model, call)
        return self._engine.wait(self._engine.load(model.name))


def _answer(code: int, message: str, **fields: Any) -> dict[str, Any]:
    return {"status_code": code, "status": _CODES[code], "message": message} | fields


def _metadata(model: ServedModel, kind: str) -> list[dict[str, Any]]:
    return (model.loaded.metadata.get(kind) or []) if model.loaded else []


def _described(model: ServedModel) -> dict[str, Any]:
    """The fields of a StatusResponse."""
    if model.loaded is None:
        raise ModelUnavailable(f"model {model.name!r} is not loaded")
    facts, options = model.loaded.metadata, model.loaded.options

    def known(*names: str, prefix: str = "") -> dict[str, Any]:
        return {prefix + name: facts[name] for name in names if name in facts}

    features = known("adversarial_defense", "retrainable", "results_format", "drift_format", "explanation_format")
    about = {"model_name": model.name} | known("name", "version", "author", "type", prefix="model_") | known("source")
    return {
        "model_info": _texts(about),
        "description": _texts(known("summary", "details", "technical", "performance")),
        "inputs": [
            {"filename": "input"} | _file(one) | {"accepted_media_types": one.get("media_types") or []}
            for one in _metadata(model, "inputs") or [{}]
        ],
        "outputs": [
            {"filename": RESULTS, "media_type": "application/json"} | _file(one, "media_type")
            for one in _metadata(model, "outputs") or [{}]
        ],
        "resources": known("required_ram", "num_cpus", "num_gpus"),
        "timeout": {"status": f"{options.load_timeout_s:g}s", "run": f"{options.timeout_s:g}s"},
        "features": features | {"batch_size": options.max_batch_size},
    }


def _file(declared: Mapping[str, Any], *names: str) -> dict[str, str]:
    found = {name: declared[name] for name in ("max_size", "description", *names) if name in declared}
    return _texts(found | ({"filename": declared["name"]} if "name" in declared else {}))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _item(index: int, item: Mapping[str, bytes], model: ServedModel) -> Encoded:
    """The inputs of one item; where the metadata names them, they must be these."""
    declared = [one for one in _metadata(model, "inputs") if "name" in one]
    kinds = {one["name"]: next(iter(one.get("media_types") or []), "") for one in declared}
    if not item or (kinds and item.keys() != kinds.keys()):
        wanted = ", ".join(sorted(kinds)) or "at least one"
        raise InvalidInput(f"item {index} has the inputs {sorted(item)}; it must have {wanted}")
    try:
        values = {name: codec.from_bytes(data, kinds.get(name, "")) for name, data in item.items()}
    except InvalidInput as error:
        raise InvalidInput(f"item {index}: {error}") from None
    return codec.encode(values if len(values) > 1 else next(iter(values.values())))


def _output(outcome: Encoded | ServerError, model: ServedModel) -> dict[str, Any]:
    """An OutputItem: the images that the metadata declares as files, the rest of the answer as RESULTS."""
    if isinstance(outcome, ServerError):
        return {"output": {"error": message_of(outcome).encode()}, "success": False}
    value, files = codec.decode(outcome), {}
    outputs = _metadata(model, "outputs")
    for name, kind in ((one.get("name", ""), str(one.get("media_type", ""))) for one in outputs):
        found = value if isinstance(value, dict) else {name: value} if len(outputs) == 1 else {}
        if kind.startswith("image/") and isinstance(found.get(name), np.ndarray):
            files[name] = image_files.image_file(found[name], kind)
            value = {key: rest for key, rest in found.items() if key != name} if isinstance(value, dict) else None
    if value is not None or not files:
        files[RESULTS] = codec.json_only(value).encode()
    return {"output": files, "success": True}
