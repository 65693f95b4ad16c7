"""What a computation costs in arithmetic: matrix products and convolutions, as papers count them."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .features import features_of
from .spec import two_sides


def count_gflops(model: nn.Module, img_size: int | tuple[int, int], features: bool = False) -> float:
    """Multiply-adds of the evaluation forward on one image, in 1e9. features: of forward_features instead, where the
    last block computes all tokens.

    img_size: side in pixels, or (height, width). Works on a copy, so that the model's mode,
    device and gradients stay as they are.
    """
    height, width = two_sides(img_size)
    # On the meta device only shapes are computed, and no weights are held: fast at any size.
    # Without gradients, as the counter would look for that of attention pooling's query, and fail. In float32, as the
    # images are: a model in half precision costs the same.
    shadow = copy.deepcopy(model).to("meta", torch.float32).eval().requires_grad_(False)
    images = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad():
        return gflops_of(lambda: features_of(shadow, images) if features else shadow(images))


def gflops_of(run: Callable[[], object]) -> float:
    """Multiply-adds in 1e9 of whatever run() does, backward passes included."""
    # The plain attention kernel is made of matrix products, which the counter knows on every
    # device; it does not know every fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9
