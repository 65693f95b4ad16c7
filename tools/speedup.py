"""Where tokens merge and how many stay, so that a model reaches a given speed-up on this machine, in its intended use.

Arithmetic is a poor guide to time: scoring and merging cost time that multiply-adds do not show, and a small batch
cannot make use of fewer tokens. So a few layouts are timed beside the dense model, and their rates are adjusted until
the time is what was asked for. Of those that reach it the one most like the dense model is taken.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec, geometric_keep_rates, make_dynamic
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.spec import two_sides
from dynamicvit.models.stages import (
    FEW_STAGES,
    FEWEST_TOKENS,
    FOR_FEATURES,
    FOR_SPEED,
    LOWEST_RATE,
    MAX_STAGES,
    can_split,
    spread,
)
from dynamicvit.optim import pick_amp, precision_name
from dynamicvit.tools.progress import EVERY_SECONDS
from dynamicvit.tools.timing import WARMUP_ROUNDS, hardware, interleave, time_turn
from dynamicvit.utils import log
from torch import Tensor, nn

STAGE_COUNTS = (MAX_STAGES, FEW_STAGES, 3)  # of the layouts that are timed, at most
TIMINGS, MAX_TIMINGS = 3, 6  # each with rates based on those before; more than 3 while no layout is fast enough
TOLERANCE = 0.02  # of a speed-up: what timing cannot resolve
CLOSE_ENOUGH = 0.05  # above the wish; a slower model would be more like the dense one
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 6.0, 5, 30  # of a timing
BUSY = 1.3  # median over least time, above which something else is going on
# A large GPU needs this many images, or it spends its time launching kernels.
USUAL_BATCH = {"cpu": 8, "cuda": 256}
USUAL_SPEEDUP = 1.5  # by default; and to place stages whose rates are given by hand
GPU_TURN_SECONDS = 0.05  # in which a GPU's queue fills
RATES = np.linspace(LOWEST_RATE, 1, 5)  # shares of its tokens that a stage keeps, whose cost is counted
DENSE = "dense"

Ratios = dict[str, float]  # times as fast as the dense model, by name
Timer = Callable[[dict[str, nn.Module]], Ratios]  # models by name, with DENSE


@dataclass(frozen=True)
class Deployment:
    """Where and how a model will be used: what its speed is measured for."""

    device: torch.device
    batch_size: int
    amp_dtype: torch.dtype | None  # of weights and images; None: float32

    @classmethod
    def on(cls, device: torch.device, batch_size: int | None = None, amp: str = "auto") -> "Deployment":
        """batch_size: by default 8 on a CPU, 256 on a GPU. amp: auto is bfloat16 on a GPU and float32 on a CPU."""
        on_gpu = device.type == "cuda"
        amp_dtype = None if amp == "auto" and not on_gpu else pick_amp(amp, device)
        return cls(device, batch_size or USUAL_BATCH[device.type], amp_dtype)

    def __str__(self) -> str:
        precision = precision_name(self.amp_dtype)
        return f"batch {self.batch_size} in {precision} on {hardware(self.device.type)}"


@dataclass(frozen=True)
class Wish:
    """How much faster: in time, in multiply-adds, or by rates given by hand. Only one of these; UserError for two."""

    speedup: float | None = None
    flops_speedup: float | None = None
    base_rate: float | None = None
    keep_rates: tuple[float, ...] | None = None
    pruning_loc: tuple[int, ...] | None = None  # blocks before which tokens merge; None: chosen

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise UserError(f"{' and '.join(self.given).replace('_', '-')} exclude each other: give one of them")
        for name in ("speedup", "flops_speedup"):
            value = getattr(self, name)
            if value is not None and not 1 < value < 100:
                raise UserError(f"a {name.replace('_', '-')} must be above 1 (and below 100), got {value:g}")

    @property
    def given(self) -> list[str]:
        """Names of the ways in which it says how much; at most one."""
        ways = ("speedup", "flops_speedup", "base_rate", "keep_rates")
        return [name for name in ways if getattr(self, name) is not None]

    def or_usual(self) -> "Wish":
        return self if self.given else replace(self, speedup=USUAL_SPEEDUP)


def layouts(dense: nn.Module, wish: Wish, features: bool) -> list[ModelSpec]:
    """Descriptions of dynamic models that still keep all tokens: with a stage in every block from the first one on, and
    with fewer, which take less time."""
    family = family_of(dense)
    depth = len(family.blocks(dense))
    choice = FOR_FEATURES if features else FOR_SPEED
    where = choice.place if can_split(dense, family) else "before"
    counts = STAGE_COUNTS if wish.keep_rates is None else [len(wish.keep_rates)]
    chosen = [spread(depth, wish.speedup or USUAL_SPEEDUP, where, count, features) for count in counts]
    if wish.pruning_loc is not None:
        chosen = [wish.pruning_loc]
    merging = replace(dense.spec, dense=False, scorer=choice.scorer, reducer=choice.reducer, place=where)
    return [replace(merging, pruning_loc=loc, keep_rates=(1.0,) * len(loc)) for loc in dict.fromkeys(chosen)]


def choose_spec(
    dense: nn.Module, wish: Wish, timer: Timer, distance: Callable[[nn.Module], float], features: bool = False
) -> ModelSpec:
    """The description of the faster model. dense: with its spec. distance: of a faster model's outputs from its.

    features: the model is for its features; timer and distance are then of these. Raises
    UserError for a wish that cannot be met, and says which one can be.
    """
    specs = layouts(dense, wish, features)
    stages = len(specs[0].pruning_loc)
    if wish.keep_rates is not None:
        return replace(specs[0], keep_rates=wish.keep_rates)
    try:
        if wish.base_rate is not None:
            return replace(specs[0], keep_rates=geometric_keep_rates(wish.base_rate, stages))
        if wish.flops_speedup is not None:
            shared, speedup = share_weights(dense), wish.flops_speedup
            fast = make_dynamic(shared, wish.pruning_loc, speedup=speedup, for_features=features)
            return replace(specs[0], pruning_loc=fast.pruning_loc, keep_rates=fast.keep_rates, place=fast.place)
    except ValueError as error:
        raise UserError(str(error)) from error
    log(f"choosing among {len(specs)} layouts of stages by time")
    gflops = count_gflops(dense, dense.spec.img_size, features)
    found = [Layout.of(dense, spec, gflops, features) for spec in specs]
    return choose_by_time(found, dense, wish.speedup, timer, distance)


@dataclass
class Layout:
    """Places of stages, whose rates are to be found. Costs and times are shares of the dense model's."""

    spec: ModelSpec
    model: nn.Module  # shares its weights with the dense one
    costs: list[float]  # at RATES
    cost: float = 1.0  # of the rates that it has now
    seen: list[tuple[float, float]] = field(default_factory=list)  # (cost, time), as measured

    @classmethod
    def of(cls, dense: nn.Module, spec: ModelSpec, dense_gflops: float, features: bool) -> "Layout":
        model, costs = make_faster(share_weights(dense), spec).eval(), []
        shapes = share_weights(model).to("meta")
        for rate in RATES:
            shapes.set_keep_rates(geometric_keep_rates(rate, len(spec.pruning_loc), FEWEST_TOKENS))
            costs.append(count_gflops(shapes, spec.img_size, features) / dense_gflops)
        return cls(spec, model, costs)

    def set_cost(self, cost: float) -> None:
        """Sets rates at which the model costs about this much, or as little as it can."""
        self.cost = min(max(cost, self.costs[0]), self.costs[-1])
        rate = float(np.interp(self.cost, self.costs, RATES))
        rates = geometric_keep_rates(rate, len(self.spec.pruning_loc), FEWEST_TOKENS)
        self.spec = replace(self.spec, keep_rates=rates)
        self.model.set_keep_rates(rates)

    @property
    def name(self) -> str:
        return f"{len(self.spec.pruning_loc)} stages"

    @property
    def speedup(self) -> float:
        """As measured last."""
        return 1 / self.seen[-1][1]

    def meets(self, speedup: float) -> bool:
        return self.speedup >= (1 - TOLERANCE) * speedup

    def is_settled(self, speedup: float) -> bool:
        at_limit = self.cost == self.costs[0] and self.speedup < speedup
        return at_limit or (self.meets(speedup) and self.speedup <= (1 + CLOSE_ENOUGH) * speedup)

    def aim(self, speedup: float) -> None:
        """Sets the cost that should take the time asked for, on the line through the last two measurements."""
        (cost, time), slope = self.seen[-1], 1.0
        if len(self.seen) > 1 and abs(cost - self.seen[-2][0]) > TOLERANCE:
            slope = (time - self.seen[-2][1]) / (cost - self.seen[-2][0])
        slope = min(max(slope, 0.3), 2.0)  # noise
        self.set_cost(cost + (1 / (speedup * (1 + TOLERANCE / 2)) - time) / slope)


