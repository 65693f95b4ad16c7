"""Sweeps a model over base rates: what each way to drop or merge tokens costs, and what it does to the answers.

    python -m tools.sweep --arch deit_small --pretrained deit_small.pth --data-path photos   # any folder of images
    python -m tools.sweep --resume logs/my_run --data-path imagenet --methods predictor+drop attention+merge tome

Everything is compared on the same images with the dense model: the same weights with all tokens kept. Standard
errors are those of the mean over images, and of the paired difference where it says so. Writes sweep.csv, sweep.png
and sweep.npz (the values of every image) to --output. Speed is that of the forward pass alone.
"""

import argparse
import csv
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
from dynamicvit.models import REDUCERS, SCORERS, ModelError, ModelSpec, build_model, gives_embeddings
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.pruning import TokenPruning, choose_attention
from dynamicvit.options import (
    KEEP_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    RUNS,
    OneLineParser,
    add_model_flags,
    load_trained_model,
    number,
)
from dynamicvit.recipe import AMP_DTYPES, pick_amp, precision_name
from dynamicvit.tools.timing import hardware
from dynamicvit.tools.tome import ToMe
from dynamicvit.utils import log
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynamicvit import utils

try:
    from matplotlib.figure import Figure
except ImportError:  # needed for development only, so not installed everywhere
    Figure = None

BASE_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
DENSE, TOME = "dense", "tome"
METHODS = (*(f"{scorer}+{reducer}" for scorer in SCORERS for reducer in REDUCERS), TOME)
VARIED = ("dense", "base_rate", "keep_rates", "scorer", "reducer")  # flags of a model that a sweep varies itself
# Column: heading, width and decimals in the table; top-1 and agreement in percent, se is the standard error.
COLUMNS = {
    "method": ("method", 16, None),
    "base_rate": ("rate", 6, 4),
    "gflops": ("GFLOPs", 7, 3),
    "top1": ("top-1", 6, 2),
    "top1_se": ("se", 5, 2),
    "top1_change": ("change", 7, 2),  # to the dense model on the same images, so paired
    "top1_change_se": ("se", 5, 2),
    "agreement": ("agree", 6, 2),
    "agreement_se": ("se", 5, 2),
    "kl": ("KL", 7, 4),
    "kl_se": ("se", 7, 4),
    "images_per_s": ("img/s", 8, 1),
    "speedup": ("speedup", 7, 2),
}
Row = dict[str, str | float | None]


class Answers(NamedTuple):
    """What a model said, by image, and how long it took, by batch."""

    correct: np.ndarray | None  # 0 or 1; None without labels
    agrees: np.ndarray  # 0 or 1: the dense model's top-1
    kl: np.ndarray  # KL(dense || model)
    seconds: np.ndarray  # an image


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="sweep", description=(__doc__ or "").split("\n")[0])
    add_model_flags(parser)
    add = parser.add_argument
    add("--resume", help="a checkpoint or a run's folder, where --pretrained is not given (default: the newest run)")
    add("--data-path", default="", help="a folder of images, with or without class folders, or with val/ in it")
    add("--data-set", default="IMNET", choices=DATA_SETS, help="IMNET is any folder")
    add("--base-rates", type=number(float, KEEP_RATE), nargs="+", default=BASE_RATES)
    add("--methods", choices=METHODS, nargs="+", default=METHODS, help="scorer+reducer, and ToMe (default: all)")
    add("--batch-size", type=number(int, POSITIVE), default=64, help="images a forward pass")
    add("--num-workers", type=number(int, NOT_NEGATIVE), default=2, help="loader processes")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto", help="mixed precision")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--output", type=Path, default=RUNS / "sweep", help="folder for the results")
    return parser


def main(args: argparse.Namespace) -> None:
    if Figure is None:
        raise UserError("the plot needs matplotlib; get it: pip install -r requirements-dev.txt")
    if (args.output / "sweep.csv").exists():
        raise UserError(f"{args.output} holds an earlier sweep; choose another --output, or remove it")
    for name in VARIED:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is what a sweep varies: use --base-rates and --methods")
    device = utils.pick_device(args.device)
    amp_dtype = pick_amp(args.amp, device)
    model, trained, _ = load_trained_model(args)
    spec = model.spec
    if gives_embeddings(spec):
        raise UserError(f"{spec.arch} has no classifier, so there are no answers to compare")
    for base_rate in args.base_rates:
        check_rate(model, base_rate)  # before the first of many passes, what would stop a later one
    source, labelled = read_images(args.data_set, args.data_path, spec)
    val_set = AugmentedDataset(source, eval_transform(spec.img_size, spec.preprocessing, args.data_set), train=False)
    loader = build_val_loader(val_set, args.batch_size, args.num_workers, pin_memory=device.type == "cuda")
    transform = BatchTransform(device, spec.preprocessing.mean, spec.preprocessing.std)
    models = build_models(model.to(device), args.methods, trained, device)

    precision = precision_name(amp_dtype)
    title = f"{spec.arch}, {len(source)} images; {hardware(device.type)}, {precision}, batches of {args.batch_size}"
    log(title)
    report = Report(args.output, title)
    for base_rate in args.base_rates:
        set_base_rate(models, base_rate, spec)
        utils.set_seed(0)  # random scores that a second sweep draws again
        answers = compare(models, loader, transform, device, amp_dtype, labelled)
        report.add(base_rate, models, answers, spec)
    log(f"saved in {args.output}: sweep.csv, sweep.png, sweep.npz")


