"""Dynamic Swin and ConvNeXt: which locations go where, on any of timm's, at any size and in any dtype."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from conftest import DEVICES, MAIN, TORCHRUN, launch, run_main
from dynamicvit.data.shapes import Shapes
from dynamicvit.losses import DistillDiffPruningLoss, LabelLoss
from dynamicvit.models import Teacher, spatial
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.spatial import (
    SPATIAL_ARCHS,
    adapter_of,
    arithmetic_keep_rates,
    make_spatial_dynamic,
    map_published,
)
from timm.models import SwinTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

FAMILIES = ("swin_t", "convnext_t")
STAGES = (1, 2, 3)
RATES = (0.7, 0.5, 0.3)
TINY_SIZES = {
    "swin_t": {"embed_dim": 8, "depths": (1, 1, 5, 1), "num_heads": (1, 2, 2, 2), "window_size": 2},
    "convnext_t": {"embed_dim": 8, "depths": (1, 1, 5, 1)},
}


def build_dense(arch: str, img_size: int | tuple[int, int] = 64, **options) -> nn.Module:
    """A tiny backbone, its third stage 4 x 4 on images of 64 pixels, with weights that let every location matter."""
    constructor, *_ = SPATIAL_ARCHS[arch]
    return strengthen(constructor(num_classes=5, img_size=img_size, **(TINY_SIZES[arch] | options)))


def build(arch: str, rates: Sequence[float] = RATES, merge_streams: bool = False, **options) -> nn.Module:
    return strengthen(make_spatial_dynamic(build_dense(arch, **options), STAGES, rates, merge_streams))


def strengthen(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif parameter.ndim > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def random_images(size: Sequence[int] = (64, 64), count: int = 3) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def decide(monkeypatch: pytest.MonkeyPatch, decisions: Sequence[Tensor]) -> None:
    """Replaces the sampling: predictor after predictor, these (B, N) decisions."""
    decisions = iter(decisions)
    monkeypatch.setattr(spatial, "sample_keep_decision", lambda log_probs: next(decisions))


def as_decisions(kept: Sequence[Tensor], num_locations: int) -> list[Tensor]:
    return [torch.zeros(len(k), num_locations).scatter(1, k, 1.0) for k in kept]


@pytest.fixture(params=FAMILIES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


# --- The evaluation forward


@torch.no_grad()
def test_all_kept_is_the_dense_backbone(arch: str) -> None:
    dense = build_dense(arch)
    expected = dense(random_images())
    features = dense.forward_features(random_images())
    dynamic = make_spatial_dynamic(dense, STAGES, (1, 1, 1)).eval()
    torch.testing.assert_close(dynamic(random_images()), expected)
    torch.testing.assert_close(dynamic.forward_features(random_images()), features)


@torch.no_grad()
def test_each_location_goes_its_way(arch: str) -> None:
    """One block of the third stage, against the block's own forward and the fast path alone."""
    model = build(arch)
    block = model.stages[2].blocks[2]
    x = torch.randn(2, 4, 4, 32)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    out = block.forward_routed(x, *spatial.route(order, 6, (4, 4)))
    swin = isinstance(model, SwinTransformer)
    plain = type(block).__bases__[1].forward
    slow = plain(block, x) if swin else plain(block, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    mixed = block.mix(x)
    fast = (mixed if swin else x) + block.fast_path(mixed)
    for image in range(2):
        for rank, location in enumerate(order[image].tolist()):
            expected = (slow if rank < 6 else fast)[image].flatten(0, 1)[location]
            torch.testing.assert_close(out[image].flatten(0, 1)[location], expected)


@torch.no_grad()
def test_trace_tells_what_was_kept(arch: str) -> None:
    model = build(arch)
    logits, kept, scores, groups, grid = model.trace(random_images())
    assert torch.equal(logits, model(random_images()))
    assert torch.equal(logits, model.forward_head(model.forward_features(random_images())))
    assert [k.shape for k in kept] == [(3, 11), (3, 8), (3, 4)]  # int(16 * rate)
    assert scores.shape == (3, 3, 16) and grid == (4, 4)
    for stage, indices in enumerate(kept):
        best = scores[:, stage].topk(indices.shape[1], dim=1).indices
        assert torch.equal(indices, best)
        assert torch.equal(groups[:, stage].gather(1, indices), indices)
        assert (groups[:, stage] == -1).sum() == 3 * (16 - indices.shape[1])
    # decisions are made anew: somewhere a location that was dropped is kept later
    first, second, _ = as_decisions(kept, 16)
    assert ((first == 0) & (second == 1)).any()
    assert torch.equal(model.forward_pruned(random_images())[1][2], kept[2])


@torch.no_grad()
def test_images_do_not_touch_each_other(arch: str) -> None:
    model = build(arch)
    together = model(random_images())
    for i in range(3):
        torch.testing.assert_close(model(random_images()[i : i + 1]), together[i : i + 1])


@torch.no_grad()
def test_keep_rates_can_be_set_and_grow(arch: str) -> None:
    model = build(arch)
    model.set_keep_rates((0.3, 0.5, 0.01))
    assert model.tokens_kept(16) == [4, 8, 1]
    assert [k.shape[1] for k in model.forward_pruned(random_images())[1]] == [4, 8, 1]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (72, 64), (97, 66)])
