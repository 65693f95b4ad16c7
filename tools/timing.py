"""Measuring speed so that what is compared is compared fairly: alternately, in one process."""

import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

WARMUP_ROUNDS = 3  # as many as CUDA graphs need to be recorded
FEWEST_ROUNDS = 5  # that are measured, however long they take

Result = TypeVar("Result")
Step = Callable[[Tensor, Tensor], object]  # what is measured, on (B, 3, H, W) images and (B,) labels


def interleave(
    steps: dict[str, Step],
    images: Tensor,
    labels: Tensor,
    rounds: int,
    steps_per_turn: int = 1,
    seconds_at_most: float = math.inf,
) -> dict[str, np.ndarray]:
    """Seconds per step, by contender: one number a round.

    seconds_at_most: after this long no new round begins, except for the first FEWEST_ROUNDS.
    """
    seconds = {name: [] for name in steps}
    names = list(steps)
    end = math.inf
    for i in range(-WARMUP_ROUNDS, rounds):
        if i == 0:
            end = time.monotonic() + seconds_at_most
        if i >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        names.reverse()  # there and back, so that drift and the neighbour's traces in the cache cancel
        for name in names:
            elapsed = time_turn(partial(steps[name], images, labels), steps_per_turn, images.is_cuda)
            if i >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def time_turn(step: Callable[[], object], steps_per_turn: int, on_gpu: bool) -> float:
    """Seconds per step, until the last one's result is there."""
    return timed(lambda: [step() for _ in range(steps_per_turn)], on_gpu)[1] / steps_per_turn


def timed(run: Callable[[], Result], on_gpu: bool) -> tuple[Result, float]:
    """What run() gives, and the seconds until it is there."""
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return result, time.perf_counter() - started


def times_as_fast(seconds: dict[str, np.ndarray], name: str, as_this: str = "dense") -> float:
    """Median over the rounds of the ratio within a round, as a machine's speed differs more between rounds."""
    return float(np.median(seconds[as_this] / seconds[name]))


def hardware(device: str) -> str:
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name} ({torch.get_num_threads()} threads)"
