"""OpenAI's HTTP API (/v1/...) for models that declare metadata = {"task": "embeddings"} or {"task": "chat"}.

Fields of a request that OpenAI's API has, but this file does not read, are the model's ``args``.
"""

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from types import NoneType
from typing import Any
from uuid import uuid4

import numpy as np
from starlette.responses import Response

from tiny_model_server import codec
from tiny_model_server.codec import Array, Buffer, Encoded, EncodedImage
from tiny_model_server.engine.call import Call, Run, answers
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import InvalidInput, ModelError, ModelNotFound, ServerError

PATHS = {"embeddings": "/v1/embeddings", "chat": "/v1/chat/completions"}
"""Where the models of each task are called."""
MAX_IMAGES = 64
"""Images in the messages of one request; a worker decodes all of them at once."""
_UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields for OpenAI's own accounts. Calls that differed in such an argument could not share a batch."""
_KINDS = {
    "INVALID_ARGUMENT": ("invalid_request_error", "invalid_value"),
    "NOT_FOUND": ("invalid_request_error", "model_not_found"),
    "UNAUTHENTICATED": ("authentication_error", "invalid_api_key"),
    "PERMISSION_DENIED": ("permission_error", "permission_denied"),
    "RESOURCE_EXHAUSTED": ("rate_limit_error", "rate_limit_exceeded"),
}
"""OpenAI's types and codes of errors by the status; all others are errors of the server."""
_IMAGE_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
_NO_TOKENS = (
    "token ids are not understood, because each model has a tokenizer of its own "
    "(LangChain sends texts with OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
_EVENTS_AT_ONCE = 64
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class WrongField(InvalidInput):
    """A field of a request has a value that it may not have."""

    def __init__(self, param: str, wanted: str) -> None:
        super().__init__(f"{param} must be {wanted}")
        self.param = param


class OpenAI:
    """What OpenAI's API asks of the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._created = int(time.time())

    def models(self) -> dict[str, Any]:
        """The models that declare a task; with TMS_LAZY, also those whose task is not known yet."""
        models = [one for one in self._engine.models() if _task(one) in PATHS or self._is_unknown(one)]
        return {"object": "list", "data": [self._describe(model) for model in models]}

    def model(self, name: str) -> dict[str, Any]:
        """One of them; ModelNotFound if there is none of this name."""
        model = self._engine.model(name)
        return self._describe(model if self._is_unknown(model) else self.declared(name, Call(), *PATHS))

    def embeddings(self, body: Buffer, call: Call) -> Response:
        """The vectors of one or more texts, each an input of its own."""
        fields = _parsed(body)
        name = self.declared(fields.pop("model", None), call, "embeddings").name
        texts = self._texts(fields.pop("input", None))
        encoding = fields.pop("encoding_format", None) or "float"
        if encoding not in ("float", "base64"):
            raise WrongField("encoding_format", "float or base64")
        outcomes = self._engine.run_batch(name, [codec.encode(text) for text in texts], _args(fields), call)
        values = map(codec.decode, answers(outcomes, "input[{}]: "))
        vectors, usages = zip(*map(_vector, values), strict=True)
        shown = [_base64(one) if encoding == "base64" else one.tolist() for one in vectors]
        data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)]
        usage = {count: sum(one[count] for one in usages) for count in ("prompt_tokens", "total_tokens")}
        return _json({"object": "list", "data": data, "model": name, "usage": usage})

    def declared(self, name: Any, call: Call, *tasks: str) -> ServedModel:
        """The loaded model of this name. ModelNotFound unless it declares one of the tasks."""
        if not isinstance(name, str):
            raise WrongField("model", "the name of a model, a text")
        model = self._engine.wait(self._engine.loaded(name), call=call)
        if (task := _task(model)) not in tasks:
            other = f"its task is {task!r}" if task else "it has no task"
            hint = f"post to {PATHS[task]}" if task in PATHS else f"{other}; see /v1/models"
            wanted = " or ".join(f'metadata = {{"task": "{one}"}}' for one in tasks)
            raise ModelNotFound(f"model {name!r} does not declare {wanted}; {hint}")
        return model

    def _is_unknown(self, model: ServedModel) -> bool:
        return self._engine.settings.lazy and model.loaded is None and model.state is not State.FAILED

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        author = model.loaded.metadata.get("author") if model.loaded else None
        owner = str(author or "tiny-model-server")
        return {"id": model.name, "object": "model", "created": self._created, "owned_by": owner}

    def _texts(self, found: Any) -> list[str]:
        texts, most = [found] if isinstance(found, str) else found, self._engine.settings.max_items
        if not isinstance(texts, list) or len(texts) > most:
            raise WrongField("input", f"a text, or a list of at most {most} texts (TMS_MAX_ITEMS)")
        if not all(isinstance(text, str) for text in texts):
            raise WrongField("input", f"text; {_NO_TOKENS}")
        return texts


class Chat:
    """One request for a chat completion, and its answer: whole, or as events."""

    def __init__(self, engine: Engine, api: OpenAI) -> None:
        self._engine, self._api = engine, api
        self._head: dict[str, Any] = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time())}
        self._finish_reason, self._usage, self._tool_calls = "", _usage({}), 0
        self._include_usage = False
        self._role = {"role": "assistant"}  # for the first event alone

    def begin(self, body: Buffer, call: Call) -> Response | AbstractContextManager[Run]:
        """Runs the model and returns the whole answer; or begins the run whose values ``events`` reads."""
        fields = _parsed(body)
        name = self._head["model"] = self._api.declared(fields.pop("model", None), call, "chat").name
        stream, options = fields.pop("stream", None) or False, fields.pop("stream_options", None) or {}
        if not isinstance(stream, bool) or not isinstance(options, dict):
            raise WrongField("stream", 'true or false, and stream_options an object such as {"include_usage": true}')
        if fields.pop("n", None) not in (None, 1):
            raise WrongField("n", "1: a request gets one answer")
        self._include_usage = options.get("include_usage") is True
        messages, args = codec.encode(_messages(fields.pop("messages", None))), _args(fields)
        if stream:
            return self._engine.streaming(name, messages, args, call, json_only=True)
        return _json(self._whole(self._engine.run(name, messages, args, call, json_only=True)))

    async def events(self, values: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        """The events of the values' JSON texts: one for each piece of the answer, then how it ended."""
        async for text in values:
            made = map(self._delta_event, filter(None, map(self._delta, _pieces(text))))
            while some := "".join(islice(made, _EVENTS_AT_ONCE)):
                yield some
                await asyncio.sleep(0)  # a value may be a million pieces, and others wait for this loop
        yield self._event([{"index": 0, "delta": self._role, "finish_reason": self._finished()}])
        if self._include_usage:
            yield self._event([], self._usage)
        yield "data: [DONE]\n\n"

    def _delta_event(self, delta: dict[str, Any]) -> str:
        role, self._role = self._role, {}
        return self._event([{"index": 0, "delta": role | delta, "finish_reason": None}])

    def _event(self, choices: list[Any], usage: dict[str, int] | None = None) -> str:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return f"data: {codec.standard_json(chunk | ({'usage': usage} if self._include_usage else {}))}\n\n"

    def _whole(self, answer: Encoded) -> dict[str, Any]:
        added: dict[str, list[Any]] = {"role": ["assistant"], "content": []}
        for delta in map(self._delta, _pieces(answer.text)):
            for key, value in delta.items():
                added.setdefault(key, []).append(value)
        message = {key: _joined(values) for key, values in added.items()}
        choice = {"index": 0, "message": message, "finish_reason": self._finished(), "logprobs": None}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage}

    def _delta(self, piece: Any) -> dict[str, Any]:
        """What a piece adds to the message. ModelError if a chat model may not answer so."""
        delta = {"content": piece} if isinstance(piece, str) else piece
        known = isinstance(delta, dict) and delta.keys() & {"content", "tool_calls", "finish_reason", "usage"}
        if not known or not isinstance(delta.get("content"), (str, NoneType)):
            wanted = "texts, or dicts with some of content (a text), tool_calls, finish_reason and usage"
            raise ModelError(f"a chat model must return or yield {wanted}, not {piece!r:.80}")
        self._finish_reason = str(delta.pop("finish_reason", None) or self._finish_reason)
        self._usage = _usage(delta.pop("usage", None)) or self._usage
        if calls := delta.pop("tool_calls", None):
            calls = calls if isinstance(calls, list) else [calls]
            delta["tool_calls"] = [_tool_call(index, one) for index, one in enumerate(calls, self._tool_calls)]
            self._tool_calls += len(calls)
        return delta

    def _finished(self) -> str:
        return self._finish_reason or ("tool_calls" if self._tool_calls else "stop")


