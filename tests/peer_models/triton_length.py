"""The length of a tensor on Triton, by pytriton: ``GRPC_PORT HTTP_PORT METRICS_PORT``."""

import sys
from typing import Any

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def length(requests: list[Any]) -> list[dict[str, np.ndarray]]:
    return [{"n": np.array([len(request["x"])])} for request in requests]


if __name__ == "__main__":  # its workers import this file
    grpc_port, http_port, metrics_port = map(int, sys.argv[1:])
    x, n = Tensor(name="x", dtype=np.uint8, shape=(-1,)), Tensor(name="n", dtype=np.int64, shape=(1,))
    config = TritonConfig(grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    with Triton(config=config) as triton:
        triton.bind("length", [length, length], [x], [n], config=ModelConfig(batching=False))
        triton.serve()
