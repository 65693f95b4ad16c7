"""What tools.benchmark compares: models with the same weights, their inference and training steps, and their memory."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from dynamicvit.engine import accumulate_gradients, autocast, copy_statistics, update_weights
from dynamicvit.models import ModelSpec, Reduced, Reducer, Scorer, Scores, Teacher, build_model
from dynamicvit.models.costs import solve_keep_rates
from dynamicvit.models.dynamic import Plan
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops, gflops_of
from dynamicvit.models.patches import project_by_product
from dynamicvit.models.scorers import Look
from dynamicvit.models.stages import FOR_SPEED, can_split, spread
from dynamicvit.models.twins import dense_twin, twin
from dynamicvit.optim import AMP_DTYPES, build_trainer
from dynamicvit.recipe import build_augmentation, build_recipe
from dynamicvit.tools.rivals import make_rival, nearest
from dynamicvit.tools.timing import WARMUP_ROUNDS, Step
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

NUM_CLASSES = 1000
DENSE, DENSE_BY_PRODUCT, DYNAMIC, MERGED, BOUND, TOME = (
    "dense",
    "dense, patches by product",
    "dynamic",
    "merged",
    "bound",
    "ToMe",
)
TRAININGS = (DENSE, "teacher alone", DYNAMIC, "dynamic + teacher", "merged + teacher")


@dataclass(frozen=True)
class Contender:
    """What one row of the table measures, the modules in it that --compile compiles, and what trains them."""

    step: Step
    modules: Sequence[nn.Module]
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    arch: str
    base_rate: float
    keep_rates: Sequence[float] | None
    place: str | None
    input_size: int
    batch_size: Sequence[int]
    amp: str
    device: str
    compile: str | None
    graph: bool
    train: bool
    repeats: int
    stages: int | None = None  # of merged, at most; None: as make_dynamic(speedup=) chooses


class NoScorer(Scorer):
    """Scores nothing."""

    name = "none"

    def __call__(self, look: Look, module: None) -> Scores:
        return Scores(torch.zeros((), device=look.x.device).expand(look.tokens.shape[:2]))


class CutOff(Reducer):
    """Keeps the first tokens, whatever they show: what any reducer costs at least."""

    name = "cut_off"

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        kept = torch.arange(num_keep, device=x.device).expand(x.shape[0], -1)
        return Reduced(x[:, : num_prefix + num_keep], kept)


def make_models(settings: Settings, input_size: int, base_rate: float) -> dict[str, nn.Module]:
    """On the CPU, with the same weights: dense, dynamic as published, and where the backbone can, at the same cost
    merged, ToMe, and the bound, which has merged's stages and looks at no token."""
    rates = None if settings.keep_rates is None else tuple(settings.keep_rates)
    published = ModelSpec(settings.arch, base_rate, NUM_CLASSES, input_size, keep_rates=rates)
    dense = build_model(published.as_dense())
    models = {DENSE: dense}
    if settings.device == "cuda" and settings.amp != "off" and not settings.train:
        # dynamic models always have it; see models.patches
        models[DENSE_BY_PRODUCT] = dense_twin(dense)
        project_by_product(models[DENSE_BY_PRODUCT])
    models[DYNAMIC] = twin(dense, published)
    if not hasattr(dense, "blocks"):
        return models
    gflops = count_gflops(models[DYNAMIC], input_size)
    models[MERGED] = twin(dense, merged_spec(published, dense, gflops, settings.place, settings.stages))
    if not settings.train:
        models[BOUND] = cut_off(dense, models[MERGED])
        if can_split(dense, family_of(dense)):
            models[TOME] = make_rival(dense_twin(dense), nearest("tome", dense.spec, gflops))
    return models


def merged_spec(
    published: ModelSpec, dense: nn.Module, gflops: float, place: str | None, most: int | None
) -> ModelSpec:
    """What make_dynamic(speedup=) takes, at this many GFLOPs; with `most` stages at most, where that is given."""
    place = place or (FOR_SPEED.place if can_split(dense, family_of(dense)) else "before")
    speedup = count_gflops(dense, dense.spec.img_size) / gflops
    stages = spread(len(dense.blocks), speedup, place, most)
    spec = replace(published, scorer=FOR_SPEED.scorer, reducer=FOR_SPEED.reducer, place=place, pruning_loc=stages)
    return replace(spec, keep_rates=solve_keep_rates(spec, gflops))


