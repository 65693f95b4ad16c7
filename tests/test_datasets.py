"""Data sets in the layouts that users have, images of every kind, and the way from file to batch."""

import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from dynamicvit.datasets import (
    IGNORED_LABEL,
    Augmentation,
    AugmentedDataset,
    BatchTransform,
    DataOptions,
    build_source,
    build_train_loader,
    build_val_loader,
    check_num_workers,
    eval_transform,
    fingerprint,
    read_folder,
    seed_cpu,
    train_transform,
)
from dynamicvit.errors import ImageError, UserError
from dynamicvit.image_files import ImageFiles, list_images, open_image
from dynamicvit.models.spec import Preprocessing
from dynamicvit.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from dynamicvit import datasets

CPU = torch.device("cpu")
IMAGENET = Preprocessing()
AS_IS = Augmentation(color_jitter=0, aa="none", reprob=0, scale=(1, 1))  # of square images: flips alone


def build(
    train: bool, path: Path, data_set: str = "IMNET", labelled: bool = True, skip_bad: bool = False, **options
) -> AugmentedDataset:
    transform = train_transform(32, Augmentation(), data_set) if train else eval_transform(32, IMAGENET, data_set)
    source = build_source(train, DataOptions(data_set, str(path), **options), 32, labelled)
    return AugmentedDataset(source, transform, train, skip_bad)


