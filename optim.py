"""Who learns how fast: parameter groups and learning rates (arXiv 2106.02034, section 4.1)."""

import math

from torch import nn
from torch.optim import Optimizer

PREDICTOR, BACKBONE = "predictor", "backbone"
FROZEN = ("cls_token", "pos_embed")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: predictors, backbone with weight decay, backbone without (1-d and biases).

    A dynamic model's class token and position embeddings are frozen; a dense model's are trained,
    without decay. Sets requires_grad accordingly.
    """
    dynamic = hasattr(model, "score_predictor")
    predictor, decay, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        if name in FROZEN and dynamic:
            parameter.requires_grad_(False)
        elif name.startswith("score_predictor."):
            predictor.append(parameter)
        elif name in FROZEN or parameter.ndim == 1 or name.endswith(".bias"):
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"name": PREDICTOR, "params": predictor, "weight_decay": weight_decay},
        {"name": BACKBONE, "params": decay, "weight_decay": weight_decay},
        {"name": BACKBONE, "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine(lr: float, min_lr: float, epoch: float, epochs: int) -> float:
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def dynamic_rates(
    lr: float, min_lr: float, epoch: float, epochs: int, warmup_epochs: float, backbone_scale: float
) -> dict[str, float]:
    """The published schedule, constant within an epoch: predictors by cosine; the backbone not at
    all for the first epochs, while the predictors are no better than chance, then hardly."""
    epoch = math.floor(epoch)
    predictor = cosine(lr, min_lr, epoch, epochs)
    backbone = 0.0 if epoch < warmup_epochs else min(backbone_scale * lr, predictor)
    return {PREDICTOR: predictor, BACKBONE: backbone}


def dense_rates(lr: float, min_lr: float, epoch: float, epochs: int, warmup_epochs: float) -> dict[str, float]:
    """For a backbone alone: linear warm-up, then cosine, step by step."""
    if epoch < warmup_epochs:
        return {BACKBONE: min_lr + (lr - min_lr) * epoch / warmup_epochs}
    return {BACKBONE: cosine(lr, min_lr, epoch, epochs)}


def set_rates(optimizer: Optimizer, rates: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
