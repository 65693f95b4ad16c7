"""Trains and evaluates DynamicViT models, and the dense backbones that they start from."""

if __name__ == "__main__":
    from dynamicvit.signals import end_on_interrupt

    end_on_interrupt()

import sys
from collections.abc import Sequence

import torch
from dynamicvit.datasets import (
    AugmentedDataset,
    BatchTransform,
    build_train_loader,
    build_val_loader,
    eval_transform,
    train_transform,
)
from dynamicvit.engine import evaluate
from dynamicvit.errors import advice, exit_status
from dynamicvit.models import ModelSpec, Teacher, build_model, build_teacher, load_weights
from dynamicvit.models.costs import dense_and_dynamic_gflops
from dynamicvit.models.pretrained import backbone_part
from dynamicvit.optim import build_trainer, is_always_frozen, pick_amp, precision_name
from dynamicvit.runs.checkpoints import RunState
from dynamicvit.runs.run import Run, RunOptions, list_bad_images, log_model, print_summary, report_accuracy
from dynamicvit.runs.start import Flags, RunFlags, Start, find_start, parse_args
from dynamicvit.signals import StopSignal
from dynamicvit.utils import log
from torch import nn
from torch.utils.data import DataLoader

from dynamicvit import utils


def main(flags: Flags) -> None:
    stop = StopSignal() if not flags.run.eval else None
    device = utils.pick_device(flags.run.device)
    utils.init_distributed(device)
    start = find_start(flags)
    utils.set_seed(start.recipe.seed)

    model = build_model(start.spec, start.recipe.drop_path)
    if start.weights is not None and start.earlier is None:
        weights = backbone_part(start.weights) if start.spec.dense else start.weights
        with advice("see --arch, --input-size, --num-classes, --pruning-loc and --dense"):
            for note in load_weights(model, weights, new_head=start.spec.dense and not start.evaluating):
                log(note)
    teacher = build_teacher(model.spec, start.weights).to(device) if start.teaches else None
    gflops = dense_and_dynamic_gflops(model.to(device))
    log_model(model, gflops)
    amp_dtype = pick_amp(start.recipe.amp, device)
    log(f"{start.data.data_set} {start.data.data_path}: {start.counts()} images, {model.spec.num_classes} classes")
    processes = f"{utils.get_world_size()} process(es) on {device.type}"
    log(f"{processes}, {start.recipe.batch_size} images each, {precision_name(amp_dtype)}")

    if start.evaluating:
        evaluate_only(start, model, teacher, device, amp_dtype)
    else:
        train(start, flags.run, model, teacher, gflops, device, stop)


def evaluate_only(
    start: Start, model: nn.Module, teacher: Teacher | None, device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """Evaluates a checkpoint's weights and their moving average; or dense weights, compared with the dense model."""
    loader = build_validation(start, model.spec, device)
    transform = BatchTransform(device, model.spec.preprocessing.mean, model.spec.preprocessing.std)
    dense, earlier = teacher.vit if teacher is not None else None, start.earlier
    entries = {"evaluated": False} | ({"moving average": True} if earlier and earlier.get("model_ema") else {})
    for name, averaged in entries.items():
        with advice("see --arch, --input-size, --pruning-loc and --dense"):
            for note in load_weights(model, earlier, moving_average=averaged) if earlier else ():
                log(f"warning: {note}")
        report_accuracy(name, evaluate(model, loader, transform, device, amp_dtype, start.data.dist_eval, dense))
    list_bad_images(loader.dataset.bad_images())


def train(
    start: Start,
    flags: RunFlags,
    model: nn.Module,
    teacher: Teacher | None,
    gflops: dict[str, float],
    device: torch.device,
    stop: StopSignal,
) -> None:
    recipe, data = start.recipe, start.data
    val_loader = build_validation(start, model.spec, device)
    transform = train_transform(model.spec.img_size, start.augmentation, data.data_set)
    train_set = AugmentedDataset(start.sources["training"], transform, train=True, skip_bad=data.skip_bad_images)
    loader, steps = build_train_loader(
        train_set,
        recipe.batch_size,
        data.num_workers,
        device.type == "cuda",
        recipe.seed,
        num_repeats=3 if recipe.repeated_aug else 1,
        update_freq=recipe.update_freq,
    )
    trainer = build_trainer(recipe, model, teacher, device, start.augmentation, steps, flags.print_freq)
    if is_always_frozen(trainer.schedule, recipe.epochs, steps):
        log("note: the backbone is frozen until the end of the run, so only what is new in the model learns")
    options = RunOptions(
        place=flags.place,
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        step_images=recipe.step_images,
        save_freq=flags.save_freq,
        dist_eval=data.dist_eval,
        compare_with_dense=recipe.cls_weight == 0,
        settings=start.settings,
    )
    state = RunState.from_content(start.earlier) if start.earlier else None
    run = Run(options, trainer, teacher, loader, val_loader, gflops, stop, state)
    best = run.to_the_end()
    print_summary(model.spec, gflops, run.progress.dense, best)
    list_bad_images(run.progress.bad_images)


def build_validation(start: Start, spec: ModelSpec, device: torch.device) -> DataLoader:
    data = start.data
    transform = eval_transform(spec.img_size, spec.preprocessing, data.data_set)
    val_set = AugmentedDataset(start.sources["validation"], transform, train=False, skip_bad=data.skip_bad_images)
    pin_memory = device.type == "cuda"
    return build_val_loader(val_set, 2 * start.recipe.batch_size, data.num_workers, pin_memory, data.dist_eval)


def command(argv: Sequence[str] | None = None) -> None:
    main(parse_args(argv))
    utils.end_distributed()  # not after an error


if __name__ == "__main__":
    sys.exit(exit_status(command))
