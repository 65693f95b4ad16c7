"""Sweeps a model over base rates: what each way to drop or merge tokens costs, and what it does to the answers.

    dynamicvit sweep --arch deit_small --pretrained deit_small.pth --data-path photos   # any folder of images
    dynamicvit sweep --resume logs/my_run --data-path imagenet --methods predictor+drop attention+merge tome
    dynamicvit sweep --arch deit_tiny --pretrained deit_tiny.pth --data-path photos --gflops 0.94 --methods merged tome

Everything is compared on the same images with the dense model: the same weights with all tokens kept. "merged" is what
make_dynamic(speedup=) takes. It and ToMe, PiToMe and DiffRate have no base rate: they get the setting whose cost comes
nearest to that of dropping tokens at random, or, like all others, to --gflops.
Standard errors are those of the mean over images, and of the paired difference where it says so. Writes sweep.csv,
sweep.png and sweep.npz (the values of every image) to --output. Speed is that of the forward pass alone.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dynamicvit.datasets import (
    DATA_SETS,
    AugmentedDataset,
    BatchTransform,
    DataOptions,
    build_source,
    build_val_loader,
    classes_fit,
    eval_transform,
    read_folder,
)
from dynamicvit.engine import autocast
from dynamicvit.errors import UserError, exit_status
from dynamicvit.losses import kl_divergence
from dynamicvit.models import ModelSpec, gives_embeddings
from dynamicvit.models.blocks import choose_attention
from dynamicvit.models.pruning import PLACES
from dynamicvit.optim import AMP_DTYPES, pick_amp, precision_name
from dynamicvit.options import (
    KEEP_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    ModelFlags,
    OneLineParser,
    add_model_flags,
    flag_of,
    number,
    take,
)
from dynamicvit.runs.start import RUNS, load_trained_model
from dynamicvit.tools.progress import track
from dynamicvit.tools.sweep_methods import METHODS, describe, levels_of, others_of, variants_of
from dynamicvit.tools.sweep_report import DENSE, Answers, Figure, Report
from dynamicvit.tools.timing import hardware, timed
from dynamicvit.utils import log
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynamicvit import utils

BASE_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
VARIED = ("dense", "base_rate", "keep_rates", "scorer", "reducer")  # flags of a model that a sweep varies itself


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="sweep", description=(__doc__ or "").split("\n")[0])
    add_model_flags(parser)
    add = parser.add_argument
    add("--resume", help="a checkpoint or a run's folder, where --pretrained is not given (default: the newest run)")
    add("--data-path", default="", help="a folder of images, with or without class folders, or with val/ in it")
    add("--data-set", default="IMNET", choices=DATA_SETS, help="IMNET is any folder")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--base-rates", type=number(float, KEEP_RATE), nargs="+", default=BASE_RATES)
    levels.add_argument("--gflops", type=number(float, POSITIVE), nargs="+", help="instead: all methods at these costs")
    add(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=METHODS,
        help="scorer+reducer, and other papers' (default: all)",
    )
    add(
        "--places",
        choices=PLACES,
        nargs="+",
        help="where scorer+reducer's stages are, by their blocks (default: the model's)",
    )
    add("--crop-pct", type=number(float, KEEP_RATE), help="share of an image's side that the model sees (1: all)")
    add("--batch-size", type=number(int, POSITIVE), default=64, help="images per forward pass")
    add("--num-workers", type=number(int, NOT_NEGATIVE), default=2, help="loader processes")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto", help="mixed precision")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--output", type=Path, default=RUNS / "sweep", help="folder for the results")
    return parser


def main(args: argparse.Namespace) -> None:
    if Figure is None:
        raise UserError("the plot needs matplotlib; get it: pip install matplotlib")
    if (args.output / "sweep.csv").exists():
        raise UserError(f"{args.output} holds an earlier sweep; choose another --output, or remove it")
    for name in VARIED:
        if getattr(args, name):
            raise UserError(f"{flag_of(name)} is what a sweep varies: use --base-rates and --methods")
    device = utils.pick_device(args.device)
    amp_dtype = pick_amp(args.amp, device)
    model, trained, settings = load_trained_model(take(ModelFlags, args), args.resume)
    spec = model.spec
    if gives_embeddings(spec):
        raise UserError(f"{spec.arch} has no classifier, so there are no answers to compare")
    levels = levels_of(model, args.base_rates, args.gflops)
    source, labelled = read_images(args.data_set, args.data_path, spec, exif=settings.get("exif") is True)
    preprocessing = replace(spec.preprocessing, crop_pct=args.crop_pct or spec.preprocessing.crop_pct)
    val_set = AugmentedDataset(source, eval_transform(spec.img_size, preprocessing, args.data_set), train=False)
    loader = build_val_loader(val_set, args.batch_size, args.num_workers, pin_memory=device.type == "cuda")
    transform = BatchTransform(device, spec.preprocessing.mean, spec.preprocessing.std)
    model.to(device)
    variants = variants_of(model, args.methods, args.places or (model.place,), trained)

    precision = precision_name(amp_dtype)
    title = f"{spec.arch}, {len(source)} images; {hardware(device.type)}, {precision}, batches of {args.batch_size}"
    log(title)
    report = Report(args.output, title)
    for level in levels:
        for variant in variants[1:]:
            variant.model.set_keep_rates(level.keep_rates(variant.model))
        others = others_of(model, args.methods, level)
        utils.set_seed(0)  # so that a second sweep draws the same random scores
        contestants = [*variants, *others]
        batches = track(loader, f"{level}: batches", len(loader))
        models = {contestant.name: contestant.model for contestant in contestants}
        answers = compare(models, batches, transform, device, amp_dtype, labelled)
        for contestant in contestants if not report.rows else contestants[1:]:  # the dense model stays the same
            report.add(contestant.name, describe(contestant, level), answers[contestant.name], answers[DENSE])
        report.write()
    log(f"saved in {args.output}: sweep.csv, sweep.png, sweep.npz")


def read_images(data_set: str, data_path: str, spec: ModelSpec, exif: bool = False) -> tuple[Dataset, bool]:
    """The images, and whether their labels are the model's. A folder without val/ is taken as it is, its photos
    upright. exif: whether those of a data set are turned upright, as they were in the model's training."""
    folder = Path(data_path)
    if data_set == "IMNET" and data_path and folder.is_dir() and not (folder / "val").is_dir():
        source = read_folder(folder, spec.num_classes, labelled=False)
        if len(source) == 0:
            raise UserError(f"no images in {folder}")
    else:
        options = DataOptions(data_set, data_path, spec.num_classes, exif=exif)
        source = build_source(False, options, spec.img_size, labelled=False)
    classes = list(source.classes)
    if not classes:
        log("the images have no labels: agreement and KL only")
        return source, False
    if not classes_fit(spec, classes):
        log(f"the {len(classes)} classes of the images are not the model's {spec.num_classes}: agreement and KL only")
        return source, False
    return source, True


