"""Shows what a model does with an image's patches: which leave, which become one token, what it sees then.

dynamicvit visualize fast/ photo.jpg                            # a saved model, a run's folder or a checkpoint
dynamicvit visualize logs/my_run photos/ --gif
dynamicvit visualize photo.jpg --arch deit_tiny --pretrained deit_tiny_patch16_224.pth \
    --scorer attention --reducer merge --pruning-loc 3 4 5 6 7 8 9 10 11 --base-rate 0.8435
dynamicvit visualize logs/my_run SHAPES                         # the generated validation images

Patches that have become one token share their mean colour, dropped ones are white. In a Swin or ConvNeXt locations
on the fast path are faded.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dynamicvit.datasets import DATA_SETS, DataOptions, build_source, eval_transform, is_native
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import ModelSpec, gives_embeddings, pictures
from dynamicvit.models.pruning import Trace
from dynamicvit.models.spec import two_sides
from dynamicvit.runs import start
from dynamicvit.tools.photos import find_photos, read_photos
from dynamicvit.utils import log
from PIL import Image
from torch import Tensor, nn

from dynamicvit import datasets, options

PANEL_SIZE = 224  # pixels; smaller images are enlarged to about this


def build_parser() -> argparse.ArgumentParser:
    parser = options.OneLineParser(prog="visualize", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a saved model, a run's folder or a checkpoint; or see --pretrained")
    add("source", metavar="IMAGE_OR_FOLDER", help="what to draw; SHAPES draws generated images")
    add("--resume", help="another way to give MODEL")
    options.add_model_flags(parser)
    add(
        "--count",
        type=options.number(int, options.POSITIVE),
        default=16,
        help="at most this many images of a folder or SHAPES",
    )
    add("--output", type=Path, default=start.RUNS / "pictures", help="folder")
    add(
        "--all-stages",
        action="store_true",
        help="show all of them in the strips, not only the first, the middle and the last",
    )
    add("--gif", action="store_true", help="animate each image, too")
    return parser


def main(args: argparse.Namespace) -> None:
    flags = options.take(options.ModelFlags, args)
    source = which_model(args.model, args.resume, flags, args.source)
    model, trained, settings = start.load_trained_model(flags, source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = run_data(settings)
    classes = () if gives_embeddings(model.spec) else class_names(model.spec, data)
    args.output.mkdir(parents=True, exist_ok=True)
    strips = []
    for name, image in read_images(args.source, args.count, model.spec):
        pixels = preprocess(image, model.spec, "SHAPES" if args.source == "SHAPES" else data.data_set)
        strip, frames = draw(model, pixels, classes, trained, args.all_stages)
        strips.append(strip)
        pictures.save_png(strip, args.output / f"{name}_strip.png")
        if args.gif:
            pictures.save_gif(frames, args.output / f"{name}.gif")
    if len(strips) > 1:
        pictures.save_png(pictures.contact_sheet(strips), args.output / "contact_sheet.png")
    log(f"{len(strips)} picture(s) in {args.output}")


def which_model(model: str | None, resume: str | None, flags: options.ModelFlags, photos: str) -> str | None:
    """What to load; None for dense weights made dynamic by flags. UserError if the command names none or several."""
    named = [name for name in (model, resume, flags.pretrained) if name]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} both name the weights; give one of them")
    if not named:
        raise UserError(f"which model? give it before the image: visualize MODEL {photos}")
    if flags.dense:
        raise UserError("--dense leaves nothing to see: a dense model keeps all its tokens")
    return model or resume


def run_data(settings: dict[str, Any]) -> DataOptions:
    """The data set of the run with these flags; the default one where they do not tell."""
    data_set = settings.get("data_set")
    return DataOptions(data_set if data_set in DATA_SETS else "IMNET", str(settings.get("data_path") or ""))


def class_names(spec: ModelSpec, data: DataOptions) -> Sequence[str]:
    """See datasets.class_names; the data set's where it is found. It is looked for only if nothing else names them."""
    if spec.class_names is not None or spec.num_classes == datasets.IMAGENET_CLASSES:
        return datasets.class_names(spec)
    try:
        return datasets.class_names(spec, build_source(train=False, options=data, size=spec.img_size).classes)
    except (UserError, OSError):
        return datasets.class_names(spec)


