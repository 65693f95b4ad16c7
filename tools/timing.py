"""Measuring speed so that what is compared is compared fairly: alternately, in one process."""

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WARMUP_ROUNDS = 3  # as many as CUDA graphs need to be recorded

Step = Callable[[Tensor, Tensor], object]  # what is measured, on (B, 3, H, W) images and (B,) labels


def interleave(
    steps: dict[str, Step], images: Tensor, labels: Tensor, rounds: int, steps_per_turn: int
) -> dict[str, np.ndarray]:
    """Seconds per step, by contender: one number a round."""
    seconds = {name: [] for name in steps}
    names = list(steps)
    for i in range(WARMUP_ROUNDS + rounds):
        names.reverse()  # there and back, so that drift and the neighbour's traces in the cache cancel
        for name in names:
            elapsed = time_turn(partial(steps[name], images, labels), steps_per_turn, images.is_cuda)
            if i >= WARMUP_ROUNDS:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def time_turn(step: Callable[[], None], steps_per_turn: int, on_gpu: bool) -> float:
    """Seconds per step, until the last one's result is there."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps_per_turn):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps_per_turn


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
