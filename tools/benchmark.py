"""Measures a dynamic model against its dense backbone, turn about in one process.

    python -m tools.benchmark --arch deit_small --base-rate 0.7 --batch-size 32 --json speed.json

The dense model is timm's own (for LV-ViT our backbone), with fused attention and the same weights.
With --input FOLDER it measures instead how fast a core reads and augments images.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torchvision.datasets.folder import IMG_EXTENSIONS

import utils
from datasets import AugmentedDataset, LabelledFiles, build_transform
from engine import accumulate_gradients, copy_statistics, update_weights
from flops import gflops_of
from main_dynamic_vit import AMP_DTYPES, build_trainer, parse_args
from models import ARCHS, Teacher, create_model
from utils import UserError

NUM_CLASSES = 1000
SCALING_SIZES = (160, 224, 288, 384, 512)
SCALING_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
WARMUP_ROUNDS = 3  # as many as CUDA graphs need to be recorded
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

TRAINING_FLAGS = {"dense": ["--dense"], "dynamic": [], "dynamic + teacher": ["--distill"]}

Step = Callable[[Tensor, Tensor], None]  # what is measured, on (B, 3, H, W) images and (B,) labels


@dataclass(frozen=True)
class Contender:
    """What one row of the table measures, the modules in it that --compile compiles, and what trains them."""

    step: Step
    modules: Sequence[nn.Module]
    optimizer: Optimizer | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=ARCHS, default="deit_small")
    parser.add_argument("--base-rate", type=float, default=0.7, help="share of its tokens that each stage keeps")
    parser.add_argument("--keep-rates", type=float, nargs="+", help="instead: shares of the original tokens, by stage")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
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
    parser.add_argument("--repeats", type=int, default=20, help="rounds that are measured, after a warm-up")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    report = measure_input(args) if args.input else run(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Before anything is measured, what would stop it later."""
    utils.pick_device(args.device)
    if args.batch_size < 1 or args.repeats < 1:
        raise UserError("--batch-size and --repeats must be at least 1")
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
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    for part in (setup, settings):
        print(", ".join(f"{name} {value}" for name, value in part.items()))
    print(" ".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS.values()))
    rows = []
    for input_size, base_rate in points(args):
        for row in measure(args, input_size, base_rate):
            print(table_line(row), flush=True)
            rows.append(row)
    return setup | {"settings": settings, "rows": rows}


def measure_input(args: argparse.Namespace) -> dict:
    """The training transform, as a loader process runs it; prints images/s of a core, and returns it for --json."""
    torch.set_num_threads(1)
    options = parse_args(["--input-size", str(args.input_size)])
    paths = sorted(path for path in args.input.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)[:INPUT_IMAGES]
    if not paths:
        raise UserError(f"no images in {args.input}")
    data_set = AugmentedDataset(
        LabelledFiles([(str(path), 0) for path in paths], [""], args.input), build_transform(True, options), True
    )
    paces = []
    for repeat in range(args.repeats):
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


def points(args: argparse.Namespace) -> list[tuple[int, float]]:
    """The (input size, base rate) pairs to measure; training drops no token, so it costs the same at any rate."""
    if not args.scaling:
        return [(args.input_size, args.base_rate)]
    rates = [] if args.train else SCALING_RATES
    return [(size, args.base_rate) for size in SCALING_SIZES] + [(args.input_size, rate) for rate in rates]


