"""Gives every patch its token back, at the cost of the shortened sequence.

A patch's token is its group's, plus what it lost when it joined that group at each stage: two patches that became one
token go different ways again. B images, N patches, K tokens left, C channels.
"""

import torch
from torch import Tensor

from .reducers import Reduced, lost, take_rows, unmerge

RESTORE = ("residual", "copy", "none")


class Restorer:
    """Follows the patches through the stages of one forward pass."""

    def __init__(self, restore: str) -> None:
        """restore: residual, or copy for the group's token as it is."""
        self.residual = restore == "residual"
        self.group: Tensor | None = None  # (B, N) the token each patch is part of, -1 for none; None: no stage yet
        self.own: Tensor | None = None  # (B, N, C) to be added to the group's token

    def note(self, tokens: Tensor, reduced: Reduced, num_prefix: int) -> None:
        """Notes that a stage has turned the (B, M, C) patch tokens into those of reduced."""
        place = reduced.places(tokens.shape[1])
        change = lost(tokens, reduced.x[:, num_prefix:], place)
        if not self.residual:  # what a dropped token was when it left is all there is of it
            change = change * (place < 0)[..., None]
        if self.group is None:
            self.group, self.own = place, change
            return
        here = self.group >= 0
        before = self.group.clamp(min=0)
        self.own = self.own + take_rows(change, before) * here[..., None]
        self.group = torch.where(here, place.gather(1, before), -1)

    def __call__(self, x: Tensor, num_prefix: int) -> Tensor:
        """(B, P+K, C) tokens -> (B, P+N, C)."""
        if self.group is None:
            return x
        patches = unmerge(x[:, num_prefix:], self.group) + self.own
        return torch.cat([x[:, :num_prefix], patches.to(x.dtype)], dim=1)
