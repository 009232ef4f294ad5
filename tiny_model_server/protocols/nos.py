"""nos.inference.InferenceService of nos 0.0.3, off unless asked for, because its images are sent as pickles.

No code that a pickle names is called: stand-ins for its classes hold what it says of an array or an image, which is
then checked like all other input. Everything else in a pickle is refused.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Array
from tiny_model_server.engine.call import Call, answers
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import State
from tiny_model_server.errors import InvalidInput

SCHEMA = "nos"
SERVICE = "nos.inference.InferenceService"

_RESULTS = {"txt2vec": "embedding", "img2vec": "embedding", "txt2img": "image", "img2bbox": ""}
_IMAGE_MODES = {"L": ("uint8", ()), "RGB": ("uint8", (3,)), "RGBA": ("uint8", (4,)), "I;16": ("uint16", ())}
_NUMBERS = "b1 u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()
_MAX_INSTRUCTIONS = 500_000  # of a pickle; an image takes about 40, and each may make an object of 100 bytes
_SPARE_BYTES = 1 << 20


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    return schemas.handlers(_Nos(engine), SCHEMA, SERVICE)


class _Nos:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ListModels(self, request: Any, call: Call) -> dict[str, Any]:
        return {"models": [model.name for model in self._engine.models()]}

    def InitModel(self, request: Any, call: Call) -> dict[str, Any]:
        self._engine.access.authorize(call)
        self._engine.wait(self._engine.load(request.model_name, request.num_replicas))
        return {"result": "ok"}

    def DeleteModel(self, request: Any, call: Call) -> dict[str, Any]:
        self._engine.access.authorize(call)
        self._engine.wait(self._engine.unload(request.model_name))
        return {"result": "ok"}

    def GetModelInfo(self, request: Any, call: Call) -> dict[str, Any]:
        self._engine.model(request.model_name)
        return {}

    def Predict(self, request: Any, call: Call) -> dict[str, Any]:
        if request.method not in _RESULTS:
            raise InvalidInput(f"method {request.method[:40]!r} is none of {', '.join(_RESULTS)}")
        kind = "text_request" if request.method.startswith("txt") else "image_request"
        if request.WhichOneof("request") != kind:
            raise InvalidInput(f"{request.method} takes a {kind}")
        if (model := self._engine.model(request.model_name)).state is State.UNLOADED:
            self._engine.authorize_load(model, call)
            self._engine.wait(self._engine.load(request.model_name))
        data: Any = request.text_request.text
        if kind == "image_request":
            data = _images(request.image_request.image_bytes, self._engine.settings.max_items)
        several = isinstance(data, list)
        values = [codec.encode(one) for one in (data if several else [data])]
        outcomes = answers(self._engine.run_batch(request.model_name, values, {}, call), "image {}: " * several)
        found = [_named(request.method, codec.decode(outcome)) for outcome in outcomes]
        return {"result": pickle.dumps(_joined(found) if several else found[0], protocol=4)}


def _named(method: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if not (name := _RESULTS[method]):
        raise InvalidInput(f"{method} is for models that answer with scores, labels and bboxes; this one does not")
    return {name: np.asarray(value) if isinstance(value, list) else value}


def _joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The answers to several images: lists by name, embeddings of one shape as one array."""
    names = answers[0].keys()
    if any(answer.keys() != names for answer in answers):
        raise InvalidInput("the model's answers to these images have different fields; send them one by one")
    joined: dict[str, Any] = {name: [answer[name] for answer in answers] for name in names}
    if len({np.shape(embedding) for embedding in joined.get("embedding", [])}) == 1:
        joined["embedding"] = np.stack([np.asarray(embedding) for embedding in joined["embedding"]])
    return joined


