"""Every family of backbones, as small random models: same rules, whatever the embedding, blocks and pooling are."""

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from dynamicvit.models import Teacher, blocks, create_model, make_dynamic, pruning
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.lvvit import LVViT
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

STAGES = (1, 3)
HALF = (0.75, 0.5)
FORMS = [
    (scorer, reducer) for scorer in ("predictor", "attention", "distinct", "random") for reducer in ("drop", "merge")
]


def build(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    """16 patches, unless the name says otherwise."""
    patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
    sizes = {"img_size": 4 * patch, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **(sizes | changes))


def lvvit() -> nn.Module:
    return create_model(
        "lvvit_s", dense=True, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "deit": partial(build, "deit_tiny_patch16_224"),
    "deit_distilled": partial(build, "deit_tiny_distilled_patch16_224"),
    "deit3": partial(build, "deit3_small_patch16_224"),
    "dinov2_registers": partial(build, "vit_small_patch14_reg4_dinov2"),
    "clip": partial(build, "vit_base_patch32_clip_224"),
    "siglip": partial(build, "vit_base_patch16_siglip_224"),
    "average_without_class_token": partial(build, "vit_base_patch16_siglip_gap_224"),
    "average_with_registers": partial(build, "vit_little_patch16_reg4_gap_256"),
    "average_with_class_token": partial(build, global_pool="avg"),
    "average_with_prefix": partial(build, global_pool="avg", pool_include_prefix=True, reg_tokens=2),
    "qk_norm": partial(build, qk_norm=True),
    "norm_after_branch": partial(build, block_fn=ResPostBlock),
    "parallel_block": partial(build, block_fn=ParallelScalingBlock),
    "parallel_branches": partial(build, block_fn=ParallelThingsBlock),
    "dynamic_image_size": partial(build, dynamic_img_size=True),
    "lvvit": lvvit,
    "eva02": partial(build, "eva02_tiny_patch14_224"),
    "eva_without_rope": partial(build, "eva_large_patch14_196"),
    "dinov3": partial(build, "vit_small_patch16_dinov3"),
    "perception_encoder": partial(build, "vit_pe_core_tiny_patch16_384"),
    "rope_without_class_token": partial(build, "eva02_tiny_patch14_224", class_token=False),
    "rope_mixed": partial(build, "vit_small_patch16_rope_mixed_224"),
    "rope_average": partial(build, "vit_mediumd_patch16_rope_reg1_gap_256"),
}


@pytest.fixture(params=FAMILIES)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    return strengthen(FAMILIES[request.param]())


def strengthen(model: nn.Module) -> nn.Module:
    """Weights that are large enough for every token to matter, layer scales included."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if parameter.ndim == 2 else 0.05, generator=generator)
        elif parameter.abs().max() < 1e-2:  # biases, and layer scales that would switch their branch off
            nn.init.normal_(parameter, 0.3, 0.1, generator=generator)
    return model.eval()


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    side = 32 if isinstance(model, LVViT) else 4 * model.patch_embed.patch_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def dynamic(
    dense: nn.Module, scorer: str, reducer: str, keep_rates: tuple[float, float] = HALF, place: str = "before"
) -> nn.Module:
    """A dynamic copy, with predictors that tell tokens apart, that gives all four values in train mode."""
    model = make_dynamic(copy.deepcopy(dense), STAGES, keep_rates, scorer, reducer, place=place)
    strengthen(model.score_predictor)
    model.set_distilled_training(True)
    return model


def can_split(dense: nn.Module) -> bool:
    return all(family_of(dense).find_split(block) is not None for block in dense.blocks)


@pytest.mark.parametrize(
    ("scorer", "reducer", "place"),
    [
        ("predictor", "drop", "before"),
        ("attention", "merge", "before"),
        ("distinct", "merge", "before"),
        ("distinct", "merge", "inside"),
    ],
)
@torch.no_grad()
def test_all_tokens_kept_is_the_dense_model(dense: nn.Module, scorer: str, reducer: str, place: str) -> None:
    images = images_for(dense)
    if place == "inside" and not can_split(dense):
        with pytest.raises(ValueError, match="no place between attention and MLP"):
            dynamic(dense, scorer, reducer, (1, 1), place)
        return
    model, expected = dynamic(dense, scorer, reducer, (1, 1), place), dense(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    model.set_keep_rates(HALF)
    assert (model(images) - expected).abs().max() > 1e-3  # otherwise this test could not see a difference


@torch.no_grad()
def test_a_speedup_is_all_that_lvvit_needs() -> None:
    """Its stem, which is not timm's, tells the image size at which the cost is counted."""
    dense = create_model("lvvit_s", dense=True, img_size=64, num_classes=5).eval()
    gflops = count_gflops(dense, 64)
    model = make_dynamic(dense, speedup=1.3)
    assert gflops / count_gflops(model, 64) == pytest.approx(1.3, rel=0.06)  # 16 tokens leave in whole numbers
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@torch.no_grad()
def test_half_the_tokens(dense: nn.Module) -> None:
    """Runs, costs less, and keeps the tokens that the scorer ranked first."""
    images = images_for(dense)
    dense_gflops = count_gflops(dense, images.shape[-1])
    for scorer, reducer in FORMS:
        model = dynamic(dense, scorer, reducer)
        assert count_gflops(model, images.shape[-1]) < dense_gflops
        trace = model.trace(images)
        assert trace.logits.shape == (2, 5) and trace.logits.isfinite().all() and trace.grid == (4, 4)
        assert [stage.shape for stage in trace.kept] == [(2, 12), (2, 8)]
        for stage, kept in enumerate(trace.kept):
            best = trace.scores[:, stage].nan_to_num(-torch.inf).topk(kept.shape[1], dim=1).indices
            assert torch.equal(kept, best)
        assert set(trace.kept[1][0].tolist()) < set(trace.kept[0][0].tolist())
        assert trace.scores[:, 1].isnan().sum() == 2 * 4
        if scorer != "random":
            logits, kept = model.forward_pruned(images)
            torch.testing.assert_close(logits, trace.logits)
            torch.testing.assert_close(model(images), logits)
            assert all(torch.equal(a, b) for a, b in zip(kept, trace.kept, strict=True))


@torch.no_grad()
def test_dropping_equals_hiding(dense: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked pass, told to keep what the pruned pass kept: positions, RoPE and pooling follow the tokens."""
    images = images_for(dense)
    model = dynamic(dense, "predictor", "drop")
    # The logits of random weights are large, so that e^-16 of a hidden token would still be seen
    monkeypatch.setattr(blocks, "LOG_DROPPED_WEIGHT", -60.0)
    expected, kept = model.forward_pruned(images)
    decisions = iter([torch.zeros(2, 16).scatter(1, stage, 1.0) for stage in kept])
    monkeypatch.setattr(pruning, "sample_keep_decision", lambda _: next(decisions))
    logits, tokens, keep_mask, _ = model.forward_masked(images)
    if not model.tokens_are_logits:  # LV-ViT's maximum takes in tokens that are hidden
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    _, left, removed_mask, _ = model.forward_removed(images)
    assert torch.equal(keep_mask, removed_mask)
    torch.testing.assert_close(left * keep_mask[..., None], tokens * keep_mask[..., None], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merged_token_counts_as_its_copies(dense: nn.Module) -> None:
    """A token of size s is the same as s copies of it in the dense model: in attention and in pooling."""
    image = images_for(dense, count=1)
    torch.manual_seed(0)
    model = make_dynamic(copy.deepcopy(dense), (2,), (0.5,), "random", "merge")
    calls = []
    for block in model.blocks[2:]:
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    trace = model.trace(image)
    logits, groups = trace.logits, trace.groups
    x = calls[0][0]
    num_prefix = x.shape[1] - 8
    kept = groups[0, 0].unique()
    assert len(kept) == 8
    sizes = calls[0][1]["attn_mask"][0, 0, 0, num_prefix:].exp().round().long()
    assert sizes.sum() == 16 and sizes.max() > 1
    assert sorted(sizes.tolist()) == sorted((groups[0, 0] == patch).sum().item() for patch in kept)

    copies = torch.cat([torch.arange(num_prefix), num_prefix + torch.arange(8).repeat_interleave(sizes)])
    x = x[:, copies]
    for block, (_, kwargs) in zip(dense.blocks[2:], calls, strict=True):
        rope = kwargs.get("rope")
        x = block(x) if rope is None else block(x, rope=rope[:, :, copies[num_prefix:] - num_prefix])
    torch.testing.assert_close(logits, dense.forward_head(dense.norm(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reducer", ["drop", "merge"])
def test_predictors_learn(dense: nn.Module, reducer: str) -> None:
    torch.manual_seed(0)
    model = dynamic(dense, "predictor", reducer).train()
    logits, tokens, _, keep_decisions = model(images_for(dense))
    assert len(keep_decisions) == (2 if reducer == "drop" else 0)
    (logits.logsumexp(dim=-1).sum() + tokens.square().mean()).backward()
    for name, parameter in model.score_predictor.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_training_by_hard_selection(dense: nn.Module) -> None:
    images = images_for(dense)
    width = 5 if isinstance(dense, LVViT) else 32
    for scorer, reducer in FORMS[1:]:
        model = dynamic(dense, scorer, reducer).train()
        logits, tokens, keep_mask, keep_decisions = model(images)
        assert logits.shape == (2, 5) and tokens.shape == (2, 16, width) and keep_decisions == []
        assert torch.equal(keep_mask.sum(dim=1), torch.full((2,), 8.0))
        if not model.tokens_are_logits:  # LV-ViT's leave a copy of the best one instead of 0
            assert torch.equal(tokens.abs().sum(dim=-1) > 0, keep_mask > 0)
        model.combine(logits, tokens).logsumexp(dim=-1).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.blocks[0].parameters() if p.requires_grad)


@torch.no_grad()
def test_teacher(dense: nn.Module) -> None:
    images = images_for(dense)
    expected = dense(images)
    teacher = Teacher(dense)
    logits, tokens = teacher.train()(images)
    assert not any(module.training for module in teacher.modules())
    model = dynamic(dense, "attention", "merge", (1, 1))
    assert tokens.shape == (2, 16, 5 if model.tokens_are_logits else 32)
    torch.testing.assert_close(model.combine(logits, tokens), expected)
    # a student that keeps every token is compared with itself
    student_logits, student_tokens, _, _ = model.forward_removed(images)
    torch.testing.assert_close(student_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student_tokens, tokens, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_embeddings(dense: nn.Module) -> None:
    """Without a classifier the forward pass gives pooled embeddings, of the tokens that are left."""
    images = images_for(dense)
    dense.reset_classifier(0)
    for scorer, reducer in FORMS[:4]:
        model = dynamic(dense, scorer, reducer)
        assert model(images).shape == (2, 32)
        model.set_keep_rates((1, 1))
        torch.testing.assert_close(model(images), dense(images), rtol=1e-5, atol=1e-5)
        assert model.train()(images)[0].shape == (2, 32)


@pytest.mark.parametrize("place", ["before", "inside"])
@torch.no_grad()
def test_every_patch_has_a_feature(dense: nn.Module, place: str) -> None:
    """timm's own methods give outputs of the dense model's shapes; with all tokens kept, also of its values."""
    if place == "inside" and not can_split(dense):
        return
    images = images_for(dense)
    model = dynamic(dense, "outlying", "merge", (1, 1), place)
    expected, (final, maps) = dense.forward_features(images), dense.forward_intermediates(images, 3, norm=True)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.forward_features(images), expected, **close)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images), **close)
    answer, answer_maps = model.forward_intermediates(images, 3, norm=True)
    torch.testing.assert_close(answer, final, **close)
    for ours, theirs in zip(answer_maps, maps, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    model.set_keep_rates(HALF)
    copies, restored = (model.forward_features(images, restore=restore) for restore in ("copy", "residual"))
    assert copies.shape == restored.shape == expected.shape
    assert model.forward_features(images, restore="none").shape[1] == model.num_prefix_tokens + 8
    num_patches = [len(image.unique(dim=0)) for image in copies[:, model.num_prefix_tokens :]]
    assert num_patches == [8, 8] and len(restored[0].unique(dim=0)) == restored.shape[1]
    some = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    for ours, theirs in zip(some, maps[:2], strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()


@torch.no_grad()
def test_a_dropped_token_keeps_what_it_was(dense: nn.Module) -> None:
    images = images_for(dense)
    model = dynamic(dense, "predictor", "drop")
    before = dense.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)[0]
    after = model.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)[0]
    _, (kept, _) = model.forward_pruned(images)
    left = torch.ones(2, 16).scatter(1, kept, 0.0).bool()
    torch.testing.assert_close(after[left], before[left], rtol=1e-4, atol=1e-4)
    assert (after[~left] - before[~left]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "scorer"),
    [("deit", "attention"), ("siglip", "attention"), ("lvvit", "distinct"), ("dinov3", "distinct")],
)
@torch.no_grad()
def test_one_graph(family: str, scorer: str) -> None:
    """Compiled without a break, and not compiled again for the next batch; exported with its weights."""
    torch.compiler.reset()
    model = dynamic(strengthen(FAMILIES[family]()), scorer, "merge")
    images, others = images_for(model), images_for(model).flip(-1)
    expected = model(others)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(others), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(others), expected)


def test_unknown_family() -> None:
    with pytest.raises(
        ValueError,
        match="ConvNeXt, Eva, LVViT, PreTrainedVisionModel, SwinTransformer, VisionTransformer; this is a ResNet",
    ):
        make_dynamic(timm.create_model("resnet18"), STAGES, HALF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_pool": "max"}, "does not work with pooling 'max'"),
        ({"attn_layer": "diff"}, "differential attention"),
    ],
)
def test_backbones_that_do_not_fit(changes: dict, message: str) -> None:
    backbone = build(**changes)
    with pytest.raises(ValueError, match=message):
        make_dynamic(backbone, STAGES, HALF, scorer="attention")
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 5)  # stays as it was


def test_one_number_is_no_keep_rates() -> None:
    with pytest.raises(ValueError, match=re.escape("0.5 as a base rate would be (0.5, 0.25)")):
        make_dynamic(build(), (1, 2), 0.5)


def test_features_need_a_speedup() -> None:
    with pytest.raises(ValueError, match="for_features"):
        make_dynamic(build(), STAGES, HALF, for_features=True)


def test_a_name_is_no_model() -> None:
    with pytest.raises(ValueError, match="not its name"):
        make_dynamic("vit_tiny_patch16_224", speedup=1.6)


def test_made_dynamic_once() -> None:
    with pytest.raises(ValueError, match="already dynamic"):
        make_dynamic(make_dynamic(build(), STAGES, HALF), STAGES, HALF)
