"""Measures dynamic models against their dense backbone, alternately in one process.

    python -m tools.benchmark --arch deit_small --base-rate 0.7 --batch-size 32 --json speed.json

The dense model is timm's own (for LV-ViT our backbone), with fused attention and the same weights. Beside
the published form there is "merged": class attention and merging at every block from a quarter of the depth on,
at a rate that leaves as many multiply-adds.
With --input FOLDER it measures instead how fast a core reads and augments images.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from dynamicvit.datasets import AugmentedDataset, train_transform
from dynamicvit.engine import accumulate_gradients, autocast, copy_statistics, update_weights
from dynamicvit.errors import UserError, exit_status
from dynamicvit.image_files import ImageFiles, list_images
from dynamicvit.models import ModelError, ModelSpec, Teacher, build_model
from dynamicvit.models.costs import solve_keep_rates
from dynamicvit.models.flops import count_gflops, gflops_of
from dynamicvit.options import KEEP_RATE, POSITIVE, OneLineParser, number
from dynamicvit.recipe import AMP_DTYPES, build_augmentation, build_recipe, build_trainer
from dynamicvit.tools.timing import Step, hardware, interleave
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from dynamicvit import utils

NUM_CLASSES = 1000
SCALING_SIZES = (160, 224, 288, 384, 512)
SCALING_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
INPUT_IMAGES = 200  # of a folder, at most
LATENCY_ROUNDS = 10  # times --repeats, as batch 1 is short and a 95th percentile needs many
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}  # on a GPU several, so that its queue stays filled as in real use
COLUMNS = {  # of the printed table, by their names in the JSON file: heading, width, decimals
    "input_size": ("size", 4, 0),
    "base_rate": ("rate", 4, 2),
    "model": ("model", 17, None),
    "images_per_s": ("images/s", 9, 1),
    "spread": ("spread", 6, 3),
    "ratio": ("ratio", 5, 3),
    "gflops": ("GFLOPs", 7, 3),
    "gflops_ratio": ("ratio", 5, 3),
    "peak_mib": ("peak MiB", 8, 0),
    "p50_ms": ("batch 1 p50", 11, 2),
    "p95_ms": ("p95 ms", 8, 2),
    "latency_ratio": ("ratio", 5, 3),
}

TRAININGS = ("dense", "teacher alone", "dynamic", "dynamic + teacher", "merged + teacher")


@dataclass(frozen=True)
class Contender:
    """What one row of the table measures, the modules in it that --compile compiles, and what trains them."""

    step: Step
    modules: Sequence[nn.Module]
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    arch: str
    base_rate: float
    keep_rates: Sequence[float] | None
    input_size: int
    batch_size: int
    amp: str
    device: str
    compile: str | None
    train: bool
    repeats: int


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmark", description=(__doc__ or "").split("\n")[0])
    rate = number(float, KEEP_RATE)
    parser.add_argument("--arch", default="deit_small", help="one of ours, or a timm name")
    parser.add_argument("--base-rate", type=rate, default=0.7, help="share of its tokens that each stage keeps")
    parser.add_argument("--keep-rates", type=rate, nargs="+", help="instead: shares of the original tokens, by stage")
    parser.add_argument("--input-size", type=number(int, POSITIVE), default=224)
    parser.add_argument("--batch-size", type=number(int, POSITIVE), default=32)
    parser.add_argument("--amp", choices=AMP_DTYPES, default="off", help="in inference of weights and images too")
    parser.add_argument("--device", choices=STEPS_PER_TURN, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="torch.compile every model, in this mode; reduce-overhead records CUDA graphs",
    )
    parser.add_argument("--train", action="store_true", help="measure training steps instead of inference")
    parser.add_argument("--scaling", action="store_true", help="measure a range of input sizes and of base rates")
    parser.add_argument(
        "--input", type=Path, help="measure instead how fast one core reads and augments the images of this folder"
    )
    parser.add_argument(
        "--repeats", type=number(int, POSITIVE), default=20, help="rounds that are measured, after a warm-up"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    report = measure_input(args.input, args.input_size, args.repeats) if args.input else run(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Before anything is measured, what would stop it later."""
    utils.pick_device(args.device)
    if args.scaling and args.keep_rates:
        raise UserError("--scaling varies the base rate, so it cannot go with --keep-rates")
    if args.input and (args.train or args.scaling):
        raise UserError("--input measures the reading of images alone; leave out --train and --scaling")
    if args.input and not args.input.is_dir():
        raise UserError(f"no such folder: {args.input}")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"cannot write {args.json}: it is a directory, or its directory does not exist")


