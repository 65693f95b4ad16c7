"""Data sets in the layouts that users have, and images of every kind."""

import argparse
import hashlib
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from datasets import (
    IGNORED_LABEL,
    AugmentedDataset,
    BatchTransform,
    build_dataset,
    build_source,
    build_transform,
    fingerprint,
    open_image,
)
from main_dynamic_vit import parse_args
from utils import ImageError, UserError


def options(data_set: str, path: Path, *others: str) -> argparse.Namespace:
    return parse_args(["--data-set", data_set, "--data-path", str(path), "--input-size", "32", *others])


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


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", (300, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 - 1)
    with pytest.raises(ImageError, match="bomb.png"):
        open_image(str(path))


def with_bad_images(root: Path, train: bool) -> tuple[AugmentedDataset, list[str]]:
    """Images 0 to 4 of class 0 and one of class 1; 1, 2 and 5 are broken. Returns their paths, too."""
    part = "train" if train else "val"
    write_images(root / part / "a", 5)
    write_images(root / part / "b", 1)
    bad = [root / part / "a" / "1.jpg", root / part / "a" / "2.jpg", root / part / "b" / "0.jpg"]
    for path, content in zip(bad, (b"", b"text", bad[2].read_bytes()[:300]), strict=True):
        path.write_bytes(content)
    return build_dataset(train, options("IMNET", root, "--skip-bad-images")), [str(path) for path in bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_next_good_image_stands_in_for_a_bad_one(tmp_path: Path, workers: int) -> None:
    """Validation does not count it. Loader processes tell which ones were bad."""
    train, bad = with_bad_images(tmp_path, train=True)
    images, labels = next(iter(DataLoader(train, 6, sampler=[(i, 7) for i in range(6)], num_workers=workers)))
    assert torch.equal(images[1], images[3]) and torch.equal(images[2], images[3])
    assert torch.equal(images[5], images[0]) and not torch.equal(images[0], images[3])
    assert labels.tolist() == [0] * 6 and train.bad_images() == bad
    val, bad = with_bad_images(tmp_path, train=False)
    _, labels = next(iter(DataLoader(val, 6, num_workers=workers)))
    assert labels.tolist() == [0, IGNORED_LABEL, IGNORED_LABEL, 0, 0, IGNORED_LABEL] and val.bad_images() == bad


def test_only_bad_images(tmp_path: Path) -> None:
    train, _ = with_bad_images(tmp_path, train=True)
    for path in tmp_path.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ImageError):
        train[0, 7]


def test_fingerprint_is_of_the_content_and_not_the_place(tmp_path: Path) -> None:
    write_images(tmp_path / "here" / "train" / "a", 3)
    write_images(tmp_path / "here" / "train" / "b", 3)
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def taken(place: str) -> str:
        return fingerprint(build_source(True, options("IMNET", tmp_path / place)))

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


def test_labels_are_ranks_of_the_training_folders(tmp_path: Path) -> None:
    """Though validation has only some of them."""
    for name in ("a", "b", "c"):
        write_images(tmp_path / "train" / name, 2)
    write_images(tmp_path / "val" / "c", 1)
    train, val = (build_dataset(part, options("IMNET", tmp_path)) for part in (True, False))
    assert train.source.classes == ["a", "b", "c"] and len(train) == 6
    assert [label for _, label in val] == [2]


def test_validation_class_unknown_in_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 1)
    write_images(tmp_path / "val" / "b", 1)
    with pytest.raises(UserError, match="b"):
        build_dataset(False, options("IMNET", tmp_path))


def test_wordnet_ids_have_imagenet_labels(tmp_path: Path) -> None:
    """n01440764 is ImageNet's class 0 and n15075141 its class 999."""
    for name in ("n01440764", "n15075141"):
        write_images(tmp_path / "val" / name, 1)
    val = build_dataset(False, options("IMNET", tmp_path))
    assert [label for _, label in val] == [0, 999] and len(val.source.classes) == 1000
    val = build_dataset(False, options("IMNET", tmp_path, "--num-classes", "2"))
    assert [label for _, label in val] == [0, 1]


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
    train, val = (build_dataset(part, options(data_set, tmp_path)) for part in (True, False))
    assert train.source.classes == ["owl", "tit"]
    assert [label for _, label in train] == [0, 1] and [label for _, label in val] == [0]

    files[3] = "../outside.jpg"
    write("val", {3: 7})
    with pytest.raises(UserError, match="outside"):
        build_dataset(False, options(data_set, tmp_path))


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up archive in CIFAR-10's own layout, the checksum list changed to suit."""
    with pytest.raises(UserError, match=r"CIFAR10.*download=True"):
        build_dataset(False, options("CIFAR10", tmp_path))
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
    val = build_dataset(False, options("CIFAR10", tmp_path))
    assert [label for _, label in val] == [4, 1] and len(val.source.classes) == 10
    image, _ = val[0]
    assert image.shape == (3, 32, 32) and (image == 9).all()  # neither resized nor cropped


def test_shapes_needs_no_folder() -> None:
    val = build_dataset(False, options("SHAPES", Path("nowhere")))
    image, label = val[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 3


def test_validation_cuts_the_centre(tmp_path: Path) -> None:
    """Resized to size * 256 / 224 on the short side, then cut: of 64 x 64 pixels at size 32 the
    middle seven eighths are seen."""
    (tmp_path / "val" / "a").mkdir(parents=True)
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :3] = 255
    Image.fromarray(pixels).save(tmp_path / "val" / "a" / "0.png")
    image, _ = build_dataset(False, options("IMNET", tmp_path))[0]
    assert image.shape == (3, 32, 32) and image.max() < 100


def test_augmentation_follows_from_the_seed_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 2, size=(60, 60))
    train = build_dataset(True, options("IMNET", tmp_path))
    first, _ = train[0, 5]
    random.random(), np.random.rand(), torch.rand(1), train[1, 6]
    assert torch.equal(train[0, 5][0], first)
    assert not torch.equal(train[0, 7][0], first)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8


def test_strongest_posterize_is_survived() -> None:
    """RandAugment at magnitude 10 keeps 0 bits, which some Pillow versions refuse."""
    args = parse_args(["--input-size", "32", "--aa", "rand-m10-n8-inc1"])
    source = [(Image.effect_noise((40, 40), 60).convert("RGB"), 0)]
    train = AugmentedDataset(source, build_transform(True, args), train=True)
    for seed in range(60):
        train[0, seed]


def test_batches_are_normalised() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1] = 255
    normalised = BatchTransform(torch.device("cpu"))(images)
    for channel in range(3):
        mean, std = IMAGENET_DEFAULT_MEAN[channel], IMAGENET_DEFAULT_STD[channel]
        assert normalised[0, channel] == pytest.approx(np.full((4, 4), -mean / std), rel=1e-5)
        assert normalised[1, channel] == pytest.approx(np.full((4, 4), (1 - mean) / std), rel=1e-5)


def test_random_erasing() -> None:
    images = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    device = torch.device("cpu")
    untouched = BatchTransform(device)(images)
    erased = BatchTransform(device, erase_prob=1.0)(images)
    changed = (erased != untouched).flatten(1).float().mean(dim=1)
    assert (changed > 0).all() and (changed < 0.6).all()
