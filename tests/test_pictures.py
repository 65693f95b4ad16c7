import argparse
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import pictures
from datasets import BatchTransform
from main_dynamic_vit import build_model, parse_args
from models import create_model
from shapes import Shapes
from tools import visualize

ROOT = Path(__file__).parents[1]
MODEL = "--input-size 32 --patch-size 8 --embed-dim 32 --depth 4 --num-heads 2 --pruning-loc 1 2 3 --base-rate 0.6"
GRID, KEPT = (4, 4), (9, 5, 3)  # of that model: 16 patches, of which int(16 * 0.6 ** stage) stay


def random_image(height: int, width: int) -> Tensor:
    """Without white, so that whitened pixels can be told from the image's own."""
    return torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_model(arch: str = "deit_tiny", num_classes: int = 2, **changes) -> tuple[torch.nn.Module, argparse.Namespace]:
    args = parse_args(["--arch", arch, *MODEL.split()])
    vars(args).update(num_classes=num_classes, **changes)
    torch.manual_seed(1)
    model = build_model(args, dense=False).eval()
    for parameter in model.parameters():  # far enough from initialisation that images differ in their scores
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, args


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/<class> with images grayscale and odd among them, and the checkpoint of a model for them in run/."""
    root = tmp_path_factory.mktemp("data")
    for name in ("cats", "dogs"):
        (root / "val" / name).mkdir(parents=True)
    pixels = random_image(60, 90).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0]).save(root / "val" / "cats" / "gray.png")
    Image.fromarray(pixels[:33, :81]).save(root / "val" / "cats" / "odd.png")
    Image.fromarray(pixels[:32, :32]).save(root / "val" / "dogs" / "small.png")
    (root / "val" / "notes.txt").write_text("no image")
    model, args = tiny_model(data_path=str(root))
    (root / "run").mkdir()
    torch.save({"model": model.state_dict(), "args": vars(args)}, root / "run" / "checkpoint_last.pth")
    return root


def cli(module: str, *args: str | Path) -> int:
    """Runs python -m module in this process; returns the exit status."""
    argv = sys.argv
    sys.argv = [module, *map(str, args)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


@pytest.mark.parametrize(("grid", "patch"), [((4, 4), (8, 8)), ((2, 3), (5, 5)), ((3, 2), (4, 7)), ((1, 5), (16, 16))])
def test_exactly_the_dropped_patches_are_white(grid: tuple[int, int], patch: tuple[int, int]) -> None:
    (rows, columns), (patch_height, patch_width) = grid, patch
    height, width = rows * patch_height, columns * patch_width
    image = random_image(height, width)
    kept = [torch.tensor([4, 0, 3]), torch.tensor([3, 4]), torch.tensor([4])]
    assert pictures.keep_mask(kept, grid).flatten(1).nonzero().tolist() == [
        *([0, 0], [0, 3], [0, 4]),
        *([1, 3], [1, 4]),
        *([2, 4],),
    ]
    gap = pictures.GAP
    strip = pictures.strip(image, kept, grid)
    assert strip.dtype == torch.uint8
    expected = torch.full((3, height + 2 * gap, 4 * width + 5 * gap), pictures.PAGE, dtype=torch.uint8)
    for panel, indices in enumerate([range(rows * columns), *(stage.tolist() for stage in kept)]):
        for y in range(height):
            for x in range(width):
                is_kept = (y // patch_height) * columns + x // patch_width in indices
                expected[:, gap + y, gap + panel * (width + gap) + x] = image[:, y, x] if is_kept else 255
    assert torch.equal(strip, expected)


def test_grid_that_does_not_fit_the_picture() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels cannot be cut into 4 x 4"):
        pictures.strip(random_image(30, 32), [torch.tensor([0])], GRID)


def test_heat_map_is_lightest_where_the_score_peaks() -> None:
    scores = torch.tensor([0.2, 0.5, 0.1, torch.nan, 0.9, 0.3])
    image = torch.full((3, 8, 15), 100, dtype=torch.uint8)
    picture = pictures.heat_map(scores, (2, 3), image)
    patches = picture.float().unfold(1, 4, 4).unfold(2, 5, 5)  # (3, 2, 3, 4, 5)
    assert torch.equal(patches, patches[..., :1, :1].expand_as(patches)), "a patch has one colour"
    lightness = patches.mean(dim=(0, 3, 4)).flatten()
    assert lightness.argsort(descending=True).tolist() == [3, 4, 1, 5, 0, 2]
    assert lightness[3] == 255 > lightness[4]
    assert torch.isfinite(pictures.heat_map(torch.ones(6), (2, 3), image).float()).all()


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_prune_tells_what_the_model_did_and_leaves_it_alone(arch: str) -> None:
    model, _ = tiny_model(arch)
    images = torch.stack([random_image(32, 32), random_image(32, 32).flip(2)])
    with torch.no_grad():
        logits = model(BatchTransform(torch.device("cpu"))(images))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruning = pictures.prune(model, images)
    assert model.training and not any(predictor._forward_hooks for predictor in model.score_predictor)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(pruning.logits, logits)
    assert [indices.shape for indices in pruning.kept] == [(2, count) for count in KEPT]
    for stage, indices in enumerate(pruning.kept):
        scores = pruning.scores[:, stage]
        assert ((scores >= 0) & (scores <= 1) | scores.isnan()).all()
        best = scores.nan_to_num(-1).topk(KEPT[stage]).indices
        assert torch.equal(best.sort().values, indices.sort().values)
        left = [set(range(16))] * 2 if stage == 0 else [set(row) for row in pruning.kept[stage - 1].tolist()]
        assert [set(row.isfinite().nonzero()[:, 0].tolist()) for row in scores] == left


def test_tensorboard_reads_back_what_was_drawn(tmp_path: Path) -> None:
    model, _ = tiny_model()
    images = torch.stack([random_image(32, 32), random_image(32, 32).flip(1), random_image(32, 32).flip(2)])
    pruning = pictures.prune(model, images)
    sheets = {
        "strips": pictures.sheet_of_strips(images, pruning, GRID),
        "scores": pictures.sheet_of_heat_maps(images, pruning, GRID),
    }
    with SummaryWriter(tmp_path) as writer:
        for tag, sheet in sheets.items():
            writer.add_image(tag, sheet, global_step=3)
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, sheet in sheets.items():
        (event,) = events.Images(tag)
        # 4 panels of 32 and 5 gaps of 6 in a strip, and a gap around each of the 3 strips
        assert (event.step, event.width, event.height) == (3, 158 + 12, 3 * (44 + 6) + 6)
        read_back = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(read_back, sheet.permute(1, 2, 0).numpy())
    kept = [indices[0] for indices in pruning.kept]
    assert torch.equal(sheets["strips"][:, 6:50, 6:164], pictures.strip(images[0], kept, GRID))


def test_visualize_a_folder(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.visualize", str(folder / "val"), "--gif", "--output", str(tmp_path / "out")]
    command += ["--resume", str(folder / "run")]
    result = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    names = ["000_gray", "001_odd", "002_small"]
    expected = {"contact_sheet.png", *(f"{name}_strip.png" for name in names), *(f"{name}.gif" for name in names)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected

    # panels of 32 pixels are enlarged 7 times; below each a line of text, below all of them two
    panel_height = 224 + 6 + 20
    size = (4 * (224 + 6) + 6, panel_height + 2 * 6 + 6 + 2 * 20)
    for name in names:
        assert Image.open(tmp_path / "out" / f"{name}_strip.png").size == size
        with Image.open(tmp_path / "out" / f"{name}.gif") as animation:
            assert (animation.n_frames, animation.size) == (4, (224, panel_height))
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (size[0] + 12, 3 * (size[1] + 6) + 6)

    model, _ = tiny_model()
    # a photo is resized and cropped as in ImageNet's validation, though it has the model's size
    small = Image.open(folder / "val/dogs/small.png")
    crop = visualize.preprocess(small, parse_args(MODEL.split()))
    assert crop.shape == (3, 32, 32) and not torch.equal(crop, random_image(60, 90)[:, :32, :32])
    big = crop.repeat_interleave(7, dim=1).repeat_interleave(7, dim=2)
    kept = [indices[0] for indices in pictures.prune(model, crop[None]).kept]
    strip = torch.from_numpy(np.array(Image.open(tmp_path / "out/002_small_strip.png"))).permute(2, 0, 1)
    for stage, panel in enumerate(pictures.panels(big, kept, GRID)):
        left = 6 + stage * 230
        assert torch.equal(strip[:, 6:230, left : left + 224], panel)


def test_visualize_shapes_and_one_image(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "run" / "checkpoint_last.pth"
    assert cli("tools.visualize", "SHAPES", "--count", 2, "--resume", checkpoint, "--output", tmp_path) == 0
    assert cli("tools.visualize", folder / "val/cats/odd.png", "--resume", checkpoint, "--output", tmp_path) == 0
    names = {f"00{i}_{Shapes.classes[i].replace(' ', '_')}_strip.png" for i in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "contact_sheet.png", "odd_strip.png"}


def test_caption_gives_both_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny_model(num_classes=5)
    dense = build_model(args, dense=True).eval()
    dense.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("score_predictor.")})
    image = random_image(32, 32)
    normalised = BatchTransform(torch.device("cpu"))(image[None])
    with torch.no_grad():
        probabilities = {"all tokens": dense(normalised).softmax(1)[0], "dynamic": model(normalised).softmax(1)[0]}
    assert probabilities["all tokens"].max() != probabilities["dynamic"].max()

    texts = []
    monkeypatch.setattr(pictures, "caption", lambda picture, lines, **_: texts.append(lines) or picture)
    visualize.draw(model, image, ["ant", "bee", "cat", "dog", "eel"], trained=True)
    *panels, lines = texts
    assert panels == [["input"], *([f"stage {i}: {kept} of 16 tokens"] for i, kept in enumerate(KEPT, 1))]
    assert lines == [
        f"{what}: {['ant', 'bee', 'cat', 'dog', 'eel'][p.argmax()]}, {p.max():.1%}" for what, p in probabilities.items()
    ]
    visualize.draw(model, image, ["ant", "bee", "cat", "dog", "eel"], trained=False)
    assert texts[-1][1].startswith("dynamic, untrained: ")


def test_class_names(folder: Path) -> None:
    _, args = tiny_model(data_path=str(folder))
    assert visualize.class_names(args) == ["cats", "dogs"]
    args.data_path = str(folder / "moved")
    assert visualize.class_names(args) == ["class 0", "class 1"]
    args.num_classes = 1000
    assert visualize.class_names(args)[:2] == ["tench", "goldfish"]
    args.num_classes, args.data_set = len(Shapes.classes), "SHAPES"
    assert list(visualize.class_names(args)) == list(Shapes.classes)


def test_arguments_come_from_the_checkpoint_unless_given(folder: Path, tmp_path: Path) -> None:
    model, args = tiny_model("lvvit_s", num_classes=7)
    # published checkpoints hold a Namespace, with arguments of their own in it
    stored = argparse.Namespace(**vars(args) | {"keep_rates": [0.9, 0.8, 0.7], "num_classes": None, "auto_resume": 1})
    file = tmp_path / "published.pth"
    torch.save({"model": model.state_dict(), "args": stored}, file)
    options = visualize.build_parser().parse_args(["x.png", "--resume", str(file)])
    loaded, loaded_args, trained = visualize.load_model(options)
    assert trained and loaded.keep_rates == (0.9, 0.8, 0.7) and hasattr(loaded, "aux_head")
    assert loaded_args.num_classes == 7 and not hasattr(loaded_args, "auto_resume")
    loaded, _, _ = visualize.load_model(options, base_rate=0.5)
    assert loaded.keep_rates == (0.5, 0.25, 0.125)

    dense = create_model("deit_tiny", num_classes=3, img_size=32, dense=True)
    torch.save(dense.state_dict(), file)
    options = ["x.png", "--pretrained", str(file), "--arch", "deit_tiny", "--input-size", "64"]
    loaded, loaded_args, trained = visualize.load_model(visualize.build_parser().parse_args(options))
    assert not trained and loaded.patch_embed.grid_size == (4, 4) and loaded_args.num_classes == 3


def test_newest_run_and_its_best_checkpoint_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    times = {"logs/old/checkpoint_best.pth": 10, "logs/new/checkpoint_best.pth": 20, "logs/new/checkpoint_last.pth": 30}
    for name, time in times.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    assert visualize.locate_checkpoint(None) == Path("logs/new/checkpoint_best.pth")
    assert visualize.locate_checkpoint("logs/old") == Path("logs/old/checkpoint_best.pth")
    os.utime("logs/old/checkpoint_best.pth", (40, 40))
    assert visualize.locate_checkpoint(None) == Path("logs/old/checkpoint_best.pth")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["photo.png"], "no trained run under logs/"),
        (["photo.png", "--resume", "missing.pth"], "no such file: missing.pth"),
        (["photo.png", "--resume", "."], "no checkpoint_best.pth or checkpoint_last.pth in ."),
        (["photo.png", "--resume", "photo.png"], "photo.png is not a checkpoint"),
        (["photo.png", "--pretrained", "bare.pth"], "bare.pth does not tell its architecture; add --arch"),
        (["photo.png", "--pretrained", "bare.pth", "--arch", "deit_tiny"], "bare.pth holds no classifier"),
        (["photo.png", "--resume", "{run}", "--arch", "lvvit_s"], "the weights do not fit the model"),
        (["missing.png", "--resume", "{run}"], "no image, and no folder of images: missing.png"),
        (["empty", "--resume", "{run}"], "no image, and no folder of images: empty"),
        (["bare.pth", "--resume", "{run}"], "cannot read image bare.pth"),
        (["photo.png", "--resume", "{run}", "--base-rate", "1.5"], "keep rates must lie in (0, 1]"),
        (["photo.png", "--resume", "{run}", "--count", "0"], "--count must be at least 1"),
        (["photo.png", "--resume", "{run}", "--output", "bare.pth"], "File exists: 'bare.pth'"),
    ],
)
def test_user_errors_are_one_line(
    args: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("photo.png")
    Path("empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, "bare.pth")
    assert cli("tools.visualize", *(word.format(run=folder / "run") for word in args)) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