def _task(model: ServedModel) -> str:
    task = model.loaded.metadata.get("task") if model.loaded else None
    return task if isinstance(task, str) else ""


def error(message: str, cause: ServerError | None) -> dict[str, Any]:
    """An error in OpenAI's form; without a cause it is the request's, as HTTP sees it."""
    status = cause.status if cause else "INVALID_ARGUMENT"
    kind, code = _KINDS.get(status, ("server_error", status.lower()))
    return {"error": {"message": message, "type": kind, "param": getattr(cause, "param", None), "code": code}}


def error_event(found: ServerError) -> str:
    """The event that ends a stream which has failed."""
    return f"data: {codec.standard_json(error(str(found), found))}\n\n"


# ---- from requests to values


def _parsed(body: Buffer) -> dict[str, Any]:
    try:
        fields = codec.parse_json(str(body, "utf-8"))
    except UnicodeDecodeError:
        raise InvalidInput("the body must be JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise InvalidInput('the body must be a JSON object such as {"model": "NAME", ...}')
    return fields


def _args(fields: dict[str, Any]) -> dict[str, Any]:
    args = {name: value for name, value in fields.items() if value is not None and name not in _UNUSED}
    if "max_completion_tokens" in args:  # the newer name of the same
        args["max_tokens"] = args.pop("max_completion_tokens")
    return args


def _messages(found: Any) -> list[dict[str, Any]]:
    """The messages; the content of each is a text, or a list of text and image parts if it has images."""
    fits = isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in found)
    if not found or not fits:
        raise WrongField("messages", 'a list of objects such as {"role": "user", "content": "hello"}')
    contents = [one.get("content") for one in found]
    images = sum(map(_is_image, chain.from_iterable(one for one in contents if isinstance(one, list))))
    if images > MAX_IMAGES:
        raise WrongField("messages", f"messages with at most {MAX_IMAGES} images, not {images}")
    places = (f"messages[{index}].content" for index in range(len(found)))
    return [one | {"content": _content(content, at)} for one, content, at in zip(found, contents, places, strict=True)]


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _content(found: Any, where: str) -> Any:
    if found is None or isinstance(found, str):
        return found
    if not isinstance(found, list):
        raise WrongField(where, "a text, or a list of parts of type text or image_url")
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(found)]
    return parts if any(map(_is_image, found)) else "\n".join(part["text"] for part in parts)