def read_images(source: str, count: int, spec: ModelSpec) -> Iterator[tuple[str, Image.Image]]:
    """Names to save under, all different, and RGB images."""
    if source == "SHAPES":
        shapes = build_source(train=False, options=DataOptions("SHAPES"), size=spec.img_size)
        for i in range(min(count, len(shapes))):
            image, label = shapes[i]
            yield f"{i:03}_{shapes.classes[label].replace(' ', '_')}", image
        return
    files = find_photos(source)
    if len(files) > count:
        log(f"the first {count} of {len(files)} images; --count takes more")
    for i, (file, image) in enumerate(read_photos(files[:count])):
        yield file.stem if Path(source).is_file() else f"{i:03}_{file.stem}", image


def preprocess(image: Image.Image, spec: ModelSpec, data_set: str) -> Tensor:
    """(3, H, W) uint8: as in validation. An image whose size is not the data set's is treated as a photo."""
    size = spec.img_size
    height, width = two_sides(size)
    if not (image.size == (width, height) and is_native(size, data_set)):
        data_set = "IMNET"
    return eval_transform(size, spec.preprocessing, data_set)(image)


def draw(
    model: nn.Module, image: Tensor, classes: Sequence[str], trained: bool, all_stages: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The captioned strip of a (3, H, W) uint8 image, and a captioned panel for the image and every stage."""
    keep_rates = model.keep_rates
    model.set_keep_rates([1.0] * len(keep_rates))
    dense = pictures.prune(model, image[None])
    model.set_keep_rates(keep_rates)
    dynamic = pictures.prune(model, image[None])
    if not (dense.logits.isfinite().all() and dynamic.logits.isfinite().all()):
        raise UserError("the model's answers are not finite (NaN or infinite): its weights are damaged")

    image = pictures.enlarge(image, max(1, round(PANEL_SIZE / image.shape[-1])))
    labels = ["input", *stage_labels(model, dynamic)]
    panels = pictures.panels(image, dynamic.groups[0], dynamic.grid, pictures.has_fast_path(model))
    frames = [pictures.caption(panel, [label]) for panel, label in zip(panels, labels, strict=True)]
    stages = range(len(keep_rates)) if all_stages else pictures.shown_stages(len(keep_rates))
    strip = pictures.side_by_side([frames[0], *(frames[1 + stage] for stage in stages)])
    lines = answers(dense.logits[0], dynamic.logits[0], classes, trained)
    return pictures.caption(strip, lines, indent=pictures.GAP + pictures.TEXT_INDENT), frames


def stage_labels(model: nn.Module, trace: Trace) -> list[str]:
    total, what = trace.grid[0] * trace.grid[1], "locations" if pictures.has_fast_path(model) else "tokens"
    return [
        f"{model.place} block {block}: {kept.shape[1]} of {total} {what}"
        for block, kept in zip(model.pruning_loc, trace.kept, strict=True)
    ]


def answers(dense: Tensor, dynamic: Tensor, classes: Sequence[str], trained: bool) -> list[str]:
    """What the model says with all tokens and with fewer: (classes,) logits each, or embeddings without classes."""
    name = "dynamic" if trained else "dynamic, untrained"
    if not classes:
        return [f"{name}: embedding with cosine {F.cosine_similarity(dense, dynamic, dim=0):.3f} to that of all tokens"]
    return [f"all tokens: {best_guess(dense, classes)}", f"{name}: {best_guess(dynamic, classes)}"]


def best_guess(logits: Tensor, classes: Sequence[str]) -> str:
    probability, index = logits.softmax(dim=-1).max(dim=-1)
    return f"{classes[index]}, {probability:.1%}"


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
