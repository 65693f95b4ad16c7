"""Where stages go and how many tokens they keep, for a wished speed-up in multiply-adds: the one rule."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from .dynamic import Plan
from .flops import count_gflops
from .rates import geometric_keep_rates
from .reducers import Reducer
from .scorers import Scorer

if TYPE_CHECKING:
    from .families import Family

MAX_STAGES = 9
FEWEST_TOKENS = 0.15  # share of the patches; with fewer at the end (30 of 196) answers change too much
LOWEST_RATE = 0.5  # the smallest share of its tokens that a stage may keep
BISECTIONS = 16


@dataclass(frozen=True)
class Choice:
    """What is taken where nothing else is said."""

    scorer: str = "distinct"
    reducer: str = "merge"
    place: str = "inside"


FOR_SPEED = Choice()


def spread(depth: int, place: str) -> tuple[int, ...]:
    """Blocks of the stages: from a quarter of the depth on, before which class attention says little, to the end.

    Inside the last block a stage would save nothing where its MLP runs for the class token alone.
    """
    first, end = max(1, depth // 4), depth - (place == "inside")
    count = min(MAX_STAGES, end - first)
    return tuple(first + stage * (end - first) // count for stage in range(count))


def choose(
    backbone: nn.Module,
    family: "Family",
    speedup: float,
    scorer: Scorer,
    reducer: Reducer,
    place: str | None = None,
    pruning_loc: Sequence[int] | None = None,
) -> Plan:
    """The plan that makes a dense backbone so many times cheaper in multiply-adds.

    Raises ValueError for a speed-up that would leave too few tokens.
    """
    depth = len(family.blocks(backbone))
    if depth < 3:
        raise ValueError(f"{depth} blocks are too few to choose stages for")
    if place is None:
        place = FOR_SPEED.place if can_split(backbone, family) else "before"
    loc = spread(depth, place) if pruning_loc is None else tuple(pruning_loc)
    plan = Plan(loc, (1.0,) * len(loc), scorer, reducer, place)
    size = image_size_of(backbone)
    dense = copy.deepcopy(backbone).to("meta")
    dense_gflops = count_gflops(dense, size)
    model = family.make_dynamic(dense, plan)

    def gflops_at(base_rate: float) -> float:
        model.set_keep_rates(geometric_keep_rates(base_rate, len(loc), FEWEST_TOKENS))
        return count_gflops(model, size)

    rate = solve(gflops_at, dense_gflops, speedup, type(backbone).__name__)
    return replace(plan, keep_rates=geometric_keep_rates(rate, len(loc), FEWEST_TOKENS))


def can_split(backbone: nn.Module, family: "Family") -> bool:
    """Whether stages can be inside all blocks."""
    find_split = getattr(family, "find_split", None)
    return find_split is not None and all(find_split(block) is not None for block in family.blocks(backbone))


def image_size_of(backbone: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that the backbone is built for."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return tuple(size or backbone.pretrained_cfg["input_size"][1:])


def solve(gflops_at: Callable[[float], float], dense_gflops: float, speedup: float, what: str) -> float:
    """The largest base rate, down to LOWEST_RATE, at which the model is so many times cheaper than dense."""
    largest = math.floor(100 * dense_gflops / gflops_at(LOWEST_RATE)) / 100
    if not 1 < speedup <= largest:
        raise ValueError(
            f"a speed-up must be above 1 and at most {largest:.3g} for this {what}, got {speedup:g}; "
            "beyond that too few tokens are left (by hand: pruning_loc and keep_rates)"
        )
    low, high = LOWEST_RATE, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if gflops_at(middle) <= dense_gflops / speedup else (low, middle)
    return low