def _part(found: Any, where: str) -> dict[str, Any]:
    if _is_image(found):
        url = found.get("image_url")
        return {"type": "image", "image": _image(url.get("url") if isinstance(url, dict) else url, where)}
    if isinstance(found, dict) and found.get("type") == "text" and isinstance(found.get("text"), str):
        return {"type": "text", "text": found["text"]}
    raise WrongField(where, 'a part such as {"type": "text", "text": "hello"}, or one of type image_url')


def _image(url: Any, where: str) -> EncodedImage:
    begins = _IMAGE_URL.match(url) if isinstance(url, str) else None
    try:
        return EncodedImage(base64.b64decode(url[begins.end() :] if begins else "?", validate=True))
    except ValueError:
        wanted = "an image as a data URL, data:image/png;base64,...; the server fetches nothing from other addresses"
        raise WrongField(where, wanted) from None


# ---- from outcomes to answers


def _vector(value: Any) -> tuple[Array, dict[str, int]]:
    """The vector and the token counts of an answer; ModelError unless it is a list of numbers, or a dict with one."""
    usage: Any = None
    if isinstance(value, dict):
        value, usage = value.get("embedding"), value.get("usage")
    try:
        vector = np.asarray(value)
    except ValueError:  # lists of different lengths
        vector = np.empty(0, object)
    if vector.ndim != 1 or vector.dtype.kind not in "iuf":
        raise ModelError(
            "an embedding model must return a vector of numbers for each text, or a dict with one as embedding, "
            f"not {vector.dtype} of shape {list(vector.shape)}"
        )
    return vector, _usage(usage or {})


def _base64(vector: Array) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _usage(found: Any) -> dict[str, int]:
    """The token counts that a model reports; those that it does not report are 0. ModelError for anything else."""
    if found is None:
        return {}
    counts: dict[str, Any] = {name: found.get(name, 0) for name in _COUNTS} if isinstance(found, dict) else {"": None}
    if not all(type(count) is int for count in counts.values()):
        raise ModelError(f"usage must be a dict with some of {', '.join(_COUNTS)}, whole numbers; it is {found!r:.80}")
    counts["total_tokens"] = counts["total_tokens"] or counts["prompt_tokens"] + counts["completion_tokens"]
    return counts


def _pieces(text: str) -> list[Any]:
    """The pieces of an answer: a list of what a generator has yielded, or one."""
    value = json.loads(text)
    return value if isinstance(value, list) else [value]


def _joined(values: list[Any]) -> Any:
    """Texts and lists one after the other; of anything else the last."""
    values = [value for value in values if value is not None]
    kinds = set(map(type, values))
    if kinds in ({str}, {list}):
        return "".join(values) if kinds == {str} else list(chain.from_iterable(values))
    return values[-1] if values else None


def _tool_call(index: int, found: Any) -> dict[str, Any]:
    """OpenAI's form of a call, in which the arguments are a JSON text."""
    function = found.get("function", found) if isinstance(found, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ModelError(f'a tool call must be a dict such as {{"name": "f", "arguments": {{}}}}, not {found!r:.80}')
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else codec.standard_json(arguments)
    call = {"index": index, "id": found.get("id") or f"call_{uuid4().hex}", "type": "function"}
    return call | {"function": {"name": function["name"], "arguments": text}}


def _json(value: Any) -> Response:
    return Response(codec.standard_json(value), media_type="application/json")
