"""Reducers shorten the sequence at a stage: drop (published) or merge the patch tokens that are not kept.

A reducer is an object with one signature, `reducer(x, scores, size, num_keep, num_prefix) -> Reduced`; REDUCERS knows
them by name. Below them stand pure tensor functions that know no backbone, and what undoes them. Shapes: B images,
P prefix tokens (class token, registers), N patch tokens that come in, K that are kept, C channels.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels


class Named:
    """Scorers and reducers. One compares equal to its name, so that `model.scorer == "distinct"` reads as it should."""

    name: str

    def __eq__(self, other: object) -> bool:
        return self is other or self.name == (other.name if isinstance(other, Named) else other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


class Scores(NamedTuple):
    """What a scorer tells a reducer."""

    scores: Tensor  # (B, N): the best ones stay
    weights: Tensor | None = None  # (B, N) a token's weight in the mean that it becomes part of; None: its size
    similarity: Tensor | None = None  # (B, N, N) of each token with each; None: the cosine of the tokens
    rows: Tensor | None = None  # (B, M) the tokens that similarity has rows for, (B, M, N); all that may leave
    inverse_norm: Tensor | None = None  # (B, N) reciprocal lengths of look.x's tokens, where kernels have computed them


class Reduced(NamedTuple):
    """The tokens after a stage, and where those before it have gone."""

    x: Tensor  # (B, P+K, C): prefix tokens, then the kept patch tokens
    kept: Tensor  # (B, K) places of the kept ones among the N
    size: Tensor | None = None  # (B, K) patches that each one stands for
    place: Tensor | None = None  # (B, N) which of the K each is part of now, -1: none; None: the others are dropped

    def places(self, num_tokens: int) -> Tensor:
        """(B, N) which of the K each of the N tokens is part of, -1 for dropped ones."""
        if self.place is not None:
            return self.place
        batch, num_keep = self.kept.shape
        numbers = torch.arange(num_keep, device=self.kept.device).expand(batch, -1)
        return self.kept.new_full((batch, num_tokens), -1).scatter(1, self.kept, numbers)


class Reducer(Named):
    """Base of all reducers; REDUCERS["mine"] = Mine() makes the name of your own one known everywhere."""

    merges = False  # whether tokens come to stand for several patches, and attention has to be weighted by their size
    drops = True  # whether tokens may end up in none of the kept ones
    hides = False  # whether training may hide tokens instead, as published, so that a learned scorer gets a gradient

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        """(B, P+N, C) tokens, (B, N) sizes: the patches that each token stands for."""
        raise NotImplementedError

    def log_size(self, size: Tensor) -> Tensor:
        """What is added to attention's scores of tokens of these sizes. (A method and not a power, as torch 2.7 cannot
        compile a second model with another number.)"""
        return size.log()


class Drop(Reducer):
    name = "drop"
    hides = True

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        return drop(x, scores.scores, num_keep, num_prefix)


class Merge(Reducer):
    name = "merge"
    merges = True
    drops = False
    keeps_length = False

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        hints = scores.weights, scores.similarity, scores.rows, self.keeps_length, scores.inverse_norm
        return merge(x, scores.scores, size, num_keep, num_prefix, *hints)


class MergeKeepingLength(Merge):
    """As merge, but each token gets the mean length of those in it: tokens that point different ways have a short
    mean, too short beside what the next blocks add to it (after Token Fusion's MLERP, arXiv 2312.01026). In
    attention it counts for a little less than the patches in it, as these are not all alike (docs/scores.md)."""

    name = "merge_length"
    keeps_length = True

    def log_size(self, size: Tensor) -> Tensor:
        return 0.9 * size.log()


REDUCERS: dict[str, Reducer] = {reducer.name: reducer for reducer in (Drop(), Merge(), MergeKeepingLength())}


def drop(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int) -> Reduced:
    """Keeps the num_keep best tokens; the others leave.

    (B, P+N, C) tokens, (B, N) scores.
    """
    kept = scores.topk(num_keep, dim=1).indices
    return Reduced(select_tokens(x, kept, num_prefix), kept)


def merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor,
    num_keep: int,
    num_prefix: int,
    weights: Tensor | None = None,
    similarity: Tensor | None = None,
    rows: Tensor | None = None,
    keep_length: bool = False,
    inverse_norm: Tensor | None = None,
) -> Reduced:
    """Keeps the num_keep best tokens; each other one joins the kept one that it is most similar to.

    (B, P+N, C) tokens, (B, N) scores, (B, N) sizes: how many patches a token stands for. A kept token
    becomes the mean of itself and those that joined it, weighted by size, so that the sum of size
    times token stays what it was; sizes add up. Prefix tokens never merge.
    weights: (B, N), for the mean instead of the sizes. similarity, rows, inverse_norm: see Scores.
    keep_length: each mean gets the mean length of the tokens in it.
    """
    if weights is not None:
        weights = weights.clamp(min=1e-9)  # attention can be 0, and a mean of such tokens is still a mean
    if similarity is None and kernels.available(x):
        learning = (tensor.requires_grad for tensor in (x, size, weights) if tensor is not None)
        learns = torch.is_grad_enabled() and any(learning)
        merged, kept, merged_size, place = kernels.merge(
            x, scores, size, num_keep, num_prefix, weights, inverse_norm, keep_length and not learns
        )
        if keep_length and learns:
            shares = shares_of(size if weights is None else weights, place, num_keep)
            merged = with_mean_length(merged, x, place, shares, num_prefix)
        return Reduced(merged, kept, merged_size, place)
    order = scores.argsort(dim=1, descending=True)
    kept = order[:, :num_keep]
    if similarity is None:
        place = join_by_cosine(x[:, num_prefix:].detach(), order, num_keep)
    else:
        place = join(similarity, order, num_keep, rows)
    return merge_groups(x, place, kept, size, num_prefix, weights, keep_length)


def join(similarity: Tensor, order: Tensor, num_keep: int, rows: Tensor | None = None) -> Tensor:
    """(B, N, N) similarities, or (B, M, N) of the (B, M) rows alone, (B, N) tokens, best first -> (B, N) which of the
    kept each token is part of."""
    rank = ranks(order)
    leaves = rank >= num_keep
    nearest = similarity.masked_fill(leaves[:, None, :], -torch.inf).argmax(dim=-1)
    joined = rank.gather(1, nearest)
    return torch.where(leaves, joined if rows is None else rank.scatter(1, rows, joined), rank)


def join_by_cosine(tokens: Tensor, order: Tensor, num_keep: int) -> Tensor:
    """As join, from the (B, N, C) tokens: the cosines of those that are not kept with those that are."""
    tokens = take_rows(tokens, order)
    nearest = cosine_similarity(tokens[:, num_keep:], tokens[:, :num_keep]).argmax(dim=-1)
    numbers = torch.arange(num_keep, device=order.device).expand(order.shape[0], -1)
    return torch.empty_like(order).scatter(1, order, torch.cat([numbers, nearest], dim=1))


def ranks(order: Tensor) -> Tensor:
    """(B, N) tokens, best first -> (B, N) the place of each token in that order."""
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, numbers)


def merge_groups(
    x: Tensor,
    place: Tensor,
    kept: Tensor,
    size: Tensor,
    num_prefix: int,
    weights: Tensor | None = None,
    keep_length: bool = False,
) -> Reduced:
    """Joins tokens whose (B, N) place among the (B, K) kept ones is the same; the other arguments are merge's."""
    merged_size = size.new_zeros(kept.shape).scatter_add(1, place, size)
    shares = shares_of(size if weights is None else weights, place, kept.shape[1])
    merged = means(x, place, shares, kept.shape[1], num_prefix)
    if keep_length:
        merged = with_mean_length(merged, x, place, shares, num_prefix)
    return Reduced(merged, kept, merged_size, place)


def shares_of(weights: Tensor, place: Tensor, num_keep: int) -> Tensor:
    """(B, N) weights, (B, N) places -> (B, N) the share of each token in the mean of its place."""
    total = weights.new_zeros(weights.shape[0], num_keep).scatter_add(1, place, weights)
    return weights / total.gather(1, place)


def means(x: Tensor, place: Tensor, shares: Tensor, num_keep: int, num_prefix: int) -> Tensor:
    """(B, P+N, C) tokens -> (B, P+K, C): those in one place joined by their shares."""
    batch, _, channels = x.shape
    end = num_prefix + num_keep
    # Each token enters its mean by its share. Sums of size times token could leave float16's range.
    parts = x * F.pad(shares, (num_prefix, 0), value=1.0).to(x.dtype)[..., None]
    prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    rows = torch.cat([prefix, place + num_prefix], dim=1)
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        # torch's older exporter writes an index_add that forgets repeated rows (pytorch issue 111159).
        return x.new_zeros(batch, end, channels).scatter_add(1, rows[..., None].expand_as(parts), parts)
    rows = rows + end * torch.arange(batch, device=x.device)[:, None]
    merged = parts.new_zeros(batch * end, channels).index_add(0, rows.flatten(), parts.flatten(0, 1))
    return merged.unflatten(0, (batch, end))


def with_mean_length(merged: Tensor, x: Tensor, place: Tensor, shares: Tensor, num_prefix: int) -> Tensor:
    """(B, P+K, C) merged tokens with the mean length, by their shares, of the (B, P+N, C) tokens in each."""
    precision = torch.promote_types(x.dtype, torch.float32)
    before, after = (
        torch.linalg.vector_norm(tokens[:, num_prefix:], dim=-1, dtype=precision) for tokens in (x, merged)
    )
    wanted = torch.zeros_like(after).scatter_add(1, place, (shares * before).to(precision))
    factor = F.pad(wanted / after.clamp(min=1e-12), (num_prefix, 0), value=1.0)
    return merged * factor[..., None].to(merged.dtype)


def unmerge(tokens: Tensor, place: Tensor, drops: bool = True) -> Tensor:
    """(B, K, C) tokens after a stage, (B, N) places -> (B, N, C): each token's own group; 0 for dropped ones.

    drops: whether there can be any; False saves two passes over the tokens.
    """
    if not drops:
        return take_rows(tokens, place)
    return take_rows(tokens, place.clamp(min=0)) * (place >= 0)[..., None]


def lost(tokens: Tensor, merged: Tensor, place: Tensor, drops: bool = True) -> Tensor:
    """What each of the (B, N, C) tokens was beyond what its group among the (B, K, C) merged ones became.

    Added to unmerge's result it gives the token back; for a dropped token it is the whole token.
    """
    return tokens - unmerge(merged, place, drops)


def cosine_similarity(tokens: Tensor, others: Tensor, rows: Tensor | None = None) -> Tensor:
    """(B, M, C) and (B, K, C) tokens -> (B, M, K) cosines of each with each, in float32.

    A ViT's cosines often differ by less than bfloat16 can tell. rows: (B, M), if the tokens are these rows of others.
    """
    device = tokens.device.type
    # torch 2.11 cannot trace its own check whether a device has autocast; of our devices only meta has none.
    without_autocast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with without_autocast:
        directions = F.normalize(others.float(), dim=-1)
        if rows is not None:
            return take_rows(directions, rows) @ directions.transpose(1, 2)
        return (directions if others is tokens else F.normalize(tokens.float(), dim=-1)) @ directions.transpose(1, 2)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, M, C), (B, K) numbers of rows -> (B, K, C)."""
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    # whole rows of a matrix: many times faster than gather, which goes by single numbers
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def select_tokens(x: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """(B, P+N, C) tokens, (B, K) indices of patch tokens -> (B, P+K, C): the prefix tokens and those."""
    prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
    return take_rows(x, torch.cat([prefix, kept + num_prefix], dim=1))
