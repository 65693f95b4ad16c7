"""Shapes: a generated data set, to train and test on where no real one is at hand.

One object lies on a cluttered background; its class is its colour and its outline together. The
clutter has the same colours, in pieces too small to have an outline, so that most patches of an
image tell nothing, and a model that looks at a few tokens only has to choose them well.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

COLOURS = {"red": (200, 60, 50), "green": (60, 165, 70), "blue": (60, 90, 205)}
PALETTE = np.array(list(COLOURS.values()))

# Each outline is a test on coordinates around the object's centre, and encloses an area of 1, so
# that the number of its pixels does not give the class away.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u * u + v * v < 0.3183,
    "ring": lambda u, v: np.abs(u * u + v * v - 0.2653) < 0.1592,
    "grille": lambda u, v: (u * u + v * v < 0.6366) & (np.floor(u * 6.5 + 0.5) % 2 == 0),
}
REACH = 0.798  # no outline has a point farther than this from its centre
COVERAGE = (0.08, 0.16)  # share of the image that an object covers
NUM_DISTRACTORS = 20


class Shapes(Dataset):
    """Generated (image, label) pairs; image i of a split is the same on every machine.

    Labels go round the classes, so that these are balanced; whoever trains has to shuffle.
    """

    classes = [f"{colour} {outline}" for colour in COLOURS for outline in OUTLINES]  # noqa: RUF012

    def __init__(self, train: bool, size: int = 64, length: int | None = None) -> None:
        """size: pixels per side, at least 32. length: images, by default 6000 to train on, else 2000."""
        if size < 32:
            raise ValueError(f"outlines cannot be told apart below 32 pixels, got size {size}")
        self.train = train
        self.size = size
        self.length = (6000 if train else 2000) if length is None else length
        self.drawn: dict[int, Image.Image] = {}  # kept, as drawing takes longer than training on it

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Image i, RGB and size x size pixels, and its label; IndexError unless 0 <= i < length."""
        if i not in self.drawn:
            self.drawn[i] = self._draw(i)
        return self.drawn[i], i % len(self.classes)

    def _draw(self, i: int) -> Image.Image:
        rng = self._rng(i)
        label = i % len(self.classes)
        mask = self._draw_object(rng, label)
        pixels = draw_background(rng, self.size)
        draw_distractors(rng, pixels)
        pixels[mask] = PALETTE[label // len(OUTLINES)] + rng.integers(-30, 31, 3)
        pixels += rng.integers(-25, 26, (self.size, self.size, 1))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def object_mask(self, i: int) -> np.ndarray:
        """(size, size) booleans, True on the pixels of image i's object; IndexError as for the image."""
        return self._draw_object(self._rng(i), i % len(self.classes))

    def _rng(self, i: int) -> np.random.Generator:
        if not 0 <= i < self.length:
            raise IndexError(f"image {i} of {self.length}")
        return np.random.default_rng((int(self.train), i))

    def _draw_object(self, rng: np.random.Generator, label: int) -> np.ndarray:
        outline = list(OUTLINES.values())[label % len(OUTLINES)]
        scale = np.sqrt(rng.uniform(*COVERAGE))
        x, y = rng.uniform(REACH * scale, 1 - REACH * scale, 2)
        u, v = rotated_grid(self.size, x, y, rng.uniform(-1, 1))
        return outline(u / scale, v / scale)


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """-> (size, size, 3) integer pixels: soft blotches around one muted tint."""
    tint = rng.integers(70, 150, 3)
    blotches = tint + rng.integers(-45, 46, (8, 8, 1)) + rng.integers(-20, 21, (8, 8, 3))
    image = Image.fromarray(blotches.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).astype(np.int64)


def draw_distractors(rng: np.random.Generator, pixels: np.ndarray) -> None:
    """Scatters small bars in the objects' colours over (size, size, 3) pixels, in place."""
    n = NUM_DISTRACTORS
    x, y = rng.random((2, n))
    turn = rng.uniform(-1, 1, n)
    half_length, half_width = rng.uniform(0.03, 0.1, n), rng.uniform(0.015, 0.04, n)
    colour = PALETTE[rng.integers(0, len(PALETTE), n)] + rng.integers(-30, 31, (n, 3))
    for k in range(n):
        u, v = rotated_grid(len(pixels), x[k], y[k], turn[k])
        pixels[(np.abs(u) < half_length[k]) & (np.abs(v) < half_width[k])] = colour[k]


def rotated_grid(size: int, x: float, y: float, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as a thing at (x, y) sees them, in shares of the image: two (size, size) arrays.

    turn, from -1 to 1, stands for -90 to 90 degrees: it is the tangent of half the angle, which
    gives sine and cosine by arithmetic that is rounded the same everywhere, unlike np.sin.
    """
    cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    centres = (np.arange(size) + 0.5) / size
    dx, dy = (centres - x)[None, :], (centres - y)[:, None]
    return cos * dx + sin * dy, cos * dy - sin * dx