def write_files(root: Path, *names: str) -> None:
    """Files that hold their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Images


def save_red(folder: Path) -> dict[str, Path]:
    """The same red square in every mode and with junk around it."""
    folder.mkdir(parents=True)
    red = Image.new("RGB", (50, 40), (200, 0, 0))
    exif = Image.Exif()
    exif[0x010E] = "x" * 5000
    paths = {name: folder / name for name in ("cmyk.jpg", "palette.png", "alpha.png", "exif.jpg", "junk.jpg")}
    red.convert("CMYK").save(paths["cmyk.jpg"], quality=95)
    red.convert("P").save(paths["palette.png"], transparency=3)
    red.convert("RGBA").save(paths["alpha.png"])
    red.save(paths["exif.jpg"], exif=exif, quality=95)
    red.save(paths["junk.jpg"], exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken", quality=95)
    return paths


def test_every_kind_of_image_is_read_as_rgb(tmp_path: Path) -> None:
    for path in save_red(tmp_path / "red").values():
        image = open_image(str(path))
        assert image.mode == "RGB" and image.size == (50, 40)
        assert np.abs(np.asarray(image).mean(axis=(0, 1)) - (200, 0, 0)).max() < 10, path.name
    grey = tmp_path / "grey.png"
    Image.new("L", (50, 40), 77).save(grey)
    assert open_image(str(grey)).getpixel((3, 3)) == (77, 77, 77)


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(ImageError, match="broken.jpg"):
        open_image(str(path))


def with_bad_images(root: Path, train: bool) -> tuple[AugmentedDataset, list[str]]:
    """Images 0 to 4 of class 0 and one of class 1; 1, 2 and 5 are broken. Returns their paths, too."""
    part = "train" if train else "val"
    write_images(root / part / "a", 5)
    write_images(root / part / "b", 1)
    bad = [root / part / "a" / "1.jpg", root / part / "a" / "2.jpg", root / part / "b" / "0.jpg"]
    for path, content in zip(bad, (b"", b"text", bad[2].read_bytes()[:300]), strict=True):
        path.write_bytes(content)
    return build(train, root, skip_bad=True), [str(path) for path in bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_next_good_image_stands_in_for_a_bad_one(tmp_path: Path, workers: int) -> None:
    """Validation does not count it. Loader processes report which ones were bad."""
    train, bad = with_bad_images(tmp_path, train=True)
    images, labels = next(iter(DataLoader(train, 6, sampler=[(i, 7) for i in range(6)], num_workers=workers)))
    assert torch.equal(images[1], images[3]) and torch.equal(images[2], images[3])
    assert torch.equal(images[5], images[0]) and not torch.equal(images[0], images[3])
    assert labels.tolist() == [0] * 6 and train.bad_images() == bad
    val, bad = with_bad_images(tmp_path, train=False)
    _, labels = next(iter(DataLoader(val, 6, num_workers=workers)))
    assert labels.tolist() == [0, IGNORED_LABEL, IGNORED_LABEL, 0, 0, IGNORED_LABEL] and val.bad_images() == bad
    assert [label for _, label in val] == labels.tolist()  # and there it ends


def test_only_bad_images(tmp_path: Path) -> None:
    train, _ = with_bad_images(tmp_path, train=True)
    for path in tmp_path.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ImageError):
        train[0, 7]


# Listing files


def test_links_count_no_image_twice(tmp_path: Path) -> None:
    """A link to a folder above is not a class and leads nowhere; folders that link to each other count once."""
    write_files(tmp_path, "train/a/0.jpg", "train/a/deep/1.jpg", "train/a/p/2.jpg", "train/a/q/3.jpg", "train/b/4.jpg")
    train = tmp_path / "train"
    for link, target in {"all": ".", "root": "..", "a/deep/up": "..", "a/p/q": "../q", "a/q/p": "../p"}.items():
        (train / link).symlink_to(target, target_is_directory=True)
    source = build_source(True, DataOptions(data_path=str(tmp_path)), 32)
    assert source.classes == ["a", "b"]
    images = ["a/0.jpg", "a/deep/1.jpg", "a/p/2.jpg", "a/q/3.jpg", "b/4.jpg"]
    assert [path for path, _ in source.samples()] == [str(train / image) for image in images]


def test_links_to_images_and_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    write_files(tmp_path, "elsewhere/0.jpg", "elsewhere/cats/1.jpg")
    folder = tmp_path / "images" / "mine"
    folder.mkdir(parents=True)
    (folder / "x.jpg").symlink_to(tmp_path / "elsewhere" / "0.jpg")
    (folder / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    assert list_images(tmp_path / "images") == [str(folder / "x.jpg"), str(folder / "cats" / "1.jpg")]


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    hidden = ("train/.ipynb_checkpoints/0.jpg", "train/a/.thumbnails/0.jpg", "train/a/._0.jpg")
    write_files(tmp_path, "train/a/0.jpg", *hidden)
    source = build_source(True, DataOptions(data_path=str(tmp_path)), 32)
    assert source.classes == ["a"] and list(source.samples()) == [(str(tmp_path / "train/a/0.jpg"), 0)]


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    """A FIFO would be waited for without end. A link to nothing stays, to be named when it is read."""
    write_files(tmp_path, "0.jpg", "folder.jpg/1.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "to_fifo.jpg").symlink_to("fifo.jpg")
    (tmp_path / "nothing.jpg").symlink_to("gone.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    names = ["0.jpg", "itself.jpg", "nothing.jpg", "folder.jpg/1.jpg"]
    assert list_images(tmp_path) == [str(tmp_path / name) for name in names]
    with pytest.raises(ImageError, match="itself.jpg"):
        open_image(tmp_path / "itself.jpg")


def test_images_come_in_torchvisions_order(tmp_path: Path) -> None:
    """Which is what shuffling, resuming and fingerprints of earlier runs rest on."""
    write_files(tmp_path, *(f"train/{name}" for name in ("b/c/1.PNG", "b/c-d/2.jpg", "b/C.jpg", "b/a.webp", "B/é.tif")))
    write_files(tmp_path, "train/b/c/notes.txt", "train/b/10.jpeg", "train/b/9.jpeg")
    source = build_source(True, DataOptions(data_path=str(tmp_path)), 32)
    expected = ImageFolder(str(tmp_path / "train"))
    assert list(source.samples()) == expected.samples and source.classes == expected.classes


def test_paths_take_little_memory() -> None:
    """About their own length. As objects these would take 220 bytes each, and be copied into every loader process."""

    def samples() -> list[tuple[str, int]]:
        return ((f"/data/train/n{i % 1000:08}/n{i % 1000:08}_{i:05}.JPEG", i % 1000) for i in range(20_000))

    tracemalloc.start()
    files = ImageFiles(samples(), ["class"] * 1000, Path("/data"))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / len(files) < 80
    assert list(files.samples()) == list(samples()) and files.path(-1) == list(samples())[-1][0]
    with pytest.raises(IndexError):
        files[len(files)]
    assert len(pickle.dumps(files)) / len(files) < 80  # sent to loader processes where they are not forked


def test_file_names_in_any_encoding(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write_images(tmp_path / "train" / "a", 1)
    (tmp_path / "train" / "a" / "0.jpg").rename(tmp_path / "train" / "a" / name)
    source = build_source(True, DataOptions(data_path=str(tmp_path)), 32)
    assert source.path(0) == str(tmp_path / "train" / "a" / name)
    assert source[0][0].size == (36, 40) and fingerprint(source)


# Data sets


def test_fingerprint_is_of_the_content_and_not_the_place(tmp_path: Path) -> None:
    write_images(tmp_path / "here" / "train" / "a", 3)
    write_images(tmp_path / "here" / "train" / "b", 3)
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def taken(place: str) -> str:
        return fingerprint(build_source(True, DataOptions(data_path=str(tmp_path / place)), 32))

    folder, before = tmp_path / "there" / "train", taken("here")
    assert taken("there") == before
    (folder / "a" / "0.jpg").rename(folder / "a" / "9.jpg")
    renamed = taken("there")
    (folder / "a" / "9.jpg").rename(folder / "b" / "9.jpg")
    moved = taken("there")
    (folder / "b" / "9.jpg").write_bytes(b"other")
    resized = taken("there")
    (folder / "b" / "9.jpg").unlink()
    assert len({before, renamed, moved, resized, taken("there")}) == 5


def test_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Or every run that is resumed would warn. The values were computed when paths were a list of tuples."""
    write_files(tmp_path, "train/a/1.jpg", "train/a/B.JPEG", "train/a/c-d/2.png", "train/a/c/d.webp", "train/b/é.jpg")
    write_files(tmp_path, "val/b/0.bmp")
    train, val = (build_source(part, DataOptions(data_path=str(tmp_path)), 32) for part in (True, False))
    assert fingerprint(train) == "5 images, ba2a13732de7df5a"
    assert fingerprint(val) == "1 images, 6addaa54a8a70cac"


