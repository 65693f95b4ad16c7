"""The data sets by name, what happens to an image on its way to the model, and the loaders."""

import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dynamicvit.data.shapes import Shapes
from dynamicvit.errors import ImageError, UserError
from dynamicvit.image_files import ImageFiles, class_folders, kind, list_images, report_left_out, scan
from dynamicvit.models.spec import LARGEST, ModelSpec, Preprocessing, first_line, shown, two_sides
from dynamicvit.options import NOT_NEGATIVE, SHARE, WORKERS, check_settings, setting, up_to
from dynamicvit.samplers import TrainSampler
from dynamicvit.signals import ignore_stop_signals
from dynamicvit.utils import get_rank, get_world_size, log, max_over_processes
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

DATA_SETS = ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "SHAPES")
# These have small images, which are used at their own size if that is the model's input size.
NATIVE_SIZE = {"CIFAR": (32, 32), "CIFAR10": (32, 32)}
PARTS = ("train", "val", "test")  # folders of a data set that are not classes
IGNORED_LABEL = -100  # of an image that does not count, or has no label; torch's own default for this
MAX_BAD_IMAGES = 100  # in a row; more of them suggest that the disk is gone
IMAGENET_CLASSES = 1000
NUM_SIZES = 1000  # files whose sizes are part of the fingerprint: asking for a million takes minutes
WORKERS_PER_CORE = 16
FILES_OPEN, FILES_PER_WORKER = 48, 10  # measured: up to 16, and 9 for each loader process (training and validation)

Size = int | tuple[int, int]  # in pixels: of a square, or (height, width)
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read. num_classes: of the model, None for as many as the data set has."""

    data_set: str = setting(
        "IMNET",
        "IMNET is any folder of train/<class> and val/<class>, CIFAR is CIFAR-100",
        group="data",
        choices=DATA_SETS,
    )
    data_path: str = setting("", "the data set's folder", group="data")
    num_classes: int | None = setting(
        None,
        "classes of the model (default: the data set's; 1000 for folders of WordNet ids)",
        up_to(LARGEST["num_classes"]),
        group="data",
    )
    num_workers: int = setting(
        min(8, os.cpu_count() or 1), "loader processes for each training process", WORKERS, group="data"
    )
    skip_bad_images: bool = setting(
        False, "leave out images that cannot be read, and list them at the end", group="data"
    )
    dist_eval: bool = setting(False, "split the validation images among the processes", group="data")
    exif: bool = setting(
        False,
        "turn photos upright as their EXIF data says (ImageFolder, and so the published runs, do not)",
        group="data",
    )


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied; the defaults are DeiT's. Raises UserError where a value makes no sense."""

    color_jitter: float = setting(0.4, "strength, used only if --aa is none", NOT_NEGATIVE, group="augmentation")
    aa: str = setting("rand-m9-mstd0.5-inc1", "timm's auto-augment policy, or none", group="augmentation", read=str)
    train_interpolation: str = setting(
        "bicubic", "how crops are resized", group="augmentation", choices=("random", "bilinear", "bicubic")
    )
    reprob: float = setting(0.25, "probability of random erasing", SHARE, group="augmentation")
    remode: str = setting(
        "pixel", "what erased pixels become", group="augmentation", choices=("const", "rand", "pixel")
    )
    scale: tuple[float, float] = setting(
        (0.08, 1.0), "smallest and largest share of an image that a random crop takes", SHARE, group="augmentation"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"the scale of random crops must be two ascending shares of the image, got {self.scale}")
        try:
            create_transform(224, is_training=True, auto_augment=self.policy)
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"--aa {self.aa} is not a policy that timm knows; use for example rand-m9-mstd0.5-inc1, "
                "original-mstd0.5, augmix-m5-w4-d2, 3a or none"
            ) from error

    @property
    def policy(self) -> str | None:
        """What timm calls auto_augment."""
        return None if self.aa.lower() in ("", "none") else self.aa