@torch.no_grad()
def test_any_image_size(arch: str, size: tuple[int, int]) -> None:
    options = {"strict_img_size": False} if arch == "swin_t" else {}
    if arch == "swin_t":
        size = tuple(side // 4 * 4 for side in size)  # the patches of timm's Swin have to fit
    model = build(arch, **options)
    logits, kept, _, _, (rows, columns) = model.trace(random_images(size))
    assert abs(rows - size[0] / 16) < 1 and abs(columns - size[1] / 16) < 1
    assert [k.shape[1] for k in kept] == model.tokens_kept(rows * columns)
    assert logits.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(arch: str, dtype: torch.dtype, device: str) -> None:
    """Autocast, in evaluation and in training, and weights that are in bfloat16 themselves."""
    model, images = build(arch).to(device), random_images().to(device)
    model.set_keep_rates((1, 1, 1))  # so that no decision depends on a rounded score
    with torch.no_grad():
        expected = model(images)
        with torch.autocast(device, dtype):
            logits = model(images)
        assert (logits.float() - expected).abs().max() < 0.1 * expected.std()
    model.set_keep_rates(RATES)
    with torch.autocast(device, dtype), torch.no_grad():
        assert model(images).isfinite().all()
    with torch.autocast(device, dtype):  # a new one: torch 2.7 would keep its weights without gradient
        logits, features, keep_mask, keep_decisions = model.train()(images)
        assert keep_mask.dtype == torch.float32  # bfloat16 cannot count the locations of a batch
        loss = logits.float().square().mean() + features.float().square().mean() + sum(d.mean() for d in keep_decisions)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.eval().to(dtype)
    with torch.no_grad():
        assert model(images.to(dtype)).isfinite().all()
    assert model.train()(images.to(dtype))[0].isfinite().all()


def test_compiles_without_graph_breaks(arch: str) -> None:
    torch.compiler.reset()  # other tests have compiled the same function, and there is a limit for all
    model = make_spatial_dynamic(build_dense(arch, depths=(1, 1, 2, 1)), [1], [0.5]).eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(random_images()), model(random_images()))


# --- The training forward