def choose_by_time(
    found: Sequence[Layout], dense: nn.Module, speedup: float, timer: Timer, distance: Callable[[nn.Module], float]
) -> ModelSpec:
    """As choose_spec, for a speed-up in time."""
    for layout in found:
        layout.set_cost(1 / speedup)
    for timing in range(MAX_TIMINGS):
        unsettled = [layout for layout in found if not layout.seen or not layout.is_settled(speedup)]
        if not unsettled or (timing >= TIMINGS and any(layout.meets(speedup) for layout in found)):
            break
        for layout in unsettled if timing else ():
            layout.aim(speedup)
        ratios = timer({DENSE: dense} | {layout.name: layout.model for layout in unsettled})
        for layout in unsettled:
            layout.seen.append((layout.cost, 1 / ratios[layout.name]))
            log(
                f"{layout.name}, {1 / layout.cost:.2f} times fewer multiply-adds: "
                f"{layout.speedup:.2f} times as fast as the dense model"
            )
    met = [layout for layout in found if layout.meets(speedup)]
    if not met:
        raise UserError(cannot_be_met(speedup, max(layout.speedup for layout in found)))
    best = met[0] if len(met) == 1 else min(met, key=lambda layout: distance(layout.model))
    log(f"chosen: {best.name}")
    return best.spec


