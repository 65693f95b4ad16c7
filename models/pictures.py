"""Draws what a dynamic model makes of an image's patches: which leave, which become one token, which scores they get.

A picture is a (3, H, W) uint8 tensor. A grid is the (rows, columns) of an image's N patches, which
are numbered row by row. B images, S pruning stages. Groups are those of models.pruning.Trace: for each
patch the patch whose token it is part of, -1 where it is part of none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from .pruning import Trace

Grid = tuple[int, int]

WHITE = 255
PAGE = 216  # behind the panels: grey, so that a dropped patch on an edge is still seen as one
GAP = 6  # pixels between panels
HEAT = ((20, 10, 90), (200, 40, 100), (255, 235, 80))  # from low to high; ever lighter, to be read in grey print too
HEAT_OPACITY = 0.6
HEAT_LEGEND = "the lighter, the longer it stays (by rank)"
TEXT_SIZE = 14
MIN_TEXT_SIZE = 8
TEXT_INDENT = 2
FADED = 0.7  # how far a location on the fast path is on its way to light grey
LIGHT_GREY = 232
BORDER, BORDER_OPACITY = 255, 0.75  # white, thin as a pixel
MOST_STAGES = 3  # in a strip that does not show all
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.8, 2.0


@torch.no_grad()
def prune(model: nn.Module, images: Tensor) -> Trace:
    """What a dynamic model does with (B, 3, H, W) uint8 images; leaves it in the mode in which it was.

    Scores that are log-probabilities become probabilities. Merged patches have the score of their token.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        trace = model.trace(model.spec.preprocessing.normalise(images.to(device)))
    finally:
        model.train(was_training)
    scores = trace.scores.exp() if model.scorer.probability else trace.scores
    return trace._replace(scores=share_scores(scores, trace.groups))


def share_scores(scores: Tensor, groups: Tensor) -> Tensor:
    """(B, S, N) scores, where a patch that has merged before a stage gets that of the token it is part of."""
    before, later = groups[:, :-1], scores[:, 1:]
    shared = later.gather(2, before.clamp(min=0))
    return torch.cat([scores[:, :1], torch.where(before >= 0, shared, later)], dim=1)


def stage_lines(model: nn.Module, trace: Trace) -> list[str]:
    """What a caption says about the model's stages, in short lines."""
    counts = [trace.groups.shape[2], *(kept.shape[1] for kept in trace.kept)]
    blocks = ", ".join(map(str, model.pruning_loc))
    what = "locations" if has_fast_path(model) else "tokens"
    return [f"{model.scorer} + {model.reducer}, {model.place} blocks {blocks}", f"{what} {', '.join(map(str, counts))}"]


def legend(model: nn.Module) -> str:
    """What became of the patches that were not kept, as it is drawn."""
    if has_fast_path(model):
        return "faded: on the fast path"
    return "one colour and a border: one token" if model.reducer.merges else "white: dropped"


def has_fast_path(model: nn.Module) -> bool:
    """Whether what is not kept stays, on a shorter way, as in a dynamic Swin or ConvNeXt; it is then drawn faded."""
    return model.keeps_map


