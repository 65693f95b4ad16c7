"""Photos as commands are given them: one file or a folder, read one by one, prepared for a model."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from dynamicvit.errors import ImageError, UserError
from dynamicvit.image_files import list_images, open_image
from dynamicvit.utils import log
from PIL import Image
from timm.data import create_transform
from torch import Tensor


def find_photos(source: str | Path, count: int | None = None) -> list[Path]:
    """The file, or the first `count` images of the folder. UserError if there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    named = str(source).strip() and path.is_dir()  # an empty name comes from a variable that is not set
    found = [Path(file) for file in list_images(path)] if named else []
    if not found:
        raise UserError(f"no image, and no folder of images: {source}")
    return found[:count]


def read_photos(paths: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """RGB images by path. One of several that cannot be read is left out with a warning; UserError if none can be."""
    read = 0
    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            if len(paths) == 1:
                raise
            log(f"warning: {error}")
            continue
        read += 1
        yield path, image
    if read == 0:
        raise UserError(f"none of the {len(paths)} images can be read")


def batch_of(images: Iterable[Image.Image], config: dict[str, Any], count: int) -> Tensor:
    """(count, 3, H, W), prepared as timm's data_config says; again from the first image if there are fewer."""
    transform = create_transform(**config)
    prepared = [transform(image) for image in itertools.islice(images, count)]
    return torch.stack(list(itertools.islice(itertools.cycle(prepared), count)))