def cut_off(dense: nn.Module, merged: nn.Module) -> nn.Module:
    plan = Plan(merged.pruning_loc, merged.keep_rates, NoScorer(), CutOff(), merged.place)
    return family_of(dense).make_dynamic(dense_twin(dense), plan)


def build_contenders(settings: Settings, models: dict[str, nn.Module]) -> dict[str, Callable[[], Contender]]:
    """By name, what builds each; they are built one by one, so that each one's memory can be measured."""
    if not settings.train:
        return {name: partial(build_inference, settings, model) for name, model in models.items()}
    names = [name for name in TRAININGS if name.split(" ")[0] in ("teacher", *models)]
    return {name: partial(build_training, settings, name, models) for name in names}


def build_inference(settings: Settings, model: nn.Module) -> Contender:
    model.to(settings.device, AMP_DTYPES[settings.amp]).eval()

    @torch.inference_mode()
    def step(images: Tensor, labels: Tensor) -> None:
        model(images)

    return Contender(step, [model])


def build_training(settings: Settings, name: str, models: dict[str, nn.Module]) -> Contender:
    """The step of a real run, without mixup and the moving average; trains copies. See TRAININGS."""
    device = torch.device(settings.device)
    changes = {"amp": settings.amp, "mixup": 0.0, "cutmix": 0.0, "model_ema": False}
    recipe = build_recipe("label-free" if name.startswith("merged") else "neurips", **changes)
    kind = name.split(" ")[0]
    model = deepcopy(models["dense" if kind == "teacher" else kind]).to(device).train()
    teacher = Teacher(deepcopy(models["dense"]).to(device)) if name.endswith("teacher") else None
    augmentation = build_augmentation(recipe.recipe)
    trainer = build_trainer(recipe, model, teacher, device, augmentation, steps_per_epoch=1)
    if kind == "teacher":
        teacher = Teacher(model)

        def ask(images: Tensor, labels: Tensor) -> None:
            with autocast(device, trainer.amp_dtype):
                teacher(trainer.batch_transform(images))

        return Contender(ask, [teacher])

    def step(images: Tensor, labels: Tensor) -> None:
        statistics = copy_statistics(model)
        accumulate_gradients(trainer, images, labels, last=True)
        update_weights(trainer, statistics)

    return Contender(step, [model, teacher] if teacher else [model], trainer.optimizer)


def prepare(contender: Contender, images: Tensor, labels: Tensor, compile_mode: str | None) -> dict[str, float]:
    """Compiles it where that is asked for; returns its GFLOPs per image and peak memory."""
    costs = {"gflops": gflops_of(lambda: contender.step(images[:1], labels[:1]))}
    if compile_mode:
        for module in contender.modules:
            # static shapes: one graph for each batch size
            module.compile(fullgraph=True, dynamic=False, mode=compile_mode)
    contender.step(images, labels)  # compilation and autotuning need memory of their own
    allocated = peak_allocated(partial(contender.step, images, labels), images.is_cuda)
    costs["peak_mib"] = (bytes_held(contender) + allocated) / 2**20
    return costs


def recorded(step: Step, images: Tensor, labels: Tensor) -> Step:
    """The step as one CUDA graph, for batches of this shape: no time goes into launching its kernels one by one."""
    inputs = images.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARMUP_ROUNDS):
            step(inputs, labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(inputs, labels)

    def replay(images: Tensor, labels: Tensor) -> None:
        inputs.copy_(images)
        graph.replay()

    return replay


def bytes_held(contender: Contender) -> int:
    """Bytes held by weights, buffers and the optimizer's state; gradients are gone at the end of a step."""
    tensors = [tensor for module in contender.modules for tensor in module.state_dict().values()]
    if contender.optimizer:
        states = contender.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def peak_allocated(step: Callable[[], None], on_gpu: bool) -> int:
    """Bytes at the height of a step, beyond what was held before it; on a GPU with cuBLAS's workspace."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    # without acc_events torch 2.11 warns about profiling cycles, though there is only one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    events = trace.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())
