"""The length of a message on grpcio alone, with no worker: ``PORT``."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value


def add_length(servicer: Any, server: Any) -> None:
    """Registers the method ``Length`` of a servicer."""
    handler = grpc.unary_unary_rpc_method_handler(servicer.Length, BytesValue.FromString, Int64Value.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Peer", {"Length": handler}),))


class Servicer:
    def Length(self, request: BytesValue, context: grpc.ServicerContext) -> Int64Value:
        return Int64Value(value=len(request.value))


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
    add_length(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()
