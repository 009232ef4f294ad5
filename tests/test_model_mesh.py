"""ModelMesh's sidecar, played: its first questions, loads, routing, races and the unload that overtakes a load."""

import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model
from tiny_model_server import schemas

RUNTIME = schemas.methods("model_mesh", "mmesh.ModelRuntime")
INFERENCE = schemas.methods("open_inference", "inference.GRPCInferenceService")
NATIVE = schemas.methods("server", "server.Server")
Code = grpc.StatusCode
SLOW = (
    "    def __init__(self):\n        import time\n        time.sleep({})\n"
    "    def run(self, data, args):\n        return data"
)


class Sidecar:
    def __init__(self, server: Server) -> None:
        self.channel = grpc.insecure_channel(server.address)

    def begin(self, method: schemas.Method, metadata: list[tuple[str, Any]] | None = None, **fields: Any) -> Any:
        stub = self.channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        return stub.future(method.request(**fields), timeout=30, metadata=metadata)

    def call(self, name: str, **fields: Any) -> Any:
        return self.begin(RUNTIME[name], **fields).result()

    def refusal(self, name: str, **fields: Any) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(name, **fields)
        return caught.value.code()

    def load(self, model: str, path: Path) -> Any:
        return self.begin(RUNTIME["loadModel"], modelId=model, modelType="tiny", modelPath=str(path), modelKey="{}")

    def infer(self, metadata: list[tuple[str, Any]], text: str = "x") -> Any:
        tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [text.encode()]}}
        answer = self.begin(INFERENCE["ModelInfer"], metadata, model_name="service", inputs=[tensor]).result()
        return answer.outputs[0].contents.bytes_contents[0].decode()


@pytest.fixture
def server(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    """As in its pod: no models of its own."""
    (tmp_path / "none").mkdir()
    server: Server = start_server(tmp_path / "none", TMS_PROTOCOLS="native,open_inference,model_mesh")
    return server


@pytest.fixture
def sidecar(server: Server) -> Iterator[Sidecar]:
    made = Sidecar(server)
    wait_for(lambda: made.call("runtimeStatus").status == 1, "READY")
    yield made
    made.channel.close()


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    body = "    def run(self, data, args):\n        return data.upper()"
    return write_model(tmp_path / "pulled", "12ab.cd", body) / "12ab.cd"


def metrics(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=5) as answer:
        read: bytes = answer.read()
    return read.decode()


def test_the_way_of_a_model(server: Server, sidecar: Sidecar, upper: Path) -> None:
    assert sidecar.call("predictModelSize", modelId="a", modelPath=str(upper)).sizeInBytes == 256 << 20
    loaded = sidecar.load("a__isvc-1", upper).result()
    assert 1 << 20 < loaded.sizeInBytes < 1 << 30
    assert loaded.maxConcurrency == 1
    assert sidecar.call("predictModelSize", modelId="b", modelPath=str(upper)).sizeInBytes == loaded.sizeInBytes
    for metadata in ([("mm-model-id", "a__isvc-1")], [("mm-model-id-bin", b"a__isvc-1")]):
        assert sidecar.infer(metadata) == "X"
    request: dict[str, Any] = {"text": "hi", "model": "other"}
    assert sidecar.begin(NATIVE["RunText"], [("mm-model-id", "a__isvc-1")], **request).result().data == '"HI"'
    found = sidecar.begin(INFERENCE["ModelMetadata"], [("mm-model-id", "a__isvc-1")], name="service").result()
    assert found.name == "a__isvc-1"
    assert 'model="a__isvc-1"' in metrics(server)
    sidecar.call("unloadModel", modelId="a__isvc-1")
    with pytest.raises(grpc.RpcError) as caught:
        sidecar.infer([("mm-model-id", "a__isvc-1")])
    assert caught.value.code() is Code.NOT_FOUND  # so that the sidecar looks again where the model is
    assert sidecar.refusal("modelSize", modelId="a__isvc-1") is Code.NOT_FOUND
    assert 'model="a__isvc-1"' not in metrics(server)
    sidecar.call("unloadModel", modelId="a__isvc-1")


def test_what_cannot_be_loaded(sidecar: Sidecar, tmp_path: Path) -> None:
    paths = str(tmp_path / "nothing"), "/" + "x" * 5000, "\0"
    for fields in ({}, {"modelId": "a"}, *({"modelId": "a", "modelPath": path} for path in paths)):
        assert sidecar.refusal("loadModel", **fields) is Code.INVALID_ARGUMENT  # no load was tried
    broken = write_model(
        tmp_path, "broken", "    def __init__(self):\n        raise ValueError('no weights')\n    run = print"
    )
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="no weights") as caught:
            sidecar.load("a", broken / "broken").result()
        assert caught.value.code() is Code.INTERNAL
    assert sidecar.refusal("modelSize", modelId="a") is Code.NOT_FOUND


