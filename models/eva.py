"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings."""

from collections.abc import Callable

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from .blocks import Tokens, split_post_norm_block
from .vit import ViTAdapter


def split_eva_block(block: EvaBlock, attend: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
    """As vit.split_block; a layer scale is a parameter of the block, where there is one."""

    def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
        return branch if gamma is None else gamma * branch

    def attention_half(x: Tensor) -> Tensor:
        return x + block.drop_path1(scaled(attend(block.norm1(x)), block.gamma_1))

    def mlp_half(x: Tensor) -> Tensor:
        return x + block.drop_path2(scaled(block.mlp(block.norm2(x)), block.gamma_2))

    return attention_half, mlp_half


class EvaAdapter(ViTAdapter):
    """RoPE turns queries and keys by the patch's place, so it has to follow the patches that are left.

    A merged token keeps the place of the patch that the others joined.
    """

    backbone = Eva
    splits = {EvaBlock: split_eva_block, EvaBlockPostNorm: split_post_norm_block}  # noqa: RUF012

    def embed(self, vit: Eva, images: Tensor) -> Tokens:
        x, rope = vit._pos_embed(vit.patch_embed(images))
        return Tokens(vit.norm_pre(x), rope)

    def block_arguments(self, vit: Eva, i: int, tokens: Tokens) -> dict[str, Tensor | None]:
        return {"rope": rope_of(vit, i, tokens), "attn_mask": tokens.bias}

    def rotate(self, vit: Eva, i: int, attention: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        rope = rope_of(vit, i, tokens)
        if rope is None:
            return x
        prefix, patches = x[:, :, : vit.num_prefix_tokens], x[:, :, vit.num_prefix_tokens :]
        rotated = apply_rot_embed_cat(patches, rope, half=attention.rotate_half)
        return torch.cat([prefix, rotated.to(x.dtype)], dim=2)

    def pools_prefix(self, vit: Eva) -> bool:
        return vit.global_pool == "map"


def rope_of(vit: Eva, i: int, tokens: Tokens) -> Tensor | None:
    """The rotary embeddings of the patches left in block i: (N, 2D), or (B, heads or 1, K, 2D) once some have left."""
    if tokens.rope is None:
        return None
    rope = tokens.rope[i] if vit.rope_mixed else tokens.rope  # mixed: every block and head has its own
    if tokens.patches is None:
        return rope
    batch, left = tokens.patches.shape
    selected = rope.index_select(-2, tokens.patches.flatten())
    if vit.rope_mixed:
        return selected.unflatten(1, (batch, left)).transpose(0, 1)
    return selected.unflatten(0, (batch, left))[:, None]
