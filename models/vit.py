"""timm's VisionTransformer in all its forms: DeiT, AugReg, DeiT-3, MAE, CLIP, SigLIP, DINOv2, ...

A family's adapter tells token reduction what it cannot know of a family of backbones: how to embed images, run a
block on the tokens that are left, read a block's queries and keys, and pool. Shapes: B images,
P prefix tokens (class token first, then registers), N patch tokens, K of them left, C channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from .blocks import (
    Split,
    Tokens,
    choose_attention,
    forget_observed,
    log_weights,
    matmul_dtype,
    split_block,
    split_post_norm_block,
    take_observed,
)
from .dynamic import Plan
from .pruning import make_token_pruning
from .rates import geometric_keep_rates
from .scorers import Attention


class ViTAdapter:
    """For VisionTransformer and its subclasses; the base of the other adapters."""

    backbone: type[nn.Module] = VisionTransformer
    recipe = "neurips"  # of the paper that the family is from
    takes_img_size = True  # to be built with
    keep_rates = staticmethod(geometric_keep_rates)
    splits: dict[type[nn.Module], Split] = {Block: split_block, ResPostBlock: split_post_norm_block}  # noqa: RUF012

    def blocks(self, vit: nn.Module) -> nn.ModuleList:
        """Those before or inside which stages can be."""
        return vit.blocks

    def default_pruning_loc(self, vit: nn.Module) -> tuple[int, ...]:
        """By the paper's rule: before each quarter of the blocks but the first."""
        depth = len(self.blocks(vit))
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))

    def make_dynamic(self, vit: nn.Module, plan: Plan) -> nn.Module:
        return make_token_pruning(vit, self, plan)

    def outputs_of(self, vit: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """What student and teacher are compared on, of a dense model."""
        choose_attention(vit, images)
        return self.outputs(vit, vit.forward_features(images), weights=None)

    def map_published(self, weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Weights by others' names -> by timm's."""
        return weights

    def embed(self, vit: VisionTransformer, images: Tensor) -> Tokens:
        """(B, 3, H, W) images -> all their tokens, with positions."""
        return Tokens(vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))

    def block_arguments(self, vit: VisionTransformer, i: int, tokens: Tokens) -> dict[str, Tensor | None]:
        """What block i is called with beside the tokens."""
        return {"attn_mask": tokens.bias}

    def whole(self, vit: VisionTransformer, i: int, tokens: Tokens) -> Callable[[Tensor], Tensor]:
        """Block i as a function of the (B, P+K, C) tokens."""
        block, arguments = vit.blocks[i], self.block_arguments(vit, i, tokens)
        return lambda x: block(x, **arguments)

    def find_split(self, block: nn.Module) -> Split | None:
        """How to call a block's attention and its MLP one by one; None for a block whose parts are not known."""
        for kind, split in self.splits.items():  # not next(...), which torch 2.7 cannot compile
            if type(block).forward is kind.forward:
                return split
        return None

    def halves(self, vit: VisionTransformer, i: int, tokens: Tokens) -> tuple[Callable, Callable]:
        """Attention and MLP of block i, each with its residual, as functions of (B, P+K, C) tokens."""
        block, arguments = vit.blocks[i], self.block_arguments(vit, i, tokens)
        forget_observed()  # the block's own hook does not run where its parts are called
        return self.find_split(block)(block, lambda x: block.attn(x, **arguments))

    def rotate(self, vit: VisionTransformer, i: int, attention: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """(B, heads, P+K, D) queries or keys of block i as they are multiplied: rotated where there is RoPE."""
        return x

    def observed(self, vit: VisionTransformer, i: int, tokens: Tokens) -> list[Attention]:
        """What the attention modules of block i, which has just run, have computed with."""
        return [
            Attention(queries, keys, attention.scale, lambda x, a=attention: self.rotate(vit, i, a, x, tokens))
            for attention, queries, keys in take_observed(vit.blocks[i])
        ]

    def has_class_token(self, vit: VisionTransformer) -> bool:
        return vit.cls_token is not None

    def reads_prefix_alone(self, vit: VisionTransformer) -> bool:
        """Whether the prediction needs no patch token once the last attention has run."""
        return vit.global_pool == "token"

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
