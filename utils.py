"""Processes and seeds: what every training script needs, whatever its method."""

import hashlib
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache

import numpy as np
import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 1800  # for each exchange between processes
START_SECONDS = 300  # for all of them to have started
WARN_SECONDS = 60  # after which those that have not started are named
MAX_PROCESSES = 1_000_000
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SAY_SECONDS = 60  # to wait for another process to say what has happened


class LaunchError(RuntimeError):
    """Processes that cannot be joined, or a device that is not there; the message is for the user."""


def init_distributed(device: torch.device) -> None:
    """Joins the processes that torchrun (or torch.distributed.launch) started; alone, does nothing.

    Raises LaunchError if the launcher's environment is incomplete.
    """
    if not launched_by_torchrun():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo for what lies on the CPU, as NCCL would have to wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = forget_earlier_starts(connect(rank, world_size), rank, world_size)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def launched_by_torchrun() -> bool:
    """Whether a launcher has set the environment; LaunchError if only a part of it is set."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return False
    missing = [name for name in needed if name not in os.environ]
    if missing:
        there = ", ".join(name for name in needed if name in os.environ)
        raise LaunchError(
            f"{there} set in the environment, but not {', '.join(missing)}: "
            "start several processes with torchrun, or unset what is set to run a single one"
        )
    world_size = whole_number("WORLD_SIZE", 1, MAX_PROCESSES)
    whole_number("RANK", 0, world_size - 1)
    whole_number("MASTER_PORT", 1, 65535)
    return True


def whole_number(name: str, lowest: int, highest: int) -> int:
    """A variable of the launcher's. Raises LaunchError if it is not a whole number, or out of range."""
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal() and lowest <= int(text) <= highest):
        raise LaunchError(
            f"{name}={text} in the environment is not a whole number from {lowest} to {highest}; start with torchrun"
        )
    return int(text)


def end_distributed() -> None:
    """Leaves the other processes, once all are done. Not for one that has failed: it would wait for the others."""
    if not dist.is_initialized():
        return
    dist.barrier()
    # With torch 2.7 destroying the group hangs, now and then, seemingly where gloo's threads are still tidying up after
    # the last exchange.
    time.sleep(0.1)
    dist.destroy_process_group()


def connect(rank: int, world_size: int) -> dist.Store:
    """The launcher's store, or one that rank 0 opens where processes were started by hand."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    for waited in range(WARN_SECONDS, START_SECONDS + 1, WARN_SECONDS):
        try:
            # not waiting for workers here, as this would not tell which are missing
            wait = timedelta(seconds=WARN_SECONDS)
            store = dist.TCPStore(host, port, world_size, opens, timeout=wait, wait_for_workers=False)
            store.set_timeout(timedelta(seconds=START_SECONDS))
            return store
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            if opens:
                break  # the port is taken, or the address is not this machine's
            write_line(f"rank {rank} waits: no rank 0 at {host}:{port} after {waited} s")
    raise LaunchError(f"cannot reach the other processes at {host}:{port} ({reason})")


def forget_earlier_starts(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The launcher's store under a prefix that only these processes know.

    The store outlives a restart by torchrun, and would then still give the addresses of processes
    that are gone (pytorch issue 135712). A name that is new with every start cannot be mistaken.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"name of {rank}", name)
        try:
            prefix = store.get(f"prefix for {name}").decode()  # waits for it
        except dist.DistError as error:
            raise LaunchError(f"rank {rank} has waited {START_SECONDS} s for rank 0 and other processes") from error
        store.set(f"{prefix} known to {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    others = range(1, world_size)
    started, warn_after = time.monotonic(), WARN_SECONDS
    while missing := [rank for rank in others if not store.check([f"{prefix} known to {rank}"])]:
        for other in missing:
            if store.check([f"name of {other}"]):
                store.set(f"prefix for {store.get(f'name of {other}').decode()}", prefix)
        elapsed = time.monotonic() - started
        if elapsed > warn_after:
            ranks = f"rank {', '.join(map(str, missing))} of the {world_size} processes"
            if warn_after >= START_SECONDS:
                raise LaunchError(f"{ranks} has not started within {START_SECONDS} s")
            write_line(f"waiting: {ranks} has not started after {elapsed:.0f} s")
            warn_after += WARN_SECONDS
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU if there is one, else the CPU. Raises LaunchError."""
    if name not in ("auto", "cuda", "cpu"):
        raise LaunchError(f"unknown device {name}; known: auto, cuda, cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        built_for_gpus = torch.version.cuda or torch.version.hip
        if name == "auto" and built_for_gpus and is_main_process():
            warn_once(
                "this PyTorch is built for GPUs, but finds none that it can use: computing on the CPU "
                "(to silence this, choose device cpu: --device cpu in a command)"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError("device cuda was requested, but torch sees no GPU here; use cpu")
    index = whole_number("LOCAL_RANK", 0, MAX_PROCESSES) if "LOCAL_RANK" in os.environ else 0
    if index >= torch.cuda.device_count():
        raise LaunchError(f"more processes than the {torch.cuda.device_count()} GPU(s) here; lower --nproc_per_node")
    return torch.device("cuda", index)


def printable(text: object) -> str:
    """The text on one line and without a terminal's control characters, whatever a file or a folder is called."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def write_line(text: str) -> None:
    """Writes a line to stderr, whole: torchrun starts Python unbuffered, where print writes the newline separately, and
    other processes' lines can come in between."""
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def warn(message: object) -> None:
    """Prints a warning, in every process that calls it."""
    write_line(f"warning: {printable(message)}")


@cache
def warn_once(message: str) -> None:
    """As warn, but the same message only once in a process."""
    warn(message)


def get_rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0  # init_distributed says what is wrong with any other value


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def log(*lines: str) -> None:
    """Prints, on rank 0 only."""
    if is_main_process():
        print(*map(printable, lines), sep="\n", flush=True)


@contextmanager
def say_once(message: str) -> Iterator[bool]:
    """Gives True in the first of torchrun's processes that comes with this message, however slow the others are.

    The others get False, and wait at the end of the block until the first one has left its own, as torchrun may kill
    it once one of them has ended. Without torchrun every process is the first.
    """
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(dist.DistError, RuntimeError, ValueError, KeyError):  # of a launcher that is gone
            wait = timedelta(seconds=SAY_SECONDS)
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
    if store is None:
        yield True
        return
    digest = hashlib.sha256(message.encode(errors="backslashreplace")).hexdigest()
    key = f"{digest} after restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    is_first = store.add(f"said {key}", 1) == 1
    yield is_first
    with suppress(dist.DistError, RuntimeError):
        if is_first:
            store.set(f"heard {key}", "")
        else:
            store.wait([f"heard {key}"])


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Collective: call it in all of them. values stay as they are."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_processes(values: torch.Tensor) -> torch.Tensor:
    """As sum_over_processes."""
    return start_max_over_processes(values)()


def start_max_over_processes(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """As max_over_processes, but does not wait for the others: the returned function does, and gives the result."""
    values = values.clone()
    work = dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None

    def finish() -> torch.Tensor:
        if work is not None:
            work.wait()
        return values

    return finish


def gather(value: object) -> list:
    """Every process's value, in all of them."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers; different integers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def set_seed(seed: int) -> None:
    """Python's, NumPy's and torch's generators (this process's device included)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
