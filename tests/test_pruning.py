"""What is dropped, what still sees what, and that dropping everything harms nothing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from conftest import DEVICES
from dynamicvit.losses import DiffPruningLoss, DistillDiffPruningLoss
from dynamicvit.models import ARCHS, Teacher, combine_heads, create_model, make_dynamic, pruning
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 2}
STAGES = (1, 2, 3)
RATES = (0.7, 0.5, 0.3)
KINDS = ("deit_small", "lvvit_s")
AMP_DTYPES = (None, torch.bfloat16, torch.float16)


def build(arch: str, dense: bool = False, **changes) -> VisionTransformer:
    """A tiny model whose weights are large enough for every token to matter."""
    dynamic = {} if dense else {"pruning_loc": STAGES}
    return strengthen(create_model(arch, dense=dense, **(TINY | dynamic | changes)))


def strengthen(vit: VisionTransformer) -> VisionTransformer:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(vit.named_parameters()):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if parameter.ndim == 2 or "embed" in name else 0.05, generator=generator)
    return vit.eval()


def timm_vit(**changes) -> VisionTransformer:
    kwargs = {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5} | changes
    return strengthen(timm.create_model("vit_tiny_patch16_224", **kwargs))


# Dense backbones, each with images of a size that it takes: 4 x 4 patches, the last 4 x 6.
BACKBONES = {
    "deit": (lambda: build("deit_small", dense=True), (32, 32)),
    "lvvit": (lambda: build("lvvit_s", dense=True), (32, 32)),
    "timm": (timm_vit, (64, 64)),
    "timm_registers": (lambda: timm_vit(reg_tokens=4), (64, 64)),
    "timm_separate_pos_embed": (lambda: timm_vit(reg_tokens=2, no_embed_class=True, dynamic_img_size=True), (64, 64)),
    "timm_not_square": (lambda: timm_vit(img_size=(64, 96)), (64, 96)),
}


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> tuple[VisionTransformer, Tensor]:
    make, size = BACKBONES[request.param]
    return make(), random_images(size)


def random_images(size: Sequence[int] = (32, 32), count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def decide(monkeypatch: pytest.MonkeyPatch, decisions: Sequence[Tensor]) -> list[Tensor]:
    """Replaces the sampling: stage after stage, these (B, N) decisions.

    Returns a list that will hold the (B, N, 2) log-probabilities that the predictors gave.
    """
    log_probs = []

    def sample(stage_log_probs: Tensor) -> Tensor:
        log_probs.append(stage_log_probs)
        return decisions[len(log_probs) - 1]

    monkeypatch.setattr(pruning, "sample_keep_decision", sample)
    return log_probs


def random_decisions(num_patches: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(count, num_patches, generator=generator) < 0.7).float() for _ in STAGES]


def forward_removed(model: VisionTransformer, image: Tensor, decisions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The forward pass of one image with dropped tokens really taken out, decisions being (N,).

    Returns (1, classes) logits and the tokens that are left, as the adapter gives them.
    """
    x = model.adapter.embed(model, image[None]).x
    num_prefix = model.num_prefix_tokens
    left = torch.arange(x.shape[1] - num_prefix)
    stages = dict(zip(model.pruning_loc, decisions, strict=True))
    for i, block in enumerate(model.blocks):
        if i in stages:
            keep = stages[i][left] == 1
            left = left[keep]
            x = torch.cat([x[:, :num_prefix], x[:, num_prefix:][:, keep]], dim=1)
        x = block(x)
    return model.adapter.outputs(model, model.norm(x), None)


# --- Selection in the evaluation forward


class GivenTokens(nn.Module):
    """Stands for the patch embedding: channel 0 is the patch's number, channel 1 the image's."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.zeros(len(images), 16, 32)
        tokens[..., 0] = torch.arange(16)
        tokens[..., 1] = torch.arange(len(images))[:, None]
        return tokens


class GivenScores(nn.Module):
    """Stands for a predictor: log P(keep) by image and original patch number."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, tokens: Tensor, policy: Tensor | None = None) -> Tensor:
        log_keep = self.scores[tokens[..., 1].long(), tokens[..., 0].long()]
        return torch.stack([log_keep, -log_keep], dim=-1)


