"""How much a segmentation loses when the features come from a faster model: a linear head on frozen features.

python -m tools.dense_probe deit_tiny --weights deit_tiny.pth --input-size 352 480 --classes 11 --ignore 11 \
    --images camvid/train --masks camvid/trainannot --val-images camvid/val --val-masks camvid/valannot

The head (batch norm and a 1 x 1 convolution) learns on the dense model's features of --images, and is used unchanged
on those of models that need --speedups times fewer multiply-adds. None of these is trained: copy gives each patch the
token of its group, residual adds what the patch lost by joining (models.restoring), ToMe is the published merging, its
tokens copied. With --own-heads a second table follows, in which each model has a head that learned on its own features.
A mask is an image of one channel with the pixels' classes, named like its image except for the ending.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from dynamicvit.errors import UserError, exit_status
from dynamicvit.image_files import open_image
from dynamicvit.models import Preprocessing, from_pretrained, make_dynamic, pictures
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.spec import one_side, two_sides
from dynamicvit.options import NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number
from dynamicvit.tools import rivals
from dynamicvit.tools.dense import Own, build_by_name
from dynamicvit.tools.frames import as_tensor, cover, read_frames
from dynamicvit.tools.probe import DENSE, FRAMES_OF_A_STEP, Contender, Probe
from dynamicvit.tools.timing import hardware
from dynamicvit.utils import log, pick_device, set_seed
from PIL import Image
from torch import Tensor, nn


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="dense_probe", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("model", help="one of our names or timm's, of a ViT")
    add("--weights", help="file with the dense model's weights (default: the published ones)")
    add("--input-size", type=number(int, POSITIVE), nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")
    for part, what in (("", "to learn from"), ("val-", "to measure on")):
        add(f"--{part}images", type=Path, required=True, help=f"folder of images {what}")
        add(f"--{part}masks", type=Path, required=True, help="folder of their masks")
    add(
        "--classes",
        type=number(int, POSITIVE),
        required=True,
        help="number of classes; masks hold 0 to this number - 1",
    )
    add(
        "--ignore",
        type=number(int, NOT_NEGATIVE),
        default=255,
        help="value in masks that is no class and is not counted",
    )
    add(
        "--speedups",
        type=number(float, POSITIVE),
        nargs="+",
        default=[1.3, 1.6, 2.0],
        help="how many times fewer multiply-adds",
    )
    add("--also", nargs="*", default=[], metavar="FOLDER", help="saved models, for instance fine-tuned ones")
    add("--own-heads", action="store_true", help="a second table: each model's head learned on its own features")
    add("--steps", type=number(int, POSITIVE), default=600, help=f"to train a head, of {FRAMES_OF_A_STEP} images each")
    add("--batch-size", type=number(int, POSITIVE), default=8, help="images at a time, also for the times")
    add(
        "--rounds", type=number(int, NOT_NEGATIVE), default=12, help="rounds of timing, all models in turn; 0: no times"
    )
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=number(int, SEED), default=0)
    add("--output", type=Path, help="a file for the tables, in markdown")
    add("--photos", type=Path, nargs="+", default=[], help="photos to draw with the features of dense and residual")
    add("--picture", type=Path, help="the PNG file for --photos")
    return parser


def main(args: argparse.Namespace) -> None:
    if bool(args.photos) != (args.picture is not None):
        raise UserError("--photos and --picture belong together")
    set_seed(args.seed)
    device = pick_device(args.device)
    dense = build_dense(args.model, args.weights, args.input_size).to(device)
    size, how = two_sides(dense.spec.img_size), dense.spec.preprocessing
    training, held_out = (
        read_frames(images, masks, size, args.classes, args.ignore)
        for images, masks in ((args.images, args.masks), (args.val_images, args.val_masks))
    )
    log(f"{len(training)} images to learn from, {len(held_out)} to measure on, {size[0]} x {size[1]} pixels")
    contenders = [Contender(DENSE, dense), *faster_models(dense, args.speedups), *saved_models(args.also, size, device)]
    probe = Probe(training, held_out, how, args.classes, args.steps, args.batch_size, args.seed)
    texts = [probe.with_dense_head(contenders, args.rounds)]
    if args.own_heads:
        texts.append(probe.with_own_heads(contenders))
    text = "\n\n".join([*texts, f"Times: batch {args.batch_size}, {hardware(device.type)}."]) + "\n"
    print(text, end="", flush=True)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    if args.picture:
        pictures.save_png(draw_features(args.photos, contenders, how), args.picture)


# --- Models


def build_dense(name: str, weights: str | None, size: Sequence[int] | None) -> nn.Module:
    """With its trained weights, in eval mode, for images of (height, width) pixels."""
    model, notes = build_by_name(name, Own(weights, None if size is None else one_side(size)))
    for note in notes:
        log(note)
    return model.eval()


def faster_models(dense: nn.Module, speedups: Sequence[float]) -> Iterator[Contender]:
    """Ours with both ways to restore, and ToMe where the backbone has a place for it. Nothing is trained."""
    for speedup in speedups:
        try:
            ours = make_dynamic(copy.deepcopy(dense), speedup=speedup, for_features=True)
        except ValueError as error:
            raise UserError(str(error)) from error
        yield Contender(f"residual, {speedup:g}", ours, "residual")
        yield Contender(f"copy, {speedup:g}", ours, "copy")
        gflops = count_gflops(dense, dense.spec.img_size) / speedup
        try:
            rival = rivals.nearest("tome", dense.spec, gflops)
            yield Contender(f"ToMe, {speedup:g}", rivals.make_rival(copy.deepcopy(dense), rival).eval(), "copy")
        except (ValueError, AttributeError) as error:
            log(f"no ToMe: {error}")


def saved_models(folders: Sequence[str], size: tuple[int, int], device: torch.device) -> Iterator[Contender]:
    for folder in folders:
        model = from_pretrained(folder)
        if two_sides(model.spec.img_size) != size:
            model.set_input_size(img_size=size)
        yield Contender(Path(folder).name, model.to(device))


@torch.no_grad()
def draw_features(photos: Sequence[Path], contenders: Sequence[Contender], preprocessing: Preprocessing) -> Tensor:
    """A row for each photo: itself, and what the dense and the restored features tell apart, as colours."""
    shown = [contender for contender in contenders if contender.restore in (None, "residual")]
    size, rows = two_sides(shown[0].model.spec.img_size), []
    for photo in photos:
        image = as_tensor(cover(open_image(photo), size, Image.Resampling.BICUBIC))
        prepared = preprocessing.normalise(image[None].to(next(shown[0].model.parameters()).device))
        maps = {contender.name: contender.features(prepared)[0] for contender in shown}
        grid = tuple(maps[shown[0].name].shape[1:])
        rows.append(pictures.feature_strip(image, {name: each.flatten(1).T for name, each in maps.items()}, grid))
    return torch.cat(rows, dim=1)


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
