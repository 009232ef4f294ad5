"""The load test, headless and short, against a real server; and that a missed service level is reported."""

import csv
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from tests.conftest import ROOT, Server, free_port, wait_for


def locust(server: Server, folder: Path, *options: str) -> tuple[int, list[dict[str, str]], str]:
    """The exit code, the rows of the statistics, and what was printed."""
    command = [sys.executable, "-m", "locust", "-f", "tests/locustfile.py", "--headless", "--host", server.address]
    command += ["-u", "4", "-r", "4", "-t", "4s", "--csv", str(folder / "load"), "--html", str(folder / "load.html")]
    ran = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    with (folder / "load_stats.csv").open() as file:
        return ran.returncode, list(csv.DictReader(file)), ran.stdout + ran.stderr


def test_a_mix_within_its_service_level(server: Server, tmp_path: Path) -> None:
    options = ["--model", "describe", "--image-size", "320x240", "--mix", "image=2,text=1,batch=1", "--batch-size", "3"]
    code, rows, said = locust(server, tmp_path, *options, "--max-p99-ms", "2000", "--max-failures", "0")
    assert code == 0, said
    counts = {row["Name"]: int(row["Request Count"]) for row in rows}
    assert set(counts) == {"describe image", "describe text", "describe batch", "Aggregated"}
    assert counts["Aggregated"] > 100
    assert counts["describe image"] > counts["describe text"]
    assert "describe image" in (tmp_path / "load.html").read_text()


def test_a_rate(server: Server, tmp_path: Path) -> None:
    _, rows, _ = locust(server, tmp_path, "--model", "echo", "--mix", "text=1", "--rate", "5")
    assert 50 < int(rows[-1]["Request Count"]) < 100  # 4 users, 4 s, 5 a second each


def test_a_missed_service_level_is_an_exit_code(server: Server, tmp_path: Path) -> None:
    options = ["--model", "nobody", "--mix", "text=1", "--max-p99-ms", "0.01", "--max-failures", "0.1", "-t", "2s"]
    code, _, printed = locust(server, tmp_path, *options)
    assert code == 1
    assert "service level missed: p99" in printed
    assert "service level missed: 100.00% failed" in printed


def test_its_page(server: Server) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    options = ["--host", server.address, "--web-host", "127.0.0.1", "--web-port", str(port)]
    command = [sys.executable, "-m", "locust", "-f", "tests/locustfile.py", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    def fetch(path: str, **form: object) -> str:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with urllib.request.urlopen(f"{address}{path}", data, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    try:
        page = wait_for(lambda: fetch("/"), "the page")
        assert "max_p99_ms" in page  # our options can be set there
        started = fetch("/swarm", user_count=2, spawn_rate=2, host=server.address, model="echo", mix="text=1")
        assert json.loads(started)["success"]
        wait_for(lambda: json.loads(fetch("/stats/requests"))["stats"][0]["num_requests"] > 50, "calls")
        assert json.loads(fetch("/stats/requests"))["fail_ratio"] == 0
    finally:
        process.terminate()
        process.wait(20)
