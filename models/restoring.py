"""Gives every patch its token back, at the cost of the shortened sequence.

A patch's token is its group's, plus what it lost when it joined that group at each stage: two patches that became one
token go different ways again. B images, N patches, M tokens before a stage, K after it, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reducers import Reduced, lost, unmerge

RESTORE = ("residual", "copy", "none")


class Step(NamedTuple):
    """The way back across a stage."""

    place: Tensor  # (B, M) which of the K tokens each one is part of, -1 for none
    drops: bool  # whether place may hold -1
    own: Tensor | None  # (B, M, C) to be added to the group's token; None: nothing


class Restorer:
    """Follows the patches through the stages of one forward pass."""

    def __init__(self, restore: str) -> None:
        """restore: residual, or copy for the group's token as it is."""
        self.residual = restore == "residual"
        self.steps: list[Step] = []

    def note(self, tokens: Tensor, reduced: Reduced, num_prefix: int, drops: bool = True) -> None:
        """Notes that a stage has turned the (B, M, C) patch tokens into those of reduced. drops: see Reducer."""
        place, own = reduced.places(tokens.shape[1]), None
        if self.residual:
            own = lost(tokens, reduced.x[:, num_prefix:], place, drops)
        elif drops:  # what a dropped token was when it left is all there is of it
            own = tokens * (place < 0)[..., None]
        self.steps.append(Step(place, drops, own))

    def __call__(self, x: Tensor, num_prefix: int) -> Tensor:
        """(B, P+K, C) tokens -> (B, P+N, C)."""
        if not self.steps:
            return x
        patches = x[:, num_prefix:]
        for place, drops, own in reversed(self.steps):
            patches = unmerge(patches, place, drops)
            if own is not None:
                patches = patches + own
        return torch.cat([x[:, :num_prefix], patches.to(x.dtype)], dim=1)
