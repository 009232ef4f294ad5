"""Pictures of arrays, for those who cannot read arrays: the page, and Modzy's files."""

import numpy as np

from tiny_model_server import codec


def image_file(array: codec.Array, kind: str = "image/png") -> bytes:
    """The picture of an array HxW or HxWx3 (RGB): uint8 as it is, all else stretched from its least to its greatest."""
    import cv2  # not before somebody asks for a picture

    if array.dtype != np.uint8:
        array = np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)
        low, high = array.min(), array.max()
        array = ((array - low) * (255 / (high - low or 1))).astype(np.uint8)
    coloured = array[..., ::-1] if array.ndim == 3 and array.shape[2] == 3 else array
    ending = {"image/jpeg": ".jpg", "image/bmp": ".bmp", "image/webp": ".webp"}.get(kind, ".png")
    encoded: bytes = cv2.imencode(ending, np.ascontiguousarray(coloured))[1].tobytes()
    return encoded