class AugmentedDataset(Dataset):
    """A source of (PIL image, label) with the transform applied.

    Takes an index, or (index, seed) as samplers.TrainSampler yields them: then all the transform's
    randomness comes from that seed, so that it depends on no worker, no order and no earlier run.
    skip_bad: an image that cannot be read is replaced by the next one that can, in validation
    with IGNORED_LABEL; otherwise it raises ImageError.
    """

    def __init__(self, source: Dataset, transform: Transform, train: bool, skip_bad: bool = False) -> None:
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
            seed_cpu(seed)
        image, label = self.read(index)
        return self.transform(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        if not self.skip_bad:
            return self.source[index]
        index = range(len(self))[index]  # raises IndexError for an index that is out of range
        for candidate in islice(chain(range(index, len(self)), range(index)), MAX_BAD_IMAGES):
            try:
                image, label = self.source[candidate]
            except ImageError:
                self.is_bad[candidate] = 1
            else:
                return image, label if self.train or candidate == index else IGNORED_LABEL
        raise ImageError(f"neither {self.source.path(index)} nor the images after it can be read")

    def bad_images(self) -> list[str]:
        """Paths of the bad images that any process has met so far. Collective: all processes must call it."""
        if not self.skip_bad:
            return []
        return [self.source.path(i) for i in max_over_processes(self.is_bad).nonzero().flatten().tolist()]


def seed_cpu(seed: int) -> None:
    """Seeds the CPU's generators as utils.set_seed does. It leaves GPUs alone: seeding them takes longer
    (0.1 ms, even where there are none) than drawing all of an image's random numbers, and no transform uses them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def build_source(train: bool, options: DataOptions, size: Size, labelled: bool = True) -> Dataset:
    """(RGB image, label) pairs with `classes`, the names of the labels. Raises UserError if there are no images.

    size: of the images that SHAPES draws. labelled: whether images need labels; if not, IMNET's train/ and val/
    may also hold images without class folders, which then have IGNORED_LABEL, and `classes` is empty.
    """
    source = find_source(train, options, size, labelled)
    if len(source) == 0:
        raise UserError(f"no images found for {'training' if train else 'validation'} in {options.data_path}")
    return source


def find_source(train: bool, options: DataOptions, size: Size, labelled: bool) -> Dataset:
    if options.data_set == "SHAPES":
        return draw_shapes(train, size)
    if not options.data_path:
        raise UserError(
            "--data-path is missing; give the data set's folder (or try --data-set SHAPES, which needs none)"
        )
    root = Path(options.data_path)
    if not root.is_dir():
        raise UserError(f"no data folder {root}; set --data-path (or try --data-set SHAPES, which needs none)")
    if options.data_set in ("CIFAR", "CIFAR10"):
        return read_cifar(root, train, CIFAR100 if options.data_set == "CIFAR" else CIFAR10)
    if options.data_set in ("INAT", "INAT19"):
        return read_inaturalist(root, train, 2018 if options.data_set == "INAT" else 2019, options.exif)
    if options.data_set == "IMNET":
        return read_train_or_val(root, train, options.num_classes, labelled, options.exif)
    raise UserError(f"unknown --data-set {options.data_set}; known: {', '.join(DATA_SETS)}")


def classes_fit(spec: ModelSpec, classes: Sequence[str]) -> bool:
    """Whether the images' classes are the model's, so that accuracy means something."""
    if len(classes) == 0 or set(classes) <= set(PARTS):  # taken as a whole
        return False
    return len(classes) == spec.num_classes and list(spec.class_names or classes) == list(classes)


def class_names(spec: ModelSpec, classes: Sequence[str] = ()) -> list[str]:
    """The model's own class names; without them ImageNet's if it has 1000, the data's if as many, or else numbers.

    ImageNet's WordNet ids are replaced by what they mean.
    """
    info = ImageNetInfo("imagenet-1k")
    wnids = info.label_names()
    names = spec.class_names or (wnids if spec.num_classes == IMAGENET_CLASSES else classes)
    if len(names) != spec.num_classes:
        names = [f"class {i}" for i in range(spec.num_classes)]
    known = set(wnids)
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in names]


def fingerprint(source: Dataset) -> str:
    """Changes with the number, the names and the labels of the images, and with the file sizes of some of them."""
    digest = hashlib.sha256(repr(source.classes).encode())
    if isinstance(source, ImageFiles):
        for path, label in source.samples():
            digest.update(f"{path.removeprefix(str(source.root))} {label}\n".encode(errors="surrogateescape"))
        for index in range(0, len(source), -(-len(source) // NUM_SIZES)):
            path = source.path(index)
            digest.update(f"{os.path.getsize(path) if os.path.exists(path) else 0} ".encode())
    return f"{len(source)} images, {digest.hexdigest()[:16]}"


def draw_shapes(train: bool, size: Size) -> Shapes:
    height, width = two_sides(size)
    if height != width:
        raise UserError(f"images of SHAPES are square, got {height} x {width} pixels")
    try:
        return Shapes(train, size=height)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_cifar(root: Path, train: bool, kind: type[CIFAR10]) -> CIFAR10:
    try:
        return kind(str(root), train=train)
    except RuntimeError as error:
        raise UserError(
            f'no {kind.__name__} in {root}; get it: python -c "import torchvision; '
            f"torchvision.datasets.{kind.__name__}('{root}', download=True)\""
        ) from error


def read_train_or_val(root: Path, train: bool, num_classes: int | None, labelled: bool, upright: bool) -> ImageFiles:
    """ImageNet's layout: root/train/<class>/* and root/val/<class>/*; classes are those in train/, if it has any."""
    folder = root / ("train" if train else "val")
    if not folder.is_dir():
        wanted = ("<class>/*", "<class>/*") if labelled else ("*", "*")
        raise UserError(
            f"no folder {folder}; the layout of --data-path is {root}/train/{wanted[0]} and {root}/val/{wanted[1]}"
        )
    training = root / "train"
    classes = class_folders(training) if training.is_dir() else ()
    return read_folder(folder, num_classes, labelled, classes, root, upright)


def read_folder(
    folder: Path,
    num_classes: int | None = None,
    labelled: bool = True,
    classes: Sequence[str] = (),
    root: Path | None = None,
    upright: bool = True,
) -> ImageFiles:
    """The images below a folder, labelled by the class folders that they lie in.

    A label is the position in classes (by default: of the folders found). If all folders are WordNet ids
    of ImageNet-1k, labels are ImageNet's, even if some folders are missing, unless num_classes asks
    for a model of another size. labelled: as in build_source; if False, a folder without class
    folders, or with images beside them, has no labels. root, upright: see ImageFiles.
    Files of other kinds are reported in one line.
    """
    beside, _, others = scan(folder)
    found = class_folders(folder)
    if not labelled and (beside or not found):
        if found:
            log(
                f"warning: {folder} holds images next to its folders, so these are not taken as classes "
                "and no image has a label"
            )
        return ImageFiles(((path, IGNORED_LABEL) for path in list_images(folder)), (), root or folder, upright)
    if not found:
        raise UserError(
            f"no class folders in {folder}; images belong in {folder}/<class>/ "
            "(a dynamic model needs no labels with --cls-weight 0 --distill)"
        )
    classes = classes or found
    wnids = ImageNetInfo("imagenet-1k").label_names()
    if num_classes in (None, len(wnids)) and set(classes) | set(found) <= set(wnids):
        classes = wnids
    strangers = sorted(set(found) - set(classes))
    if strangers:
        raise UserError(f"classes in {folder} that {root}/train does not have: {', '.join(strangers[:5])}")
    label_of = {name: label for label, name in enumerate(classes)}
    left_out = Counter(map(kind, others))
    samples = ((path, label_of[name]) for name in found for path in list_images(folder / name, left_out))
    files = ImageFiles(samples, classes, root or folder, upright)
    report_left_out(folder, left_out)
    if beside:
        log(f"warning: {len(beside)} image(s) in {folder} lie in no class folder and are left out")
    empty = set(found) - {classes[label] for label in set(files.labels)}
    if empty and len(files) > 0:
        log(f"warning: class folders without images in {folder}: {', '.join(sorted(empty))}")
    return files


def read_inaturalist(root: Path, train: bool, year: int, upright: bool) -> ImageFiles:
    """iNaturalist 2018 or 2019 by its own JSON files; labels in DeiT's order, by first appearance."""
    training = read_listing(root / f"train{year}.json")
    labels: dict[int, int] = {}
    for category in training.category_of.values():
        labels.setdefault(category, len(labels))
    names = dict(entries(read_json(file := root / "categories.json"), file, id=int, name=str))
    if lacking := labels.keys() - names.keys():
        raise UserError(f"{file} does not name category {min(lacking)}, which training images have")
    listing = training if train else read_listing(root / f"val{year}.json")
    return ImageFiles(inaturalist_samples(root, listing, labels), [names[number] for number in labels], root, upright)


class Listing(NamedTuple):
    """One of iNaturalist's JSON files."""

    file: Path
    images: list[tuple[int, str]]  # number and path
    category_of: dict[int, int]  # by the image's number


def read_listing(file: Path) -> Listing:
    content = read_json(file)
    parts = content if isinstance(content, dict) else {}
    images = entries(parts.get("images"), file, id=int, file_name=str)
    return Listing(file, images, dict(entries(parts.get("annotations"), file, image_id=int, category_id=int)))


def entries(content: Any, file: Path, **kinds: type) -> list[tuple]:
    """These fields, each of its type, from every entry of a list. UserError if content is anything else."""
    wanted = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items())
    wrong = f"{file} is not an iNaturalist file: it needs a list of entries with {wanted}; got "
    if not isinstance(content, list):
        raise UserError(wrong + shown(content))
    found = []
    for entry in content:
        values = tuple(map(entry.get, kinds)) if isinstance(entry, dict) else ()
        if tuple(map(type, values)) != tuple(kinds.values()):
            raise UserError(wrong + shown(entry))
        found.append(values)
    return found