def spread_patches(values: Tensor, picture: Tensor) -> Tensor:
    """(rows, columns) values of patches -> (H, W) values of the picture's pixels, cut up as evenly as can be."""
    (height, width), (rows, columns) = picture.shape[-2:], values.shape
    return values[torch.arange(height) * rows // height][:, torch.arange(width) * columns // width]


def stage_panel(image: Tensor, groups: Tensor, grid: Grid, fast_path: bool = False) -> Tensor:
    """The image after a stage, (N,) groups: patches that are one token have their mean colour and a border.

    A patch that is a token of its own looks as it is. What has left is white, or faded if it is on a fast path.
    """
    groups = groups.cpu()
    sizes = torch.bincount(groups.clamp(min=0)[groups >= 0], minlength=len(groups))
    is_merged = (groups >= 0) & (sizes[groups.clamp(min=0)] > 1)
    of_pixel = spread_patches(groups.unflatten(0, grid), image)
    merged = spread_patches(is_merged.unflatten(0, grid), image)
    panel = torch.where(merged, group_means(image, of_pixel.clamp(min=0), len(groups)), image)
    border = group_borders(of_pixel, merged)
    panel = torch.where(border, blend(panel, BORDER, BORDER_OPACITY), panel)
    left = blend(panel.float().mean(dim=0).expand_as(panel), LIGHT_GREY, FADED) if fast_path else WHITE
    return torch.where(of_pixel < 0, left, panel).byte()


def group_means(image: Tensor, of_pixel: Tensor, num_groups: int) -> Tensor:
    """(H, W) groups of pixels -> (3, H, W): every pixel in the mean colour of its group."""
    index, colours = of_pixel.flatten(), image.flatten(1).float()
    sums = torch.zeros(3, num_groups).index_add(1, index, colours)
    means = sums / torch.bincount(index, minlength=num_groups).clamp(min=1)
    return means[:, of_pixel].round().byte()


def group_borders(of_pixel: Tensor, merged: Tensor) -> Tensor:
    """(H, W) booleans: the first row or column of pixels of another group, where one of the two has merged."""
    borders = torch.zeros_like(merged)
    borders[1:] |= (of_pixel[1:] != of_pixel[:-1]) & (merged[1:] | merged[:-1])
    borders[:, 1:] |= (of_pixel[:, 1:] != of_pixel[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    return borders


def blend(picture: Tensor, grey: int, opacity: float) -> Tensor:
    return (opacity * grey + (1 - opacity) * picture.float()).round().byte()


def panels(image: Tensor, groups: Tensor, grid: Grid, fast_path: bool = False) -> Tensor:
    """(S + 1, 3, H, W): the image, then what is left of it after each stage, (S, N) groups."""
    return torch.stack([image, *(stage_panel(image, stage, grid, fast_path) for stage in groups)])


def shown_stages(num_stages: int) -> list[int]:
    """All stages if they are few, else the first, the last and some between them, evenly spaced."""
    shown = min(num_stages, MOST_STAGES)
    return [round(i * (num_stages - 1) / max(1, shown - 1)) for i in range(shown)]


def side_by_side(pictures: Sequence[Tensor] | Tensor) -> Tensor:
    """Pictures of one size in a row, GAP pixels around each."""
    return make_grid(torch.stack([*pictures]), nrow=len(pictures), padding=GAP, pad_value=PAGE)


def strip(image: Tensor, groups: Tensor, grid: Grid, fast_path: bool = False) -> Tensor:
    """The image and its shown stages in a row; (S, N) groups."""
    return side_by_side(panels(image, groups[shown_stages(len(groups))], grid, fast_path))


def heat_map(scores: Tensor, grid: Grid, image: Tensor) -> Tensor:
    """(N,) scores as colours over the image, by rank; NaN is white."""
    pixels = spread_patches(rank_levels(scores.cpu()).unflatten(0, grid), image)
    colours = HEAT_OPACITY * heat_colours(pixels.nan_to_num()) + (1 - HEAT_OPACITY) * image.float().mean(dim=0)
    return colours.byte().masked_fill(pixels.isnan(), WHITE)


def rank_levels(scores: Tensor) -> Tensor:
    """(N,) scores -> (N,) levels from 0 for the lowest to 1 for the highest, in even steps; the same for equal scores.

    Importance has a few peaks far above all the rest: drawn by value, a picture of it is almost black.
    """
    known = ~scores.isnan()
    values, rank = scores[known].unique(return_inverse=True)
    steps = max(1, len(values) - 1)
    return torch.full(scores.shape, torch.nan).masked_scatter(known, rank.float() / steps)


def heat_colours(levels: Tensor) -> Tensor:
    """(H, W) levels from 0 to 1 -> (3, H, W) colours from 0 to 255, between those of HEAT."""
    stops = torch.tensor(HEAT, dtype=torch.float32)
    position = levels * (len(stops) - 1)
    lower = position.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[lower], stops[lower + 1], (position - lower)[..., None]).permute(2, 0, 1)


def heat_strip(image: Tensor, scores: Tensor, grid: Grid) -> Tensor:
    """The image and the heat maps of its shown stages in a row; (S, N) scores."""
    return side_by_side([image, *(heat_map(scores[stage], grid, image) for stage in shown_stages(len(scores)))])


def feature_colours(features: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, C) features -> (M, 3) uint8 colours, their first three principal components, and the directions of these.

    directions: (3, C), so that one model's features are coloured as another's were. A component's colour goes from
    its 2nd to its 98th percentile, so that a few outliers do not turn all other features grey.
    """
    centred = (features - features.mean(dim=0)).double()
    if directions is None:
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        directions = vectors[:, -3:].flip(1).T
        # A direction's sign is arbitrary; most features lie on its dark side.
        directions = directions * torch.where((centred @ directions.T).median(dim=0).values > 0, -1, 1)[:, None]
    components = centred @ directions.T.to(centred)
    low, high = (components.quantile(share, dim=0) for share in (0.02, 0.98))
    levels = (components - low) / (high - low).clamp(min=1e-12)
    return (255 * levels.clamp(0, 1)).round().byte(), directions


def feature_map(colours: Tensor, grid: Grid, image: Tensor) -> Tensor:
    """(N, 3) colours of patches, spread over as many pixels as the image has."""
    return torch.stack([spread_patches(channel.unflatten(0, grid), image) for channel in colours.T])


def feature_strip(image: Tensor, features: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """The image beside the colours of each model's (N, C) features, by the directions of the first one's; with the
    models' names below."""
    panels, directions = {"": image}, None
    for name, each in features.items():
        colours, directions = feature_colours(each.float().cpu(), directions)
        panels[name] = feature_map(colours, grid, image)
    return side_by_side([caption(panel, [name]) for name, panel in panels.items()])


def contact_sheet(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of one size on one sheet, as nearly square as they allow."""
    height, width = pictures[0].shape[1:]
    columns = max(1, round((len(pictures) * height / width) ** 0.5))
    return make_grid(torch.stack([*pictures]), nrow=columns, padding=GAP, pad_value=PAGE)


def sheet_of_strips(images: Tensor, trace: Trace, fast_path: bool = False) -> Tensor:
    """The strips of (B, 3, H, W) uint8 images, of which the trace may hold more."""
    return contact_sheet([strip(image, trace.groups[b], trace.grid, fast_path) for b, image in enumerate(images)])


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