def test_labels_are_ranks_of_the_training_folders(tmp_path: Path) -> None:
    """Though validation has only some of them."""
    for name in ("a", "b", "c"):
        write_images(tmp_path / "train" / name, 2)
    write_images(tmp_path / "val" / "c", 1)
    train, val = (build(part, tmp_path) for part in (True, False))
    assert train.source.classes == ["a", "b", "c"] and len(train) == 6
    assert [label for _, label in val] == [2]


def test_validation_class_unknown_in_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 1)
    write_images(tmp_path / "val" / "b", 1)
    with pytest.raises(UserError, match="b"):
        build(False, tmp_path)


def test_wordnet_ids_have_imagenet_labels(tmp_path: Path) -> None:
    """n01440764 is ImageNet's class 0 and n15075141 its class 999."""
    for name in ("n01440764", "n15075141"):
        write_images(tmp_path / "val" / name, 1)
    val = build(False, tmp_path)
    assert [label for _, label in val] == [0, 999] and len(val.source.classes) == 1000
    val = build(False, tmp_path, num_classes=2)
    assert [label for _, label in val] == [0, 1]


def test_class_folder_without_images_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_files(tmp_path, "train/a/0.jpg", "train/empty/readme.txt")
    assert build_source(True, DataOptions(data_path=str(tmp_path)), 32).classes == ["a", "empty"]
    assert "empty" in capsys.readouterr().out


def test_images_without_class_folders(tmp_path: Path) -> None:
    """Only for callers that need no labels; class folders still give them."""
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val" / "a", 1)
    with pytest.raises(UserError, match="no class folders"):
        build(True, tmp_path)
    train = build(True, tmp_path, labelled=False)
    assert train.source.classes == [] and [train[i, 3][1] for i in range(2)] == [IGNORED_LABEL] * 2
    assert train[0, 3][0].shape == (3, 32, 32) and fingerprint(train.source).startswith("2 images, ")
    val = build(False, tmp_path, labelled=False)
    assert val.source.classes == ["a"] and [label for _, label in val] == [0]