def check_rate(model: nn.Module, base_rate: float) -> None:
    try:
        family_of(model).keep_rates(base_rate, len(model.pruning_loc))
    except ValueError as error:
        raise UserError(f"--base-rates {base_rate}: {error}") from error


def read_images(data_set: str, data_path: str, spec: ModelSpec) -> tuple[Dataset, bool]:
    """The images, and whether their labels are the model's. A folder without val/ is taken as it is."""
    folder = Path(data_path)
    if data_set == "IMNET" and data_path and folder.is_dir() and not (folder / "val").is_dir():
        source = read_folder(folder, spec.num_classes, labelled=False)
        if len(source) == 0:
            raise UserError(f"no images in {folder}")
    else:
        options = DataOptions(data_set, data_path, spec.num_classes)
        source = build_source(False, options, spec.img_size, labelled=False)
    classes = list(source.classes)
    if not classes:
        log("the images have no labels: agreement and KL only")
        return source, False
    if not classes_fit(spec, classes):
        log(f"the {len(classes)} classes of the images are not the model's {spec.num_classes}: agreement and KL only")
        return source, False
    return source, True


def build_models(model: nn.Module, methods: Sequence[str], trained: bool, device: torch.device) -> dict[str, nn.Module]:
    """By name: the dense model first, then one for each method that the backbone allows. All share their weights."""
    models = {DENSE: share_weights(build_model(model.spec.as_dense()), model, device)}
    learned = "learned" if trained and model.spec.scorer == "predictor" else "untrained"
    if not isinstance(model, TokenPruning):
        log(f"{model.spec.arch} has predictors only: {', '.join(m for m in METHODS if m != METHODS[0])} are left out")
        return models | {learned: model}
    for method in methods:
        try:
            if method == TOME:
                vit = share_weights(build_model(model.spec.as_dense()), model, device)
                models["ToMe"] = ToMe(vit).eval()
                continue
            scorer, reducer = method.split("+")
            utils.set_seed(0)  # for predictors that the weights do not have
            variant = build_model(replace(model.spec, scorer=scorer, reducer=reducer))
            name = f"{learned if scorer == 'predictor' else scorer} + {reducer}"
            models[name] = share_weights(variant, model, device)
        except (ModelError, ValueError) as error:
            log(f"{method} is left out: {error}")
    return models


def share_weights(variant: nn.Module, model: nn.Module, device: torch.device) -> nn.Module:
    """The variant with the model's own tensors for all that both have."""
    names = variant.state_dict().keys()
    weights = {name: value for name, value in model.state_dict().items() if name in names}
    variant.to(device).load_state_dict(weights, strict=False, assign=True)
    return variant.eval()


def set_base_rate(models: dict[str, nn.Module], base_rate: float, spec: ModelSpec) -> None:
    """ToMe has no rate: it gets the r whose GFLOPs are nearest to those of dropping tokens at random."""
    for model in models.values():
        if hasattr(model, "set_keep_rates"):
            model.set_keep_rates(family_of(model).keep_rates(base_rate, len(model.pruning_loc)))
    if "ToMe" in models:
        reference = build_model(replace(spec, scorer="random", reducer="drop"))
        reference.set_keep_rates(family_of(reference).keep_rates(base_rate, len(spec.pruning_loc)))
        models["ToMe"].r = nearest_r(models["ToMe"], count_gflops(reference, spec.img_size), spec.img_size)