def test_training_outputs(arch: str) -> None:
    logits, features, keep_mask, keep_decisions = build(arch).train()(
        random_images((64, 96) if "conv" in arch else (64, 64))
    )
    locations = 6 if "conv" in arch else 4
    assert logits.shape == (3, 5) and features.shape == (3, locations, 64)
    assert torch.equal(keep_mask, torch.ones(3, locations))
    assert len(keep_decisions) == 3
    for decision in keep_decisions:
        assert decision.shape == (3, 4 * locations) and decision.requires_grad
        assert set(decision.detach().round().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("merge_streams", [False, True])
def test_merged_streams_train_what_is_evaluated(
    arch: str, merge_streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published, training continues from a different value where a decision changes; merging fixes that."""
    model = build(arch, merge_streams=merge_streams)
    with torch.no_grad():
        expected, kept = model.forward_pruned(random_images())
        decide(monkeypatch, as_decisions(kept, 16))
        logits = model.train()(random_images())[0]
    difference = (logits - expected).abs().max() / expected.std()
    assert difference < 1e-4 if merge_streams else difference > 0.01


def test_streams_agree_while_decisions_do_not_change(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = [(torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.5).float()] * 3
    outputs = []
    for merge_streams in (False, True):
        decide(monkeypatch, decisions)
        outputs.append(build(arch, merge_streams=merge_streams).train()(random_images())[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_and_everything_kept_is_finite(arch: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(arch).train()
    decisions = [torch.full((3, 16), value, requires_grad=True) for _ in STAGES]
    decide(monkeypatch, decisions)
    model(random_images())[0].square().sum().backward()
    assert all(d.grad.isfinite().all() and d.grad.any() for d in decisions)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_learns(arch: str) -> None:
    """So that DistributedDataParallel need not look for unused ones."""
    model = build(arch).train()
    logits, _, _, keep_decisions = model(random_images())
    (logits.square().sum() + sum(decision.mean() for decision in keep_decisions)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_is_drawn_for_each_stream(arch: str) -> None:
    block = build(arch, drop_path_rate=0.5).train().stages[2].blocks[4]
    x = torch.zeros(64, 4, 4, 32)
    with torch.no_grad():
        block.mix = lambda x: x  # so that a stream whose branch is left out comes back as it was
        kept, dropped = block.forward_streams(x, x, torch.ones(64, 4, 4, 1))
    left_out = [(stream == x).flatten(1).all(dim=1) for stream in (kept, dropped)]
    assert left_out[0].any() and left_out[1].any() and not torch.equal(*left_out)
    assert not left_out[0].all() and not left_out[1].all()


# --- Learning


def train(model: nn.Module, criterion: nn.Module, groups: list[dict], steps: int = 30) -> list[dict[str, float]]:
    """Steps on 180 generated images, again and again; returns the loss and its parts by step."""
    images, labels = shapes_batch()
    optimizer = torch.optim.AdamW(groups)
    history = []
    for step in range(steps):
        batch = slice(step % 5 * 36, (step % 5 + 1) * 36)
        loss, parts = criterion(images[batch], model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in ({"loss": loss} | parts).items()})
    return history


def shapes_batch() -> tuple[Tensor, Tensor]:
    data = Shapes(train=True, size=64, length=180)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 127.5 - 1, torch.tensor(labels)


def mean_of(history: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in history) / len(history)


def test_dense_and_then_dynamic_learn(arch: str) -> None:
    torch.manual_seed(0)
    sizes = {"swin_t": {"embed_dim": 16, "num_heads": (1, 1, 2, 4), "window_size": 4}, "convnext_t": {"embed_dim": 16}}
    model = SPATIAL_ARCHS[arch][0](num_classes=9, img_size=64, depths=(1, 1, 4, 1), **sizes[arch])
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # 1e-6 would take longer to grow
    history = train(model, LabelLoss(nn.CrossEntropyLoss()), [{"params": model.parameters(), "lr": 2e-3}])
    assert mean_of(history[-5:], "loss") < 0.8 * history[0]["loss"]

    teacher = Teacher(copy.deepcopy(model))
    model = make_spatial_dynamic(model, STAGES, RATES)
    names = dict(model.named_parameters())
    new = {name for name in names if "fast" in name or "predictor" in name}
    groups = [
        {"params": [names[name] for name in new], "lr": 4e-3},
        {"params": [names[name] for name in names if name not in new], "lr": 4e-4},
    ]
    history = train(model, DistillDiffPruningLoss(teacher, nn.CrossEntropyLoss(), RATES, ratio_weight=10), groups)
    assert mean_of(history[-5:], "cls") < 0.8 * history[0]["cls"]
    # fresh predictors keep half
    assert [history[0][f"kept_{stage}"] for stage in range(3)] == pytest.approx([0.5] * 3, abs=0.1)
    assert [mean_of(history[-5:], f"kept_{stage}") for stage in range(3)] == pytest.approx(RATES, abs=0.1)
    images, labels = shapes_batch()
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(dim=1) == labels).float().mean()
    assert accuracy > 0.6  # on the images trained on; 0.11 by chance


# --- Models and their weights

PUBLISHED_GFLOPS = [
    ("convnext_t", 0.7, 3.5788), ("convnext_t", 0.9, 3.9081), ("convnext_s", 0.7, 5.7715),
    ("convnext_s", 0.9, 6.7593), ("convnext_b", 0.7, 10.1774), ("convnext_b", 0.9, 11.9335),
    ("swin_t", 0.7, 4.0412), ("swin_s", 0.7, 6.8464), ("swin_b", 0.7, 12.0629),
]  # fmt: skip
PARAMETERS = {
    "convnext_t": (30.505, 28.589), "convnext_s": (54.523, 50.224), "convnext_b": (96.217, 88.591),
    "swin_t": (29.755, 28.288), "swin_s": (52.708, 49.606), "swin_b": (93.272, 87.768),
}  # fmt: skip


def build_published(arch: str, base_rate: float) -> nn.Module:
    """Without memory for its weights."""
    constructor, sizes, pruning_loc, _ = SPATIAL_ARCHS[arch]
    with torch.device("meta"):
        backbone = constructor(num_classes=1000, img_size=224, **sizes)
        return make_spatial_dynamic(backbone, pruning_loc, arithmetic_keep_rates(base_rate, len(pruning_loc)))


@pytest.mark.parametrize(("arch", "base_rate", "gflops"), PUBLISHED_GFLOPS)
def test_published_gflops(arch: str, base_rate: float, gflops: float) -> None:
    assert count_gflops(build_published(arch, base_rate), 224) == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize("arch", SPATIAL_ARCHS)
def test_published_sizes(arch: str) -> None:
    dynamic = build_published(arch, 0.7)
    new = sum(p.numel() for name, p in dynamic.named_parameters() if "fast" in name or "predictor" in name)
    total = sum(p.numel() for p in dynamic.parameters())
    assert (total / 1e6, (total - new) / 1e6) == pytest.approx(PARAMETERS[arch], abs=5e-4)


def test_arithmetic_keep_rates() -> None:
    assert arithmetic_keep_rates(0.7, 3) == (0.7, 0.7 - 0.2, 0.7 - 0.4)
    assert [int(196 * rate) for rate in arithmetic_keep_rates(0.7, 3)] == [137, 97, 58]  # 98 without rounding errors
    for base_rate in (0.4, 0.3, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^keep rates must lie in \(0, 1\]"):
            arithmetic_keep_rates(base_rate, 3)


TIMM_MODELS = {
    "convnext_atto": {},  # 1 x 1 convolutions for its MLPs
    "convnext_zepto_rms": {},
    "convnextv2_atto": {},  # no layer scale, normalizes over all locations
    "convnext_tiny_hnf": {"dims": (8, 16, 32, 64)},  # final norm before the pooling
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "img_size": 64},
    "swin_s3_tiny_224": {"embed_dim": 24, "img_size": 128},  # windows differ by stage
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_any_swin_or_convnext_of_timm(name: str) -> None:
    dense = strengthen(timm.create_model(name, num_classes=5, **TIMM_MODELS[name]))
    images = random_images((TIMM_MODELS[name].get("img_size", 64),) * 2, count=2)
    with torch.no_grad():
        expected, teacher_features = adapter_of(dense).outputs_of(dense, images)
        dynamic = make_spatial_dynamic(copy.deepcopy(dense), STAGES, (1, 1, 1)).eval()
        torch.testing.assert_close(dynamic(images), expected, rtol=1e-3, atol=1e-3)
    dynamic.set_keep_rates(RATES)
    logits, features, _, _ = dynamic.train()(images)
    assert features.shape == teacher_features.shape
    logits.sum().backward()
    assert all(p.grad is not None for p in dynamic.parameters())
    with torch.no_grad():
        assert not torch.allclose(dynamic.eval()(images), expected, rtol=1e-3, atol=1e-3)


def test_new_modules_start_as_published(arch: str) -> None:
    torch.manual_seed(0)
    model = make_spatial_dynamic(build_dense(arch, embed_dim=32), STAGES, RATES)
    eps = 1e-5 if arch == "swin_t" else 1e-6
    for name, module in model.named_modules():
        if "score_predictor" not in name and "fast_path" not in name:
            continue
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            if module.weight.numel() >= 1000:  # enough numbers to tell their spread
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
        if isinstance(module, nn.LayerNorm):
            assert module.eps == eps and (module.weight == 1).all() and not module.bias.any()
    blocks = model.stages[2].blocks
    assert [hasattr(block, "fast_path") for block in blocks] == [False, True, True, True, True]
    if arch == "convnext_t":
        assert (blocks[1].fast_path[2].gamma == 1e-6).all()


def test_own_weights_keep_their_names(arch: str) -> None:
    model = build(arch)
    mapped = map_published(model.state_dict(), model)
    assert all(torch.equal(mapped.pop(name), value) for name, value in model.state_dict().items())
    assert not mapped


def test_weights_of_another_model_come_back_as_they_are(arch: str) -> None:
    """Loading them names what does not fit; nothing else is raised."""
    for other in FAMILIES:
        weights = build(other, depths=(1, 1, 7, 1)).state_dict()
        published = {name.replace(".blocks.", ".").replace("head.norm", "norm"): v for name, v in weights.items()}
        for candidate in (
            weights,
            published,
            {"layers.2.blocks.6.attn.relative_position_bias_table": torch.ones(9, 2)},
        ):
            assert set(map_published(candidate, build(arch))) - set(build(arch).state_dict())


def test_window_sizes_are_fitted() -> None:
    small, large = build("swin_t"), build("swin_t", img_size=128, window_size=4)
    large.load_state_dict(map_published(small.state_dict(), large))
    assert large(random_images((128, 128))).isfinite().all()


@pytest.mark.parametrize(
    ("pruning_loc", "keep_rates", "message"),
    [
        ((), (), "ascending block numbers in 0..4"),
        ((2, 1, 3), RATES, "ascending block numbers in 0..4"),
        ((1, 1, 3), RATES, "ascending block numbers in 0..4"),
        ((1, 2, 5), RATES, "ascending block numbers in 0..4"),
        (STAGES, (0.7, 0.5), "2 keep rates for 3"),
        (STAGES, (0.3, 0.1, -0.1), r"keep rates must lie in \(0, 1\]"),
        (STAGES, (0.3, 0.1, 0.0), r"keep rates must lie in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    arch: str, pruning_loc: Sequence[int], keep_rates: Sequence[float], message: str
) -> None:
    dense = build_dense(arch)
    with pytest.raises(ValueError, match=message):
        make_spatial_dynamic(dense, pruning_loc, keep_rates)
    assert make_spatial_dynamic(dense, STAGES, RATES) is dense  # it was left as it was
    with pytest.raises(ValueError, match="already dynamic"):
        make_spatial_dynamic(dense, STAGES, RATES)


def test_keep_rates_that_do_not_fit_change_nothing(arch: str) -> None:
    model = build(arch)
    for keep_rates in ((0.5, 0.4), (0.5, 0.4, 2), (0.5, 0.4, 0)):
        with pytest.raises(ValueError, match="keep rates"):
            model.set_keep_rates(keep_rates)
    assert model.keep_rates == RATES


def test_two_stages_are_too_few() -> None:
    backbone = SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=2)
    with pytest.raises(ValueError, match="third stage, and this model has 2"):
        make_spatial_dynamic(backbone, [0], [0.5])


@pytest.mark.parametrize("arch", ["swin_t", "convnext_t"])
def test_the_command_trains(arch: str, image_folder: Path, tmp_path: Path) -> None:
    """Dense, dynamic with a teacher in two processes, evaluated from the checkpoint alone."""
    sizes = "--embed-dim 16 --depths 1 1 4 1 --input-size 32".split()
    sizes += "--num-heads 1 2 4 8 --window-size 2".split() if arch == "swin_t" else []
    common = ["--data-path", str(image_folder), *"--device cpu --amp off --num-workers 0 --batch-size 5".split()]
    common += "--epochs 1 --warmup-epochs 0 --frozen-epochs 1 --aa none --mixup 0 --cutmix 0".split()
    common += "--print-freq 4".split()
    dense = run_main("--arch", arch, *sizes, *common, "--dense", "--output-dir", tmp_path / "dense")
    assert dense.returncode == 0, dense.stderr
    options = ["--distill", "--dist-eval", "--pretrained", tmp_path / "dense" / "checkpoint_last.pth"]
    options += ["--output-dir", tmp_path / "dynamic"]
    launcher = [*TORCHRUN, "--nproc_per_node=2", str(MAIN)]
    dynamic = launch([*launcher, *common, *map(str, options)])
    assert dynamic.returncode == 0, dynamic.stderr
    (record,) = map(json.loads, (tmp_path / "dynamic" / "log.txt").read_text().splitlines())
    assert record["val/images"] == 7 and 0 < record["train/token"] < 10
    evaluated = run_main("--eval", "--resume", tmp_path / "dynamic", "--data-path", image_folder, "--device", "cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "keep 70.0%, 50.0%, 30.0%" in evaluated.stdout and "on 7 images" in evaluated.stdout
