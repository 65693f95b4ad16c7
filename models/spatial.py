"""Dynamic spatial sparsification (arXiv 2207.01580), for any timm SwinTransformer or ConvNeXt.

These backbones mix locations by windows or convolutions, which need the whole map, so no location can leave
the tensor. Instead, each block of the third stage sends the kept locations through its MLP and the others
through a *fast path* that costs an eighth of it. Every predictor decides anew about all locations.
Shapes: B images, S predictors; the third stage's map is H x W, its N locations numbered row by row, with C
channels; the last stage has L locations, C4 channels. Maps are (B, H, W, C).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models import ConvNeXt, SwinTransformer, convnext, swin_transformer
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from .dynamic import Dynamic, Plan, check_own_methods, dynamic_class
from .pruning import TokenPruning, Trace, sample_keep_decision
from .rates import arithmetic_keep_rates, as_rates
from .reducers import REDUCERS, Reducer
from .scorers import SCORERS, Predictor

Swin = partial(SwinTransformer, drop_path_rate=0.0)  # timm's own default is 0.1
STAGE = 2  # the third one, which has most of the arithmetic


def build_convnext(embed_dim: int, depths: Sequence[int], img_size: object = None, **options: float) -> ConvNeXt:
    """timm's ConvNeXt by the names of Swin's sizes. It takes images of any size, whatever img_size says."""
    return ConvNeXt(depths=depths, dims=[embed_dim * 2**i for i in range(len(depths))], **options)


def sizes(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...] = ()) -> dict[str, object]:
    attention = {"num_heads": num_heads, "window_size": 7} if num_heads else {}
    return {"embed_dim": embed_dim, "depths": depths, **attention}


# The paper's models: constructor, sizes, the blocks of the third stage with a predictor before them, dense weights.
SPATIAL_ARCHS = {
    "swin_t": (Swin, sizes(96, (2, 2, 6, 2), (3, 6, 12, 24)), (1, 2, 3), "swin_tiny_patch4_window7_224.pth"),
    "swin_s": (Swin, sizes(96, (2, 2, 18, 2), (3, 6, 12, 24)), (2, 4, 6), "swin_small_patch4_window7_224.pth"),
    "swin_b": (Swin, sizes(128, (2, 2, 18, 2), (4, 8, 16, 32)), (2, 4, 6), "swin_base_patch4_window7_224.pth"),
    "convnext_t": (build_convnext, sizes(96, (3, 3, 9, 3)), (1, 2, 3), "convnext_tiny_1k_224_ema.pth"),
    "convnext_s": (build_convnext, sizes(96, (3, 3, 27, 3)), (3, 6, 9), "convnext_small_1k_224_ema.pth"),
    "convnext_b": (build_convnext, sizes(128, (3, 3, 27, 3)), (3, 6, 9), "convnext_base_1k_224_ema.pth"),
}


def route(order: Tensor, num_keep: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) locations, best first -> rows of the matrix of all images' locations: (B, 1, K) kept, (B, 1, N - K)
    dropped, and (B, H, W) where each location is in a list of first those and then these."""
    batch, num_locations = order.shape
    rows = (order + num_locations * torch.arange(batch, device=order.device)[:, None])[:, None]
    kept, dropped = rows[..., :num_keep], rows[..., num_keep:]
    return kept, dropped, torch.cat([kept.flatten(), dropped.flatten()]).argsort().view(batch, *grid)


