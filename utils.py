"""What every training script needs and no method is about: processes, seeds, logs, checkpoints."""

import json
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


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
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu")
    try:
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown --device {name}; known: auto, cuda, cpu") from error


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
    if is_main_process() or isinstance(error, ImageError):
        # a loader process's error comes with its traceback before it
        message = str(error).splitlines()[-1].removeprefix("utils.ImageError: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # the launcher ends all processes when one does: let rank 0 speak first


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


def save_checkpoint(content: dict, path: Path) -> None:
    """Writes aside and renames, so that path is whole at any moment, even when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); what it held before is untouched") from error


def append_json_line(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


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
