"""Every part of the losses against values worked out by hand, in the comments."""

from math import log

import pytest
import torch
from dynamicvit.losses import DiffPruningLoss, DistillDiffPruningLoss, FeatureLoss, LabelLoss, kl_divergence, ratio_loss
from dynamicvit.models import combine_heads
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

KEEP_RATES = (0.5, 0.25)
# 2 images of 4 patches, 2 stages. Kept fractions 3/4 and 2/4, then 1/4 and 0:
#   stage 0: ((3/4 - 1/2)^2 + (2/4 - 1/2)^2) / 2 = (1/16 + 0) / 2 = 1/32
#   stage 1: ((1/4 - 1/4)^2 + (0 - 1/4)^2) / 2   = (0 + 1/16) / 2 = 1/32
KEEP_DECISIONS = [
    torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 0]]),
    torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]]),
]
RATIO = 1 / 32 + 1 / 32

# As logits, logarithms of probabilities: softmax gives those back.
STUDENT_LOGITS = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log()
TEACHER_LOGITS = torch.tensor([[1 / 2, 1 / 2], [1 / 2, 1 / 2]]).log()
# KL(teacher || student) = sum of t log(t / s): 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3, and 0; their mean
CLS_KL = log(4 / 3) / 4

# Soft labels (1, 0) and (1/2, 1/2): - sum of y log s = log 4, and log 2; their mean
LABELS = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
CLS = (log(4) + log(2)) / 2

IMAGES = torch.zeros(2, 3, 8, 8)


