"""What several test files share: tiny image folders, and the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "main_dynamic_vit.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# A model that trains in seconds, on images that need no network.
TINY_MODEL = "--arch deit_tiny --input-size 32 --patch-size 8 --embed-dim 32 --depth 4 --num-heads 2".split()
TINY_RUN = [
    *TINY_MODEL,
    *"--epochs 2 --warmup-epochs 1 --batch-size 4 --num-workers 0 --print-freq 2 --device cpu --amp off".split(),
]
PRUNING = "--pruning-loc 1 2 3".split()

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_gpu))


def launch(command: list[str], env: dict[str, str] = ONE_THREAD) -> subprocess.CompletedProcess:
    """Runs a command as a user would, from another folder, with one thread a process."""
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=ROOT.parent)


def run_main(*args: str | Path) -> subprocess.CompletedProcess:
    return launch([sys.executable, str(MAIN), *map(str, args)])


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    """Noise around a colour that follows from the folder's name, as JPEG."""
    rng = np.random.default_rng([seed, *folder.name.encode()])
    folder.mkdir(parents=True)
    colour = np.random.default_rng(list(folder.name.encode())).integers(0, 200, 3)
    for i in range(count):
        pixels = colour + rng.integers(0, 56, (*size, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 7 validation images of two classes."""
    root = tmp_path_factory.mktemp("images")
    for name in ("cats", "dogs"):
        write_images(root / "train" / name, 10)
    write_images(root / "val" / "cats", 4, seed=1)
    write_images(root / "val" / "dogs", 3, seed=1)
    return root


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """The output folder of a dense model that the real command line has trained."""
    output = tmp_path_factory.mktemp("dense") / "run"
    result = run_main(*TINY_RUN, "--dense", "--data-path", image_folder, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return output
