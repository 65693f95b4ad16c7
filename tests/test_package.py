"""The installable package: what is in it, and that it works without the rest of the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT

from models import __version__, create_model, save_pretrained

FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as setuptools writes beside what it builds."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_package_is_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"dynamicvit-{__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"dynamicvit", f"dynamicvit-{__version__}.dist-info"}
    modules = {path.name for path in (ROOT / "models").glob("*.py")}
    assert {name.split("/")[1] for name in names if name.startswith("dynamicvit/")} == modules
    required = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert metadata.count("Requires-Dist: ") == len(required)


def test_the_package_loads_a_saved_model(wheel: Path, tmp_path: Path) -> None:
    model = create_model("deit_tiny", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, pruning_loc=(1,))
    save_pretrained(model, tmp_path / "fast")
    code = "import sys, dynamicvit; print(dynamicvit.from_pretrained(sys.argv[1]).spec.arch, 'models' in sys.modules)"
    command = [sys.executable, "-c", code, tmp_path / "fast"]
    env = ONE_THREAD | {"PYTHONPATH": str(wheel)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == ["deit_tiny", "False"], result.stderr
