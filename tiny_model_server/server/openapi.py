"""The OpenAPI 3.1 document of the HTTP port: each model with its schemas, its example, its answers and errors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from tiny_model_server import __version__

_ERRORS = {
    400: "the input, the args or a header is wrong",
    401: "the token is missing or wrong",
    403: "the caller may not do this",
    404: "there is no such model",
    406: "the answer cannot be sent as Accept asks",
    409: "the model is not loaded",
    413: "the body is too large",
    415: "the Content-Encoding is not known",
    429: "the server has too much to do; Retry-After says when to ask again",
    500: "the model failed",
    503: "the server is stopping",
    504: "the model took too long",
}
_FILES = ("image/png", "image/jpeg", "application/x-npy", "application/x-npz", "application/octet-stream")
_TEXT = {"schema": {"type": "string"}}
_JSON_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_ACTION = _NAME | {"name": "action", "schema": {"enum": ["load", "unload", "reload"]}}
_REF = re.compile(r"#/(?:\$defs|definitions)/(.*)")
_NO_COMPONENT = re.compile(r"[^A-Za-z0-9._-]")


def document(models: Iterable[Mapping[str, Any]], *, needs_token: bool) -> dict[str, Any]:
    """The document, of models as ``ServedModel.describe`` describes them."""
    schemas: dict[str, Any] = {
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "string"}, "status": {"type": "string"}},
        }
    }
    error = {"description": "What went wrong", "content": {"application/json": {"schema": _ref("Error")}}}
    runs = {f"/models/{quote(one['name'], safe='')}/run": {"post": _run(one, schemas)} for one in models}
    token = {"type": "http", "scheme": "bearer", "description": "TMS_TOKEN, or TMS_ADMIN_TOKEN to change models"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tiny Model Server", "version": __version__},
        "security": [{"token": []}, *([] if needs_token else [{}])],
        "paths": _paths() | runs,
        "components": {"schemas": schemas, "responses": {"Error": error}, "securitySchemes": {"token": token}},
    }


def _paths() -> dict[str, Any]:
    """What does not run a model."""
    gets = {"/models": "All models", "/models/{name}": "One model", "/stats": "Numbers of all models"}
    gets |= {"/livez": "Is the server alive?", "/readyz": "Are all models ready?"}
    paths: dict[str, Any] = {}
    for path, summary in gets.items():
        parameters = [_NAME] if "{" in path else []
        paths[path] = {"get": _operation("server", summary, _JSON_OBJECT, (401, 403, 404, 503), parameters)}
    paths["/metrics"] = {"get": _operation("server", "Metrics for Prometheus", {"text/plain": _TEXT}, (403,))}
    summary = "Load, unload or reload a model"
    change = _operation("server", summary, _JSON_OBJECT, (400, 401, 403, 404, 409, 500, 503), [_NAME, _ACTION])
    return paths | {"/models/{name}/{action}": {"post": change}}


def _run(model: Mapping[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    name, given = model["name"], model.get("schema") or {}
    data, args, answer = (_hoisted(given.get(key, {}), name, schemas) for key in ("data", "args", "answer"))
    example = {} if model.get("example") is None else {"example": model["example"]}
    fields = {"image": {}, "text": _TEXT["schema"], "data": data, "args": args}
    inputs = {"application/json": {"schema": data} | example, "text/plain": _TEXT, "image/*": {}}
    inputs |= {kind: {} for kind in _FILES[2:]}
    inputs["multipart/form-data"] = {"schema": {"type": "object", "properties": fields}}
    answers = {"application/json": {"schema": answer}, "text/event-stream": _TEXT, "text/plain": _TEXT}
    parameters = [{"name": "args", "in": "query", "content": {"application/json": {"schema": args}}}]
    operation = _operation(name, f"Run {name}", answers | {kind: {} for kind in _FILES}, _ERRORS, parameters)
    return operation | {"operationId": f"run_{name}", "requestBody": {"required": True, "content": inputs}}


def _operation(
    tag: str, summary: str, answers: Any, errors: Iterable[int], parameters: Iterable[Any] = ()
) -> dict[str, Any]:
    responses = {str(code): _ref("Error", "responses") | {"description": _ERRORS[code]} for code in errors}
    responses |= {"200": {"description": "The answer", "content": answers}}
    return {"tags": [tag], "summary": summary, "parameters": [*parameters], "responses": responses}


def _hoisted(schema: Any, model: str, schemas: dict[str, Any]) -> Any:
    """A model's schema, with what it defines as components: in this document, its references would lead nowhere."""
    for key in ("$defs", "definitions"):
        schemas |= {_component(model, name): _referring(one, model) for name, one in schema.get(key, {}).items()}
    return _referring({key: one for key, one in schema.items() if key not in ("$defs", "definitions")}, model)


def _referring(schema: Any, model: str) -> Any:
    """A schema whose references lead to the components of a model."""
    if isinstance(schema, list):
        return [_referring(one, model) for one in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _referring(one, model) for key, one in schema.items()}
    if isinstance(name := schema.get("$ref"), str) and (found := _REF.fullmatch(name)):
        changed |= _ref(_component(model, found[1]))
    return changed


def _component(model: str, name: str) -> str:
    return _NO_COMPONENT.sub("_", f"{model}.{name}")


def _ref(name: str, kind: str = "schemas") -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}
