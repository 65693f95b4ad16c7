"""Scorers rank the patch tokens at a stage: the higher a token's score, the longer it stays.

A scorer is an object with one signature, `scorer(look, module) -> Scores`; SCORERS knows them by name, and your own
is a few lines (see Scorer). Shapes: B images, P prefix tokens (class token first, then registers), N patch tokens that
come to the stage, C channels, H heads of D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .reducers import Named, Scores, cosine_similarity


class Attention(NamedTuple):
    """What an attention module of the block that a stage belongs to has just computed with."""

    queries: Tensor  # (B, H, P+N, D)
    keys: Tensor  # (B, H or fewer, P+N, D)
    scale: float
    rotate: Callable[[Tensor], Tensor]  # queries or keys as they are multiplied: rotated where there is RoPE


@dataclass
class Look:
    """What a scorer may look at."""

    x: Tensor  # (B, P+N, C) all tokens
    num_prefix: int
    size: Tensor | None  # (B, N) patches that each token stands for, float32; None: one each
    has_class_token: bool
    num_keep: int  # how many of the N stay
    attention: Sequence[Attention]  # empty unless the scorer reads it; several where a block has parallel ones

    @property
    def tokens(self) -> Tensor:
        """(B, N, C) patch tokens."""
        return self.x[:, self.num_prefix :]

    @property
    def sizes(self) -> Tensor:
        """(B, N) patches that each token stands for."""
        return sizes_or_ones(self.size, self.tokens)

    @property
    def log_sizes(self) -> Tensor | None:
        """(B, P+N) logarithms of the sizes, no gradient; None where there are none. A prefix token has size 1."""
        return None if self.size is None else nn.functional.pad(self.size.detach().log(), (self.num_prefix, 0))

    def mean_over_attentions(self, read: Callable[[Attention], Tensor]) -> Tensor:
        values = [read(attention) for attention in self.attention]
        return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)


def sizes_or_ones(size: Tensor | None, like: Tensor) -> Tensor:
    """(B, N) sizes; like: a tensor that begins with these dimensions."""
    return like.new_ones(like.shape[:2], dtype=torch.float32) if size is None else size


class Scorer(Named):
    """Base of all scorers. To write your own:

        class Norm(Scorer):
            name = "norm"

            def __call__(self, look, module):
                return Scores(look.tokens.float().norm(dim=-1))

        make_dynamic(vit, (3, 6, 9), (0.7, 0.5, 0.3), scorer=Norm(), reducer="merge")

    SCORERS["norm"] = Norm() makes the name known to create_model, from_pretrained and the commands, too.
    """

    learned = False  # whether module() gives something to train
    published = False  # its published figures come from models whose last block computes every token
    probability = False  # whether scores are the logarithms of probabilities of being kept
    log_probabilities: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    """Where a scorer can be trained by hiding tokens, as published: (module, (B, N, C) tokens, (B, N) policy) ->
    (B, N, 2), channel 0 for keep."""

    def module(self, dim: int) -> nn.Module | None:
        """The parameters for one stage, for tokens of dim channels; the model keeps them as score_predictor.<stage>."""
        return None

    def reads_attention(self, has_class_token: bool) -> bool:
        """Whether it needs Look.attention, which costs a hook on the block's queries and keys."""
        return False

    def __call__(self, look: Look, module: nn.Module | None) -> Scores:
        raise NotImplementedError


class Float32LogSoftmax(nn.LogSoftmax):
    """In float32, as log-probabilities near log(1/2) would mostly be the same number in bfloat16."""

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


class LearnedScorer(Scorer):
    """The published one: a small network for each stage."""

    name = "predictor"
    learned = published = probability = True

    def module(self, dim: int) -> nn.Module:
        return Predictor(dim)

    def __call__(self, look: Look, module: nn.Module) -> Scores:
        return Scores(module(look.tokens)[..., 0])

    @staticmethod
    def log_probabilities(module: nn.Module, tokens: Tensor, policy: Tensor) -> Tensor:
        return module(tokens, policy)


class AttentionScorer(Scorer):
    """The class token's attention; without a class token, the attention that a patch receives from all patches."""

    name = "attention"

    def reads_attention(self, has_class_token: bool) -> bool:
        return True

    def __call__(self, look: Look, module: None) -> Scores:
        return Scores(attention_importance(look))


class DistinctScorer(Scorer):
    """Importance times the distance to the nearest more important token, so that of tokens that look alike one stays.

    Importance is class attention; without a class token, the distance to the mean token stands in for it.
    """

    name = "distinct"
    compared: int | None = None  # how many times as many tokens as have to leave are compared; None: all

    def reads_attention(self, has_class_token: bool) -> bool:
        return has_class_token

    def __call__(self, look: Look, module: None) -> Scores:
        if not look.has_class_token:
            return distinct(outlying(look.tokens.detach(), look.sizes), look, None, self.compared)
        importance = attention_importance(look)
        return distinct(importance, look, importance, self.compared)


