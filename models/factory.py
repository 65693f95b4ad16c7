"""Builds models: those of the papers by our names, everything else by timm's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.models import ConvNeXt, get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import pruning, spatial
from .lvvit import LVViT
from .spec import ModelError, ModelSpec, Preprocessing

DeiT = partial(VisionTransformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))
IMAGE_TEXT = ("clip", "siglip", "pe_core")  # in timm's names of models that were trained on images with texts
DEFAULT_CLASSES, DEFAULT_SIZE = 1000, 224  # of the papers' models


@dataclass(frozen=True)
class Arch:
    """One row of a paper's model table."""

    backbone: Callable[..., nn.Module]
    sizes: dict[str, Any]
    pruning_loc: tuple[int, ...]
    weights: str | None  # dense weights that download_pretrain.sh puts into pretrained/


def vit_sizes(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "patch_size": 16}


ARCHS = {
    "deit_tiny": Arch(DeiT, vit_sizes(192, 12, 3, 4.0), (3, 6, 9), "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_256": Arch(DeiT, vit_sizes(256, 12, 4, 4.0), (3, 6, 9), None),
    "deit_small": Arch(DeiT, vit_sizes(384, 12, 6, 4.0), (3, 6, 9), "deit_small_patch16_224-cd65a155.pth"),
    "deit_base": Arch(DeiT, vit_sizes(768, 12, 12, 4.0), (3, 6, 9), "deit_base_patch16_224-b5f2ef4d.pth"),
    "lvvit_s": Arch(LVViT, vit_sizes(384, 16, 6, 3.0), (4, 8, 12), "lvvit_s-224-83.3.pth.tar"),
    "lvvit_m": Arch(LVViT, vit_sizes(512, 20, 8, 3.0), (5, 10, 15), "lvvit_m-56M-224-84.0.tar"),
    **{name: Arch(*row) for name, row in spatial.SPATIAL_ARCHS.items()},
}


def create_model(
    arch: str,
    base_rate: float = 0.7,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    *,
    dense: bool = False,
    pruning_loc: Sequence[int] | None = None,
    keep_rates: Sequence[float] | None = None,
    scorer: str = "predictor",
    reducer: str = "drop",
    merge_streams: bool = False,
    **sizes: Any,
) -> nn.Module:
    """Builds a dynamic model, or with dense=True its plain backbone.

    arch: one of ARCHS, or any timm name of a family that make_dynamic knows.
    base_rate: stage s keeps base_rate ** s of the original patch tokens (s = 1, 2, ...), unless
    keep_rates names the shares one by one. num_classes, img_size (pixels) and sizes (embed_dim,
    depth, num_heads, mlp_ratio, patch_size; for Swin and ConvNeXt depths, window_size) default to the
    architecture's own: 1000 classes and 224 pixels for those of the papers. merge_streams: see make_dynamic.
    A dynamic model returns (logits, tokens, keep_mask, keep_decisions) in train mode and logits in
    eval mode, a dense one logits; Teacher makes a dense one return (logits, tokens).
    model.spec describes what was built. Raises ModelError, with a message for the user, if anything
    does not fit.
    """
    return build_model(
        ModelSpec(
            arch=arch,
            base_rate=base_rate,
            num_classes=num_classes,
            img_size=img_size,
            dense=dense,
            sizes={name: value for name, value in sizes.items() if value is not None},
            pruning_loc=None if pruning_loc is None else tuple(pruning_loc),
            keep_rates=None if keep_rates is None else tuple(keep_rates),
            scorer=scorer,
            reducer=reducer,
            merge_streams=merge_streams,
        )
    )


def build_model(spec: ModelSpec, drop_path: float = 0.0) -> nn.Module:
    """The model with fresh weights, and as its attribute `spec` the description with nothing left open.

    drop_path: the share of residual branches left out in training at the last block (0 at the first).
    """
    if spec.arch in ARCHS:
        model, spec = build_known(spec, drop_path)
    else:
        model, spec = build_by_timm_name(spec, drop_path)
    if not spec.dense:
        pruning_loc = default_pruning_loc(spec, model) if spec.pruning_loc is None else spec.pruning_loc
        try:
            keep_rates = spec.keep_rates or default_keep_rates(model, spec.base_rate, len(pruning_loc))
            spec = replace(spec, pruning_loc=tuple(pruning_loc), keep_rates=tuple(keep_rates))
            model = make_dynamic(model, pruning_loc, keep_rates, spec.scorer, spec.reducer, spec.merge_streams)
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(str(error)) from error
    model.spec = spec
    return model


def build_known(spec: ModelSpec, drop_path: float) -> tuple[nn.Module, ModelSpec]:
    """A paper's backbone by our name, and the completed spec."""
    arch = ARCHS[spec.arch]
    strangers = sorted(set(spec.sizes) - set(arch.sizes))
    if strangers:
        raise ModelError(f"{spec.arch} has no {strangers[0]}; its sizes are {', '.join(arch.sizes)}")
    sizes = arch.sizes | spec.sizes
    spec = replace(
        spec,
        num_classes=DEFAULT_CLASSES if spec.num_classes is None else spec.num_classes,
        img_size=DEFAULT_SIZE if spec.img_size is None else spec.img_size,
        preprocessing=spec.preprocessing or Preprocessing(),
    )
    check_sizes(spec, sizes)
    backbone = arch.backbone(img_size=spec.img_size, num_classes=spec.num_classes, drop_path_rate=drop_path, **sizes)
    return backbone, spec


def check_sizes(spec: ModelSpec, sizes: dict[str, Any]) -> None:
    """What timm would answer with an assertion."""
    if "depth" not in sizes:  # a Swin or ConvNeXt
        return
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ModelError(f"embed_dim {sizes['embed_dim']} cannot be divided among {sizes['num_heads']} heads")
    sides = spec.img_size if isinstance(spec.img_size, tuple) else (spec.img_size,)
    if any(side % sizes["patch_size"] for side in sides):
        raise ModelError(f"patch size {sizes['patch_size']} does not divide input size {spec.img_size}")


def build_by_timm_name(spec: ModelSpec, drop_path: float) -> tuple[nn.Module, ModelSpec]:
    """Any timm model, and the spec completed from its pretrained_cfg."""
    check_known(spec.arch)
    options = dict(spec.sizes, num_classes=spec.num_classes, img_size=spec.img_size)
    if timm.model_entrypoint(spec.arch).__module__ == ConvNeXt.__module__:
        del options["img_size"]  # it takes images of any size, and no such argument
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        model = timm.create_model(spec.arch, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"timm cannot build {spec.arch} with {options}: {error}") from error
    config = model.pretrained_cfg
    return model, replace(
        spec,
        num_classes=model.num_classes,
        img_size=spec.img_size or one_side(config["input_size"][1:]),
        preprocessing=spec.preprocessing
        or Preprocessing(tuple(config["mean"]), tuple(config["std"]), config["crop_pct"], config["interpolation"]),
    )


def check_known(arch: str) -> None:
    """Raises ModelError for a name that is neither ours nor timm's."""
    if arch not in ARCHS and not timm.is_model(arch):
        raise ModelError(f"unknown arch '{arch}'; known: {', '.join(ARCHS)}, and timm's names (timm.list_models())")


def gives_embeddings(spec: ModelSpec) -> bool:
    """Whether a built model's outputs are embeddings: it has no classifier, or in its place the projection that
    an image-text model was pretrained with."""
    if spec.num_classes == 0:
        return True
    if spec.arch in ARCHS or not any(part in spec.arch for part in IMAGE_TEXT):
        return False
    config = get_pretrained_cfg(spec.arch)
    return config is not None and config.num_classes == spec.num_classes and "_ft_" not in f"_{config.tag}"


def image_size(spec: ModelSpec) -> int | tuple[int, int]:
    """Pixels of the images that the model takes: a side, or (height, width)."""
    if spec.img_size is not None:
        return spec.img_size
    with torch.device("meta"):  # shapes alone
        return build_model(spec).spec.img_size


def one_side(size: Sequence[int]) -> int | tuple[int, int]:
    """(height, width), or one number where they are equal."""
    height, width = size
    return height if height == width else (height, width)


def make_dynamic(
    backbone: nn.Module,
    pruning_loc: Sequence[int],
    keep_rates: Sequence[float],
    scorer: str = "predictor",
    reducer: str = "drop",
    merge_streams: bool = False,
) -> nn.Module:
    """Makes a trained timm backbone dynamic, in place; its own weights and names stay.

    backbone: a VisionTransformer or Eva (see pruning.make_dynamic), a SwinTransformer or ConvNeXt (see
    spatial.make_spatial_dynamic: by predictors and fast paths alone; only these have merge_streams).
    pruning_loc: the blocks before which tokens are reduced. keep_rates: the share of the original
    patch tokens kept after each of these stages. Raises ValueError if anything does not fit.
    """
    if isinstance(keep_rates, (int, float)):
        rates = default_keep_rates(backbone, keep_rates, len(pruning_loc))
        raise ValueError(f"keep_rates needs a share of all tokens for each stage; {keep_rates} would be {rates}")
    if isinstance(backbone, spatial.Backbone):
        if (scorer, reducer) != ("predictor", "drop"):
            raise ValueError(f"a {type(backbone).__name__} needs predictor and drop, got {scorer} and {reducer}")
        return spatial.make_spatial_dynamic(backbone, pruning_loc, keep_rates, merge_streams)
    return pruning.make_dynamic(backbone, pruning_loc, keep_rates, scorer, reducer)


def default_pruning_loc(spec: ModelSpec, backbone: nn.Module) -> tuple[int, ...]:
    """The paper's, or by its rules: before each quarter of the blocks but the first; in a Swin or ConvNeXt
    three times early in the third stage."""
    if spec.arch in ARCHS and not {"depth", "depths"} & set(spec.sizes):
        return ARCHS[spec.arch].pruning_loc
    if isinstance(backbone, spatial.Backbone):
        step = max(1, len(spatial.third_stage_blocks(backbone)) // 9)
        return (step, 2 * step, 3 * step)
    depth = len(getattr(backbone, "blocks", ()))
    return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))


def default_keep_rates(backbone: nn.Module, base_rate: float, num_stages: int) -> tuple[float, ...]:
    """As published for the backbone's family."""
    rates = spatial.arithmetic_keep_rates if isinstance(backbone, spatial.Backbone) else geometric_keep_rates
    return rates(base_rate, num_stages)


def geometric_keep_rates(base_rate: float, num_stages: int, fewest: float = 0.0) -> tuple[float, ...]:
    """base_rate, base_rate^2, ... (paper, section 4.1), but no stage keeps less than the share fewest."""
    return tuple(max(fewest, base_rate ** (stage + 1)) for stage in range(num_stages))
