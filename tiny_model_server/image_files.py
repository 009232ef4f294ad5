"""PNG and other encodings of arrays, for those who cannot read arrays: the page, and Modzy's files."""

from contextlib import suppress

import numpy as np

from tiny_model_server import codec


def image_file(array: codec.Array, kind: str = "image/png") -> bytes:
    """An image file of an array HxW, HxWx3 (RGB) or HxWx4 (RGBA): uint8 as it is, other numbers stretched to 0 to 255.

    ValueError if there is no such file: a JPEG has no more than 65535 rows or columns.
    """
    import cv2  # takes long to import, and is seldom needed

    if array.dtype != np.uint8:
        finite = np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)
        array = cv2.normalize(finite, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    swap = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(array.shape[2] if array.ndim == 3 else 1)
    ordered = np.ascontiguousarray(array) if swap is None else cv2.cvtColor(np.ascontiguousarray(array), swap)
    ending = {"image/jpeg": ".jpg", "image/bmp": ".bmp", "image/webp": ".webp"}.get(kind, ".png")
    with suppress(cv2.error):
        made, encoded = cv2.imencode(ending, ordered)
        if made:
            return encoded.tobytes()
    raise ValueError(f"no {ending} file can have shape {array.shape}")
