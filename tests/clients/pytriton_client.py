"""pytriton's ModelClient, which asks for a model's configuration first. Arguments: gRPC address, HTTP address."""

import sys

import numpy as np
from pytriton.client import ModelClient

for url in (f"grpc://{sys.argv[1]}", f"http://{sys.argv[2]}"):
    with ModelClient(url, "rows") as client:
        assert client.model_config.max_batch_size == 32
        rows = np.arange(12, dtype=np.float32).reshape(4, 3)
        assert (client.infer_batch(rows)["output"] == rows * 2).all()
        assert (client.infer_sample(rows[1])["output"] == rows[1] * 2).all()
    with ModelClient(url, "declares") as client:
        answer = client.infer_sample(np.full((4, 4, 3), 6, np.uint8))
        assert answer["output"][0] == b"6.0", answer
