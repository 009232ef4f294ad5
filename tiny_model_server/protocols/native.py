"""server.Server: the project's own contract (``server.proto``), wire-compatible with the first Tiny Model Server."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Array, Encoded, EncodedImage, Placed
from tiny_model_server.engine.batcher import Outcome
from tiny_model_server.engine.call import Call, answers
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel
from tiny_model_server.errors import CODES, CannotDo, InvalidInput, Overloaded, ServerError
from tiny_model_server.shared_memory import Place, SharedBuffers, check_place, read_arrays, write_arrays

SCHEMA = "server"
SERVICE = "server.Server"
_ENCODED_IMAGE = codec.encode(EncodedImage(b"")).text
_Response = schemas.message(SCHEMA, "server.Response")
_ImageResponse = schemas.message(SCHEMA, "server.ImageResponse")


class Work(NamedTuple):
    """What a request asks a model to do, and the function that makes a response of the outcomes."""

    model: str
    values: list[Encoded]
    args: dict[str, Any]
    json_only: bool
    answer: Callable[[list[Outcome]], Any]


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method. It waits for the engine."""

    def blocking(convert: Callable[[Any, Call], Work], request: Any, call: Call) -> Any:
        work = convert(request, call)
        return work.answer(engine.run_batch(work.model, work.values, work.args, call, json_only=work.json_only))

    runs = {name: partial(blocking, convert) for name, convert in converters().items()}
    return schemas.handlers(_Others(engine), SCHEMA, SERVICE) | runs


def converters() -> dict[str, Callable[[Any, Call], Work]]:
    """The methods that run a model and answer once: what each asks of the engine."""
    functions = (RunText, RunImage, RunBatchText, RunBatchImage, RunImageToImage, Run, RunBatch)
    return {function.__name__: function for function in functions}


def RunText(request: Any, call: Call) -> Work:
    return _single(request, codec.encode(request.text), call)


def RunImage(request: Any, call: Call) -> Work:
    return _single(request, _image(request.image, call), call)


def Run(request: Any, call: Call) -> Work:
    return _single(request, _value(request.data, call), call)


def RunImageToImage(request: Any, call: Call) -> Work:
    args, image = codec.parse_args(request.args), _image(request.image, call)
    return Work(
        request.model, [image], args, False, lambda outcomes: _image_answer(answers(outcomes)[0], request, call)
    )


def RunBatchText(request: Any, call: Call) -> Work:
    return _batch(request, [codec.encode(text) for text in request.texts], not request.accept_arrays, call)


def RunBatchImage(request: Any, call: Call) -> Work:
    return _batch(request, _each(_image, request.images, call), not request.accept_arrays, call)


def RunBatch(request: Any, call: Call) -> Work:
    return _batch(request, _each(_value, request.items, call), False, call)


