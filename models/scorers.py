"""Scorers rank the patch tokens at a stage: the higher a token's score, the longer it stays.

predictor (published) is learned; attention, distinct and random have no parameters. Shapes: B images,
P prefix tokens (class token first, then registers), N patch tokens, C channels, H heads of D channels.
"""

import torch
from torch import Tensor, nn

from .reducers import cosine_similarity

SCORERS = ("predictor", "attention", "distinct", "random")


class Float32LogSoftmax(nn.LogSoftmax):
    """Log-probabilities near log(1/2) would mostly be one and the same number in bfloat16."""

    def forward(self, logits: Tensor) -> Tensor:
        return super().forward(logits.float())


class Predictor(nn.Module):
    """Scores tokens from their own features and the mean over all kept ones (paper, section 3.2)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            Float32LogSoftmax(dim=-1),
        )

    def forward(self, tokens: Tensor, policy: Tensor | None = None) -> Tensor:
        """(B, N, C) tokens, (B, N) policy or None for all kept -> (B, N, 2) log-probabilities, float32.

        Channel 0 is "keep".
        """
        local_features, global_features = self.in_conv(tokens).chunk(2, dim=-1)
        if policy is None:
            mean = global_features.mean(dim=1, keepdim=True)
        else:
            # float32, as bfloat16 cannot count past 256; at least 1, as an image that has lost
            # every token would otherwise divide 0 by 0 (the published code's NaN).
            kept = policy.float().sum(dim=1).clamp(min=1)[:, None, None]
            mean = (global_features * policy[..., None]).sum(dim=1, keepdim=True) / kept
        mean = mean.to(local_features.dtype).expand_as(local_features)
        return self.out_conv(torch.cat([local_features, mean], dim=-1))


def class_attention(
    query: Tensor, keys: Tensor, scale: float, num_prefix: int, log_size: Tensor | None = None
) -> Tensor:
    """The class token's attention to each patch token, mean over the heads (EViT, arXiv 2202.07800).

    (B, H, 1, D) query of the class token, (B, H, P+N, D) keys and, for tokens that have merged,
    (B, P+N) logarithms of their sizes -> (B, N) scores, float32.
    """
    return attention_weights(query, keys, scale, log_size).mean(dim=1)[:, 0, num_prefix:]


def received_attention(
    queries: Tensor, keys: Tensor, scale: float, num_prefix: int, log_size: Tensor | None = None
) -> Tensor:
    """The attention that each patch token gets from all patch tokens, for backbones without a class token.

    (B, H, P+N, D) queries and keys, log_size as for class_attention -> (B, N) scores, float32: the mean
    over the heads and over the patches that ask; a merged token asks for all the patches in it.
    """
    weights = attention_weights(queries[:, :, num_prefix:], keys, scale, log_size).mean(dim=1)
    if log_size is None:
        return weights.mean(dim=1)[:, num_prefix:]
    size = log_size[:, num_prefix:].exp()
    return torch.einsum("bq,bqk->bk", size / size.sum(dim=1, keepdim=True), weights)[:, num_prefix:]


def attention_weights(queries: Tensor, keys: Tensor, scale: float, log_size: Tensor | None) -> Tensor:
    """(B, H, Q, D) queries, (B, H, M, D) keys -> (B, H, Q, M) attention in float32, as a block computes it."""
    # Under grouped-query attention several queries share one key head.
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (queries * scale @ keys.transpose(-2, -1)).float()
    if log_size is not None:
        logits = logits + log_size[:, None, None]
    return logits.softmax(dim=-1)


def outlying(tokens: Tensor, size: Tensor) -> Tensor:
    """How far each token is from the mean of all, by cosine, times its size: importance without attention.

    (B, N, C) tokens, (B, N) sizes -> (B, N), float32.
    """
    mean = torch.einsum("bn,bnc->bc", size / size.sum(dim=1, keepdim=True), tokens.float())[:, None]
    return size * (1 - cosine_similarity(tokens, mean)[..., 0])


def distinct_scores(importance: Tensor, tokens: Tensor) -> Tensor:
    """What would be lost if a token joined the nearest one that is more important.

    (B, N) importance, (B, N, C) tokens -> (B, N) scores: importance times the cosine distance to the
    most similar token of greater importance, as density peaks clustering ranks its centres (Rodriguez
    and Laio, Science 2014). Of tokens that look alike only the most important one scores high.
    """
    more_important = importance[:, None, :] > importance[:, :, None]
    similarity = cosine_similarity(tokens, tokens).masked_fill(~more_important, -1.0)
    return importance * (1 - similarity.amax(dim=-1))


def random_scores(tokens: Tensor) -> Tensor:
    """(B, N, C) tokens -> (B, N) random numbers: the baseline that every other scorer has to beat."""
    return torch.rand(tokens.shape[:2], device=tokens.device)
