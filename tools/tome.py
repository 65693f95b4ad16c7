"""ToMe (token merging, arXiv 2210.09461) on a plain timm ViT: the baseline that tools.sweep compares with."""

import torch
import torch.nn.functional as F
from dynamicvit.models.blocks import choose_attention, matmul_dtype, observe, take_observed
from dynamicvit.models.families import family_of
from dynamicvit.models.pruning import select_tokens, size_bias
from dynamicvit.models.reducers import cosine_similarity
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class ToMe(nn.Module):
    """A ViT in which r patch tokens merge into others in every block, between attention and MLP.

    The blocks' keys decide which tokens merge, and attention is weighted by token size. Prefix tokens (the class token)
    never merge. Shapes: B images, P prefix tokens, N patch tokens that come to a block, C channels.
    """

    def __init__(self, vit: VisionTransformer, r: int = 0) -> None:
        """vit: a dense model, from now on this one's. Raises ValueError if its blocks are of a special kind."""
        super().__init__()
        if not all(type(block) is Block for block in getattr(vit, "blocks", [None])):
            raise ValueError("ToMe is for ViTs of timm's plain blocks")
        self.vit, self.r = vit, r
        for block in vit.blocks:
            observe(block)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, classes) logits."""
        vit, adapter = self.vit, family_of(self.vit)
        choose_attention(vit, images)
        num_prefix = vit.num_prefix_tokens
        x = adapter.embed(vit, images).x
        size = x.new_ones(x.shape[0], x.shape[1] - num_prefix, dtype=torch.float32)
        for block in vit.blocks:
            bias = size_bias(size, num_prefix).to(matmul_dtype(x))
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
            ((_, _, keys),) = take_observed(block)
            x, size = merge_most_similar(x, keys.mean(dim=1)[:, num_prefix:], size, self.r, num_prefix)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return adapter.head(vit, vit.norm(x), size)


def merge_most_similar(x: Tensor, keys: Tensor, size: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, section 3): the r pairs that are most alike become one token each.

    (B, P+N, C) tokens, (B, N, D) keys, (B, N) sizes -> (B, P+N-r, C) and (B, N-r); r is cut to N // 2. Of two
    neighbours, the second looks for the token most like it among all first ones; the r best matches merge, by the
    mean weighted by size.
    """
    num_patches = size.shape[1]
    r = min(r, num_patches // 2)
    if r == 0:
        return x, size
    similarity, match = cosine_similarity(keys[:, 1::2], keys[:, ::2]).max(dim=-1)
    order = similarity.argsort(dim=1, descending=True)
    merging, target = order[:, :r], match.gather(1, order[:, :r])  # places among the second and the first ones
    left = order[:, r:].sort(dim=1).values  # neighbours stay neighbours
    firsts = torch.arange(0, num_patches, 2, device=x.device).expand(len(x), -1)
    kept = torch.cat([2 * left + 1, firsts], dim=1)
    rows = left.shape[1] + target  # places among the kept ones

    merged_size = size.gather(1, kept).scatter_add(1, rows, size.gather(1, 2 * merging + 1))
    weighted = torch.cat([x[:, :num_prefix].float(), x[:, num_prefix:].float() * size[..., None]], dim=1)
    joining = select_tokens(weighted, 2 * merging + 1, num_prefix)[:, num_prefix:]
    rows = (num_prefix + rows)[..., None].expand_as(joining)
    merged = select_tokens(weighted, kept, num_prefix).scatter_add(1, rows, joining)
    return (merged / F.pad(merged_size, (num_prefix, 0), value=1.0)[..., None]).to(x.dtype), merged_size