class RecordingBlock(nn.Module):
    """Leaves tokens alone, and remembers the patch numbers of every image it has seen."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        self.seen = [sorted(image) for image in x[:, 1:, 0].int().tolist()]
        return x


def test_selection_by_hand() -> None:
    model = build("deit_small", keep_rates=(0.6, 0.35, 0.05)).eval()
    assert model.tokens_kept(16) == [9, 5, 1]  # int(9.6), int(5.6), and one rather than int(0.8)
    model.patch_embed = GivenTokens()
    nn.init.zeros_(model.pos_embed)
    nn.init.zeros_(model.cls_token)
    model.blocks = nn.ModuleList(RecordingBlock() for _ in range(4))
    patch = torch.arange(16.0)
    prefer = torch.zeros(2, 16)
    prefer[0, [0, 1, 2, 8, 9, 11, 14, 15]] = 100  # image 0 has lost 0, 1 and 2 by then
    prefer[1, [1, 3, 5, 7, 12]] = 100  # and image 1 has lost 12
    scores = [
        torch.stack([patch, -patch]),  # image 0 keeps the last nine, image 1 the first nine
        prefer - patch,  # the preferred ones, then the lower numbers
        torch.stack([-(patch - 11).abs(), -(patch - 4.9).abs()]),  # the one closest to 11, to 4.9
    ]
    for stage, table in enumerate(scores):
        model.score_predictor[stage] = GivenScores(table)
    logits, kept = model.forward_pruned(torch.zeros(2, 3, 32, 32))

    expected = [
        [[7, 8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
        [[8, 9, 11, 14, 15], [0, 1, 3, 5, 7]],
        [[11], [5]],
    ]
    assert [stage.sort(dim=1).values.tolist() for stage in kept] == expected
    everything = [list(range(16))] * 2
    assert [block.seen for block in model.blocks] == [everything, *expected]
    assert logits.shape == (2, 5)


def test_best_scored_come_first() -> None:
    model = build("deit_small", pruning_loc=(0,), keep_rates=(0.2,)).eval()
    model.patch_embed = GivenTokens()
    nn.init.zeros_(model.pos_embed)
    model.score_predictor[0] = GivenScores(-(torch.arange(16.0) - 6.2).abs()[None])
    assert model.forward_pruned(torch.zeros(1, 3, 32, 32))[1][0].tolist() == [[6, 7, 5]]


def test_everything_kept_equals_the_dense_backbone(backbone: tuple[VisionTransformer, Tensor]) -> None:
    vit, images = backbone
    with torch.no_grad():
        expected = vit(images)
        model = make_dynamic(vit, STAGES, (1, 1, 1)).eval()
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        model.set_keep_rates((0.2, 0.2, 0.2))
        assert (model(images) - expected).abs().max() > 1e-3  # otherwise this test could not see a difference


def test_eval_equals_removing_the_selected(backbone: tuple[VisionTransformer, Tensor]) -> None:
    vit, images = backbone
    model = strengthen(make_dynamic(vit, STAGES, RATES))
    num_patches = model.patch_embed.num_patches
    with torch.no_grad():
        logits, kept = model.forward_pruned(images)
        for b in range(len(images)):
            decisions = [torch.zeros(num_patches).index_fill(0, stage[b], 1) for stage in kept]
            expected, tokens = forward_removed(model, images[b], decisions)
            torch.testing.assert_close(logits[b : b + 1], model.combine(expected, tokens), rtol=1e-4, atol=1e-5)


# --- The policy in the training forward


@pytest.mark.parametrize("num_prefix", [1, 3])
def test_policy_bias_is_the_papers_formula(num_prefix: int) -> None:
    """softmax(a + bias) and its gradient against exp(a_ij) G_ij, normalised; G_ij = 1 if i = j else P_j."""
    policy = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    size = num_prefix + 4
    a = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    towards = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1))

    def formula(policy: Tensor) -> Tensor:
        weights = torch.empty(2, 1, size, size)
        for b in range(2):
            for i in range(size):
                for j in range(size):
                    g = 1.0 if i == j or j < num_prefix else policy[b, j - num_prefix]
                    weights[b, 0, i, j] = a[b, 0, i, j].exp() * g
        return weights / weights.sum(dim=-1, keepdim=True)

    def value_and_gradient(attention: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = policy.clone().requires_grad_()
        weights = attention(leaf)
        (weights * towards).sum().backward()
        return weights.detach(), leaf.grad

    expected, expected_gradient = value_and_gradient(formula)
    weights, gradient = value_and_gradient(lambda p: (a + pruning.policy_bias(p, num_prefix)).softmax(dim=-1))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert (expected_gradient.abs() > 1e-4).all()  # dropped tokens' decisions included


def test_dropped_tokens_are_hidden_but_see_themselves() -> None:
    bias = pruning.policy_bias(torch.tensor([[0.0, 1.0]]), num_prefix=1)
    weights = bias.softmax(dim=-1)[0, 0]  # of equal scores; rows and columns: class token, dropped, kept
    expected = torch.tensor([[1 / 2, 0, 1 / 2], [1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, 1 / 2]])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reducer", ["drop", "merge"])
def test_attention_bias_is_aligned(reducer: str) -> None:
    """Rows begin at multiples of 8, or CUDA's fused attention copies the bias in every block."""
    model = build("deit_tiny", reducer=reducer).to("meta")  # strides alone, for what is done beside the CPU
    biases = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: biases.append(kwargs["attn_mask"]), with_kwargs=True)
    model.train()(torch.rand(2, 3, 32, 32, device="meta"))
    biases = [bias for bias in biases if bias is not None]
    assert biases and any(bias.shape[-1] % 8 for bias in biases)
    assert all(stride % 8 == 0 for bias in biases for stride in bias.stride()[:-1])


