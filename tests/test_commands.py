"""What every command does as it starts and ends: exit statuses, signals, terminals, and errors printed once."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MAIN, ONE_THREAD, ROOT, TORCHRUN, launch, write_images
from dynamicvit.errors import exit_status, for_the_user, print_anywhere
from dynamicvit.models import create_model, save_pretrained
from dynamicvit.signals import Stopped, StopSignal
from dynamicvit.utils import LaunchError, launched_by_torchrun, pick_device

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if "exit_status(" in path.read_text())
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def run_python(*args: str | Path, **options) -> subprocess.CompletedProcess:
    options = {"env": ONE_THREAD, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 240} | options
    return subprocess.run([sys.executable, *args], **options)


def end_of(command: Callable[[], None], stdout: int | None = None) -> tuple[int, list[str]]:
    """Exit status, the negative number of a signal where one ended it, and the lines that it wrote.

    In a process of its own, whose first line lets Ctrl-C end it: a fork, as a new one takes seconds to import torch.
    stdout: where its output goes, so that only its errors are returned.
    """
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        os.dup2(writer if stdout is None else stdout, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(exit_status(command))
    os.close(writer)
    with open(reader) as lines:
        written = lines.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), written


def test_commands_start_where_signals_are_missing() -> None:
    """As on Windows."""
    modules = ["dynamicvit.main_dynamic_vit", *(f"dynamicvit.tools.{name}" for name in TOOLS)]
    code = f"""
import signal
del signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGPIPE
import {", ".join(modules)}
from dynamicvit.errors import exit_status
from dynamicvit.signals import StopSignal
StopSignal()
raise SystemExit(exit_status(lambda: None))
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", TOOLS)
def test_commands_start_without_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with python -OO."""
    module = importlib.import_module(f"dynamicvit.tools.{name}")
    monkeypatch.setattr(module, "__doc__", None)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    if name == "cli":
        assert module.main(["--help"]) == 0
        return
    with pytest.raises(SystemExit):
        module.command(["--help"]) if hasattr(module, "command") else module.main()


@posix_only
@pytest.mark.parametrize("command", [[str(MAIN)], ["-m", "tools.predict", "x", "y"]], ids=["script", "tool"])
def test_ctrl_c_while_torch_is_imported(command: list[str], tmp_path: Path) -> None:
    """Without a traceback, and by the signal itself. A fake torch says that it is being imported, and waits."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = ONE_THREAD | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, *command], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


@posix_only
def test_ctrl_c_ends_a_command_by_the_signal() -> None:
    """After one line and its own clean-up: a shell's loop and `&&` stop, too."""

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            print("cleared up")

    assert end_of(command) == (-signal.SIGINT, ["cleared up", "interrupted"])


@posix_only
def test_a_second_notice_makes_no_failure_of_a_saved_run() -> None:
    """It comes while Python shuts down."""
    code = """
import atexit, signal
from dynamicvit.errors import exit_status
from dynamicvit.signals import StopSignal, Stopped, end_on_interrupt

def command():
    StopSignal()
    signal.raise_signal(signal.SIGUSR1)
    raise Stopped("saved")

atexit.register(signal.raise_signal, signal.SIGUSR1)
end_on_interrupt()
raise SystemExit(exit_status(command))
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stdout) == (0, "saved\n")


@posix_only
@pytest.mark.parametrize(("name", "status"), [("SIGINT", -2), ("SIGTERM", -15), ("SIGUSR1", 0)])
def test_a_run_that_has_saved_ends_by_the_signal(name: str, status: int) -> None:
    """Except for a scheduler's notice, which is no failure."""

    def command() -> None:
        stop = StopSignal()
        signal.raise_signal(getattr(signal, name))
        raise Stopped(f"{stop.name} received: saved")

    assert end_of(command) == (status, [f"{name} received: saved"])


@posix_only
def test_ctrl_c_where_nothing_can_catch_it() -> None:
    """In code that destroys objects, Python would only print it and go on."""

    class Loader:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def command() -> None:
        Loader()
        print("goes on")

    assert end_of(command) == (-signal.SIGINT, ["interrupted"])


