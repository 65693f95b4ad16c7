"""Weights from every file that users have; and from no other."""

import argparse
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dynamicvit.models import CheckpointError, create_model, find_weights, load_weights, read_checkpoint
from dynamicvit.runs.checkpoints import write_checkpoint
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
    """Unpickled by a careless reader, it makes a folder; it could as well do anything else."""

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
        "opcode": b".",  # to a reader of pickles this is a whole program, that returns what was never there
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
