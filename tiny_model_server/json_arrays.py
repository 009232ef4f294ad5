"""Arrays with their dtype in JSON that people read and write: ``{"$array": {"dtype": "float32", "data": [1, 2]}}``."""

import re
from typing import Any

import numpy as np

from tiny_model_server import codec
from tiny_model_server.errors import InvalidInput

_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
_EXPECTED = (
    'a "$array" in the JSON has "dtype" (such as "float32"), "data" (numbers in lists), and "shape" if "data" is flat'
)
_MAX_SHOWN_TEXT = 4096  # characters of an example
_MAX_SHOWN_ITEMS = 1024  # of an array in it


def parse(text: str) -> Any:
    """The value of a JSON text, with arrays where it describes one; InvalidInput if it is malformed."""
    value = codec.parse_json(text)
    return _with_arrays(value) if '"$array"' in text else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$array"} and isinstance(value["$array"], dict):
        return _array(**value["$array"]) if value["$array"].keys() <= {"dtype", "shape", "data"} else _refuse()
    return {key: _with_arrays(item) for key, item in value.items()}


def _array(dtype: Any = None, data: Any = None, shape: Any = None) -> codec.Array:
    try:
        found = np.asarray(data)
        if not (isinstance(dtype, str) and _DTYPES.fullmatch(dtype) and found.dtype.kind in "biuf"):
            _refuse()
        with np.errstate(all="ignore"):
            array = np.asarray(data, dtype)
        if array.dtype.kind != "f" and found.size and not np.array_equal(array.astype(found.dtype), found):
            raise InvalidInput(f'a "$array" in the JSON has numbers that {dtype} cannot hold')
        return codec.portable(array if shape is None else array.reshape(shape))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"{_EXPECTED}: {error}") from None


def _refuse() -> Any:
    raise InvalidInput(_EXPECTED)


def example(encoded: codec.Encoded | None) -> Any:
    """A model's example as JSON that ``parse`` reads; large arrays have no "data". None if it is too large or bytes."""
    if encoded is None or len(encoded.text) > _MAX_SHOWN_TEXT or "$bytes" in encoded.text or "$image" in encoded.text:
        return None
    return _described(codec.decode(encoded))


def _described(value: Any) -> Any:
    if isinstance(value, list):
        return [_described(item) for item in value]
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    facts: dict[str, Any] = {"dtype": codec.dtype_name(value.dtype), "shape": list(value.shape)}
    if value.size <= _MAX_SHOWN_ITEMS and _DTYPES.fullmatch(facts["dtype"]):
        facts["data"] = value
    return {"$array": facts}
