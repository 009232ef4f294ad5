"""ModelMesh's calls by caikit's generated stubs. Arguments: address, a model folder."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import grpc

# The stubs alone: caikit's own __init__ would bring all of it.
package = types.ModuleType("stubs")
package.__path__ = [str(Path(importlib.util.find_spec("caikit").origin).parent / "runtime" / "protobufs")]
sys.modules["stubs"] = package
from stubs import model_runtime_pb2 as messages  # noqa: E402
from stubs import model_runtime_pb2_grpc as services  # noqa: E402

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = services.ModelRuntimeStub(channel)
    status = stub.runtimeStatus(messages.RuntimeStatusRequest())
    assert status.status == messages.RuntimeStatusResponse.READY
    assert status.maxLoadingConcurrency >= 1
    assert status.modelLoadingTimeoutMs >= 100
    assert status.capacityInBytes >= 2 * status.defaultModelSizeInBytes > 0
    assert list(status.methodInfos["inference.GRPCInferenceService/ModelInfer"].idInjectionPath) == [1]
    key = json.dumps({"model_type": {"name": "tiny"}})
    about = {"modelType": "rt:tiny", "modelPath": sys.argv[2], "modelKey": key}
    guess = stub.predictModelSize(messages.PredictModelSizeRequest(modelId="x__isvc-1.2", **about))
    assert guess.sizeInBytes > 0
    loaded = stub.loadModel(messages.LoadModelRequest(modelId="x__isvc-1.2", **about))
    assert loaded.sizeInBytes > 1 << 20
    assert stub.modelSize(messages.ModelSizeRequest(modelId="x__isvc-1.2")).sizeInBytes > 1 << 20
    stub.unloadModel(messages.UnloadModelRequest(modelId="x__isvc-1.2"))
    stub.unloadModel(messages.UnloadModelRequest(modelId="x__isvc-1.2"))
    try:
        stub.modelSize(messages.ModelSizeRequest(modelId="x__isvc-1.2"))
        raise SystemExit("no error")
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