def test_loads_of_one_id_come_one_after_the_other(server: Server, sidecar: Sidecar, tmp_path: Path) -> None:
    slow = write_model(tmp_path, "slow", SLOW.format(0.5)) / "slow"
    loads = [sidecar.load("a", slow) for _ in range(4)]
    assert all(load.result().sizeInBytes > 0 for load in loads)
    assert sum("model a LOADING" in line for line in server.log) == 1


def test_a_cancelled_load_leaves_nothing(server: Server, sidecar: Sidecar, tmp_path: Path, upper: Path) -> None:
    """The unload arrives while the cancelled load still runs, and a new load of the same id follows at once."""
    slow = write_model(tmp_path, "slow", SLOW.format(20)) / "slow"
    for _ in range(3):
        load = sidecar.load("a", slow)
        server.wait_for_log("model a LOADING")
        server.log.clear()
        started = time.monotonic()
        load.cancel()
        sidecar.call("unloadModel", modelId="a")
        assert time.monotonic() - started < 5
        assert sidecar.refusal("modelSize", modelId="a") is Code.NOT_FOUND
    assert sidecar.load("a", upper).result().sizeInBytes > 0
    assert sidecar.infer([("mm-model-id", "a")]) == "X"


def test_races(sidecar: Sidecar, upper: Path) -> None:
    """Loads, cancellations and unloads of two ids at random; in the end both can be loaded and answer."""

    def churn(number: int) -> None:
        for step in range(6):
            model = f"m{(number + step) % 2}"
            load = sidecar.load(model, upper)
            if (number + step) % 3 == 0:
                time.sleep(0.02 * step)
                load.cancel()
            elif (number + step) % 3 == 1:
                assert load.result().sizeInBytes
            sidecar.call("unloadModel", modelId=model)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))
    for model in ("m0", "m1"):
        assert sidecar.load(model, upper).result().sizeInBytes
        assert sidecar.infer([("mm-model-id", model)]) == "X"


def test_a_sidecar_that_starts_again_finds_nothing_loaded(sidecar: Sidecar, upper: Path) -> None:
    for number in range(3):
        sidecar.load(f"m{number}", upper).result()
    assert sidecar.infer([("mm-model-id", "m0")]) == "X"
    assert sidecar.call("runtimeStatus").status == 1
    for number in range(3):
        assert sidecar.refusal("modelSize", modelId=f"m{number}") is Code.NOT_FOUND


def test_what_the_sidecar_asks_first(sidecar: Sidecar) -> None:
    status = sidecar.call("runtimeStatus")
    assert status.maxLoadingConcurrency >= 1
    assert status.modelLoadingTimeoutMs >= 100
    default = status.defaultModelSizeInBytes
    assert status.capacityInBytes >= max(2 * default, min(512 << 20, 10 * default)) > 0
    assert status.methodInfos
    assert not status.allowAnyMethod
    for name, info in status.methodInfos.items():
        service, method = name.split("/")
        found = schemas.methods({"inference": "open_inference", "server": "server"}[service.split(".")[0]], service)
        (number,) = info.idInjectionPath
        field = found[method].request.DESCRIPTOR.fields_by_number[number]
        assert field.name in ("model", "model_name", "name", "data"), name
    channel = sidecar.channel
    health = schemas.methods("health", "grpc.health.v1.Health")["Check"]
    assert (
        channel.unary_unary(health.path, health.request.SerializeToString, health.response.FromString)(
            health.request()
        ).status
        == 1
    )


@pytest.mark.parametrize(("capacity", "default", "least"), [(100, 256, 512), (511, 60, 512), (99, 50, 500)])
def test_a_capacity_that_the_sidecar_would_refuse(
    start_server: Callable[..., Server], capacity: int, default: int, least: int
) -> None:
    with pytest.raises(AssertionError, match=f"wants at least {least}"):
        start_server(TMS_PROTOCOLS="model_mesh", TMS_MESH_CAPACITY_MB=capacity, TMS_MESH_DEFAULT_MB=default)


def test_the_runtimes_manifest(start_server: Callable[..., Server], tmp_path: Path, upper: Path) -> None:
    """The container as ModelMesh starts it, but for the port and the folder."""
    runtime = yaml.safe_load((ROOT / "k8s" / "modelmesh" / "servingruntime.yaml").read_text())
    spec = runtime["spec"]
    (container,) = spec["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert spec["grpcEndpoint"] == spec["grpcDataEndpoint"] == f"port:{env['TMS_PORT']}"
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 10
    assert int(env["TMS_MESH_CAPACITY_MB"]) < limit
    made = Sidecar(start_server(**env | {"TMS_PORT": 0, "TMS_MODELS_DIR": tmp_path}))
    status = made.call("runtimeStatus")
    assert (status.status, status.capacityInBytes) == (1, int(env["TMS_MESH_CAPACITY_MB"]) << 20)
    made.load("a", upper).result()
    assert made.infer([("mm-model-id", "a")]) == "X"
    made.channel.close()
