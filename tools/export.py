"""Writes a saved model for other runtimes, checks each file against PyTorch, and measures it against dense.

dynamicvit export fast/ --onnx fast.onnx              # ONNX, for one image at a time
dynamicvit export fast/ --onnx fast.onnx --dynamic-batch
dynamicvit export fast/ --torch fast.pt2              # torch.export: loads without this code
dynamicvit export fast/ --aoti fast_cpu.pt2           # AOTInductor: compiled for this machine
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamicvit.data.shapes import Shapes
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import from_pretrained
from dynamicvit.models.describe import data_config
from dynamicvit.models.huggingface import answer_of
from dynamicvit.models.spec import first_line
from dynamicvit.models.twins import dense_twin
from dynamicvit.options import POSITIVE, OneLineParser, number
from dynamicvit.runs.tables import Column, Table
from dynamicvit.runs.whole import check_writable, whole_file
from dynamicvit.tools.photos import batch_of, find_photos, read_photos
from dynamicvit.tools.predict import require_packages
from dynamicvit.tools.progress import say
from dynamicvit.tools.runtimes import RUNTIMES, WRITERS, exportable, load_runner, run_alone
from dynamicvit.tools.timing import interleave, times_as_fast
from dynamicvit.utils import log
from torch import Tensor, nn

NUM_IMAGES = 64
CHECKED_BATCHES = (1, 5, 58)  # of a dynamic batch; NUM_IMAGES together
MEASURED_BATCHES = (1, 8)
TOLERANCE = 1e-4  # of float32 outputs, in units of their standard deviation where that is above 1
FP16_TOLERANCE = 0.1  # of the median image, in standard deviations
NUDGE, NUM_NUDGES = 1e-5, 8  # see undecided_images; pixels are a thousand times coarser
ATTEMPTS = 3  # see check_file

SPEED = Table(
    {
        "runtime": Column("runtime", width=12),
        "batch": Column("batch", ".0f"),
        "dense": Column("dense ms", ".2f", 9),
        "dynamic": Column("dynamic ms", ".2f"),
        "ratio": Column("ratio", ".2f", 6),
    }
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="saved model's or run's folder, checkpoint, or user/name on the hub")
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE.onnx", help="for ONNX Runtime and everything that reads ONNX"
    )
    parser.add_argument("--torch", type=Path, metavar="FILE.pt2", help="for torch.export.load")
    parser.add_argument(
        "--aoti", type=Path, metavar="FILE.pt2", help="for torch._inductor.aoti_load_package; needs a C++ compiler"
    )
    parser.add_argument("--batch-size", type=number(int, POSITIVE), default=1, help="images in a batch")
    parser.add_argument("--dynamic-batch", action="store_true", help="allow any number of images instead")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="precision of weights and arithmetic; images and outputs stay float32. fp16 is for GPUs",
    )
    parser.add_argument("--images", type=Path, help="folder of photos to check with (default: generated images)")
    rounds = "rounds that are measured, after a warm-up"
    parser.add_argument("--repeats", type=number(int, POSITIVE), default=20, help=rounds)
    return parser


def main(args: argparse.Namespace) -> None:
    wanted = check(args)
    model = from_pretrained(args.model)
    images = read_images(data_config(model.spec), args.images)
    log(f"{args.model}: {model.spec.arch}; checked on {len(images)} {describe_images(args.images)}")
    batch = None if args.dynamic_batch else args.batch_size
    half = args.precision == "fp16"
    for kind, path in wanted.items():
        say(f"writing and checking {path}")
        with written_whole(path) as temporary:
            WRITERS[kind](exportable(model, half), model.spec, temporary, batch)
            finding = check_file(kind, temporary, model, images, batch, half)
        log(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; {finding}")
    if not model.spec.dense:
        measure(model, wanted, batch, half, args.repeats)


def check(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write, by kind. Raises UserError before anything is done for what would stop it later."""
    wanted = {kind: getattr(args, kind) for kind in WRITERS if getattr(args, kind) is not None}
    if not wanted:
        raise UserError("nothing to write; give --onnx FILE.onnx, --torch FILE.pt2 or --aoti FILE.pt2")
    if args.dynamic_batch and args.batch_size != 1:
        raise UserError("--dynamic-batch takes any number of images; leave out --batch-size")
    for kind, path in wanted.items():
        suffix = ".onnx" if kind == "onnx" else ".pt2"
        if path.suffix != suffix:
            raise UserError(f"--{kind} needs a file name that ends in {suffix}, got {path}")
        if path.exists():
            raise UserError(f"{path} exists; remove it, or choose another name")
        check_writable(path)
    if len(set(wanted.values())) < len(wanted):
        raise UserError("--torch and --aoti need different files")
    if args.images and not args.images.is_dir():
        raise UserError(f"no such folder: {args.images}")
    if "onnx" in wanted:
        require_packages("onnx", "onnxscript", "onnxruntime")
    return wanted


def read_images(config: dict[str, Any], folder: Path | None) -> Tensor:
    """(64, 3, H, W), prepared as the model wants it: photos of the folder, again from the first if there are fewer."""
    if folder is not None:
        return batch_of((image for _, image in read_photos(find_photos(folder, NUM_IMAGES))), config, NUM_IMAGES)
    shapes = Shapes(train=False, size=max(32, *config["input_size"][1:]), length=NUM_IMAGES)
    return batch_of((shapes[i][0] for i in range(NUM_IMAGES)), config, NUM_IMAGES)


