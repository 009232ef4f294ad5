"""A PyTorch classifier with trained weights: which digit is in the image? Shows ``run_batch``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_interface import ModelInterface

from .network import Network, to_input

HERE = Path(__file__).parent


class Model(ModelInterface):
    """Takes an image of a light digit on a dark ground, grey or RGB."""

    example = np.zeros((8, 8), np.uint8)
    metadata = {
        "description": "Handwritten digits, a convolutional network of 30,000 weights; train.py made it.",
        "accuracy": 0.9861,
    }

    def __init__(self) -> None:
        self.network = Network()
        self.network.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
        self.network.eval()

    def get_input_shape(self) -> list[int]:
        """The size that images are scaled to."""
        return [8, 8]

    def run(self, data: Any, args: dict[str, Any]) -> Any:
        """``{"digit", "probabilities"}``."""
        return self.run_batch([data], args)[0]

    def run_batch(self, items: Sequence[Any], args: dict[str, Any]) -> list[Any]:
        """The same for several images in one pass through the network."""
        with torch.inference_mode():
            logits = self.network(torch.from_numpy(np.stack([to_input(image) for image in items])))
            return [{"digit": int(row.argmax()), "probabilities": row.numpy()} for row in torch.softmax(logits, dim=1)]