def test_a_folder_of_photos(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Images beside the folders: these are albums, not classes."""
    write_files(tmp_path, "0.jpg", "holidays/1.jpg", "holidays/2024/2.jpg")
    photos = read_folder(tmp_path, labelled=False)
    names = ["0.jpg", "holidays/1.jpg", "holidays/2024/2.jpg"]
    assert list(photos.samples()) == [(str(tmp_path / name), IGNORED_LABEL) for name in names]
    assert "not taken as classes" in capsys.readouterr().out
    (tmp_path / "0.jpg").unlink()
    photos = read_folder(tmp_path, labelled=False)
    assert photos.classes == ["holidays"] and list(photos.labels) == [0, 0]


@pytest.mark.parametrize("labelled", [True, False])
def test_no_images(tmp_path: Path, labelled: bool) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no images found for training"):
        build_source(True, DataOptions(data_path=str(tmp_path)), 32, labelled)


@pytest.mark.parametrize(
    ("data_set", "path", "message"),
    [
        ("IMNET", "", "--data-path is missing"),
        ("IMNET", "nowhere", "no data folder nowhere"),
        ("IMNET", ".", "no folder val"),
        ("PETS", ".", "unknown --data-set PETS"),
    ],
)
def test_no_such_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_set: str, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        build_source(False, DataOptions(data_set, path), 32)


@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist(tmp_path: Path, data_set: str, year: int) -> None:
    """Labels go by first appearance in the training annotations: category 7 is 0, category 3 is 1."""
    write_images(tmp_path / "train_val" / "Birds" / "7", 2)
    write_images(tmp_path / "train_val" / "Birds" / "3", 1)
    files = {1: "train_val/Birds/7/0.jpg", 2: "train_val/Birds/3/0.jpg", 3: "train_val/Birds/7/1.jpg"}

    def write(name: str, categories: dict[int, int]) -> None:
        listing = {
            "images": [{"id": image, "file_name": files[image]} for image in categories],
            "annotations": [{"image_id": image, "category_id": category} for image, category in categories.items()],
        }
        (tmp_path / f"{name}{year}.json").write_text(json.dumps(listing))

    write("train", {1: 7, 2: 3})
    write("val", {3: 7})
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 3, "name": "tit"}, {"id": 7, "name": "owl"}]))
    train, val = (build(part, tmp_path, data_set) for part in (True, False))
    assert train.source.classes == ["owl", "tit"]
    assert [label for _, label in train] == [0, 1] and [label for _, label in val] == [0]

    write("val", {3: 5})
    with pytest.raises(UserError, match=f"val{year}.json: image 3 has no category"):
        build(False, tmp_path, data_set)
    files[3] = "../outside.jpg"
    write("val", {3: 7})
    with pytest.raises(UserError, match="outside"):
        build(False, tmp_path, data_set)


LISTING = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 7}]}
CATEGORIES = [{"id": 7, "name": "owl"}]


@pytest.mark.parametrize(
    ("listing", "categories"),
    [
        ("[" * 100_000, CATEGORIES),
        (b"\xff\xfe", CATEGORIES),
        ([LISTING], CATEGORIES),
        ({"images": LISTING["images"]}, CATEGORIES),
        (LISTING | {"images": {"id": 1}}, CATEGORIES),
        (LISTING | {"images": ["a.jpg"]}, CATEGORIES),
        (LISTING | {"images": [{"id": [1], "file_name": "a.jpg"}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 2, "file_name": "a.jpg"}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 1, "file_name": 5}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 1, "file_name": "a\0.jpg"}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 1, "file_name": "loop/a.jpg"}]}, CATEGORIES),
        (LISTING | {"images": [{"id": 1, "file_name": "../\n\33[2J"}]}, CATEGORIES),
        (LISTING | {"annotations": [{"image_id": 1, "category_id": True}]}, CATEGORIES),
        (LISTING | {"annotations": [{"image_id": 1, "category_id": -(10**30)}]}, CATEGORIES),
        (LISTING, {"7": "owl"}),
        (LISTING, [{"id": 7, "name": {"en": "owl"}}]),
    ],
)
def test_odd_inaturalist_files(tmp_path: Path, listing: object, categories: object) -> None:
    """Whatever they hold, one printable line that names the folder."""
    (tmp_path / "loop").symlink_to("loop")
    content = listing if isinstance(listing, bytes) else listing.encode() if isinstance(listing, str) else None
    (tmp_path / "train2018.json").write_bytes(json.dumps(listing).encode() if content is None else content)
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    with pytest.raises(UserError) as caught:
        build_source(True, DataOptions("INAT", str(tmp_path)), 32)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up archive in CIFAR-10's own layout, the checksum list changed to suit."""
    with pytest.raises(UserError, match=r"CIFAR10.*download=True"):
        build(False, tmp_path, "CIFAR10")
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.full((2, 3072), 9, dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    checksum = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("test_batch", "batches.meta")}
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksum["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    val = build(False, tmp_path, "CIFAR10")
    assert [label for _, label in val] == [4, 1] and len(val.source.classes) == 10
    image, _ = val[0]
    assert image.shape == (3, 32, 32) and (image == 9).all()  # neither resized nor cropped


def test_shapes_needs_no_folder() -> None:
    image, label = build(False, Path("nowhere"), "SHAPES")[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 3
    assert build_source(True, DataOptions("SHAPES"), (48, 48))[0][0].size == (48, 48)
    for size in (16, (32, 48)):
        with pytest.raises(UserError):
            build_source(True, DataOptions("SHAPES"), size)


# Validation


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "resized"),
    [
        (224, 0.875, "bicubic", 256),
        (160, 0.875, "bicubic", 182),  # 182.86: published is int(256 / 224 * size)
        (384, 0.875, "bicubic", 438),  # 438.86
        (224, 0.9, "bilinear", 248),
        (96, 1.0, "bicubic", 96),
    ],
)
def test_validation_resizes_and_cuts_the_centre(size: int, crop_pct: float, interpolation: str, resized: int) -> None:
    """The same by Pillow alone: the short side to floor(size / crop_pct) pixels, and size x size in the middle."""
    image = noise(400, 200)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    x, y = (2 * resized - size) // 2, (resized - size) // 2
    expected = image.resize((2 * resized, resized), filters[interpolation]).crop((x, y, x + size, y + size))
    preprocessing = replace(IMAGENET, crop_pct=crop_pct, interpolation=interpolation)
    assert torch.equal(eval_transform(size, preprocessing)(image), to_tensor(expected))


def test_validation_squashes_where_the_model_was_trained_so() -> None:
    image = noise(90, 70)
    expected = image.resize((40, 40), Image.Resampling.BICUBIC).crop((4, 4, 36, 36))
    squash = replace(IMAGENET, crop_pct=0.8, crop_mode="squash")
    assert torch.equal(eval_transform(32, squash)(image), to_tensor(expected))


def test_validation_size_is_the_published_one() -> None:
    for size in range(32, 1024, 16):
        resize = eval_transform(size, IMAGENET).transforms[0]
        assert resize(Image.new("RGB", (8, 8))).size[0] == int(256 / 224 * size)


def test_sizes_with_a_height_and_a_width() -> None:
    image = noise(90, 70)
    assert eval_transform((32, 48), IMAGENET)(image).shape == (3, 32, 48)
    assert train_transform((32, 48), Augmentation())(image).shape == (3, 32, 48)


# Augmentation


def augmented(image: Image.Image, size: int = 32, count: int = 20, **changes) -> list[torch.Tensor]:
    """As AS_IS with these changes makes them of the image, one for each seed."""
    train = AugmentedDataset([(image, 0)], train_transform(size, replace(AS_IS, **changes)), train=True)
    return [train[0, seed][0] for seed in range(count)]


def test_augmentation_follows_from_the_seed_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 2, size=(60, 60))
    train = build(True, tmp_path)
    first, _ = train[0, 5]
    random.random(), np.random.rand(), torch.rand(1), train[1, 6]
    assert torch.equal(train[0, 5][0], first)
    assert not torch.equal(train[0, 7][0], first)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**63 - 1])
