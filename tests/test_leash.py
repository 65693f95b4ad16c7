"""A training on a leash: it ends with whoever started it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# in a folder with a module of its own; a stand-in for a training
SCRIPT = """
import signal, sys, time
import neighbour
def save(number, frame):
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
print(__name__, *sys.argv[1:], flush=True)
for _ in range(6000 if "long" in sys.argv else 0):
    time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").touch()
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def start(script: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools/leash.py"), str(script), *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_script_runs_as_it_would_alone(script: Path) -> None:
    with start(script, "--flag", "value") as process:
        assert process.stdout.read() == "__main__ --flag value\n"
        assert process.wait(60) == 0


def test_script_is_stopped_when_its_leash_is_let_go(script: Path) -> None:
    with start(script, "long") as process:
        assert process.stdout.readline() == "__main__ long\n"
        process.stdin.close()
        assert process.stdout.read() == "saved\n"
        assert process.wait(60) == 3


def test_script_is_stopped_when_who_started_it_is_killed(script: Path) -> None:
    """By a signal that nothing can catch."""
    starter = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, {str(ROOT / "tools/leash.py")!r}, {str(script)!r}, "long"], stdin=subprocess.PIPE)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "__main__ long\n"
        process.kill()
        assert process.stdout.read() == "saved\n"  # until the script, too, has ended
