"""Shows which patches of an image a model drops, stage by stage, and what it makes of the rest.

python -m tools.visualize photo.jpg                                  # the newest run under logs/
python -m tools.visualize photos/ --resume logs/my_run --gif
python -m tools.visualize photo.jpg --arch deit_small --pretrained deit_small_patch16_224.pth
python -m tools.visualize SHAPES                                     # the generated validation images
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import pictures
import utils
from checkpoints import BEST, LAST
from datasets import build_source, build_transform, open_image
from main_dynamic_vit import build_model, parse_args
from models import ARCHS, find_weights, load_weights, read_checkpoint
from utils import ImageError, UserError, log

RUNS = Path("logs")
PANEL_SIZE = 224  # pixels; smaller images are enlarged to about this


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IMAGE_OR_FOLDER", help="what to draw; SHAPES draws generated images")
    add_model_options(parser)
    parser.add_argument("--base-rate", type=float, help="share of its tokens that each stage keeps")
    parser.add_argument("--count", type=int, default=16, help="images at most, of a folder or SHAPES (default: 16)")
    parser.add_argument("--output", type=Path, default=RUNS / "pictures", help="folder (default: logs/pictures)")
    parser.add_argument("--gif", action="store_true", help="animate each image, too")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that load_model reads."""
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--resume", help="checkpoint, or folder of a run (default: the newest run under logs/)")
    origin.add_argument("--pretrained", help="dense weights instead; the predictors are then untrained")
    parser.add_argument("--arch", choices=ARCHS, help="for weights that come without their arguments")
    parser.add_argument("--input-size", type=int, help="pixels (default: as trained)")


