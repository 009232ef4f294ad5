"""PNG and other encodings of arrays, for those who cannot read arrays: the page, and Modzy's files."""

from contextlib import suppress

import numpy as np

from tiny_model_server import codec

_BLOCK = 1 << 20  # numbers; as float64 they take up to eight times the memory that they had


def image_file(array: codec.Array, kind: str = "image/png") -> bytes:
    """An image file of an array HxW, HxWx3 (RGB) or HxWx4 (RGBA): uint8 as it is, other numbers stretched to 0 to 255.

    ValueError if there is no such file: a JPEG has no more than 65535 rows or columns.
    """
    import cv2  # takes long to import, and is seldom needed

    if array.dtype != np.uint8:
        array = _stretched(array)
    swap = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.shape[2] if array.ndim == 3 else 1)
    ordered = np.ascontiguousarray(array) if swap is None else cv2.cvtColor(np.ascontiguousarray(array), swap)
    ending = {"image/jpeg": ".jpg", "image/bmp": ".bmp", "image/webp": ".webp"}.get(kind, ".png")
    with suppress(cv2.error):
        made, encoded = cv2.imencode(ending, ordered)
        if made:
            return encoded.tobytes()
    raise ValueError(f"no {ending} file can have shape {array.shape}")


def _stretched(array: codec.Array) -> codec.Array:
    """Numbers stretched to 0 to 255, as uint8; those that are not finite count as 0."""
    flat, made = array.reshape(-1), np.empty(array.size, np.uint8)
    parts = [slice(begin, begin + _BLOCK) for begin in range(0, array.size, _BLOCK)]
    low = float(min(_finite(flat[part]).min() for part in parts))
    high = float(max(_finite(flat[part]).max() for part in parts))
    scale = 255 / (high - low) if high - low > np.finfo(np.float64).eps else 0.0
    for part in parts:
        made[part] = np.rint(_finite(flat[part]) * scale - low * scale)
    return made.reshape(array.shape)


def _finite(array: codec.Array) -> codec.Array:
    return np.nan_to_num(array.astype(np.float64), copy=False, posinf=0, neginf=0)