def run(args: argparse.Namespace) -> dict:
    """Measures everything asked for, prints it as it comes, and returns it for --json."""
    setup = {"hardware": hardware(args.device), "torch": torch.__version__, "timm": timm.__version__}
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    for part in (setup, asdict(settings)):
        print(", ".join(f"{name} {value}" for name, value in part.items()))
    print(" ".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS.values()))
    rows = []
    for input_size, base_rate in points(settings, args.scaling):
        for row in measure(settings, input_size, base_rate):
            print(table_line(row), flush=True)
            rows.append(row)
    return setup | {"settings": asdict(settings), "rows": rows}


def measure_input(folder: Path, input_size: int, repeats: int) -> dict:
    """The training transform, as a loader process runs it; prints images/s of a core, and returns it for --json."""
    torch.set_num_threads(1)
    paths = list_images(folder)[:INPUT_IMAGES]
    if not paths:
        raise UserError(f"no images in {folder}")
    files = ImageFiles(((path, 0) for path in paths), [""], folder)
    data_set = AugmentedDataset(files, train_transform(input_size, build_augmentation("neurips")), train=True)
    paces = []
    for repeat in range(repeats):
        start = time.perf_counter()
        for i in range(len(paths)):
            data_set[i, repeat]
        paces.append(len(paths) / (time.perf_counter() - start))
    report = {
        "images": len(paths),
        "median_pixels": float(np.median([math.prod(data_set.source[i][0].size) for i in range(len(paths))])),
        "images_per_s_and_core": float(np.median(paces)),
    }
    print(", ".join(f"{name} {value:.0f}" for name, value in report.items()))
    return report


def points(settings: Settings, scaling: bool) -> list[tuple[int, float]]:
    """The (input size, base rate) pairs to measure; training drops no token, so it costs the same at any rate."""
    if not scaling:
        return [(settings.input_size, settings.base_rate)]
    rates = [] if settings.train else [rate for rate in SCALING_RATES if is_possible(settings.arch, rate)]
    by_size = [(size, settings.base_rate) for size in SCALING_SIZES]
    return list(dict.fromkeys(by_size + [(settings.input_size, rate) for rate in rates]))


def is_possible(arch: str, base_rate: float) -> bool:
    """Whether it leaves every stage some tokens; Swin's and ConvNeXt's lose a fixed share at each."""
    try:
        with torch.device("meta"):
            build_model(ModelSpec(arch, base_rate))
    except ModelError:
        return False
    return True


def measure(settings: Settings, input_size: int, base_rate: float) -> list[dict]:
    """A row per contender, the dense one first. Ratios are to the dense one; above 1 is better."""
    torch.compiler.reset()  # torch gives up on a function compiled for more than a few models
    shape = (settings.batch_size, 3, input_size, input_size)
    labels = torch.randint(NUM_CLASSES, shape[:1], device=settings.device)
    models = make_models(settings, input_size, base_rate)
    if settings.train:
        images = torch.randint(256, shape, device=settings.device, dtype=torch.uint8)
        names = [name for name in TRAININGS if name.split(" ")[0] in ("teacher", *models)]
        builders = {name: partial(build_training, settings, name, models) for name in names}
    else:
        images = torch.randn(shape, device=settings.device, dtype=AMP_DTYPES[settings.amp])
        builders = {name: partial(build_inference, settings, model) for name, model in models.items()}
    steps, rows = {}, []
    for name, build in builders.items():
        contender = build()  # one by one, so that each one's memory can be told
        costs = prepare(contender, images, labels, settings.compile)
        steps[name] = contender.step
        rate = None if settings.keep_rates else base_rate
        rows.append({"input_size": input_size, "base_rate": rate, "model": name} | costs)

    seconds = interleave(steps, images, labels, settings.repeats, STEPS_PER_TURN[settings.device])
    for row in rows:
        quarter, median, three_quarters = np.percentile(seconds[row["model"]], (25, 50, 75))
        row["images_per_s"] = settings.batch_size / median
        row["spread"] = (three_quarters - quarter) / median
        row["ratio"] = ratio_to_dense(seconds, row["model"])
        row["gflops_ratio"] = rows[0]["gflops"] / row["gflops"]
    if not settings.train:
        seconds = interleave(steps, images[:1], labels[:1], LATENCY_ROUNDS * settings.repeats, steps_per_turn=1)
        for row in rows:
            row["p50_ms"], row["p95_ms"] = 1e3 * np.percentile(seconds[row["model"]], (50, 95))
            row["latency_ratio"] = ratio_to_dense(seconds, row["model"])
    return rows


