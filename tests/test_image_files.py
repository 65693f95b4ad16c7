"""Photos as cameras, phones and programs write them: what is read, turned, scaled, reported and refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_THREAD, ROOT, write_images
from dynamicvit.datasets import DataOptions, build_source, read_folder
from dynamicvit.errors import ImageError
from dynamicvit.image_files import ImageFiles, list_images, open_image, warned
from PIL import Image, features


@pytest.fixture(autouse=True)
def nothing_warned_of():
    warned.clear()


def save_turned(path: Path, orientation: int) -> None:
    """A red corner at the top left and a blue one at the top right, once turned as the EXIF data says."""
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :16, 0] = upright[:16, -16:, 2] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_photos_are_turned_upright(tmp_path: Path, extension: str, orientation: int) -> None:
    path = tmp_path / f"phone.{extension}"
    save_turned(path, orientation)
    pixels = np.asarray(open_image(path)).astype(int)
    assert pixels.shape == (32, 64, 3)
    assert pixels[4, 4, 0] > 200 > pixels[4, 4, 2] and pixels[4, -5, 2] > 200 > pixels[4, -5, 0]


def test_who_takes_no_notice_of_exif(tmp_path: Path) -> None:
    """Training and evaluation on a data set, like ImageFolder, unless asked to; everything else turns photos."""
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        save_turned(tmp_path / part / "a" / "phone.jpg", 6)
    for exif, size in ((False, (32, 64)), (True, (64, 32))):
        for train in (True, False):
            source = build_source(train, DataOptions(data_path=str(tmp_path), exif=exif), 32)
            assert source[0][0].size == size
    assert build_source(True, DataOptions(data_path=str(tmp_path)), 32)[0][0].size == (32, 64)
    assert read_folder(tmp_path / "val", labelled=False)[0][0].size == (64, 32)
    assert ImageFiles([(str(tmp_path / "val/a/phone.jpg"), 0)], [], tmp_path)[0][0].size == (64, 32)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00broken", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b""])
def test_broken_exif_data_does_no_harm(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 10)


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEEP = {"16.png": np.uint16, "16.tif": np.uint16, "16.pgm": np.int32, "float.tif": np.float32}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_scaled(tmp_path: Path, name: str) -> None:
    white = 1 if DEEP[name] is np.float32 else 65535
    Image.fromarray((RAMP * white).astype(DEEP[name])).save(tmp_path / name)
    pixels = np.asarray(open_image(tmp_path / name))
    assert pixels.shape == (64, 64, 3) and np.abs(pixels - 255 * RAMP[..., None]).max() <= 1


@pytest.mark.parametrize(
    "values", [RAMP * 255, RAMP - 0.5, np.where(RAMP > 0.5, np.nan, RAMP), np.where(RAMP > 0.5, np.inf, RAMP)]
)
def test_floats_without_a_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="a.tif.*floats outside 0 to 1"):
        open_image(tmp_path / "a.tif")


def test_integers_without_a_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray((RAMP * 65535).astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="a.tif.*32-bit integers"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("extension", "kind"),
    [
        ("jfif", "JPEG"),
        ("gif", "GIF"),
        pytest.param("avif", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow has none")),
    ],
)
def test_formats_beside_torchvisions(tmp_path: Path, extension: str, kind: str) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / f"0.{extension}"
    first, second = Image.new("RGB", (30, 20), (200, 0, 0)), Image.new("RGB", (30, 20), (0, 0, 200))
    first.save(path, kind, **({"save_all": True, "append_images": [second]} if kind == "GIF" else {}))
    assert list_images(tmp_path) == [str(path)] and len(read_folder(tmp_path)) == 1
    assert np.abs(np.asarray(open_image(path)).mean(axis=(0, 1)) - (200, 0, 0)).max() < 10


class TestFilesLeftOut:
    def fill(self, folder: Path, *names: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()

    def test_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.fill(tmp_path, "0.jpg", "1.HEIC", "2.heic", "README", ".hidden.txt")
        self.fill(tmp_path / "more", "3.heic")
        assert len(list_images(tmp_path)) == 1
        assert capsys.readouterr().out == f"{tmp_path}: 4 files left out: .heic (3), no extension (1)\n"
        (tmp_path / "README").unlink()
        self.fill(tmp_path, *(f"a.{i}" for i in range(9)))
        list_images(tmp_path)
        line = capsys.readouterr().out
        assert "12 files left out: .heic (3), " in line and line.endswith(", ...\n") and line.count("(") == 4

    def test_a_data_set_tells_them_once(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        for name in "abc":
            self.fill(tmp_path / "train" / name, "0.jpg", "1.heic")
        self.fill(tmp_path / "train", "notes.txt", "beside.jpg")
        build_source(True, DataOptions(data_path=str(tmp_path)), 32)
        lines = capsys.readouterr().out.splitlines()
        assert f"{tmp_path / 'train'}: 4 files left out: .heic (3), .txt (1)" in lines
        assert [line for line in lines if "1 image(s)" in line and "no class folder" in line] and len(lines) == 2

    def test_photos_without_classes(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.fill(tmp_path, "0.jpg", "1.heic")
        assert len(read_folder(tmp_path, labelled=False)) == 1
        assert capsys.readouterr().out == f"{tmp_path}: 1 file left out: .heic (1)\n"

    def test_nothing_left_out_is_no_line(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.fill(tmp_path / "a", "0.jpg")
        read_folder(tmp_path)
        list_images(tmp_path)
        assert capsys.readouterr().out == ""


def test_large_photos_are_read_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And what is twice as large is a decompression bomb."""
    write_images(tmp_path / "a", 2, size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    for path in list_images(tmp_path):
        assert open_image(path).size == (30, 30)
    captured = capsys.readouterr().err
    assert captured.startswith(f"warning: {tmp_path / 'a' / '0.jpg'} has") and captured.count("\n") == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 449)
    with pytest.raises(ImageError, match="0.jpg.*decompression bomb"):
        open_image(tmp_path / "a" / "0.jpg")


def test_strips_are_refused(tmp_path: Path) -> None:
    """Resized by their short side they would take gigabytes."""
    for size in ((1, 20_000), (20_000, 1), (2, 500)):
        Image.new("L", size).save(tmp_path / "strip.png")
        with pytest.raises(ImageError, match=f"strip.png.*{size[0]} x {size[1]} pixels is so narrow a strip"):
            open_image(tmp_path / "strip.png")
    Image.new("L", (10, 2000)).save(tmp_path / "tall.png")
    assert open_image(tmp_path / "tall.png").size == (10, 2000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    code = "import sys; from dynamicvit.image_files import open_image; open_image(sys.argv[1])"
    command = [sys.executable, "-c", code, tmp_path / "fifo.jpg"]
    result = subprocess.run(command, env=ONE_THREAD, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "ImageError" in result.stderr and "not a regular file" in result.stderr
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)


@pytest.mark.parametrize("error", [EOFError(), IndexError("x"), AttributeError("y"), ZeroDivisionError("z")])
def test_whatever_a_decoder_raises_is_an_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(path: Path) -> None:
        raise error

    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match="a.jpg"):
        open_image(tmp_path / "a.jpg")
