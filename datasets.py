"""The data sets by name, and what happens to an image on its way to the model."""

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from shapes import Shapes
from utils import ImageError, UserError, log, max_over_processes, set_seed

DATA_SETS = ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "SHAPES")
# Images of these come small; they are trained on at their own size where --input-size allows it.
NATIVE_SIZE = {"CIFAR": 32, "CIFAR10": 32}
EVAL_CROP = 224 / 256  # DeiT: resize to 256, cut out the central 224
IGNORED_LABEL = -100  # of an image that does not count; torch's own default for this
MAX_BAD_IMAGES = 100  # in a row; more look like a disk that is gone
NUM_SIZES = 1000  # files whose sizes are part of the fingerprint: to ask for a million takes minutes


class AugmentedDataset(Dataset):
    """A source of (PIL image, label) with the transform applied.

    Takes an index, or (index, seed) as samplers.TrainSampler yields them: then all the transform's
    randomness comes from that seed, so that it depends on no worker, no order and no earlier run.
    skip_bad: in place of an image that cannot be read stands the next one that can, in validation
    with IGNORED_LABEL; else ImageError.
    """

    def __init__(
        self, source: Dataset, transform: Callable[[Image.Image], Tensor], train: bool, skip_bad: bool = False
    ) -> None:
        self.source = source
        self.transform = transform
        self.train = train
        self.skip_bad = skip_bad
        self.is_bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # loader processes write to it

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if seed is not None:
            set_seed(seed)
        image, label = self.read(index)
        return self.transform(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        if not self.skip_bad:
            return self.source[index]
        for candidate in islice(chain(range(index, len(self)), range(index)), MAX_BAD_IMAGES):
            try:
                image, label = self.source[candidate]
            except ImageError:
                self.is_bad[candidate] = 1
            else:
                return image, label if self.train or candidate == index else IGNORED_LABEL
        raise ImageError(f"none of {self.source.samples[index][0]} and the images after it can be read")

    def bad_images(self) -> list[str]:
        """Those that any process has met so far. Collective: call it in all of them."""
        if not self.skip_bad:
            return []
        return [self.source.samples[i][0] for i in max_over_processes(self.is_bad).nonzero().flatten()]


class LabelledFiles(Dataset):
    """Image files somewhere under a root folder, listed as (path, label)."""

    def __init__(self, samples: list[tuple[str, int]], classes: list[str], root: Path) -> None:
        self.samples = samples
        self.classes = classes
        self.root = root

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_image(path), label


def open_image(path: str) -> Image.Image:
    """Any image file as RGB. Raises ImageError that names a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            # Broken EXIF and palette transparency do not change the pixels that we use, but an
            # image too large to be one (a decompression bomb) is refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).splitlines()[0].replace(f" {str(path)!r}", "")
        raise ImageError(f"cannot read image {path} ({reason}); replace or remove it") from error


def build_dataset(train: bool, args: argparse.Namespace) -> AugmentedDataset:
    """The training or validation set of --data-set; its `source.classes` names the classes in order."""
    source = build_source(train, args)
    if len(source) == 0:
        raise UserError(f"no images found for {'training' if train else 'validation'} in {args.data_path}")
    return AugmentedDataset(source, build_transform(train, args), train, args.skip_bad_images)


def fingerprint(source: Dataset) -> str:
    """Changes with the number, the names and the labels of the images, and with the file sizes of some of them."""
    digest = hashlib.sha256(repr(source.classes).encode())
    if isinstance(source, LabelledFiles):
        for path, label in source.samples:
            digest.update(f"{path.removeprefix(str(source.root))} {label}\n".encode(errors="surrogateescape"))
        for path, _ in source.samples[:: -(-len(source) // NUM_SIZES)]:
            digest.update(f"{os.path.getsize(path) if os.path.exists(path) else 0} ".encode())
    return f"{len(source)} images, {digest.hexdigest()[:16]}"


def build_source(train: bool, args: argparse.Namespace) -> Dataset:
    if args.data_set == "SHAPES":
        try:
            return Shapes(train, size=args.input_size)
        except ValueError as error:
            raise UserError(str(error)) from error
    root = Path(args.data_path)
    if not root.is_dir():
        raise UserError(f"no data folder {root}; set --data-path (or try --data-set SHAPES, which needs none)")
    if args.data_set in ("CIFAR", "CIFAR10"):
        cifar = CIFAR100 if args.data_set == "CIFAR" else CIFAR10
        try:
            return cifar(str(root), train=train)
        except RuntimeError as error:
            raise UserError(
                f'no {cifar.__name__} in {root}; get it: python -c "import torchvision; '
                f"torchvision.datasets.{cifar.__name__}('{root}', download=True)\""
            ) from error
    if args.data_set in ("INAT", "INAT19"):
        return read_inaturalist(root, train, year=2018 if args.data_set == "INAT" else 2019)
    return read_image_folder(root, train, args.num_classes)


def read_image_folder(root: Path, train: bool, num_classes: int | None) -> LabelledFiles:
    """ImageNet's layout: root/train/<class>/* and root/val/<class>/*.

    Labels are the ranks of the class folders, of those in train/ if it is there. Folders that are
    all WordNet ids of ImageNet-1k take their ImageNet indices, though some may be missing, unless
    num_classes asks for a model of another size.
    """
    folder = root / ("train" if train else "val")
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}; the layout of --data-path is {root}/train/<class>/* and {root}/val/<class>/*"
        )
    found = class_folders(folder)
    classes = class_folders(root / "train") or found
    wnids = ImageNetInfo("imagenet-1k").label_names()
    if num_classes in (None, len(wnids)) and set(classes) | set(found) <= set(wnids):
        classes = wnids
    strangers = sorted(set(found) - set(classes))
    if strangers:
        raise UserError(f"classes in {folder} that {root / 'train'} does not have: {', '.join(strangers[:5])}")
    label_of = {name: label for label, name in enumerate(classes)}
    files = ImageFolder(str(folder), allow_empty=True)
    samples = [(path, label_of[files.classes[rank]]) for path, rank in files.samples]
    empty = sorted(set(found) - {classes[label] for _, label in samples})
    if empty and samples:
        log(f"warning: class folders without images in {folder}: {', '.join(empty)}")
    return LabelledFiles(samples, classes, root)


def class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not found:
        raise UserError(f"no class folders in {folder}; images belong in {folder}/<class>/")
    return found


def read_inaturalist(root: Path, train: bool, year: int) -> LabelledFiles:
    """iNaturalist 2018 or 2019 by its own JSON files; labels in DeiT's order, by first appearance."""
    try:
        return list_inaturalist(root, train, year)
    except (KeyError, TypeError) as error:
        raise UserError(f"the JSON files in {root} are not iNaturalist's ({error!r})") from error


def list_inaturalist(root: Path, train: bool, year: int) -> LabelledFiles:
    train_json = read_json(root / f"train{year}.json")
    labels: dict[int, int] = {}
    for annotation in train_json["annotations"]:
        labels.setdefault(annotation["category_id"], len(labels))
    listing = train_json if train else read_json(root / f"val{year}.json")
    category_of = {a["image_id"]: a["category_id"] for a in listing["annotations"]}
    samples = []
    for image in listing["images"]:
        path = root / image["file_name"]
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{root}/*{year}.json names a file outside the data folder: {image['file_name']}")
        samples.append((str(path), labels[category_of[image["id"]]]))
    names = {c["id"]: c["name"] for c in read_json(root / "categories.json")}
    return LabelledFiles(samples, [names[category] for category in labels], root)


def read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}; iNaturalist needs train*.json, val*.json, categories.json") from error


def build_transform(train: bool, args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """PIL image -> (3, H, W) uint8 tensor, as DeiT augments; BatchTransform does the rest."""
    size = args.input_size
    native = size if args.data_set == "SHAPES" else NATIVE_SIZE.get(args.data_set)
    if not train:
        if native == size:
            return transforms.PILToTensor()
        return transforms.Compose(
            [
                transforms.Resize(round(size / EVAL_CROP), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.PILToTensor(),
            ]
        )
    transform = create_transform(
        size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        normalize=False,
    )
    if native == size:
        # small images are too coarse to be cropped and enlarged (DeiT does the same)
        transform.transforms[0] = transforms.RandomCrop(size, padding=4)
    return transform


class BatchTransform:
    """(B, 3, H, W) uint8 images -> normalised float32 on the device, with random erasing in training.

    On the device and not in the workers: bytes are quick to copy, and the arithmetic is free there.
    """

    def __init__(self, device: torch.device, erase_prob: float = 0.0, erase_mode: str = "pixel") -> None:
        self.device = device
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(3, 1, 1) * 255
        self.erase = RandomErasing(erase_prob, mode=erase_mode, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        return self.erase(images)
