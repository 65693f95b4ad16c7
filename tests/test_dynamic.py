"""What every dynamic model has: your own scorer and reducer, pickling, timm's setters, checks before changes."""

import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ONE_THREAD, ROOT
from dynamicvit.models import (
    REDUCERS,
    SCORERS,
    Look,
    ModelSpec,
    Reduced,
    Reducer,
    Scorer,
    Scores,
    build_model,
    create_model,
    describe,
    from_pretrained,
    make_dynamic,
    save_pretrained,
)
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.reducers import select_tokens
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | changes)).eval()


def fast(place: str = "inside", scorer: str = "distinct", reducer: str = "merge", **changes: object) -> nn.Module:
    return make_dynamic(build(**changes), (1, 2), (0.7, 0.5), scorer, reducer, place=place)


class Weighted(Scorer):
    """With a parameter for each channel, in a stage."""

    name = "weighted"
    learned = True

    def module(self, dim: int) -> nn.Module:
        return nn.Linear(dim, 1)

    def __call__(self, look: Look, module: nn.Module) -> Scores:
        return Scores(module(look.tokens)[..., 0])


class SkipOne(Reducer):
    """Drops the best token and keeps the next ones."""

    name = "skip_one"

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        kept = scores.scores.argsort(dim=1, descending=True)[:, 1 : num_keep + 1]
        return Reduced(select_tokens(x, kept, num_prefix), kept)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "weighted", Weighted())
    monkeypatch.setitem(REDUCERS, "skip_one", SkipOne())


@pytest.mark.parametrize("place", ["before", "inside"])
def test_your_own_scorer_and_reducer(own: None, place: str, tmp_path: Path) -> None:
    """Passed as objects or by name: counted, trained, saved, loaded and exported like any other."""
    model = make_dynamic(build(), (1, 2), (0.7, 0.5), scorer=Weighted(), reducer=SkipOne(), place=place)
    _, kept = model.forward_pruned(IMAGES)
    best = model.trace(IMAGES).scores[:, 0].argmax(dim=1, keepdim=True)
    assert kept[0].shape == (2, 11) and not (kept[0] == best).any()
    assert count_gflops(model, 64) < count_gflops(build(), 64)
    model.train()(IMAGES).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    exported = torch.export.export(model.eval(), (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), model(IMAGES))
    by_name = {"scorer": "weighted", "reducer": "skip_one", "place": place, "pruning_loc": (1, 2)}
    named = create_model("deit_tiny", keep_rates=(0.7, 0.5), **SMALL, **by_name).eval()
    named.load_state_dict(model.state_dict())
    save_pretrained(named, tmp_path / "own")
    loaded = from_pretrained(tmp_path / "own")
    assert loaded.scorer == "weighted" and loaded.reducer == "skip_one" and loaded.place == place
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_a_name_stands_for_one_thing() -> None:
    class Other(Scorer):
        name = "distinct"

    with pytest.raises(ValueError, match="another scorer is called 'distinct'"):
        make_dynamic(build(), (1,), (0.5,), scorer=Other())
    with pytest.raises(ValueError, match="a scorer must be a name, or a Scorer"):
        make_dynamic(build(), (1,), (0.5,), scorer=print)


def test_speedup_is_all_that_is_needed() -> None:
    dense = build(depth=8)
    gflops = count_gflops(dense, 64)
    model = make_dynamic(dense, speedup=1.3)
    assert model.scorer == "distinct_few" and model.reducer.merges and model.place == "inside"
    assert gflops / count_gflops(model, 64) == pytest.approx(1.3, rel=0.06)  # 16 tokens leave in whole numbers
    assert model(IMAGES).shape == (2, 5)
    assert make_dynamic(build(depth=8).bfloat16(), speedup=1.3).keep_rates == model.keep_rates
    for wish in (0.9, 1.0, 50.0):
        with pytest.raises(ValueError, match="a speed-up"):
            make_dynamic(build(depth=8), speedup=wish)
    with pytest.raises(ValueError, match="needs speedup .*, or pruning_loc and keep_rates"):
        make_dynamic(build())


