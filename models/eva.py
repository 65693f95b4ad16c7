"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings."""

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor, nn

from .vit import Tokens, ViTAdapter


class EvaAdapter(ViTAdapter):
    """RoPE turns queries and keys by the patch's place, so it has to follow the patches that are left.

    A merged token keeps the place of the patch that the others joined.
    """

    def embed(self, vit: Eva, images: Tensor) -> Tokens:
        x, rope = vit._pos_embed(vit.patch_embed(images))
        return Tokens(vit.norm_pre(x), rope)

    def run_block(self, vit: Eva, i: int, tokens: Tokens) -> Tensor:
        return vit.blocks[i](tokens.x, rope=rope_of(vit, i, tokens), attn_mask=tokens.bias)

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
