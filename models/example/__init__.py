"""The tutorial: a model in pure numpy. Copy this folder, rename it, and put your own code into ``run``."""

from typing import Any

import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Returns a few figures about an image, or about a text."""

    example = np.zeros((4, 4, 3), np.uint8)

    def run(self, data: Any, args: dict[str, Any]) -> dict[str, Any]:
        """``{"shape", "mean", "histogram"}`` of an image (``args["bins"]``, 4 by default), ``{"words"}`` of a text."""
        if isinstance(data, str):
            return {"words": len(data.split())}
        if not isinstance(data, np.ndarray):
            raise InvalidInput(f"this model takes an image or a text, not a {type(data).__name__}")
        histogram, _ = np.histogram(data, bins=args.get("bins", 4), range=(0, 256))
        return {"shape": data.shape, "mean": data.mean(), "histogram": histogram}
