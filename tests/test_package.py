"""The installable package: what is in it, and that it works without the rest of the repository."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT
from dynamicvit.models import __version__, create_model, save_pretrained
from packaging.requirements import Requirement

FOLDERS = ("data", "models", "runs", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling import build; build.build_wheel({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_package_is_the_root_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"dynamicvit-{__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"dynamicvit", f"dynamicvit-{__version__}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.py")}
    modules |= {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    packed = {name.removeprefix("dynamicvit/") for name in names if name.endswith(".py")}
    assert packed == modules - {"dynamicvit.py"} | {"__init__.py"}
    required = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    stated = re.findall("^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    always = {line for line in stated if "extra ==" not in line}
    assert {Requirement(line) for line in always} == {Requirement(line) for line in required}
    assert {"dynamicvit/py.typed", f"dynamicvit-{__version__}.dist-info/entry_points.txt"} <= set(names)


def test_extras_are_the_requirements_of_the_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"dynamicvit-{__version__}.dist-info/METADATA").decode()
    lines = (ROOT / "requirements-export.txt").read_text().splitlines()
    wanted = {Requirement(f"{line}; extra == 'export'") for line in lines if line[0] not in "#-"}
    stated = {Requirement(line) for line in re.findall("^Requires-Dist: (.*)$", metadata, re.MULTILINE)}
    assert wanted <= stated
    assert set(re.findall("^Provides-Extra: (.*)$", metadata, re.MULTILINE)) == {"export", "hf", "plot"}


def test_the_command_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    env = ONE_THREAD | {"PYTHONPATH": str(wheel)}
    entry = "import sys; from importlib.metadata import entry_points; "
    entry += "(command,) = entry_points(group='console_scripts', name='dynamicvit'); sys.exit(command.load()())"
    for start in (["-m", "dynamicvit.tools.cli"], ["-c", entry]):
        command = [sys.executable, *start, "--help"]
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0 and "accelerate" in result.stdout, result.stderr
    code = "import dynamicvit, inspect; print(*inspect.signature(dynamicvit.accelerate).parameters)"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.startswith("model images speedup output"), result.stderr


def test_missing_weights_send_nobody_to_a_script_that_is_not_there(wheel: Path, tmp_path: Path) -> None:
    code = "from dynamicvit.models.pretrained import published_weights; published_weights('deit_base')"
    env = ONE_THREAD | {"PYTHONPATH": str(wheel)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert "in a clone of this project" in result.stderr and "sh download_pretrain.sh" not in result.stderr


def test_in_a_clone_short_names_are_the_packages_modules() -> None:
    code = "import models.spec, errors, dynamicvit.models.spec as m, dynamicvit.errors as e; "
    code += "assert models.spec is m and errors is e"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ONE_THREAD, check=True)


def test_the_package_loads_a_saved_model(wheel: Path, tmp_path: Path) -> None:
    model = create_model("deit_tiny", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, pruning_loc=(1,))
    save_pretrained(model, tmp_path / "fast")
    code = "import sys, dynamicvit; print(dynamicvit.from_pretrained(sys.argv[1]).spec.arch, 'models' in sys.modules)"
    command = [sys.executable, "-c", code, tmp_path / "fast"]
    env = ONE_THREAD | {"PYTHONPATH": str(wheel)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == ["deit_tiny", "False"], result.stderr
