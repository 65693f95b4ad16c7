"""Every number of the journal version's published implementation (tests/swin.npz, tests/convnext.npz).

The files hold what the authors' code gave for a tiny DynamicSwin and a tiny DynamicConvNeXt; the rules
that rebuild weights, images and noise are below. Weights carry the published names, so that loading them
is tested as well.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamicvit.losses import DistillDiffPruningLoss
from dynamicvit.models import Teacher, spatial
from dynamicvit.models.spatial import SPATIAL_ARCHS, arithmetic_keep_rates, make_spatial_dynamic, map_published
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

HERE = Path(__file__).parent
FIXED_BUFFERS = ("relative_position_index", "attn_mask")  # in published files; timm computes them
NEW_MODULES = ("score_predictor", "fast")


def assert_close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-4) -> None:
    """Relative to the largest expected number, as single entries may be near 0."""
    expected = torch.from_numpy(np.asarray(expected)).double()
    assert actual.shape == expected.shape
    assert (actual.detach().double() - expected).abs().max() <= rtol * expected.abs().max()


def rebuild_weights(shapes: dict[str, list[int]], salt: str) -> dict[str, Tensor]:
    """A state dict by the published names."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(FIXED_BUFFERS):
            weights[name] = torch.zeros(shape)
            continue
        z = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape).astype(np.float32)
        if (name.endswith(".weight") and len(shape) == 1) or name.endswith("gamma"):
            z = 1 + 0.1 * z
        elif name.endswith(".weight"):
            z = z * 1.5 / np.sqrt(np.prod(shape[1:]))
        else:
            z = 0.1 * z
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


class Reference:
    """One reference file with the student, teacher, images and labels that belong to it."""

    def __init__(self, kind: str) -> None:
        self.numbers = np.load(HERE / f"{kind}.npz")
        self.meta = meta = json.loads(str(self.numbers["meta"]))
        shapes = json.loads(str(self.numbers["shapes"]))
        self.published = rebuild_weights(shapes, meta["salt"])
        self.student = self.build(dense=False)
        self.student.load_state_dict(map_published(self.published, self.student))
        dense_shapes = {name: shape for name, shape in shapes.items() if not any(new in name for new in NEW_MODULES)}
        dense = self.build(dense=True)
        dense.load_state_dict(map_published(rebuild_weights(dense_shapes, meta["salt"] + "teacher."), dense))
        self.teacher = Teacher(dense)
        rng = np.random.default_rng(meta["seed"])
        images = rng.standard_normal((meta["batch"], 3, meta["img_size"], meta["img_size"]))
        labels = rng.dirichlet(np.ones(meta["num_classes"]), meta["batch"])
        self.images, self.labels = (torch.from_numpy(array.astype(np.float32)) for array in (images, labels))

    def build(self, dense: bool) -> nn.Module:
        meta = self.meta
        backbone, sizes, *_ = SPATIAL_ARCHS[f"{meta['kind']}_t"]
        backbone = backbone(num_classes=meta["num_classes"], drop_path_rate=0.0, **{name: meta[name] for name in sizes})
        return backbone if dense else make_spatial_dynamic(backbone, meta["pruning_loc"], meta["keep_rates"])

    def check(self, name: str, value: Tensor, rtol: float = 1e-4) -> None:
        try:
            assert_close(value, self.numbers[name], rtol)
        except AssertionError as error:
            raise AssertionError(f"{name} differs") from error


@pytest.fixture(params=["swin", "convnext"], scope="module")
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


@torch.no_grad()
def test_evaluation(reference: Reference) -> None:
    model, images = reference.student.eval(), reference.images
    model.set_keep_rates(reference.meta["keep_rates"])
    logits, kept, scores, _, _ = model.trace(images)
    reference.check("eval_logits", logits)
    assert [indices.shape[1] for indices in kept] == reference.meta["num_keep"]
    for stage, indices in enumerate(kept):
        expected = torch.from_numpy(reference.numbers[f"eval_kept_stage{stage}"].astype(np.int64))
        assert torch.equal(indices.sort(dim=1).values, expected)
        reference.check(f"eval_keep_logprob_stage{stage}", scores[:, stage])
    assert_close(model(images[:2]), reference.numbers["eval_logits"][:2])  # published Swin failed on two images
    reference.check("eval_logits_one_image", model(images[:1]))
    if reference.meta["other_size"]:
        rng = np.random.default_rng(reference.meta["seed"] + 1000)
        other = rng.standard_normal((2, 3, *reference.meta["other_size"])).astype(np.float32)
        reference.check("eval_logits_other_size", model(torch.from_numpy(other)))


