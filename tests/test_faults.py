"""Fault injection: real runs that are killed, signalled, starved of disk and given broken files.

Slow, so apart from `make test`: `make test-faults`. What is random follows from seeds.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import pytest
import torch
from conftest import MAIN, ONE_THREAD, PRUNING, ROOT, TINY_RUN, write_images
from dynamicvit.models import from_pretrained, read_checkpoint
from dynamicvit.models.pretrained import BEST, LAST

pytestmark = pytest.mark.slow

# 4 epochs of 6 steps
OPTIONS = [*TINY_RUN, *PRUNING, "--epochs", "4", "--print-freq", "1", "--save-freq", "1", "--output-dir", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("cats", "dogs"):
        write_images(root / "train" / name, 12)
        write_images(root / "val" / name, 20, seed=1)
    return root


@pytest.fixture(scope="module")
def options(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A distillation, with the weights that it starts from."""
    folder = tmp_path_factory.mktemp("dense")
    finish(start([*TINY_RUN, "--dense", "--data-path", str(data), "--output-dir", "run"], folder))
    return [*OPTIONS, "--distill", "--pretrained", str(folder / "run" / BEST), "--data-path", str(data)]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(options, folder))
    return folder


def start(args: list[str], folder: Path, launcher: list[str] | None = None, **popen) -> subprocess.Popen:
    """The command line as a session of its own, in the folder, where it writes to run/."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [*(launcher or [sys.executable, "-u"]), str(MAIN), *args],
        **(dict(env=ONE_THREAD, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | popen),
        start_new_session=True,
    )
    watchdog = threading.Timer(300, kill_all, (process,))  # a hang becomes a failure, instead of lasting for ever
    watchdog.daemon = True
    watchdog.start()
    return process


def kill_all(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen, number: int = 0) -> str:
    """What a process says until its end, which has to be its success, or this signal's."""
    output = process.stdout.read()
    assert process.wait() == (0 if number == signal.SIGUSR1 else -number), output
    return output


def steps_of(process: subprocess.Popen) -> Iterator[str]:
    return (line for line in process.stdout if line.startswith("epoch ") and "  step " in line)


def after_steps(process: subprocess.Popen, rng: random.Random, most: int = 5) -> int:
    """Lets it take up to this many steps and a moment more, which may hit a save; returns how many."""
    count = rng.randint(1, most)
    for number, _ in enumerate(steps_of(process), 1):
        if number == count:
            break
    time.sleep(rng.uniform(0, 0.2))
    return count


def assert_whole(folder: Path) -> None:
    """Every checkpoint under its own name loads, and there is one."""
    assert (folder / "run" / LAST).is_file()
    for name in (LAST, BEST):
        if (folder / "run" / name).is_file():
            assert read_checkpoint(folder / "run" / name)["optimizer"]


