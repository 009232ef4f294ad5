"""open-inference-grpc's generated classes. Argument: address."""

import sys

import grpc
from open_inference.grpc.protocol import ModelInferRequest, ServerReadyRequest
from open_inference.grpc.service import GRPCInferenceServiceStub

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = GRPCInferenceServiceStub(channel)
    assert stub.ServerReady(ServerReadyRequest()).ready
    request = ModelInferRequest(model_name="echo", id="7")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[2])
    tensor.contents.fp32_contents.extend([1.5, -2])
    answer = stub.ModelInfer(request)
    assert answer.id == "7"
    assert list(answer.outputs[0].contents.fp32_contents) == [1.5, -2]