class _Object:
    """What a pickle says of one object; a pickle can make such objects, and call ``__setstate__``, and nothing else."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Object):
    """numpy.ndarray, by _reconstruct and its state: version, shape, dtype, Fortran order, bytes."""


class _Buffer(_Object):
    """numpy.ndarray, by _frombuffer(bytes, dtype, shape, order)."""


class _Dtype(_Object):
    """numpy.dtype, by its type string; the state holds the byte order."""


class _Class(_Object):
    """A class that is only passed on to a constructor."""


class _Image(_Object):
    """A PIL image, by its state: info, mode, size, palette, bytes."""


_STAND_INS: dict[str, Any] = {
    "numpy.ndarray": _Class,
    "numpy.dtype": _Dtype,
    "PIL.Image.Image": _Image,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _Buffer,
}


_INSTRUCTIONS = [
    getattr(pickle, name)
    for name in """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BYTEARRAY8""".split()
]


class _Counted(dict[int, Any]):
    """Instructions by their codes, which can be looked up so many times."""

    left = _MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise InvalidInput(f"image_bytes is a pickle of more than {_MAX_INSTRUCTIONS} instructions")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):  # the one in Python, whose instructions can be chosen
    dispatch: ClassVar[dict[int, Any]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS} | {
        # An image's info is left out: to hash keys that a pickle makes up could take for ever.
        pickle.SETITEMS[0]: lambda self: self.pop_mark(),
        pickle.SETITEM[0]: lambda self: self.stack.__delitem__(slice(-2, None)),
        pickle.BYTEARRAY8[0]: lambda self: self.load_bytes(),
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.dispatch = _Counted(self.dispatch)  # type: ignore[misc]

    def load_bytes(self) -> None:
        """Takes a bytearray as bytes; pickle's own would make room for as many as the pickle says."""
        read, append = self.read, self.append  # type: ignore[attr-defined]
        append(read(int.from_bytes(read(8), "little")))

    def find_class(self, module: str, name: str) -> Any:
        if found := _STAND_INS.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}"):
            return found
        if re.fullmatch(r"PIL\.\w+ImagePlugin\.\w+ImageFile", f"{module}.{name}"):
            return _Image
        raise _refusal(f"{module}.{name}"[:80])


def _images(data: bytes, max_images: int = schemas.MAX_ITEMS) -> Array | list[Array]:
    """The array, or list of at most so many of them, in a pickle."""
    try:
        found = _Unpickler(data).load()
    except InvalidInput:
        raise
    except Exception as error:  # a malformed pickle may raise anything
        raise InvalidInput(f"image_bytes is not a pickle of an image ({type(error).__name__})") from None
    if not isinstance(found, list):
        return _array(found)
    if not 0 < len(found) <= max_images:
        raise InvalidInput(f"there are {len(found)} images; send 1 to {max_images} (TMS_MAX_ITEMS)")
    images, left = [], 2 * len(data) + _SPARE_BYTES
    for one in found:
        images.append(_array(one))
        left -= images[-1].nbytes
        if left < 0:  # a pickle can name an object again and again
            raise InvalidInput("the images are more than the pickle carries; send each of them once")
    return images


def _array(found: Any) -> Array:
    match found:
        case _Array(state=(_, shape, _Dtype() as dtype, fortran, data)):
            return _made(dtype, shape, fortran is True, data)
        case _Buffer(arguments=(data, _Dtype() as dtype, shape, order)):
            return _made(dtype, shape, order == "F", data)
        case _Image(state=(_, str(mode), (width, height), _, data, *_)) if mode in _IMAGE_MODES:
            name, channels = _IMAGE_MODES[mode]
            image: Array = codec.check_image(codec.array_from(name, _shape((height, width, *channels)), _bytes(data)))
            return image
        case _Image():
            raise InvalidInput(f"images of this mode are not taken; convert it to one of {', '.join(_IMAGE_MODES)}")
    raise _refusal(f"a {type(found).__name__.lstrip('_').lower()}")


def _made(dtype: _Dtype, shape: Any, fortran: bool, data: Any) -> Array:
    match dtype:
        case _Dtype(arguments=(str(name), *_), state=None | (_, "<" | "=" | "|", *_)) if name in _NUMBERS:
            sizes = _shape(shape)
            array = codec.array_from(np.dtype(name).name, sizes[::-1] if fortran else sizes, _bytes(data))
            return codec.portable(array.T) if fortran else array
    raise InvalidInput("arrays of this dtype are not taken; little-endian numbers and bool are")


def _shape(found: Any) -> tuple[int, ...]:
    if not isinstance(found, tuple) or not all(type(size) is int for size in found):
        raise InvalidInput("the shape of an array or an image must be whole numbers")
    return found


def _bytes(found: Any) -> bytes | bytearray:
    if not isinstance(found, (bytes, bytearray)):
        raise _refusal("something else in the place of bytes")
    return found


def _refusal(what: str) -> InvalidInput:
    return InvalidInput(f"a pickle may hold numpy arrays of numbers and PIL images, and lists of them, not {what}")
