"""Shapes: a generated data set to train and test on where no real one is at hand.

One object lies on a cluttered background; its class is its colour and its outline together. The
clutter has the same colours, in pieces too small to have an outline, so that most patches of an
image tell nothing, and a model that looks at a few tokens only has to choose them well.
Everything is drawn from sums, products and roots, which IEEE 754 rounds the same everywhere:
image i is the same on every machine.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

COLOURS = {"red": (200, 60, 50), "green": (60, 165, 70), "blue": (60, 90, 205)}

# Each outline is a test on coordinates around the object's centre, and encloses an area of 1, so
# that the size of an object does not give its class away.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: u * u + v * v < 0.3183,
    "ring": lambda u, v: np.abs(u * u + v * v - 0.2653) < 0.1592,
    "grille": lambda u, v: (u * u + v * v < 0.6366) & (np.floor(u * 6.5 + 0.5) % 2 == 0),
}
REACH = 0.798  # no outline has a point farther than this from its centre
COVERAGE = (0.09, 0.18)  # share of the image that an object covers
NUM_DISTRACTORS = 16


def rotated_grid(size: int, x: np.ndarray, y: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in the frames of K things at (x, y), as shares of the image: two (K, size, size) arrays.

    turn, from -1 to 1, goes from -90 to 90 degrees: the tangent of half the angle gives its sine
    and cosine without the platform's own.
    """
    cos, sin = (1 - turn**2) / (1 + turn**2), 2 * turn / (1 + turn**2)
    centres = (np.arange(size) + 0.5) / size
    dx = (centres - x[:, None])[:, None, :]
    dy = (centres - y[:, None])[:, :, None]
    cos, sin = cos[:, None, None], sin[:, None, None]
    return cos * dx + sin * dy, cos * dy - sin * dx


class Shapes(Dataset):
    """Generated (image, label) pairs; the labels go round the classes, so that these are balanced."""

    classes = tuple(f"{colour} {outline}" for colour in COLOURS for outline in OUTLINES)

    def __init__(self, train: bool, size: int = 64, length: int | None = None) -> None:
        """size: pixels per side, at least 32. length: images, by default 6000 to train on, else 2000."""
        if size < 32:
            raise ValueError(f"outlines cannot be told apart below 32 pixels, got size {size}")
        self.train = train
        self.size = size
        self.length = (6000 if train else 2000) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Image i, RGB and size x size pixels, and its label; IndexError past the end."""
        rng = self._rng(i)
        label = i % len(self.classes)
        colour = label // len(OUTLINES)
        mask = self._draw_object(rng, label)
        pixels = self._draw_background(rng)
        self._draw_distractors(rng, pixels)
        palette = list(COLOURS.values())
        pixels[mask] = palette[colour] + rng.integers(-30, 31, 3)
        pixels += rng.integers(-18, 19, (self.size, self.size, 1))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label

    def object_mask(self, i: int) -> np.ndarray:
        """(size, size) booleans, True on the pixels of image i's object."""
        return self._draw_object(self._rng(i), i % len(self.classes))

    def _rng(self, i: int) -> np.random.Generator:
        if not 0 <= i < self.length:
            raise IndexError(f"image {i} of {self.length}")
        return np.random.default_rng((int(self.train), i))

    def _draw_object(self, rng: np.random.Generator, label: int) -> np.ndarray:
        outline = list(OUTLINES.values())[label % len(OUTLINES)]
        scale = np.sqrt(rng.uniform(*COVERAGE))
        margin = REACH * scale
        x, y = rng.uniform(margin, 1 - margin, (2, 1))
        u, v = rotated_grid(self.size, x, y, rng.uniform(-1, 1, 1))
        return outline(u[0] / scale, v[0] / scale)

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        tint = rng.integers(70, 150, 3)
        coarse = (tint + rng.integers(-45, 46, (8, 8, 1)) + rng.integers(-20, 21, (8, 8, 3))).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(smooth).astype(np.int64)

    def _draw_distractors(self, rng: np.random.Generator, pixels: np.ndarray) -> None:
        n = NUM_DISTRACTORS
        x, y = rng.random((2, n))
        u, v = rotated_grid(self.size, x, y, rng.uniform(-1, 1, n))
        half_length, half_width = rng.uniform(0.03, 0.1, n), rng.uniform(0.015, 0.04, n)
        masks = (abs(u) < half_length[:, None, None]) & (abs(v) < half_width[:, None, None])
        palette = np.array(list(COLOURS.values()))
        colours = palette[rng.integers(0, len(palette), n)] + rng.integers(-30, 31, (n, 3))
        for mask, colour in zip(masks, colours, strict=True):
            pixels[mask] = colour
