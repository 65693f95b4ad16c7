"""Draws what a dynamic model keeps of an image.

A picture is a (3, H, W) uint8 tensor. A grid is the (rows, columns) of an image's N patches, which
are numbered row by row. B images, S pruning stages, K patches kept at a stage.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from datasets import BatchTransform
from models.pruning import Trace

Grid = tuple[int, int]

WHITE = 255
PAGE = 216  # behind the panels: grey, so that a dropped patch on an edge is still seen as one
GAP = 6  # pixels between panels
HEAT = ((20, 10, 90), (200, 40, 100), (255, 235, 80))  # from low to high; ever lighter, to be read in grey print too
HEAT_OPACITY = 0.6
TEXT_SIZE = 14
MIN_TEXT_SIZE = 8
TEXT_INDENT = 2
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.8, 2.0


@torch.no_grad()
def prune(model: nn.Module, images: Tensor) -> Trace:
    """What a dynamic model does with (B, 3, H, W) uint8 images; leaves it in the mode in which it was.

    A predictor's scores become probabilities of being kept.
    """
    was_training = model.training
    preprocessing = model.spec.preprocessing
    device = next(model.parameters()).device
    model.eval()
    try:
        trace = model.trace(BatchTransform(device, preprocessing.mean, preprocessing.std)(images))
    finally:
        model.train(was_training)
    return trace._replace(scores=trace.scores.exp()) if model.scorer == "predictor" else trace


def keep_mask(kept: Sequence[Tensor], grid: Grid) -> Tensor:
    """By stage the (K,) patches kept -> (S, rows, columns) booleans."""
    mask = torch.zeros(len(kept), grid[0] * grid[1], dtype=torch.bool)
    for stage, indices in enumerate(kept):
        mask[stage, indices.cpu()] = True
    return mask.unflatten(1, grid)


def spread_patches(values: Tensor, picture: Tensor) -> Tensor:
    """(rows, columns) values of patches -> (H, W) values of the picture's pixels."""
    height, width = picture.shape[-2:]
    rows, columns = values.shape
    if height % rows or width % columns:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into {rows} x {columns} patches")
    return values.repeat_interleave(height // rows, dim=0).repeat_interleave(width // columns, dim=1)


def panels(image: Tensor, kept: Sequence[Tensor], grid: Grid) -> Tensor:
    """(S + 1, 3, H, W): the image, then for each stage the image with its dropped patches white."""
    stages = [image.masked_fill(~spread_patches(mask, image), WHITE) for mask in keep_mask(kept, grid)]
    return torch.stack([image, *stages])


def side_by_side(pictures: Sequence[Tensor] | Tensor) -> Tensor:
    """Pictures of one size in a row, GAP pixels around each."""
    return make_grid(torch.stack([*pictures]), nrow=len(pictures), padding=GAP, pad_value=PAGE)


def strip(image: Tensor, kept: Sequence[Tensor], grid: Grid) -> Tensor:
    """The panels of an image in a row."""
    return side_by_side(panels(image, kept, grid))


def heat_map(scores: Tensor, grid: Grid, image: Tensor) -> Tensor:
    """(N,) scores as colours over the image, from its lowest to its highest; NaN is white."""
    scores = scores.cpu().unflatten(0, grid)
    low, high = scores[~scores.isnan()].aminmax()
    levels = (scores - low) / (high - low).clamp(min=1e-12)
    pixels = spread_patches(levels, image)
    colours = HEAT_OPACITY * heat_colours(pixels.nan_to_num()) + (1 - HEAT_OPACITY) * image.float().mean(dim=0)
    return colours.byte().masked_fill(pixels.isnan(), WHITE)


def heat_colours(levels: Tensor) -> Tensor:
    """(H, W) levels from 0 to 1 -> (3, H, W) colours from 0 to 255, between those of HEAT."""
    stops = torch.tensor(HEAT, dtype=torch.float32)
    position = levels * (len(stops) - 1)
    lower = position.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[lower], stops[lower + 1], (position - lower)[..., None]).permute(2, 0, 1)


def heat_strip(image: Tensor, scores: Tensor, grid: Grid) -> Tensor:
    """The image and the heat map of each stage's (N,) scores, in a row."""
    return side_by_side([image, *(heat_map(stage_scores, grid, image) for stage_scores in scores)])


def contact_sheet(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of one size on one sheet, as nearly square as they allow."""
    height, width = pictures[0].shape[1:]
    columns = max(1, round((len(pictures) * height / width) ** 0.5))
    return make_grid(torch.stack([*pictures]), nrow=columns, padding=GAP, pad_value=PAGE)


def sheet_of_strips(images: Tensor, trace: Trace) -> Tensor:
    """The strips of (B, 3, H, W) uint8 images, of which the trace may hold more."""
    return contact_sheet([strip(image, [k[b] for k in trace.kept], trace.grid) for b, image in enumerate(images)])


def sheet_of_heat_maps(images: Tensor, trace: Trace) -> Tensor:
    """As sheet_of_strips, but every stage's scores as a heat map."""
    return contact_sheet([heat_strip(image, trace.scores[b], trace.grid) for b, image in enumerate(images)])


def enlarge(picture: Tensor, factor: int) -> Tensor:
    """factor x factor pixels for each, so that edges stay sharp."""
    return picture.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def caption(picture: Tensor, lines: Sequence[str], indent: int = TEXT_INDENT) -> Tensor:
    """Adds lines of text below the picture, indent pixels from its sides; one that is too wide is set smaller."""
    _, height, width = picture.shape
    line_height = round(1.4 * TEXT_SIZE)
    page = Image.new("RGB", (width, height + GAP + line_height * len(lines)), (PAGE,) * 3)
    page.paste(to_pil_image(picture), (0, 0))
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        natural_width = ImageFont.load_default(TEXT_SIZE).getlength(line)
        shrink = min(1.0, (width - 2 * indent) / max(natural_width, 1.0))
        font = ImageFont.load_default(max(MIN_TEXT_SIZE, TEXT_SIZE * shrink))
        draw.text((indent, height + GAP // 2 + line_height * i), line, fill="black", font=font)
    return pil_to_tensor(page)


def save_png(picture: Tensor, path: Path) -> None:
    to_pil_image(picture).save(path, optimize=True)


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Plays the frames over and over, and rests on the last."""
    first, *others = (to_pil_image(frame) for frame in frames)
    milliseconds = [round(1000 * FRAME_SECONDS)] * len(others) + [round(1000 * LAST_FRAME_SECONDS)]
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
