"""The segmentation probe on generated images: what the head learns, what is counted, what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, ROOT, launch
from dynamicvit.errors import UserError
from dynamicvit.models import create_model, make_dynamic, pictures, save_pretrained
from dynamicvit.tools import dense_probe
from dynamicvit.tools.comparison import worst_tenth
from dynamicvit.tools.frames import Frames, read_frames
from dynamicvit.tools.probe import Contender, Probe, count_pairs, draw_pixels, scores
from PIL import Image

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
VOID = 9
FIGURES = ("images", "masks", "val-images", "val-masks")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light rectangles (classes 0 and 1) with a frame that is no class; 72 x 100 pixels."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for part, count in (("", 6), ("val-", 3)):
        for name in ("images", "masks"):
            (root / f"{part}{name}").mkdir()
        for i in range(count):
            mask = np.zeros((72, 100), dtype=np.uint8)
            top, left = rng.integers(4, 30, 2)
            mask[top : top + 32, left : left + 40] = 1
            image = np.where(mask[..., None] == 1, 200, 40) + rng.integers(0, 20, (72, 100, 3))
            mask[:2], mask[-2:] = VOID, VOID
            Image.fromarray(image.astype(np.uint8)).save(root / f"{part}images" / f"{i}.jpg")
            Image.fromarray(mask).save(root / f"{part}masks" / f"{i}.png")
    return root


def folders(scenes: Path) -> list[str]:
    return [word for name in FIGURES for word in (f"--{name}", str(scenes / name))]


def frames(scenes: Path, size: tuple[int, int] = (64, 96), part: str = "") -> Frames:
    return read_frames(scenes / f"{part}images", scenes / f"{part}masks", size, 2, VOID)


def probe(scenes: Path, steps: int = 60) -> Probe:
    how = create_model("deit_tiny", dense=True, **SIZES).spec.preprocessing
    return Probe(frames(scenes), frames(scenes, part="val-"), how, 2, steps, 4, seed=0)


def contenders() -> list[Contender]:
    torch.manual_seed(0)
    dense = create_model("deit_tiny", dense=True, img_size=(64, 96), num_classes=3, **SIZES).eval()
    return [Contender("dense", dense), *dense_probe.faster_models(dense, [1.3])]


def test_frames_are_cut_about_the_centre(scenes: Path) -> None:
    """As they are where they cover the size, else enlarged; a mask stays a mask."""
    cut = frames(scenes, (64, 96))
    image = torch.from_numpy(np.array(Image.open(scenes / "images" / "0.jpg"))).permute(2, 0, 1)
    scaled = frames(scenes, (72, 100)).images[0]
    assert torch.equal(scaled, image)
    assert cut.images.shape == (6, 3, 64, 96) and cut.masks.shape == (6, 64, 96)
    large = frames(scenes, (144, 100))
    assert large.images.shape == (6, 3, 144, 100) and set(large.masks.unique().tolist()) <= {0, 1, 2}
    assert (large.masks[0, :3] == 2).all() and (large.masks[0, 72] != 2).all()


def test_pixels_are_drawn_where_interpolation_puts_them() -> None:
    """The loss sees the very logits that the comparison computes for every pixel."""
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 24, 64), dtype=torch.uint8)
    where, labels = draw_pixels(masks, generator)
    drawn = F.grid_sample(logits, where, padding_mode="border", align_corners=False)[:, :, 0]
    everywhere = F.interpolate(logits, (24, 64), mode="bilinear", align_corners=False)
    columns = ((where[:, 0, :, 0] + 1) * 64 / 2 - 0.5).round().long()
    rows = ((where[:, 0, :, 1] + 1) * 24 / 2 - 0.5).round().long()
    batch = torch.arange(2)[:, None]
    torch.testing.assert_close(drawn.transpose(1, 2), everywhere[batch, :, rows, columns], rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, masks[batch, rows, columns].long())


def test_scores_by_hand() -> None:
    labels, answers = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 1, 0])
    confusion = count_pairs(labels, answers, 3)  # 3 is no class
    found = scores(confusion)
    assert found["miou"] == pytest.approx(100 * (2 / 3 + 1 / 3 + 0) / 3)
    assert found["accuracy"] == pytest.approx(100 * 3 / 5)
    absent = scores(count_pairs(torch.tensor([0, 1]), torch.tensor([0, 1]), 3))
    assert absent["miou"] == pytest.approx(100)
    assert worst_tenth(torch.stack([torch.arange(20.0), torch.arange(20.0) + 3])).tolist() == [0.5, 3.5]


def test_the_head_learns_and_faster_models_are_near(scenes: Path) -> None:
    job, models = probe(scenes), contenders()
    head = job.train(models[0])
    rows = {model.name: job.row(model, models[0], head) for model in models}
    assert rows["dense"]["miou"] > 80 and "cosine" not in rows["dense"]
    assert set(rows) == {"dense", "residual, 1.3", "copy, 1.3", "ToMe, 1.3"}
    assert rows["copy, 1.3"]["worst"] < rows["copy, 1.3"]["cosine"] < rows["residual, 1.3"]["cosine"] < 1
    assert rows["residual, 1.3"]["fewer"] == pytest.approx(1.3, abs=0.1)
    assert rows["residual, 1.3"]["gflops"] == rows["copy, 1.3"]["gflops"]


def test_a_model_with_all_tokens_loses_nothing(scenes: Path) -> None:
    job, models = probe(scenes), contenders()
    models[1].model.set_keep_rates([1.0] * len(models[1].model.keep_rates))
    head = job.train(models[0])
    dense, kept = (job.row(model, models[0], head) for model in models[:2])
    assert kept["cosine"] == pytest.approx(1, abs=1e-4) and kept["miou"] == pytest.approx(dense["miou"], abs=0.2)


def test_whole_command(scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = create_model("deit_tiny", dense=True, img_size=64, num_classes=3)
    torch.save({"model": dense.state_dict()}, tmp_path / "deit.pth")
    save_pretrained(make_dynamic(dense, speedup=1.3, for_features=True), tmp_path / "saved")
    output = tmp_path / "tables.md"
    words = "--input-size 64 96 --classes 2 --ignore 9 --speedups 1.3 --steps 5 --rounds 1 --own-heads --device cpu"
    drawn = ["--photos", *(scenes / "images" / f"{i}.jpg" for i in range(2)), "--picture", tmp_path / "features.png"]
    files = ["--weights", tmp_path / "deit.pth", "--also", tmp_path / "saved", "--output", output]
    command = [sys.executable, "-m", "tools.dense_probe", "deit_tiny", *folders(scenes), *words.split(), *files, *drawn]
    result = launch([*map(str, command)], ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    first, second = output.read_text().split("Each with a head of its own:")
    for name in ("dense", "residual, 1.3", "copy, 1.3", "ToMe, 1.3", "saved"):
        assert f"| {name} |" in first and f"| {name} |" in second
    assert "times as fast" in first and "times as fast" not in second
    assert output.read_text() in result.stdout
    width, height = Image.open(tmp_path / "features.png").size
    assert width == 4 * (96 + pictures.GAP) + pictures.GAP and height > 2 * 64  # photo, dense, residual, saved


def test_bad_input_is_one_line(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    for i in range(6):
        Image.fromarray(np.zeros((10, 10), dtype=np.uint8)).save(tmp_path / "small" / f"{i}.png")
    for images, masks, classes, message in (
        (scenes / "images", tmp_path / "none", 2, "no folder"),
        (tmp_path / "empty", scenes / "masks", 2, "no images in"),
        (scenes / "images", scenes / "val-masks", 2, "no mask 3"),
        (scenes / "images", scenes / "images", 2, "is no mask"),
        (scenes / "images", scenes / "masks", 1, "has class 1; --classes and --ignore allow 0 to 0"),
        (scenes / "images", tmp_path / "small", 2, r"its mask has \(10, 10\)"),
    ):
        with pytest.raises(UserError, match=message):
            read_frames(images, masks, (64, 96), classes, VOID)
    with pytest.raises(UserError, match="has no transformer blocks to merge tokens between: give a ViT"):
        torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "convnext.pth")
        dense_probe.build_dense("test_convnext", str(tmp_path / "convnext.pth"), None)
