"""ModzyModel: the Modzy container's one model, told of by its ``metadata``.

An item's inputs are bytes by name: image files, texts or bytes, by what they are or what the metadata's media types
say; one input is the model's data, several are a dictionary. The answer is ``results.json``; arrays in it that the
metadata names as outputs with an image media type are files of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiny_model_server import codec, image_files, schemas
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import InvalidInput, ModelUnavailable, ServerError, message_of

SCHEMA = "modzy"
SERVICE = "ModzyModel"

_WORDS = {200: "OK", 202: "Accepted", 403: "Forbidden", 422: "Unprocessable Entity", 500: "Internal Server Error"}
RESULTS = "results.json"


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    door = _Modzy(engine)
    return {name: getattr(door, name) for name in schemas.methods(SCHEMA, SERVICE)}


class _Modzy:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._methods = schemas.methods(SCHEMA, SERVICE)

    def Status(self, request: Any, call: Call) -> Any:
        try:
            model = self._loaded(call)
        except ServerError as error:
            return self._answer("Status", 500, message_of(error))
        return self._answer("Status", 200, "The model is ready.", **_described(model))

    def Run(self, request: Any, call: Call) -> Any:
        asked = {"explain": request.explain, "detect_drift": request.detect_drift}
        try:
            model = self._loaded(call)
            kinds = _media_types(model)
            items = [_item(index, one.input, kinds) for index, one in enumerate(request.inputs)]
            args = {name: True for name, wanted in asked.items() if wanted}
            outcomes = self._engine.run_batch(model.name, items, args, call)
            outputs = [_output(outcome, model) for outcome in outcomes]
        except ServerError as error:
            return self._answer("Run", 422 if isinstance(error, InvalidInput) else 500, message_of(error))
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServerError)]
        if len(errors) == len(items) and all(isinstance(error, InvalidInput) for error in errors):
            return self._answer("Run", 422, f"no input can be processed: {message_of(errors[0])}", outputs=outputs)
        return self._answer("Run", 200, "Success with errors." if errors else "Success.", outputs=outputs)

    def Shutdown(self, request: Any, call: Call) -> Any:
        try:
            self._engine.authorize(call)
        except ServerError as error:
            return self._answer("Shutdown", 403, message_of(error))
        self._engine.request_stop()
        return self._answer("Shutdown", 202, "The model is shutting down.")

    def _answer(self, method: str, code: int, message: str, **fields: Any) -> Any:
        return self._methods[method].response(status_code=code, status=_WORDS[code], message=message, **fields)

    def _loaded(self, call: Call) -> ServedModel:
        models, name = self._engine.models(), self._engine.settings.modzy_model
        if not name and len(models) != 1:
            raise ModelUnavailable(f"there are {len(models)} models; TMS_MODZY_MODEL must name the one to serve")
        model = self._engine.model(name) if name else models[0]
        if model.state is State.READY:
            return model
        self._engine.authorize_load(model, call)
        return self._engine.load(model.name)


def _described(model: ServedModel) -> dict[str, Any]:
    told: Mapping[str, Any] = model.loaded.metadata if model.loaded else {}
    options = model.loaded.options if model.loaded else None

    def of(*names: str, **renamed: str) -> dict[str, Any]:
        wanted = dict(zip(names, names, strict=True)) | renamed
        return {field: told[name] for field, name in wanted.items() if name in told}

    info = {"model_name": model.name} | of(
        model_name="name", model_version="version", model_author="author", model_type="type", source="source"
    )
    return {
        "model_info": {field: str(value) for field, value in info.items()},
        "description": {field: str(v) for field, v in of("summary", "details", "technical", "performance").items()},
        "inputs": [
            {
                "filename": one.get("name", "input"),
                "accepted_media_types": one.get("media_types") or [],
                "max_size": str(one.get("max_size", "")),
                "description": str(one.get("description", "")),
            }
            for one in told.get("inputs") or [{}]
        ],
        "outputs": [
            {
                "filename": one.get("name", RESULTS),
                "media_type": one.get("media_type", "application/json"),
                "max_size": str(one.get("max_size", "")),
                "description": str(one.get("description", "")),
            }
            for one in told.get("outputs") or [{}]
        ],
        "resources": of("required_ram", "num_cpus", "num_gpus"),
        "timeout": {"status": f"{options.load_timeout_s:g}s", "run": f"{options.timeout_s:g}s"} if options else {},
        "features": of("adversarial_defense", "retrainable", "results_format", "drift_format", "explanation_format")
        | {"batch_size": options.max_batch_size if options else 1},
    }


def _media_types(model: ServedModel) -> dict[str, str]:
    inputs = (model.loaded.metadata.get("inputs") or []) if model.loaded else []
    return {one["name"]: next(iter(one.get("media_types") or []), "") for one in inputs if "name" in one}


def _item(index: int, item: Mapping[str, bytes], kinds: Mapping[str, str]) -> Encoded:
    """The inputs of one item; where the metadata names them, they must be these."""
    wanted = sorted(kinds) or ["at least one"]
    if not item or (kinds and item.keys() != kinds.keys()):
        raise InvalidInput(f"item {index} has the inputs {sorted(item)}; it must have {', '.join(wanted)}")
    try:
        values = {name: codec.from_bytes(data, kinds.get(name, "")) for name, data in item.items()}
    except InvalidInput as error:
        raise InvalidInput(f"item {index}: {error}") from None
    return codec.encode(next(iter(values.values())) if len(values) == 1 else values)


def _output(outcome: Encoded | ServerError, model: ServedModel) -> dict[str, Any]:
    if isinstance(outcome, ServerError):
        return {"output": {"error": message_of(outcome).encode()}, "success": False}
    value, files = codec.decode(outcome), {}
    outputs = (model.loaded.metadata.get("outputs") or []) if model.loaded else []
    for one in outputs:
        name = one.get("name", "")
        if str(one.get("media_type", "")).startswith("image/"):
            image = value.get(name) if isinstance(value, dict) else value if len(outputs) == 1 else None
            if isinstance(image, np.ndarray):
                files[name] = image_files.image_file(image, one["media_type"])
                value = {key: rest for key, rest in value.items() if key != name} if isinstance(value, dict) else None
    if value is not None or not files:
        files[RESULTS] = codec.json_only(value).encode()
    return {"output": files, "success": True}
