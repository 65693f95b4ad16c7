"""Token reduction in a vision transformer: the heart of DynamicViT (arXiv 2106.02034), for any trained ViT.

A *stage* is a place before a block where a scorer ranks the patch tokens that are left and a reducer
drops or merges those that are not kept. There are two forward passes. Pruned: tokens really leave the
tensor. Masked, the published way to train predictors: tokens stay, and the *policy*, 1 for a kept token
and 0 for a dropped one, hides them from attention. Shapes: B images, N patch tokens, K of them left,
P prefix tokens (the class token first), C channels, S stages.
"""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from .eva import EvaAdapter
from .lvvit import LVViT, LVViTAdapter
from .reducers import REDUCERS, Reduced, drop, merge, select_tokens
from .scorers import (
    SCORERS,
    Predictor,
    class_attention,
    distinct_scores,
    outlying,
    random_scores,
    received_attention,
)
from .vit import POOLINGS, Tokens, ViTAdapter, attentions, log_weights, matmul_dtype, observe, take_observed

__all__ = ["Predictor", "TokenPruning", "Trace", "make_dynamic", "sample_keep_decision", "select_tokens"]

# The first that fits: LVViT is a VisionTransformer too.
ADAPTERS = {LVViT: LVViTAdapter(), VisionTransformer: ViTAdapter(), Eva: EvaAdapter()}


def find_adapter(vit: nn.Module) -> ViTAdapter:
    """The adapter for the backbone's family. Raises ValueError for an unknown one."""
    for family, adapter in ADAPTERS.items():
        if isinstance(vit, family):
            return adapter
    raise ValueError(
        "only timm's VisionTransformer, Eva, SwinTransformer and ConvNeXt can be dynamic, "
        f"and this is a {type(vit).__name__}"
    )


def sample_keep_decision(log_probs: Tensor) -> Tensor:
    """(B, N, 2) log-probabilities -> (B, N) decisions, 0 or 1, by straight-through Gumbel-softmax."""
    return F.gumbel_softmax(log_probs, tau=1.0, hard=True, dim=-1)[..., 0]


def policy_bias(policy: Tensor, num_prefix: int) -> Tensor:
    """(B, N) policy -> (B, 1, P+N, P+N) attention bias that hides dropped tokens.

    softmax(a + bias) weighs exp(a_ij) by G_ij, where G_ij is policy_j, and 1 if i = j (paper,
    eq. 9-11): a query sees the kept tokens, the prefix tokens and itself.
    """
    log_policy = F.pad(log_weights(policy), (num_prefix, 0))
    size = log_policy.shape[1]
    off_diagonal = 1 - torch.eye(size, device=policy.device)
    return (log_policy[:, None, :] * off_diagonal)[:, None]


def size_bias(size: Tensor, num_prefix: int) -> Tensor:
    """(B, K) sizes -> (B, 1, 1, P+K) attention bias: a merged token weighs as many as the patches in it.

    Proportional attention (ToMe, arXiv 2210.09461, section 3). Prefix tokens have size 1.
    """
    return F.pad(size.log(), (num_prefix, 0))[:, None, None]


def aligned(bias: Tensor) -> Tensor:
    """The same values in rows whose stride is a multiple of 8, once a stage.

    CUDA's fused attention wants that of a bias, and would otherwise pad a copy of it in every block.
    """
    width = bias.shape[-1]
    return F.pad(bias, (0, -width % 8))[..., :width]


def choose_attention(vit: nn.Module, images: Tensor) -> None:
    """timm's plain attention instead of its fused kernel where that one falls short.

    On a CPU it is the slower one in bfloat16. In float16 it would keep a dropped token's weight, about
    1e-9, as 0, and so its decision would get no gradient.
    """
    slow = images.device.type == "cpu" and matmul_dtype(images) == torch.bfloat16
    coarse = vit.training and matmul_dtype(images) == torch.float16
    pooling = [vit.attn_pool] if vit.global_pool == "map" else []
    for attention in [*chain.from_iterable(attentions(block) for block in vit.blocks), *pooling]:
        attention.fused_attn = use_fused_attn() and not (slow or coarse)


