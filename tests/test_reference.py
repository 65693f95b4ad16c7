"""Every number of the published implementation (tests/*.npz), to float precision.

The files hold what the authors' released code gave for two tiny models; the rules that rebuild
its weights, images and noise are in rebuild_* below.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICES
from dynamicvit.losses import DiffPruningLoss, DistillDiffPruningLoss
from dynamicvit.models import Teacher, combine_heads, create_model, geometric_keep_rates, pruning
from timm.loss import SoftTargetCrossEntropy

HERE = Path(__file__).parent
KINDS = ("deit", "lvvit")


class Reference:
    """One reference file with the student, teacher, images and labels that belong to it."""

    def __init__(self, kind: str, device: str) -> None:
        self.numbers = np.load(HERE / f"{kind}.npz")
        self.meta = meta = json.loads(str(self.numbers["meta"]))
        arch = {"deit": "deit_small", "lvvit": "lvvit_s"}[kind]
        overrides = {k: meta[k] for k in ("num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")}
        self.student = create_model(arch, pruning_loc=meta["pruning_loc"], keep_rates=meta["keep_rates"], **overrides)
        self.teacher = Teacher(create_model(arch, dense=True, **overrides))
        rebuild_weights(self.student, meta["salt"])
        rebuild_weights(self.teacher.vit, meta["salt"] + "teacher.")
        self.student.to(device)
        self.teacher.to(device)
        rng = np.random.default_rng(meta["seed"])
        images = rng.standard_normal((meta["batch"], 3, 224, 224))
        labels = rng.dirichlet(np.ones(meta["num_classes"]), meta["batch"])
        self.images = torch.from_numpy(images.astype(np.float32)).to(device)
        self.labels = torch.from_numpy(labels.astype(np.float32)).to(device)

    def assert_close(self, name: str, value: torch.Tensor, rtol: float = 1e-4) -> None:
        """Relative to the largest expected number, as single entries may be near 0."""
        expected = torch.from_numpy(np.asarray(self.numbers[name])).double()
        deviation = (value.detach().cpu().double() - expected).abs().max() / expected.abs().max()
        assert deviation <= rtol, f"{name}: off by {deviation:.1e}"


def rebuild_weights(model: torch.nn.Module, salt: str) -> None:
    state = model.state_dict()
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        z = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        elif name.endswith(".weight") and len(shape) == 1:
            value = 1 + 0.1 * z
        elif name.endswith(".weight"):
            value = z * 1.5 / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.1 * z
        state[name] = torch.from_numpy(np.asarray(value, dtype=np.float32)).to(tensor.dtype)
    model.load_state_dict(state)


@pytest.fixture
def recorded_noise(monkeypatch: pytest.MonkeyPatch):
    """Replaces the sampling by hard straight-through Gumbel-softmax on the reference's noise."""

    def install(seed: int) -> None:
        stage = 0

        def sample(log_probs: torch.Tensor) -> torch.Tensor:
            nonlocal stage
            rng = np.random.default_rng(seed + 100 + stage)
            stage += 1
            noise = torch.from_numpy(rng.gumbel(size=log_probs.shape).astype(np.float32)).to(log_probs.device)
            soft = (log_probs + noise).softmax(dim=-1)[..., 0]
            return (soft > 0.5).float() + soft - soft.detach()

        monkeypatch.setattr(pruning, "sample_keep_decision", sample)

    return install


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def reference(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reference:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions in TF32 keep 3 digits
    return Reference(kind, request.param)


def test_state_dict_has_the_published_names(kind: str) -> None:
    reference = Reference(kind, "cpu")
    assert sorted(reference.student.state_dict()) == sorted(reference.numbers["state_dict_names"].tolist())


def test_evaluation(reference: Reference) -> None:
    model = reference.student.eval()
    with torch.no_grad():
        logits, kept = model.forward_pruned(reference.images)
        reference.assert_close("eval_logits", logits)
        for stage, indices in enumerate(kept):
            expected = torch.from_numpy(reference.numbers[f"eval_kept_stage{stage}"].astype(np.int64))
            assert torch.equal(indices.sort(dim=1).values.cpu(), expected)
        for base_rate in (1.0, 0.9, 0.5):
            model.set_keep_rates(geometric_keep_rates(base_rate, 3))
            reference.assert_close(f"eval_logits_base_rate_{base_rate}", model(reference.images))
        logits, tokens = reference.teacher(reference.images)
        reference.assert_close("teacher_logits", logits)
        reference.assert_close("teacher_tokens_mean_over_batch_and_tokens", tokens.mean(dim=(0, 1)))


def test_distillation_step(reference: Reference, recorded_noise) -> None:
    recorded_noise(reference.meta["seed"])
    outputs = reference.student.train()(reference.images)
    logits, tokens, keep_mask, keep_decisions = outputs
    reference.assert_close("train_logits", logits)
    reference.assert_close("train_tokens_mean_over_batch_and_tokens", tokens.mean(dim=(0, 1)))
    assert np.array_equal(keep_mask.round().cpu().numpy(), reference.numbers["train_final_mask"])
    for stage, policy in enumerate(keep_decisions):
        assert np.array_equal(policy.detach().round().cpu().numpy(), reference.numbers[f"train_keep_stage{stage}"])

    criterion = DistillDiffPruningLoss(
        reference.teacher,
        SoftTargetCrossEntropy(),
        reference.meta["keep_rates"],
        mse_token=reference.meta["kind"] == "deit",
    )
    loss, parts = criterion(reference.images, outputs, reference.labels)
    reference.assert_close("loss_total", loss)
    reference.assert_close("loss_cls", parts["cls"])
    reference.assert_close("loss_ratio_sum_over_stages", parts["ratio"])
    reference.assert_close("loss_cls_kl", parts["cls_kl"])
    reference.assert_close("loss_token", parts["token"])

    loss.backward()
    gradients = {name: p.grad for name, p in reference.student.named_parameters() if p.grad is not None}
    stored = [name for name in reference.numbers.files if name.startswith("gradnorm/")]
    assert sorted(gradients) == sorted(name.removeprefix("gradnorm/") for name in stored)
    for name in stored:
        reference.assert_close(name, gradients[name.removeprefix("gradnorm/")].norm(), rtol=1e-3)
    for name in reference.numbers.files:
        if name.startswith("grad/"):
            reference.assert_close(name, gradients[name.removeprefix("grad/")], rtol=1e-3)


def test_step_without_distillation(reference: Reference, recorded_noise) -> None:
    recorded_noise(reference.meta["seed"])
    outputs = reference.student.train()(reference.images)
    predict = combine_heads if reference.meta["kind"] == "lvvit" else None
    logits = predict(*outputs[:2]) if predict else outputs[0]
    reference.assert_close("nodistill_logits", logits)
    criterion = DiffPruningLoss(SoftTargetCrossEntropy(), reference.meta["keep_rates"], predict=predict)
    loss, _ = criterion(reference.images, outputs, reference.labels)
    reference.assert_close("loss_total_nodistill", loss)
