"""Proves the manifests in k8s/ on a real node: scale, update, kill and drain under the load of a running ModelClient.

``make test_k8s`` runs it, as root, with ``CLUSTER`` naming the folder of scripts that build and start the node. The
manifests are rewritten for that node's old version (1.20): native gRPC probes become commands, two API groups their
betas; and the pods ask for less CPU, so that several fit on a small machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402
from tests import balance, engine  # noqa: E402
from tests.conftest import wait_for  # noqa: E402

DNS = "10.244.255.1:53"
ADDRESS = f"dns://{DNS}/models.default.svc.cluster.local:50000"
RATE = 20.0
OLD = {"autoscaling/v2": "autoscaling/v2beta2", "policy/v1": "policy/v1beta1"}


def rewritten(text: str) -> str:
    """The manifests as version 1.20 knows them."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        document["apiVersion"] = OLD.get(document["apiVersion"], document["apiVersion"])
        if document["kind"] != "Deployment":
            continue
        container = document["spec"]["template"]["spec"]["containers"][0]
        container["resources"]["requests"] = {"cpu": "150m", "memory": "128Mi"}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]
            assert probe.pop("grpc")["port"] == 50000
            probe["exec"] = {"command": ["python", "server.py", "health"]}
            probe["timeoutSeconds"], probe["periodSeconds"] = 10, max(3, probe["periodSeconds"])
    return yaml.safe_dump_all(documents)


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """What kubectl printed."""
    ran = subprocess.run(
        [os.environ.get("KUBECTL", "kubectl"), *arguments],
        input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {ran.stdout}"
    return ran.stdout.strip()


def pods() -> list[dict[str, Any]]:
    return list(json.loads(kubectl("get", "pods", "-l", "app=models", "-o", "json"))["items"])


def ready(count: int) -> bool:
    """True if exactly these many pods are there, all ready, and none on its way out."""
    found = pods()
    states = [
        all(status["ready"] for status in pod["status"].get("containerStatuses", [{"ready": False}])) for pod in found
    ]
    leaving = any("deletionTimestamp" in pod["metadata"] for pod in found)
    return len(found) == count and all(states) and not leaving


def scale(count: int) -> None:
    kubectl("scale", "deployment/models", f"--replicas={count}")
    wait_for(lambda: ready(count), f"{count} pods", timeout=120)


@contextlib.contextmanager
def load(what: str, seconds: float) -> Iterator[ModelClient]:
    """Runs what stands inside under a steady load of one client, and fails if any call does."""
    outcomes: list[balance.Outcome] = []
    with ModelClient("edges", addresses=ADDRESS) as client:
        thread = threading.Thread(target=lambda: outcomes.append(balance.steady(client, seconds, rate=RATE)))
        thread.start()
        time.sleep(1)
        begun = time.monotonic()
        yield client
        took = time.monotonic() - begun
        thread.join()
    assert took < seconds - 2, f"{what} took {took:.0f} s, longer than the load"
    print(f"{outcomes[0].row(what)}  took {took:.1f} s", flush=True)
    assert not outcomes[0].failures, outcomes[0].failures[:3]


def scenes() -> None:
    """Runs on the node."""
    manifests = rewritten(kubectl("kustomize", str(ROOT / "k8s")))
    without_autoscaler = [one for one in yaml.safe_load_all(manifests) if one["kind"] != "HorizontalPodAutoscaler"]
    autoscaler = [one for one in yaml.safe_load_all(manifests) if one["kind"] == "HorizontalPodAutoscaler"]
    kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifests)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(without_autoscaler))
    scale(2)
    print("| what happens | calls | failed | retries | p50 ms | p99 ms | worst ms |\n|" + " --- |" * 7)
    with load("kubectl scale 2 to 4", 60) as client:
        scale(4)
        wait_for(lambda: len(client.stats()["replicas"]) == 4, "calls to all four", timeout=20)
    with load("kubectl scale 4 to 2", 60):
        scale(2)
    with load("rolling update", 110):
        kubectl("set", "env", "deployment/models", "TMS_LOG_LEVEL=debug")
        kubectl("rollout", "status", "deployment/models", "--timeout=100s")
        wait_for(lambda: ready(2), "the new pods alone", timeout=60)
    with load("pod killed without grace", 50):
        kubectl("delete", "pod", pods()[0]["metadata"]["name"], "--force", "--grace-period=0")
        wait_for(lambda: ready(2), "its successor", timeout=60)
    with load("drain, held by the disruption budget", 50):
        assert "Cannot evict pod" in kubectl(
            "drain", "node1", "--force", "--delete-emptydir-data", "--timeout=15s", check=False
        )
        assert sum("deletionTimestamp" not in pod["metadata"] for pod in pods()) >= 1
        kubectl("uncordon", "node1")
    wait_for(lambda: ready(2), "the drained pod's successor", timeout=60)
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(autoscaler))
    with load("autoscaler", 100):
        grown = "jsonpath={.status.desiredReplicas}"
        wait_for(lambda: int(kubectl("get", "hpa", "models", "-o", grown) or 0) >= 3, "a third replica", timeout=90)
    print("all scenes passed", flush=True)


def main(cluster: Path) -> None:
    """Builds the node's programs and the image, where they are not there yet, and runs the scenes on the node."""
    scratch = ROOT / "build" / "k8s"
    scratch.mkdir(parents=True, exist_ok=True)
    programs = Path(os.environ.get("CLUSTER_BIN", scratch / "bin"))
    if not (programs / "kubelet").exists():
        print("building Kubernetes (about 7 minutes) ...", flush=True)
        subprocess.run(["bash", cluster / "kubernetes-build.sh", scratch], check=True, stdout=subprocess.DEVNULL)
    images = scratch / "images.tar"
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    with engine.running(folder):
        engine.make_base(folder)
        docker = engine.docker
        docker(
            "build",
            "--build-arg",
            "TORCH_INDEX=",
            "-t",
            "tiny-model-server:1.0.0",
            str(engine.copy_tree(folder / "tree", "edges")),
        )
        subprocess.run(["gcc", "-static", "-Os", "-o", folder / "pause", cluster / "pause.c"], check=True)
        (folder / "Dockerfile").write_text('FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause"]\n')
        (folder / ".dockerignore").write_text("*\n!pause\n")
        docker("build", "-t", "localhost/pause:1", str(folder))
        docker("save", "-o", str(images), "tiny-model-server:1.0.0", "localhost/pause:1")
    tests = scratch / "tests.sh"
    tests.write_text(f'$N "{sys.executable}" "{__file__}" scenes\n')
    env = os.environ | {"B": str(programs), "IMAGES": str(images), "TESTS": str(tests)}
    sys.exit(subprocess.run(["bash", cluster / "node.sh"], env=env, check=False).returncode)


if __name__ == "__main__":
    command: Callable[[], None] = scenes if sys.argv[1] == "scenes" else lambda: main(Path(sys.argv[1]).resolve())
    command()
