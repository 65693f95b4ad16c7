"""What every training script needs and no method is about: processes, seeds, signals, messages."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class UserError(Exception):
    """Something that the user can mend; shown as one line, without a traceback."""


class ImageError(UserError):
    """An image that cannot be read; only the process that met it knows."""


def init_distributed(device: torch.device) -> None:
    """Joins the processes that torchrun (or torch.distributed.launch) started; alone, does nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"unknown --device {name}; known: auto, cuda, cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu")
    if name == "cpu":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"more processes than the {torch.cuda.device_count()} GPU(s) here; lower --nproc_per_node")
    return torch.device(name, index)


def get_rank() -> int:
    return int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def log(message: str = "") -> None:
    """Prints, on rank 0 only."""
    if is_main_process():
        print(message, flush=True)


def print_error(error: Exception) -> None:
    """One line on stderr; from one process only, where all of them met the same error."""
    if not is_main_process() and not isinstance(error, ImageError):
        time.sleep(5)  # if rank 0 met the same, the launcher now ends this process
    # a loader process's error comes with its traceback before it
    message = str(error).splitlines()[-1].removeprefix("utils.ImageError: ")
    print(f"error: {message}", file=sys.stderr, flush=True)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers; other integers, unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def set_seed(seed: int) -> None:
    """Python's, NumPy's and torch's generators (this process's device included)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_json_lines(path: Path, records: list[dict]) -> None:
    """Replaces the file by one line a record; whole at any moment."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1, for the training loop to end at a step that all processes agree on."""

    def __init__(self) -> None:
        self.name: str | None = None
        # NCCL would need the GPU to be waited for
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def received(self) -> bool:
        """Whether any process has got one. Collective: call it in all of them."""
        if self.group is None:
            return self.name is not None
        flag = torch.tensor(int(self.name is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def ignore_stop_signals(_worker: int) -> None:
    """For loader processes: their trainer ends them, after it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loader_processes() -> None:
    """At the end of the program, however it ends; they ignore SIGTERM, which is all that torch would send them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


class Eta:
    """Time left, from the mean pace so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.started = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.started
        return str(timedelta(seconds=round(elapsed / max(self.done, 1) * (self.total - self.done))))
