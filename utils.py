"""What every training script needs and no method is about: processes, seeds, signals, messages."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models import CheckpointError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMEOUT_SECONDS = 1800  # for all processes to have started, and for each exchange between them
ONE_SIGNAL_SECONDS = 5  # Ctrl-C comes from the terminal and again from torchrun, which passes it on


class UserError(Exception):
    """Something that the user can mend; shown as one line, without a traceback."""


class LocalError(UserError):
    """One that only the process that met it knows of."""


class ImageError(LocalError):
    """An image that cannot be read."""


def init_distributed(device: torch.device) -> None:
    """Joins the processes that torchrun (or torch.distributed.launch) started; alone, does nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo for what lies on the CPU, as NCCL would have to wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = forget_earlier_starts(store, rank, world_size)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def forget_earlier_starts(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The launcher's store under a prefix that only these processes know.

    The store outlives a restart by torchrun, which would then lead to the addresses of processes
    that are gone (pytorch issue 135712). A name that is new with every start cannot be mistaken.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"name of {rank}", name)
        prefix = store.get(f"prefix for {name}").decode()  # waits for it
        store.set(f"{prefix} known to {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    others = range(1, world_size)
    started = time.monotonic()
    while not all(store.check([f"{prefix} known to {other}"]) for other in others):
        for other in others:
            if store.check([f"name of {other}"]):
                store.set(f"prefix for {store.get(f'name of {other}').decode()}", prefix)
        if time.monotonic() - started > TIMEOUT_SECONDS:
            raise UserError(f"not all of the {world_size} processes have started within {TIMEOUT_SECONDS} s")
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


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


def log(message: str) -> None:
    """Prints, on rank 0 only."""
    if is_main_process():
        print(message, flush=True)


def exit_status(command: Callable[[], None]) -> int:
    """Runs it, with what users can mend said in one line. Returns the program's exit status."""
    try:
        command()
        return 0
    except (UserError, CheckpointError, OSError) as error:
        print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
    except torch.OutOfMemoryError:
        print_error(
            LocalError("the GPU's memory is too small; lower --batch-size (in training, raise --update-freq as much)")
        )
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            reason = f"a loader process is gone, most likely for want of memory ({error}); lower --num-workers"
        elif dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            reason = "another process is gone; its own message says why"
        else:
            raise
        print_error(LocalError(reason))
    finally:
        end_loader_processes()
    return 2


def print_error(error: Exception) -> None:
    """One line on stderr; from one process only, where all of them met the same error."""
    if not is_main_process() and not isinstance(error, LocalError):
        time.sleep(5)  # if rank 0 met the same, the launcher now ends this process
    # a loader process's error comes with its traceback before it
    message = str(error).splitlines()[-1].removeprefix("utils.ImageError: ")
    print(f"error: {message}", file=sys.stderr, flush=True)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Collective: call it in all of them. values stay as they are."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_processes(values: torch.Tensor) -> torch.Tensor:
    """As sum_over_processes."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather(value: object) -> list:
    """Every process's value, in all of them."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers; other integers, unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def set_seed(seed: int) -> None:
    """Python's, NumPy's and torch's generators (this process's device included)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def temporary_path(path: Path) -> Path:
    """Where a file is written before it gets its name, so that it is whole at any moment."""
    return path.with_name(path.name + ".tmp")


def write_json_lines(path: Path, records: list[dict]) -> None:
    """Replaces the file by one line a record; whole at any moment."""
    temporary = temporary_path(path)
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1, for the training loop to end at a step that all processes agree on."""

    def __init__(self) -> None:
        self.name = ""
        self.noted_at = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.name:
            self.name, self.noted_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.noted_at > ONE_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # whoever asks twice wants it to end at once

    @property
    def received(self) -> bool:
        return bool(self.name)


class SaveClock:
    """Tells when a checkpoint is due: every so many steps, or minutes ("15m"); "0": never."""

    def __init__(self, frequency: str) -> None:
        """Raises UserError for anything else."""
        self.in_minutes = frequency.endswith("m")
        try:
            self.interval = float(frequency[:-1]) if self.in_minutes else int(frequency)
        except ValueError:
            self.interval = -1
        if not 0 <= self.interval < math.inf:
            raise UserError(f"--save-freq is a number of steps (500) or of minutes (15m), got {frequency}")
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()

    def is_due(self, step: int) -> bool:
        if self.in_minutes and self.interval > 0:
            return time.monotonic() - self.started >= 60 * self.interval
        return self.interval > 0 and step % self.interval == 0


def ignore_stop_signals(_worker: int | None = None) -> None:
    """For loader processes, which their trainer ends after it has saved, and for a program that is ending anyway."""
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

    def advance(self) -> None:
        self.done += 1

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.started
        return str(timedelta(seconds=round(elapsed / max(self.done, 1) * (self.total - self.done))))
