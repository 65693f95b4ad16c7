"""Images and their masks, for what looks at every pixel: all of one size, in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dynamicvit.errors import UserError
from dynamicvit.image_files import list_images, open_image
from PIL import Image
from torch import Tensor


@dataclass
class Frames:
    """Images and their masks, all of one size."""

    images: Tensor  # (N, 3, H, W) uint8
    masks: Tensor  # (N, H, W) uint8; the number of classes where nothing is counted

    def __len__(self) -> int:
        return len(self.images)


def read_frames(images: Path, masks: Path, size: tuple[int, int], classes: int, ignore: int) -> Frames:
    """Scaled to cover (height, width) and cut to it about the centre. Raises UserError for what does not fit."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
    by_stem = {Path(path).stem: path for path in list_images(masks)}
    paths = list_images(images)
    if not paths:
        raise UserError(f"no images in {images}")
    frames, labels = [], []
    for path in paths:
        if Path(path).stem not in by_stem:
            raise UserError(f"no mask {Path(path).stem}.* in {masks} for {path}")
        mask = Image.open(by_stem[Path(path).stem])
        if mask.mode not in ("L", "P"):
            raise UserError(f"{mask.filename} is no mask: it needs one channel of 8 bits, with a class in each pixel")
        image = open_image(path, upright=False)
        if image.size != mask.size:
            raise UserError(f"{path} has {image.size} pixels, its mask has {mask.size}")
        frames.append(as_tensor(cover(image, size, Image.Resampling.BICUBIC)))
        labels.append(check_mask(cover(mask, size, Image.Resampling.NEAREST), classes, ignore, mask.filename))
    return Frames(torch.stack(frames), torch.stack(labels))


def cover(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Scaled so that the smaller side fits, and cut to (height, width) about the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        image = image.resize(
            (max(width, round(image.width * scale)), max(height, round(image.height * scale))), resampling
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_mask(mask: Image.Image, classes: int, ignore: int, path: str) -> Tensor:
    """(H, W) uint8, with `classes` where nothing is counted."""
    values = np.array(mask)
    counted = values != ignore
    if (values[counted] >= classes).any():
        found = values[counted].max()
        raise UserError(f"{path} has class {found}; --classes and --ignore allow 0 to {classes - 1}")
    return torch.from_numpy(np.where(counted, values, classes).astype(np.uint8))
