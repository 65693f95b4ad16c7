"""The known architectures, and create_model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .lvvit import LVViT
from .pruning import make_dynamic

DeiT = partial(VisionTransformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))


@dataclass(frozen=True)
class Arch:
    """One row of the paper's model table."""

    backbone: type[VisionTransformer] | partial
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    pruning_loc: tuple[int, ...]
    weights: str | None  # dense weights that download_pretrain.sh puts into pretrained/


ARCHS = {
    "deit_tiny": Arch(DeiT, 192, 12, 3, 4.0, (3, 6, 9), "deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_256": Arch(DeiT, 256, 12, 4, 4.0, (3, 6, 9), None),
    "deit_small": Arch(DeiT, 384, 12, 6, 4.0, (3, 6, 9), "deit_small_patch16_224-cd65a155.pth"),
    "deit_base": Arch(DeiT, 768, 12, 12, 4.0, (3, 6, 9), "deit_base_patch16_224-b5f2ef4d.pth"),
    "lvvit_s": Arch(LVViT, 384, 16, 6, 3.0, (4, 8, 12), "lvvit_s-224-83.3.pth.tar"),
    "lvvit_m": Arch(LVViT, 512, 20, 8, 3.0, (5, 10, 15), "lvvit_m-56M-224-84.0.tar"),
}


def create_model(
    arch: str,
    base_rate: float = 0.7,
    num_classes: int = 1000,
    img_size: int = 224,
    *,
    dense: bool = False,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    patch_size: int = 16,
    pruning_loc: Sequence[int] | None = None,
    keep_rates: Sequence[float] | None = None,
    scorer: str = "predictor",
    reducer: str = "drop",
) -> VisionTransformer:
    """Builds a dynamic model, or with dense=True its plain backbone.

    base_rate: stage s keeps base_rate ** s of the original patch tokens (s = 1, 2, ...), unless
    keep_rates names the shares one by one. All else defaults to the architecture's own.
    A dynamic model returns (logits, tokens, keep_mask, keep_decisions) in train mode and logits in
    eval mode, a dense one logits; Teacher makes a dense one return (logits, tokens).
    Raises ValueError, with a message for the user, if anything does not fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch '{arch}'; known: {', '.join(ARCHS)}")
    spec = ARCHS[arch]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    sizes = {name: getattr(spec, name) if value is None else value for name, value in sizes.items()}
    sizes |= {"img_size": img_size, "patch_size": patch_size, "num_classes": num_classes}
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ValueError(f"embed_dim {sizes['embed_dim']} cannot be divided among {sizes['num_heads']} heads")
    if img_size % patch_size:
        raise ValueError(f"patch size {patch_size} does not divide input size {img_size}")
    vit = spec.backbone(**sizes)
    if dense:
        return vit
    if pruning_loc is None:
        pruning_loc = spec.pruning_loc
    if keep_rates is None:
        keep_rates = geometric_keep_rates(base_rate, len(pruning_loc))
    return make_dynamic(vit, pruning_loc, keep_rates, scorer, reducer)


def geometric_keep_rates(base_rate: float, num_stages: int) -> tuple[float, ...]:
    """base_rate, base_rate^2, ... (paper, section 4.1)."""
    return tuple(base_rate ** (stage + 1) for stage in range(num_stages))
