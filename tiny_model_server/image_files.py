"""PNG and other encodings of arrays, for those who cannot read arrays: the page, and Modzy's files."""

import numpy as np

from tiny_model_server import codec


def image_file(array: codec.Array, kind: str = "image/png") -> bytes:
    """An image file of an array HxW or HxWx3 (RGB): uint8 as it is, other numbers stretched to 0 to 255."""
    import cv2  # takes long to import, and is seldom needed

    if array.dtype != np.uint8:
        finite = np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)
        array = cv2.normalize(finite, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    ordered = array[..., ::-1] if array.ndim == 3 and array.shape[2] == 3 else array
    ending = {"image/jpeg": ".jpg", "image/bmp": ".bmp", "image/webp": ".webp"}.get(kind, ".png")
    encoded: bytes = cv2.imencode(ending, np.ascontiguousarray(ordered))[1].tobytes()
    return encoded
