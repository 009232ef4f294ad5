"""Runs a network of PyTorch, on a GPU if there is one. Put your own network in its place."""

from pathlib import Path

import numpy as np
import torch

from model_interface import InvalidInput, ModelInterface

WEIGHTS = Path(__file__).parent / "weights.pt"


class Model(ModelInterface):
    """Takes an image in colour, an array HxWx3 uint8. The server decodes image files to RGB."""

    max_batch_size = 16  # most inputs in one run_batch
    example = np.zeros((32, 32, 3), np.uint8)  # run once before the model counts as ready, and by `check`

    def __init__(self):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # a worker sees its own GPU only
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(8, 2),
        )  # fmt: skip
        if WEIGHTS.exists():  # without trained weights, its answers mean nothing
            self.network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
        self.network.to(self.device).eval()

    def run(self, data, args):
        """Returns ``{"class": 0, "probabilities": array}``."""
        return self.run_batch([data], args)[0]

    @torch.inference_mode()
    def run_batch(self, items, args):
        """The same for several images of one size, in one pass through the network."""
        images = torch.from_numpy(np.stack([checked(item) for item in items])).to(self.device)
        logits = self.network(images.permute(0, 3, 1, 2) / 255)
        return [{"class": int(row.argmax()), "probabilities": row.cpu().numpy()} for row in logits.softmax(dim=1)]


def checked(image):
    """The image, if the network can read it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InvalidInput("send an image in colour, HxWx3 uint8")
    if min(image.shape[:2]) < 3:
        raise InvalidInput("send an image of 3x3 pixels or more")
    return image
