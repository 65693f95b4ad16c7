"""Measures dynamic models against their dense backbone, alternately in one process.

    dynamicvit benchmark --arch deit_small --base-rate 0.7 --batch-size 1 8 32 --json speed.json

The dense model is timm's own (for LV-ViT our backbone), with fused attention; all have the same weights. "dynamic" is
the published form at this rate. With as many multiply-adds: "merged", what make_dynamic(speedup=) chooses (unless
--stages or --place say otherwise); "ToMe"; and
"bound", which has merged's stages and cuts tokens off without looking at any: no way to choose tokens can be faster.
With --input FOLDER it measures instead how fast one core reads and augments images.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import timm
import torch
from dynamicvit.datasets import AugmentedDataset, train_transform
from dynamicvit.errors import UserError, exit_status
from dynamicvit.image_files import ImageFiles
from dynamicvit.models import ModelError, ModelSpec, build_model
from dynamicvit.models.pruning import PLACES
from dynamicvit.optim import AMP_DTYPES
from dynamicvit.options import KEEP_RATE, POSITIVE, OneLineParser, number
from dynamicvit.recipe import build_augmentation
from dynamicvit.runs.tables import Column, Row, Table
from dynamicvit.runs.whole import check_writable, write_whole
from dynamicvit.tools.contenders import DENSE, NUM_CLASSES, Settings, build_contenders, make_models, prepare, recorded
from dynamicvit.tools.photos import find_photos
from dynamicvit.tools.progress import say, track
from dynamicvit.tools.timing import hardware, interleave, times_as_fast

from dynamicvit import utils

SCALING_SIZES = (160, 224, 288, 384, 512)
SCALING_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH_SIZES, TRAINING_BATCH_SIZES = (1, 32), (32,)
INPUT_IMAGES = 200  # of a folder, at most
LATENCY_ROUNDS = 10  # times --repeats, as batch 1 is short and a 95th percentile needs many
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}  # on a GPU several, so that its queue stays filled as in real use
# Ratios are to the dense model's; above 1 is better.
COLUMNS = {
    "input_size": Column("size", ".0f", 4),
    "base_rate": Column("rate", ".2f", 4),
    "batch_size": Column("batch", ".0f", 5),
    "model": Column("model", width=25),
    "images_per_s": Column("images/s", ".1f", 9),
    "spread": Column("spread", ".3f", 6),
    "ratio": Column("times as fast", ".3f"),
    "gflops": Column("GFLOPs", ".3f", 7),
    "gflops_ratio": Column("times fewer", ".3f"),
    "p50_ms": Column("p50 ms", ".2f", 8),
    "p95_ms": Column("p95 ms", ".2f", 8),
    "peak_mib": Column("peak MiB", ".0f", 8),
}
TABLE = Table(COLUMNS)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmark", description=(__doc__ or "").split("\n")[0])
    add, rate = parser.add_argument, number(float, KEEP_RATE)
    add("--arch", default="deit_small", help="one of ours, or a timm name")
    add("--base-rate", type=rate, default=0.7, help="share of its tokens that each stage keeps")
    add("--keep-rates", type=rate, nargs="+", help="instead: shares of the original tokens, by stage")
    add(
        "--place",
        choices=PLACES,
        help="where merged's stages are, by their blocks (default: inside if the backbone allows it)",
    )
    add(
        "--stages",
        type=number(int, POSITIVE),
        help="most stages that merged may have (default: what make_dynamic chooses)",
    )
    add("--input-size", type=number(int, POSITIVE), default=224, help="pixels")
    add("--batch-size", type=number(int, POSITIVE), nargs="+", help="one or several (default: 1 32; with --train 32)")
    add("--amp", choices=AMP_DTYPES, default="off", help="precision; in inference that of weights and images too")
    add("--device", choices=STEPS_PER_TURN, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    modes = ("default", "reduce-overhead", "max-autotune")
    compiled = "torch.compile every model, in this mode; reduce-overhead records CUDA graphs"
    add("--compile", nargs="?", const="default", choices=modes, help=compiled)
    add("--graph", action="store_true", help="record each model's kernels as a CUDA graph, without torch.compile")
    add("--train", action="store_true", help="measure training steps instead of inference")
    add("--scaling", action="store_true", help="measure a range of input sizes and of base rates")
    add("--input", type=Path, help="measure instead how fast one core reads and augments the images of this folder")
    add("--repeats", type=number(int, POSITIVE), default=20, help="rounds that are measured, after a warm-up")
    add("--markdown", action="store_true", help="print the table once more, for docs")
    add("--json", type=Path, help="write the results to this file, too")
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    args.batch_size = args.batch_size or (TRAINING_BATCH_SIZES if args.train else BATCH_SIZES)
    report = measure_input(args.input, args.input_size, args.repeats) if args.input else run(args)
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Raises UserError before anything is measured for what would stop it later."""
    utils.pick_device(args.device)
    if args.scaling and args.keep_rates:
        raise UserError("--scaling varies the base rate, so it cannot go with --keep-rates")
    if args.graph and (args.device != "cuda" or args.train or args.compile):
        raise UserError("--graph records inference on a GPU: leave out --train, --compile and --device cpu")
    if args.input and (args.train or args.scaling):
        raise UserError("--input measures the reading of images alone; leave out --train and --scaling")
    if args.input and not args.input.is_dir():
        raise UserError(f"no such folder: {args.input}")
    if args.json:
        check_writable(args.json)
    if not args.input:
        rates = None if args.keep_rates is None else tuple(args.keep_rates)
        with torch.device("meta"):
            build_model(ModelSpec(args.arch, args.base_rate, img_size=args.input_size, keep_rates=rates))