def test_seeds_draw_as_ever_and_leave_gpus_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws() -> tuple[float, float, list[float]]:
        return random.random(), np.random.rand(), torch.rand(5).tolist()

    set_seed(seed)
    expected = draws()
    monkeypatch.setattr(torch, "manual_seed", None)  # it looks for devices: 50 times as long as all the draws
    seed_cpu(seed)
    assert draws() == expected


@pytest.mark.parametrize("none", ["none", "None", "NONE", ""])
def test_without_augmentation_an_image_is_flipped_at_most(none: str) -> None:
    image = noise(32, 32)
    plain = to_tensor(image)
    kinds = {
        0 if torch.equal(x, plain) else 1 if torch.equal(x, plain.flip(2)) else 2 for x in augmented(image, aa=none)
    }
    assert kinds == {0, 1}


def test_auto_augment_and_colour_jitter_are_applied() -> None:
    """Jitter, as in DeiT, only without a policy."""
    image = noise(32, 32)
    plain = augmented(image)

    def changed(**changes) -> int:
        return sum(not torch.equal(a, b) for a, b in zip(augmented(image, **changes), plain, strict=True))

    assert changed(aa=Augmentation().aa) > 10
    assert changed(color_jitter=0.4) == 20
    with_policy = augmented(image, aa="original-mstd0.5", color_jitter=0.4)
    assert all(map(torch.equal, with_policy, augmented(image, aa="original-mstd0.5", color_jitter=0)))
    assert changed(aa="original-mstd0.5") > 10


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_images_are_resized_as_asked_for(interpolation: str) -> None:
    image = noise(64, 64)
    plain = to_tensor(image.resize((32, 32), Image.Resampling[interpolation.upper()]))
    for x in augmented(image, train_interpolation=interpolation):
        assert torch.equal(x, plain) or torch.equal(x, plain.flip(2))


