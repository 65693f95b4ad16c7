"""What a computation costs in arithmetic: matrix products and convolutions, as papers count them."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .factory import build_model, geometric_keep_rates
from .spec import ModelSpec

BISECTIONS = 20
LOWEST_RATE = 0.5  # the smallest share of its tokens that a stage may keep


def count_gflops(model: nn.Module, img_size: int | tuple[int, int]) -> float:
    """Multiply-adds of the evaluation forward on one image, in 1e9.

    img_size: side in pixels, or (height, width). Works on a copy, so that the model's mode,
    device and gradients stay as they are.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    # On the meta device only shapes are computed, and no weights are held: fast at any size.
    # No gradients wanted, or the counter would look for that of attention pooling's query, and fail.
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad():
        return gflops_of(lambda: shadow(images))


def dense_and_dynamic_gflops(model: nn.Module) -> dict[str, float]:
    """By "dense" and, unless it is dense itself, "dynamic", at the model's own image size."""
    with torch.device("meta"):
        dense = build_model(model.spec.as_dense())
    gflops = {"dense": count_gflops(dense, model.spec.img_size)}
    return gflops if model.spec.dense else gflops | {"dynamic": count_gflops(model, model.spec.img_size)}


def solve_keep_rates(spec: ModelSpec, gflops: float, fewest: float = 0.0) -> tuple[float, ...]:
    """Rates of a spec's stages, each keeping the same share of its tokens, at which it costs at most so many GFLOPs.

    That share is LOWEST_RATE at least, even if this costs more. fewest: the share of all tokens that is kept in
    any case.
    """
    num_stages = len(spec.pruning_loc)
    with torch.device("meta"):
        model = build_model(replace(spec, keep_rates=(1.0,) * num_stages))
    low, high = LOWEST_RATE, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        model.set_keep_rates(geometric_keep_rates(middle, num_stages, fewest))
        low, high = (middle, high) if count_gflops(model, model.spec.img_size) <= gflops else (low, middle)
    return geometric_keep_rates(low, num_stages, fewest)


def gflops_of(run: Callable[[], object]) -> float:
    """Multiply-adds in 1e9 of whatever run() does, backward passes included."""
    # The plain attention kernel is made of matrix products, which the counter knows on every
    # device; it does not know every fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9