def test_hiding_equals_removing(backbone: tuple[VisionTransformer, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = backbone
    model = make_dynamic(vit, STAGES, RATES)
    decisions = random_decisions(model.patch_embed.num_patches)
    decide(monkeypatch, decisions)
    with torch.no_grad():
        logits, tokens, keep_mask, _ = model.eval().forward_masked(images)
        for b in range(len(images)):
            expected_logits, expected_tokens = forward_removed(model, images[b], [stage[b] for stage in decisions])
            torch.testing.assert_close(logits[b : b + 1], expected_logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tokens[b, keep_mask[b] == 1], expected_tokens[0], rtol=1e-4, atol=1e-4)


def test_predictors_score_as_if_dropped_tokens_were_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("deit_small")
    decisions = random_decisions(16)
    log_probs = decide(monkeypatch, decisions)
    with torch.no_grad():
        model.forward_masked(random_images())
        x = model.adapter.embed(model, random_images()[:1]).x
        left = torch.arange(16)
        for stage, block in enumerate(model.blocks[:3]):  # stage s comes before block s + 1
            x = block(x)
            expected = model.score_predictor[stage](x[:, 1:])
            torch.testing.assert_close(log_probs[stage][0, left], expected[0], rtol=1e-4, atol=1e-4)
            keep = decisions[stage][0, left] == 1
            left = left[keep]
            x = torch.cat([x[:, :1], x[:, 1:][:, keep]], dim=1)


def test_dropped_stays_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = torch.zeros(3, 1, 16)
    first[:, :8] = 1  # the first half
    second[:, ::2] = 1  # the even ones, of the second half too
    third[:] = 1  # all, too late
    decide(monkeypatch, (first, second, third))
    _, _, keep_mask, keep_decisions = build("deit_small").train()(random_images(count=1))
    kept = [policy[0].nonzero().flatten().tolist() for policy in keep_decisions]
    assert kept == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 4, 6], [0, 2, 4, 6]]
    assert torch.equal(keep_mask, keep_decisions[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_training_outputs(kind: str) -> None:
    logits, tokens, keep_mask, keep_decisions = build(kind).train()(random_images(count=3))
    assert logits.shape == (3, 5)
    assert tokens.shape == ((3, 16, 32) if kind == "deit_small" else (3, 16, 5))
    assert keep_mask.shape == (3, 16) and not keep_mask.requires_grad
    assert [policy.shape for policy in keep_decisions] == [(3, 16)] * 3
    for policy in keep_decisions:
        assert policy.requires_grad
        assert set(policy.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("half_weights", [False, True])
def test_fresh_predictor_tells_tokens_apart_in_bfloat16(half_weights: bool) -> None:
    """Its probabilities are all near 1/2, where bfloat16 has too few numbers for their logarithms."""
    torch.manual_seed(0)
    predictor = pruning.Predictor(192)
    predictor.apply(init_weights_vit_timm)
    tokens = torch.randn(1, 196, 192)
    expected = predictor(tokens)[0, :, 0]
    if half_weights:
        scores = predictor.bfloat16()(tokens.bfloat16())[0, :, 0]
    else:
        with autocast(torch.bfloat16):
            scores = predictor(tokens)[0, :, 0]
    best, expected_best = (set(s.topk(98).indices.tolist()) for s in (scores, expected))
    assert len(best & expected_best) > 90  # by chance 49


def test_sampled_share_follows_the_log_probabilities() -> None:
    torch.manual_seed(0)
    log_probs = torch.tensor([0.2, 0.8]).log().expand(100, 100, 2)
    decisions = pruning.sample_keep_decision(log_probs)
    assert set(decisions.unique().tolist()) <= {0.0, 1.0}
    assert decisions.mean().item() == pytest.approx(0.2, abs=0.02)  # five standard deviations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp_dtype", AMP_DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_reaches_dropped_decisions(
    kind: str, amp_dtype: torch.dtype | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mixed precision too, though a dropped token's weight among 196 is less than float16 can hold."""
    model = build(kind, img_size=112).train().to(device)
    images = random_images((112, 112), count=8).to(device)
    dropped_once = random_decisions(196, count=8)[0] == 0

    def gradients(amp_dtype: torch.dtype | None, scale: float) -> Tensor:
        """(S, B, N), of the decisions; scale is what GradScaler begins with for float16."""
        decisions = [stage.to(device).requires_grad_() for stage in random_decisions(196, count=8)]
        decide(monkeypatch, decisions)
        with autocast(amp_dtype, device):
            logits = model(images)[0]
        (logits.float().logsumexp(dim=-1).mean() * scale).backward()
        return torch.stack([stage.grad for stage in decisions]).cpu() / scale

    expected = gradients(None, 1)
    assert (expected[0][dropped_once] != 0).all()
    scale, tolerance = (65536, 0.01) if amp_dtype == torch.float16 else (1, 0.05)
    for stage, reached in enumerate(gradients(amp_dtype, scale)):
        deviation = (reached - expected[stage])[dropped_once if stage == 0 else ...].norm()
        assert deviation < tolerance * expected[stage].norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp_dtype", AMP_DTYPES)
def test_training_forward_is_one_graph(kind: str, amp_dtype: torch.dtype | None) -> None:
    """Compiled as the command line does it: the same loss and gradients."""
    torch.compiler.reset()  # other tests have compiled the same function
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, images = build(kind).train(), random_images()
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        with autocast(amp_dtype):
            logits, tokens, _, decisions = model(images)
        (logits.float().logsumexp(dim=-1).sum() + tokens.float().square().mean() + decisions[-1].sum()).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append([logits.detach(), decisions[-1].detach(), torch.cat(gradients)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_predictor_averages_over_kept_tokens_only() -> None:
    predictor = build("deit_small").score_predictor[0]
    tokens = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    policy = random_decisions(16)[0]
    with torch.no_grad():
        hidden = predictor(tokens, policy)
        for b in range(2):
            keep = policy[b] == 1
            torch.testing.assert_close(hidden[b, keep], predictor(tokens[b : b + 1, keep])[0])
        assert (hidden - predictor(tokens)).abs().max() > 1e-3
        torch.testing.assert_close(hidden.exp().sum(dim=-1), torch.ones(2, 16))


# --- An image that loses every token (the published code's NaN)


def push_to_drop(model: VisionTransformer, strength: float) -> None:
    """Makes P(keep) / P(drop) of every token about exp(-2 * strength)."""
    for predictor in model.score_predictor:
        last = predictor.out_conv[-2]
        nn.init.normal_(last.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            last.bias.copy_(torch.tensor([-strength, strength]))


def build_criteria(kind: str, model: VisionTransformer) -> tuple[DistillDiffPruningLoss, DiffPruningLoss]:
    teacher = Teacher(build(kind, dense=True))
    labels = SoftTargetCrossEntropy()
    lvvit = kind == "lvvit_s"
    return (
        DistillDiffPruningLoss(teacher, labels, model.keep_rates, mse_token=not lvvit),
        DiffPruningLoss(labels, model.keep_rates, predict=combine_heads if lvvit else None),
    )


def autocast(dtype: torch.dtype | None, device: str = "cpu") -> AbstractContextManager:
    return torch.autocast(device, dtype=dtype) if dtype else nullcontext()


LABELS = torch.tensor([[0.9, 0.1, 0, 0, 0], [0, 0, 0.3, 0.7, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp_dtype", AMP_DTYPES)
@pytest.mark.parametrize("base_rate", [0.3, 0.1])
def test_everything_dropped_stays_finite(kind: str, amp_dtype: torch.dtype | None, base_rate: float) -> None:
    model = build(kind, base_rate=base_rate).train()
    push_to_drop(model, strength=30)
    images = random_images()
    for criterion in build_criteria(kind, model):
        model.zero_grad()
        with autocast(amp_dtype):
            outputs = model(images)
            loss, parts = criterion(images, outputs, LABELS)
        loss.backward()
        logits, tokens, keep_mask, keep_decisions = outputs
        assert all(policy.sum() == 0 for policy in keep_decisions) and keep_mask.sum() == 0
        assert all(value.isfinite().all() for value in (logits, tokens, loss, *parts.values()))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert all(p.grad is not None for p in model.score_predictor.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_empty_image_does_not_touch_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind).eval()
    decisions = random_decisions(16)
    decide(monkeypatch, decisions)
    with torch.no_grad():
        expected = model.forward_masked(random_images())[0]
        for stage in decisions:
            stage[0] = 0
        decide(monkeypatch, decisions)
        logits = model.forward_masked(random_images())[0]
    torch.testing.assert_close(logits[1], expected[1])
    assert not torch.allclose(logits[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_class_token_alone_carries_the_image(kind: str) -> None:
    model = build(kind).eval()
    push_to_drop(model, strength=30)
    images = random_images()
    with torch.no_grad():
        logits = model.forward_masked(images)[0]
        for b in range(2):
            expected, tokens = forward_removed(model, images[b], [torch.zeros(16)] * 3)
            assert tokens.shape[1] == 0
            torch.testing.assert_close(logits[b : b + 1], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_recovers_from_dropping_everything(kind: str) -> None:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "depth": 2}
    model = build(kind, **small, pruning_loc=(1,), keep_rates=(0.3,)).train()
    push_to_drop(model, strength=4)
    criterion = build_criteria(kind, model)[0]
    criterion.teacher = Teacher(build(kind, dense=True, **small))
    optimizer = torch.optim.Adam(model.score_predictor.parameters(), lr=0.01)
    images, labels = random_images((16, 16), count=8), LABELS.repeat(4, 1)
    kept = []
    for _ in range(100):
        loss, parts = criterion(images, model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(parts["kept_0"].item())
    assert kept[0] == 0
    assert sum(kept[-20:]) / 20 == pytest.approx(0.3, abs=0.15)


# --- Sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("img_size", "patch_size", "kept"),
    [(160, 16, [70, 30]), (224, 16, [137, 58]), (384, 16, [403, 172]), (32, 4, [44, 19]), (16, 8, [2, 1])],
)
def test_any_size(kind: str, img_size: int, patch_size: int, kept: list[int]) -> None:
    """kept: int(N * 0.7), int(N * 0.3) of the N = (img_size / patch_size)^2 patches."""
    model = build(
        kind, img_size=img_size, patch_size=patch_size, depth=3, pruning_loc=(1, 2), keep_rates=(0.7, 0.3)
    ).eval()
    num_patches = (img_size // patch_size) ** 2
    assert model.tokens_kept(num_patches) == kept
    images = random_images((img_size, img_size), count=1)
    with torch.no_grad():
        logits, indices = model.forward_pruned(images)
        assert logits.shape == (1, 5)
        assert [stage.shape for stage in indices] == [(1, count) for count in kept]
        assert len(set(indices[0][0].tolist())) == kept[0] and indices[0].max() < num_patches
        assert model.train()(images)[2].shape == (1, num_patches)


# --- Teacher


def test_teacher_stays_in_eval_mode() -> None:
    teacher = Teacher(build("lvvit_s", dense=True).train())
    criterion = DistillDiffPruningLoss(teacher, SoftTargetCrossEntropy(), RATES)
    criterion.train()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    logits, tokens = teacher(random_images().requires_grad_())
    assert not logits.requires_grad and not tokens.requires_grad
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_outputs_are_the_dense_forward(kind: str) -> None:
    vit = build(kind, dense=True)
    with torch.no_grad():
        expected = vit(random_images())
        logits, tokens = Teacher(vit)(random_images())
    assert tokens.shape == ((2, 16, 32) if kind == "deit_small" else (2, 16, 5))
    torch.testing.assert_close(combine_heads(logits, tokens) if kind == "lvvit_s" else logits, expected)


def test_combined_heads_by_hand() -> None:
    token_logits = torch.tensor([[[2.0, -4.0, 0.0], [1.0, -2.0, 6.0]]])
    assert combine_heads(torch.tensor([[1.0, 1.0, 1.0]]), token_logits).tolist() == [[2.0, 0.0, 4.0]]


# --- Precision


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_learn_the_same_in_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient, with a teacher and the same decisions, has the direction of float32's."""
    images, labels = random_images(count=16), torch.randn(16, 5).softmax(dim=-1)
    decisions = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.8).float().cumprod(dim=0)
    gradients = []
    for amp_dtype in (None, torch.bfloat16):
        model, teacher = build(kind, mlp_ratio=1).train(), Teacher(build(kind, dense=True))
        criterion = DistillDiffPruningLoss(teacher, SoftTargetCrossEntropy(), RATES, mse_token=kind == "deit_small")
        # straight through: these decisions, with the gradient of the probabilities
        stages = iter(decisions)
        monkeypatch.setattr(
            pruning,
            "sample_keep_decision",
            lambda log_probs, stages=stages: next(stages) + (p := log_probs.float().exp()[..., 0]) - p.detach(),
        )
        with autocast(amp_dtype):
            loss, _ = criterion(images, model(images), labels)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.score_predictor.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half_weights", [False, True], ids=["autocast", "weights"])
def test_evaluation_in_bfloat16(kind: str, half_weights: bool) -> None:
    model, images = build(kind, keep_rates=(1, 1, 1)), random_images()  # rounding could change a close choice
    expected = model(images)
    if half_weights:
        logits = model.bfloat16()(images.bfloat16())
    else:
        with autocast(torch.bfloat16):
            logits = model(images)
    assert torch.cosine_similarity(logits.float(), expected, dim=1).min() > 0.99


# --- What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_rate": 0.0}, r"\(0, 1\]"),
        ({"base_rate": 1.1}, r"\(0, 1\]"),
        ({"base_rate": -0.5}, r"\(0, 1\]"),
        ({"base_rate": float("nan")}, r"\(0, 1\]"),
        ({"keep_rates": (0.5, 0.6, 0.3)}, "cannot grow"),
        ({"keep_rates": (0.5, 0.3)}, "2 keep rates for 3"),
        ({"pruning_loc": (1, 2, 4)}, r"0\.\.3"),
        ({"pruning_loc": (-1, 2, 3)}, "block numbers"),
        ({"pruning_loc": (2, 1, 3)}, "ascending"),
        ({"pruning_loc": (1, 1, 3)}, "ascending"),
        ({"pruning_loc": ()}, "block numbers"),
        ({"img_size": 36}, "8 does not divide input size 36"),
        ({"num_heads": 3}, "32 cannot be divided among 3 heads"),
        ({"embed_dim": 0}, "embed_dim must be positive"),
        ({"depth": -1}, "depth must be positive"),
        ({"num_heads": -2}, "num_heads must be positive"),
    ],
)
def test_misfits(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("deit_small", **changes)


def test_unknown_arch_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="deit_smal'") as error:
        create_model("deit_smal")
    assert all(arch in str(error.value) for arch in ARCHS)


def test_another_kind_of_model() -> None:
    with pytest.raises(ValueError, match="this is a ResNet"):
        make_dynamic(timm.create_model("resnet18"), STAGES, RATES)


def test_refused_backbone_stays_as_it_is() -> None:
    vit = timm_vit()
    with pytest.raises(ValueError, match="cannot grow"):
        make_dynamic(vit, STAGES, (0.1, 0.2, 0.3))
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_lvvit_needs_an_even_patch_size() -> None:
    with pytest.raises(ValueError, match="even"):
        build("lvvit_s", img_size=35, patch_size=5)
