"""server.Server: the project's own contract (``server.proto``), wire-compatible with the first Tiny Model Server."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Array, Encoded, EncodedImage, Placed
from tiny_model_server.engine.batcher import Outcome
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.engine.repository import ServedModel
from tiny_model_server.errors import CODES, InvalidInput, ModelUnavailable, Overloaded, ServerError, from_status
from tiny_model_server.shared_memory import Place, SharedBuffers

SCHEMA = "server"
SERVICE = "server.Server"


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    door = _Native(engine)
    return {name: getattr(door, name) for name in schemas.methods(SCHEMA, SERVICE)}


class _Native:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._response = schemas.message(SCHEMA, "server.Response")
        self._image_response = schemas.message(SCHEMA, "server.ImageResponse")
        self._info = schemas.message(SCHEMA, "server.ModelInfo")
        self._states = schemas.message(SCHEMA, "server.ModelStates")

    def RunText(self, request: Any, call: Call) -> Any:
        return self._run(request, codec.encode(request.text), call)

    def RunImage(self, request: Any, call: Call) -> Any:
        return self._run(request, _image(request.image, call), call)

    def RunBatchText(self, request: Any, call: Call) -> Any:
        return self._run_batch(request, [codec.encode(text) for text in request.texts], call)

    def RunBatchImage(self, request: Any, call: Call) -> Any:
        return self._run_batch(
            request, [_named(_image, i, image, call) for i, image in enumerate(request.images)], call
        )

    def RunImageToImage(self, request: Any, call: Call) -> Any:
        args, image = codec.parse_args(request.args), _image(request.image, call)
        return self._engine.run(
            request.model, image, args, call, then=lambda packed: self._image_answer(packed, request.model, call)
        )

    def _image_answer(self, packed: Encoded, model: str, call: Call) -> Any:
        if packed.shared and len(packed.arrays) > 1:  # those beside the image become JSON
            packed = Encoded(packed.text, packed.shared[0].response_arrays(packed.shared[1]))
        value = codec.decode(packed)
        image, rest = value, None
        if isinstance(value, dict) and isinstance(value.get("image"), (np.ndarray, Placed)):
            image = value["image"]
            rest = {key: item for key, item in value.items() if key != "image"} or None
        try:
            codec.check_image(image)
        except (InvalidInput, AttributeError):
            kind = f"{image.dtype} array of shape {image.shape}" if hasattr(image, "dtype") else type(image).__name__
            raise ModelUnavailable(
                f"model {model!r} answered with a {kind}, no image (HxW or HxWxC); call it by RunImage"
            ) from None
        height, width, channels = (*image.shape, 1)[:3]
        answer = self._image_response(data=codec.json_only(rest))
        fields = {"height": height, "width": width, "channels": channels, "dtype": codec.dtype_name(image.dtype)}
        for name, field in fields.items():
            setattr(answer.image, name, field)
        if _goes_to_the_end(image, call):
            return schemas.WithTrailingBytes(answer, b"", codec.raw(image))
        _send([([answer.image], packed if len(packed.arrays) == 1 else Encoded("", [image]))], call)
        return answer

    def Run(self, request: Any, call: Call) -> Any:
        return self._run(request, _value(request.data, call), call)

    def RunBatch(self, request: Any, call: Call) -> Any:
        items = [_named(_value, i, value, call) for i, value in enumerate(request.items)]
        args = codec.parse_args(request.args)
        return self._items(self._engine.run_batch(request.model, items, args, call), call)

    def ListModels(self, request: Any, call: Call) -> Any:
        return self._json([model.name for model in self._engine.models()])

    def GetModelStates(self, request: Any, call: Call) -> Any:
        answer = self._states()
        for model in self._engine.models():
            answer.models.add(name=model.name, state=model.state, reason=model.reason)
        return answer

    def GetInputShape(self, request: Any, call: Call) -> Any:
        return self._json(self._engine.input_shape(call.model or request.data))

    def GetPID(self, request: Any, call: Call) -> Any:
        return self._json({"pid": os.getpid()})

    def GetNumParallelWorkers(self, request: Any, call: Call) -> Any:
        # Old clients open channels until they have seen this many pids; one address has one.
        return self._json({"num_workers": 1})

    def RunStream(self, request: Any, call: Call) -> Iterator[Any]:
        args = codec.parse_args(request.args)
        for packed in self._engine.run_stream(request.model, _value(request.data, call), args, call):
            yield self._answer(packed, call)

    def GetModelInfo(self, request: Any, call: Call) -> Any:
        return self._describe(self._engine.model(request.model))

    def LoadModel(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        return self._describe(self._engine.load(request.model, request.workers))

    def UnloadModel(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        return self._describe(self._engine.unload(request.model))

    def ReloadModel(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        return self._describe(self._engine.reload(request.model))

    def _describe(self, model: ServedModel) -> Any:
        facts = model.describe()
        facts |= {name: json.dumps(facts[name]) for name in ("input_shape", "metadata")}
        return self._info(**facts)

    def StopServer(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        self._engine.request_stop()
        return self._json({"stopping": True})

    def _run(self, request: Any, data: Encoded, call: Call) -> Any:
        args, plain = codec.parse_args(request.args), not getattr(request, "accept_arrays", True)
        return self._engine.run(
            request.model, data, args, call, plain=plain, then=lambda packed: self._answer(packed, call)
        )

    def _answer(self, packed: Encoded, call: Call) -> Any:
        answer = self._response()
        parts, _ = filled = _fill(answer, "data", packed)
        if not parts or not _goes_to_the_end(packed.arrays[-1], call):
            _send([filled], call)
            return answer
        _send([(parts[:-1], Encoded("", packed.arrays[:-1]))], call)
        owner = parts[-1].SerializeToString()
        del answer.arrays[-1]
        return schemas.WithTrailingBytes(answer, owner, codec.raw(packed.arrays[-1]))

    def _run_batch(self, request: Any, data: list[Encoded], call: Call) -> Any:
        args, plain = codec.parse_args(request.args), not request.accept_arrays
        outcomes = self._engine.run_batch(request.model, data, args, call, plain=plain)
        if not plain:
            return self._items(outcomes, call)
        texts = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, ServerError):
                raise from_status(outcome.status, f"item {index}: {outcome}")
            texts.append(outcome.text)
        return self._response(data=f"[{', '.join(texts)}]")

    def _items(self, outcomes: list[Outcome], call: Call) -> Any:
        answer, filled = self._response(), []
        for outcome in outcomes:
            item = answer.items.add()
            if isinstance(outcome, ServerError):
                item.error.code, item.error.message = CODES[outcome.status], str(outcome)
            else:
                filled.append(_fill(item.value, "json", outcome))
        _send(filled, call)
        return answer

    def _json(self, value: Any) -> Any:
        return self._response(data=json.dumps(value))


def _image(image: Any, call: Call) -> Encoded:
    shape = () if image.encoded else codec.image_shape(image.height, image.width, image.channels)
    if call.trailing_bytes is None and image.HasField("place"):
        if image.encoded:
            return codec.encode(EncodedImage(_read(image.place, call)))
        return _placed(codec.ARRAY, [(image.dtype or "uint8", shape, image.place)], call)
    data = image.data if call.trailing_bytes is None else call.trailing_bytes
    if image.encoded:
        return codec.encode(EncodedImage(data))
    return Encoded(codec.ARRAY, [codec.array_from(image.dtype or "uint8", shape, data)])


def _value(value: Any, call: Call) -> Encoded:
    if value.arrays and call.trailing_bytes is None and all(one.HasField("place") for one in value.arrays):
        packed = _placed(value.json, [(one.dtype, one.shape, one.place) for one in value.arrays], call)
    else:
        found = [_read(one.place, call) if one.HasField("place") else one.data for one in value.arrays]
        if call.trailing_bytes is not None:
            found[-1] = call.trailing_bytes
        named = zip(value.arrays, found, strict=True)
        packed = Encoded(value.json, [codec.array_from(one.dtype, one.shape, data) for one, data in named])
    codec.check(packed.text, packed.arrays)  # malformed JSON and references to no array are refused before they queue
    return packed


def _placed(text: str, described: Sequence[tuple[str, Sequence[int], Any]], call: Call) -> Encoded:
    """A packed value whose arrays, each (dtype, shape, place), stay in the memory that the caller shares."""
    buffers = _buffers(call)
    arrays: list[Placed] = []
    places: list[Place] = []
    for dtype, shape, place in described:
        _check(place, call)
        arrays.append(codec.placed(dtype, shape, place.length))
        places.append((place.offset, codec.dtype_name(arrays[-1].dtype), arrays[-1].shape))
    return Encoded(text, arrays, (buffers, places))


def _read(place: Any, call: Call) -> bytes:
    """A copy of bytes in the memory that the caller shares."""
    _check(place, call)
    return _buffers(call).read(place.offset, place.length)


def _buffers(call: Call) -> SharedBuffers:
    if call.lane is None:
        raise InvalidInput("place is for callers that share memory with the server; send the bytes as data")
    return call.lane


def _check(place: Any, call: Call) -> None:
    """InvalidInput if the bytes are not there; Overloaded if a request names too many, as places may overlap."""
    try:
        _buffers(call).check(place.offset, place.length)
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    call.placed += place.length
    if call.placed > call.largest:
        raise Overloaded(f"{call.placed} bytes of arrays, more than TMS_MAX_MESSAGE_MB allows", retry_after_ms=-1)


def _named(convert: Callable[[Any, Call], Encoded], index: int, message: Any, call: Call) -> Encoded:
    try:
        return convert(message, call)
    except InvalidInput as error:
        raise InvalidInput(f"item {index}: {error}") from None


def _goes_to_the_end(array: Array, call: Call) -> bool:
    return not call.lane and array.nbytes > schemas.LARGE


def _fill(message: Any, text_field: str, packed: Encoded) -> tuple[list[Any], Encoded]:
    """Puts a packed value into the message but for the bytes of its arrays, which ``_send`` wants."""
    setattr(message, text_field, packed.text)
    arrays = packed.arrays
    return [message.arrays.add(dtype=codec.dtype_name(array.dtype), shape=array.shape) for array in arrays], packed


def _send(filled: Sequence[tuple[list[Any], Encoded]], call: Call) -> None:
    """Puts the bytes of arrays into their messages; or where the caller looks for them, and tells where that is."""
    rest: list[tuple[Any, Array]] = []
    for parts, packed in filled:
        if packed.shared and packed.shared[0] is call.lane:  # a worker has put them there
            for part, array, place in zip(parts, packed.arrays, packed.shared[1], strict=True):
                part.place.offset, part.place.length = place[0], array.nbytes
        else:
            rest += zip(parts, packed.arrays, strict=True)
    if call.lane and rest:
        for (part, array), (offset, *_) in zip(rest, call.lane.write([one for _, one in rest]), strict=True):
            part.place.offset, part.place.length = offset, array.nbytes
    else:
        for part, array in rest:
            part.data = bytes(codec.raw(array))