@pytest.mark.parametrize("place", ["before", "inside"])
def test_the_last_block_computes_what_is_read(place: str) -> None:
    """The same answers for fewer multiply-adds: one MLP for 1 + 8 tokens less 1 is saved."""
    model = fast(place)
    expected = model(IMAGES)
    lean = count_gflops(model, 64)
    whole = model.blocks[3].register_forward_hook(lambda *_: None)  # a user's hook reads all of its tokens
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    mlp = 8 * 32 * 32 / 1e9
    assert count_gflops(model, 64) - lean == pytest.approx(8 * mlp, rel=1e-6)
    whole.remove()
    for pool in ("avg", ""):
        model.reset_classifier(5, pool)
        assert not model.head_alone
    published = make_dynamic(build(), (1, 2), (0.7, 0.5))
    assert not published.head_alone


def test_trains_in_anybodys_loop_and_in_ours() -> None:
    for model in (fast(), make_dynamic(build(), (1, 2), (0.7, 0.5))):
        assert model.train()(IMAGES).shape == (2, 5)
        model.set_distilled_training(True)
        assert len(model(IMAGES)) == 4
    assert len(create_model("deit_tiny", **SMALL, pruning_loc=(1,)).train()(IMAGES)) == 4


def answer(model: nn.Module, images: Tensor, results: multiprocessing.Queue) -> None:
    results.put(model(images).detach().numpy())


def test_pickle() -> None:
    model = fast()
    for copy in (pickle.loads(pickle.dumps(model)), torch.load(saved_whole(model), weights_only=False)):
        assert torch.equal(copy(IMAGES), model(IMAGES)) and copy.spec == model.spec
        copy.set_keep_rates((1.0, 1.0))
        assert model.keep_rates == (0.7, 0.5)


