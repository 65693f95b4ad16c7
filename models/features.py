"""Backbones that give features instead of a prediction: for export, and for training on them."""

import torch
from torch import Tensor, nn

from .huggingface import PreTrainedVisionModel, tower_features


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) images -> (B, P+N, C) tokens after the last block: prefix tokens, then one for every patch."""
    if hasattr(model, "forward_features"):
        return model.forward_features(images)
    return tower_features(model, images)  # a dense transformers model has no such method


class FeatureExtractor(nn.Module):
    """Returns every patch's feature where the model itself returns its prediction.

    model: of timm, of transformers or ours, dense or dynamic; it stays the same object, by the name `model`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_features") and not isinstance(model, PreTrainedVisionModel):
            raise ValueError(f"a {type(model).__name__} gives no features")
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, P+N, C) normed tokens: prefix tokens, then one for every patch.

        A transformers model's are its last_hidden_state, which CLIP's tower does not norm.
        """
        return features_of(self.model, images)


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
