"""timm's transformer blocks from outside: their two halves, their queries and keys, and which attention they take.

Shapes: B images, P prefix tokens (class token first, then registers), N patch tokens, K of them left, C channels.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# What a dropped token weighs in attention beside a kept one. Not 0, so that the gradient still
# reaches its decision; the logarithm is a whole number so that bfloat16 holds it exactly.
LOG_DROPPED_WEIGHT = -16.0
POOLINGS = ("token", "avg", "map", "")


@dataclass
class Tokens:
    """A batch on its way through the blocks."""

    x: Tensor  # (B, P+K, C)
    rope: Tensor | None = None  # rotary embeddings of all N patches, where the backbone has them
    patches: Tensor | None = None  # (B, K) original numbers of the patches left; None: all, in order
    size: Tensor | None = None  # (B, K) patches that each token stands for, float32; None: one each
    bias: Tensor | None = None  # for attention, (B, 1, 1 or P+K, P+K)


def split_block(block: Block, attend: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    """The two halves of timm's pre-norm block as functions of the tokens; attend: its attention, arguments bound."""

    def attention_half(x: Tensor) -> Tensor:
        return x + block.drop_path1(block.ls1(attend(block.norm1(x))))

    def mlp_half(x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return attention_half, mlp_half


def split_post_norm_block(block: nn.Module, attend: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    """As split_block, of a block that norms what its branches give."""

    def attention_half(x: Tensor) -> Tensor:
        return x + block.drop_path1(block.norm1(attend(x)))

    def mlp_half(x: Tensor) -> Tensor:
        return x + block.drop_path2(block.norm2(block.mlp(x)))

    return attention_half, mlp_half


Split = Callable[[nn.Module, Callable[[Tensor], Tensor]], tuple[Callable, Callable]]


def choose_attention(vit: nn.Module, images: Tensor) -> None:
    """Takes timm's plain attention instead of its fused kernel where the kernel falls short.

    On a CPU the kernel is slower in bfloat16. In float16 it would round a dropped token's weight, about 1e-9,
    to 0, so that its decision would get no gradient. Where the user has turned the fused kernel off, it stays off.
    """
    slow = images.device.type == "cpu" and matmul_dtype(images) == torch.bfloat16
    coarse = vit.training and matmul_dtype(images) == torch.float16
    pooling = [vit.attn_pool] if vit.global_pool == "map" else []
    for attention in [*chain.from_iterable(attentions(block) for block in vit.blocks), *pooling]:
        if not hasattr(attention, "fused_attn"):
            continue  # a user's own module
        # Compiled code must not read what it is about to write, or it would be compiled again for the next call.
        if not torch.compiler.is_compiling() and attention.fused_attn != getattr(attention, "fused_as_set", None):
            attention.may_fuse = attention.fused_attn  # not set here: by timm, or by the user
        fused = getattr(attention, "may_fuse", use_fused_attn()) and not (slow or coarse)
        attention.fused_attn = attention.fused_as_set = fused


def log_weights(weights: Tensor) -> Tensor:
    """The logarithm that makes a weight an attention bias; it and its gradient are finite for a weight of 0, too."""
    return torch.log(weights.float() + math.exp(LOG_DROPPED_WEIGHT))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in, under autocast or not."""
    device = x.device.type
    if device == "meta":  # shapes only, and torch does not know it for autocast
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def attentions(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a timm block; there may be several in parallel, or the block itself is the module."""
    if hasattr(block, "attn"):
        return [block.attn]
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    return [block]


# --- Queries and keys, which fused attention does not give away


class Observed(threading.local):
    """The queries and keys of the observed block that ran last in this thread, by attention module."""

    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()


_observed = Observed()


def observe(block: nn.Module) -> None:
    """From now on the block leaves its queries and keys for take_observed.

    Every attention of timm passes them through modules, q_norm and k_norm, even if those do nothing.
    Kept by thread, not in the model, as threads may share a model.
    """
    block.register_forward_pre_hook(forget_observed)
    for attention in attentions(block):
        attention.q_norm.register_forward_hook(_keep_queries)
        attention.k_norm.register_forward_hook(_keep_keys)


def has_hooks(block: nn.Module) -> bool:
    """Whether other hooks than ours wait for the block to be called as a whole."""
    return bool(block._forward_hooks) or any(hook is not forget_observed for hook in block._forward_pre_hooks.values())


def take_observed(block: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each attention module of the block that ran last, with its (B, heads, P+K, D) queries and keys."""
    pairs = list(zip(attentions(block), _observed.queries, _observed.keys, strict=True))
    forget_observed()
    # timm's parallel block is the only one to norm before it moves the heads forward
    return [(a, q.transpose(1, 2), k.transpose(1, 2)) if a is block else (a, q, k) for a, q, k in pairs]


def forget_observed(*_) -> None:
    _observed.queries = _observed.keys = ()


def _keep_queries(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    _observed.queries = (*_observed.queries, output)


def _keep_keys(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    _observed.keys = (*_observed.keys, output)
