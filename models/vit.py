"""timm's VisionTransformer in all its forms: DeiT, AugReg, DeiT-3, MAE, CLIP, SigLIP, DINOv2, ...

An adapter tells token pruning what it cannot know of a family of backbones: how to embed images, run a
block on the tokens that are left, read a block's queries and keys, and pool. Shapes: B images,
P prefix tokens (class token first, then registers), N patch tokens, K of them left, C channels.
"""

import math
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
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


class ViTAdapter:
    """For VisionTransformer and its subclasses; the base of the other adapters."""

    def embed(self, vit: VisionTransformer, images: Tensor) -> Tokens:
        """(B, 3, H, W) images -> all their tokens, with positions."""
        return Tokens(vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))

    def run_block(self, vit: VisionTransformer, i: int, tokens: Tokens) -> Tensor:
        """Block i of the tokens: (B, P+K, C)."""
        return vit.blocks[i](tokens.x, attn_mask=tokens.bias)

    def rotate(self, vit: VisionTransformer, i: int, attention: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """(B, heads, P+K, D) queries or keys of block i as they meet each other; rotated where there is RoPE."""
        return x

    def head(self, vit: VisionTransformer, x: Tensor, weights: Tensor | None) -> Tensor:
        """(B, P+K, C) normed tokens -> (B, classes), the prediction, or embeddings where the head was removed.

        weights: (B, K), how much each patch token counts where the backbone pools over them: its size,
        or in masked training the policy. None: all the same.
        """
        if weights is None or vit.global_pool in ("token", ""):
            return vit.forward_head(x)
        return vit.head(vit.head_drop(vit.fc_norm(self.pool(vit, x, weights))))

    def pool(self, vit: VisionTransformer, x: Tensor, weights: Tensor) -> Tensor:
        """(B, P+K, C) tokens, (B, K) weights -> (B, C): mean or attention pooling, as if tokens came many times."""
        if self.pools_prefix(vit):
            weights = F.pad(weights, (vit.num_prefix_tokens, 0), value=1.0)
        else:
            x = x[:, vit.num_prefix_tokens :]
        if vit.global_pool == "map":
            return vit.attn_pool(x, attn_mask=log_weights(weights)[:, None, None].to(matmul_dtype(x)))
        # at least 1: with every token dropped, masked training would divide 0 by 0
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return (x.float() * weights[..., None]).sum(dim=1).to(x.dtype)

    def pools_prefix(self, vit: VisionTransformer) -> bool:
        """Whether pooling takes in the prefix tokens too."""
        return vit.pool_include_prefix

    def outputs(self, vit: VisionTransformer, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, P+K, C) normed tokens -> what student and teacher are compared on: logits and patch tokens."""
        patch_tokens = x[:, vit.num_prefix_tokens :]
        if isinstance(vit.norm, nn.Identity):  # the backbone norms after pooling instead
            patch_tokens = vit.fc_norm(patch_tokens)
        return self.head(vit, x, weights), patch_tokens

    def tokens_are_logits(self, vit: VisionTransformer) -> bool:
        """Whether the tokens among the outputs are each patch's own logits, and not features."""
        return False

    def combine(self, vit: VisionTransformer, logits: Tensor, tokens: Tensor) -> Tensor:
        """The prediction from the outputs in train mode."""
        return logits


def log_weights(weights: Tensor) -> Tensor:
    """The logarithm that makes a weight an attention bias; finite for a weight of 0, with its gradient."""
    return torch.log(weights.float() + math.exp(LOG_DROPPED_WEIGHT))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in, under autocast or not."""
    device = x.device.type
    if device == "meta":  # shapes only, and torch does not know it for autocast
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def attentions(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a timm block; there may be several in parallel, or the block is its own."""
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
    block.register_forward_pre_hook(_forget)
    for attention in attentions(block):
        attention.q_norm.register_forward_hook(_keep_queries)
        attention.k_norm.register_forward_hook(_keep_keys)


def take_observed(block: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each attention module of the block that ran last, with its (B, heads, P+K, D) queries and keys."""
    pairs = list(zip(attentions(block), _observed.queries, _observed.keys, strict=True))
    _forget()
    # timm's parallel block is the only one to norm before it moves the heads forward
    return [(a, q.transpose(1, 2), k.transpose(1, 2)) if a is block else (a, q, k) for a, q, k in pairs]


def _forget(*_) -> None:
    _observed.queries = _observed.keys = ()


def _keep_queries(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    _observed.queries = (*_observed.queries, output)


def _keep_keys(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    _observed.keys = (*_observed.keys, output)
