"""What an orchestrator puts into the environment: variables for Services, limits of CPU and memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Server
from tests.test_faults import ANSWERS, write_model
from tiny_model_server.engine import placement
from tiny_model_server.settings import Settings, SettingsError, check_overrides, service_links


def links(service: str, port: int = 50000, protocol: str = "TCP") -> dict[str, str]:
    """What Kubernetes sets in each pod for a Service of this name."""
    name = service.upper().replace("-", "_")
    url = f"{protocol.lower()}://10.0.0.1:{port}"
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_GRPC": str(port),
        f"{name}_PORT": url,
        f"{name}_PORT_{port}_{protocol}": url,
        f"{name}_PORT_{port}_{protocol}_PROTO": protocol.lower(),
        f"{name}_PORT_{port}_{protocol}_PORT": str(port),
        f"{name}_PORT_{port}_{protocol}_ADDR": "10.0.0.1",
    }


@pytest.mark.parametrize("service", ["tms", "tms-http", "tms-model-x", "tms-model-x-workers", "tms-2", "tms-admin"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
def test_variables_of_services_are_no_settings(service: str, protocol: str) -> None:
    env = links(service, protocol=protocol)
    assert service_links(env) == sorted(env)
    assert Settings.from_env(env) == Settings()
    assert Settings.from_env(env | {"TMS_THREADS": "7"}).threads == 7
    check_overrides(["x"], [], env)


def test_what_only_looks_like_them_is_still_wrong() -> None:
    for name, value in {"TMS_PORT": "10.0.0.1:50000", "TMS_SERVICE": "x", "TMS_PROT": "1"}.items():
        with pytest.raises(SettingsError, match=name):
            Settings.from_env({name: value})


@pytest.mark.usefixtures("default_ports")
def test_a_server_beside_such_services_starts(start_server: Callable[..., Server], tmp_path: Path) -> None:
    models = write_model(tmp_path, "x", ANSWERS.format("x"))
    server = start_server(models=models, **links("tms-http"), **links("tms-model-x"))
    assert server.client("x").run(1) == "x"
    lines = [line for line in server.log if "variables that Kubernetes sets for Services are not settings" in line]
    assert len(lines) == 1


def test_pods_do_not_get_them() -> None:
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if document and document.get("kind") == "Deployment":
                assert document["spec"]["template"]["spec"]["enableServiceLinks"] is False


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CGROUP = "sys/fs/cgroup"
MIB = 1 << 20


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({}, None, None),
        ({f"{CGROUP}/cpu.max": "50000 100000", f"{CGROUP}/memory.max": str(MIB)}, 0.5, MIB),
        ({f"{CGROUP}/cpu.max": "max 100000", f"{CGROUP}/memory.max": "max"}, None, None),
        ({"proc/self/cgroup": "0::/a/b.service\n", f"{CGROUP}/a/b.service/cpu.max": "25000 100000",
          f"{CGROUP}/a/cpu.max": "50000 100000", f"{CGROUP}/a/memory.max": str(2 * MIB)}, 0.25, 2 * MIB),
        ({"proc/self/cgroup": "0::/a/b\n", f"{CGROUP}/a/b/cpu.max": "max 100000", f"{CGROUP}/a/cpu.max": "1000 100000",
          f"{CGROUP}/a/b/memory.max": str(3 * MIB), f"{CGROUP}/a/memory.max": str(2 * MIB)}, 0.01, 2 * MIB),
        ({"proc/self/cgroup": "0::/../elsewhere\n", f"{CGROUP}/cpu.max": "50000 100000"}, 0.5, None),
        ({f"{CGROUP}/cpu/cpu.cfs_quota_us": "50000", f"{CGROUP}/cpu/cpu.cfs_period_us": "100000",
          f"{CGROUP}/memory/memory.limit_in_bytes": str(MIB)}, 0.5, MIB),
        ({f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1", f"{CGROUP}/cpu/cpu.cfs_period_us": "100000",
          f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ({"proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
          f"{CGROUP}/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "50000",
          f"{CGROUP}/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
          f"{CGROUP}/memory/docker/x/memory.limit_in_bytes": str(MIB)}, 0.5, MIB),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/not/seen\n", f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": "70000",
          f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0.7, None),
        ({"proc/self/cgroup": "0::/a\n3:cpu:/b\n", f"{CGROUP}/unified/a/cpu.max": "90000 100000",
          f"{CGROUP}/cpu/b/cpu.cfs_quota_us": "80000", f"{CGROUP}/cpu/b/cpu.cfs_period_us": "100000"}, 0.8, None),
        ({"proc/self/cgroup": "nonsense\n\n::::\n", f"{CGROUP}/cpu.max": "1 0", f"{CGROUP}/memory.max": "lots"},
         None, None),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], cpus: float | None, memory: int | None
) -> None:
    (tmp_path / "empty").mkdir()
    root = write(tmp_path / "root", files)
    assert placement.cpus(root) == (placement.cpus(tmp_path / "empty") if cpus is None else cpus)
    assert placement.memory(root) == (placement.memory(tmp_path / "empty") if memory is None else memory)