def assert_same_end(folder: Path, expected: Path) -> None:
    """Log and weights, to the digit."""
    assert (folder / "run" / "log.txt").read_text() == (expected / "run" / "log.txt").read_text()
    for file in (LAST, BEST):
        end, expected_end = (read_checkpoint(path / "run" / file) for path in (folder, expected))
        for part in ("model", "model_ema"):
            assert all(torch.equal(end[part][name], value) for name, value in expected_end[part].items())


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(seed: int, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9, loader processes and all, five times on the way to the end."""
    rng = random.Random(seed)
    workers = str(seed % 2)
    begun = False
    for _ in range(5):
        process = start([*options, "--num-workers", workers], tmp_path)
        begun |= after_steps(process, rng) > 2
        kill_all(process)
        process.wait()
        if begun:  # the first save may not have ended before
            assert_whole(tmp_path)
    finish(start(options, tmp_path))
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_signalled_again_and_again(seed: int, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Each time it saves and ends well within seconds, in training or validation."""
    rng = random.Random(seed)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = start([*options, "--save-freq", "0"], tmp_path)
        after_steps(process, rng, most=4)
        process.send_signal(number)
        signalled = time.monotonic()
        time.sleep(0.05)
        process.send_signal(number)  # a launcher passes on a signal that the processes already have
        output = process.stdout.read()
        assert time.monotonic() - signalled < 20
        process.wait()
        if " (best) " in output:
            break  # on a fast machine the run is over first
        assert process.returncode == (0 if number == signal.SIGUSR1 else -number), output
        assert f"{number.name} received: saved" in output
        assert_whole(tmp_path)
    finish(start(options, tmp_path))
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("limit", [5_000, 100_000, 600_000])
def test_no_room_for_a_file(limit: int, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Files end at a limit, in bytes: the earlier checkpoint stays as it is, and the run goes on once there is room."""
    process = start(options, tmp_path)
    after_steps(process, random.Random(limit))
    process.terminate()
    finish(process, signal.SIGTERM)
    before = (tmp_path / "run" / LAST).read_bytes()
    process = start(options, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output = process.stdout.read()
    assert process.wait() == 2, output
    assert "warning: cannot write" in output and output.splitlines()[-1].startswith("error: cannot write"), output
    assert (tmp_path / "run" / LAST).read_bytes() == before
    finish(start(options, tmp_path))
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_full_disk_that_is_emptied(seed: int, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """A disk of 12 MB, filled up and emptied again three times: the same run goes on to its end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        rng = random.Random(seed)
        process = start(options, disk)
        output = ""
        while not (disk / "run" / LAST).is_file() and process.poll() is None:
            time.sleep(0.05)  # without an earlier checkpoint, none could stay intact
        for _ in range(3):
            after_steps(process, rng, most=3)
            fill(disk / "ballast")
            output += "".join(islice(process.stdout, 4))
            assert_whole(disk)
            (disk / "ballast").unlink()
        output += finish(process)
        assert "No space left" in output, output
        assert_same_end(disk, undisturbed)
    finally:
        kill_all(process)
        subprocess.run(["umount", "-l", disk], check=True)


def fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file:
        for size in (2**16, 2**9, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.mark.parametrize("seed", range(4))
def test_damaged_checkpoint_is_refused(seed: int, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Cut off or with a byte changed, anywhere: one line that names it, and the best one to go on from."""
    rng = random.Random(seed)
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    last = tmp_path / "run" / LAST
    content = bytearray(last.read_bytes())
    place = rng.randrange(len(content))
    if seed % 2:
        content[place] ^= 0xFF
    else:
        del content[place:]
    last.write_bytes(content)
    process = start(options, tmp_path)
    output = process.stdout.read()
    assert process.wait() == 2, output
    assert "error: " in output and LAST in output and BEST in output and "Traceback" not in output, output
    assert last.read_bytes() == content
    assert read_checkpoint(tmp_path / "run" / BEST)["optimizer"]


@pytest.fixture(scope="module")
def undisturbed_pair(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    finish(start(options, folder, [*TORCHRUN, "--standalone", "--nproc_per_node=2"]))
    return folder


def test_worker_killed_under_torchrun(options: list[str], undisturbed_pair: Path, tmp_path: Path) -> None:
    """kill -9 for one of two processes, three times; torchrun starts both again."""
    rng = random.Random(0)
    process = start(options, tmp_path, [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=3"])
    for _ in range(3):
        after_steps(process, rng, most=3)
        os.kill(rng.choice(workers_of(process)), signal.SIGKILL)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "2 process(es)" in line:
                break
        assert "2 process(es)" in lines[-1], "".join(lines)
    finish(process)
    assert_same_end(tmp_path, undisturbed_pair)


def workers_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if MAIN.name in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)], ids=["preemption", "ctrl-c"]
)
def test_signal_to_torchrun(
    number: int, send: Callable, options: list[str], undisturbed_pair: Path, tmp_path: Path
) -> None:
    """To the launcher alone, or to all processes, which get it from the launcher once more."""
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    process = start([*options, "--save-freq", "0"], tmp_path, launcher)
    after_steps(process, random.Random(0))
    send(process.pid, number)
    output = process.stdout.read()
    assert f"{signal.Signals(number).name} received: saved" in output, output
    process.wait()
    assert_whole(tmp_path)
    finish(start(options, tmp_path, launcher))
    assert_same_end(tmp_path, undisturbed_pair)


def test_error_of_one_process_ends_all(data: Path, options: list[str], tmp_path: Path) -> None:
    """Within a minute after its own message: an image that only one of two processes comes upon."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    broken = folder / "train" / "cats" / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    process = start([*options, "--no-repeated-aug", "--data-path", str(folder)], tmp_path, launcher)
    lines = takewhile(lambda line: f"error: cannot read image {broken}" not in line, process.stdout)
    output, said = "".join(lines), time.monotonic()
    assert process.poll() is None, output
    output += process.stdout.read()
    assert process.wait() != 0 and time.monotonic() - said < 60
    assert 'main_dynamic_vit.py", line' not in output, output


def test_loader_process_killed(options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    process = start([*options, "--num-workers", "1"], tmp_path)
    next(steps_of(process))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait() == 2, output
    assert "error: a loader process died" in output
    finish(start(options, tmp_path))
    assert_same_end(tmp_path, undisturbed)


def test_loader_processes_do_not_outlive_a_killed_run(options: list[str], tmp_path: Path) -> None:
    """kill -9 for the run alone, which then cannot end the others."""
    process = start([*options, "--num-workers", "2"], tmp_path)
    next(steps_of(process))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while (left := [child for child in children if Path(f"/proc/{child}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def test_accelerate_on_a_nearly_full_disk(data: Path, options: list[str], tmp_path: Path) -> None:
    """A disk with room for the model and not for the checkpoints of its training: the model is there at the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        weights = options[options.index("--pretrained") + 1]
        how = "--flops-speedup 1.3 --steps 2 --num-workers 0 --device cpu --batch-size 8".split()
        command = [sys.executable, "-m", "tools.cli", "accelerate", str(Path(weights).parent), *how]
        images = ["--images", str(data / "val"), "--output", str(disk / "fast")]
        result = subprocess.run([*command, *images], env=ONE_THREAD, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "warning: " in result.stdout + result.stderr, result
        assert from_pretrained(disk / "fast").spec.pruning_loc
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_leaves_no_training_running(number: int, tmp_path: Path) -> None:
    """A signal to the demo alone, which may not even notice: what it has started saves and ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.demo"],
        **dict(env=ONE_THREAD | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path),
        **dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True),
    )
    watchdog = threading.Timer(240, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        next(steps_of(process))
        process.send_signal(number)
        output = process.stdout.read()  # until nobody is left who could write to it
    finally:
        watchdog.cancel()
    process.wait()
    assert "SIGTERM received: saved at epoch 0" in output, output
    assert ("run it again to continue" in output) == (number != signal.SIGKILL), output
    assert "Traceback" not in output, output
    assert read_checkpoint(tmp_path / "logs/demo/dense" / LAST)["images"] > 0


def test_two_machines_without_a_shared_disk(options: list[str], undisturbed_pair: Path, tmp_path: Path) -> None:
    """Two launchers that meet over loopback. Rank 0 alone writes; where it is may change."""
    machines = start_machines(options, tmp_path, port=29531)
    writer = wait_for_writer(tmp_path)
    for machine in machines.values():
        machine.terminate()
    ends(machines)
    assert [folder.parent.name for folder in tmp_path.glob("*/run")] == [writer]

    outputs = ends(start_machines(options, tmp_path, port=29532))
    assert outputs.count("resumed at epoch") == 1, outputs
    assert_ended_as(undisturbed_pair, tmp_path)


def test_worker_killed_on_one_of_two_machines(options: list[str], undisturbed_pair: Path, tmp_path: Path) -> None:
    """kill -9 where rank 0 is not; both launchers start their processes again."""
    machines = start_machines(options, tmp_path, port=29533)
    writer = wait_for_writer(tmp_path)
    os.kill(workers_of(machines["b" if writer == "a" else "a"])[0], signal.SIGKILL)
    outputs = ends(machines)
    assert outputs.count("resumed at epoch") == 1, outputs
    assert_ended_as(undisturbed_pair, tmp_path)


def start_machines(options: list[str], folder: Path, port: int) -> dict[str, subprocess.Popen]:
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    launcher = [*TORCHRUN, *meeting, "--rdzv_id=job", "--max-restarts=3"]
    return {name: start(options, folder / name, launcher) for name in "ab"}


def wait_for_writer(folder: Path) -> str:
    """The machine that the first checkpoint is on."""
    while not (found := list(folder.glob(f"*/run/{LAST}"))):
        time.sleep(0.05)
    return found[0].parts[-3]


def ends(machines: dict[str, subprocess.Popen]) -> str:
    outputs = "".join(machine.stdout.read() for machine in machines.values())
    for machine in machines.values():
        machine.wait()
    return outputs


def assert_ended_as(expected: Path, folder: Path) -> None:
    newest = max(folder.glob(f"*/run/{LAST}"), key=lambda path: path.stat().st_mtime)
    assert_same_end(newest.parents[1], expected)