def bias_dtype(x: Tensor) -> torch.dtype:
    """That of the matrix products, but float32 instead of float16; see choose_attention."""
    dtype = matmul_dtype(x)
    return torch.float32 if dtype == torch.float16 else dtype


class Stage(NamedTuple):
    """What happened at a stage to the M patch tokens that came in."""

    scores: Tensor  # (B, M)
    reduced: Reduced
    patches: Tensor  # (B, K) original numbers of the patches kept, best score first


class Trace(NamedTuple):
    """What the pruned forward pass did with B images of N patches, for pictures and tables."""

    logits: Tensor  # (B, classes)
    kept: list[Tensor]  # by stage: (B, K) patches kept, best score first
    scores: Tensor  # (B, S, N), float32; NaN for patches that had left before that stage
    groups: Tensor  # (B, S, N): the kept patch that each patch is part of after that stage; -1 if dropped
    grid: tuple[int, int]  # rows and columns of the N patches


class TokenPruning:
    """Mixin that gives a timm backbone its stages and a forward pass that uses them."""

    pruning_loc: tuple[int, ...]
    keep_rates: tuple[float, ...]
    scorer: str
    reducer: str
    adapter: ViTAdapter
    score_predictor: nn.ModuleList  # empty unless the scorer is the predictor

    def set_keep_rates(self, keep_rates: Sequence[float]) -> None:
        """Share of the original patch tokens kept after each stage; ValueError if they do not fit."""
        self.keep_rates = check_keep_rates(keep_rates, len(self.pruning_loc))

    def tokens_kept(self, num_patches: int) -> list[int]:
        """Patch tokens left after each stage of the pruned forward pass."""
        return [max(1, int(num_patches * rate)) for rate in self.keep_rates]

    @property
    def tokens_are_logits(self) -> bool:
        """Whether the tokens that forward returns in train mode are logits (LV-ViT) or features (the others)."""
        return self.adapter.tokens_are_logits(self)

    def combine(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The prediction from what forward returns in train mode; LV-ViT's takes in the tokens' logits."""
        return self.adapter.combine(self, logits, tokens)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(B, 3, H, W) images -> in training (logits, tokens, keep_mask, keep_decisions), else logits.

        tokens: the (B, N, C) normed patch tokens, or (B, N, classes) logits for LV-ViT; those that left the tensor
        are 0, or for LV-ViT, whose prediction takes the maximum over all, copies of the best one. keep_mask: (B, N),
        the tokens kept at the end, no gradient. keep_decisions: S tensors (B, N), the policy after each stage,
        with gradient; none where tokens left the tensor.
        """
        if not self.training:
            return self.forward_pruned(images)[0]
        if self.scorer == "predictor" and self.reducer == "drop":
            return self.forward_masked(images)
        return self.forward_removed(images)

    def forward_masked(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training of predictors that drop: the attention bias hides tokens, so that decisions get a gradient."""
        keep_decisions = []

        def hide(stage: int, tokens: Tokens) -> None:
            patch_tokens = tokens.x[:, self.num_prefix_tokens :]
            ones = patch_tokens.new_ones(patch_tokens.shape[:2], dtype=torch.float32)
            policy = keep_decisions[-1] if keep_decisions else ones
            policy = policy * sample_keep_decision(self.score_predictor[stage](patch_tokens, policy))
            keep_decisions.append(policy)
            tokens.bias = aligned(policy_bias(policy, self.num_prefix_tokens).to(bias_dtype(tokens.x)))

        tokens = self.run_blocks(images, hide)
        logits, patch_tokens = self.adapter.outputs(self, tokens.x, weights=keep_decisions[-1])
        return logits, patch_tokens, keep_decisions[-1].detach(), keep_decisions

    def forward_removed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training by hard selection: tokens leave the tensor as they do in evaluation."""
        tokens, stages = self.reduce_tokens(images)
        logits, left = self.adapter.outputs(self, tokens.x, tokens.size)
        batch, num_patches = stages[0].scores.shape
        absent = left[:, :1] if self.tokens_are_logits else torch.zeros_like(left[:, :1])
        patch_tokens = absent.expand(-1, num_patches, -1).scatter(1, tokens.patches[..., None].expand_as(left), left)
        keep_mask = torch.zeros(batch, num_patches, device=left.device).scatter(1, tokens.patches, 1.0)
        return logits, patch_tokens, keep_mask, []

    def forward_pruned(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Evaluation: tokens leave the tensor.

        Returns the (B, classes) logits and, per stage, the (B, K) original indices of the kept
        patches, best score first.
        """
        tokens, stages = self.reduce_tokens(images)
        return self.adapter.head(self, tokens.x, tokens.size), [stage.patches for stage in stages]

    def trace(self, images: Tensor) -> Trace:
        """forward_pruned, with the scores and with what merged into what."""
        tokens, stages = self.reduce_tokens(images)
        logits = self.adapter.head(self, tokens.x, tokens.size)
        kept = [stage.patches for stage in stages]
        grid = tuple(self.patch_embed.dynamic_feat_size(images.shape[-2:]))
        return Trace(logits, kept, spread_scores(stages), trace_groups(stages), grid)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, P+K, C) normed tokens: the prefix tokens and those left at the end."""
        return self.reduce_tokens(images)[0].x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's, for what forward_features returns; where pooling needs the sizes of merged tokens it cannot."""
        if self.reducer == "merge" and self.global_pool not in ("token", ""):
            raise NotImplementedError(
                "merged tokens are pooled by size, which forward_head does not know: "
                "call the model, and reset_classifier(0) before for embeddings"
            )
        return super().forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, *_, **__) -> None:
        raise NotImplementedError(
            "a dynamic model has no feature maps, as tokens leave between its blocks: "
            "call forward_features or forward_pruned, or take the dense model"
        )

    def run_blocks(self, images: Tensor, at_stage: Callable[[int, Tokens], None]) -> Tokens:
        """The one forward loop: (B, 3, H, W) images -> their tokens after the last norm.

        at_stage: called before the block of each stage, and changes the tokens in place.
        """
        choose_attention(self, images)
        tokens = self.adapter.embed(self, images)
        for i in range(len(self.blocks)):
            if i in self.pruning_loc:
                at_stage(self.pruning_loc.index(i), tokens)
            tokens.x = self.adapter.run_block(self, i, tokens)
        tokens.x = self.norm(tokens.x)
        return tokens

    def reduce_tokens(self, images: Tensor) -> tuple[Tokens, list[Stage]]:
        """The tokens that are left after all blocks, normed, and what happened at each stage."""
        stages = []

        def shorten(stage: int, tokens: Tokens) -> None:
            scores, weights = self.score(stage, tokens)
            num_patches = (stages[0].scores if stages else scores).shape[1]
            reduced = self.reduce(scores, weights, self.tokens_kept(num_patches)[stage], tokens)
            patches = reduced.kept if stage == 0 else tokens.patches.gather(1, reduced.kept)
            tokens.x, tokens.size, tokens.patches = reduced.x, reduced.size, patches
            if reduced.size is not None:
                tokens.bias = aligned(size_bias(reduced.size, self.num_prefix_tokens).to(matmul_dtype(reduced.x)))
            stages.append(Stage(scores, reduced, patches))

        return self.run_blocks(images, shorten), stages

    def score(self, stage: int, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """(B, K) scores of the patch tokens that come to a stage, and their weights if they merge; None for sizes."""
        patch_tokens = tokens.x[:, self.num_prefix_tokens :]
        if self.scorer == "predictor":
            return self.score_predictor[stage](patch_tokens)[..., 0], None
        if self.scorer == "attention":
            return self.attention_scores(stage, tokens), None
        if self.scorer == "random":
            return random_scores(patch_tokens), None
        patch_tokens = patch_tokens.detach()  # as nothing here learns
        if self.cls_token is None:
            return distinct_scores(outlying(patch_tokens, sizes(tokens, patch_tokens)), patch_tokens), None
        importance = self.attention_scores(stage, tokens)
        return distinct_scores(importance, patch_tokens), importance

    def attention_scores(self, stage: int, tokens: Tokens) -> Tensor:
        """(B, K) attention that the patch tokens got in the block before the stage."""
        i = self.pruning_loc[stage] - 1
        num_prefix = self.num_prefix_tokens
        log_size = None if tokens.size is None else F.pad(tokens.size.log(), (num_prefix, 0))
        scores = []
        for attention, queries, keys in take_observed(self.blocks[i]):
            queries, keys = queries.detach(), self.adapter.rotate(self, i, attention, keys.detach(), tokens)
            if self.cls_token is not None:  # a prefix token, which RoPE leaves alone
                scores.append(class_attention(queries[:, :, :1], keys, attention.scale, num_prefix, log_size))
            else:
                queries = self.adapter.rotate(self, i, attention, queries, tokens)
                scores.append(received_attention(queries, keys, attention.scale, num_prefix, log_size))
        return torch.stack(scores).mean(dim=0)

    def reduce(self, scores: Tensor, weights: Tensor | None, num_keep: int, tokens: Tokens) -> Reduced:
        """Drops or merges all but the num_keep best scored patch tokens."""
        if self.reducer == "drop":
            return drop(tokens.x, scores, num_keep, self.num_prefix_tokens)
        size = sizes(tokens, scores)
        if self.training and self.scorer == "predictor":
            # Who is kept is a hard choice without a gradient. But a token's size says how much it counts
            # in its mean and in every attention from here on, and the probability of keeping it is a soft
            # answer to that same question. So it takes the gradient of the size (straight through: the
            # value stays), and the predictor learns which tokens should count for more.
            probability = scores.exp()
            size = size * (1 + probability - probability.detach())
        return merge(tokens.x, scores, size, num_keep, self.num_prefix_tokens, weights)


def sizes(tokens: Tokens, like: Tensor) -> Tensor:
    """(B, K) patches that each token stands for, float32; like: a tensor that begins with those dimensions."""
    return like.new_ones(like.shape[:2], dtype=torch.float32) if tokens.size is None else tokens.size


def reads_attention(vit: nn.Module, scorer: str) -> bool:
    """Whether the scorer needs the attention of the block before the stage."""
    return scorer == "attention" or (scorer == "distinct" and vit.cls_token is not None)


def spread_scores(stages: Sequence[Stage]) -> Tensor:
    """Scores by original patch number: (B, S, N), NaN where a patch had left before the stage."""
    batch, num_patches = stages[0].scores.shape
    spread = [stages[0].scores.float()]
    for before, stage in pairwise(stages):
        empty = torch.full((batch, num_patches), torch.nan, device=stage.scores.device)
        spread.append(empty.scatter(1, before.patches, stage.scores.float()))
    return torch.stack(spread, dim=1)


def trace_groups(stages: Sequence[Stage]) -> Tensor:
    """The kept patch that each patch is part of after each stage: (B, S, N), -1 for dropped ones."""
    batch, num_patches = stages[0].scores.shape
    # A column more than tokens, at the end, stands for what was dropped.
    place = torch.arange(num_patches, device=stages[0].scores.device).expand(batch, -1)
    groups = []
    for stage in stages:
        num_keep = stage.patches.shape[1]
        goes_to = torch.full_like(F.pad(stage.scores, (0, 1)), num_keep, dtype=torch.long)
        goes_to = goes_to.scatter(1, stage.reduced.kept, torch.arange(num_keep, device=place.device).expand(batch, -1))
        if stage.reduced.joined is not None:
            goes_to = goes_to.scatter(1, stage.reduced.others, stage.reduced.joined)
        place = goes_to.gather(1, place)
        groups.append(F.pad(stage.patches, (0, 1), value=-1).gather(1, place))
    return torch.stack(groups, dim=1)


def check_keep_rates(keep_rates: Sequence[float], num_stages: int) -> tuple[float, ...]:
    keep_rates = tuple(float(rate) for rate in keep_rates)
    if len(keep_rates) != num_stages:
        raise ValueError(f"{len(keep_rates)} keep rates for {num_stages} pruning stages")
    if not all(0 < rate <= 1 for rate in keep_rates):
        raise ValueError(f"keep rates must lie in (0, 1], got {', '.join(map(str, keep_rates))}")
    if list(keep_rates) != sorted(keep_rates, reverse=True):
        raise ValueError(f"keep rates are shares of the original tokens and cannot grow, got {keep_rates}")
    return keep_rates


def check_stages(vit: nn.Module, pruning_loc: tuple[int, ...], scorer: str, reducer: str) -> None:
    """Raises ValueError, with a message for the user, if the backbone cannot be reduced in this way."""
    depth = len(vit.blocks)
    if not pruning_loc or list(pruning_loc) != sorted(set(pruning_loc)) or not all(0 <= i < depth for i in pruning_loc):
        raise ValueError(f"pruning stages must be ascending block numbers in 0..{depth - 1}, got {pruning_loc}")
    for kind, name, known in (("scorer", scorer, SCORERS), ("reducer", reducer, REDUCERS)):
        if name not in known:
            raise ValueError(f"unknown {kind} '{name}'; known: {', '.join(known)}")
    if isinstance(vit, TokenPruning):
        raise ValueError("the model is dynamic already: start from the dense one, or change it by set_keep_rates")
    if vit.global_pool not in POOLINGS:
        raise ValueError(f"token pruning cannot pool by '{vit.global_pool}'; it can by token, avg and map")
    if reads_attention(vit, scorer) and pruning_loc[0] == 0:
        raise ValueError(f"the {scorer} scorer reads the block before a stage: the first stage must be 1 or later")
    observed = [attention for i in pruning_loc for attention in attentions(vit.blocks[i - 1])]
    if reads_attention(vit, scorer) and any(hasattr(attention, "lambda_init") for attention in observed):
        raise ValueError("differential attention gives no scores; take the predictor or random scorer")


def make_dynamic(
    vit: VisionTransformer | Eva,
    pruning_loc: Sequence[int],
    keep_rates: Sequence[float],
    scorer: str = "predictor",
    reducer: str = "drop",
) -> VisionTransformer | Eva:
    """Turns a timm backbone into a dynamic one, in place; its own weights and names stay.

    timm's patch dropout and gradient checkpointing are not used any more.
    pruning_loc: the blocks before which tokens are dropped or merged. keep_rates: share of the original
    patch tokens kept after each. scorer: predictor (published; learned), or attention, distinct or random,
    which need no training. reducer: drop (published) or merge. Raises ValueError if they do not fit.
    """
    adapter = find_adapter(vit)
    pruning_loc = tuple(pruning_loc)
    check_stages(vit, pruning_loc, scorer, reducer)
    keep_rates = check_keep_rates(keep_rates, len(pruning_loc))
    vit.__class__ = type(f"Dynamic{type(vit).__name__}", (TokenPruning, type(vit)), {})
    vit.adapter, vit.scorer, vit.reducer = adapter, scorer, reducer
    vit.pruning_loc = pruning_loc
    vit.keep_rates = keep_rates
    vit.patch_drop = None
    predictors = [Predictor(vit.embed_dim) for _ in pruning_loc] if scorer == "predictor" else []
    vit.score_predictor = nn.ModuleList(predictors)
    vit.score_predictor.apply(init_weights_vit_timm)
    if reads_attention(vit, scorer):
        for i in pruning_loc:
            observe(vit.blocks[i - 1])
    return vit
