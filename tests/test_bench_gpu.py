"""The benchmarks of GPUs and of replicas with tiny sizes: all parts run that need no GPU, and the tables have rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(260)  # its sections have limits of their own

ROWS = {
    "placement": ("the same, 2 replicas", "devices = UUIDs", "devices = cpu", "skipped: no NVIDIA GPU"),
    "memory": ("16, 8, 4, 4, 8, 4, 4", "1 huge, then 4", "ModelFailed"),
    "copies": ("1 x 32x32x3", "4 x 32x32x3", "skipped: no CUDA"),
    "network": ("alone, in 2 processes", "2 workers | 4 | 1 x map of 16", "2 x run_image_batch", "1 x run_image"),
}


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints; AssertionError if it fails."""
    command = [sys.executable, ROOT / "tests" / script, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("section", ROWS)
def test_a_section_of_the_gpu_benchmark(section: str, tmp_path: Path) -> None:
    printed = run("bench_gpu.py", "--tiny", "--out", str(tmp_path / "gpu.md"), section)
    assert (tmp_path / "gpu.md").read_text() == printed
    assert [part for part in ROWS[section] if part not in printed] == []
    assert "Every check passed." in printed


def test_a_failed_section_is_reported_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvidia-smi reports a GPU that torch does not see."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU-7\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = [sys.executable, ROOT / "tests" / "bench_gpu.py", "--tiny", "placement", "copies"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 1
    assert "torch sees [] with CUDA_VISIBLE_DEVICES=GPU-7" in ran.stdout
    assert "(placement FAILED" in ran.stdout
    assert "4 x 32x32x3" in ran.stdout
    assert ran.stdout.endswith("FAILED: placement\n")


def test_the_benchmark_of_replicas(tmp_path: Path) -> None:
    little = ("--replicas", "1,2", "--seconds", "0.2", "--callers", "1")
    printed = run("bench_replicas.py", *little, "--out", str(tmp_path / "replicas.md"))
    assert (tmp_path / "replicas.md").read_text() in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert len(rows) == 8
    assert all(float(cells[4]) > 0 for cells in rows)
    assert [cells[5] for cells in rows[:4]] == ["1.00"] * 4
