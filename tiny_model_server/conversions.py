"""Values of other classes to JSON values and arrays: tensors, images, tables, dataclasses, dates and so on.

No library is imported for it: a class is recognized by its package and name, or by what it defines.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np

from tiny_model_server.errors import message_of

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_RANGE = 1 << 20  # numbers in a list that is made of a range; a request's JSON may hold no more than that
_MAX_TEXTS_BYTES = 1 << 20  # of an array of texts, in which each element takes the bytes of the longest
_IMAGE_MODES = {"1", "L", "LA", "RGB", "RGBA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
"""Modes of PIL images whose arrays show the image. A palette's do not, and CMYK is not what models expect."""
TENSOR = "torch.Tensor"
IMAGE = "PIL.Image"
_FRAMES = {"pandas.DataFrame", "polars.DataFrame", "pyarrow.Table"}
_TABLES = _FRAMES | {"pydantic.BaseModel"}


class CannotSerialize(TypeError):
    """(what, instead): a value cannot be encoded; each level above it adds where it is."""

    path = ""

    def __str__(self) -> str:
        return f"cannot serialize {self.args[0]} at {self.path or 'the top'}: {self.args[1]}"


def convert(value: Any) -> Any:
    """What is sent in place of a value that is neither JSON nor a numpy array; what is in it may need the same.

    CannotSerialize says why there is nothing, and what to send instead.
    """
    kind = type(value)
    try:
        return _conversion(kind)(value)
    except (CannotSerialize, RecursionError):
        raise
    except Exception as error:  # of a model's or a library's code
        raise CannotSerialize(kind.__name__, f"to convert it raised {message_of(error, named=True)}") from error


def convert_array(array: Array) -> Any:
    """What is sent in place of an array of objects, records, numpy's variable-width texts, or of bfloat16 and its like.

    An array where all elements are texts or numbers, else lists, or a dict of the columns of records.
    """
    if array.dtype.kind in "OT":
        listed = array.tolist()
        return _array_of_texts(array, listed) if array.ndim else listed
    if array.dtype.names:
        return {name: array[name] for name in array.dtype.names}
    return array.astype(np.float32) if "float" in array.dtype.name else array


def as_array(value: Any) -> Array:
    """The array of what may be an image: an array, a tensor, an image of PIL, nested lists."""
    if isinstance(value, np.ndarray):
        return value
    return np.asanyarray(convert(value) if is_a(value, TENSOR) or is_a(value, IMAGE) else value)


def is_a(value: Any, name: str) -> bool:
    """True for a value of the class TENSOR or IMAGE."""
    return name in _named(type(value))


def is_table(value: Any) -> bool:
    """True for what can be iterated over, but by its columns or fields: a DataFrame, a pydantic model."""
    return bool(_named(type(value)) & _TABLES)


def _named(kind: type) -> set[str]:
    return set(map(_name, kind.__mro__))


