"""Token reduction in a vision transformer: the heart of DynamicViT (arXiv 2106.02034), for any trained ViT.

A *stage* is a place before a block, or inside it between attention and MLP, where a scorer ranks the patch tokens that
are left and a reducer drops or merges those that are not kept. There are two forward passes. Pruned: tokens really
leave the tensor. Masked, the published way to train predictors: tokens stay, and the *policy*, 1 for a kept token
and 0 for a dropped one, hides them from attention. Shapes: B images, N patch tokens, K of them left,
P prefix tokens (the class token first), C channels, S stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import POOLINGS, Tokens, attentions, choose_attention, has_hooks, log_weights, matmul_dtype, observe
from .dynamic import Dynamic, Plan, check_own_methods, dynamic_class
from .patches import project_by_product
from .rates import check_keep_rates
from .reducers import Reduced, select_tokens
from .restoring import RESTORE, Restorer
from .scorers import Look, Predictor
from .spec import PLACES

if TYPE_CHECKING:
    from .vit import ViTAdapter

__all__ = ["Predictor", "TokenPruning", "Trace", "sample_keep_decision", "select_tokens"]


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


def size_bias(log_size: Tensor, num_prefix: int) -> Tensor:
    """(B, K) logarithms of sizes -> (B, 1, 1, P+K) attention bias: a merged token weighs as many as the patches in it.

    Proportional attention (ToMe, arXiv 2210.09461, section 3). Prefix tokens have size 1.
    """
    # New dimensions first: with none padded afterwards, all strides but the last one are multiples.
    return aligned(log_size[:, None, None], num_prefix)


def aligned(bias: Tensor, left: int = 0) -> Tensor:
    """The same values after `left` zeros, in rows whose stride is a multiple of 8 on a GPU, once a stage.

    CUDA's fused attention needs such a bias, and would otherwise pad a copy of it in every block.
    """
    width = left + bias.shape[-1]
    if bias.device.type == "cpu":
        return F.pad(bias, (left, 0)) if left else bias
    return F.pad(bias, (left, -width % 8))[..., :width]


def bias_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products, but float32 instead of float16 under autocast; see choose_attention."""
    dtype = matmul_dtype(x)
    return torch.float32 if dtype == torch.float16 and x.dtype != torch.float16 else dtype


class Stage(NamedTuple):
    """What happened at a stage to the M patch tokens that came in."""

    scores: Tensor  # (B, M)
    reduced: Reduced
    patches: Tensor  # (B, K) original numbers of the patches kept


class Trace(NamedTuple):
    """What the pruned forward pass did with B images of N patches, for pictures and tables."""

    logits: Tensor  # (B, classes)
    kept: list[Tensor]  # by stage: (B, K) patches kept, best score first
    scores: Tensor  # (B, S, N), float32; NaN for patches that had left before that stage
    groups: Tensor  # (B, S, N): the kept patch that each patch is part of after that stage; -1 if dropped
    grid: tuple[int, int]  # rows and columns of the N patches


@dataclass
class Forward:
    """One pass through the blocks: what it has to return, and its state so far."""

    stages: list[Stage]
    head_alone: bool  # no patch token is read after the last attention
    restorer: Restorer | None = None
    wanted: frozenset[int] = frozenset()  # blocks whose tokens are wanted, restored
    taken: list[Tensor] | None = None
    last: int | None = None  # the last block to run; None: all