def test_random_interpolation() -> None:
    image = noise(64, 64)
    assert len({x.numpy().tobytes() for x in augmented(image, train_interpolation="random")}) == 4  # 2, and flipped


def test_scale_of_random_crops() -> None:
    """The image's brightness is the place, so the range of a crop tells how much was cut out."""
    place = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    widths = [np.ptp(x.numpy()) + 1 for x in augmented(Image.fromarray(place), size=64, scale=(0.25, 0.25))]
    # a quarter of the area, aspect ratio 3/4 to 4/3
    assert min(widths) > 0.9 * 128 * (3 / 4) ** 0.5 and max(widths) < 1.1 * 128 * (4 / 3) ** 0.5


def test_defaults_are_deits() -> None:
    expected = Augmentation(0.4, "rand-m9-mstd0.5-inc1", "bicubic", 0.25, "pixel", (0.08, 1.0))
    assert Augmentation() == expected


def test_images_of_native_size_are_not_cropped_and_enlarged() -> None:
    first = train_transform(32, Augmentation(), "CIFAR").transforms[0]
    assert isinstance(first, transforms.RandomCrop) and first.size == (32, 32) and first.padding == 4
    assert not isinstance(train_transform(64, Augmentation(), "CIFAR").transforms[0], transforms.RandomCrop)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"aa": "nonsense"}, "--aa nonsense"),
        ({"aa": "rand-m9-z3"}, "--aa rand-m9-z3"),
        ({"aa": "random"}, "--aa random"),
        ({"aa": "rand-m1.5"}, "--aa rand-m1.5"),
        ({"aa": "none", "color_jitter": -1}, "--color-jitter"),
        ({"color_jitter": float("nan")}, "--color-jitter"),
        ({"color_jitter": float("inf")}, "--color-jitter"),
        ({"reprob": 5}, "--reprob"),
        ({"remode": "black"}, "--remode"),
        ({"train_interpolation": "nearest"}, "--train-interpolation"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0, 1)}, "scale"),
    ],
)
def test_augmentation_that_makes_no_sense(wrong: dict, flag: str) -> None:
    with pytest.raises(UserError, match=flag) as caught:
        Augmentation(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-n3-t3a", "original", "v0r-mstd0.5", "augmix-m5", "3a"]
)
def test_policies_that_timm_knows(policy: str) -> None:
    Augmentation(aa=policy)


def test_strongest_posterize_is_survived() -> None:
    """RandAugment at magnitude 10 keeps 0 bits, which some Pillow versions refuse."""
    augmented(Image.effect_noise((40, 40), 60).convert("RGB"), count=60, aa="rand-m10-n8-inc1")


# Batches


def test_batches_are_normalised() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1] = 255
    means, stds = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    normalised = BatchTransform(CPU, means, stds)(images)
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        assert normalised[0, channel] == pytest.approx(np.full((4, 4), -mean / std), rel=1e-5)
        assert normalised[1, channel] == pytest.approx(np.full((4, 4), (1 - mean) / std), rel=1e-5)