class FixedTeacher(nn.Module):
    """Knows one batch of images and its answer to it."""

    def __init__(self, logits: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.logits, self.tokens = logits, tokens

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images is IMAGES
        return self.logits, self.tokens


def distil(tokens: Tensor, teacher_tokens: Tensor, keep_mask: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    teacher = FixedTeacher(TEACHER_LOGITS, teacher_tokens)
    criterion = DistillDiffPruningLoss(teacher, SoftTargetCrossEntropy(), KEEP_RATES, **kwargs)
    return criterion(IMAGES, (STUDENT_LOGITS, tokens, keep_mask, KEEP_DECISIONS), LABELS)


def test_ratio_loss() -> None:
    assert ratio_loss(KEEP_DECISIONS, KEEP_RATES).item() == pytest.approx(RATIO)
    assert ratio_loss(KEEP_DECISIONS[:1], (0.75,)).item() == pytest.approx(1 / 32)  # (0 + 1/16) / 2


def test_ratio_loss_has_a_term_for_every_stage() -> None:
    with pytest.raises(ValueError):
        ratio_loss(KEEP_DECISIONS, (0.5,))


def test_ratio_loss_gradient() -> None:
    """2 (kept fraction - rate) / patches / images: a mean over images, not over the batch's tokens."""
    policy = KEEP_DECISIONS[0].clone().requires_grad_()
    ratio_loss([policy], (0.5,)).backward()
    assert policy.grad[:, 0].tolist() == pytest.approx([2 * 0.25 / 4 / 2, 0])


def test_kl_divergence_has_the_teacher_as_target() -> None:
    assert kl_divergence(STUDENT_LOGITS, TEACHER_LOGITS).tolist() == pytest.approx([log(4 / 3) / 2, 0])
    # the other way round: 1/4 log 1/2 + 3/4 log 3/2
    assert kl_divergence(TEACHER_LOGITS, STUDENT_LOGITS)[0].item() == pytest.approx(log(1 / 2) / 4 + log(3 / 2) * 3 / 4)
    # logits count up to a constant
    assert kl_divergence(STUDENT_LOGITS + 7, TEACHER_LOGITS - 3)[0].item() == pytest.approx(log(4 / 3) / 2)


def test_label_loss() -> None:
    loss, parts = LabelLoss(SoftTargetCrossEntropy())(IMAGES, STUDENT_LOGITS, LABELS)
    assert loss.item() == pytest.approx(CLS) and parts == {}
    # smoothing 0.2: 0.8 of the label's -log s, and 0.2 of their mean over the classes
    smoothed, _ = LabelLoss(LabelSmoothingCrossEntropy(0.2))(IMAGES, STUDENT_LOGITS, torch.tensor([1, 0]))
    first = 0.8 * log(4 / 3) + 0.2 * (log(4) + log(4 / 3)) / 2
    assert smoothed.item() == pytest.approx((first + log(2)) / 2)


@pytest.mark.parametrize(("kwargs", "ratio_weight"), [({}, 2.0), ({"ratio_weight": 3.0}, 3.0)])
def test_without_distillation(kwargs: dict, ratio_weight: float) -> None:
    criterion = DiffPruningLoss(SoftTargetCrossEntropy(), KEEP_RATES, **kwargs)
    tokens = torch.zeros(2, 4, 3)
    loss, parts = criterion(IMAGES, (STUDENT_LOGITS, tokens, KEEP_DECISIONS[-1], KEEP_DECISIONS), LABELS)
    assert loss.item() == pytest.approx(CLS + ratio_weight / 2 * RATIO)
    expected = {"cls": CLS, "ratio": RATIO, "kept_0": 5 / 8, "kept_1": 1 / 8}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected)


def test_labels_are_compared_with_the_joint_prediction() -> None:
    """LV-ViT: logits + 1/2 max over tokens. (0, 0) and a best of (0, 2 log 3) make (1/4, 3/4)."""
    criterion = DiffPruningLoss(SoftTargetCrossEntropy(), KEEP_RATES, predict=combine_heads)
    tokens = torch.zeros(2, 4, 2)
    tokens[:, 2, 1] = 2 * log(3)
    _, parts = criterion(IMAGES, (torch.zeros(2, 2), tokens, KEEP_DECISIONS[-1], KEEP_DECISIONS), LABELS)
    # - sum of y log s: log 4, and 1/2 log 4 + 1/2 log 4/3
    assert parts["cls"].item() == pytest.approx((log(4) + log(4) / 2 + log(4 / 3) / 2) / 2)


def test_token_mse_over_kept_tokens_only() -> None:
    """Kept are token 1 of image 0, off by (1, 3), and tokens 0 and 2 of image 1, off by (2, 0) and (0, 0)."""
    keep_mask = torch.tensor([[0.0, 1, 0, 0], [1, 0, 1, 0]])
    teacher_tokens = torch.full((2, 4, 2), 5.0)
    tokens = torch.full((2, 4, 2), 100.0)  # dropped ones do not count, however far off
    tokens[0, 1] = torch.tensor([6.0, 8.0])
    tokens[1, 0] = torch.tensor([3.0, 5.0])
    tokens[1, 2] = torch.tensor([5.0, 5.0])
    loss, parts = distil(tokens, teacher_tokens, keep_mask)
    token = ((1 + 9) / 2 + (4 + 0) / 2 + 0) / 3  # a mean over channels, then over the three tokens
    assert parts["token"].item() == pytest.approx(token)
    assert parts["cls_kl"].item() == pytest.approx(CLS_KL)
    assert parts["cls"].item() == pytest.approx(CLS)
    assert loss.item() == pytest.approx(CLS + 2 / 2 * RATIO + 0.5 * CLS_KL + 0.5 * token)


def test_token_kl_over_kept_tokens_only() -> None:
    keep_mask = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]])
    tokens, teacher_tokens = torch.randn(2, 2, 4, 2, generator=torch.Generator().manual_seed(0))
    tokens[0, 1], teacher_tokens[0, 1] = STUDENT_LOGITS[0], TEACHER_LOGITS[0]  # 1/2 log 4/3, see above
    tokens[1, 0], teacher_tokens[1, 0] = torch.zeros(2), torch.tensor([1 / 4, 3 / 4]).log()
    second = log(1 / 2) / 4 + log(3 / 2) * 3 / 4
    loss, parts = distil(tokens, teacher_tokens, keep_mask, mse_token=False)
    token = (log(4 / 3) / 2 + second) / 2
    assert parts["token"].item() == pytest.approx(token)
    assert loss.item() == pytest.approx(CLS + RATIO + 0.5 * CLS_KL + 0.5 * token)


def test_weights_of_the_total() -> None:
    tokens = torch.ones(2, 4, 2)
    loss, parts = distil(tokens, tokens + 2, torch.ones(2, 4), ratio_weight=6.0, distill_weight=0.25)
    assert parts["token"].item() == pytest.approx(4)
    assert loss.item() == pytest.approx(CLS + 6 / 2 * RATIO + 0.25 * (CLS_KL + 4))


