"""LV-ViT (arXiv 2104.10858) as the differences from timm's VisionTransformer."""

from functools import partial

from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from .vit import ViTAdapter


class ConvStem(nn.Module):
    """Patch embedding by three convolutions and a projection: (B, 3, H, W) -> (B, N, C)."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 384, width: int = 64, **_
    ) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"LV-ViT's stem halves the resolution first: patch size {patch_size} must be even")
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        # conv1 has already halved the resolution
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches, as timm's own patch embedding tells them; this one takes a single image size."""
        return self.grid_size

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Scale(nn.Module):
    """Multiplies by a constant; stands where timm has its (learned) LayerScale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LVViT(VisionTransformer):
    """Conv stem, halved residual branches, and an auxiliary head that classifies every patch token."""

    def __init__(self, **kwargs) -> None:
        super().__init__(embed_layer=ConvStem, qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-5), **kwargs)
        for block in self.blocks:
            block.ls1, block.ls2 = Scale(0.5), Scale(0.5)
        self.aux_head = self.build_aux_head()

    def build_aux_head(self) -> nn.Module:
        if self.num_classes == 0:  # embeddings are wanted, those of the class token
            return nn.Identity()
        aux_head = nn.Linear(self.embed_dim, self.num_classes, device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        init_weights_vit_timm(aux_head)
        return aux_head

    def set_input_size(self, *_, **__) -> None:
        raise NotImplementedError("LV-ViT's stem takes one image size: build the model with another img_size")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self.build_aux_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1+N, C) normed tokens -> (B, classes); both heads together, as published."""
        if pre_logits or self.num_classes == 0:
            return super().forward_head(x, pre_logits=True)
        return combine_heads(self.head(x[:, 0]), self.aux_head(x[:, 1:]))


class LVViTAdapter(ViTAdapter):
    """The auxiliary head's logits take the place of the patch features wherever outputs are compared."""

    backbone = LVViT

    def reads_prefix_alone(self, vit: LVViT) -> bool:
        return vit.num_classes == 0  # the auxiliary head reads every patch

    def outputs(self, vit: LVViT, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        return vit.head(x[:, 0]), vit.aux_head(x[:, 1:])

    def tokens_are_logits(self, vit: LVViT) -> bool:
        return vit.num_classes > 0

    def combine(self, vit: LVViT, logits: Tensor, tokens: Tensor) -> Tensor:
        return combine_heads(logits, tokens) if vit.num_classes > 0 else logits


def combine_heads(logits: Tensor, token_logits: Tensor) -> Tensor:
    """LV-ViT's prediction: the class token's logits plus half the best patch token's, class by class."""
    return logits + 0.5 * token_logits.amax(dim=1)
