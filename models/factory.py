"""Builds models: those of the papers by our names, everything else by timm's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import spatial
from .families import FAMILIES, Family, family_of, make_dynamic
from .lvvit import LVViT
from .spec import ModelError, ModelSpec, Preprocessing, one_side
from .vit import ViTAdapter

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
    place: str = "before",
    **sizes: Any,
) -> nn.Module:
    """Builds a dynamic model, or with dense=True its plain backbone.

    arch: one of ARCHS, or any timm name of a family that make_dynamic knows.
    base_rate: stage s keeps base_rate ** s of the original patch tokens (s = 1, 2, ...), unless
    keep_rates names the shares one by one. num_classes, img_size (pixels) and sizes (embed_dim,
    depth, num_heads, mlp_ratio, patch_size; for Swin and ConvNeXt depths, window_size) default to the
    architecture's own: 1000 classes and 224 pixels for those of the papers. merge_streams, place: see make_dynamic.
    In train mode a dynamic model returns (logits, tokens, keep_mask, keep_decisions), as published;
    model.set_distilled_training(False) makes it return logits alone, as models from make_dynamic do. In eval mode it
    returns logits, and so does a dense model, which Teacher makes return (logits, tokens).
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
            place=place,
        )
    )


def build_model(spec: ModelSpec, drop_path: float = 0.0) -> nn.Module:
    """The model with fresh weights, and as its attribute `spec` the description with nothing left open.

    drop_path: the share of residual branches left out in training at the last block (0 at the first).
    """
    build_backbone = build_known if spec.arch in ARCHS else build_by_timm_name
    model, spec = build_backbone(spec, drop_path)
    model.built_pool = getattr(model, "global_pool", None)
    if spec.global_pool is not None:
        model.reset_classifier(model.num_classes, spec.global_pool)
    if not spec.dense:
        model, spec = add_stages(model, spec)
    model.spec = spec
    return model


def add_stages(model: nn.Module, spec: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    """The backbone made dynamic as its spec says, and the completed spec. Raises ModelError."""
    try:
        family, built_pool = family_of(model), model.built_pool
        loc = default_pruning_loc(spec, family, model) if spec.pruning_loc is None else spec.pruning_loc
        keep_rates = spec.keep_rates or family.keep_rates(spec.base_rate, len(loc))
        model = make_dynamic(model, loc, keep_rates, spec.scorer, spec.reducer, spec.merge_streams, place=spec.place)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    model.built_pool = built_pool
    model.set_distilled_training(True)
    return model, replace(spec, pruning_loc=model.pruning_loc, keep_rates=model.keep_rates)


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
    """Raises ModelError where timm would fail with an assertion."""
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
    if not family_of_name(spec.arch).takes_img_size:
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
        preprocessing=spec.preprocessing or Preprocessing.from_timm(config),
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


def family_of_name(arch: str) -> Family:
    """The family of an architecture, without building timm's: that of ViTs where no other one has it."""
    if arch in ARCHS:
        with torch.device("meta"):
            return family_of(build_known(ModelSpec(arch), 0.0)[0])
    module = timm.model_entrypoint(arch).__module__
    return next((family for family in FAMILIES if family.backbone.__module__ == module), ViTAdapter())


def default_pruning_loc(spec: ModelSpec, family: Family, backbone: nn.Module) -> tuple[int, ...]:
    """The paper's blocks for its own models, those of its rule for others."""
    if spec.arch in ARCHS and not {"depth", "depths"} & set(spec.sizes):
        return ARCHS[spec.arch].pruning_loc
    return family.default_pruning_loc(backbone)