def measure(args: argparse.Namespace, input_size: int, base_rate: float) -> list[dict]:
    """A row per contender, the dense one first. Ratios are to the dense one; above 1 is better."""
    torch.compiler.reset()  # torch gives up on a function compiled for more than a few models
    shape = (args.batch_size, 3, input_size, input_size)
    labels = torch.randint(NUM_CLASSES, shape[:1], device=args.device)
    dense, dynamic = make_models(args, input_size, base_rate)
    if args.train:
        images = torch.randint(256, shape, device=args.device, dtype=torch.uint8)
        builders = {n: partial(build_training, args, flags, dense, dynamic) for n, flags in TRAINING_FLAGS.items()}
    else:
        images = torch.randn(shape, device=args.device, dtype=AMP_DTYPES[args.amp])
        builders = {n: partial(build_inference, args, m) for n, m in (("dense", dense), ("dynamic", dynamic))}
    steps, rows = {}, []
    for name, build in builders.items():
        contender = build()  # one by one, so that each one's memory can be told
        costs = prepare(contender, images, labels, args.compile)
        steps[name] = contender.step
        rate = None if args.keep_rates else base_rate
        rows.append({"input_size": input_size, "base_rate": rate, "model": name} | costs)

    seconds = interleave(steps, images, labels, args.repeats, STEPS_PER_TURN[args.device])
    for row in rows:
        quarter, median, three_quarters = np.percentile(seconds[row["model"]], (25, 50, 75))
        row["images_per_s"] = args.batch_size / median
        row["spread"] = (three_quarters - quarter) / median
        row["ratio"] = ratio_to_dense(seconds, row["model"])
        row["gflops_ratio"] = rows[0]["gflops"] / row["gflops"]
    if not args.train:
        seconds = interleave(steps, images[:1], labels[:1], LATENCY_ROUNDS * args.repeats, steps_per_turn=1)
        for row in rows:
            row["p50_ms"], row["p95_ms"] = 1e3 * np.percentile(seconds[row["model"]], (50, 95))
            row["latency_ratio"] = ratio_to_dense(seconds, row["model"])
    return rows


def ratio_to_dense(seconds: dict[str, np.ndarray], name: str) -> float:
    """Median over the rounds of the ratio within a round, as the machine's pace differs more between rounds."""
    return float(np.median(seconds["dense"] / seconds[name]))


def build_inference(args: argparse.Namespace, model: nn.Module) -> Contender:
    model.to(args.device, AMP_DTYPES[args.amp]).eval()

    @torch.inference_mode()
    def step(images: Tensor, labels: Tensor) -> None:
        model(images)

    return Contender(step, [model])


def build_training(args: argparse.Namespace, flags: Sequence[str], dense: nn.Module, dynamic: nn.Module) -> Contender:
    """The step of a real run with these flags, but for mixup and the moving average; trains copies."""
    options = parse_args(["--amp", args.amp, "--mixup", "0", "--cutmix", "0", "--no-model-ema", *flags])
    options.num_classes = NUM_CLASSES
    device = torch.device(args.device)
    model = deepcopy(dense if options.dense else dynamic).to(device).train()
    teacher = Teacher(deepcopy(dense).to(device)) if options.distill else None
    trainer = build_trainer(options, model, teacher, device)

    def step(images: Tensor, labels: Tensor) -> None:
        statistics = copy_statistics(model)
        accumulate_gradients(trainer, images, labels, last=True)
        update_weights(trainer, statistics)

    return Contender(step, [model, teacher] if teacher else [model], trainer.optimizer)


def make_models(args: argparse.Namespace, input_size: int, base_rate: float) -> tuple[nn.Module, nn.Module]:
    """The dense model and the dynamic one, on the CPU, with the same weights."""
    sizes = {"num_classes": NUM_CLASSES, "img_size": input_size}
    try:
        dense = create_model(args.arch, dense=True, **sizes)
        dynamic = create_model(args.arch, base_rate, keep_rates=args.keep_rates, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    dynamic.load_state_dict(dense.state_dict(), strict=False)
    return dense, dynamic


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


def interleave(
    steps: dict[str, Step], images: Tensor, labels: Tensor, rounds: int, steps_per_turn: int
) -> dict[str, np.ndarray]:
    """Seconds per step, by contender: one number a round."""
    seconds = {name: [] for name in steps}
    names = list(steps)
    for i in range(WARMUP_ROUNDS + rounds):
        names.reverse()  # there and back, so that drift and the neighbour's traces in the cache cancel
        for name in names:
            elapsed = time_turn(partial(steps[name], images, labels), steps_per_turn, images.is_cuda)
            if i >= WARMUP_ROUNDS:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def time_turn(step: Callable[[], None], steps_per_turn: int, on_gpu: bool) -> float:
    """Seconds per step, until the last one's result is there."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps_per_turn):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps_per_turn


def hardware(device: str) -> str:
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name} ({torch.get_num_threads()} threads)"


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
    sys.exit(utils.exit_status(command))
