"""Every patch's feature: stages chosen for it, other image sizes, saving, export."""

import copy
from pathlib import Path

import pytest
import torch
from dynamicvit.models import choose_stages, create_model, describe, from_pretrained, make_dynamic, save_pretrained
from dynamicvit.models.features import FeatureExtractor, FeatureTeacher
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.stages import FOR_FEATURES, spread
from test_families import build, strengthen
from torch import nn

OTHER_SIZE = {"patch14": (42, 70), "": (48, 80)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def deit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 12, "num_heads": 2, "img_size": 96, "patch_size": 8, "num_classes": 5}
    return create_model("deit_tiny", dense=True, **(sizes | changes)).eval()


@pytest.mark.parametrize("speedup", [1.2, 2.0])
def test_features_cost_so_many_times_less(speedup: float) -> None:
    """Of the pass that gives features, not of the one that gives a prediction."""
    dense = deit(depth=6)
    fast = make_dynamic(copy.deepcopy(dense), speedup=speedup, for_features=True)
    size = (96, 96)
    assert count_gflops(dense, size, features=True) / count_gflops(fast, size, features=True) == pytest.approx(
        speedup, rel=0.03
    )
    assert count_gflops(fast, size, features=True) > count_gflops(fast, size)  # whose last block has one token
    assert (fast.scorer, fast.reducer, fast.place) == (FOR_FEATURES.scorer, FOR_FEATURES.reducer, FOR_FEATURES.place)
    assert fast.pruning_loc[-1] == 5
    by_name = choose_stages(describe(dense), speedup, for_features=True)
    assert (by_name.pruning_loc, by_name.keep_rates, by_name.scorer) == (fast.pruning_loc, fast.keep_rates, "outlying")


def test_stages_begin_the_earlier_the_more_is_wanted() -> None:
    """And every block from there to the end has one, as all tokens are read."""
    stages = {speedup: spread(12, speedup, "before", features=True) for speedup in (1.05, 1.3, 1.6, 2, 2.6)}
    assert [loc[0] for loc in stages.values()] == [8, 6, 3, 3, 2]
    assert all(loc == tuple(range(loc[0], 12)) for loc in stages.values())
    assert spread(12, 1.6, "inside", features=True)[-1] == 11 and spread(12, 1.6, "inside", 12)[-1] == 10


def test_five_stages_are_enough_for_a_moderate_speedup() -> None:
    places = [spread(12, speedup, "inside") for speedup in (1.33, 1.69, 1.8)]
    assert places == [(4, 5, 6, 8, 9), (3, 4, 6, 7, 9), (3, 4, 6, 7, 9)]
    assert spread(12, 2, "inside") == tuple(range(2, 11)) and spread(12, 2, "inside", 3) == (2, 5, 8)
    assert spread(6, 1.5, "inside") == (2, 3, 4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True}),
        ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
        ("vit_small_patch16_rope_mixed_224", {"dynamic_img_size": True}),
    ],
)
@torch.no_grad()
def test_images_of_another_size(name: str, changes: dict) -> None:
    """Images of any shape: position embeddings and RoPE follow, and every patch has its feature."""
    dense = strengthen(build(name, **changes))
    height, width = OTHER_SIZE["patch14" if "patch14" in name else ""]
    shown = images(height, width)
    expected, maps = dense.forward_features(shown), dense.forward_intermediates(shown, 2, intermediates_only=True)
    assert maps[0].shape[-2:] == (3, 5)
    model = make_dynamic(copy.deepcopy(dense), (1, 3), (1.0, 1.0), "outlying", "merge_length")
    torch.testing.assert_close(model.forward_features(shown), expected, **CLOSE)
    for ours, theirs in zip(model.forward_intermediates(shown, 2, intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    model.set_keep_rates((0.7, 0.5))
    assert model.forward_features(shown, restore="none").shape[1] == dense.num_prefix_tokens + 7
    fewer = model.forward_features(shown)
    assert fewer.shape == expected.shape and 0.5 < nn.functional.cosine_similarity(fewer, expected, dim=-1).mean() < 1


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_a_model_set_to_another_size(name: str) -> None:
    """By timm's set_input_size, before it becomes dynamic or after."""
    before = strengthen(build(name))
    after = copy.deepcopy(before)
    before.set_input_size(img_size=(48, 80))
    before = make_dynamic(before, (1, 3), (0.7, 0.5), "outlying", "merge_length")
    after = make_dynamic(after, (1, 3), (0.7, 0.5), "outlying", "merge_length")
    after.set_input_size(img_size=(48, 80))
    torch.testing.assert_close(after.forward_features(images(48, 80)), before.forward_features(images(48, 80)))
    assert after.spec.img_size == (48, 80)


@pytest.mark.parametrize("size", [64, (48, 80)])
@torch.no_grad()
def test_saved_and_read_again(size: int | tuple[int, int], tmp_path: Path) -> None:
    fast = make_dynamic(deit(img_size=size), speedup=1.5, for_features=True)
    save_pretrained(fast, tmp_path / "fast")
    again = from_pretrained(tmp_path / "fast")
    shown = images(*again.data_config["input_size"][1:])
    final, maps = again.forward_intermediates(shown, [5, 11])
    expected_final, expected_maps = fast.forward_intermediates(shown, [5, 11])
    assert maps[0].shape == (2, 48, shown.shape[2] // 8, shown.shape[3] // 8)
    torch.testing.assert_close(final, expected_final)
    torch.testing.assert_close(maps, expected_maps)


@torch.no_grad()
def test_extractor_in_a_graph(tmp_path: Path) -> None:
    fast = strengthen(make_dynamic(build(), (1, 3), (0.75, 0.5), "outlying", "merge_length"))
    extractor, shown, others = FeatureExtractor(fast).eval(), images(64, 64), images(64, 64).flip(-1)
    expected = extractor(others)
    torch.testing.assert_close(expected, fast.forward_features(others))
    program = torch.export.export(extractor, (shown,))
    torch.export.save(program, tmp_path / "features.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "features.pt2").module()(others), expected, **CLOSE)


@torch.no_grad()
def test_extractor_in_onnx_runtime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fast = strengthen(make_dynamic(build(), (1, 3), (0.75, 0.5), "outlying", "merge_length"))
    extractor, shown, others = FeatureExtractor(fast).eval(), images(64, 64), images(64, 64, 3).flip(-1)
    path = tmp_path / "features.onnx"
    batch = {0: torch.export.Dim("batch", max=1024)}  # torch 2.7 wants one named
    torch.onnx.export(extractor, (shown,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: others.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), extractor(others), rtol=1e-3, atol=1e-4)


def test_a_teacher_stays_as_it_is() -> None:
    dense = build(proj_drop_rate=0.5)
    teacher = FeatureTeacher(dense).train()
    shown = images(64, 64).requires_grad_()
    features = teacher(shown)
    assert not dense.training and not features.requires_grad and torch.equal(features, teacher(shown))
    assert features.shape == (2, 17, 32)
    with pytest.raises(ValueError, match="a Linear gives no features"):
        FeatureExtractor(nn.Linear(2, 2))


def test_training_on_features_reaches_every_block() -> None:
    student = FeatureExtractor(make_dynamic(build(), (1, 3), (0.75, 0.5), "outlying", "merge_length")).train()
    student(images(64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.model.blocks.parameters())