def test_temperature() -> None:
    """At 1/2 probabilities are squared: (1/4, 3/4) become (1/10, 9/10), halves stay, KL is 1/2 log (5 * 5/9)."""
    tokens = torch.zeros(2, 4, 2)
    _, parts = distil(tokens, tokens, torch.ones(2, 4), temperature=0.5)
    assert parts["cls_kl"].item() == pytest.approx(0.5**2 * log(5 / 3) / 2)


@pytest.mark.parametrize("mse_token", [True, False])
def test_nothing_kept_has_no_token_loss(mse_token: bool) -> None:
    tokens, teacher_tokens = torch.randn(2, 2, 4, 2, generator=torch.Generator().manual_seed(0))
    tokens.requires_grad_()
    loss, parts = distil(tokens, teacher_tokens, torch.zeros(2, 4), mse_token=mse_token)
    assert parts["token"].item() == 0
    assert loss.item() == pytest.approx(CLS + RATIO + 0.5 * CLS_KL)
    loss.backward()
    assert torch.equal(tokens.grad, torch.zeros(2, 4, 2))


def test_distances_are_measured_in_float32() -> None:
    """300 squared is more than float16 can hold."""
    tokens = torch.full((2, 4, 2), 300.0, dtype=torch.float16)
    _, parts = distil(tokens, torch.zeros_like(tokens), torch.ones(2, 4))
    assert parts["token"].item() == 90000


def test_gradient_reaches_every_output() -> None:
    logits, tokens = STUDENT_LOGITS.clone().requires_grad_(), torch.ones(2, 4, 2, requires_grad=True)
    decisions = [policy.clone().requires_grad_() for policy in KEEP_DECISIONS]
    teacher = FixedTeacher(TEACHER_LOGITS, torch.zeros(2, 4, 2))
    criterion = DistillDiffPruningLoss(teacher, SoftTargetCrossEntropy(), KEEP_RATES)
    criterion(IMAGES, (logits, tokens, KEEP_DECISIONS[-1], decisions), LABELS)[0].backward()
    # logits: (s - y) / 2 of the label loss and 0.5 (s - t) / 2 of the teacher's
    assert logits.grad[0].tolist() == pytest.approx([(1 / 4 - 1) / 2 + (1 / 4 - 1 / 2) / 4, 3 / 8 + 1 / 16])
    # tokens: 0.5 * 2 (x - t) / channels, for the one token kept
    expected = torch.zeros(2, 4, 2)
    expected[0, 1] = 0.5
    torch.testing.assert_close(tokens.grad, expected)
    assert all(policy.grad.abs().sum() > 0 for policy in decisions)


def test_without_a_token_loss_the_whole_prediction_is_compared() -> None:
    """LV-ViT's takes in its tokens: head + max of tokens / 2. Here that turns the student's into the teacher's."""
    tokens = 2 * (TEACHER_LOGITS - STUDENT_LOGITS)[:, None]
    loss, parts = distil(
        tokens, torch.zeros_like(tokens), torch.ones(2, 1), token_weight=0, cls_weight=0, combine=combine_heads
    )
    assert parts["cls_kl"].item() == pytest.approx(0, abs=1e-6) and "token" not in parts
    assert loss.item() == pytest.approx(2 / 2 * RATIO)  # ratio weight over stages


def test_features_by_cosine_and_size() -> None:
    teacher = nn.Identity()
    target = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    features = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]], requires_grad=True)
    # cosine distances 1 and 0; lengths 3 for 3, and 3 for 2: (3/2 - 1)^2 = 1/4
    loss, parts = FeatureLoss(teacher, size_weight=0.4)(target, features, LABELS)
    assert parts["cosine"].item() == pytest.approx(1 / 2) and parts["size"].item() == pytest.approx(1 / 8)
    assert loss.item() == pytest.approx(1 / 2 + 0.4 / 8)
    loss.backward()
    assert features.grad.abs().sum() > 0
    same, _ = FeatureLoss(teacher)(target, target, LABELS)
    assert same.item() == pytest.approx(0, abs=1e-6)
