"""nos.inference.InferenceService of nos 0.0.3, off unless asked for, because its images travel as pickles.

Nothing of a pickle is carried out: its classes are replaced by stand-ins that hold what the pickle says of an array
or an image, which is then checked like all other input. Everything else in a pickle is refused.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from tiny_model_server import codec, schemas
from tiny_model_server.codec import Array
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.engine.repository import State
from tiny_model_server.errors import InvalidInput, ServerError

SCHEMA = "nos"
SERVICE = "nos.inference.InferenceService"

_RESULTS = {"txt2vec": "embedding", "img2vec": "embedding", "txt2img": "image", "img2bbox": ""}
_IMAGE_MODES = {"L": ("uint8", ()), "RGB": ("uint8", (3,)), "RGBA": ("uint8", (4,)), "I;16": ("uint16", ())}
_NUMBERS = "b1 u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()
_MOST_INSTRUCTIONS = 500_000  # of a pickle; an image takes about 40, and each may make an object of 100 bytes
_SPARE_BYTES = 1 << 20
_LONGEST = 8  # a tuple in a pickle of an array or an image has five elements at most; an image's state has six


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method."""
    door = _Nos(engine)
    return {name: getattr(door, name) for name in schemas.methods(SCHEMA, SERVICE)}


class _Nos:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._methods = schemas.methods(SCHEMA, SERVICE)

    def ListModels(self, request: Any, call: Call) -> Any:
        return self._methods["ListModels"].response(models=[model.name for model in self._engine.models()])

    def InitModel(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        self._engine.load(request.model_name, request.num_replicas)
        return self._methods["InitModel"].response(result="ok")

    def DeleteModel(self, request: Any, call: Call) -> Any:
        self._engine.authorize(call)
        self._engine.unload(request.model_name)
        return self._methods["DeleteModel"].response(result="ok")

    def GetModelInfo(self, request: Any, call: Call) -> Any:
        self._engine.model(request.model_name)
        return self._methods["GetModelInfo"].response()

    def Predict(self, request: Any, call: Call) -> Any:
        if request.method not in _RESULTS:
            raise InvalidInput(f"method {request.method[:40]!r} is none of {', '.join(_RESULTS)}")
        kind = "text_request" if request.method.startswith("txt") else "image_request"
        if request.WhichOneof("request") != kind:
            raise InvalidInput(f"{request.method} takes a {kind}")
        if (model := self._engine.model(request.model_name)).state is State.UNLOADED:
            self._engine.authorize_load(model, call)
            self._engine.load(request.model_name)
        if kind == "text_request":
            answer = self._one(request, request.text_request.text, call)
        else:
            images = _images(request.image_request.image_bytes, self._engine.settings.max_items)
            answer = self._all(request, images, call) if isinstance(images, list) else self._one(request, images, call)
        return self._methods["Predict"].response(result=pickle.dumps(answer, protocol=4))

    def _one(self, request: Any, value: Any, call: Call) -> dict[str, Any]:
        packed = self._engine.run(request.model_name, codec.encode(value), {}, call)
        return _named(request.method, codec.decode(packed))

    def _all(self, request: Any, images: Sequence[Array], call: Call) -> dict[str, Any]:
        """The answers to several images: lists by name, embeddings of one shape as one array."""
        outcomes = self._engine.run_batch(request.model_name, [codec.encode(image) for image in images], {}, call)
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, ServerError):
                raise type(outcome)(f"image {index}: {outcome}")
        answers = [_named(request.method, codec.decode(outcome)) for outcome in outcomes]  # type: ignore[arg-type]
        names = answers[0].keys()
        if any(answer.keys() != names for answer in answers):
            raise InvalidInput("the model's answers to these images have different fields; send them one by one")
        listed = {name: [answer[name] for answer in answers] for name in names}
        if "embedding" in listed and len({np.shape(one) for one in listed["embedding"]}) == 1:
            return listed | {"embedding": np.stack([np.asarray(one) for one in listed["embedding"]])}
        return listed


def _named(method: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if not (name := _RESULTS[method]):
        raise InvalidInput(f"{method} is for models that answer with scores, labels and bboxes; this one does not")
    return {name: np.asarray(value) if isinstance(value, list) else value}


class _Stub:
    """What a pickle says of one object; a pickle can make such objects, and call ``__setstate__``, and nothing else."""

    parts: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Stub):
    """numpy.ndarray, by _reconstruct and its state (version, shape, dtype, Fortran order, bytes)."""

    def array(self) -> Array:
        _, shape, dtype, fortran, data = _tuple(self.state, 5)
        return _made(shape, dtype, fortran is True, data)


class _Buffer(_Stub):
    """numpy.ndarray, by _frombuffer(bytes, dtype, shape, order)."""

    def array(self) -> Array:
        data, dtype, shape, order = _tuple(self.parts, 4)
        return _made(shape, dtype, order == "F", data)


