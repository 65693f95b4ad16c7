"""Makes a trained vision transformer faster in minutes, from a folder of images without labels.

    python -m tools.accelerate vit_small_patch16_224.augreg_in21k_ft_in1k --images photos/ --output fast/

Between its blocks, patches that tell little or resemble a more important one are merged with those most similar
to them (--scorer distinct --reducer merge, as in main_dynamic_vit.py). Then the model learns to answer as it did
before, from its own dense answers. A fifth of the images is never trained on: fast/report.html tells how
much has changed on these. To use the model: models.from_pretrained("fast").
"""

import argparse
import copy
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from dynamicvit.datasets import (
    IGNORED_LABEL,
    IMAGENET_CLASSES,
    PARTS,
    AugmentedDataset,
    BatchTransform,
    build_train_loader,
    build_val_loader,
    classes_fit,
    eval_transform,
    read_folder,
    train_transform,
)
from dynamicvit.engine import accumulate_gradients, copy_statistics, update_weights
from dynamicvit.errors import ImageError, UserError, advice, exit_status
from dynamicvit.image_files import UNREADABLE, ImageFiles, open_image
from dynamicvit.models import (
    ModelSpec,
    Teacher,
    build_model,
    build_teacher,
    find_weights,
    geometric_keep_rates,
    load_weights,
    read_checkpoint,
    save_pretrained,
)
from dynamicvit.models.costs import dense_and_dynamic_gflops, solve_keep_rates
from dynamicvit.models.pretrained import (
    BEST,
    LAST,
    StateDict,
    backbone_part,
    num_classes_of,
    published_weights,
    spec_of,
)
from dynamicvit.models.stages import LOWEST_RATE
from dynamicvit.optim import Trainer, build_trainer, pick_amp, precision_name
from dynamicvit.options import KEEP_RATE, NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number
from dynamicvit.recipe import Recipe, build_augmentation, build_recipe
from dynamicvit.runs.checkpoints import Place, RunState, read_run, temporary_path
from dynamicvit.runs.run import Run, RunOptions, list_bad_images, log_model
from dynamicvit.signals import Stopped, StopSignal
from dynamicvit.tools.accelerate_report import DENSE, MERGED, TUNED, Answers, Comparison, report_content, report_page
from dynamicvit.utils import log
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from dynamicvit import utils

MAX_STAGES = 9
FEWEST_TOKENS = 0.15  # share of the patches; with fewer at the end (30 of 196) answers change too much
MIN_IMAGES = 50  # to fine-tune with
MAX_HELD_BACK, MAX_TRAINING = 500, 10_000  # images; more take time and tell little more
HELD_BACK_IN = 5  # one image in this many
VALIDATION_COST = 3  # times asking the faster model alone, as the dense one is asked too
VALIDATION_SHARE = 0.25  # of the minutes, at most: with many images held back there are fewer epochs
TRIAL_STEPS = 8  # from which the time of a step is known
REPORT, PAGE, TRAINING = "report.json", "report.html", "training"  # in the output folder
RECIPE, SAVE_FREQ = "label-free", "1m"
# Of these flags a run that is resumed may have other values.
MAY_CHANGE = ("output", "num_workers", "device")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="accelerate", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("model", help="one of timm's names, or of ours (deit_small, ...)")
    add("--images", type=Path, required=True, help="a folder; class folders in it are used only for the report")
    add("--output", type=Path, required=True, help="a new folder for the model and the report")
    add("--weights", help="a file or folder with the dense model's weights (default: the published ones)")
    add("--input-size", type=number(int, POSITIVE), help="pixels (default: the model's own)")
    add("--speedup", type=number(float, POSITIVE), default=1.6, help="how many times fewer multiply-adds to aim for")
    add("--pruning-loc", type=number(int, NOT_NEGATIVE), nargs="+", help="by hand: blocks before which tokens merge")
    add("--base-rate", type=number(float, KEEP_RATE), help="by hand: share of its tokens that each stage keeps")
    add("--keep-rates", type=number(float, KEEP_RATE), nargs="+", help="by hand: shares of all tokens, by stage")
    add("--minutes", type=number(float, NOT_NEGATIVE), default=5.0, help="approximately, of fine-tuning; 0 for none")
    add(
        "--steps", type=number(int, NOT_NEGATIVE), help="of fine-tuning instead, rounded up to tens: exactly repeatable"
    )
    add("--batch-size", type=number(int, POSITIVE), default=16)
    add("--num-workers", type=number(int, NOT_NEGATIVE), default=min(4, os.cpu_count() or 1))
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=number(int, SEED), default=0)
    return parser