def ratio_to_dense(seconds: dict[str, np.ndarray], name: str) -> float:
    """Median over the rounds of the ratio within a round, as the machine's pace differs more between rounds."""
    return float(np.median(seconds["dense"] / seconds[name]))


def build_inference(settings: Settings, model: nn.Module) -> Contender:
    model.to(settings.device, AMP_DTYPES[settings.amp]).eval()

    @torch.inference_mode()
    def step(images: Tensor, labels: Tensor) -> None:
        model(images)

    return Contender(step, [model])


def build_training(settings: Settings, name: str, models: dict[str, nn.Module]) -> Contender:
    """The step of a real run, but for mixup and the moving average; trains copies. See TRAININGS."""
    device = torch.device(settings.device)
    changes = {"amp": settings.amp, "mixup": 0.0, "cutmix": 0.0, "model_ema": False}
    recipe = build_recipe("label-free" if name.startswith("merged") else "neurips", **changes)
    kind = name.split(" ")[0]
    model = deepcopy(models["dense" if kind == "teacher" else kind]).to(device).train()
    teacher = Teacher(deepcopy(models["dense"]).to(device)) if name.endswith("teacher") else None
    augmentation = build_augmentation(recipe.recipe)
    trainer = build_trainer(recipe, model, teacher, device, augmentation, steps_per_epoch=1)
    if kind == "teacher":
        teacher = Teacher(model)

        def ask(images: Tensor, labels: Tensor) -> None:
            with autocast(device, trainer.amp_dtype):
                teacher(trainer.batch_transform(images))

        return Contender(ask, [teacher])

    def step(images: Tensor, labels: Tensor) -> None:
        statistics = copy_statistics(model)
        accumulate_gradients(trainer, images, labels, last=True)
        update_weights(trainer, statistics)

    return Contender(step, [model, teacher] if teacher else [model], trainer.optimizer)


def make_models(settings: Settings, input_size: int, base_rate: float) -> dict[str, nn.Module]:
    """On the CPU, with the same weights: dense, dynamic, and merged where the backbone can."""
    rates = None if settings.keep_rates is None else tuple(settings.keep_rates)
    published = ModelSpec(settings.arch, base_rate, NUM_CLASSES, input_size, keep_rates=rates)
    specs = {"dense": published.as_dense(), "dynamic": published}
    with torch.device("meta"):
        backbone = build_model(specs["dense"])
        target = count_gflops(build_model(published), input_size)
    if hasattr(backbone, "blocks"):
        specs["merged"] = merged_spec(published, len(backbone.blocks), target)
    models = {name: build_model(spec) for name, spec in specs.items()}
    for model in models.values():
        model.load_state_dict(models["dense"].state_dict(), strict=False)
    return models


def merged_spec(published: ModelSpec, depth: int, gflops: float) -> ModelSpec:
    """Class attention and merging before every block from a quarter of the depth on, at so many GFLOPs."""
    stages = tuple(range(max(1, depth // 4), depth))
    spec = replace(published, scorer="attention", reducer="merge", pruning_loc=stages)
    return replace(spec, keep_rates=solve_keep_rates(spec, gflops))


def prepare(contender: Contender, images: Tensor, labels: Tensor, compile_mode: str | None) -> dict:
    """Compiles it where that is asked for; returns its GFLOPs per image and peak memory."""
    costs = {"gflops": gflops_of(lambda: contender.step(images[:1], labels[:1]))}
    if compile_mode:
        for module in contender.modules:
            # static shapes: one graph for the batch, one for batch 1
            module.compile(fullgraph=True, dynamic=False, mode=compile_mode)
    contender.step(images, labels)  # compilation and autotuning need memory of their own
    allocated = peak_allocated(partial(contender.step, images, labels), images.is_cuda)
    costs["peak_mib"] = (bytes_held(contender) + allocated) / 2**20
    return costs


def bytes_held(contender: Contender) -> int:
    """By weights, buffers and the optimizer's state; gradients are gone at the end of a step."""
    tensors = [tensor for module in contender.modules for tensor in module.state_dict().values()]
    if contender.optimizer:
        states = contender.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def peak_allocated(step: Callable[[], None], on_gpu: bool) -> int:
    """Bytes at the height of a step, beyond what was held before it; on a GPU with cuBLAS's workspace."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = trace.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())


def table_line(row: dict) -> str:
    cells = []
    for column, (_, width, decimals) in COLUMNS.items():
        value = row.get(column)
        text = "-" if value is None else value if decimals is None else f"{value:.{decimals}f}"
        cells.append(f"{text:>{width}}")
    return " ".join(cells)


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
