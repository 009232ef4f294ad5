"""The types of the installed package, as a type checker of an application sees them."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine import copy_tree
from tests.test_docs import BLOCK
from tests.test_package import UV, environment, run, wheel

__all__ = ["wheel"]  # the fixture
pytestmark = pytest.mark.timeout(300)
PAGES = [ROOT / "README.md", ROOT / "docs" / "client.md"]
UNTYPED = ["--allow-untyped-defs", "--allow-untyped-calls"]  # as the models of the pages are, which need no types
MISTAKES = """
import numpy as np
from model_client import ModelClient
from model_interface import ModelInterface
from tiny_model_server.errors import InvalidInput

model = ModelClient("example", "localhost:50000")
reveal_type(model.run_image)
reveal_type(model.submit_text("x"))
model.run_image(np.zeros((2, 2)), {"a": 1}, 3.5, retry=False)
model.run_image(5)
model.run_text("x", timeout="5")
ModelClient(7)
ModelInterface()
"""
IMAGES = """
import PIL.Image, torch
from model_client import ModelClient
ModelClient("x").run_image(PIL.Image.new("L", (2, 2)))
ModelClient("x").run_image(torch.zeros(2, 2))
"""


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (mypy,) = re.findall(r"^mypy==\S+", (ROOT / "tests" / "requirements.txt").read_text(), re.M)
    return environment(tmp_path_factory.mktemp("typed") / "venv", str(wheel), mypy)


def check(programs: Path, folder: Path, text: str, *options: str) -> tuple[int, str]:
    """The exit code and the report of mypy --strict."""
    (folder / "application.py").write_text(text)
    ran = run(programs / "mypy", "--strict", *options, "application.py", cwd=folder)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_the_pages_is_typed(programs: Path, tmp_path: Path, page: Path) -> None:
    blocks = [textwrap.dedent(block[3]) for block in BLOCK.finditer(page.read_text()) if block[2] == "python"]
    assert blocks
    for text in blocks:
        options = UNTYPED if "class Model(" in text else []
        assert check(programs, tmp_path, text, *options)[0] == 0, f"{text}{check(programs, tmp_path, text, *options)}"


def test_a_type_checker_sees_types_and_mistakes(programs: Path, tmp_path: Path) -> None:
    code, report = check(programs, tmp_path, MISTAKES)
    assert code == 1
    assert "py.typed" not in report
    shown = re.findall(r'Revealed type is "(.*)"', report)
    assert shown[0].endswith("retry: bool =) -> Any")
    assert shown[1:] == ["concurrent.futures._base.Future[Any]"]
    lines = [int(line) for line in re.findall(r"^application\.py:(\d+): error", report, re.M)]
    assert lines == [11, 12, 13, 14], report


def test_images_of_other_libraries_have_the_right_type(tmp_path: Path) -> None:
    """With this environment's mypy, which has the libraries, on the tree."""
    (tmp_path / "application.py").write_text(IMAGES)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", tmp_path / "application.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout


def test_an_editable_install_has_the_modules(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    programs = environment(tmp_path / "venv")
    install = [*UV, "pip", "install", "--quiet", "--python", programs / "python", "-e", tree]
    subprocess.run(install, check=True, timeout=280)
    ran = run(programs / "python", "-c", "from model_client import ModelClient; import model_interface", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