class _Others:
    """The methods that do not run a model, or that stream; most return the fields of the response."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def RunStream(self, request: Any, call: Call) -> Iterator[Any]:
        args, value = codec.parse_args(request.args), _value(request.data, call)
        for outcome in self._engine.run_stream(request.model, value, args, call):
            yield _answer(outcome, call)

    def ListModels(self, request: Any, call: Call) -> Any:
        return _json([model.name for model in self._engine.models()])

    def GetModelStates(self, request: Any, call: Call) -> Any:
        models = self._engine.models()
        return {"models": [{"name": one.name, "state": one.state, "reason": one.reason} for one in models]}

    def GetInputShape(self, request: Any, call: Call) -> Any:
        return _json(self._engine.input_shape(call.model or request.data))

    def GetPID(self, request: Any, call: Call) -> Any:
        return _json({"pid": os.getpid()})

    def GetNumParallelWorkers(self, request: Any, call: Call) -> Any:
        # Old clients open channels until they have seen this many pids; one address has one.
        return _json({"num_workers": 1})

    def GetModelInfo(self, request: Any, call: Call) -> Any:
        return _info(self._engine.model(request.model))

    def LoadModel(self, request: Any, call: Call) -> Any:
        self._engine.access.authorize(call)
        return _info(self._engine.wait(self._engine.load(request.model, request.workers)))

    def UnloadModel(self, request: Any, call: Call) -> Any:
        self._engine.access.authorize(call)
        return _info(self._engine.wait(self._engine.unload(request.model)))

    def ReloadModel(self, request: Any, call: Call) -> Any:
        self._engine.access.authorize(call)
        return _info(self._engine.wait(self._engine.reload(request.model)))

    def StopServer(self, request: Any, call: Call) -> Any:
        self._engine.access.authorize(call)
        self._engine.request_stop()
        return _json({"stopping": True})


def _single(request: Any, value: Encoded, call: Call) -> Work:
    args, json_only = codec.parse_args(request.args), not getattr(request, "accept_arrays", True)
    return Work(request.model, [value], args, json_only, lambda outcomes: _answer(answers(outcomes)[0], call))


def _batch(request: Any, values: list[Encoded], json_only: bool, call: Call) -> Work:
    answer = _json_items if json_only else partial(_items, call=call)
    return Work(request.model, values, codec.parse_args(request.args), json_only, answer)


def _each(convert: Callable[[Any, Call], Encoded], messages: Sequence[Any], call: Call) -> list[Encoded]:
    values = []
    for index, message in enumerate(messages):
        try:
            values.append(convert(message, call))
        except InvalidInput as error:
            raise InvalidInput(f"item {index}: {error}") from None
    return values


# ---- from messages to values


def _image(image: Any, call: Call) -> Encoded:
    if image.encoded:
        return _received(_ENCODED_IMAGE, [("uint8", None, image)], call)
    shape = codec.image_shape(image.height, image.width, image.channels)
    return _received(codec.ARRAY, [(image.dtype or "uint8", shape, image)], call)


def _value(value: Any, call: Call) -> Encoded:
    encoded = _received(value.json, [(one.dtype, one.shape, one) for one in value.arrays], call)
    codec.check(encoded.text, encoded.arrays)  # malformed JSON and references to no array are refused before they queue
    return encoded


def _received(text: str, described: Sequence[tuple[str, Sequence[int] | None, Any]], call: Call) -> Encoded:
    """A value with its arrays, each (dtype, shape or None, message with data or place)."""
    if described and call.trailing_bytes is None and described[0][2].HasField("place"):
        return _placed(text, [(dtype, shape, message.place) for dtype, shape, message in described], call)
    found = [message.data for _, _, message in described]
    if call.trailing_bytes is not None:
        found[-1] = call.trailing_bytes
    return Encoded(text, [codec.array_from(*one[:2], data) for one, data in zip(described, found, strict=True)])


def _placed(text: str, described: Sequence[tuple[str, Sequence[int] | None, Any]], call: Call) -> Encoded:
    """A value whose arrays, each (dtype, shape or None, place), stay in the memory that the caller shares.

    InvalidInput if they are not there; Overloaded if a request names too many bytes, as places may overlap.
    """
    if call.buffers is None:
        raise InvalidInput("place is for callers that share memory with the server; send the bytes as data")
    arrays, places = [], []
    for dtype, shape, place in described:
        try:
            check_place(call.buffers.request, place.offset, place.length)
        except ValueError as error:
            raise InvalidInput(str(error)) from None
        call.placed += place.length
        arrays.append(codec.placed(dtype, shape, place.length))
        places.append((place.offset, dtype, arrays[-1].shape))
    if call.placed > call.largest:
        raise Overloaded(f"{call.placed} bytes of arrays, more than TMS_MAX_MESSAGE_MB allows", retry_after_ms=-1)
    return Encoded(text, arrays, (call.buffers, places))


# ---- from outcomes to messages


def _answer(outcome: Encoded, call: Call) -> Any:
    answer = _Response(data=outcome.text)
    parts = _describe_arrays(answer, outcome)
    if not parts or not _trails(outcome.arrays[-1], call):
        _send([(parts, outcome)], call)
        return answer
    _send([(parts[:-1], Encoded("", outcome.arrays[:-1]))], call)
    owner = parts[-1].SerializeToString()
    del answer.arrays[-1]
    return schemas.WithTrailingBytes(answer, owner, codec.raw(outcome.arrays[-1]))


def _image_answer(outcome: Encoded, request: Any, call: Call) -> Any:
    if outcome.shared and len(outcome.arrays) > 1:  # those beside the image become JSON
        buffers: SharedBuffers = outcome.shared[0]
        outcome = Encoded(outcome.text, read_arrays(buffers.response, outcome.shared[1]))
    image, rest = codec.decode(outcome), None
    if isinstance(image, dict) and isinstance(image.get("image"), (np.ndarray, Placed)):
        rest, image = image, image.pop("image")
    try:
        codec.check_image(image)
    except (InvalidInput, AttributeError):
        kind = f"{image.dtype} of shape {image.shape}" if hasattr(image, "dtype") else type(image).__name__
        raise CannotDo(f"model {request.model!r} answers with {kind}, not an image; use RunImage") from None
    height, width, channels = (*image.shape, 1)[:3]
    fields = {"height": height, "width": width, "channels": channels, "dtype": codec.dtype_name(image.dtype)}
    answer = _ImageResponse(data=codec.json_only(rest or None), image=fields)
    if _trails(image, call):
        return schemas.WithTrailingBytes(answer, b"", codec.raw(image))
    _send([([answer.image], outcome if len(outcome.arrays) == 1 else Encoded("", [image]))], call)
    return answer


def _items(outcomes: list[Outcome], call: Call) -> Any:
    answer, filled = _Response(), []
    for outcome in outcomes:
        item = answer.items.add()
        if isinstance(outcome, ServerError):
            item.error.code, item.error.message = CODES[outcome.status], str(outcome)
        else:
            item.value.json = outcome.text
            filled.append((_describe_arrays(item.value, outcome), outcome))
    _send(filled, call)
    return answer


def _json_items(outcomes: list[Outcome]) -> Any:
    texts = [outcome.text for outcome in answers(outcomes, "item {}: ")]
    return _Response(data=f"[{', '.join(texts)}]")


def _json(value: Any) -> dict[str, Any]:
    return {"data": json.dumps(value)}


def _info(model: ServedModel) -> dict[str, Any]:
    facts = {name: fact for name, fact in model.describe().items() if name != "example"}
    return facts | {name: json.dumps(facts[name]) for name in ("input_shape", "metadata", "schema")}


def _trails(array: Array, call: Call) -> bool:
    return not call.buffers and array.nbytes > schemas.LARGE


def _describe_arrays(message: Any, outcome: Encoded) -> list[Any]:
    """Adds the arrays to a message, but for their bytes, which ``_send`` adds."""
    return [message.arrays.add(dtype=codec.dtype_name(one.dtype), shape=one.shape) for one in outcome.arrays]


def _send(filled: Sequence[tuple[list[Any], Encoded]], call: Call) -> None:
    """Adds the bytes of arrays to their messages; or puts them into the caller's response buffer, and says where."""
    unplaced: list[tuple[Any, Array]] = []
    placed: list[tuple[Any, Array, Place]] = []
    for parts, outcome in filled:
        if outcome.shared:  # a worker has put them there
            placed += zip(parts, outcome.arrays, outcome.shared[1], strict=True)
        else:
            unplaced += zip(parts, outcome.arrays, strict=True)
    if call.buffers and unplaced:
        places = write_arrays(call.buffers.response, [array for _, array in unplaced])
        placed += [(*one, place) for one, place in zip(unplaced, places, strict=True)]
    else:
        for part, array in unplaced:
            part.data = bytes(codec.raw(array))
    for part, array, (offset, *_) in placed:
        part.place.offset, part.place.length = offset, array.nbytes