def run(args: argparse.Namespace) -> dict:
    """Measures everything asked for, prints it as it comes, and returns it for --json."""
    setup = {"hardware": hardware(args.device), "torch": torch.__version__, "timm": timm.__version__}
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    for part in (setup, asdict(settings)):
        print(", ".join(f"{name} {value}" for name, value in part.items()))
    print(TABLE.heading(), flush=True)
    rows = []
    for input_size, base_rate in points(settings, args.scaling):
        for row in measure(settings, input_size, base_rate):
            print(TABLE.line(row), flush=True)
            rows.append(row)
    if args.markdown:
        print(f"\n{setup['hardware']}, torch {setup['torch']}, {args.arch}, amp {args.amp}\n\n{TABLE.markdown(rows)}")
    return setup | {"settings": asdict(settings), "rows": rows}


def points(settings: Settings, scaling: bool) -> list[tuple[int, float]]:
    """The (input size, base rate) pairs to measure; training drops no token, so it costs the same at any rate."""
    if not scaling:
        return [(settings.input_size, settings.base_rate)]
    rates = [] if settings.train else [rate for rate in SCALING_RATES if is_possible(settings.arch, rate)]
    by_size = [(size, settings.base_rate) for size in SCALING_SIZES]
    return list(dict.fromkeys(by_size + [(settings.input_size, rate) for rate in rates]))


def is_possible(arch: str, base_rate: float) -> bool:
    """Whether it leaves every stage some tokens; those of Swin and ConvNeXt lose a fixed share at each."""
    try:
        with torch.device("meta"):
            build_model(ModelSpec(arch, base_rate))
    except ModelError:
        return False
    return True


def measure(settings: Settings, input_size: int, base_rate: float) -> Iterator[Row]:
    """A row per batch size and contender, of each batch size the dense one first."""
    torch.compiler.reset()  # torch gives up on a function compiled for more than a few models
    largest = (max(settings.batch_size), 3, input_size, input_size)
    labels = torch.randint(NUM_CLASSES, largest[:1], device=settings.device)
    if settings.train:
        images = torch.randint(256, largest, device=settings.device, dtype=torch.uint8)
    else:
        images = torch.randn(largest, device=settings.device, dtype=AMP_DTYPES[settings.amp])
    say(f"building the models for {input_size} pixels, rate {base_rate:g}")
    builders = build_contenders(settings, make_models(settings, input_size, base_rate))
    steps, known = {}, {}
    for name, build in track(builders.items(), "models prepared", len(builders)):
        contender = build()
        rate = None if settings.keep_rates else base_rate
        costs = prepare(contender, images, labels, settings.compile)
        known[name] = {"input_size": input_size, "base_rate": rate, "model": name} | costs
        steps[name] = contender.step
    for batch_size in settings.batch_size:
        say(f"measuring batches of {batch_size}")
        batch = images[:batch_size], labels[:batch_size]
        turns = {name: recorded(step, *batch) if settings.graph else step for name, step in steps.items()}
        single = batch_size == 1
        rounds = LATENCY_ROUNDS * settings.repeats if single else settings.repeats
        seconds = interleave(turns, *batch, rounds, 1 if single else STEPS_PER_TURN[settings.device])
        for name, about in known.items():
            row = about | summarize(seconds, name, batch_size)
            peak = about["peak_mib"] if batch_size == len(images) else None  # it was measured with all
            yield row | {"peak_mib": peak, "gflops_ratio": known[DENSE]["gflops"] / about["gflops"]}


def summarize(seconds: dict[str, np.ndarray], name: str, batch_size: int) -> dict[str, float]:
    """The columns that follow from a contender's seconds per step, a number a round."""
    quarter, median, three_quarters = np.percentile(seconds[name], (25, 50, 75))
    p50, p95 = 1e3 * np.percentile(seconds[name], (50, 95))
    return {
        "batch_size": batch_size,
        "images_per_s": batch_size / median,
        "spread": (three_quarters - quarter) / median,
        "ratio": times_as_fast(seconds, name),
        "p50_ms": p50,
        "p95_ms": p95,
    }


def measure_input(folder: Path, input_size: int, repeats: int) -> dict:
    """The training transform, as a loader process runs it; prints images/s of a core, and returns it for --json."""
    torch.set_num_threads(1)
    paths = [str(path) for path in find_photos(folder, INPUT_IMAGES)]
    files = ImageFiles(((path, 0) for path in paths), [""], folder)
    data_set = AugmentedDataset(files, train_transform(input_size, build_augmentation("neurips")), train=True)
    per_second = []
    for repeat in track(range(repeats), "rounds", repeats):
        start = time.perf_counter()
        for i in range(len(paths)):
            data_set[i, repeat]
        per_second.append(len(paths) / (time.perf_counter() - start))
    report = {
        "images": len(paths),
        "median_pixels": float(np.median([math.prod(data_set.source[i][0].size) for i in range(len(paths))])),
        "images_per_s_and_core": float(np.median(per_second)),
    }
    print(", ".join(f"{name} {value:.0f}" for name, value in report.items()))
    return report


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