def select(chosen: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """chosen where the mask is 1, other where it is 0; arithmetic, so that the mask gets a gradient."""
    return (chosen * mask + other * (1 - mask)).to(chosen.dtype)


class DynamicBlock:
    """Mixin for a timm block. Subclasses define mix, which lets locations see each other, and slow, the way through
    the MLP. mix_is_residual: the output of slow or the fast path is added to that of mix, else to the block's input."""

    def forward_routed(self, x: Tensor, kept: Tensor, dropped: Tensor, back: Tensor) -> Tensor:
        """Evaluation: each location of the (B, H, W, C) map goes one way; see route."""
        mixed = self.mix(x)
        rows = mixed.flatten(0, 2)
        # F.embedding looks up whole rows. Back by look-up too: scattering would have to know autocast's dtype.
        slow, fast = self.slow(F.embedding(kept, rows)), self.fast_path(F.embedding(dropped, rows))
        out = F.embedding(back, torch.cat([slow.flatten(0, 2), fast.flatten(0, 2)]))
        return out + (mixed if self.mix_is_residual else x)

    def forward_streams(self, kept: Tensor, dropped: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Training: two (B, H, W, C) maps, all locations kept in one and dropped in the other. The (B, H, W, 1)
        mask tells which is true; the other is there to give the decision a gradient."""
        mixed = self.mix(select(kept, dropped, mask))
        slow, fast = self.slow(select(mixed, kept, mask)), self.fast_path(select(dropped, mixed, mask))
        kept, dropped = (mixed, mixed) if self.mix_is_residual else (kept, dropped)
        return kept + self.drop_path(slow), dropped + self.drop_path(fast)


class DynamicSwinBlock(DynamicBlock, swin_transformer.SwinTransformerBlock):
    mix_is_residual = True
    drop_path = property(lambda self: self.drop_path2)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.drop_path1(self._attn(self.norm1(x)))

    def slow(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class DynamicConvNeXtBlock(DynamicBlock, convnext.ConvNeXtBlock):
    mix_is_residual = False

    def mix(self, x: Tensor) -> Tensor:
        return self.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def slow(self, x: Tensor) -> Tensor:
        if self.use_conv_mlp:  # as in timm's smallest ones
            x = self.mlp(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        else:
            x = self.mlp(self.norm(x))
        return x if self.gamma is None else x * self.gamma


class FastPath(Reducer):
    """Takes the place of a reducer: what is not kept stays, but goes a shorter way."""

    name = "fast path"


class SpatialSparsification(Dynamic):
    """Mixin that gives a Swin or a ConvNeXt its predictors and forward passes that use them."""

    scorer, reducer, place = SCORERS["predictor"], FastPath(), "before"
    keeps_map = True
    tokens_are_logits = False
    check_rates = staticmethod(as_rates)  # they may grow here
    combine = staticmethod(lambda logits, tokens: logits)  # what labels are compared with
    tokens_kept = TokenPruning.tokens_kept
    output_fmt = "NCHW"  # of timm's stages; a Swin has its own attribute of this name

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(B, 3, H, W) images -> logits; in train mode after set_distilled_training(True) (logits, features, keep_mask,
        keep_decisions).

        features: (B, L, C4), see split_outputs. keep_mask: (B, L) ones, as no location has left. keep_decisions:
        S tensors (B, N), 1 for kept locations, with gradient.
        """
        self.refuse_tracing(images)
        if not self.training:
            return self.forward_pruned(images)[0]
        outputs = self.forward_masked(images)
        return outputs if self.all_outputs else outputs[0]

    def forward_pruned(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Evaluation: (B, classes) logits and, by predictor, the (B, K) locations kept, best score first."""
        x, kept, _ = self.sparsify(images)
        return self.forward_head(x), kept

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> the (B, H, W, C) map before the first predictor."""
        stage, x = self.stages[STAGE], images
        for part in (self.stem, *self.stages[:STAGE], stage.downsample, *stage.blocks[: self.pruning_loc[0]]):
            x = part(x)
        return x if self.output_fmt == "NHWC" else x.permute(0, 2, 3, 1)

    def finish(self, x: Tensor) -> Tensor:
        """The (B, H, W, C) map after the third stage -> what timm's forward_features gives."""
        x = x if self.output_fmt == "NHWC" else x.permute(0, 3, 1, 2)
        for part in (*self.stages[STAGE + 1 :], self.norm_pre):
            x = part(x)
        return x

    def forward_masked(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Training: every location goes both ways."""
        kept = dropped = self.embed(images)
        mask = torch.ones_like(kept[..., :1], dtype=torch.float32)
        keep_decisions = []
        for i, block in list(enumerate(self.stages[STAGE].blocks))[self.pruning_loc[0] :]:
            if i in self.pruning_loc:
                x = select(kept, dropped, mask)
                if self.merge_streams:
                    kept = dropped = x
                predictor = self.score_predictor[len(keep_decisions)]
                keep_decisions.append(sample_keep_decision(predictor(x.flatten(1, 2))))
                mask = keep_decisions[-1].view(mask.shape)
            kept, dropped = block.forward_streams(kept, dropped, mask)
        logits, features = self.adapter.split_outputs(self, self.finish(select(kept, dropped, mask)))
        return logits, features, torch.ones_like(features[..., 0], dtype=torch.float32), keep_decisions

    def sparsify(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Evaluation: what timm's forward_features gives, the locations kept, and (B, S, H, W) log-probabilities."""
        x = self.embed(images)
        kept, scores = [], []
        for i, block in list(enumerate(self.stages[STAGE].blocks))[self.pruning_loc[0] :]:
            if i in self.pruning_loc:
                scores.append(self.score_predictor[len(kept)](x.flatten(1, 2))[..., 0])
                order = scores[-1].argsort(dim=1, descending=True)
                num_keep = self.tokens_kept(order.shape[1])[len(kept)]
                kept.append(order[:, :num_keep])
                routing = route(order, num_keep, x.shape[1:3])
            x = block.forward_routed(x, *routing)
        return self.finish(x), kept, torch.stack(scores, dim=1).unflatten(2, x.shape[1:3])

    def trace(self, images: Tensor) -> Trace:
        """forward_pruned, with the scores; nothing merges, so a kept location is a group of its own."""
        x, kept, scores = self.sparsify(images)
        nowhere = torch.full_like(scores.flatten(2), -1, dtype=torch.long)
        groups = torch.stack([nowhere[:, stage].scatter(1, k, k) for stage, k in enumerate(kept)], dim=1)
        return Trace(self.forward_head(x), kept, scores.flatten(2).float(), groups, tuple(scores.shape[2:]))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.sparsify(images)[0]

    def forward_intermediates(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            "a dynamic Swin or ConvNeXt gives no intermediate maps: forward_features gives the last one"
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's, but for another pooling, which a saved description could not tell."""
        if global_pool is not None:
            raise NotImplementedError("the pooling of a dynamic Swin or ConvNeXt stays as it is")
        super().reset_classifier(num_classes)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a dynamic Swin or ConvNeXt keeps its image size: build it with another img_size")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise NotImplementedError("a dynamic Swin or ConvNeXt cannot checkpoint gradients")


class SwinSparsification(SpatialSparsification):
    stem = property(lambda self: self.patch_embed)  # by the names of timm's ConvNeXt
    stages = property(lambda self: self.layers)
    norm_pre = property(lambda self: self.norm)


class SpatialAdapter:
    """For one family of backbones with maps; see families.Family."""

    backbone: type[nn.Module]
    mixin: type[SpatialSparsification] = SpatialSparsification
    filter_names = staticmethod(convnext.checkpoint_filter_fn)  # timm's, from other projects' names of weights
    recipe = "journal"  # of the paper that the family is from
    takes_img_size = True
    keep_rates = staticmethod(arithmetic_keep_rates)

    def stages(self, backbone: nn.Module) -> nn.Sequential:
        return backbone.stages

    def blocks(self, backbone: nn.Module) -> nn.Sequential:
        """Those before which stages can be: the third stage's."""
        stages = self.stages(backbone)
        if len(stages) <= STAGE:
            raise ValueError(f"spatial sparsification needs a third stage, and this model has {len(stages)}")
        return stages[STAGE].blocks

    def default_pruning_loc(self, backbone: nn.Module) -> tuple[int, ...]:
        """By the paper's rule: three times early in the third stage."""
        step = max(1, len(self.blocks(backbone)) // 9)
        return (step, 2 * step, 3 * step)

    def outputs_of(self, backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """What student and teacher are compared on, of a dense model: logits and (B, L, C4) normed features."""
        return self.split_outputs(backbone, backbone.forward_features(images))

    def split_outputs(self, backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """timm's forward_features -> logits and (B, L, C4) normed features."""
        raise NotImplementedError

    def extend(self, block: nn.Module) -> None:
        """Gives a block of the third stage its fast path."""
        raise NotImplementedError

    def norm_of(self, block: nn.Module) -> nn.Module:
        raise NotImplementedError

    def make_dynamic(self, backbone: nn.Module, plan: Plan) -> nn.Module:
        """plan.pruning_loc: the third stage's blocks with a predictor before them. plan.keep_rates: the share of all
        its locations that each predictor keeps. plan.merge_streams: in training, when a predictor decides anew,
        locations continue from their true values, as in evaluation; as published, one that is kept again continues
        from the kept stream's value, and the other way round. Every check comes before the first change."""
        loc, blocks = plan.pruning_loc, self.blocks(backbone)
        check_own_methods(backbone, self.mixin)
        if (plan.scorer, plan.reducer, plan.place) != ("predictor", "drop", "before"):
            raise ValueError(
                f"a {type(backbone).__name__} needs predictor and drop before its blocks, got {plan.scorer} and "
                f"{plan.reducer} {plan.place} them"
            )
        if not loc or not set(loc) <= set(range(len(blocks))) or sorted(set(loc)) != [*loc]:
            raise ValueError(f"predictors need ascending block numbers in 0..{len(blocks) - 1}, got {loc}")
        keep_rates = as_rates(plan.keep_rates, len(loc))
        backbone.__class__ = dynamic_class(self.mixin, type(backbone))
        backbone.adapter, backbone.pruning_loc, backbone.merge_streams = self, loc, plan.merge_streams
        backbone.keep_rates = keep_rates
        norm = self.norm_of(blocks[0])
        for block in blocks[loc[0] :]:
            self.extend(block)
            block.fast_path.to(norm.weight).apply(init_weights_vit_timm)
        backbone.score_predictor = nn.ModuleList(Predictor(len(norm.weight), norm.eps) for _ in loc)
        backbone.score_predictor.to(norm.weight).apply(init_weights_vit_timm)
        return backbone

    def map_published(self, weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Weights by the names of the authors', Microsoft's or Facebook's files -> by ours; ours stay as they are."""
        try:
            weights = self.filter_names(weights, model)
        except (AttributeError, KeyError, RuntimeError):
            return weights  # of another model: loading them will name what does not fit
        mapped = {}
        for name, value in weights.items():
            name = name.replace("layers.2.score_predictor.", "score_predictor.").replace("fastmlp.fc1.", "fast_path.")
            name = name.replace("fast_path_gamma", "fast_path.2.gamma")
            is_conv = value.ndim == 4 and name.startswith("score_predictor.")  # 1 x 1, in ConvNeXt
            mapped[name] = value.flatten(1) if is_conv else value
        return mapped


class SwinAdapter(SpatialAdapter):
    backbone = SwinTransformer
    mixin = SwinSparsification
    filter_names = staticmethod(swin_transformer.checkpoint_filter_fn)

    def stages(self, backbone: SwinTransformer) -> nn.Sequential:
        return backbone.layers

    def norm_of(self, block: nn.Module) -> nn.Module:
        return block.norm2

    def extend(self, block: nn.Module) -> None:
        block.__class__ = DynamicSwinBlock
        dim, eps = len(block.norm2.weight), block.norm2.eps
        block.fast_path = nn.Sequential(nn.LayerNorm(dim, eps), nn.Linear(dim, dim))

    def split_outputs(self, backbone: SwinTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
        return backbone.forward_head(x), x.flatten(1, 2)


class ConvNeXtAdapter(SpatialAdapter):
    backbone = ConvNeXt
    takes_img_size = False

    def norm_of(self, block: nn.Module) -> nn.Module:
        return block.norm

    def extend(self, block: nn.Module) -> None:
        block.__class__ = DynamicConvNeXtBlock
        dim, eps = len(block.norm.weight), block.norm.eps
        block.fast_path = nn.Sequential(nn.LayerNorm(dim, eps), nn.Linear(dim, dim), LayerScale(dim, 1e-6))

    def split_outputs(self, backbone: ConvNeXt, x: Tensor) -> tuple[Tensor, Tensor]:
        # that norm is in its head, after the pooling, or else in norm_pre
        features = getattr(backbone.head, "norm", nn.Identity())(x).permute(0, 2, 3, 1)
        return backbone.forward_head(x), features.flatten(1, 2)


ADAPTERS = (SwinAdapter(), ConvNeXtAdapter())


def adapter_of(backbone: nn.Module) -> SpatialAdapter:
    return next(adapter for adapter in ADAPTERS if isinstance(backbone, adapter.backbone))


def make_spatial_dynamic(
    backbone: nn.Module, pruning_loc: Sequence[int], keep_rates: Sequence[float], merge_streams: bool = False
) -> nn.Module:
    """The published model of a timm SwinTransformer or ConvNeXt, which gives its four values in train mode.

    See SpatialAdapter.make_dynamic; families.make_dynamic takes these backbones, too.
    """
    plan = Plan(tuple(pruning_loc), tuple(keep_rates), SCORERS["predictor"], REDUCERS["drop"], "before", merge_streams)
    model = adapter_of(backbone).make_dynamic(backbone, plan)
    model.set_distilled_training(True)
    return model


def map_published(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """See SpatialAdapter.map_published."""
    return adapter_of(model).map_published(weights, model)
