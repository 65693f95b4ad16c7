"""What a described model costs in multiply-adds, and the description of one that costs no more than a given number."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .describe import describe
from .factory import build_model
from .families import family_of
from .flops import count_gflops
from .rates import geometric_keep_rates
from .reducers import REDUCERS
from .scorers import SCORERS
from .spec import ModelError, ModelSpec
from .stages import FOR_FEATURES, FOR_SPEED, choose, largest_rate


def dense_and_dynamic_gflops(model: nn.Module) -> dict[str, float]:
    """By "dense" and, unless it is dense itself, "dynamic", at the model's own image size."""
    spec = describe(model)
    with torch.device("meta"):
        dense = build_model(spec.as_dense())
    gflops = {"dense": count_gflops(dense, spec.img_size)}
    return gflops if spec.dense else gflops | {"dynamic": count_gflops(model, spec.img_size)}


def choose_stages(
    spec: ModelSpec,
    speedup: float,
    *,
    scorer: str | None = None,
    reducer: str | None = None,
    place: str | None = None,
    pruning_loc: Sequence[int] | None = None,
    for_features: bool = False,
) -> ModelSpec:
    """The description of a dense model -> that of one that needs `speedup` times fewer multiply-adds.

    stages.choose decides where stages are and how many tokens they keep. for_features: see make_dynamic. Raises
    ModelError for a speed-up that would leave too few tokens, and for a model without transformer blocks.
    """
    choice = FOR_FEATURES if for_features else FOR_SPEED
    scorer, reducer = scorer or choice.scorer, reducer or choice.reducer
    with torch.device("meta"):
        model = build_model(replace(spec, dense=True))
    try:
        plan = choose(model, family_of(model), speedup, SCORERS[scorer], REDUCERS[reducer], place, pruning_loc, choice)
    except ValueError as error:
        raise ModelError(f"{spec.arch}: {error}") from error
    chosen = {"pruning_loc": plan.pruning_loc, "keep_rates": plan.keep_rates, "place": plan.place}
    return replace(model.spec, dense=False, scorer=scorer, reducer=reducer, **chosen)


def solve_keep_rates(spec: ModelSpec, gflops: float) -> tuple[float, ...]:
    """Keep rates, with the same share of its tokens kept by each stage, at which a spec costs at most this much.

    That share is stages.LOWEST_RATE at least, even if this costs more.
    """
    num_stages = len(spec.pruning_loc)
    with torch.device("meta"):
        model = build_model(replace(spec, keep_rates=(1.0,) * num_stages))

    def gflops_at(base_rate: float) -> float:
        model.set_keep_rates(geometric_keep_rates(base_rate, num_stages))
        return count_gflops(model, model.spec.img_size)

    return geometric_keep_rates(largest_rate(gflops_at, gflops), num_stages)