def _name(kind: type) -> str:
    """Package and class: libraries move their classes between modules."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _conversion(kind: type) -> Callable[[Any], Any]:
    for base in kind.__mro__:
        if conversion := _BY_NAME.get(_name(base)):
            return conversion
    for attribute, conversion in _BY_ATTRIBUTE.items():
        if hasattr(kind, attribute):
            return conversion
    return _refuse


def _refuse(value: Any) -> Any:
    kind = type(value)
    default = "send JSON values, numpy arrays, or a dict of its parts"
    if hasattr(kind, "__next__"):  # it may never end, and reading it uses it up
        default = "send list(value)"
    names = _named(kind)
    advice = (advice for name, advice in _INSTEAD.items() if name in names)
    raise CannotSerialize(kind.__name__, next(advice, default))


def _of_tensor(tensor: Any) -> Array:
    """The array of a torch tensor, from any device; numpy has no dtype for bfloat16 and the 8-bit floats."""
    tensor = tensor.detach()
    if "bfloat16" in str(tensor.dtype) or "float8" in str(tensor.dtype):
        tensor = tensor.float()
    found: Array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return found


def _of_image(image: Any) -> Array:
    return np.asarray(image if image.mode in _IMAGE_MODES else image.convert("RGB"))


def _of_frame(frame: Any) -> dict[Any, Any]:
    names = list(getattr(frame, "column_names", frame.columns))  # the columns of pyarrow are no names
    if len(set(names)) < len(names):
        raise CannotSerialize("a table with two columns of one name", "give each column a name of its own")
    return {name: frame[name] for name in names}


def _of_model(model: Any) -> Any:
    return model.model_dump() if hasattr(type(model), "model_dump") else model.dict()


def _of_dataclass(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _of_set(members: Any) -> list[Any]:
    try:
        return sorted(members)
    except Exception:  # some have no order
        return list(members)


def _of_range(numbers: range) -> list[int]:
    if numbers[_MAX_RANGE:]:  # its length may be more than len() can say
        raise CannotSerialize(f"a range of more than {_MAX_RANGE} numbers", "send np.arange(start, stop, step)")
    return list(numbers)


def _of_decimal(value: Any) -> float:
    from decimal import Decimal

    number = float(value)
    if value == value and Decimal(repr(number)) != value:
        raise CannotSerialize("a Decimal with more digits than a float", "send float(value) or str(value)")
    return number


def _of_datetime64(value: Any) -> str | None:
    return None if np.isnat(value) else str(value)


def _of_timedelta64(value: Any) -> float | None:
    return None if np.isnat(value) else float(value / np.timedelta64(1, "s"))


def _nothing(value: Any) -> None:
    return None


def _array_of_texts(array: Array, listed: list[Any]) -> Any:
    """The array of texts that pandas and scikit-learn keep as objects; lists if not all elements are texts."""
    flat = array.ravel().tolist()
    if not flat or not all(isinstance(text, str) for text in flat):
        return listed
    room = 4 * len(flat) * max(map(len, flat))
    if room > max(_MAX_TEXTS_BYTES, 16 * sum(map(len, flat))):
        return listed  # for one long text among short ones
    texts = np.array(flat, dtype=str)
    return texts.reshape(array.shape) if texts.tolist() == flat else listed  # numpy drops NULs at a text's end


_BY_NAME: dict[str, Callable[[Any], Any]] = {
    TENSOR: _of_tensor,
    IMAGE: _of_image,
    **dict.fromkeys(_FRAMES, _of_frame),
    "pandas.NAType": _nothing,
    "pandas.NaTType": _nothing,  # a datetime, too
    "pydantic.BaseModel": _of_model,
    "enum.Enum": attrgetter("_value_"),
    "datetime.date": methodcaller("isoformat"),  # and datetime.datetime, its subclass
    "datetime.time": methodcaller("isoformat"),
    "datetime.timedelta": methodcaller("total_seconds"),
    "decimal.Decimal": _of_decimal,
    "uuid.UUID": str,
    "numpy.dtype": str,
    "torch.dtype": str,
    "torch.device": str,
    "builtins.set": _of_set,
    "builtins.frozenset": _of_set,
    "builtins.range": _of_range,
    "builtins.dict_keys": list,
    "builtins.dict_values": list,
    "collections.deque": list,
    "builtins.complex": np.asarray,
    "array.array": np.asarray,
    "numpy.datetime64": _of_datetime64,
    "numpy.timedelta64": _of_timedelta64,
    "numpy.generic": np.asarray,
}
_BY_ATTRIBUTE: dict[str, Callable[[Any], Any]] = {
    "__dataclass_fields__": _of_dataclass,
    "__fspath__": os.fspath,
    "__array__": np.asarray,  # TensorFlow, JAX, pandas, xarray, polars
    "__dlpack__": lambda value: np.from_dlpack(value),  # an old numpy in a model's own interpreter has none
}
_INSTEAD = {
    "scipy._spbase": "send value.toarray(), or a dict of data, indices, indptr and shape",
    "scipy.spmatrix": "send value.toarray(), or a dict of data, indices, indptr and shape",
    "builtins.dict_items": "send dict(value) or list(value)",
    "builtins.coroutine": "send what it returns: await value",
    "builtins.async_generator": "send [one async for one in value]",
    "builtins.function": "call it, and send what it returns",
    "builtins.method": "call it, and send what it returns",
}
"""What to send in place of values that may become large, or are there by mistake."""
