"""The targets of ``make fuzz-parsers`` work, and what fuzzing has found is repaired."""

import subprocess
import sys

from tests.conftest import ROOT


def test_each_target_takes_its_seeds() -> None:
    command = [sys.executable, "tests/fuzz_parsers.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
