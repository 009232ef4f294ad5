"""Runs a network of PyTorch, on a GPU if there is one. Put your own network in its place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from model_interface import ModelInterface

Image = Annotated[np.ndarray, np.uint8, (None, None, 3)]  # the server refuses what is not HxWx3 uint8
WEIGHTS = Path(__file__).parent / "weights.pt"


class Model(ModelInterface):
    """Takes an image in colour. The server decodes image files to RGB."""

    max_batch_size = 16  # most inputs in one run_batch; those of one batch have one shape
    example = np.zeros((32, 32, 3), np.uint8)  # run once before the model counts as ready, and by `check`

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # a worker sees its own GPU only
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(8, 2),
        )  # fmt: skip
        if WEIGHTS.exists():  # without trained weights, its answers mean nothing
            self.network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
        self.network.to(self.device).eval()

    def run(self, data: Image, args: dict[str, Any]) -> dict[str, Any]:
        """Returns ``{"class": 0, "probabilities": tensor}``."""
        return self.run_batch([data], args)[0]

    def run_batch(self, items: Sequence[Image], args: dict[str, Any]) -> list[dict[str, Any]]:
        """The same for several images, in one pass through the network."""
        with torch.inference_mode():
            images = torch.from_numpy(np.stack(items)).to(self.device).permute(0, 3, 1, 2)
            probabilities = self.network(images / 255).softmax(dim=1)
        return [{"class": int(row.argmax()), "probabilities": row} for row in probabilities]
