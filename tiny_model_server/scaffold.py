"""The commands that write something to begin with: ``new``, ``dockerfile`` and ``proto``."""

import json
import os
import shutil
import sys
from pathlib import Path

from tiny_model_server import __version__
from tiny_model_server.engine.mistakes import install_command
from tiny_model_server.settings import SettingsError, model_prefix, name_problem

_HERE = Path(__file__).resolve().parent
_TEMPLATES = _HERE / "templates"


def kinds() -> list[str]:
    """What a new model may begin as."""
    return sorted(folder.name for folder in _TEMPLATES.iterdir() if folder.is_dir())


def new_model(models: Path, name: str, kind: str, program: str) -> int:
    """Makes the folder of a new model. SettingsError if it cannot be made; nothing is overwritten."""
    if problem := name_problem(name):
        raise SettingsError(f"{name!r} cannot be the name of a model: {problem}")
    folder = models / name
    try:
        models.mkdir(parents=True, exist_ok=True)
        for other in models.iterdir():
            if other.name != name and model_prefix(other.name) == model_prefix(name):
                raise SettingsError(f"model {other.name!r} has the same settings {model_prefix(name)}*; choose another")
        folder.mkdir()
        for file in sorted((_TEMPLATES / kind).iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    except FileExistsError as error:
        raise SettingsError(f"{error.filename} exists already; nothing was changed") from None
    except OSError as error:
        raise SettingsError(f"{folder} cannot be made: {error}") from None
    print(f"made {folder}: put your model into {folder / '__init__.py'}")
    if (folder / "requirements.txt").exists():
        print(f"install what it needs:  {install_command(folder / 'requirements.txt')}")
    where = "" if models == Path("models") else f" --models {models}"
    print(f"try it:                 {program} check {name}{where}")
    print(f"serve it:               {program} serve{where}")
    return 0


def dockerfile(models: Path, wheel: Path | None) -> int:
    """Prints a Dockerfile for a models folder. SettingsError if a file is not below this folder, as a build needs."""
    if not models.is_dir():
        raise SettingsError(f"there is no folder {models}; make a first model in it: tiny-model-server new NAME")
    folder = _in_context(models)
    names = sorted(one.name for one in models.iterdir() if not name_problem(one.name.lstrip("_")))
    own = [name for name in names if (models / name / ".venv").is_dir()]
    needs = [name for name in names if (models / name / "requirements.txt").is_file() and name not in own]
    parts = {
        "models": f"{folder}/",
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "server": _install_server(wheel),
        "requirements": _install_requirements(folder, needs),
        "folder": json.dumps([f"{folder}/", "models/"]),
        "environments": "\n".join(_make_environment(name, models) for name in own),
    }
    text = (_TEMPLATES / "Dockerfile").read_text()
    for name, part in parts.items():
        text = text.replace(f"@{name}@\n", f"{part}\n" if part else "").replace(f"@{name}@", part)
    print(text, end="")
    return 0


def proto() -> int:
    """Prints server.proto."""
    print((_HERE / "server.proto").read_text(), end="")
    return 0


def _in_context(path: Path) -> str:
    """The path relative to the folder in which the image is built."""
    try:
        return Path(os.path.abspath(path)).relative_to(os.path.abspath(".")).as_posix()
    except ValueError:
        raise SettingsError(f"{path} is not below this folder, in which the image is to be built") from None


def _install_server(wheel: Path | None) -> str:
    if not wheel:
        return f'RUN pip install "tiny-model-server[server]=={__version__}"'
    if not wheel.is_file():
        raise SettingsError(f"there is no wheel {wheel}")
    return f'COPY {json.dumps([_in_context(wheel), "/tmp/"])}\nRUN pip install "/tmp/{wheel.name}[server]"'


def _install_requirements(folder: str, names: list[str]) -> str:
    """Installs what the models need before their code is copied, so that a change of code installs nothing again."""
    if not names:
        return ""
    copies = [f"COPY {json.dumps([f'{folder}/{name}/requirements.txt', f'/tmp/{name}.txt'])}" for name in names]
    files = " ".join(f'-r "/tmp/{name}.txt"' for name in names)
    index = '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}'
    return "\n".join([*copies, f"RUN pip install {index} {files}"])


def _make_environment(name: str, models: Path) -> str:
    """A model with an interpreter of its own gets one in the image, for that of this host cannot be copied."""
    venv, file = f"models/{name}/.venv", f"models/{name}/requirements.txt"
    needs = f' -r "{file}"' if (models / name / "requirements.txt").exists() else ""
    return f'RUN rm -rf "{venv}" && python -m venv "{venv}" && "{venv}/bin/pip" install numpy{needs}'