class FewDistinctScorer(DistinctScorer):
    """As distinct, but only the least important tokens, twice as many as have to leave, are compared with the others;
    the rest stays. That halves the arithmetic, and errs less, too, as the tokens that stay are important."""

    name = "distinct_few"
    compared = 2


class OutlyingScorer(Scorer):
    """As distinct, with the distance to the mean token for importance: best where every patch's feature is wanted."""

    name = "outlying"

    def __call__(self, look: Look, module: None) -> Scores:
        return distinct(outlying(look.tokens.detach(), look.sizes), look, None)


class RandomScorer(Scorer):
    """The baseline that every other scorer has to beat."""

    name = "random"

    def __call__(self, look: Look, module: None) -> Scores:
        return Scores(random_scores(look.tokens))


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        LearnedScorer(),
        AttentionScorer(),
        DistinctScorer(),
        FewDistinctScorer(),
        OutlyingScorer(),
        RandomScorer(),
    )
}


def attention_importance(look: Look) -> Tensor:
    """(B, N) attention that the patch tokens get; no gradient."""

    def from_class_token(a: Attention) -> Tensor:
        # The class token is a prefix token, which RoPE leaves alone.
        query, keys = a.queries[:, :, :1].detach(), a.rotate(a.keys.detach())
        if kernels.available(keys):
            return kernels.class_attention(query, keys, a.scale, look.num_prefix, look.size)
        return class_attention(query, keys, a.scale, look.num_prefix, look.log_sizes)

    def from_all(a: Attention) -> Tensor:
        queries, keys = a.rotate(a.queries.detach()), a.rotate(a.keys.detach())
        return received_attention(queries, keys, a.scale, look.num_prefix, look.log_sizes)

    return look.mean_over_attentions(from_class_token if look.has_class_token else from_all)


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
    if keys.shape[1] != queries.shape[1]:  # under grouped-query attention several queries share one key head
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (queries * scale @ keys.transpose(-2, -1)).float()
    if log_size is not None:
        logits = logits + log_size[:, None, None]
    return logits.softmax(dim=-1)


def outlying(tokens: Tensor, size: Tensor) -> Tensor:
    """How far each token is from the mean of all, by cosine, times its size: importance without attention.

    (B, N, C) tokens, (B, N) sizes -> (B, N), float32.
    """
    if kernels.available(tokens):
        return kernels.outlying(tokens, size)
    mean = torch.einsum("bn,bnc->bc", size / size.sum(dim=1, keepdim=True), tokens.float())[:, None]
    return size * (1 - cosine_similarity(tokens, mean)[..., 0])


def distinct(importance: Tensor, look: Look, weights: Tensor | None, compared: int | None = None) -> Scores:
    """Distinct scores of what comes to a stage, and the similarities, so that merging need not compute them again."""
    x = look.x.detach()  # as nothing here learns
    num_tokens = importance.shape[1]
    count = num_tokens if compared is None else max(1, compared * (num_tokens - look.num_keep))
    if kernels.available(x):
        scores, inverse_norm = kernels.distinct_scores(importance, x, look.num_prefix, count)
        return Scores(scores, weights, inverse_norm=inverse_norm)
    rows = importance.topk(count, dim=1, largest=False).indices if count < num_tokens else None
    tokens = x[:, look.num_prefix :]
    similarity = cosine_similarity(tokens, tokens, rows)
    scores = distinct_scores(importance, tokens, similarity, rows)
    return Scores(scores, weights, similarity, rows)


def distinct_scores(
    importance: Tensor, tokens: Tensor, similarity: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """What would be lost if a token joined the nearest one that is more important.

    (B, N) importance, (B, N, C) tokens -> (B, N) scores: importance times the cosine distance to the most similar
    token of greater importance, as density peaks clustering ranks its centres (Rodriguez and Laio, Science 2014).
    Of tokens that look alike only the most important one scores high. similarity: (B, N, N), where it is known, or
    (B, M, N) of these (B, M) rows, if the other tokens are to stay in any case.
    """
    if similarity is None:
        similarity = cosine_similarity(tokens, tokens, rows)
    own = importance if rows is None else importance.gather(1, rows)
    not_more_important = importance[:, None, :] <= own[:, :, None]
    scores = own * (1 - similarity.masked_fill(not_more_important, -1.0).amax(dim=-1))
    return scores if rows is None else above_all(importance, rows, scores)


def above_all(importance: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
    """(B, N) scores: the given (B, M) in the given rows, and higher ones for all others, in the order of importance."""
    # no score is above twice the largest importance, as no cosine distance is above 2
    return (importance + 2 * importance.amax(dim=1, keepdim=True)).scatter(1, rows, scores)


def random_scores(tokens: Tensor) -> Tensor:
    """(B, N, C) tokens -> (B, N) random numbers."""
    return torch.rand(tokens.shape[:2], device=tokens.device)
