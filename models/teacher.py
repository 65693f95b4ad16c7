"""The dense backbone that a dynamic model learns from."""

import torch
from torch import Tensor, nn

from .factory import build_model
from .families import family_of
from .pretrained import StateDict, backbone_part, load_weights
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
        return family_of(self.vit).outputs_of(self.vit, images)


def build_teacher(spec: ModelSpec, weights: StateDict) -> Teacher:
    """A model's dense self with trained weights; a dynamic model's will do."""
    dense = build_model(spec.as_dense())
    load_weights(dense, backbone_part(weights))
    return Teacher(dense)
