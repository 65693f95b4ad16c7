"""The images for making a model faster: which ones it learns from, and which are held back to measure on."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from dynamicvit.datasets import (
    IGNORED_LABEL,
    PARTS,
    AugmentedDataset,
    build_val_loader,
    classes_fit,
    eval_transform,
    read_folder,
)
from dynamicvit.errors import UserError
from dynamicvit.image_files import UNREADABLE, ImageFiles, open_image
from dynamicvit.models import ModelSpec, Preprocessing
from dynamicvit.models.spec import two_sides
from dynamicvit.recipe import RECIPES
from dynamicvit.tools.progress import EVERY_SECONDS
from dynamicvit.utils import log
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

MIN_IMAGES = 50  # to fine-tune with
MAX_HELD_BACK, MAX_TRAINING = 500, 10_000  # images; more take time and tell little more
HELD_BACK_IN = 5  # one image in this many
DECODED_AT_ONCE = 16
RECIPE = "label-free"  # by which the model learns from them

T = TypeVar("T")
Images = str | Path | Sequence[str | Path] | DataLoader


class Split(NamedTuple):
    """Sources of (image, label): PIL images, or tensors in pixels from 0 to 255 where they come from a loader."""

    training: "Source"
    held_back: "Source"


class PhotoFiles(ImageFiles):
    """Image files for training: a JPEG is decoded at an eighth, quarter or half of its size where that is enough."""

    are_tensors = False

    def __init__(
        self, samples: Iterable[tuple[str, int]], classes: Sequence[str], root: Path, short_side: int | None = None
    ) -> None:
        """short_side: pixels that height and width must at least have; None: decode all of them."""
        super().__init__(samples, classes, root)
        self.short_side = short_side

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.path(index), self.upright, self.short_side), self.labels[index]

    def first(self, count: int) -> "PhotoFiles":
        """The first of its images, to be measured on."""
        return PhotoFiles(islice(self.samples(), count), self.classes, self.root)

    def repeated(self, times: int) -> "PhotoFiles":
        """Each image this many times."""
        return PhotoFiles([*self.samples()] * times, self.classes, self.root, self.short_side)


class LoaderImages(Dataset):
    """What a user's DataLoader reads, image by image, with the user's own transforms and collate function.

    It gives images as the model takes them. Here they become pixels from 0 to 255 again, as all other images
    are until they are on the device; nothing is rounded.
    """

    are_tensors = True

    def __init__(self, loader: DataLoader, indices: Sequence[int], spec: ModelSpec, classes: Sequence[str]) -> None:
        self.loader, self.indices, self.spec, self.classes = loader, indices, spec, list(classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, label = take_apart(self.loader.collate_fn([self.loader.dataset[self.indices[index]]]))
        return denormalise(images[0], self.spec.preprocessing), label if self.classes else IGNORED_LABEL

    def path(self, index: int) -> str:
        """A name for messages."""
        return f"image {self.indices[index]} of the loader"

    def first(self, count: int) -> "LoaderImages":
        return LoaderImages(self.loader, self.indices[:count], self.spec, self.classes)

    def repeated(self, times: int) -> "LoaderImages":
        return LoaderImages(self.loader, list(self.indices) * times, self.spec, self.classes)


Source = PhotoFiles | LoaderImages


def take_apart(batch: Any) -> tuple[Tensor, int]:
    """The (1, 3, H, W) images of a batch of one, and its label: a tensor, a tuple that begins with one, or a dict."""
    if isinstance(batch, dict):
        names = [name for name in ("pixel_values", "image", "images") if name in batch]
        batch = [batch[names[0]] if names else None, batch.get("labels", batch.get("label"))]
    images, label = (batch, None) if isinstance(batch, Tensor) else (*batch, None)[:2]
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            "the loader must give batches of images: float tensors of shape (B, 3, H, W), alone or before labels"
        )
    is_label = isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point()
    return images, int(label) if is_label else IGNORED_LABEL


def denormalise(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(3, H, W), as the model takes it -> float32 pixels from 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (image.float() * std + mean) * 255


def split_images(images: Images, spec: ModelSpec) -> Split:
    """The images to train on and those held back, told apart by their names, so that it is the same next time.

    images: a folder, files, or a DataLoader whose data set has a length; its own order and batches do not matter.
    Labels are kept if the classes of the images are the model's. Files that are no images are left out. Too few
    images to train with are all held back. Raises UserError if there is no image.
    """
    if isinstance(images, DataLoader):
        return split_loader(images, spec)
    if not str(images):
        raise UserError("the name of the folder of images is empty")
    folder = Path(images) if isinstance(images, (str, Path)) else None
    found = read_images(folder, spec) if folder else ImageFiles(((str(p), IGNORED_LABEL) for p in images), (), Path())
    labelled = classes_fit(spec, found.classes)
    chosen, unreadable = Chosen(), []
    for path, label in sorted(found.samples(), key=lambda sample: name_hash(name_of(sample[0], folder))):
        wanted = chosen.part_of(name_of(path, folder))
        if wanted is None:
            continue
        if is_image(path):
            wanted.append((path, label if labelled else IGNORED_LABEL))
        else:
            unreadable.append(path)
    if unreadable:
        log(f"warning: {len(unreadable)} file(s) cannot be read as images and are left out, as {unreadable[0]}")
    chosen.settle(str(folder) if folder else "the list of files")
    classes = found.classes if labelled else ()
    training = PhotoFiles(chosen.training, classes, found.root, short_side(spec))
    return Split(training, PhotoFiles(chosen.held_back, classes, found.root))


def short_side(spec: ModelSpec) -> int:
    """Pixels that a training image needs, so that even its smallest crop, of 3 by 4, need not be enlarged."""
    smallest = RECIPES[RECIPE].augmentation.scale[0]
    return round(max(two_sides(spec.img_size)) / (smallest * 0.75) ** 0.5)


def read_images(folder: Path, spec: ModelSpec) -> ImageFiles:
    """All images below a folder. Raises UserError if there is none, or if it is a whole data set with its parts."""
    if not folder.is_dir():
        raise UserError(f"no folder of images: {folder}")
    parts = [part for part in PARTS if (folder / part).is_dir()]
    if len(parts) > 1:
        names = " and ".join(f"{part}/" for part in parts)
        raise UserError(f"{folder} holds {names}, which would all be trained on; give one: {folder}/train")
    return read_folder(folder, spec.num_classes or None, labelled=False)


def split_loader(loader: DataLoader, spec: ModelSpec) -> Split:
    """As split_images."""
    data_set = loader.dataset
    if not hasattr(data_set, "__len__") or not hasattr(data_set, "__getitem__"):
        raise UserError("the loader's data set has no length: give one whose images can be read by index")
    chosen = Chosen()
    for index in sorted(range(len(data_set)), key=lambda index: name_hash(str(index))):
        if (wanted := chosen.part_of(str(index))) is not None:
            wanted.append(index)
    chosen.settle("the loader")
    whole = data_set.dataset if isinstance(data_set, Subset) else data_set
    classes = getattr(whole, "classes", ())
    classes = classes if classes_fit(spec, classes) else ()
    parts = Split(*(LoaderImages(loader, part, spec, classes) for part in (chosen.training, chosen.held_back)))
    height, width = parts.held_back[0][0].shape[-2:]
    if two_sides(spec.img_size) != (height, width):
        raise UserError(f"the loader gives images of {height} x {width} pixels, and the model takes {spec.img_size}")
    return parts


class Chosen:
    """Images by what they are used for."""

    def __init__(self) -> None:
        self.training: list[Any] = []
        self.held_back: list[Any] = []

    def part_of(self, name: str) -> list[Any] | None:
        """The list that an image of this name belongs in; None if that one is full."""
        held_back = name_hash(name) % HELD_BACK_IN == 0
        part, most = (self.held_back, MAX_HELD_BACK) if held_back else (self.training, MAX_TRAINING)
        return part if len(part) < most else None

    def settle(self, origin: str) -> None:
        """If there are too few to learn from, all are measured on. UserError if there are none."""
        usable = len(self.training) + len(self.held_back)
        if usable == 0:
            raise UserError(f"no image that can be read in {origin}")
        if usable < MIN_IMAGES or not self.held_back:
            log(
                f"warning: only {usable} usable images: the report's figures are rough, and the model is not "
                f"fine-tuned, which takes at least {MIN_IMAGES}"
            )
            self.training, self.held_back = [], self.training + self.held_back


def name_of(path: str, folder: Path | None) -> str:
    """The same wherever the folder lies."""
    return os.path.relpath(path, folder) if folder else path


def name_hash(name: str) -> int:
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)


def is_image(path: str) -> bool:
    """Judges a file by its header alone, as decoding thousands takes minutes."""
    try:
        if os.path.isfile(path):  # a FIFO would be waited for without end
            Image.open(path).close()
            return True
        return False
    except UNREADABLE:
        return False


class Decoded(Dataset):
    """The images held back, read and prepared once, as everything is measured on them again and again."""

    def __init__(self, source: Dataset, images: Tensor, labels: Tensor) -> None:
        """images: (N, 3, H, W) in pixels from 0 to 255. labels: (N,)."""
        self.source, self.images, self.labels = source, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def bad_images(self) -> list[str]:
        """Always empty: bad ones were left out when they were read."""
        return []

    def loader(self, batch_size: int, pinned: bool) -> DataLoader:
        return build_val_loader(self, batch_size, 0, pinned)


def decode(source: Source, spec: ModelSpec, num_workers: int) -> Decoded:
    """Reads the images held back. Those that turn out damaged are left out; UserError if all are."""
    transform = nn.Identity() if source.are_tensors else eval_transform(spec.img_size, spec.preprocessing)
    data_set = AugmentedDataset(source, transform, train=False, skip_bad=True)
    batches = build_val_loader(data_set, DECODED_AT_ONCE, num_workers, pin_memory=False)
    images, labels = zip(*with_progress(batches, len(batches), "reading images"), strict=True)
    good = data_set.is_bad == 0
    if bad := data_set.bad_images():
        log(f"warning: {len(bad)} damaged image(s) held back are left out, as {bad[0]}")
    return Decoded(source, torch.cat(images)[good], torch.cat(labels)[good])


def with_progress(items: Iterable[T], count: int, what: str) -> Iterator[T]:
    """The items; logs how far it is, every few seconds."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > EVERY_SECONDS:
            log(f"{what}: {done / count:.0%}")
            said = time.monotonic()
        yield item