def describe_images(folder: Path | None) -> str:
    return f"photos of {folder}" if folder else "generated images (--images FOLDER takes photos)"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write; the file gets its name at the end. UserError for all that can go wrong in exporting."""
    try:
        with whole_file(path) as temporary:
            yield temporary
    except UserError:
        raise
    except Exception as error:  # exporters, their compilers and the disk fail in ways of their own
        raise UserError(f"cannot export to {path} ({type(error).__name__}: {first_line(error)})") from error


def check_file(kind: str, path: Path, model: nn.Module, images: Tensor, batch: int | None, half: bool) -> str:
    """The finding in a line. Raises UserError unless the file gives what the model gives."""
    run_all = partial(run_alone, path) if kind == "torch" else partial(map, load_runner(kind, path))

    def check_once(images: Tensor) -> str:
        batches = images.split(CHECKED_BATCHES) if batch is None else split_evenly(images, batch)
        found = torch.cat(list(run_all(batches)))[: len(images)].float()
        return compare(model, images, found, half)

    # Two tokens that tie for this runtime alone do not tie in images that differ by a rounding error;
    # a wrong file stays wrong.
    generator = torch.Generator().manual_seed(0)
    for _ in range(0 if half else ATTEMPTS - 1):
        with suppress(UserError):
            return check_once(images)
        images = images + NUDGE * torch.randn(images.shape, generator=generator)
    return check_once(images)


def split_evenly(images: Tensor, batch: int) -> Sequence[Tensor]:
    """Batches of one size, the last one filled up from the first images."""
    length = -(-len(images) // batch) * batch
    return images.repeat(-(-length // len(images)), 1, 1, 1)[:length].split(batch)


@torch.inference_mode()
def compare(model: nn.Module, images: Tensor, found: Tensor, half: bool) -> str:
    """The finding in a line. Raises UserError if the outputs differ by more than rounding explains."""
    expected = answer_of(model(images))
    unit = max(1.0, float(expected.std()))
    differences = (found - expected).abs().amax(dim=1) / unit
    if half:
        same = int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
        if not differences.median() <= FP16_TOLERANCE:
            raise UserError(
                f"float16 changes the outputs too much for this model (by {float(differences.median()):.2g})"
            )
        return (
            f"outputs differ from float32's by {float(differences.max()):.1e} at most; "
            f"the largest is the same in {same} of {len(images)}"
        )
    off = ~(differences <= TOLERANCE)
    undecided = off.clone()
    undecided[off] = undecided_images(model, images[off], expected[off], unit)
    if (off & ~undecided).any():
        raise UserError(
            f"{int((off & ~undecided).sum())} of {len(images)} outputs differ from PyTorch's "
            f"by up to {float(differences[off & ~undecided].max()):.1e}, so no file is left; "
            "tokens with nearly equal scores can cause this, as in a model that has hardly been trained"
        )
    text = f"{int((~off).sum())} of {len(images)} outputs within {TOLERANCE} of PyTorch's"
    if not off.all():
        text += f" (at most {float(differences[~off].max()):.1e})"
    if undecided.any() and model.spec.scorer == "random":
        text += "; the others cannot be compared, as the random scorer draws anew each time"
    elif undecided.any():
        text += (
            f"; in the other {int(undecided.sum())} two tokens' scores are so close that rounding decides between "
            "them, in PyTorch too"
        )
    return text


def undecided_images(model: nn.Module, images: Tensor, expected: Tensor, unit: float) -> Tensor:
    """(B,) booleans: whether PyTorch's own output leaves the tolerance when pixels change by no more than rounding.

    Which of two tokens with nearly the same score is dropped is decided by the last bits, and those
    differ between runtimes as they do between two machines.
    """
    generator = torch.Generator().manual_seed(0)
    undecided = torch.zeros(len(images), dtype=torch.bool)
    for _ in range(NUM_NUDGES if len(images) else 0):
        nudged = images + NUDGE * torch.randn(images.shape, generator=generator)
        undecided |= (answer_of(model(nudged)) - expected).abs().amax(dim=1) / unit > TOLERANCE
    return undecided


def measure(model: nn.Module, wanted: dict[str, Path], batch: int | None, half: bool, repeats: int) -> None:
    """Prints how long a batch takes, of the dense model and of this one, alternately in one process."""
    dense = dense_twin(model)
    title = f"median of {repeats} rounds, {torch.get_num_threads()} threads; ratio: of dense to dynamic, within a round"
    log("", title, SPEED.heading())
    for kind, path in wanted.items():
        say(f"writing the dense model for {RUNTIMES[kind]} to compare with")
        with tempfile.TemporaryDirectory() as folder:
            dense_path = Path(folder, f"dense{path.suffix}")
            WRITERS[kind](exportable(dense, half), dense.spec, dense_path, batch)
            runners = {"dense": load_runner(kind, dense_path), "dynamic": load_runner(kind, path)}
        for size in MEASURED_BATCHES if batch is None else (batch,):
            images = torch.randn(size, *data_config(model.spec)["input_size"])
            steps = {name: lambda images, _, run=run: run(images) for name, run in runners.items()}
            seconds = interleave(steps, images, images, repeats)
            row = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
            log(
                SPEED.line(
                    {"runtime": RUNTIMES[kind], "batch": size, **row, "ratio": times_as_fast(seconds, "dynamic")}
                )
            )


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
