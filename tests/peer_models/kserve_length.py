"""The length of a tensor on KServe's Python server: ``GRPC_PORT HTTP_PORT``."""

import logging
import sys
from typing import Any

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Length(Model):
    def __init__(self) -> None:
        super().__init__("length")
        self.ready = True

    def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        count = np.array([len(payload.inputs[0].as_numpy())])
        output = InferOutput("n", [1], "INT64")
        output.set_data_from_numpy(count, binary_data=True)
        return InferResponse(payload.id, "length", [output])


if __name__ == "__main__":
    grpc_port, http_port = map(int, sys.argv[1:])
    server = ModelServer(grpc_port=grpc_port, http_port=http_port, enable_latency_logging=False)
    logging.getLogger("kserve").setLevel(logging.WARNING)
    server.start([Length()])
