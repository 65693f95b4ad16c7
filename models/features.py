"""A backbone as what gives features: for export, and for training on them."""

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module):
    """Gives every patch's feature where the model itself gives its prediction.

    model: of timm or ours, dense or dynamic; it stays the same object, by the name `model`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_features"):
            raise ValueError(f"a {type(model).__name__} gives no features")
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, P+N, C) normed tokens: prefix tokens, then one for every patch."""
        return self.model.forward_features(images)


class FeatureTeacher(FeatureExtractor):
    """A dense model to learn features from: frozen, and in eval mode whatever its parent does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FeatureTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)
