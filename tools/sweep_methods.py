"""The ways to reduce tokens that a sweep compares, and how far each does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from dynamicvit.errors import UserError
from dynamicvit.models import REDUCERS, SCORERS, ModelError, build_model
from dynamicvit.models.costs import choose_stages, dense_and_dynamic_gflops, solve_keep_rates
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.pruning import TokenPruning
from dynamicvit.models.spec import PLACES
from dynamicvit.models.twins import dense_twin, twin
from dynamicvit.runs.tables import Row
from dynamicvit.tools.progress import say
from dynamicvit.tools.rivals import RIVALS, make_rival, nearest
from dynamicvit.tools.sweep_report import DENSE
from dynamicvit.utils import log
from torch import nn

from dynamicvit import utils

PAIRS = tuple(f"{scorer}+{reducer}" for scorer in SCORERS for reducer in REDUCERS)
MERGED = "merged"
OTHERS = {MERGED: MERGED, **RIVALS}
METHODS = (*PAIRS, *OTHERS)


class Level(NamedTuple):
    """How far tokens are reduced: by a base rate, or to a cost in GFLOPs."""

    base_rate: float | None
    gflops: float | None = None

    def __str__(self) -> str:
        return f"base rate {self.base_rate:g}" if self.gflops is None else f"{self.gflops:g} GFLOPs"

    def keep_rates(self, model: nn.Module) -> tuple[float, ...]:
        """Of the model's stages. Raises ValueError for a base rate that does not fit them."""
        if self.gflops is None:
            return family_of(model).keep_rates(self.base_rate, len(model.pruning_loc))
        return solve_keep_rates(model.spec, self.gflops)


@dataclass(frozen=True)
class Contestant:
    """A way to reduce tokens, with the model's weights."""

    name: str
    method: str  # the name with its settings, for tables
    place: str | None  # of its stages; None for the dense model
    model: nn.Module


def levels_of(model: nn.Module, base_rates: Sequence[float], gflops: Sequence[float] | None) -> list[Level]:
    """Raises UserError, before the first of many passes, for what would stop a later one."""
    if gflops is None:
        levels = [Level(base_rate) for base_rate in base_rates]
        for level in levels:
            try:
                level.keep_rates(model)
            except ValueError as error:
                raise UserError(f"--base-rates {level.base_rate}: {error}") from error
        return levels
    if not isinstance(model, TokenPruning):
        raise UserError(f"--gflops is for plain transformers, not for {model.spec.arch}: use --base-rates")
    dense = dense_and_dynamic_gflops(model)["dense"]
    for wish in gflops:
        if wish >= dense:
            raise UserError(f"--gflops {wish:g}: the dense model needs no more than {dense:.4g}")
    return [Level(None, wish) for wish in gflops]


def describe(contestant: Contestant, level: Level) -> Row:
    gflops = count_gflops(contestant.model, contestant.model.spec.img_size)
    rate = 1.0 if contestant.name == DENSE else level.base_rate
    return {"method": contestant.method, "place": contestant.place, "base_rate": rate, "gflops": gflops}


def variants_of(model: nn.Module, methods: Sequence[str], places: Sequence[str], trained: bool) -> list[Contestant]:
    """The dense model first, then one for each scorer and reducer that the backbone allows. All share their weights."""
    variants = [Contestant(DENSE, DENSE, None, dense_twin(model, share=True))]
    learned = "learned" if trained and model.scorer.learned else "untrained"
    if not isinstance(model, TokenPruning):
        log(f"{model.spec.arch} has predictors only: {', '.join(m for m in METHODS if m != METHODS[0])} are left out")
        return [*variants, Contestant(learned, learned, model.place, model)]
    for method in (method for method in methods if method in PAIRS):
        scorer, reducer = method.split("+")
        name = f"{learned if SCORERS[scorer].learned else scorer} + {reducer}"
        for place in places:
            try:
                utils.set_seed(0)  # for predictors that the weights do not have
                variant = twin(model, replace(model.spec, scorer=scorer, reducer=reducer, place=place), share=True)
                variants.append(Contestant(name if place == PLACES[0] else f"{name}, {place}", name, place, variant))
            except (ModelError, ValueError) as error:
                log(f"{method} {place} blocks is left out: {error}")
    return variants


def others_of(model: nn.Module, methods: Sequence[str], level: Level) -> list[Contestant]:
    """Methods without a base rate, at about the cost of dropping tokens at random, or at the level's."""
    names = [method for method in methods if method in OTHERS]
    if not names or not isinstance(model, TokenPruning):
        return []
    say(f"{level}: choosing the settings of {', '.join(OTHERS[name] for name in names)}")
    gflops = level.gflops or gflops_of_dropping(model, level)
    others = []
    for name in names:
        try:
            label, vit = merged(model, gflops) if name == MERGED else rival_of(name, model, gflops)
            others.append(Contestant(OTHERS[name], label, vit.place, vit))
        except (ModelError, ValueError) as error:
            log(f"{OTHERS[name]} is left out: {error}")
    return others


def gflops_of_dropping(model: nn.Module, level: Level) -> float:
    with torch.device("meta"):
        reference = build_model(replace(model.spec, scorer="random", reducer="drop", place=PLACES[0]))
    reference.set_keep_rates(level.keep_rates(reference))
    return count_gflops(reference, model.spec.img_size)


def merged(model: nn.Module, gflops: float) -> tuple[str, nn.Module]:
    """With stages of its own."""
    spec = choose_stages(model.spec.as_dense(), dense_and_dynamic_gflops(model)["dense"] / gflops)
    return f"{MERGED}, {len(spec.pruning_loc)} stages", twin(model, spec, share=True)


def rival_of(name: str, model: nn.Module, gflops: float) -> tuple[str, nn.Module]:
    rival = nearest(name, model.spec, gflops)
    return rival.label, make_rival(dense_twin(model, share=True), rival).eval()
