"""The dense backbone that a dynamic model learns from."""

import torch
from torch import Tensor, nn

from . import spatial
from .factory import build_model
from .pretrained import StateDict, backbone_part, load_weights
from .pruning import choose_attention, find_adapter
from .spec import ModelSpec


class Teacher(nn.Module):
    """A dense backbone to distil from: frozen, and in eval mode whatever its parent does.

    Without that LV-ViT's BatchNorm statistics would drift. Returns (logits, tokens), as a dynamic
    model does in train mode.
    """

    def __init__(self, vit: nn.Module) -> None:
        """vit: of any family that make_dynamic knows."""
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.vit, spatial.Backbone):
            return spatial.split_outputs(self.vit, self.vit.forward_features(images))
        choose_attention(self.vit, images)
        return find_adapter(self.vit).outputs(self.vit, self.vit.forward_features(images), weights=None)


def build_teacher(spec: ModelSpec, weights: StateDict) -> Teacher:
    """A model's dense self with trained weights; a dynamic model's will do."""
    dense = build_model(spec.as_dense())
    load_weights(dense, backbone_part(weights))
    return Teacher(dense)
