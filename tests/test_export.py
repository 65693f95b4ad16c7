"""Exported files: what they compute, what they carry, and what is refused."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import create_model, from_pretrained, save_pretrained
from dynamicvit.models.describe import data_config
from dynamicvit.tools import export, predict, runtimes

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SPATIAL = {"depths": (1, 1, 2, 1), "pruning_loc": (1,), "keep_rates": (0.5,), "num_classes": 5}
NAMES = ["ant", "bee", "cat", "dog", "elk"]


def build(arch: str = "deit_tiny", seed: int = 0, **changes) -> torch.nn.Module:
    """A model whose scores lie so far apart that rounding cannot change which tokens are kept."""
    torch.manual_seed(seed)
    stages = {"pruning_loc": (1,), "keep_rates": (0.5,)}
    model = create_model(arch, **(changes if "depths" in changes else TINY | stages | changes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=1.0 if name == "pos_embed" else 0.2)
    return model


def outputs(model: torch.nn.Module, path: Path, batch: int | None, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    runtimes.write_onnx(runtimes.exportable(model, half=False), model.spec, path, batch)
    run, _ = predict.load_onnx(path)
    found = []
    for size in sizes:
        images = torch.randn(size, *data_config(model.spec)["input_size"])
        found.append((run(images), model(images).detach()))
    return found


MODELS = {
    "predictor, drop": partial(build, img_size=(32, 48)),
    "attention, merge": partial(
        build, scorer="attention", reducer="merge", depth=3, pruning_loc=(1, 2), keep_rates=(0.7, 0.4)
    ),
    "lvvit": partial(build, "lvvit_s"),
    "swin": partial(build, "swin_t", embed_dim=24, img_size=64, **SPATIAL),
    "convnext": partial(build, "convnext_t", embed_dim=8, img_size=(64, 32), **SPATIAL),
}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_of_any_number_of_images(tmp_path: Path, name: str) -> None:
    for found, expected in outputs(MODELS[name](), tmp_path / "fast.onnx", None, sizes=(1, 5)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_onnx_of_random_scores_draws_anew(tmp_path: Path) -> None:
    model = build(scorer="random")
    runtimes.write_onnx(runtimes.exportable(model, half=False), model.spec, tmp_path / "fast.onnx", 1)
    run, _ = predict.load_onnx(tmp_path / "fast.onnx")
    images = torch.randn(1, 3, 32, 32)
    assert len({tuple(run(images)[0].tolist()) for _ in range(8)}) > 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "fast"
    save_pretrained(build(), folder, class_names=NAMES)
    return folder


def test_the_command(saved: Path, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"--onnx": tmp_path / "fast.onnx", "--torch": tmp_path / "fast.pt2"}
    export.command([str(saved), "--batch-size", "3", *(str(part) for item in files.items() for part in item)])
    printed = capsys.readouterr().out
    assert printed.count("64 of 64 outputs within 0.0001 of PyTorch's") == 2
    assert re.search(r"ONNX Runtime +3 +[\d.]+ +[\d.]+ +[\d.]+\n", printed)
    assert re.search(r"torch.export +3 +[\d.]+ +[\d.]+ +[\d.]+\n", printed)
    assert {path.name for path in tmp_path.iterdir()} == {"fast.onnx", "fast.pt2"}

    photos = [str(image_folder / "val" / "cats" / f"{i}.jpg") for i in range(2)]
    predict.command([str(saved), *photos])
    from_folder = capsys.readouterr().out
    predict.command([str(tmp_path / "fast.onnx"), *photos])
    assert capsys.readouterr().out == from_folder
    assert {line.split()[-1] for line in from_folder.splitlines() if line.startswith("  ")} == set(NAMES)


def test_a_run_is_taken_as_it_is(dense_run: Path, image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """With the names of its classes."""
    predict.command([str(dense_run), str(image_folder / "val" / "cats" / "0.jpg")])
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == {"cats", "dogs"}


def test_a_dynamic_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build()
    torch.save({"model": model.state_dict(), "spec": model.spec.to_dict()}, tmp_path / "checkpoint_best.pth")
    export.command([str(tmp_path), "--torch", str(tmp_path / "fast.pt2")])
    assert "64 of 64 outputs" in capsys.readouterr().out


def test_what_is_no_model_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "fast.pt2").touch()
    torch.save({"model": build().state_dict()}, tmp_path / "bare.pth")
    for source, reason in (
        (tmp_path / "fast.pt2", "torch.export.load or aoti_load_package; give the model it was exported from"),
        (tmp_path / "bare.pth", "does not say which model it belongs to"),
        (tmp_path, "no checkpoint_best.pth, checkpoint_last.pth or config.json"),
    ):
        assert exit_status(lambda source=source: predict.command([str(source), "photo.jpg"])) == 2
        message = capsys.readouterr().err
        assert reason in message and len(message.splitlines()) == 1


def test_a_photo_that_cannot_be_read(saved: Path, image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """The others are answered, and the exit status shows it."""
    photos = [str(image_folder / "val" / "cats" / "0.jpg"), str(image_folder / "none.jpg")]
    assert exit_status(lambda: predict.command([str(saved), *photos])) == 2
    captured = capsys.readouterr()
    assert photos[0] in captured.out and "1 of 2 photos cannot be read" in captured.err


def test_float16(saved: Path, tmp_path: Path) -> None:
    model, images = from_pretrained(saved), torch.randn(64, 3, 32, 32)
    runtimes.write_onnx(runtimes.exportable(model, half=True), model.spec, tmp_path / "half.onnx", 64)
    run, _ = predict.load_onnx(tmp_path / "half.onnx")
    assert "outputs differ from float32's by" in export.compare(model, images, run(images), half=True)


def test_a_wrong_file_is_found_out() -> None:
    model, images = build(), torch.randn(64, 3, 32, 32)
    expected = model(images).detach()
    assert "64 of 64" in export.compare(model, images, expected, half=False)
    expected[7, 2] += 1e-3
    with pytest.raises(UserError, match="1 of 64 outputs differ"):
        export.compare(model, images, expected, half=False)
    with pytest.raises(UserError, match="64 of 64 outputs differ"):
        export.compare(model, images, torch.full_like(expected, float("nan")), half=False)
    with pytest.raises(UserError, match="float16 changes"):
        export.compare(model, images, torch.full_like(expected, float("nan")), half=True)


def test_images_that_rounding_decides_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch's own output jumps when pixels hardly change, another runtime may give either output."""
    images = torch.randn(64, 3, 32, 32)
    model = torch.nn.Flatten()
    model.spec = build().spec
    monkeypatch.setattr(model, "forward", lambda x: (x[:, :1, 0, 0] > 0).float())
    images[:8, 0, 0, 0] = 0  # on the very edge
    expected = model(images)
    found = expected.clone()
    found[:8] = 1 - found[:8]
    assert "56 of 64" in export.compare(model, images, found, half=False)
    found[8] = 1 - found[8]
    with pytest.raises(UserError, match="1 of 64 outputs differ"):
        export.compare(model, images, found, half=False)


