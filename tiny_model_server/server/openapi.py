"""The OpenAPI 3.1 document of the HTTP port: each model with its schemas, its example, its answers and errors.

What is the same on each server stands in openapi.json, with an operation that is filled in for each model.
"""

import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tiny_model_server import __version__

_BASE = Path(__file__).with_name("openapi.json")
_RUN = "/models/{name}/run"
_REF = re.compile(r"#/(?:\$defs|definitions)/(.*)")
_NO_COMPONENT = re.compile(r"[^A-Za-z0-9._-]")


def document(models: Iterable[Mapping[str, Any]], *, needs_token: bool) -> dict[str, Any]:
    """The document, of models as ``ServedModel.describe`` describes them."""
    made: dict[str, Any] = json.loads(_BASE.read_text())
    made["info"]["version"] = __version__
    if not needs_token:
        made["security"].append({})
    operation = made["paths"].pop(_RUN)["post"]
    for model in models:
        path = _RUN.replace("{name}", quote(model["name"], safe=""))
        made["paths"][path] = {"post": _run(deepcopy(operation), model, made["components"]["schemas"])}
    return made


def _run(operation: dict[str, Any], model: Mapping[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The operation with what it says of a model; what the model's schemas define goes into ``schemas``."""
    name, given = model["name"], model.get("schema") or {}
    data, args, answer = (_hoisted(given.get(key, {}), name, schemas) for key in ("data", "args", "answer"))
    body = operation["requestBody"]["content"]
    body["application/json"]["schema"] = data
    if model.get("example") is not None:
        body["application/json"]["example"] = model["example"]
    body["multipart/form-data"]["schema"]["properties"] |= {"data": data, "args": args}
    operation["parameters"][0]["content"]["application/json"]["schema"] = args
    operation["responses"]["200"]["content"]["application/json"]["schema"] = answer
    return operation | {"tags": [name], "summary": f"Run {name}", "operationId": f"run_{name}"}


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
        changed["$ref"] = f"#/components/schemas/{_component(model, found[1])}"
    return changed


def _component(model: str, name: str) -> str:
    return _NO_COMPONENT.sub("_", f"{model}.{name}")
