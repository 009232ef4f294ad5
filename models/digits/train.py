"""Trains the network of ``digits`` and ``digits_onnx`` on the digits that scikit-learn ships, and saves both.

    pip install -r models/digits/requirements-train.txt && python models/digits/train.py

Prints the accuracy on a fifth of the data, which it does not train on. Write it into the metadata of both models.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

MODELS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(MODELS.parent), str(MODELS)]

from digits.network import Network  # noqa: E402


def main() -> None:
    """Trains for some seconds on one CPU; the same seed gives the same weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy((digits.images / 16).astype(np.float32)[:, None])
    labels = torch.from_numpy(digits.target)
    known, unseen = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    epochs = 60
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.from_numpy(known)[torch.randperm(len(known))].split(64):
            optimizer.zero_grad()
            shift = int(torch.randint(-1, 2, ()))  # pixels to the side, so that the network does not learn positions
            shifted = torch.roll(images[batch], shift, dims=3) + 0.05 * torch.randn(len(batch), 1, 8, 8)
            torch.nn.functional.cross_entropy(network(shifted), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        accuracy = (network(images[unseen]).argmax(1) == labels[unseen]).float().mean().item()
    print(f"accuracy on {len(unseen)} unseen digits: {accuracy:.4f}")
    torch.save(network.state_dict(), MODELS / "digits" / "weights.pt")
    torch.onnx.export(
        network,
        (images[:2],),
        MODELS / "digits_onnx" / "network.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
    )


if __name__ == "__main__":
    main()
