"""The families of backbones that can be dynamic. All that differs between them is in their adapters.

An adapter has: backbone (the class that it is for), recipe (of the paper that the family is from), blocks(model) (those
that stages can stand before), default_pruning_loc(model), keep_rates(base_rate, num_stages), make_dynamic(model, plan),
outputs_of(model, images) (what a teacher gives), map_published(weights, model).
"""

import numbers
from collections.abc import Sequence

from torch import nn

from .dynamic import Plan
from .eva import EvaAdapter
from .huggingface import HuggingFaceAdapter
from .lvvit import LVViTAdapter
from .reducers import REDUCERS, Reducer
from .scorers import SCORERS, Scorer
from .spatial import ADAPTERS, SpatialAdapter
from .spec import is_word
from .stages import FOR_FEATURES, FOR_SPEED, choose
from .vit import ViTAdapter

Family = ViTAdapter | SpatialAdapter | HuggingFaceAdapter
# The first that fits: LVViT is a VisionTransformer too.
FAMILIES: list[Family] = [LVViTAdapter(), EvaAdapter(), *ADAPTERS, ViTAdapter(), HuggingFaceAdapter()]


def family_of(backbone: nn.Module) -> Family:
    """The adapter of the backbone's family. Raises ValueError for an unknown one."""
    for family in FAMILIES:
        if isinstance(backbone, family.backbone):
            return family
    if isinstance(backbone, str):
        raise ValueError(f"make_dynamic takes a model, not its name: timm.create_model({backbone!r}, pretrained=True)")
    known = ", ".join(sorted({family.backbone.__name__ for family in FAMILIES}))
    raise ValueError(f"only these can be made dynamic: {known}; this is a {type(backbone).__name__}")


def make_dynamic(
    backbone: nn.Module,
    pruning_loc: Sequence[int] | None = None,
    keep_rates: Sequence[float] | None = None,
    scorer: str | Scorer | None = None,
    reducer: str | Reducer | None = None,
    merge_streams: bool = False,
    *,
    place: str | None = None,
    speedup: float | None = None,
    for_features: bool = False,
) -> nn.Module:
    """Makes a trained timm backbone dynamic, in place; its own weights and names stay.

    backbone: a VisionTransformer, Eva, SwinTransformer or ConvNeXt (the latter two only with predictors and fast
    paths, see spatial; merge_streams is for these alone).

    Either give a speed-up, `make_dynamic(vit, speedup=1.6)`: stages and rates are chosen so that the model needs that
    many times fewer multiply-adds, by distinct_few + merge_length inside the blocks. This is counted, not timed;
    `tools.accelerate --speedup` measures time. for_features=True: the multiply-adds are those of forward_features, and
    every patch's feature stays as close as possible to the dense model's, by outlying + merge_length before the blocks.

    Or choose by hand. pruning_loc: the blocks before which tokens are reduced, or with place="inside" the blocks
    inside which, between attention and MLP. keep_rates: the share of the original patch tokens kept after each of these
    stages. scorer: predictor (published; learned), or attention, distinct, outlying or random, which need no training;
    reducer: drop (published) or merge; or objects of your own.

    The model returns logits, in train mode too, as the backbone did; set_distilled_training(True) makes it return
    what this project's losses need. timm's patch dropout is no longer used. Raises ValueError, before anything is
    changed, if anything does not fit.
    """
    if speedup is not None and not isinstance(speedup, numbers.Real):
        raise ValueError(f"speedup must be a number, such as 1.6; got {speedup!r}")
    family = family_of(backbone)
    if speedup is None:
        check_choice_by_hand(family, pruning_loc, keep_rates, for_features)
        plan = Plan(
            as_blocks(pruning_loc),
            tuple(keep_rates),
            find(scorer or "predictor", SCORERS, Scorer),
            find(reducer or "drop", REDUCERS, Reducer),
            place or "before",
            merge_streams,
        )
        return family.make_dynamic(backbone, plan)
    if keep_rates is not None:
        raise ValueError("give speedup or keep_rates, not both: speedup chooses the rates")
    choice = FOR_FEATURES if for_features else FOR_SPEED
    scorer = find(scorer or choice.scorer, SCORERS, Scorer)
    reducer = find(reducer or choice.reducer, REDUCERS, Reducer)
    loc = None if pruning_loc is None else as_blocks(pruning_loc)
    return family.make_dynamic(backbone, choose(backbone, family, speedup, scorer, reducer, place, loc, choice))


def check_choice_by_hand(
    family: Family, pruning_loc: Sequence[int] | None, keep_rates: Sequence[float] | None, for_features: bool
) -> None:
    """Raises ValueError where stages and rates are not both given, as make_dynamic takes them."""
    chosen = {"pruning_loc": pruning_loc, "keep_rates": keep_rates}
    missing = [name for name, value in chosen.items() if value is None]
    if missing:
        raise ValueError(
            f"make_dynamic needs speedup (such as 1.6), or pruning_loc and keep_rates; no {missing[0]} was given"
        )
    if for_features:
        raise ValueError("for_features chooses stages for a speedup; with pruning_loc and keep_rates, leave it out")
    if not isinstance(keep_rates, Sequence) and not hasattr(keep_rates, "__len__"):
        rates = family.keep_rates(keep_rates, len(pruning_loc))
        raise ValueError(
            f"keep_rates needs a share of all tokens for each stage; {keep_rates} as a base rate would be {rates}"
        )


def as_blocks(pruning_loc: Sequence[int]) -> tuple[int, ...]:
    """Plain integers; numpy's are as good. ValueError for anything else."""
    try:
        blocks = tuple(int(i) for i in pruning_loc)
        if any(block != i for block, i in zip(blocks, pruning_loc, strict=True)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ValueError(f"pruning_loc needs block numbers, got {pruning_loc}") from error
    return blocks


def find(wanted: str | Scorer | Reducer, known: dict, kind: type) -> Scorer | Reducer:
    """An object by its name; one of the user's own becomes known by its name, so that the model can be built again."""
    if isinstance(wanted, str):
        if wanted not in known:
            raise ValueError(f"unknown {kind.__name__.lower()} '{wanted}'; known: {', '.join(known)}")
        return known[wanted]
    if not isinstance(wanted, kind) or not is_word(getattr(wanted, "name", None)):
        raise ValueError(
            f"a {kind.__name__.lower()} must be a name, or a {kind.__name__} whose name is one word; got {wanted!r}"
        )
    if type(known.setdefault(wanted.name, wanted)) is not type(wanted):
        raise ValueError(f"another {kind.__name__.lower()} is called '{wanted.name}'; give yours a name of its own")
    return wanted
