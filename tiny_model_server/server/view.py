"""An answer as the page shows it: of large arrays some facts, their values if these are few, and PNG images."""

import base64
import math
from typing import Any

import numpy as np

from tiny_model_server import codec, image_files

_MAX_PLAIN = 32  # items of an array that is shown as it is
_MAX_ITEMS = 4096  # of an array that is shown with its values
_MAX_ALL_ITEMS = 1 << 16  # of all arrays of an answer
_MAX_PLOTTED = 1024  # items that a longer row of numbers is thinned out to
_MAX_IMAGES = 32
_MIN_SIDE = 8  # of an array HxW that is an image, not a table


def view(value: Any) -> Any:
    """An answer as JSON for the page. A large array is {"array": "uint8 480x640", ...}.

    Beside it stand "min", "max" and "mean" of numbers, "png" of what can be an image, and "values" of few items; of a
    long row of numbers, "values" are each ``every``-th.
    """
    return _View().of(value)


class _View:
    """Counts what an answer may still show."""

    def __init__(self) -> None:
        self._items, self._images = _MAX_ALL_ITEMS, _MAX_IMAGES

    def of(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item) for item in value]
        if isinstance(value, bytes):
            return f"{len(value)} bytes"
        return self._facts(value) if isinstance(value, np.ndarray) and value.size > _MAX_PLAIN else value

    def _facts(self, array: codec.Array) -> dict[str, Any]:
        facts: dict[str, Any] = {"array": f"{codec.dtype_name(array.dtype)} {'x'.join(map(str, array.shape))}"}
        if array.dtype.kind in "biuf":
            with np.errstate(all="ignore"):
                mean = np.nansum(array, dtype=np.float64) / np.count_nonzero(array == array)
                # np.nanmin and np.nanmean warn where all numbers are NaN, and a warning would go into the log.
                facts |= {"min": np.fmin.reduce(array, None), "max": np.fmax.reduce(array, None), "mean": mean}
            facts |= self._image(array) | self._plot(array)
        if array.size <= min(_MAX_ITEMS, self._items):
            self._items -= array.size
            facts["values"] = array
        return facts

    def _image(self, array: codec.Array) -> dict[str, Any]:
        is_image = (array.ndim == 2 and min(array.shape) >= _MIN_SIDE) or (array.ndim == 3 and array.shape[2] in (1, 3))
        if not is_image or not self._images:
            return {}
        self._images -= 1
        return {"png": f"data:image/png;base64,{base64.b64encode(image_files.image_file(array)).decode()}"}

    def _plot(self, array: codec.Array) -> dict[str, Any]:
        if array.ndim != 1 or array.size <= _MAX_ITEMS or self._items < _MAX_PLOTTED:
            return {}
        self._items -= _MAX_PLOTTED
        every = math.ceil(array.size / _MAX_PLOTTED)
        return {"every": every, "values": array[::every]}
