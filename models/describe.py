"""The description of a model as it is now, whoever built it and whatever has changed it since."""

from dataclasses import replace
from typing import Any

from torch import nn

from .spec import ModelSpec, Preprocessing, one_side, two_sides


def describe(model: nn.Module) -> ModelSpec:
    """model: of timm, of transformers or ours, dense or dynamic."""
    from .huggingface import PreTrainedVisionModel, spec_of  # which is made of what imports this

    built_as = vars(model).get("built_as") or vars(model).get("spec")
    if built_as is None:
        built_as = spec_of(model) if isinstance(model, PreTrainedVisionModel) else describe_timm_model(model)
    return replace(built_as, **what_has_changed(model, built_as), **stages_of(model))


def what_has_changed(model: nn.Module, built_as: ModelSpec) -> dict[str, Any]:
    """What timm's setters have changed: classes, pooling, image size."""
    now: dict[str, Any] = {}
    num_classes = getattr(model, "num_classes", built_as.num_classes)
    if num_classes != built_as.num_classes:
        now["num_classes"] = num_classes
        if built_as.class_names is not None and len(built_as.class_names) != num_classes:
            now["class_names"] = None
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        now["img_size"] = one_side(size)
    pool, built_pool = getattr(model, "global_pool", None), getattr(model, "built_pool", None)
    if pool != built_pool and isinstance(pool, str) and built_pool is not None:
        now["global_pool"] = pool
    blocks = getattr(model, "blocks", None)
    if blocks is not None and len(blocks) != getattr(model, "built_depth", len(blocks)):
        now["sizes"] = {**built_as.sizes, "depth": len(blocks)}
    return now


def stages_of(model: nn.Module) -> dict[str, Any]:
    """What a dynamic model has beside its backbone."""
    if not hasattr(model, "pruning_loc"):
        return {}
    stages = {"pruning_loc": model.pruning_loc, "keep_rates": model.keep_rates, "dense": False}
    stages |= {"scorer": model.scorer.name, "place": model.place, "merge_streams": model.merge_streams}
    return stages if model.keeps_map else stages | {"reducer": model.reducer.name}


def describe_timm_model(model: nn.Module) -> ModelSpec:
    """The dense model that timm built, from what timm left on it. How one was built by hand is unknown: it goes by
    the name of its class, and cannot be saved."""
    config = getattr(model, "pretrained_cfg", None) or {}
    kind = getattr(model, "backbone_class", type(model)).__name__
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    return ModelSpec(
        arch=".".join(filter(None, (config.get("architecture") or kind, config.get("tag")))),
        num_classes=getattr(model, "num_classes", None),
        img_size=one_side(size),
        dense=True,
        preprocessing=Preprocessing.from_timm(config) if config else Preprocessing(),
    )


def data_config(spec: ModelSpec) -> dict[str, Any]:
    """Preprocessing as timm.data.create_transform takes it; input_size is (3, height, width)."""
    how = spec.preprocessing
    return {
        "input_size": (3, *two_sides(spec.img_size)),
        "interpolation": how.interpolation,
        "mean": how.mean,
        "std": how.std,
        "crop_pct": how.crop_pct,
        "crop_mode": how.crop_mode,
    }
