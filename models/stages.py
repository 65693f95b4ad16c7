"""Where stages go and how many tokens they keep for a given speed-up in multiply-adds: the one rule."""

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

MAX_STAGES = 12  # in a deep model they are spread
# For a prediction so few are as good as more of them, up to this speed-up; beyond it each would have to take too much.
FEW_STAGES, FEW_UP_TO = 5, 1.8
FEWEST_TOKENS = 0.03  # share of the patches that is always kept
LOWEST_RATE = 0.5  # the smallest share of its tokens that a stage may keep
BISECTIONS = 16


@dataclass(frozen=True)
class Choice:
    """What is taken by default."""

    scorer: str = "distinct_few"
    reducer: str = "merge_length"
    place: str = "inside"
    features: bool = False  # whether every patch's feature is read, and not the prediction alone


FOR_SPEED = Choice()
FOR_FEATURES = Choice(scorer="outlying", place="before", features=True)


def spread(depth: int, speedup: float, place: str, most: int | None = None, features: bool = False) -> tuple[int, ...]:
    """Blocks of the stages, evenly to the end; the greater the speed-up, the earlier the first one.

    The first block is what measured best with DeiT-Tiny. For its prediction: block 4 of 12 at 1.33 times fewer
    multiply-adds, 3 at 1.69, 2 at 2.0, 1 from 2.5 on (500 photos, docs/scores.md). In the first quarter of the depth
    class attention says little, but late stages alone would have to leave too few tokens. For all features: block 6 at
    1.3, 3 at 1.6 and 2.0, 2 at 2.6 (docs/features.md), where each stage keeps about four fifths of its tokens. Inside
    the last block a stage would save nothing where its MLP runs for the class token alone. most: the largest number of
    stages, each of which takes time; None: as few as lose nothing by it.
    """
    if most is None:
        most = FEW_STAGES if speedup <= FEW_UP_TO and not features else MAX_STAGES
    end = depth - (place == "inside" and not features)
    share = min(0.108 / (1 - 1 / speedup), 2 / 3) if features else 0.7 / speedup - 1 / 6
    first = min(max(1, round(depth * share)), end - 1)
    count = min(most, end - first)
    return tuple(first + stage * (end - first) // count for stage in range(count))


def choose(
    backbone: nn.Module,
    family: "Family",
    speedup: float,
    scorer: Scorer,
    reducer: Reducer,
    place: str | None = None,
    pruning_loc: Sequence[int] | None = None,
    choice: Choice = FOR_SPEED,
) -> Plan:
    """The plan that makes a dense backbone `speedup` times cheaper in multiply-adds: its prediction, or all features.

    Raises ValueError for a speed-up that would leave too few tokens.
    """
    depth = len(family.blocks(backbone))
    if depth < 3:
        raise ValueError(f"{depth} blocks are too few to choose stages for")
    if not speedup > 1:
        raise ValueError(f"a speed-up must be above 1, got {speedup:g}")
    if place is None:
        place = choice.place if can_split(backbone, family) else "before"
    loc = spread(depth, speedup, place, features=choice.features) if pruning_loc is None else tuple(pruning_loc)
    plan = Plan(loc, (1.0,) * len(loc), scorer, reducer, place)
    size = getattr(family, "image_size", image_size_of)(backbone)
    dense = copy.deepcopy(backbone).to("meta")
    dense_gflops = count_gflops(dense, size, choice.features)
    model = family.make_dynamic(dense, plan)

    def gflops_at(base_rate: float) -> float:
        model.set_keep_rates(geometric_keep_rates(base_rate, len(loc), FEWEST_TOKENS))
        return count_gflops(model, size, choice.features)

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
    """The largest base rate, down to LOWEST_RATE, at which the model is `speedup` times cheaper than dense."""
    largest = math.floor(100 * dense_gflops / gflops_at(LOWEST_RATE)) / 100
    if speedup > largest:
        raise ValueError(
            f"a speed-up of {speedup:g} would leave too few tokens of this {what}; at most {largest:.3g} "
            "(to choose by hand, give pruning_loc and keep_rates)"
        )
    return largest_rate(gflops_at, dense_gflops / speedup)


def largest_rate(gflops_at: Callable[[float], float], limit: float) -> float:
    """The largest base rate that costs at most the limit, or LOWEST_RATE if even that costs more."""
    low, high = LOWEST_RATE, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if gflops_at(middle) <= limit else (low, middle)
    return low
