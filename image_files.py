"""Image files: finding them in folders, remembering a million of them, and reading one."""

import os
import warnings
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dynamicvit.errors import ImageError
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

# What Pillow raises for a file that is no image, is damaged, or is too large to be one.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageFiles(Dataset):
    """Image files with their labels, read when they are asked for.

    The paths lie end to end in one array of bytes. As a million Python objects they would take
    several times the memory in every process, and every loader process would in time have its own
    copy of them, because merely looking at an object writes its reference count.
    """

    def __init__(self, samples: Iterable[tuple[str, int]], classes: Sequence[str], root: Path) -> None:
        """samples: (path, label). classes: names by label, none where there are no labels. root: a
        folder above all the images; the data may be moved with it and still count as the same."""
        self.paths, self.ends, self.labels = bytearray(), array("q", [0]), array("i")
        for path, label in samples:
            self.paths += path.encode(errors="surrogateescape")
            self.ends.append(len(self.paths))
            self.labels.append(label)
        self.classes = list(classes)
        self.root = root

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB, and its label. Raises ImageError if it cannot be read."""
        return open_image(self.path(index)), self.labels[index]

    def path(self, index: int) -> str:
        index = range(len(self))[index]
        return self.paths[self.ends[index] : self.ends[index + 1]].decode(errors="surrogateescape")

    def samples(self) -> Iterator[tuple[str, int]]:
        """(path, label) of each, in order, without reading the images."""
        return ((self.path(i), label) for i, label in enumerate(self.labels))


def open_image(path: str | Path, short_side: int | None = None) -> Image.Image:
    """Any image file, in RGB. Raises an ImageError that names the file if it cannot be read.

    short_side: pixels that are enough for height and width; a JPEG that has several times as many is decoded at
    an eighth, a quarter or half of its size, which takes a fraction of the time. None: as it is.
    """
    try:
        with warnings.catch_warnings():
            # Broken EXIF and palette transparency do not change the pixels that we use, but an
            # image too large to be one (a decompression bomb) is refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if short_side is not None:
                    image.draft("RGB", (short_side, short_side))
                return image.convert("RGB")
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].replace(f" {str(path)!r}", "")
        advice = "; replace or remove it" if os.path.isfile(path) else ""
        raise ImageError(f"cannot read image {path} ({reason}){advice}") from error


def list_images(folder: str | Path) -> list[str]:
    """Paths of the images in a folder and all folders below it, sorted by folder, then by name.

    Hidden files and folders (names that begin with a dot) are left out. Links are followed, but no
    folder is visited twice, so that a link to a folder above it does no harm.
    """
    visited = folders_above(folder)
    found: list[tuple[str, list[str]]] = []
    waiting = deque([str(folder)])
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in visited:
            continue
        visited.add(real)
        images, subfolders = scan(place)
        found.append((place, images))
        for subfolder in subfolders:  # links last, so that a folder goes by its own name
            (waiting.appendleft if os.path.islink(subfolder) else waiting.append)(subfolder)
    return [path for _, images in sorted(found) for path in images]


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in it that can be classes: not hidden, and no link to itself or above."""
    not_below = folders_above(folder) | {os.path.realpath(folder)}
    return [os.path.basename(path) for path in scan(folder)[1] if os.path.realpath(path) not in not_below]


def folders_above(folder: str | Path) -> set[str]:
    return {str(parent) for parent in Path(os.path.realpath(folder)).parents}


def scan(folder: str | Path) -> tuple[list[str], list[str]]:
    """Sorted paths of the images and of the folders that lie directly in it, without hidden ones."""
    images, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                subfolders.append(entry.path)
            elif is_image(entry):
                images.append(entry.path)
    return sorted(images), sorted(subfolders)


# What the entry itself knows costs nothing. Only for a link is the file system asked, by os.path, which
# takes a link to itself for a link to nothing, where the entry would raise OSError.


def is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_image(entry: os.DirEntry) -> bool:
    """By its name, if it is a regular file (reading a FIFO would wait for ever). A link to nothing
    counts too: reading it will say so, and no image goes missing in silence."""
    if not entry.name.lower().endswith(IMG_EXTENSIONS):
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
