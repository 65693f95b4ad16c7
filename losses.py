"""The training losses (arXiv 2106.02034, section 3.4). They know tensors only."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (logits, tokens, keep_mask, keep_decisions) of a dynamic model in train mode
Outputs = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def ratio_loss(keep_decisions: Sequence[Tensor], keep_rates: Sequence[float]) -> Tensor:
    """Sum over stages of the mean over images of (kept fraction - keep rate)^2 (eq. 15).

    keep_decisions: a (B, N) policy per stage; fractions are of the original N tokens.
    """
    return sum(
        (policy.float().mean(dim=1) - rate).square().mean()
        for policy, rate in zip(keep_decisions, keep_rates, strict=True)
    )


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., classes) logits, divided by the temperature -> (...) KL divergence with the teacher's distribution as the
    target."""
    student, teacher = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(..., C) embeddings -> (...) 1 - cosine."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


class FeatureLoss(nn.Module):
    """How far a faster model's features are from the dense model's, for training without labels.

    teacher: a module that gives the (B, T, C) features of images; see models.features. Two parts, both means over
    all tokens (patches and prefix): cosine, how far a token's direction is off, and size, the squared relative
    error of its length.
    """

    def __init__(self, teacher: nn.Module, size_weight: float = 0.5) -> None:
        super().__init__()
        self.teacher = teacher
        self.size_weight = size_weight

    def forward(self, images: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts by name, like the other losses. Labels are ignored."""
        features, target = features.float(), self.teacher(images).float()
        length, wanted = (torch.linalg.vector_norm(x, dim=-1) for x in (features, target))
        parts = {"cosine": cosine_distance(features, target).mean()}
        parts["size"] = (length / wanted.clamp(min=1e-6) - 1).square().mean()
        return parts["cosine"] + self.size_weight * parts["size"], parts


class LabelLoss(nn.Module):
    """The label loss alone, for a dense model."""

    def __init__(self, base_criterion: nn.Module) -> None:
        super().__init__()
        self.base_criterion = base_criterion

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts by name, like the other losses."""
        return self.base_criterion(logits.float(), labels), {}


class DiffPruningLoss(nn.Module):
    """Label loss and ratio loss, without a teacher.

    predict: makes the logits that labels are compared with from (logits, tokens), for backbones
    whose prediction joins both (LV-ViT's combine_heads).
    cls_weight: of the label loss; 0 ignores labels, so that none are needed.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        keep_rates: Sequence[float],
        ratio_weight: float = 2.0,
        predict: Callable[[Tensor, Tensor], Tensor] | None = None,
        cls_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.base_criterion = base_criterion
        self.keep_rates = tuple(keep_rates)
        self.ratio_weight = ratio_weight
        self.predict = predict
        self.cls_weight = cls_weight

    def forward(self, images: Tensor, outputs: Outputs, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and, by name, its unweighted parts and each stage's mean kept fraction.

        images are for the teacher, which this loss does not use. Where tokens have left the tensor in
        training (keep_decisions is empty), there is no ratio to learn.
        """
        logits, tokens, _, keep_decisions = outputs
        if self.predict is not None:
            logits = self.predict(logits, tokens)
        loss, parts = logits.new_zeros((), dtype=torch.float32), {}
        if self.cls_weight > 0:
            parts["cls"] = self.base_criterion(logits.float(), labels)
            loss = self.cls_weight * parts["cls"]
        if keep_decisions:
            parts["ratio"] = ratio_loss(keep_decisions, self.keep_rates)
            loss = loss + self.ratio_weight / len(self.keep_rates) * parts["ratio"]
        for stage, policy in enumerate(keep_decisions):
            parts[f"kept_{stage}"] = policy.detach().mean()
        return loss, parts


class DistillDiffPruningLoss(DiffPruningLoss):
    """Adds self-distillation from the dense backbone, on the logits and on the tokens kept at the end.

    teacher: a module that returns (logits, tokens) for images; see models.Teacher.
    mse_token: compare tokens by mean squared error (DeiT: features), else by KL divergence
    (LV-ViT: auxiliary logits).
    distill_weight: of both together. token_weight: of the tokens beside the logits, 0 for none.
    temperature: of the logits' KL divergence (Hinton et al., arXiv 1503.02531), published: 1. Above 1, classes that
    the teacher thinks unlikely count for more.
    embeddings: the model has no classifier, and its outputs are compared by cosine, not by KL divergence.
    combine: makes the prediction from (logits, tokens), as predict does. Where tokens are not compared
    (token_weight 0), predictions are, as a part of LV-ViT's would otherwise learn nothing.
    """

    def __init__(
        self,
        teacher: nn.Module,
        base_criterion: nn.Module,
        keep_rates: Sequence[float],
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
        mse_token: bool = True,
        cls_weight: float = 1.0,
        token_weight: float = 1.0,
        temperature: float = 1.0,
        embeddings: bool = False,
        combine: Callable[[Tensor, Tensor], Tensor] = lambda logits, tokens: logits,
    ) -> None:
        super().__init__(base_criterion, keep_rates, ratio_weight, cls_weight=cls_weight)
        self.teacher = teacher
        self.distill_weight = distill_weight
        self.mse_token = mse_token
        self.token_weight = token_weight
        self.temperature = temperature
        self.embeddings = embeddings
        self.combine = combine

    def forward(self, images: Tensor, outputs: Outputs, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As DiffPruningLoss; the teacher sees the same images as the student."""
        loss, parts = super().forward(images, outputs, labels)
        logits, tokens, keep_mask, _ = outputs
        teacher_logits, teacher_tokens = self.teacher(images)
        if self.token_weight == 0:
            logits, teacher_logits = self.combine(logits, tokens), self.combine(teacher_logits, teacher_tokens)
        if self.embeddings:
            parts["cosine"] = difference = cosine_distance(logits, teacher_logits).mean()
        else:
            divergence = kl_divergence(logits, teacher_logits, self.temperature).mean()
            # times its square, so that gradients are of the same size at every temperature
            parts["cls_kl"] = difference = divergence * self.temperature**2
        if self.token_weight > 0:
            parts["token"] = self.token_loss(tokens, teacher_tokens, keep_mask)
            difference = difference + self.token_weight * parts["token"]
        return loss + self.distill_weight * difference, parts

    def token_loss(self, tokens: Tensor, teacher_tokens: Tensor, keep_mask: Tensor) -> Tensor:
        """Mean distance of the (B, N, C) tokens that the (B, N) mask keeps."""
        if self.mse_token:
            distance = (tokens.float() - teacher_tokens.float()).square().mean(dim=-1)
        else:
            distance = kl_divergence(tokens, teacher_tokens)
        # at least 1: a batch that has lost every token has no token loss
        return (distance * keep_mask).sum() / keep_mask.sum().clamp(min=1)
