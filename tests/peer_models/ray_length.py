"""The length of a message on Ray Serve, by its gRPC ingress: ``GRPC_PORT HTTP_PORT FOLDER``."""

import sys
import threading

import ray
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

QUIET = {"enable_access_log": False}


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5}, logging_config=QUIET)
class Length:
    def Length(self, request: BytesValue) -> Int64Value:
        return Int64Value(value=len(request.value))


if __name__ == "__main__":
    grpc_port, http_port = map(int, sys.argv[1:3])
    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=sys.argv[3], object_store_memory=1 << 29)
    serve.start(
        http_options=HTTPOptions(port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=["grpc_length.add_length"]),
        logging_config=QUIET,
    )
    serve.run(Length.bind(), name="length")
    threading.Event().wait()