def test_embeddings(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    save_pretrained(build(num_classes=0), tmp_path / "fast")
    photos = [str(image_folder / "val" / "cats" / f"{i}.jpg") for i in (0, 0)]
    predict.command([str(tmp_path / "fast"), *photos])
    first, _, last = capsys.readouterr().out.splitlines()
    assert "embedding of 32 numbers" in first
    assert last.endswith(" 1.0000")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to write"),
        (["--onnx", "fast.txt"], "ends in .onnx"),
        (["--onnx", "none/fast.onnx"], "no such folder: none"),
        (["--onnx", "there.onnx"], "exists"),
        (["--onnx", "fast.onnx", "--batch-size", "0"], "must be"),
        (["--onnx", "fast.onnx", "--batch-size", "2", "--dynamic-batch"], "leave out --batch-size"),
        (["--onnx", "fast.onnx", "--images", "none"], "no such folder"),
        (["--torch", "fast.pt2", "--aoti", "fast.pt2"], "need different files"),
    ],
)
def test_refusals(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").touch()
    assert exit_status(lambda: export.command([str(saved), *arguments])) == 2
    message = capsys.readouterr().err
    assert reason in message and len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_missing_packages(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export.command([str(saved), "--onnx", str(tmp_path / "fast.onnx")])


def test_files_that_are_no_models(tmp_path: Path, image_folder: Path) -> None:
    photo = str(image_folder / "val" / "cats" / "0.jpg")
    (tmp_path / "bad.onnx").write_text("no ONNX")
    for name, reason in (
        ("bad.onnx", "ONNX Runtime cannot run"),
        ("none.onnx", "no such file"),
        ("none", "no such file or folder"),
    ):
        with pytest.raises(ValueError if name == "none" else UserError, match=reason):
            predict.command([str(tmp_path / name), photo])
