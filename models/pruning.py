"""Token pruning: the whole of DynamicViT (arXiv 2106.02034), for any timm VisionTransformer.

A *stage* is a place before a block where a predictor scores the patch tokens that are left.
The *policy* is the running keep decision, 1 for a kept token and 0 for a dropped one. Shapes:
B images, N patch tokens, P prefix tokens (the class token first), C channels, S stages.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

# What a dropped token weighs in attention beside a kept one. Not 0, so that the gradient still
# reaches its decision; the logarithm is a whole number so that bfloat16 holds it exactly.
LOG_DROPPED_WEIGHT = -16.0


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


def sample_keep_decision(log_probs: Tensor) -> Tensor:
    """(B, N, 2) log-probabilities -> (B, N) decisions, 0 or 1, by straight-through Gumbel-softmax."""
    return F.gumbel_softmax(log_probs, tau=1.0, hard=True, dim=-1)[..., 0]


def policy_bias(policy: Tensor, num_prefix: int) -> Tensor:
    """(B, N) policy -> (B, 1, P+N, P+N) attention bias that hides dropped tokens.

    softmax(a + bias) weighs exp(a_ij) by G_ij, where G_ij is policy_j, and 1 if i = j (paper,
    eq. 9-11): a query sees the kept tokens, the prefix tokens and itself.
    """
    log_policy = F.pad(torch.log(policy.float() + math.exp(LOG_DROPPED_WEIGHT)), (num_prefix, 0))
    size = log_policy.shape[1]
    off_diagonal = 1 - torch.eye(size, device=policy.device)
    return (log_policy[:, None, :] * off_diagonal)[:, None]


def select_tokens(x: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """(B, P+N, C) tokens, (B, K) indices of patch tokens -> (B, P+K, C): the prefix tokens and those."""
    batch, length, _ = x.shape
    prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    rows = torch.cat([prefix, kept + num_prefix], dim=1) + length * torch.arange(batch, device=x.device)[:, None]
    # whole rows of a matrix: many times faster than gather, which goes by single numbers
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def split_outputs(vit: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P+N, C) normed tokens -> what student and teacher are compared on: logits and tokens.

    Tokens are the (B, N, C) patch tokens, or for LV-ViT the (B, N, classes) logits of its
    auxiliary head, and the logits then are those of the class token alone.
    """
    patch_tokens = x[:, vit.num_prefix_tokens :]
    if hasattr(vit, "aux_head"):
        return vit.head(x[:, 0]), vit.aux_head(patch_tokens)
    return vit.forward_head(x), patch_tokens


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def choose_attention(vit: VisionTransformer, images: Tensor) -> None:
    """timm's plain attention instead of its fused kernel where that one falls short.

    On a CPU it is the slower one in bfloat16. In float16 it would keep a dropped token's weight, about
    1e-9, as 0, and so its decision would get no gradient.
    """
    slow = images.device.type == "cpu" and matmul_dtype(images) == torch.bfloat16
    coarse = vit.training and matmul_dtype(images) == torch.float16
    for block in vit.blocks:
        if hasattr(block, "attn"):
            block.attn.fused_attn = use_fused_attn() and not (slow or coarse)


def bias_dtype(x: Tensor) -> torch.dtype:
    """That of the matrix products, but float32 instead of float16; see choose_attention."""
    dtype = matmul_dtype(x)
    return torch.float32 if dtype == torch.float16 else dtype