def inaturalist_samples(root: Path, listing: Listing, labels: dict[int, int]) -> Iterator[tuple[str, int]]:
    base = root.resolve()
    for number, name in listing.images:
        label = labels.get(listing.category_of.get(number))
        if label is None:
            raise UserError(f"{listing.file}: image {number} has no category, or one that no training image has")
        path = root / name
        try:
            os.fsencode(path)
            inside = path.resolve().is_relative_to(base)
        except (OSError, RuntimeError, ValueError):  # no file can be called so, or a link leads to itself
            inside = False
        if not inside:
            raise UserError(
                f"{listing.file} names an image whose path is invalid or leads out of this folder: {shown(name)}"
            )
        yield str(path), label


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot read {path} ({reason}); iNaturalist needs train*.json, val*.json, categories.json"
        ) from error


def train_transform(size: Size, augmentation: Augmentation, data_set: str = "IMNET") -> Transform:
    """PIL image -> (3, H, W) uint8 tensor, augmented as in DeiT; BatchTransform does the rest."""
    transform = create_transform(
        size,
        is_training=True,
        scale=augmentation.scale,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.policy,
        interpolation=augmentation.train_interpolation,
        normalize=False,
    )
    if is_native(size, data_set):
        # small images are too coarse to be cropped and enlarged (DeiT does the same)
        transform.transforms[0] = transforms.RandomCrop(size, padding=4)
    return transform


