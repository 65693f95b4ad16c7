"""What learns how fast and from what: parameter groups, learning rates, label mixing, the moving average, and the
Trainer made of them. The values are a recipe's."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import torch
import torch.distributed as dist
from dynamicvit.datasets import Augmentation, BatchTransform
from dynamicvit.losses import DiffPruningLoss, DistillDiffPruningLoss, FeatureLoss, LabelLoss
from dynamicvit.models import Teacher, gives_embeddings
from dynamicvit.models.families import family_of
from dynamicvit.models.features import FeatureExtractor, FeatureTeacher
from dynamicvit.models.pretrained import is_new
from dynamicvit.recipe import Recipe
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
PREDICTOR, BACKBONE = "predictor", "backbone"  # names of parameter groups
FROZEN = ("cls_token", "pos_embed")


@dataclass
class Trainer:
    """All that a training step works with, and the numbers that it leaves behind."""

    model: nn.Module  # DDP-wrapped where there are several processes
    criterion: nn.Module  # (images, outputs, labels) -> (loss, parts by name)
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    batch_transform: Callable[[Tensor], Tensor]
    device: torch.device
    amp_dtype: torch.dtype | None
    schedule: Callable[[float], dict[str, float]]  # epochs done, with a fraction -> learning rate by group name
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    clip_grad: float | None = None
    update_freq: int = 1
    seed: int = 0
    print_freq: int = 50
    bad_steps_in_a_row: Tensor = field(init=False)
    most_bad_steps_in_a_row: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bad_steps_in_a_row = self.most_bad_steps_in_a_row = torch.zeros((), device=self.device)


def build_trainer(
    recipe: Recipe,
    model: nn.Module,
    teacher: Teacher | None,
    device: torch.device,
    augmentation: Augmentation,
    steps_per_epoch: int,
    print_freq: int = 50,
    features: bool = False,
) -> Trainer:
    """model: dense or dynamic, on the device. Compiles it and wraps it for several processes, where asked for.

    features: it learns the teacher's features and nothing else, whatever the recipe says about losses.
    """
    amp_dtype, preprocessing = pick_amp(recipe.amp, device), model.spec.preprocessing
    if not model.spec.dense and not features:
        model.set_distilled_training(True)  # the losses need all outputs, others just logits
    mixup = build_mixup(recipe, model.spec.num_classes)
    start = names_before_stages(model) if recipe.frozen_start and not model.spec.dense else frozenset()
    groups = param_groups(model, recipe.weight_decay, recipe.decay_new_biases, start)
    ema = MovingAverage(model, decay=recipe.model_ema_decay) if recipe.model_ema else None
    scaler = build_scaler(device, amp_dtype)
    schedule = partial(learning_rates, recipe, model.spec.dense, steps_per_epoch)
    if features:
        criterion = FeatureLoss(FeatureTeacher(teacher.vit))
        model = FeatureExtractor(model)
    else:
        criterion = build_criterion(recipe, model, teacher, mixed_labels=mixup is not None).to(device)
    if recipe.compile:
        for module in (model, teacher):
            if module is not None:
                module.compile()
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=torch.optim.AdamW(groups, lr=recipe.lr, fused=True),
        scaler=scaler,
        batch_transform=BatchTransform(
            device, preprocessing.mean, preprocessing.std, augmentation.reprob, augmentation.remode
        ),
        device=device,
        amp_dtype=amp_dtype,
        schedule=schedule,
        mixup=mixup,
        ema=ema,
        clip_grad=recipe.clip_grad,
        update_freq=recipe.update_freq,
        seed=recipe.seed,
        print_freq=print_freq,
    )


def build_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if recipe.mixup <= 0 and recipe.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=max(1, num_classes),  # 0 where the model gives embeddings, which have no labels
    )


def build_criterion(recipe: Recipe, model: nn.Module, teacher: Teacher | None, mixed_labels: bool) -> nn.Module:
    labels = SoftTargetCrossEntropy() if mixed_labels else LabelSmoothingCrossEntropy(recipe.smoothing)
    if model.spec.dense:
        return LabelLoss(labels)
    if teacher is None:
        return DiffPruningLoss(labels, model.keep_rates, recipe.ratio_weight, model.combine, recipe.cls_weight)
    return DistillDiffPruningLoss(
        teacher,
        labels,
        model.keep_rates,
        recipe.ratio_weight,
        recipe.distill_weight,
        mse_token=not model.tokens_are_logits,
        cls_weight=recipe.cls_weight,
        token_weight=recipe.token_weight,
        temperature=recipe.distill_temperature,
        embeddings=gives_embeddings(model.spec),
        combine=model.combine,
    )


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """'auto': bfloat16 where the hardware has it, float16 on older GPUs, float32 on older CPUs."""
    if name != "auto":
        return AMP_DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def precision_name(amp_dtype: torch.dtype | None) -> str:
    """The name of what pick_amp has picked, for the log."""
    return str(amp_dtype or torch.float32).removeprefix("torch.")


def build_scaler(device: torch.device, amp_dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Only float16 needs its loss scaled; elsewhere the scale stays 1 and only the scaler's check
    for gradients that are not finite is used."""
    if amp_dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    never, unchanged = 2**31 - 1, 1 - 1e-12
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=never, backoff_factor=unchanged)