def main(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise UserError(f"--count must be at least 1, got {options.count}")
    model, args, trained = load_model(options, base_rate=options.base_rate)
    model.to(utils.pick_device("auto"))
    classes = class_names(args)
    options.output.mkdir(parents=True, exist_ok=True)
    strips = []
    for name, image in read_images(options.source, options.count, args):
        strip, frames = draw(model, preprocess(image, args), classes, trained)
        strips.append(strip)
        pictures.save_png(strip, options.output / f"{name}_strip.png")
        if options.gif:
            pictures.save_gif(frames, options.output / f"{name}.gif")
    if len(strips) > 1:
        pictures.save_png(pictures.contact_sheet(strips), options.output / "contact_sheet.png")


def load_model(options: argparse.Namespace, **overrides) -> tuple[VisionTransformer, argparse.Namespace, bool]:
    """A dynamic model in eval mode, the arguments that describe it, and whether its predictors are trained.

    The arguments are those of main_dynamic_vit.py. They come from the checkpoint, but for those given
    as options or overrides (None: not given).
    """
    path = Path(options.pretrained) if options.pretrained else locate_checkpoint(options.resume)
    content = read_checkpoint(path)
    args = stored_args(content)
    if args is None:
        if not options.arch:
            raise UserError(f"{path} does not tell its architecture; add --arch")
        args = parse_args([])
    if args.dense and not options.pretrained:
        raise UserError(f"{path} is of a dense run; give a dynamic one with --resume (or --pretrained {path})")
    overrides |= {"arch": options.arch, "input_size": options.input_size}
    vars(args).update({name: value for name, value in overrides.items() if value is not None})
    if overrides.get("base_rate") is not None:
        args.keep_rates = None  # they would go before the base rate
    weights = find_weights(content)
    if "head.bias" not in weights:
        raise UserError(f"{path} holds no classifier (head.bias)")
    args.num_classes = len(weights["head.bias"])
    utils.set_seed(0)  # untrained predictors that choose the same tokens tomorrow
    model = build_model(args, dense=False)
    for note in load_weights(model, weights):
        log(note)
    log(f"{path}: {args.arch}, {args.num_classes} classes")
    return model.eval(), args, any(name.startswith("score_predictor.") for name in weights)


def locate_checkpoint(resume: str | None) -> Path:
    """The checkpoint file that --resume means: a file, a run's folder, or None for the newest run."""
    if resume is None:
        runs = [path for name in (BEST, LAST) for path in RUNS.rglob(name)]
        if not runs:
            raise UserError(
                f"no trained run under {RUNS}/; give --resume RUN_OR_CHECKPOINT, or --arch and --pretrained"
            )
        folder = max(runs, key=lambda path: path.stat().st_mtime).parent
    else:
        folder = Path(resume)
        if not folder.is_dir():
            return folder
    for name in (BEST, LAST):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no {BEST} or {LAST} in {folder}")


def stored_args(content: dict) -> argparse.Namespace | None:
    """The arguments that a checkpoint was trained with, as main_dynamic_vit.py knows them."""
    stored = content.get("args")
    if isinstance(stored, argparse.Namespace):  # published checkpoints
        stored = vars(stored)
    if not isinstance(stored, dict):
        return None
    args = parse_args([])
    vars(args).update({name: value for name, value in stored.items() if name in vars(args)})
    return args


def class_names(args: argparse.Namespace) -> Sequence[str]:
    """ImageNet's names, or the names that the run's data set has where it can be found, else numbers."""
    if args.num_classes == 1000:
        return [name.split(",")[0] for name in ImageNetInfo("imagenet-1k").label_descriptions()]
    try:
        classes = build_source(train=False, args=args).classes
    except UserError:
        classes = ()
    return classes if len(classes) == args.num_classes else [f"class {i}" for i in range(args.num_classes)]


def read_images(source: str, count: int, args: argparse.Namespace) -> Iterator[tuple[str, Image.Image]]:
    """Names to save under, all different, and RGB images."""
    if source == "SHAPES":
        shapes = build_source(train=False, args=argparse.Namespace(data_set="SHAPES", input_size=args.input_size))
        for i in range(min(count, len(shapes))):
            image, label = shapes[i]
            yield f"{i:03}_{shapes.classes[label].replace(' ', '_')}", image
        return
    path = Path(source)
    if path.is_file():
        yield path.stem, open_image(path)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise UserError(f"no image, and no folder of images: {source}")
    if len(files) > count:
        log(f"the first {count} of {len(files)} images; --count takes more")
    for i, file in enumerate(files[:count]):
        try:
            yield f"{i:03}_{file.stem}", open_image(file)
        except ImageError as error:
            log(f"warning: {error}")


def preprocess(image: Image.Image, args: argparse.Namespace) -> Tensor:
    """(3, H, W) uint8: as in validation. An image that has not the size of its data set's goes as a photo does."""
    data_set = args.data_set if image.size == (args.input_size, args.input_size) else "IMNET"
    return build_transform(train=False, args=argparse.Namespace(data_set=data_set, input_size=args.input_size))(image)


def draw(model: VisionTransformer, image: Tensor, classes: Sequence[str], trained: bool) -> tuple[Tensor, list[Tensor]]:
    """The captioned strip of a (3, H, W) uint8 image, and the panels that it is made of."""
    keep_rates = model.keep_rates
    model.set_keep_rates([1.0] * len(keep_rates))
    dense = pictures.prune(model, image[None])
    model.set_keep_rates(keep_rates)
    dynamic = pictures.prune(model, image[None])

    grid = model.patch_embed.grid_size
    image = pictures.enlarge(image, max(1, round(PANEL_SIZE / image.shape[-1])))
    labels = ["input"]
    for stage, indices in enumerate(dynamic.kept):
        labels.append(f"stage {stage + 1}: {indices.shape[1]} of {grid[0] * grid[1]} tokens")
    panels = pictures.panels(image, [indices[0] for indices in dynamic.kept], grid)
    frames = [pictures.caption(panel, [label]) for panel, label in zip(panels, labels, strict=True)]
    lines = [
        f"all tokens: {best_guess(dense.logits[0], classes)}",
        f"{'dynamic' if trained else 'dynamic, untrained'}: {best_guess(dynamic.logits[0], classes)}",
    ]
    return pictures.caption(pictures.side_by_side(frames), lines, indent=pictures.GAP + pictures.TEXT_INDENT), frames


def best_guess(logits: Tensor, classes: Sequence[str]) -> str:
    probability, index = logits.softmax(dim=-1).max(dim=-1)
    return f"{classes[index]}, {probability:.1%}"


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(utils.exit_status(command))