def cannot_be_met(speedup: float, limit: float) -> str:
    if limit <= 1 + CLOSE_ENOUGH:
        able = f"the limit is {limit:.2f}: nothing to gain"
        return f"a speedup of {speedup:g} cannot be reached here ({able}); try a larger batch, input or model"
    return f"a speedup of {speedup:g} cannot be reached here, at most {floor(limit)}"


def floor(value: float) -> str:
    """Rounded down to hundredths, so that the speed-up that a message names can be reached."""
    return f"{int(100 * value) / 100:.2f}"


def share_weights(model: nn.Module) -> nn.Module:
    """A copy with modules of its own, but the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def make_faster(dense: nn.Module, spec: ModelSpec) -> nn.Module:
    """Makes the dense model dynamic, in place, as spec says."""
    try:
        return make_dynamic(dense, spec.pruning_loc, spec.keep_rates, spec.scorer, spec.reducer, place=spec.place)
    except ValueError as error:
        raise UserError(str(error)) from error


def time_ratios(deployment: Deployment, size: int | tuple[int, int], models: dict[str, nn.Module]) -> Ratios:
    """How many times as fast as models[DENSE] each other one is, all alternately."""
    seconds = time_models(deployment, size, models)
    return {name: seconds[DENSE] / seconds[name] for name in models if name != DENSE}


@torch.inference_mode()
def time_models(deployment: Deployment, size: int | tuple[int, int], models: dict[str, nn.Module]) -> dict[str, float]:
    """Seconds for a batch by model. models: in the deployment's precision, on its device.

    The least of several rounds, as whatever else the machine does can only add to it. UserError for a batch that does
    not fit the GPU's memory.
    """
    shape = (deployment.batch_size, 3, *two_sides(size))
    labels = torch.empty(0)

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        return model(images)

    steps = {name: partial(step, model) for name, model in models.items()}
    try:
        images = torch.randn(shape, device=deployment.device, dtype=deployment.amp_dtype)
        once = {name: time_turn(partial(run, images, labels), 1, images.is_cuda) for name, run in steps.items()}
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory with {shape[0]} images at a time; give a lower --for-batch") from error
    turn = max(1, round(GPU_TURN_SECONDS / max(once.values()))) if images.is_cuda else 1
    a_round = turn * sum(once.values())
    rounds = min(max(round(SECONDS / a_round), MIN_ROUNDS), MAX_ROUNDS)
    if a_round * (rounds + WARMUP_ROUNDS) > EVERY_SECONDS:
        log(f"timing {len(models)} models at batch {deployment.batch_size}: {a_round * (rounds + WARMUP_ROUNDS):.0f} s")
    seconds = interleave(steps, images, labels, rounds, turn)
    if (spread := max(float(np.median(values) / values.min()) for values in seconds.values())) > BUSY:
        log(f"warning: timings differ by {spread - 1:.0%} from round to round: the machine is busy with something else")
    return {name: float(values.min()) for name, values in seconds.items()}