@posix_only
@pytest.mark.parametrize("command", [lambda: print("x" * 100_000), lambda: print("x"), lambda: sys.exit(print("x"))])
def test_a_reader_that_has_gone_is_no_error(command: Callable[[], None]) -> None:
    """`command | head -1`: it ends as other programs do, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    assert end_of(command, stdout=writer) == (-signal.SIGPIPE, [])
    os.close(writer)


@posix_only
def test_loader_processes_make_no_noise() -> None:
    """Whatever ends a command while they run."""
    code = """
from dynamicvit.errors import UserError, exit_status
from dynamicvit.signals import ignore_stop_signals
from torch.utils.data import DataLoader
def command():
    global batches
    batches = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=ignore_stop_signals))
    next(batches)
    raise UserError("no more")
raise SystemExit(exit_status(command))
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stderr) == (2, "error: no more\n")


def test_every_name_on_every_terminal(tmp_path: Path) -> None:
    """Classes in Chinese on a Western terminal, and a file name in no encoding at all."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "pruning_loc": (1,)}
    model = create_model("deit_tiny", num_classes=2, keep_rates=(0.5,), **sizes)
    save_pretrained(model, tmp_path / "fast", class_names=["猫", "собака"])
    write_images(tmp_path / "photos", 1)
    (tmp_path / "photos" / "0.jpg").rename(tmp_path / "photos" / "\udcff.jpg")
    env = ONE_THREAD | {"PYTHONIOENCODING": "cp1252"}
    result = run_python("-m", "tools.predict", tmp_path / "fast", tmp_path / "photos", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u732b" in result.stdout and "\\udcff.jpg" in result.stdout


def test_streams_that_can_print_everything_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as with >&-
    print_anywhere()
    assert exit_status(lambda: print("x")) == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory(error: Exception, capsys: pytest.CaptureFixture) -> None:
    def command() -> None:
        raise error

    assert exit_status(command) == 2
    assert (
        capsys.readouterr().err == "error: out of memory; lower --batch-size or --num-workers, or end other programs\n"
    )
    assert for_the_user(RuntimeError("another one")) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MASTER_PORT", value) for value in ("0", "65536", "x", "-1")),
        *(("WORLD_SIZE", value) for value in ("0", "-1", "²")),
        *(("RANK", value) for value in ("2", "-1", "1.0", "")),
    ],
)
def test_a_launcher_out_of_range_is_refused_at_once(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for key, text in good.items():
        monkeypatch.setenv(key, text)
    assert launched_by_torchrun()
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=f"{name}={value} .*whole number from .*torchrun"):
        launched_by_torchrun()


def test_local_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(LaunchError, match="LOCAL_RANK=first"):
        pick_device("cuda")


SLOW = """
import os, time
from dynamicvit.errors import LocalError, UserError, exit_status
rank = int(os.environ["RANK"])
def fail(error):
    raise error
exit_status(lambda: fail(LocalError(f"of {rank}")))
time.sleep(3 * (rank == 0))
status = exit_status(lambda: fail(UserError("of all")))
time.sleep(8)
os._exit(status)
"""


def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    """However long one of them takes to meet it, or to end. What only one process knows, each one prints."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [*TORCHRUN, "--nproc_per_node=2", str(tmp_path / "slow.py")]
    result = launch(command, ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    assert result.returncode != 0
    lines = sorted(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert lines == ["error: of 0", "error: of 1", "error: of all"]


def test_a_line_is_written_whole() -> None:
    """As processes share a terminal. Unbuffered, as torchrun starts them."""
    reading, writing = os.pipe2(os.O_DIRECT)  # every read gives what one write has written
    code = "from dynamicvit.utils import write_line; write_line('all of it')"
    subprocess.run(
        [sys.executable, "-u", "-c", code], stderr=writing, check=True, env={**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    )
    assert os.read(reading, 100) == b"all of it\n"
    os.close(reading), os.close(writing)