class MovingAverage(ModelEmaV3):
    """timm's, with its tensors listed once: walking two state dicts takes longer than the arithmetic."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """model: the one that the average was made of."""
        averages, values = zip(*self.floats, strict=True)
        torch._foreach_lerp_(averages, values, weight=1 - self.decay)
        for average, value in self.counts:
            average.copy_(value)


def names_before_stages(model: nn.Module) -> frozenset[str]:
    """The parameters that a dynamic model has before the block of its first stage."""
    first = next(family_of(model).blocks(model)[model.pruning_loc[0]].parameters())
    return frozenset(name for name, _ in takewhile(lambda named: named[1] is not first, model.named_parameters()))


def param_groups(
    model: nn.Module, weight_decay: float, decay_new_biases: bool = True, frozen: Collection[str] = ()
) -> list[dict]:
    """AdamW's groups: what is new in a dynamic model, and the backbone, each with weight decay and without.

    1-d parameters and biases of the backbone have no decay; those of new parts have it in the NeurIPS
    paper's code (decay_new_biases) and not in the journal version's. A dynamic model's class token and
    position embeddings are frozen; a dense model's are trained, without decay, and so are those of a
    model with nothing new to train. frozen: names of others that do not learn. Sets requires_grad accordingly.
    """
    dynamic = any(is_new(name) for name, _ in model.named_parameters())
    members: dict[tuple[str, float], list[nn.Parameter]] = {
        (name, decay): [] for name in (PREDICTOR, BACKBONE) for decay in (weight_decay, 0.0)
    }
    for name, parameter in model.named_parameters():
        if (name in FROZEN and dynamic) or name in frozen:
            # AdamW never sees them. The rest of the backbone is frozen by a learning rate of 0 in the first
            # epochs: requires_grad_(False) with a bias that needs a gradient was an illegal memory access in
            # compiled attention on CUDA until late 2026.
            parameter.requires_grad_(False)
            continue
        is_vector = name in FROZEN or parameter.ndim == 1 or name.endswith(".bias")
        decays = not is_vector or (is_new(name) and decay_new_biases)
        members[PREDICTOR if is_new(name) else BACKBONE, weight_decay if decays else 0.0].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": decay}
        for (name, decay), parameters in members.items()
        if parameters
    ]


def learning_rates(recipe: Recipe, dense: bool, steps_per_epoch: int, epoch: float) -> dict[str, float]:
    """By group name. epoch: epochs done, with a fraction."""
    return SCHEDULES[recipe.schedule](recipe, dense, steps_per_epoch, epoch)


def rates_by_epoch(recipe: Recipe, dense: bool, steps_per_epoch: int, epoch: float) -> dict[str, float]:
    """The NeurIPS paper's for dynamic models, DeiT's for dense ones."""
    if dense:
        return dense_rates(recipe.peak_lr, recipe.min_lr, epoch, recipe.epochs, recipe.warmup_epochs)
    return dynamic_rates(
        recipe.peak_lr, recipe.min_lr, epoch, recipe.epochs, recipe.epochs_frozen, recipe.backbone_lr_scale
    )


def is_always_frozen(schedule: Callable[[float], dict[str, float]], epochs: int, steps_per_epoch: int) -> bool:
    """Whether a run's backbone does not learn even in its last step."""
    return schedule(epochs - 1 / steps_per_epoch)[BACKBONE] == 0


def cosine(lr: float, min_lr: float, done: float, total: float) -> float:
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done / total))


def dynamic_rates(
    lr: float, min_lr: float, epoch: float, epochs: int, frozen_epochs: float, backbone_scale: float
) -> dict[str, float]:
    """The NeurIPS schedule, constant within an epoch: predictors by cosine; the backbone not at
    all for the first epochs, while the predictors are no better than chance, then slowly."""
    epoch = math.floor(epoch)
    predictor = cosine(lr, min_lr, epoch, epochs)
    backbone = 0.0 if epoch < frozen_epochs else min(backbone_scale * lr, predictor)
    return {PREDICTOR: predictor, BACKBONE: backbone}


def dense_rates(lr: float, min_lr: float, epoch: float, epochs: int, warmup_epochs: float) -> dict[str, float]:
    """For a backbone alone: linear warm-up, then cosine, step by step."""
    if epoch < warmup_epochs:
        return {BACKBONE: min_lr + (lr - min_lr) * epoch / warmup_epochs}
    return {BACKBONE: cosine(lr, min_lr, epoch, epochs)}


def rates_by_step(recipe: Recipe, dense: bool, steps_per_epoch: int, epoch: float) -> dict[str, float]:
    """The journal version's schedule: linear from 0 to lr, then cosine; the backbone has its share of it
    once it is no longer frozen."""
    step, warmup = round(epoch * steps_per_epoch), round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        lr = recipe.peak_lr * step / max(warmup - 1, 1)
    else:
        lr = cosine(recipe.peak_lr, recipe.min_lr, step - warmup, recipe.epochs * steps_per_epoch - warmup)
    if dense:
        return {BACKBONE: lr}
    frozen = step < recipe.epochs_frozen * steps_per_epoch
    return {PREDICTOR: lr, BACKBONE: 0.0 if frozen else recipe.backbone_lr_scale * lr}


SCHEDULES = {"epochs": rates_by_epoch, "steps": rates_by_step}


def set_rates(optimizer: Optimizer, rates: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