@torch.inference_mode()
def compare(
    models: dict[str, nn.Module],
    batches: Iterable,
    transform: Callable[[Tensor], Tensor],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    labelled: bool,
) -> dict[str, Answers]:
    """One pass over the images; the models, DENSE among them, take turns at each batch.

    batches: (B, 3, H, W) uint8 images and (B,) labels. Raises UserError for answers that are not finite.
    """
    values = {name: {column: [] for column in Answers._fields} for name in models}
    turns = deque(models.items())
    for batch, (images, labels) in enumerate(batches):
        images, labels = transform(images), labels.to(device)
        turns.rotate()  # the first of a turn shares the cores with loader processes that read the next batch
        logits = {}
        for name, model in turns:
            with autocast(device, amp_dtype):
                if batch == 0:
                    if hasattr(model, "blocks"):
                        choose_attention(model, images)  # for the dense model; the others do it themselves
                    model(images)  # the first pass of a kind is slow, and not measured
                logits[name], seconds = timed(partial(model, images), images.is_cuda)
            values[name]["seconds"].append([seconds / len(images)])
        check_finite(logits)
        for name, value in values.items():
            top1 = logits[name].argmax(dim=1)
            value["correct"].append((top1 == labels).double().cpu())
            value["agrees"].append((top1 == logits[DENSE].argmax(dim=1)).double().cpu())
            value["kl"].append(kl_divergence(logits[name], logits[DENSE]).double().cpu())
    joined = {n: Answers(**{c: np.concatenate(parts) for c, parts in value.items()}) for n, value in values.items()}
    return joined if labelled else {name: answers._replace(correct=None) for name, answers in joined.items()}


def check_finite(logits: dict[str, Tensor]) -> None:
    for name in sorted(logits, key=lambda name: name != DENSE):
        if not logits[name].isfinite().all():
            raise UserError(f"the answers of {name} are not finite (NaN or infinite): the weights are damaged")


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