class TokenPruning:
    """Mixin that gives a timm VisionTransformer its predictors and a forward pass that uses them."""

    pruning_loc: tuple[int, ...]
    keep_rates: tuple[float, ...]
    score_predictor: nn.ModuleList

    def set_keep_rates(self, keep_rates: Sequence[float]) -> None:
        """Share of the original patch tokens kept after each stage; ValueError if they do not fit."""
        self.keep_rates = check_keep_rates(keep_rates, len(self.pruning_loc))

    def tokens_kept(self, num_patches: int) -> list[int]:
        """Patch tokens left after each stage of the evaluation forward."""
        return [max(1, int(num_patches * rate)) for rate in self.keep_rates]

    def forward(self, images: Tensor):
        """(B, 3, H, W) images -> in training (logits, tokens, keep_mask, keep_decisions), else logits.

        tokens: see split_outputs. keep_mask: (B, N), the tokens kept at the end, no gradient.
        keep_decisions: S tensors (B, N), the policy after each stage, with gradient.
        """
        choose_attention(self, images)
        if self.training:
            return self.forward_masked(images)
        return self.forward_pruned(images)[0]

    def embed(self, images: Tensor) -> Tensor:
        return self.norm_pre(self._pos_embed(self.patch_embed(images)))

    def forward_masked(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training: tokens are hidden by the attention bias, so that decisions get a gradient."""
        x = self.embed(images)
        policy = x.new_ones(x[:, self.num_prefix_tokens :].shape[:2], dtype=torch.float32)
        bias = None
        keep_decisions = []
        for i, block in enumerate(self.blocks):
            if i in self.pruning_loc:
                predictor = self.score_predictor[len(keep_decisions)]
                log_probs = predictor(x[:, self.num_prefix_tokens :], policy)
                policy = policy * sample_keep_decision(log_probs)
                keep_decisions.append(policy)
                bias = policy_bias(policy, self.num_prefix_tokens).to(bias_dtype(x))
            x = block(x, attn_mask=bias)
        logits, tokens = split_outputs(self, self.norm(x))
        return logits, tokens, policy.detach(), keep_decisions

    def forward_pruned(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Evaluation: the lowest scored tokens leave the tensor.

        Returns the (B, classes) logits and, per stage, the (B, K) original indices of the kept
        patches, best score first.
        """
        x = self.embed(images)
        num_prefix = self.num_prefix_tokens
        num_keep = self.tokens_kept(x.shape[1] - num_prefix)
        kept = []
        for i, block in enumerate(self.blocks):
            if i in self.pruning_loc:
                stage = len(kept)
                scores = self.score_predictor[stage](x[:, num_prefix:])[..., 0]
                best = scores.topk(num_keep[stage], dim=1).indices
                x = select_tokens(x, best, num_prefix)
                kept.append(kept[-1].gather(1, best) if kept else best)
            x = block(x)
        return self.forward_head(self.norm(x)), kept


def check_keep_rates(keep_rates: Sequence[float], num_stages: int) -> tuple[float, ...]:
    keep_rates = tuple(float(rate) for rate in keep_rates)
    if len(keep_rates) != num_stages:
        raise ValueError(f"{len(keep_rates)} keep rates for {num_stages} pruning stages")
    if not all(0 < rate <= 1 for rate in keep_rates):
        raise ValueError(f"keep rates must lie in (0, 1], got {', '.join(map(str, keep_rates))}")
    if list(keep_rates) != sorted(keep_rates, reverse=True):
        raise ValueError(f"keep rates are shares of the original tokens and cannot grow, got {keep_rates}")
    return keep_rates


def make_dynamic(vit: VisionTransformer, pruning_loc: Sequence[int], keep_rates: Sequence[float]) -> VisionTransformer:
    """Turns a timm VisionTransformer into a DynamicViT, in place; its own weights and names stay.

    timm's patch dropout and gradient checkpointing are not used any more.
    pruning_loc: the blocks before which tokens are dropped. Raises ValueError if they do not fit.
    """
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"token pruning is for timm's VisionTransformer, and this is a {type(vit).__name__}")
    pruning_loc = tuple(pruning_loc)
    depth = len(vit.blocks)
    if not pruning_loc or list(pruning_loc) != sorted(set(pruning_loc)) or not all(0 <= i < depth for i in pruning_loc):
        raise ValueError(f"pruning stages must be ascending block numbers in 0..{depth - 1}, got {pruning_loc}")
    if not vit.has_class_token or vit.global_pool != "token":
        raise ValueError("token pruning needs a backbone that classifies by its class token")
    keep_rates = check_keep_rates(keep_rates, len(pruning_loc))
    vit.__class__ = type(f"Dynamic{type(vit).__name__}", (TokenPruning, type(vit)), {})
    vit.pruning_loc = pruning_loc
    vit.keep_rates = keep_rates
    vit.score_predictor = nn.ModuleList(Predictor(vit.embed_dim) for _ in pruning_loc)
    vit.score_predictor.apply(init_weights_vit_timm)
    return vit


class Teacher(nn.Module):
    """A dense backbone to distil from: frozen, and in eval mode whatever its parent does.

    Without that LV-ViT's BatchNorm statistics would drift. Returns (logits, tokens), see split_outputs.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        choose_attention(self.vit, images)
        return split_outputs(self.vit, self.vit.forward_features(images))
