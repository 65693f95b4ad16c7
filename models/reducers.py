"""Reducers shorten the sequence at a stage: drop (published) or merge the patch tokens that are not kept.

Pure tensor functions that know no backbone. Shapes: B images, P prefix tokens (class token, registers),
N patch tokens that come in, K that are kept, C channels.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available

REDUCERS = ("drop", "merge")


class Reduced(NamedTuple):
    """The tokens after a stage, and where those before it have gone."""

    x: Tensor  # (B, P+K, C): prefix tokens, then the kept patch tokens, best score first
    kept: Tensor  # (B, K) places of the kept ones among the N
    size: Tensor | None = None  # (B, K) patches that each one stands for
    others: Tensor | None = None  # (B, N-K) places of those that merged, and
    joined: Tensor | None = None  # (B, N-K) which of the K they are part of now


def drop(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int) -> Reduced:
    """Keeps the num_keep best tokens; the others leave.

    (B, P+N, C) tokens, (B, N) scores.
    """
    kept = scores.topk(num_keep, dim=1).indices
    return Reduced(select_tokens(x, kept, num_prefix), kept)


def merge(
    x: Tensor, scores: Tensor, size: Tensor, num_keep: int, num_prefix: int, weights: Tensor | None = None
) -> Reduced:
    """Keeps the num_keep best tokens; each other one joins the kept one that it is most similar to.

    (B, P+N, C) tokens, (B, N) scores, (B, N) sizes: how many patches a token stands for. A kept token
    becomes the mean of itself and those that joined it, weighted by size, so that the sum of size
    times token stays what it was; sizes add up. Prefix tokens never merge.
    weights: (B, N), for the mean instead of the sizes.
    """
    weights = size if weights is None else weights
    order = scores.argsort(dim=1, descending=True)
    kept, others = order[:, :num_keep], order[:, num_keep:]
    x = select_tokens(x, order, num_prefix)
    end = num_prefix + num_keep
    rest = x[:, end:]
    joined = cosine_similarity(rest, x[:, num_prefix:end]).argmax(dim=-1)
    merged_size, total = (v.gather(1, kept).scatter_add(1, joined, v.gather(1, others)) for v in (size, weights))
    # Each token enters its mean by its share. Sums of size times token could leave float16's range.
    shares = weights.gather(1, order) / torch.cat([total, total.gather(1, joined)], dim=1)
    shares = F.pad(shares, (num_prefix, 0), value=1.0)[..., None].to(x.dtype)
    rows = num_prefix + joined + end * torch.arange(x.shape[0], device=x.device)[:, None]
    merged = (x * shares)[:, :end].flatten(0, 1)
    merged = merged.index_add(0, rows.flatten(), (rest * shares[:, end:]).flatten(0, 1))
    return Reduced(merged.unflatten(0, (-1, end)), kept, merged_size, others, joined)


def cosine_similarity(tokens: Tensor, others: Tensor) -> Tensor:
    """(B, M, C) and (B, K, C) tokens -> (B, M, K) cosines of each with each, in float32.

    Those of a ViT's tokens often differ by less than bfloat16 can tell.
    """
    device = tokens.device.type
    without_autocast = torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
    with without_autocast:
        return F.normalize(tokens.float(), dim=-1) @ F.normalize(others.float(), dim=-1).transpose(1, 2)


def select_tokens(x: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """(B, P+N, C) tokens, (B, K) indices of patch tokens -> (B, P+K, C): the prefix tokens and those."""
    batch, length, _ = x.shape
    prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    rows = torch.cat([prefix, kept + num_prefix], dim=1) + length * torch.arange(batch, device=x.device)[:, None]
    # whole rows of a matrix: many times faster than gather, which goes by single numbers
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