class TokenPruning(Dynamic):
    """Mixin that gives a timm backbone its stages and a forward pass that uses them."""

    keeps_map, merge_streams = False, False
    adapter: "ViTAdapter"
    place: str  # of its stages: one of PLACES
    score_predictor: nn.ModuleList  # empty unless the scorer is learned

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

    @property
    def hides(self) -> bool:
        """Whether training hides tokens by a policy, as published, instead of removing them."""
        return self.reducer.hides and self.scorer.log_probabilities is not None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(B, 3, H, W) images -> logits; in train mode after set_distilled_training(True) (logits, tokens, keep_mask,
        keep_decisions).

        tokens: the (B, N, C) normed patch tokens, or (B, N, classes) logits for LV-ViT; those that left the tensor
        are 0, or for LV-ViT, whose prediction takes the maximum over all, copies of the best one. keep_mask: (B, N),
        the tokens kept at the end, no gradient. keep_decisions: S tensors (B, N), the policy after each stage,
        with gradient; none where tokens left the tensor.
        """
        self.refuse_tracing(images)
        if not self.training or not (self.all_outputs or self.hides):
            return self.forward_pruned(images)[0]
        outputs = self.forward_masked(images) if self.hides else self.forward_removed(images)
        return outputs if self.all_outputs else self.combine(*outputs[:2])

    def forward_masked(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training of predictors that drop: the attention bias hides tokens, so that decisions get a gradient."""
        keep_decisions = []

        def hide(stage: int, tokens: Tokens) -> None:
            patch_tokens = tokens.x[:, self.num_prefix_tokens :]
            ones = patch_tokens.new_ones(patch_tokens.shape[:2], dtype=torch.float32)
            policy = keep_decisions[-1] if keep_decisions else ones
            log_probs = self.scorer.log_probabilities(self.score_predictor[stage], patch_tokens, policy)
            policy = policy * sample_keep_decision(log_probs)
            keep_decisions.append(policy)
            tokens.bias = aligned(policy_bias(policy, self.num_prefix_tokens).to(bias_dtype(tokens.x)))

        tokens = self.run_blocks(images, hide, Forward([], head_alone=False))
        logits, patch_tokens = self.adapter.outputs(self, self.norm(tokens.x), weights=keep_decisions[-1])
        return logits, patch_tokens, keep_decisions[-1].detach(), keep_decisions

    def forward_removed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training by hard selection: tokens leave the tensor as they do in evaluation."""
        tokens, stages = self.reduce_tokens(images, head_alone=False)
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
        tokens, stages = self.reduce_tokens(images, self.head_alone)
        return self.adapter.head(self, tokens.x, tokens.size), [stage.patches for stage in stages]

    def trace(self, images: Tensor) -> Trace:
        """forward_pruned, with the scores and with what merged into what."""
        tokens, stages = self.reduce_tokens(images, self.head_alone)
        logits = self.adapter.head(self, tokens.x, tokens.size)
        kept = [stage.patches for stage in stages]
        return Trace(logits, kept, spread_scores(stages), trace_groups(stages), self.grid(images))

    @property
    def head_alone(self) -> bool:
        """Whether the last block computes its MLP for the prefix tokens only, all that the head reads.

        Exact up to rounding. Not for published forms, whose multiply-adds are counted with all tokens, nor where
        a user's hook on that block waits for them.
        """
        last = self.blocks[-1]
        splits = self.adapter.find_split(last) is not None and not has_hooks(last)
        return splits and not self.scorer.published and self.adapter.reads_prefix_alone(self)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the images' patches."""
        return tuple(self.patch_embed.dynamic_feat_size(images.shape[-2:]))

    # --- every patch's feature

    def forward_features(self, images: Tensor, restore: str | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, P+N, C) normed tokens, as timm's: a token for every patch.

        restore: residual (each patch gets its group's token plus what it lost by joining), copy (its group's token), or
        none: (B, P+K, C), the tokens that are left. None takes model.restore, which is residual unless it is set.
        """
        tokens, run = self.restored(images, restore, frozenset(), None)
        return self.norm(run.restorer(tokens.x, self.num_prefix_tokens) if run.restorer else tokens.x)

    def restored(
        self, images: Tensor, restore: str | None, wanted: frozenset[int], last: int | None
    ) -> tuple[Tokens, Forward]:
        restore = self.restore if restore is None else restore
        if restore not in RESTORE:
            raise ValueError(f"restore must be one of {', '.join(RESTORE)}; got {restore!r}")
        restorer = None if restore == "none" else Restorer(restore)
        run = Forward([], head_alone=False, restorer=restorer, wanted=wanted, taken=[], last=last)
        return self.run_blocks(images, self.shorten(run), run), run

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        restore: str | None = None,
    ) -> Any:
        """timm's, with a feature for every patch: (B, 3, H, W) images -> (final tokens, feature maps by block).

        restore: residual or copy, see forward_features. Raises ValueError for blocks that do not exist, and for
        attention masks, which a model with stages makes itself.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("a dynamic model makes its own attention masks; leave attn_mask and is_causal out")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        if (self.restore if restore is None else restore) == "none":
            raise ValueError("feature maps need a token for every patch: restore must be residual or copy")
        try:
            take, last = feature_take_indices(len(self.blocks), indices)
        except AssertionError as error:
            raise ValueError(f"block numbers are 0 to {len(self.blocks) - 1}, got {indices}") from error
        tokens, run = self.restored(x, restore, frozenset(take), last if stop_early else None)
        taken = [self.norm(y) if norm else y for y in run.taken]
        num_prefix = self.num_prefix_tokens
        prefix, maps = [y[:, :num_prefix] for y in taken], [y[:, num_prefix:] for y in taken]
        if output_fmt == "NCHW":
            maps = [y.unflatten(1, self.grid(x)).permute(0, 3, 1, 2).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and num_prefix > 0
        final = None if intermediates_only else self.norm(run.restorer(tokens.x, num_prefix))
        if output_dict:
            answer = {"image_intermediates": maps} | ({"image_intermediates_prefix": prefix} if with_prefix else {})
            return answer if final is None else answer | {"image_features": final}
        pairs = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return pairs if intermediates_only else (final, pairs)

    # --- the passes

    def run_blocks(self, images: Tensor, at_stage: Callable[[int, Tokens], None], run: Forward) -> Tokens:
        """The one forward loop: (B, 3, H, W) images -> their tokens after the last block.

        at_stage: called at each stage, and changes the tokens in place.
        """
        choose_attention(self, images)
        tokens = self.adapter.embed(self, images)
        depth = len(self.blocks) if run.last is None else run.last + 1
        for i in range(depth):
            stage = self.pruning_loc.index(i) if i in self.pruning_loc else None
            if stage is not None and self.place == "before":
                at_stage(stage, tokens)
            shortcut = run.head_alone and i == len(self.blocks) - 1
            if shortcut or (stage is not None and self.place == "inside"):
                attention, mlp = self.adapter.halves(self, i, tokens)
                tokens.x = self.call(attention, tokens.x)
                if stage is not None and self.place == "inside":
                    at_stage(stage, tokens)
                if shortcut:
                    tokens.x = tokens.x[:, : self.num_prefix_tokens]
                tokens.x = self.call(mlp, tokens.x)
            else:
                tokens.x = self.call(self.adapter.whole(self, i, tokens), tokens.x)
            if i in run.wanted:
                run.taken.append(run.restorer(tokens.x, self.num_prefix_tokens))
        return tokens

    def call(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A part of a block, computed again for the backward pass where set_grad_checkpointing asks for it."""
        keeps_all = not (self.grad_checkpointing and self.training and torch.is_grad_enabled())
        return part(x) if keeps_all else checkpoint(part, x, use_reentrant=False)

    def reduce_tokens(self, images: Tensor, head_alone: bool) -> tuple[Tokens, list[Stage]]:
        """The tokens that are left after all blocks, normed, and what happened at each stage."""
        run = Forward([], head_alone)
        tokens = self.run_blocks(images, self.shorten(run), run)
        tokens.x = self.norm(tokens.x)
        return tokens, run.stages

    def shorten(self, run: Forward) -> Callable[[int, Tokens], None]:
        """What happens at a stage where tokens leave."""

        def at_stage(stage: int, tokens: Tokens) -> None:
            left = tokens.x.shape[1] - self.num_prefix_tokens
            num_keep = self.tokens_kept(run.stages[0].scores.shape[1] if run.stages else left)[stage]
            look = self.look(stage, tokens, num_keep)
            scores = self.scorer(look, self.score_predictor[stage] if self.scorer.learned else None)
            size = look.sizes
            if self.training and self.scorer.probability and self.reducer.merges:
                # Which tokens are kept is a hard choice without a gradient. But a token's size says how much it
                # counts in its mean and in every attention from here on, and the probability of keeping it is a soft
                # answer to that same question. So it takes the gradient of the size (straight through: the
                # value stays), and the predictor learns which tokens should count for more.
                probability = scores.scores.exp()
                size = size * (1 + probability - probability.detach())
            reduced = self.reducer(tokens.x, scores, size, num_keep, self.num_prefix_tokens)
            if run.restorer is not None:
                run.restorer.note(look.tokens, reduced, self.num_prefix_tokens, self.reducer.drops)
            patches = reduced.kept if stage == 0 else tokens.patches.gather(1, reduced.kept)
            tokens.x, tokens.size, tokens.patches = reduced.x, reduced.size, patches
            if reduced.size is not None:
                log_size = self.reducer.log_size(reduced.size).to(matmul_dtype(reduced.x))
                tokens.bias = size_bias(log_size, self.num_prefix_tokens)
            run.stages.append(Stage(scores.scores, reduced, patches))

        return at_stage

    def look(self, stage: int, tokens: Tokens, num_keep: int) -> Look:
        """What the scorer sees: the attention is that of the block before the stage, or around it."""
        has_class_token = self.adapter.has_class_token(self)
        attention = []
        if self.scorer.reads_attention(has_class_token):
            attention = self.adapter.observed(self, observed_block(self.pruning_loc[stage], self.place), tokens)
        return Look(tokens.x, self.num_prefix_tokens, tokens.size, has_class_token, num_keep, attention)

    # --- timm's setters

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's; ValueError for a pooling that merged tokens cannot have."""
        if global_pool is not None and global_pool not in POOLINGS:
            raise ValueError(f"token reduction does not work with pooling '{global_pool}'; use token, avg or map")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, **others: Any) -> None:
        """As timm's, but for another patch size: those weights would be another model's."""
        if patch_size is not None:
            raise NotImplementedError("the patch size of a dynamic model cannot change: change the dense model's")
        super().set_input_size(img_size=img_size, **others)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's: cuts the blocks after the last wanted one, with their stages. ValueError if no stage is left."""
        _, last = feature_take_indices(len(self.blocks), indices)
        left = [stage for stage, loc in enumerate(self.pruning_loc) if loc <= last]
        if not left:
            raise ValueError(f"all stages, {self.pruning_loc}, come after block {last}: use the dense model")
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.pruning_loc, rates = tuple(self.pruning_loc[s] for s in left), tuple(self.keep_rates[s] for s in left)
        self.score_predictor = self.score_predictor[: len(left)]
        self.set_keep_rates(rates)
        return taken


def observed_block(loc: int, place: str) -> int:
    """The block whose attention a stage's scorer reads."""
    return loc - 1 if place == "before" else loc


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
        goes_to = stage.reduced.places(stage.scores.shape[1])
        goes_to = F.pad(goes_to.where(goes_to >= 0, num_keep), (0, 1), value=num_keep)
        place = goes_to.gather(1, place)
        groups.append(F.pad(stage.patches, (0, 1), value=-1).gather(1, place))
    return torch.stack(groups, dim=1)


def check_stages(vit: nn.Module, adapter: "ViTAdapter", plan: Plan) -> None:
    """Raises ValueError, with a message for the user, if the backbone cannot be reduced in this way."""
    depth, loc, scorer = len(vit.blocks), plan.pruning_loc, plan.scorer
    if not loc or list(loc) != sorted(set(loc)) or not all(0 <= i < depth for i in loc):
        raise ValueError(f"pruning stages must be ascending block numbers in 0..{depth - 1}, got {loc}")
    if plan.place not in PLACES:
        raise ValueError(f"a stage's place must be {' or '.join(PLACES)} its block, got {plan.place!r}")
    if vit.global_pool not in POOLINGS:
        raise ValueError(f"token reduction does not work with pooling '{vit.global_pool}'; use token, avg or map")
    if plan.place == "inside":
        whole = [i for i in loc if adapter.find_split(vit.blocks[i]) is None]
        if whole:
            kind = type(vit.blocks[whole[0]]).__name__
            raise ValueError(f"a {kind} has no place between attention and MLP: stages go before the block")
    if plan.place == "inside" and plan.reducer.hides and scorer.log_probabilities is not None:
        raise ValueError(f"{scorer} + {plan.reducer} is trained by hiding tokens from whole blocks: use place 'before'")
    if not scorer.reads_attention(adapter.has_class_token(vit)):
        return
    if observed_block(loc[0], plan.place) < 0:
        raise ValueError(f"the {scorer} scorer reads the block before a stage: the first stage must be 1 or later")
    observed = [attention for i in loc for attention in attentions(vit.blocks[observed_block(i, plan.place)])]
    if any(hasattr(attention, "lambda_init") for attention in observed):
        raise ValueError("differential attention gives no scores; take the predictor or random scorer")
    blind = [a for a in observed if not (hasattr(a, "q_norm") and hasattr(a, "k_norm") and hasattr(a, "scale"))]
    if blind:
        raise ValueError(
            f"the {scorer} scorer reads queries and keys where they pass q_norm and k_norm, as in timm's attention; "
            f"a {type(blind[0]).__name__} has none: take the outlying, predictor or random scorer"
        )


def make_token_pruning(vit: nn.Module, adapter: "ViTAdapter", plan: Plan) -> nn.Module:
    """Gives a sequence backbone its stages, in place; every check comes before the first change."""
    check_own_methods(vit, TokenPruning)
    check_stages(vit, adapter, plan)
    keep_rates = check_keep_rates(plan.keep_rates, len(plan.pruning_loc))
    modules = [plan.scorer.module(vit.embed_dim) for _ in plan.pruning_loc] if plan.scorer.learned else []
    vit.__class__ = dynamic_class(TokenPruning, type(vit))
    vit.adapter, vit.scorer, vit.reducer, vit.place = adapter, plan.scorer, plan.reducer, plan.place
    vit.pruning_loc, vit.restore = plan.pruning_loc, "residual"
    vit.set_keep_rates(keep_rates)
    vit.patch_drop = None
    vit.built_pool, vit.built_depth = vit.global_pool, len(vit.blocks)
    vit.score_predictor = nn.ModuleList(modules)
    vit.score_predictor.apply(init_weights_vit_timm)
    project_by_product(vit)
    if plan.scorer.reads_attention(adapter.has_class_token(vit)):
        for i in plan.pruning_loc:
            observe(vit.blocks[observed_block(i, plan.place)])
    return vit