def main(args: argparse.Namespace) -> None:
    if utils.launched_by_torchrun():
        raise UserError("tools.accelerate runs in one process; for several see docs/label_free.md")
    stop = StopSignal()
    device = utils.pick_device(args.device)
    utils.set_seed(args.seed)
    content = read_checkpoint(args.weights) if args.weights else None
    spec = describe(args.model, content, args.input_size)
    spec = choose_stages(spec, args.speedup, args.pruning_loc, args.base_rate, args.keep_rates)
    training, held_back = split(args.images, spec)
    weights = dense_weights(spec, content)
    settings = {name: plain(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    fast = build_model(spec)
    for note in load_weights(fast, weights):
        log(note)
    fast.to(device)
    teacher = build_teacher(fast.spec, weights).to(device)
    notes = claim(args.output, settings)  # now that nothing in the command is wrong
    gflops = dense_and_dynamic_gflops(fast)
    log_model(fast, gflops)
    log(f"{args.images}: {len(training)} images to train on, {len(held_back)} held back to measure on")

    loader = measuring_loader(held_back, fast.spec, args.batch_size, args.num_workers, device)
    comparison = Comparison(fast.spec, loader.dataset, gflops)
    log(comparison.add(DENSE, ask(teacher.vit, loader, device, stop)))
    started = time.monotonic()
    log(comparison.add(MERGED, ask(fast, loader, device, stop)))
    seconds = time.monotonic() - started

    stopped = None
    if len(training) > 0 and (args.minutes if args.steps is None else args.steps) > 0:
        recipe = build_recipe(RECIPE, batch_size=args.batch_size, seed=args.seed, distill=True, model_ema=False)
        tuning = FineTuning(recipe, args.num_workers, fast, teacher, training, loader)
        if "schedule" not in notes:
            notes["schedule"] = tuning.schedule(args.steps, args.minutes, seconds)
            write_json(args.output / REPORT, notes)
        run = tuning.run(args.output / TRAINING, *notes["schedule"], gflops, stop, settings)
        try:
            run.to_the_end()
        except Stopped as error:
            stopped = error
        comparison.history = run.progress.history
        list_bad_images(run.progress.bad_images)
        # By its end the learning rate has come down to 0. That tells more than a few images, among which an earlier
        # epoch may look better by chance.
        epoch = BEST if stopped else LAST
        keep_better(fast, weights, args.output / TRAINING / epoch, comparison, loader)
    finish(args.output, fast, teacher.vit, comparison, notes, stopped)


def describe(name: str, content: dict[str, Any] | None, input_size: int | None) -> ModelSpec:
    """The dense model of this name, as described in the weights file if it has a description."""
    described = spec_of(content) if content else None
    spec = described if described is not None and described.arch == name else ModelSpec(name)
    num_classes = num_classes_of(find_weights(content)) if content else spec.num_classes
    return replace(
        spec,
        dense=True,
        num_classes=num_classes,
        img_size=input_size or spec.img_size,
        pruning_loc=None,
        keep_rates=None,
    )


def dense_weights(spec: ModelSpec, content: dict[str, Any] | None) -> StateDict:
    """From the file, or the published ones. Raises CheckpointError if they cannot be had."""
    if content is None:
        with advice("or give --weights FILE"):
            return published_weights(spec.arch)
    weights = find_weights(content)
    backbone = backbone_part(weights)
    if len(backbone) < len(weights):
        log("the predictors in --weights are left out: tokens are ranked without them")
    return backbone


def choose_stages(
    dense: ModelSpec,
    speedup: float,
    pruning_loc: Sequence[int] | None,
    base_rate: float | None,
    keep_rates: Sequence[float] | None,
) -> ModelSpec:
    """Where tokens merge and how many stay: as given by hand, else for a speed-up in multiply-adds.

    Stages are spread evenly over the blocks from a quarter of the depth on (before that class attention
    says little), and each keeps the same share of its tokens. Raises UserError for a speed-up that
    would leave too few tokens.
    """
    with torch.device("meta"):
        model = build_model(dense)
    dense, depth = model.spec, len(getattr(model, "blocks", ()))
    if depth < 2:
        raise UserError(f"{dense.arch} has no transformer blocks to merge tokens between; give a vision transformer")
    first = max(1, depth // 4)
    count = min(MAX_STAGES, depth - first)
    spread = tuple(first + stage * (depth - first) // count for stage in range(count))
    spec = replace(dense, dense=False, scorer="distinct", reducer="merge", pruning_loc=tuple(pruning_loc or spread))
    if keep_rates is not None:
        return replace(spec, keep_rates=tuple(keep_rates))
    if base_rate is not None:
        return replace(spec, keep_rates=geometric_keep_rates(base_rate, len(spec.pruning_loc)))
    return replace(spec, keep_rates=keep_rates_for(spec, speedup))


def keep_rates_for(spec: ModelSpec, speedup: float) -> tuple[float, ...]:
    """The constant rate, down to FEWEST_TOKENS, that makes the model so many times cheaper than its dense backbone."""
    lowest = geometric_keep_rates(LOWEST_RATE, len(spec.pruning_loc), FEWEST_TOKENS)
    with torch.device("meta"):
        gflops = dense_and_dynamic_gflops(build_model(replace(spec, keep_rates=lowest)))
    largest = math.floor(100 * gflops["dense"] / gflops["dynamic"]) / 100
    if not 1 < speedup <= largest:
        raise UserError(
            f"--speedup must be above 1 and at most {largest:.3g} for {spec.arch}, got {speedup:g}; "
            "beyond that too few tokens are left (by hand: --pruning-loc and --base-rate)"
        )
    return solve_keep_rates(spec, gflops["dense"] / speedup, FEWEST_TOKENS)


def split(folder: Path, spec: ModelSpec) -> tuple[ImageFiles, ImageFiles]:
    """The images to train on and those held back, told apart by their names, so that it is the same next time.

    Labels are kept if the class folders are the model's classes. Files that are no images are
    left out. Too few images to train with are all held back. Raises UserError if there is no image.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of images: {folder}")
    parts = [part for part in PARTS if (folder / part).is_dir()]
    if len(parts) > 1:
        names = " and ".join(f"{part}/" for part in parts)
        raise UserError(f"{folder} holds {names}, which would all be trained on; give one: --images {folder}/train")
    found = read_folder(folder, spec.num_classes or None, labelled=False)
    labelled = classes_fit(spec, found.classes)
    chosen: dict[bool, list[tuple[str, int]]] = {False: [], True: []}
    unreadable = []
    for path, label in sorted(found.samples(), key=lambda sample: name_hash(sample[0], folder)):
        held_back = name_hash(path, folder) % HELD_BACK_IN == 0
        if len(chosen[held_back]) < (MAX_HELD_BACK if held_back else MAX_TRAINING):
            if is_readable(path, whole=held_back):
                chosen[held_back].append((path, label if labelled else IGNORED_LABEL))
            else:
                unreadable.append(path)
    if unreadable:
        log(f"warning: {len(unreadable)} file(s) cannot be read as images and are left out, as {unreadable[0]}")
    usable = len(chosen[False]) + len(chosen[True])
    if usable == 0:
        raise UserError(f"no image that can be read in {folder}")
    if usable < MIN_IMAGES or not chosen[True]:
        log(
            f"warning: only {usable} usable images: the report's figures are rough, and the model is not fine-tuned, "
            f"which takes at least {MIN_IMAGES}"
        )
        chosen = {False: [], True: chosen[False] + chosen[True]}
    classes = found.classes if labelled else ()
    return ImageFiles(chosen[False], classes, folder), ImageFiles(chosen[True], classes, folder)


def name_hash(path: str, folder: Path) -> int:
    """The same wherever the folder lies."""
    return int(hashlib.sha256(os.fsencode(os.path.relpath(path, folder))).hexdigest(), 16)


def is_readable(path: str, whole: bool) -> bool:
    """Whether it is an image; unless whole, by its header alone, as decoding thousands takes minutes."""
    try:
        if whole:
            open_image(path)
        else:
            Image.open(path).close()
        return True
    except (ImageError, *UNREADABLE):
        return False


def claim(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Creates the output folder, or resumes what the same command began there; returns its report so far."""
    report = output / REPORT
    if report.is_file():
        earlier = read_json(report)
        changed = [name for name in settings if earlier.get("settings", {}).get(name) != settings[name]]
        if changed:
            flags = ", ".join(f"{name.replace('_', '-')} {earlier.get('settings', {}).get(name)}" for name in changed)
            raise UserError(f"{output} holds the output of another command ({flags}); choose another --output")
        return earlier
    try:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{output} holds other files; choose a new folder for --output")
        output.mkdir(parents=True, exist_ok=True)
        write_json(report, {"settings": settings})
    except OSError as error:
        raise UserError(f"cannot write to --output {output} ({error.strerror})") from error
    return {"settings": settings}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged; choose another --output") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically."""
    temporary_path(path).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary_path(path), path)


def plain(value: Any) -> Any:
    """For JSON."""
    return str(value.resolve()) if isinstance(value, Path) else value


def measuring_loader(
    images: ImageFiles, spec: ModelSpec, batch_size: int, num_workers: int, device: torch.device
) -> DataLoader:
    data_set = AugmentedDataset(images, eval_transform(spec.img_size, spec.preprocessing), train=False, skip_bad=True)
    return build_val_loader(data_set, 2 * batch_size, num_workers, device.type == "cuda")


@torch.inference_mode()
def ask(model: nn.Module, loader: DataLoader, device: torch.device, stop: StopSignal | None = None) -> Answers:
    """A model's outputs for all images, in float32. Raises Stopped at a signal, if stop is given."""
    transform = BatchTransform(device, model.spec.preprocessing.mean, model.spec.preprocessing.std)
    outputs, labels = [], []
    model.eval()
    for images, batch_labels in loader:
        if stop is not None and stop.received:
            raise Stopped(f"{stop.name} received: nothing is lost; run the same command again")
        outputs.append(model(transform(images)).float().cpu())
        labels.append(batch_labels)
    return Answers(torch.cat(outputs), torch.cat(labels))


class FineTuning:
    """Label-free fine-tuning by the engine that main_dynamic_vit.py trains with."""

    def __init__(
        self,
        recipe: Recipe,
        num_workers: int,
        model: nn.Module,
        teacher: Teacher,
        training: ImageFiles,
        val_loader: DataLoader,
    ) -> None:
        self.recipe, self.num_workers, self.val_loader = recipe, num_workers, val_loader
        self.model, self.teacher = model, teacher
        self.device = next(model.parameters()).device
        self.augmentation = build_augmentation(RECIPE)
        self.training = training

    def loader(self, steps: int) -> DataLoader:
        """Training images for this many steps, each image as often as it takes."""
        repeats = math.ceil(steps * self.recipe.batch_size / len(self.training))
        images = ImageFiles([*self.training.samples()] * repeats, self.training.classes, self.training.root)
        transform = train_transform(self.model.spec.img_size, self.augmentation)
        data_set = AugmentedDataset(images, transform, train=True, skip_bad=True)
        pinned = self.device.type == "cuda"
        loader, _ = build_train_loader(data_set, self.recipe.batch_size, self.num_workers, pinned, self.recipe.seed)
        return loader

    def trainer(self, recipe: Recipe, model: nn.Module, steps: int) -> Trainer:
        print_freq = max(1, steps // 2)
        return build_trainer(recipe, model, self.teacher, self.device, self.augmentation, steps, print_freq)

    def schedule(self, steps: int | None, minutes: float, seconds: float) -> tuple[int, int]:
        """Epochs and steps in each: this many steps, or (None) as many as the minutes allow on this machine.

        seconds: what it takes to measure the model on the images held back, which every epoch ends with.
        """
        epochs = self.recipe.epochs
        if steps is None:
            validation = VALIDATION_COST * seconds
            epochs = max(1, min(epochs, int(60 * minutes * VALIDATION_SHARE / validation)))
            seconds_a_step = self.seconds_a_step()
            steps = max(epochs, int((60 * minutes - epochs * validation) / seconds_a_step))
            log(f"{seconds_a_step:.2f} s a step: {steps} steps in {minutes:g} minutes")
        epochs = min(epochs, steps)
        return epochs, math.ceil(steps / epochs)

    def seconds_a_step(self) -> float:
        """Median over a few steps of a copy."""
        trainer = self.trainer(self.recipe, copy.deepcopy(self.model), TRIAL_STEPS)
        trainer.model.train()
        ends = []
        for images, labels in islice(self.loader(TRIAL_STEPS), TRIAL_STEPS):
            before_step = copy_statistics(trainer.model)
            accumulate_gradients(trainer, images, labels, last=True)["loss"].item()  # waits for a GPU
            update_weights(trainer, before_step)
            ends.append(time.monotonic())
        return statistics.median([after - before for before, after in pairwise(ends)])

    def run(
        self,
        folder: Path,
        epochs: int,
        steps: int,
        gflops: dict[str, float],
        stop: StopSignal,
        settings: dict[str, Any],
    ) -> Run:
        """The training run in the folder, or what is left of it if it was begun before."""
        place = Place(str(folder), "auto", evaluating=False)
        earlier = read_run(place, lambda content: [])  # claim has compared the settings
        recipe = replace(self.recipe, epochs=epochs)
        run_options = RunOptions(
            place=place,
            epochs=epochs,
            steps_per_epoch=steps,
            step_images=recipe.step_images,
            save_freq=SAVE_FREQ,
            dist_eval=False,
            compare_with_dense=True,
            settings=settings,
        )
        trainer = self.trainer(recipe, self.model, steps)
        if (dtype := pick_amp(recipe.amp, self.device)) is not None:
            log(f"epochs are measured in {precision_name(dtype)}, all else in float32")
        state = RunState.from_content(earlier) if earlier else None
        return Run(run_options, trainer, self.teacher, self.loader(steps), self.val_loader, gflops, stop, state)


def keep_better(fast: nn.Module, weights: StateDict, tuned: Path, comparison: Comparison, loader: DataLoader) -> None:
    """Leaves in the model the weights that fine-tuning came to, or those that it began with if these do better."""
    if tuned.is_file():
        load_weights(fast, find_weights(read_checkpoint(tuned)))
        log(comparison.add(TUNED, ask(fast, loader, next(fast.parameters()).device)))
        if comparison.better_of(MERGED, TUNED) == TUNED:
            return
        log("fine-tuning did not help on the images held back: the model is left as it was")
    load_weights(fast, weights)


def finish(
    output: Path,
    fast: nn.Module,
    dense: nn.Module,
    comparison: Comparison,
    notes: dict[str, Any],
    stopped: Stopped | None,
) -> None:
    """Writes the model and the report. Raises Stopped again if a signal has ended the training."""
    kept = comparison.better_of(MERGED, TUNED)
    unnamed = fast.spec.class_names is None and fast.spec.num_classes != IMAGENET_CLASSES
    save_pretrained(fast, output, (unnamed and comparison.images.source.classes) or None)
    if stopped is None:  # who wants it to end does not want to wait for this
        comparison.measure_speed(dense, fast)
    write_json(output / REPORT, notes | report_content(comparison, kept))
    (output / PAGE).write_text(report_page(comparison, fast, kept, str(output)), encoding="utf-8")
    if stopped is not None:
        raise Stopped(f"{stopped}; {output} holds the best so far")
    log(f"saved in {output}: the {kept} model, {PAGE}")


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