class _Scalar(_Stub):
    """A numpy scalar, which is no image."""

    def array(self) -> Array:
        raise _refusal("a scalar")


class _Dtype(_Stub):
    """numpy.dtype, by its type string; the state holds the byte order."""


class _Class(_Stub):
    """A class that is only passed on to a constructor."""


class _Image(_Stub):
    """A PIL image, by its state [info, mode, size, palette, bytes]."""

    def array(self) -> Array:
        state = self.state
        if not (isinstance(state, (list, tuple)) and 5 <= len(state) <= _LONGEST):
            raise _refusal("an image of another state")
        mode, size, data = state[1], state[2], state[4]
        if not isinstance(mode, str) or mode not in _IMAGE_MODES:
            raise InvalidInput(f"images of this mode are not taken; convert it to one of {', '.join(_IMAGE_MODES)}")
        dtype, channels = _IMAGE_MODES[mode]
        width, height = _integers(size, 2)
        return codec.require_image(codec.array_from(dtype, (height, width, *channels), _bytes(data)))


class _Encoded(_Stub):
    """_codecs.encode(text, "latin1"), by which old protocols carry bytes."""


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
    ("PIL.Image", "Image"): _Image,
} | {
    (f"numpy.{core}.{module}", name): stub
    for core in ("core", "_core")
    for module, name, stub in [
        ("multiarray", "_reconstruct", _Array),
        ("multiarray", "scalar", _Scalar),
        ("numeric", "_frombuffer", _Buffer),
    ]
}


_INSTRUCTIONS = [
    getattr(pickle, name)
    for name in """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BYTEARRAY8""".split()
]


class _Counted(dict[int, Any]):
    """Instructions by their codes, which can be looked up so many times."""

    left = _MOST_INSTRUCTIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise InvalidInput(f"image_bytes is a pickle of more than {_MOST_INSTRUCTIONS} instructions")
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
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if module.startswith("PIL.") and module.endswith("ImagePlugin") and name.endswith("ImageFile"):
            return _Image
        raise _refusal(f"{module}.{name}"[:80])


def _images(data: bytes, most: int = schemas.MOST_ITEMS) -> Array | list[Array]:
    """The array, or list of at most so many of them, in a pickle."""
    try:
        found = _Unpickler(data).load()
    except InvalidInput:
        raise
    except Exception as error:  # a malformed pickle may raise anything
        raise InvalidInput(f"image_bytes is no pickle of an image ({type(error).__name__})") from None
    if isinstance(found, list):
        if not found:
            raise InvalidInput("the list of images is empty")
        if len(found) > most:
            raise InvalidInput(f"there are {len(found)} images, and TMS_MAX_ITEMS allows {most}")
        images, left = [], 2 * len(data) + _SPARE_BYTES
        for one in found:
            images.append(_array(one))
            left -= images[-1].nbytes
            if left < 0:  # a pickle can name an object again and again
                raise InvalidInput("the images are more than the pickle carries; send each of them once")
        return images
    return _array(found)


def _array(found: Any) -> Array:
    if not isinstance(found, (_Array, _Buffer, _Scalar, _Image)):
        raise _refusal(f"a {type(found).__name__.lstrip('_').lower()}")
    return found.array()


def _made(shape: Any, dtype: Any, fortran: bool, data: Any) -> Array:
    sizes = _integers(shape)
    if not isinstance(dtype, _Dtype) or not dtype.parts or not isinstance(dtype.parts[0], str):
        raise _refusal("an array without a dtype")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
    if dtype.parts[0] not in _NUMBERS or order == ">":
        raise InvalidInput(f"arrays of dtype {dtype.parts[0][:20]!r} are not taken; numbers and bool are")
    name = np.dtype(dtype.parts[0]).name
    array = codec.array_from(name, sizes[::-1] if fortran else sizes, _bytes(data))
    return codec.portable(array.T) if fortran else array


def _tuple(found: Any, length: int) -> tuple[Any, ...]:
    if not isinstance(found, tuple) or len(found) != length:
        raise _refusal("an array of another state")
    return found


def _integers(found: Any, length: int | None = None) -> tuple[int, ...]:
    right = isinstance(found, (tuple, list)) and len(found) in ([length] if length else range(_LONGEST + 1))
    if not right or not all(type(size) is int and 0 <= size < 1 << 31 for size in found):
        raise InvalidInput("the shape of an array or an image must be a few whole numbers")
    return tuple(found)


def _bytes(found: Any) -> bytes | bytearray:
    if isinstance(found, _Encoded) and len(found.parts) == 2 and isinstance(found.parts[0], str):
        return found.parts[0].encode("latin-1", errors="replace")
    if not isinstance(found, (bytes, bytearray)):
        raise _refusal("something else in the place of bytes")
    return found


def _refusal(what: str) -> InvalidInput:
    return InvalidInput(f"a pickle may hold numpy arrays of numbers and PIL images, and lists of them, not {what}")
