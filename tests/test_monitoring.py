"""The monitoring example: rules by promtool, and every query of the dashboard against a real Prometheus."""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, Server, free_port, wait_for

FOLDER = ROOT / "examples" / "monitoring"
NEEDED = [tool for tool in ("prometheus", "promtool") if not shutil.which(tool)]
needs_prometheus = pytest.mark.skipif(bool(NEEDED), reason=f"not installed here: {', '.join(NEEDED)}")


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "grafana" / "dashboard.json").read_text()))


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_rules(command: list[str]) -> None:
    ran = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_has_a_test() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    tried = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert {rule["alert"] for rule in rules} == tried


@needs_prometheus
@pytest.mark.timeout(120)
def test_every_query_finds_something(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server, port = start_server(), free_port()
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.http_port}"]}]
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        prometheus = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    end = threading.Event()

    def load() -> None:
        with server.client("echo") as client, server.client("nobody") as nobody:
            while not end.is_set():
                client.run_text_batch(["a", "b"])
                with pytest.raises(Exception, match="there is no model"):
                    nobody.run_text("x")
                time.sleep(0.02)

    def found(query: str) -> Any:
        address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (400, 422):
                raise AssertionError(f"{query}: {error.read().decode()}") from None
            return []  # it is still starting

    caller = threading.Thread(target=load)
    caller.start()
    try:
        wait_for(lambda: found('rate(tms_requests_total{model="echo",status="OK"}[1m])'), "two scrapes", timeout=40)
        for panel in dashboard()["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$model", ".*")
                results = found(query)
                assert any(one["metric"].get("model") == "echo" for one in results), (panel["title"], query)
                named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert named <= set(results[0]["metric"]), target["legendFormat"]
        for rule in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]:
            for metric in re.findall(r"\b(tms_\w+|up)\b", rule["expr"]):
                assert found(f"{metric}"), f"{rule['alert']} asks for {metric}"
    finally:
        end.set()
        caller.join()
        prometheus.kill()
        prometheus.wait()


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    assert mounts
    assert all((FOLDER / mount).is_file() for mount in mounts)
    assert (FOLDER / services["server"]["build"] / "Dockerfile").is_file()
