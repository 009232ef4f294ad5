"""What is shipped for containers and clusters, unmodified, by schemas and linters; ``make test_k8s`` runs it."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tiny_model_server.settings import Settings

LINT = Path(sys.prefix) / "lint" / "bin"
K8S = ROOT / "k8s"
linted = pytest.mark.skipif(not LINT.exists(), reason=f"make test installs the linters in {LINT}")
KINDS = {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}


def kustomized(folder: Path) -> list[dict[str, Any]]:
    if not shutil.which("kubectl"):
        pytest.skip("not installed here: kubectl (Debian's kubernetes-client)")
    ran = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def deployment() -> dict[str, Any]:
    return dict(yaml.safe_load((K8S / "base" / "deployment.yaml").read_text()))


@linted
def test_schemas_of_a_current_kubernetes() -> None:
    files = sorted(path for path in (K8S / "base").glob("*.yaml") if path.name != "kustomization.yaml")
    assert {yaml.safe_load(path.read_text())["kind"] for path in files} == KINDS
    command = [LINT / "kubernetes-validate", "--strict", "-k", "1.32", *files]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@linted
def test_nothing_for_the_linter(tmp_path: Path) -> None:
    for folder in (K8S, K8S / "overlays" / "gpu", K8S / "overlays" / "queue"):
        (tmp_path / f"{folder.name}.yaml").write_text(yaml.safe_dump_all(kustomized(folder)))
    options = ["--config-file", K8S / ".checkov.yaml", "--framework", "kubernetes"]
    ran = subprocess.run([LINT / "checkov", *options, "-d", tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Failed checks: 0" in ran.stdout
    assert "Passed checks: 0" not in ran.stdout


@linted
def test_the_dockerfile_has_no_lint() -> None:
    ran = subprocess.run([LINT / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_labels_and_ports_meet() -> None:
    service = yaml.safe_load((K8S / "base" / "service.yaml").read_text())
    budget = yaml.safe_load((K8S / "base" / "disruption.yaml").read_text())
    template = deployment()["spec"]["template"]
    for selector in (
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
        deployment()["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert ports == {port["port"] for port in service["spec"]["ports"]} == {Settings().port, Settings().http_port}
    assert service["spec"]["clusterIP"] == "None"  # headless, so that clients see every pod


def test_the_settings_are_real_and_fit_the_time_to_stop() -> None:
    pod = deployment()["spec"]["template"]["spec"]
    env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    settings = Settings.from_env(env)
    assert settings.drain_delay_s + settings.grace_s < pod["terminationGracePeriodSeconds"]


def test_overlays() -> None:
    gpu = {one["kind"]: one for one in kustomized(K8S / "overlays" / "gpu")}
    assert set(gpu) == KINDS
    (container,) = gpu["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    queue = {one["kind"]: one for one in kustomized(K8S / "overlays" / "queue")}
    assert set(queue) == KINDS - {"HorizontalPodAutoscaler"} | {"ScaledObject"}
    assert queue["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == queue["Deployment"]["metadata"]["name"]
