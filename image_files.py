"""Image files: finding them in folders, remembering a million of them, and reading one."""

import os
import stat
import struct
import warnings
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from dynamicvit.errors import ImageError
from dynamicvit.utils import log, printable, warn
from PIL import Image, features
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".gif", *((".avif",) if features.check("avif") else ()))
# What Pillow raises for a file that is no image, is damaged, or is too large to be one; not for want of memory.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
MAX_ASPECT = 200  # long side to short side; a strip takes gigabytes once its short side is as long as the model's
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
KINDS_NAMED = 4  # of the files left out
warned: list[str] = []  # of which large images


class ImageFiles(Dataset):
    """Image files with their labels, read when they are asked for.

    The paths lie end to end in one array of bytes. As a million Python objects they would take
    several times the memory in every process, and every loader process would in time have its own
    copy of them, because merely looking at an object writes its reference count.
    """

    def __init__(
        self, samples: Iterable[tuple[str, int]], classes: Sequence[str], root: Path, upright: bool = True
    ) -> None:
        """samples: (path, label). classes: names by label, none where there are no labels. root: a
        folder above all the images; the data may be moved with it and still count as the same.
        upright: see open_image."""
        self.paths, self.ends, self.labels = bytearray(), array("q", [0]), array("i")
        for path, label in samples:
            self.paths += path.encode(errors="surrogateescape")
            self.ends.append(len(self.paths))
            self.labels.append(label)
        self.classes = list(classes)
        self.root = root
        self.upright = upright

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB, and its label. Raises ImageError if it cannot be read."""
        return open_image(self.path(index), self.upright), self.labels[index]

    def path(self, index: int) -> str:
        index = range(len(self))[index]
        return self.paths[self.ends[index] : self.ends[index + 1]].decode(errors="surrogateescape")

    def samples(self) -> Iterator[tuple[str, int]]:
        """(path, label) of each, in order, without reading the images."""
        return ((self.path(i), label) for i, label in enumerate(self.labels))


def open_image(path: str | Path, upright: bool = True, short_side: int | None = None) -> Image.Image:
    """Any image file, in RGB with 8 bits a channel; of an animation, the first picture.

    upright: turned as its EXIF orientation asks for, which is how every viewer shows it. torchvision's ImageFolder,
    and so published training and evaluation, takes no notice of it.
    short_side: pixels that are enough for height and width; a JPEG that has several times as many is decoded at
    an eighth, a quarter or half of its size, which takes a fraction of the time. None: at full size.
    Raises an ImageError that names the file if it cannot be read, or only with wrong pixel values.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would be waited for without end
            raise OSError("not a regular file")
        with warnings.catch_warnings():
            # Broken EXIF and palette transparency do not change the pixels that we use. Pillow warns of images that
            # are large, which photos may be, and refuses those twice as large.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                check_size(path, *image.size)
                if short_side is not None:
                    image.draft("RGB", (short_side, short_side))
                image.load()  # some formats tell their orientation only then
                turn = turn_upright(image) if upright else None
                image = to_eight_bits(image).convert("RGB")
                return image if turn is None else image.transpose(turn)
    except UNREADABLE as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        reason = getattr(error, "strerror", None) or said.replace(f" {str(path)!r}", "")
        advice = "; replace or remove it" if os.path.isfile(path) else ""
        raise ImageError(f"cannot read image {printable(path)} ({reason}){advice}") from error


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raises ValueError for a strip. Says so where an image is large enough to be slow."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels is so narrow a strip that a model would see next to nothing")
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        warn_of_large_images(str(path), width * height)


def warn_of_large_images(path: str, pixels: int) -> None:
    """Once per process, as someone with one such photo often has many."""
    if not warned:
        warned.append(path)
        warn(f"{path} has {pixels / 1e6:.0f} million pixels: such photos take much time and memory")


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF data asks for; None where it asks for nothing, or cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # broken EXIF data leads to errors of any kind, and the pixels are whole
        return None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits, and floats from 0 to 1, which Pillow would cut off at 255. Raises ValueError where the value
    of white is unknown."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # true of NaN, too
            raise ValueError("floats outside 0 to 1, so the value of white is unknown; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode.startswith("I"):
        values = np.asarray(image)
        # Pillow gives 32 bits to these formats' 16.
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError("32-bit integers, so the value of white is unknown; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image


def list_images(folder: str | Path, left_out: Counter[str] | None = None) -> list[str]:
    """Paths of the images in a folder and all folders below it, sorted by folder, then by name.

    Hidden files and folders (names that begin with a dot) are left out. Links are followed, but no
    folder is visited twice, so that a link to a folder above it does no harm.
    left_out: counts files of other kinds; without it they are reported in a line.
    """
    if left_out is None:
        left_out = Counter()
        paths = list_images(folder, left_out)
        report_left_out(folder, left_out)
        return paths
    visited = folders_above(folder)
    found: list[tuple[str, list[str]]] = []
    waiting = deque([str(folder)])
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in visited:
            continue
        visited.add(real)
        images, subfolders, others = scan(place)
        left_out.update(kind(name) for name in others)
        found.append((place, images))
        for subfolder in subfolders:  # links last, so that a folder goes by its own name
            (waiting.appendleft if os.path.islink(subfolder) else waiting.append)(subfolder)
    return [path for _, images in sorted(found) for path in images]


def kind(path: str) -> str:
    """The kind of a file that is not an image, for report_left_out."""
    extension = os.path.splitext(path)[1].lower()
    return "special files" if extension in EXTENSIONS else extension or "no extension"


def report_left_out(folder: str | Path, left_out: Counter[str]) -> None:
    """One line, if there are any, as users do not know which formats are read here."""
    if left_out:
        number = left_out.total()
        named = ", ".join(f"{name} ({count})" for name, count in left_out.most_common(KINDS_NAMED))
        rest = ", ..." if len(left_out) > KINDS_NAMED else ""
        log(f"{folder}: {number} file{'s' * (number > 1)} left out: {named}{rest}")


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in it that can be classes: not hidden, and no link to itself or above."""
    not_below = folders_above(folder) | {os.path.realpath(folder)}
    return [os.path.basename(path) for path in scan(folder)[1] if os.path.realpath(path) not in not_below]


def folders_above(folder: str | Path) -> set[str]:
    return {str(parent) for parent in Path(os.path.realpath(folder)).parents}


def scan(folder: str | Path) -> tuple[list[str], list[str], list[str]]:
    """Sorted paths of the images, folders and other files that lie directly in it, without hidden ones."""
    images, subfolders, others = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                subfolders.append(entry.path)
            else:
                (images if is_image(entry) else others).append(entry.path)
    return sorted(images), sorted(subfolders), sorted(others)


# What the entry itself knows costs nothing. Only for a link is the file system asked, through os.path, which
# treats a link to itself as a link to nothing, where the entry would raise OSError.


def is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_image(entry: os.DirEntry) -> bool:
    """By its name, if it is a regular file (reading a FIFO would wait for ever). A link to nothing
    counts too: reading it will say so, and no image goes missing in silence."""
    if not entry.name.lower().endswith(EXTENSIONS):
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
