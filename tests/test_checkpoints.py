"""Weights from every file that users have; and from no other."""

import argparse
import io
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dynamicvit.errors import UserError
from dynamicvit.models import (
    CheckpointError,
    ModelError,
    create_model,
    find_weights,
    from_pretrained,
    load_weights,
    read_checkpoint,
    save_pretrained,
)
from dynamicvit.runs.checkpoints import RunState, write_checkpoint
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS = ("deit_small", "lvvit_s")
StateDict = dict[str, Tensor]


def build(arch: str = "deit_small", seed: int = 0, dense: bool = True, **changes) -> VisionTransformer:
    """With position embeddings that show their grid, as trained ones do."""
    torch.manual_seed(seed)
    model = create_model(arch, dense=dense, pruning_loc=(1, 2), **(TINY | changes))
    with torch.no_grad():
        model.pos_embed[:, 1:] += build_sincos2d_pos_embed(model.patch_embed.grid_size, model.embed_dim)
    return model


def snapshot(model: VisionTransformer) -> StateDict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state: StateDict, expected: StateDict) -> None:
    assert sorted(state) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def refusal(action: Callable[[], object]) -> str:
    """The message of the CheckpointError that action ends in: one line, for the user."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- Layouts


LAYOUTS: dict[str, tuple[str, Callable[[StateDict], dict]]] = {
    "deit": ("deit_small.pth", lambda state: {"model": state}),
    "bare": ("lvvit_s.pth.tar", lambda state: state),
    "published_dynamicvit": (
        "dynamic-vit.pth",
        lambda state: {"model": state, "epoch": 29, "args": argparse.Namespace(lr=5e-4, arch="deit_small")},
    ),
    "timm": ("model_best.pth.tar", lambda state: {"state_dict": state, "epoch": 3, "arch": "vit", "metric": 79.8}),
    "module_prefix": ("ddp.pth", lambda state: {"model": prefixed(state, "module.")}),
    "compiled_prefix": ("compiled.pth", lambda state: prefixed(state, "_orig_mod.")),
    "both_prefixes": ("both.pth", lambda state: {"state_dict": prefixed(state, "module._orig_mod.")}),
    "lightning": (
        "epoch=3.ckpt",
        lambda state: {"state_dict": prefixed(state, "model."), "pytorch-lightning_version": "2.5", "epoch": 3},
    ),
    "both_prefixes_turned": ("turned.pth", lambda state: {"model": prefixed(state, "_orig_mod.module.")}),
}


def prefixed(state: StateDict, prefix: str) -> StateDict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, zip_format: bool, tmp_path: Path) -> None:
    name, wrap = LAYOUTS[layout]
    source, model = build(seed=0, dense=False), build(seed=1, dense=False)
    torch.save(wrap(source.state_dict()), tmp_path / name, _use_new_zipfile_serialization=zip_format)
    assert load_weights(model, find_weights(read_checkpoint(tmp_path / name))) == []
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_our_own(kind: str, tmp_path: Path) -> None:
    source, model = build(kind, dense=False), build(kind, seed=1, dense=False)
    optimizer = torch.optim.AdamW(source.parameters())
    content = {"model": source.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 5e-4}}
    write_checkpoint(content, tmp_path / "checkpoint_last.pth")
    assert os.listdir(tmp_path) == ["checkpoint_last.pth"]
    read = read_checkpoint(tmp_path / "checkpoint_last.pth")
    assert read["epoch"] == 3 and read["args"] == {"lr": 5e-4}
    assert load_weights(model, find_weights(read)) == []
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors(kind: str, tmp_path: Path) -> None:
    source, model = build(kind), build(kind, seed=1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_weights(model, find_weights(read_checkpoint(tmp_path / "model.safetensors")))
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    source, model = build("lvvit_s"), build("lvvit_s", seed=1)
    counters = [name for name in source.state_dict() if name.endswith("num_batches_tracked")]
    half = {name: value if name in counters else value.to(dtype) for name, value in source.state_dict().items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    weights = find_weights(read_checkpoint(tmp_path / "half.pth"))
    assert counters and all(weights[name].dtype == torch.int64 for name in counters)
    assert all(value.dtype == torch.float32 for name, value in weights.items() if name not in counters)
    load_weights(model, weights)
    assert_same(model.state_dict(), {name: value.to(source.state_dict()[name].dtype) for name, value in half.items()})


def test_prefix_of_some_names_is_part_of_the_name() -> None:
    weights = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert sorted(find_weights(weights)) == ["b", "module.a"]


# --- What a model takes of them


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_start_a_dynamic_model(kind: str) -> None:
    dense, model = build(kind), build(kind, seed=1, dense=False)
    predictors = {name: value for name, value in snapshot(model).items() if name.startswith("score_predictor.")}
    notes = load_weights(model, dense.state_dict())
    assert len(notes) == 1 and "predictors" in notes[0]
    assert predictors
    assert_same(model.state_dict(), {**dense.state_dict(), **predictors})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("img_size", [48, 24])
def test_position_embeddings_are_interpolated(kind: str, img_size: int) -> None:
    source, model = build(kind), build(kind, seed=1, img_size=img_size)
    side = img_size // 8
    notes = load_weights(model, source.state_dict())
    assert (
        len(notes) == 1
        and f"from 4 x 4 to {side} x {side} patches: weights for 32 px, used at {img_size} px" in notes[0]
    )
    # the class token's stays; the 16 patches' are an image of 4 x 4 pixels and 32 channels
    class_token, patches = source.pos_embed[:, :1], source.pos_embed[:, 1:]
    grid = patches.reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    expected = torch.cat([class_token, grid.permute(0, 2, 3, 1).reshape(1, side * side, 32)], dim=1)
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model.eval()(torch.zeros(1, 3, img_size, img_size)).shape == (1, 5)


def test_loading_does_not_change_the_weights_given() -> None:
    weights = snapshot(build())
    before = dict(weights)
    load_weights(build(img_size=48, num_classes=3), weights, new_head=True)
    assert_same(weights, before)


@pytest.mark.parametrize(("kind", "head"), [("deit_small", ("head",)), ("lvvit_s", ("head", "aux_head"))])
def test_new_head_for_other_classes(kind: str, head: tuple[str, ...]) -> None:
    source, model = build(kind), build(kind, seed=1, num_classes=7)
    names = [f"{module}.{part}" for module in head for part in ("weight", "bias")]
    before = snapshot(model)
    message = refusal(lambda: load_weights(model, source.state_dict()))
    assert all(name in message for name in names) and "(5, 32) for (7, 32)" in message
    assert_same(model.state_dict(), before)

    notes = load_weights(model, source.state_dict(), new_head=True)
    assert len(notes) == 1 and "7 classes" in notes[0] and all(name in notes[0] for name in names)
    kept = {name: before[name] for name in names}
    assert_same(model.state_dict(), {**source.state_dict(), **kept})


def test_new_head_takes_over_a_head_that_fits() -> None:
    source, model = build(), build(seed=1)
    assert load_weights(model, source.state_dict(), new_head=True) == []
    assert_same(model.state_dict(), source.state_dict())


# --- What does not fit is listed, and leaves the model as it was


def without(state: StateDict, *names: str) -> StateDict:
    return {name: value for name, value in state.items() if name not in names}


MISFITS: dict[str, tuple[Callable[[StateDict], StateDict], list[str]]] = {
    "missing": (lambda s: without(s, "norm.bias", "cls_token"), ["missing: cls_token, norm.bias"]),
    "head_missing": (lambda s: without(s, "head.weight"), ["missing: head.weight"]),
    "one_predictor_missing": (
        lambda s: without(s, "score_predictor.1.in_conv.0.bias"),
        ["missing: score_predictor.1.in_conv.0.bias"],
    ),
    "unexpected": (lambda s: {**s, "dist_token": torch.zeros(1, 1, 32)}, ["not in the model: dist_token"]),
    "misshapen": (
        lambda s: {**s, "blocks.0.mlp.fc1.bias": torch.zeros(7)},
        ["of another shape: blocks.0.mlp.fc1.bias (7,) for (128,)"],
    ),
    "embedding_of_another_width": (
        lambda s: {**s, "pos_embed": torch.zeros(1, 26, 16)},
        ["of another shape: pos_embed (1, 26, 16) for (1, 17, 32)"],
    ),
    "no_square_of_patches": (lambda s: {**s, "pos_embed": torch.zeros(1, 25, 32)}, ["pos_embed (1, 25, 32)"]),
    "everything": (
        lambda s: {**without(s, "norm.bias"), "dist_token": torch.zeros(1), "head.bias": torch.zeros(3)},
        ["missing: norm.bias", "not in the model: dist_token", "of another shape: head.bias (3,) for (5,)"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_are_listed_and_nothing_is_loaded(misfit: str) -> None:
    change, expected = MISFITS[misfit]
    model = build(seed=1, dense=False)
    before = snapshot(model)
    message = refusal(lambda: load_weights(model, change(build(dense=False).state_dict())))
    assert all(line in message for line in expected)
    assert_same(model.state_dict(), before)


def test_dynamic_weights_do_not_make_a_dense_model() -> None:
    model = build(seed=1)
    before = snapshot(model)
    message = refusal(lambda: load_weights(model, build(dense=False).state_dict()))
    assert "not in the model: score_predictor.0.in_conv.0.weight" in message
    assert_same(model.state_dict(), before)


# --- Files that are no checkpoints


class Payload:
    """Unpickled by a careless reader, it makes a folder; it could do anything else as well."""

    def __init__(self, marker: Path, function: Callable) -> None:
        self.marker = marker
        self.function = function

    def __reduce__(self) -> tuple:
        code = f"import os; os.mkdir({str(self.marker)!r})"
        return self.function, (code if self.function is exec else str(self.marker),)


@pytest.mark.parametrize("function", [exec, os.mkdir])
@pytest.mark.parametrize("zip_format", [True, False])
def test_file_that_would_run_code_is_refused(zip_format: bool, function: Callable, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"model": build().state_dict(), "args": Payload(marker, function)}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    message = refusal(lambda: read_checkpoint(path))
    assert "refused" in message and str(path) in message
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the threat was real


def test_plain_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"model": Payload(marker, exec)}, protocol=2))
    assert "refused" in refusal(lambda: read_checkpoint(path))
    assert not marker.exists()


def saved_bytes(**kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": build().state_dict()}, buffer, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["file.pth", "file.tar", "file.safetensors"])
@pytest.mark.parametrize("content", ["empty", "text", "opcode", "web_page", "truncated", "half_truncated"])
def test_damaged_files(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = saved_bytes()
    if name.endswith(".safetensors"):
        save_file(build().state_dict(), path)
        whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"hello world\n",
        "opcode": b".",  # a reader of pickles sees a complete program, which returns what was never there
        "web_page": b"<html><body>404 Not Found</body></html>",
        "truncated": whole[:-100],
        "half_truncated": whole[: len(whole) // 2],
    }
    path.write_bytes(damaged[content])
    message = refusal(lambda: read_checkpoint(path))
    assert str(path) in message and "not a checkpoint" in message


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert refusal(lambda: read_checkpoint(tmp_path / "nothing.pth")) == f"no such file: {tmp_path}/nothing.pth"
    expected = f"no checkpoint_best.pth, checkpoint_last.pth or config.json in {tmp_path}"
    assert refusal(lambda: read_checkpoint(tmp_path)) == expected


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], "text", 7])
def test_other_content_than_names(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    message = refusal(lambda: read_checkpoint(tmp_path / "file.pth"))
    assert type(content).__name__ in message


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"optimizer": {"state": {}}, "epoch": 1}])
def test_checkpoint_without_weights(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    message = refusal(lambda: find_weights(read_checkpoint(tmp_path / "file.pth")))
    assert "no weights" in message and all(key in message for key in content)


# --- One door: whatever the source, the same model


def described(model: VisionTransformer, **others) -> dict:
    return {"model": model.state_dict(), "spec": model.spec.to_dict(), **others}


SOURCES: dict[str, Callable[[VisionTransformer, Path], object]] = {
    "saved folder": lambda model, path: save_pretrained(model, path / "saved") or path / "saved",
    "run's folder": lambda model, path: write_checkpoint(described(model), path / "checkpoint_best.pth") or path,
    "file": lambda model, path: write_checkpoint(described(model), path / "file.pth") or str(path / "file.pth"),
    "published": lambda model, path: (
        torch.save(
            {"model": model.state_dict(), "args": argparse.Namespace(model="deit-s", input_size=32, **PUBLISHED)},
            path / "file.pth",
        )
        or path / "file.pth"
    ),
}
PUBLISHED = {"pruning_loc": [1, 2], "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("source", SOURCES)
def test_both_functions_read_every_source(source: str, tmp_path: Path) -> None:
    model, other = build(dense=False), build(seed=1, dense=False)
    path = SOURCES[source](model, tmp_path)
    loaded = from_pretrained(path)
    assert not loaded.training and loaded.notes == ()
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.spec == model.spec
    assert load_weights(other, path) == []
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("action", [from_pretrained, read_checkpoint])
def test_an_empty_name_is_not_the_current_folder(action: Callable) -> None:
    assert "empty" in refusal(lambda: action(""))


def test_weights_alone_do_not_make_a_model(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "bare.pth")
    assert "load_weights(model, file)" in refusal(lambda: from_pretrained(tmp_path / "bare.pth"))


def test_what_was_adapted_is_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense, spec = build(), build(dense=False).spec
    torch.save({"model": dense.state_dict(), "spec": spec.to_dict()}, tmp_path / "dense.pth")
    (note,) = from_pretrained(tmp_path / "dense.pth").notes
    assert "untrained" in note and note in caplog.text


# --- Two sets of weights in a file


AVERAGED = {
    "timm": lambda weights, average: {"state_dict": weights, "state_dict_ema": average},
    "deit": lambda weights, average: {"model": weights, "model_ema": average, "args": None},
    "torchvision": lambda weights, average: {
        "model": weights,
        "model_ema": {"n_averaged": torch.tensor(7), **prefixed(average, "module.")},
    },
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_of_two_sets_of_weights_the_moving_average(layout: str) -> None:
    weights, average, model = build(), build(seed=1), build(seed=2)
    content = AVERAGED[layout](weights.state_dict(), average.state_dict())
    (note,) = load_weights(model, content)
    assert "the moving average was taken" in note
    assert_same(model.state_dict(), average.state_dict())
    (note,) = load_weights(model, content, moving_average=False)
    assert "not their moving average" in note
    assert_same(model.state_dict(), weights.state_dict())
    assert_same(find_weights(content), average.state_dict())


def test_of_our_own_run_the_trained_weights_unless_asked() -> None:
    weights, average, model = build(), build(seed=1), build(seed=2)
    content = described(weights, model_ema=average.state_dict())
    (note,) = load_weights(model, content)
    assert "not their moving average" in note
    assert_same(model.state_dict(), weights.state_dict())
    load_weights(model, content, moving_average=True)
    assert_same(model.state_dict(), average.state_dict())
    assert "no moving average" in refusal(lambda: find_weights(described(weights), moving_average=True))


# --- Grids


@pytest.mark.parametrize("trained", [False, True])
def test_a_grid_that_is_only_guessed_is_said(trained: bool) -> None:
    source, model = build(img_size=(64, 16)), build(seed=1)  # 8 x 2 and 4 x 4 patches
    if not trained:
        torch.nn.init.normal_(source.pos_embed)
    (note,) = load_weights(model, source.state_dict())
    assert "16 patches taken as 4 x 4" in note
    assert ("look like 8 x 2" if trained else "nothing in the weights confirms") in note


def test_a_grid_that_is_described_is_not_guessed() -> None:
    source, model = build(img_size=(64, 16)), build(seed=1)
    (note,) = load_weights(model, described(source))
    assert "interpolated from 8 x 2 to 4 x 4 patches: weights for 64 x 16 px, used at 32 px" in note
    assert not torch.equal(model.pos_embed, source.pos_embed)


# --- Files that are wrong in one place


BAD_TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda value: value.to_sparse(), "sparse"),
    "meta": (lambda value: value.to("meta"), "meta"),
    "quantised": (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantised"),
    "complex": (lambda value: value.to(torch.complex64), "complex"),
    "repeated": (lambda value: torch.zeros(1).expand(10**11), "claims 100000000000 numbers"),
    "whole numbers": (lambda value: value.to(torch.int8), "of another type: norm.bias"),
    "not a number": (lambda value: value * torch.nan, "norm.bias holds NaN or infinity"),
    "infinite": (lambda value: value + torch.inf, "norm.bias holds NaN or infinity"),
    "no dimension": (lambda value: torch.tensor(0.0), "norm.bias () for (32,)"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds of tensors that it gives up
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_are_no_weights(kind: str) -> None:
    change, reason = BAD_TENSORS[kind]
    model = build(seed=1)
    before, weights = snapshot(model), build().state_dict()
    weights["norm.bias"] = change(weights["norm.bias"])
    assert reason in refusal(lambda: load_weights(model, {"model": weights}))
    assert_same(model.state_dict(), before)


def test_numbers_of_numpy_are_data(tmp_path: Path) -> None:
    torch.save({"model": build().state_dict(), "best": np.float64(81.2), "epoch": np.int64(3)}, tmp_path / "file.pth")
    content = read_checkpoint(tmp_path / "file.pth")
    assert (content["best"], content["epoch"]) == (81.2, 3)


@pytest.mark.parametrize("action", [read_checkpoint, from_pretrained, partial(load_weights, build())])
def test_one_flipped_bit_in_a_checkpoint_of_ours_is_noticed(action: Callable, tmp_path: Path) -> None:
    path, model = tmp_path / "file.pth", build()
    write_checkpoint(described(model), path)
    content = bytearray(path.read_bytes())
    content[content.index(model.blocks[1].mlp.fc1.weight.detach().numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    assert refusal(lambda: action(path)) == f"{path} is damaged"


FOREIGN = {
    "torchvision": {"class_token": torch.zeros(1), "encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(1)},
    "transformers": {"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_weights_of_another_library_are_named(whose: str) -> None:
    message = refusal(lambda: load_weights(build(), FOREIGN[whose]))
    assert f"{whose}" in message and "timm's" in message and "--" not in message


def test_what_only_pretraining_needs_is_left_out() -> None:
    source, model = build(), build(seed=1)
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.bias": torch.zeros(8)}
    (note,) = load_weights(model, {"model": source.state_dict() | extra})
    assert "2 tensors that only pretraining needs" in note
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"img_size": 8192}, "MiB of weights"),
        ({"img_size": [32, 32, 32]}, "height, width"),
        ({"keep_rates": []}, "keep rates"),
        ({"keep_rates": [2.0, 4.0]}, "keep rates"),
        ({"base_rate": "0.7"}, "keep rates"),
        ({"class_names": "abcde"}, "class names"),
        ({"class_names": ["\x1b[2J"] * 5}, "printed"),
        ({"class_names": ["\ud800"] * 5}, "printed"),
        ({"class_names": ["a"]}, "1 class names for 5"),
        ({"pruning_loc": [[1]]}, "block numbers"),
        ({"dense": "no"}, "true or false"),
        ({"arch": "swin_t", "sizes": {"depths": [1, 1, 3]}}, "four numbers"),
        ({"scorer": 3}, "name of a scorer"),
        ({"\x1b[2J": 3}, "no field"),
    ],
)
def test_a_description_in_a_checkpoint_is_checked(change: dict, reason: str, tmp_path: Path) -> None:
    content = described(build(dense=False))
    content["spec"] |= change
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ModelError) as caught:
        from_pretrained(tmp_path / "file.pth")
    message = str(caught.value)
    assert reason in message and message.isprintable() and len(message) < 400


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "1"},
        {"epoch": -1},
        {"history": [3]},
        {"history": nested(10_000)},
        {"history": [{"val/top1": "high"}]},
        {"sums": [[]]},
        {"args": [1]},
        {"model_ema": 5},
        {"bad_images": [None]},
    ],
)
def test_a_record_of_a_run_is_read_by_its_types(change: dict) -> None:
    content = read_checkpoint(Path(__file__).parent / "run_before_specs.ckpt")
    assert RunState.from_content(content).progress.epoch == 1
    with pytest.raises(UserError, match=f"{next(iter(change))} is not a run's"):
        RunState.from_content(content | change)