def erase(mode: str, probability: float = 1.0, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images, normalised (one value a channel, none of them 0), and which pixels were erased: (B, H, W)."""
    images = torch.full((count, 3, 32, 32), 200, dtype=torch.uint8)
    untouched = BatchTransform(CPU, IMAGENET.mean, IMAGENET.std)(images)
    erased = BatchTransform(CPU, IMAGENET.mean, IMAGENET.std, probability, mode)(images)
    return erased, (erased != untouched).any(dim=1)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing(mode: str) -> None:
    """It comes after the normalisation: erased pixels are 0, which is the mean colour, or noise around it."""
    set_seed(0)
    erased, where = erase(mode)
    shares = where.flatten(1).float().mean(dim=1)
    assert (shares > 0).all() and (shares < 0.6).all()
    for image, mask in zip(erased, where, strict=True):
        values = image[:, mask]  # (3, erased pixels)
        if mode == "const":
            assert (values == 0).all()
        elif mode == "rand":  # one colour for the rectangle
            assert (values == values[:, :1]).all() and (values != 0).all()
        else:
            assert len(values.unique()) > 0.99 * values.numel() and values.mean().abs() < 0.5


def test_probability_of_random_erasing() -> None:
    set_seed(0)
    for probability, low, high in ((0.0, 0, 0), (0.25, 70, 130), (1.0, 400, 400)):
        _, where = erase("const", probability, count=400)
        assert low <= where.flatten(1).any(dim=1).sum() <= high


# Loaders


def grey_images(count: int) -> AugmentedDataset:
    """Image i has brightness and label i."""
    source = [(Image.new("RGB", (8, 8), (i, i, i)), i) for i in range(count)]
    return AugmentedDataset(source, transforms.PILToTensor(), train=True)


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(datasets, "get_rank", lambda: rank)
    monkeypatch.setattr(datasets, "get_world_size", lambda: world_size)


def test_train_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches only; two processes share the images out. 25 of them at 4 x 2 a step are 3 steps."""
    seen = []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        loader, steps = build_train_loader(grey_images(50), 4, 0, False, seed=3, update_freq=2)
        assert steps == 3 and len(loader) == 6
        for images, labels in loader:
            assert len(images) == 4 and torch.equal(images[:, 0, 0, 0].long(), labels)
            seen += labels.tolist()
    assert len(set(seen)) == 48 and seen != sorted(seen)


def test_train_loader_repeats_images() -> None:
    loader, steps = build_train_loader(grey_images(60), 6, 0, False, seed=3, num_repeats=3)
    labels = torch.cat([labels for _, labels in loader])
    assert steps == 10 and len(labels) == 60 and len(labels.unique()) == 20


def test_step_of_more_images_than_there_are() -> None:
    with pytest.raises(UserError, match=r"--batch-size 8 times --update-freq 4 .* 20 training images"):
        build_train_loader(grey_images(20), 8, 0, False, seed=0, update_freq=4)


def test_val_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images, in order; sharded, each in one process."""
    as_process(monkeypatch, 1, 2)
    whole = build_val_loader(grey_images(7), 4, 0, False)
    assert [labels.tolist() for _, labels in whole] == [[0, 1, 2, 3], [4, 5, 6]]
    shard = build_val_loader(grey_images(7), 2, 0, False, sharded=True)
    assert [labels.tolist() for _, labels in shard] == [[1, 3], [5]]


def test_loader_processes_of_validation_do_not_stay() -> None:
    val_loader = build_val_loader(grey_images(8), 4, 1, False)
    train_loader, _ = build_train_loader(grey_images(8), 4, 1, False, seed=0)
    assert not val_loader.persistent_workers and train_loader.persistent_workers


def test_number_of_loader_processes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(datasets, "open_files_allowed", lambda: math.inf)
    check_num_workers(64)
    for number in (65, 1000, -1):
        with pytest.raises(UserError, match=f"--num-workers must be from 0 to 64 .* got {number}"):
            build_val_loader(grey_images(2), 1, number, False)
        with pytest.raises(UserError, match="--num-workers"):
            build_train_loader(grey_images(2), 1, number, False, seed=0)


def test_too_few_open_files_for_loader_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any is started: torch would wait for ever for images that they cannot send."""
    limits = {"soft": 67}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], 4096))
    with pytest.raises(UserError, match=r"2 loader processes need 68 open files, but only 67 .* --num-workers"):
        build_val_loader(grey_images(2), 1, 2, False)
    build_val_loader(grey_images(2), 1, 0, False)
    for limits["soft"] in (68, resource.RLIM_INFINITY):
        build_val_loader(grey_images(2), 1, 2, False)