def saved_whole(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_sent_to_a_spawned_process() -> None:
    context, model = multiprocessing.get_context("spawn"), fast()
    results = context.Queue()
    process = context.Process(target=answer, args=(model, IMAGES, results))
    process.start()
    received = results.get(timeout=200)
    process.join()
    np.testing.assert_allclose(received, model(IMAGES).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_timms_setters_are_followed(tmp_path: Path) -> None:
    model = make_dynamic(timm.create_model("test_vit", num_classes=7), (1, 3), (0.7, 0.5), "distinct", "merge").eval()
    model.spec = describe(model)
    model.reset_classifier(3)
    model.set_input_size((96, 64))
    model.set_grad_checkpointing(True)
    assert (model.spec.num_classes, model.spec.img_size) == (3, (96, 64))
    assert model.data_config["input_size"] == (3, 96, 64)
    save_pretrained(model, tmp_path / "changed")
    loaded = from_pretrained(tmp_path / "changed")
    images = torch.randn(1, 3, 96, 64)
    assert torch.equal(loaded(images), model(images))
    model.reset_classifier(4, "avg")
    save_pretrained(model, tmp_path / "pooled")
    assert torch.equal(from_pretrained(tmp_path / "pooled")(images), model(images))
    with pytest.raises(ValueError, match="does not work with pooling 'max'"):
        model.reset_classifier(4, "max")
    with pytest.raises(NotImplementedError, match="patch size"):
        model.set_input_size(patch_size=(8, 8))


def test_class_names_go_with_their_classes() -> None:
    model = build_model(ModelSpec("deit_tiny", sizes={"depth": 4}, num_classes=2, class_names=("a", "b")))
    assert model.class_names == ("a", "b")
    model.reset_classifier(3)
    assert model.class_names is None and model.spec.num_classes == 3


def test_blocks_can_be_cut_off_for_features() -> None:
    model = fast(place="before")
    expected = model.forward_intermediates(IMAGES, [0, 2], intermediates_only=True)
    maps = FeatureGetterNet(model, out_indices=[0, 2])(IMAGES)
    assert len(model.blocks) == 3 and model.pruning_loc == (1, 2)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="all stages"):
        fast().prune_intermediate_layers([0])


def test_bad_requests_are_one_line() -> None:
    model = fast()
    for request, message in (
        (lambda: model.forward_intermediates(IMAGES, [7]), "block numbers are 0 to 3"),
        (lambda: model.forward_features(IMAGES, restore="all"), "restore must be one of residual, copy, none"),
        (lambda: model.forward_intermediates(IMAGES, restore="none"), "need a token for every patch"),
        (lambda: model.forward_intermediates(IMAGES, attn_mask=torch.ones(1)), "makes its own attention masks"),
        (lambda: model.set_keep_rates(0.7), "needs a share of all tokens for each of 2 stages"),
        (lambda: setattr(model, "keep_rates", (0.5, 0.7)), "cannot grow"),
        (lambda: make_dynamic(build(), (1.5,), (0.5,)), "block numbers"),
        (lambda: make_dynamic(build(), speedup="1.5"), "speedup must be a number"),
        (lambda: make_dynamic(build(), (1,), (0.5,), place="behind"), "place must be before or inside"),
        (lambda: make_dynamic(build(), (1,), (0.5,), place="inside"), "trained by hiding tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            request()
    with pytest.raises(NotImplementedError, match="torch.fx"):
        torch.fx.symbolic_trace(model)
    assert model.keep_rates == (0.7, 0.5)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    rates = np.array([0.75, 0.5], dtype=np.float32)
    model = make_dynamic(timm.create_model("test_vit"), np.array([1, 3]), rates, "distinct", "merge")
    assert model.pruning_loc == (1, 3) and all(type(rate) is float for rate in model.keep_rates)
    save_pretrained(model, tmp_path / "numpy")
    assert from_pretrained(tmp_path / "numpy").keep_rates == (0.75, 0.5)


def test_what_the_user_turned_off_stays_off() -> None:
    model, seen = fast(), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES)
    model(IMAGES)
    assert len(seen) == 8 and not any(block.attn.fused_attn for block in model.blocks)


def test_a_forward_pass_of_the_users_own_is_not_bypassed() -> None:
    class Centred(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.5)

    own = Centred(**SMALL)
    with pytest.raises(ValueError, match="has a forward of its own"):
        make_dynamic(own, (1,), (0.5,), "distinct", "merge")
    wrapped = build()
    wrapped.forward = lambda images: VisionTransformer.forward(wrapped, images).float()
    with pytest.raises(ValueError, match="is wrapped"):
        make_dynamic(wrapped, (1,), (0.5,), "distinct", "merge")
    assert type(own) is Centred and type(wrapped) is VisionTransformer


def test_gradients_are_the_same_with_checkpointing() -> None:
    gradients = []
    for enable in (False, True):
        model = fast().train()
        model.set_grad_checkpointing(enable)
        model(IMAGES).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_by_hand_merged_tokens_keep_their_mean_length() -> None:
    x = torch.tensor([[[9.0, 9.0], [3.0, 0.0], [0.0, 1.0]]])  # a prefix token, two patches at right angles
    scores = Scores(torch.tensor([[2.0, 1.0]]))
    reduced = REDUCERS["merge_length"](x, scores, torch.tensor([[1.0, 3.0]]), 1, 1)
    mean = torch.tensor([3 / 4, 3 / 4])
    expected = mean / mean.norm() * (3 * 1 + 1 * 3) / 4
    torch.testing.assert_close(reduced.x, torch.stack([x[0, 0], expected])[None])
    assert reduced.size.tolist() == [[4]]


def test_a_command_of_another_folder_finds_the_package(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from models import make_dynamic; import dynamicvit; "
    code += "assert make_dynamic is dynamicvit.make_dynamic"
    subprocess.run([sys.executable, "-c", code, ROOT], cwd=tmp_path, env=ONE_THREAD, check=True)