def eval_transform(size: Size, preprocessing: Preprocessing, data_set: str = "IMNET") -> Transform:
    """PIL image -> (3, H, W) uint8 tensor: the short side becomes floor(size / crop_pct), then the centre is cut out,
    unless preprocessing.crop_mode says otherwise.

    With crop_pct 0.875 this is DeiT's int(256 / 224 * size). At 384 pixels we do the same as at 224, like
    DynamicViT's first release.
    """
    if is_native(size, data_set):
        return transforms.PILToTensor()
    return create_transform(
        size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        normalize=False,
    )


def is_native(size: Size, data_set: str) -> bool:
    """Whether the data set's images have this size anyway."""
    return data_set == "SHAPES" or NATIVE_SIZE.get(data_set) == two_sides(size)


class BatchTransform:
    """(B, 3, H, W) uint8 images -> normalised float32 on the device, with random erasing in training.

    On the device and not in the loader processes: bytes are quick to copy, and there the arithmetic costs nothing.
    """

    def __init__(
        self,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        erase_prob: float = 0.0,
        erase_mode: str = "pixel",
    ) -> None:
        """mean, std: of the three channels, for pixels from 0 to 1. erase_mode: as Augmentation.remode."""
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(3, 1, 1) * 255
        self.erase = RandomErasing(erase_prob, mode=erase_mode, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        return self.erase(images)


def build_train_loader(
    train_set: AugmentedDataset,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    seed: int,
    num_repeats: int = 1,
    update_freq: int = 1,
) -> tuple[DataLoader, int]:
    """This process's share of the training images, and the number of optimizer steps in an epoch.

    batch_size: images for a forward pass, of which update_freq make a step. num_repeats: see TrainSampler.
    """
    check_num_workers(num_workers)
    sampler = TrainSampler(train_set, get_rank(), get_world_size(), seed, num_repeats)
    steps = len(sampler) // (batch_size * update_freq)
    if steps == 0:
        raise UserError(
            f"--batch-size {batch_size} times --update-freq {update_freq} is more than the "
            f"{len(sampler)} training images of a process; make it smaller"
        )
    loader = DataLoader(
        train_set,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_stop_signals,
    )
    return loader, steps


def build_val_loader(
    val_set: AugmentedDataset, batch_size: int, num_workers: int, pin_memory: bool, sharded: bool = False
) -> DataLoader:
    """The validation images in order; if sharded, each process has its own share of them.

    Its loader processes end with each validation, so that they take no memory during training.
    """
    check_num_workers(num_workers)
    rank, world_size = (get_rank(), get_world_size()) if sharded else (0, 1)
    shard = range(rank, len(val_set), world_size)  # shards differ in length by at most one; no image is in two
    return DataLoader(
        val_set,
        batch_size,
        sampler=shard,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )


def check_num_workers(num_workers: int) -> None:
    """Raises UserError for more loader processes than can be of any use, as each takes memory and time to start; and
    for more than the limit on open files allows, beyond which torch would wait for ever for images."""
    cores = os.cpu_count() or 1
    if not 0 <= num_workers <= WORKERS_PER_CORE * cores:
        raise UserError(
            f"--num-workers must be from 0 to {WORKERS_PER_CORE * cores} ({WORKERS_PER_CORE} for each of the {cores} "
            f"cores here; more would only take memory), got {num_workers}"
        )
    needed = FILES_OPEN + FILES_PER_WORKER * num_workers
    if num_workers and (allowed := open_files_allowed()) < needed:
        raise UserError(
            f"{num_workers} loader processes need {needed} open files, but only {allowed} are allowed; raise the limit "
            f"(ulimit -n {needed}), or lower --num-workers (0 needs none)"
        )


def open_files_allowed() -> float:
    try:
        import resource  # not on Windows
    except ImportError:
        return math.inf
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if limit == resource.RLIM_INFINITY else limit