def nearest_r(tome: ToMe, gflops: float, img_size: int | tuple[int, int]) -> int:
    """The number of tokens to merge in each block for which the cost comes nearest to gflops."""

    def cost(r: int) -> float:
        tome.r = r
        return count_gflops(tome, img_size)

    choices = range(tome.vit.patch_embed.num_patches // 2 + 1)
    first_below = bisect_left(choices, -gflops, key=lambda r: -cost(r))
    return min(choices[max(0, first_below - 1) : first_below + 1], key=lambda r: abs(cost(r) - gflops))


@torch.inference_mode()
def compare(
    models: dict[str, nn.Module],
    loader: Iterable,
    transform: Callable[[Tensor], Tensor],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    labelled: bool,
) -> dict[str, Answers]:
    """One pass over the images; the models, DENSE among them, take turns at each batch.

    loader: batches of (B, 3, H, W) uint8 images and (B,) labels.
    """
    values = {name: {column: [] for column in Answers._fields} for name in models}
    turns = deque(models.items())
    for batch, (images, labels) in enumerate(loader):
        images, labels = transform(images), labels.to(device)
        turns.rotate()  # the first of a turn shares the cores with loader processes that read the next batch
        logits = {}
        for name, model in turns:
            with autocast(device, amp_dtype):
                if batch == 0:
                    if hasattr(model, "blocks"):
                        choose_attention(model, images)  # for the dense model; the others do it themselves
                    model(images)  # the first pass of a kind is slow, and not measured
                logits[name], seconds = timed(model, images)
            values[name]["seconds"].append([seconds / len(images)])
        for name, value in values.items():
            top1 = logits[name].argmax(dim=1)
            value["correct"].append((top1 == labels).double().cpu())
            value["agrees"].append((top1 == logits[DENSE].argmax(dim=1)).double().cpu())
            value["kl"].append(kl_divergence(logits[name], logits[DENSE]).double().cpu())
    joined = {n: Answers(**{c: np.concatenate(parts) for c, parts in value.items()}) for n, value in values.items()}
    return joined if labelled else {name: answers._replace(correct=None) for name, answers in joined.items()}


def timed(model: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """The logits, and the seconds until they are there."""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    logits = model(images)
    wait()
    return logits, time.perf_counter() - started


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error (NaN for a single value)."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def summarize(answers: Answers, dense: Answers) -> Row:
    """The columns that follow from what was said; speed by medians over the batches."""
    row = dict.fromkeys(COLUMNS)
    if answers.correct is not None:
        row["top1"], row["top1_se"] = mean_and_error(100 * answers.correct)
        row["top1_change"], row["top1_change_se"] = mean_and_error(100 * (answers.correct - dense.correct))
    row["agreement"], row["agreement_se"] = mean_and_error(100 * answers.agrees)
    row["kl"], row["kl_se"] = mean_and_error(answers.kl)
    row["images_per_s"] = float(np.median(1 / answers.seconds))
    row["speedup"] = float(np.median(dense.seconds / answers.seconds))
    return row


class Report:
    """Table, sweep.csv, sweep.npz and sweep.png, renewed with every base rate: a sweep cut short leaves what it had."""

    def __init__(self, folder: Path, title: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.title = folder, title
        self.rows: list[Row] = []
        self.images: dict[str, np.ndarray] = {}  # by "method rate column"
        log(" ".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS.values()))

    def add(self, base_rate: float, models: dict[str, nn.Module], answers: dict[str, Answers], spec: ModelSpec) -> None:
        """The rows of a base rate; the dense model's only once, as it stays the same."""
        for name, model in models.items():
            if name == DENSE and self.rows:
                continue
            rate, label = (1.0, name) if name == DENSE else (base_rate, name)
            if isinstance(model, ToMe):
                label = f"ToMe, r = {model.r}"
            gflops = count_gflops(model, spec.img_size)
            row = summarize(answers[name], answers[DENSE]) | {"method": label, "base_rate": rate, "gflops": gflops}
            self.rows.append(row)
            log(" ".join(cell(row[column], *how[1:]) for column, how in COLUMNS.items()))
            for column in ("correct", "agrees", "kl"):
                value = getattr(answers[name], column)
                if value is not None:
                    self.images[f"{name} {rate} {column}"] = value.astype(np.float32)
        with open(self.folder / "sweep.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        np.savez_compressed(self.folder / "sweep.npz", **self.images)
        plot(self.rows, self.title).savefig(self.folder / "sweep.png", dpi=150)


def cell(value: str | float | None, width: int, decimals: int | None) -> str:
    text = "-" if value is None else value if decimals is None else f"{value:.{decimals}f}"
    return f"{text:>{width}}"


def plot(rows: Sequence[Row], title: str) -> "Figure":
    """KL and top-1 (without labels: agreement) against GFLOPs, a line for each method, with standard errors."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    answer = "top1" if rows[0]["top1"] is not None else "agreement"
    panels = {"kl": "KL(dense || model)", answer: "top-1 accuracy (%)" if answer == "top1" else "agreement (%)"}
    lines: dict[str, list[Row]] = {}
    for row in rows[1:]:
        lines.setdefault(row["method"].partition(",")[0], []).append(row)
    for axis, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number_of_line, (method, points) in enumerate(lines.items()):
            points = sorted((p for p in points if column != "kl" or p["kl"] > 0), key=lambda row: row["gflops"])
            x, y, error = ([p[c] for p in points] for c in ("gflops", column, f"{column}_se"))
            style = ("-" if "merge" in method else "--") + "os^vDPX"[number_of_line % 7]
            axis.errorbar(x, y, yerr=error, fmt=style, markersize=4, capsize=2, linewidth=1.2, label=method)
        if column == "kl":
            axis.set_yscale("log")
        else:
            axis.axhline(rows[0][column], color="gray", linewidth=1, label=f"{DENSE}, {rows[0]['gflops']:.3f} GFLOPs")
        axis.set_xlabel("GFLOPs")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    figure.axes[1].legend(fontsize="small")
    return figure


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