@torch.no_grad()
def test_evaluation_at_other_keep_rates(reference: Reference) -> None:
    model = reference.student.eval()
    for base_rate in (0.9, 0.7, 0.5):
        model.set_keep_rates(arithmetic_keep_rates(base_rate, 3))
        reference.check(f"eval_logits_base_rate_{base_rate}", model(reference.images))
    model.set_keep_rates((1, 1, 1))
    reference.check("eval_logits_all_kept", model(reference.images))
    dense = reference.build(dense=True).eval()
    weights = {
        name: value for name, value in reference.published.items() if not any(new in name for new in NEW_MODULES)
    }
    dense.load_state_dict(map_published(weights, dense))
    reference.check("eval_logits_all_kept", dense(reference.images))


def test_teacher(reference: Reference) -> None:
    logits, features = reference.teacher(reference.images)
    reference.check("teacher_logits", logits)
    reference.check("teacher_features_mean_over_batch_and_locations", features.mean(dim=(0, 1)))


def recorded_sampling(seed: int, log_probs_seen: list[Tensor]):
    """Hard straight-through Gumbel-softmax on the reference's noise."""

    def sample(log_probs: Tensor) -> Tensor:
        rng = np.random.default_rng(seed + 100 + len(log_probs_seen))
        log_probs_seen.append(log_probs)
        noise = torch.from_numpy(rng.gumbel(size=log_probs.shape).astype(np.float32))
        soft = (log_probs + noise).softmax(dim=-1)[..., 0]
        return (soft > 0.5).float() + soft - soft.detach()

    return sample


def test_distillation_step(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = []
    monkeypatch.setattr(spatial, "sample_keep_decision", recorded_sampling(reference.meta["seed"], log_probs))
    outputs = reference.student.train()(reference.images)
    logits, features, keep_mask, keep_decisions = outputs
    reference.check("train_logits", logits)
    reference.check("train_features_mean_over_batch_and_locations", features.mean(dim=(0, 1)))
    reference.check("train_features_first_4_channels", features[..., :4])
    assert keep_mask.shape == features.shape[:2]
    for stage, decision in enumerate(keep_decisions):
        assert np.array_equal(decision.detach().round().numpy(), reference.numbers[f"train_keep_stage{stage}"])
        reference.check(f"train_keep_logprob_stage{stage}", log_probs[stage][..., 0])

    criterion = DistillDiffPruningLoss(
        reference.teacher,
        SoftTargetCrossEntropy(),
        reference.meta["keep_rates"],
        ratio_weight=reference.meta["ratio_weight"],
        distill_weight=reference.meta["distill_weight"],
    )
    loss, parts = criterion(reference.images, outputs, reference.labels)
    reference.check("loss_total", loss)
    for part, name in {"cls": "cls", "ratio": "ratio_sum_over_stages", "cls_kl": "cls_kl", "token": "token"}.items():
        reference.check(f"loss_{name}", parts[part])
    loss.backward()
    check_gradients(reference)


def check_gradients(reference: Reference) -> None:
    """Stored gradients have published names; the loader's own mapping tells which parameter is meant."""
    published_names = reference.numbers["gradnorm_names"].tolist()
    norms = dict(zip(published_names, reference.numbers["gradnorms"], strict=True))
    # a weight that holds its own number tells, after the mapping, where it came from
    numbered = {name: torch.full_like(reference.published[name], number) for number, name in enumerate(published_names)}
    mapped = map_published(numbered, reference.student)
    parameters = dict(reference.student.named_parameters())
    assert sorted(mapped) == sorted(parameters)
    for ours, number in mapped.items():
        name = published_names[int(number.flatten()[0])]
        gradient = parameters[ours].grad
        assert_close(gradient.norm(), norms[name], rtol=1e-3)
        if f"grad/{name}" in reference.numbers.files:
            assert_close(gradient.view(reference.published[name].shape), reference.numbers[f"grad/{name}"], rtol=1e-3)
