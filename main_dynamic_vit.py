"""Trains and evaluates DynamicViT models, and the dense backbones that they start from."""

if __name__ == "__main__":
    from dynamicvit.signals import end_on_interrupt

    end_on_interrupt()

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from dynamicvit.datasets import (
    AugmentedDataset,
    BatchTransform,
    build_source,
    build_train_loader,
    build_val_loader,
    eval_transform,
    train_transform,
)
from dynamicvit.engine import evaluate
from dynamicvit.errors import exit_status
from dynamicvit.models import (
    ModelSpec,
    Teacher,
    build_model,
    build_teacher,
    find_weights,
    load_weights,
    read_checkpoint,
)
from dynamicvit.models.costs import dense_and_dynamic_gflops
from dynamicvit.models.factory import image_size
from dynamicvit.models.pretrained import StateDict, backbone_part, num_classes_of, read_dense_weights
from dynamicvit.recipe import build_trainer, pick_amp, precision_name
from dynamicvit.runs.checkpoints import RunState, read_run, spec_of
from dynamicvit.runs.run import Run, list_bad_images, log_model, print_summary, report_accuracy
from dynamicvit.signals import StopSignal
from dynamicvit.utils import log
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dynamicvit import options, utils


def main(args: Namespace) -> None:
    stop = None if args.eval else StopSignal()
    device = utils.pick_device(args.device)
    utils.init_distributed(device)
    utils.set_seed(args.seed)

    # The model is as its checkpoint says, but for what the flags say.
    earlier = read_run(options.place(args), partial(options.changes, args))
    content = earlier or (read_checkpoint(args.pretrained) if args.pretrained else {})
    base = spec_of(content)
    spec = options.model_spec(args, base, resumed=earlier is not None)
    args = options.with_recipe(args, spec)
    weights = read_weights(args, spec, content, resumed=earlier is not None)

    kept = find_weights(earlier) if earlier else weights if args.eval or not args.dense else None
    trained = None if kept is None else num_classes_of(kept)  # None: a new classifier is to be trained
    data = options.data_options(args, trained)
    read = partial(build_source, options=data, size=image_size(spec), labelled=args.cls_weight > 0 and not args.eval)
    sources = {"validation": read(False)} if args.eval else {"training": read(True), "validation": read(False)}
    num_classes = options.count_classes(args, spec, len(sources["validation"].classes), trained)
    class_names = options.choose_class_names(args, spec, sources["validation"].classes, num_classes)
    model = build_model(replace(spec, num_classes=num_classes, class_names=class_names), args.drop_path)
    spec = model.spec  # with nothing left open
    if weights is not None and earlier is None:
        start = backbone_part(weights) if spec.dense else weights
        for note in load_weights(model, start, new_head=spec.dense and not args.eval):
            log(note)
    teaches = weights is not None and not spec.dense and (args.distill or args.eval)
    teacher = build_teacher(spec, weights).to(device) if teaches else None
    model.to(device)
    gflops = dense_and_dynamic_gflops(model)
    log_model(model, gflops)
    counts = " and ".join(f"{len(source)} {name}" for name, source in sources.items())
    log(f"{args.data_set} {args.data_path}: {counts} images, {spec.num_classes} classes")
    precision = precision_name(pick_amp(args.amp, device))
    log(f"{utils.get_world_size()} process(es) on {device.type}, {args.batch_size} images each, {precision}")
    if args.eval:
        evaluate_only(args, model, teacher, sources["validation"], device, earlier)
    else:
        train(args, model, teacher, sources, gflops, device, stop, earlier)


def read_weights(args: Namespace, spec: ModelSpec, content: dict[str, Any], resumed: bool) -> StateDict | None:
    """The dense model's; None where nobody needs them. content: of what is resumed, else --pretrained."""
    from_scratch = spec.dense and not args.pretrained and not args.eval
    if from_scratch or (resumed and not (args.pretrained if args.eval else args.distill)):
        return None
    return find_weights(content) if content and not resumed else read_dense_weights(spec, args.pretrained)


def evaluate_only(
    args: Namespace,
    model: nn.Module,
    teacher: Teacher | None,
    source: Dataset,
    device: torch.device,
    checkpoint: dict[str, Any] | None,
) -> None:
    """The checkpoint's weights and their moving average; or dense weights, then beside the dense model."""
    loader = build_validation(args, model.spec, source, device)
    transform = BatchTransform(device, model.spec.preprocessing.mean, model.spec.preprocessing.std)
    entries = {"evaluated": find_weights(checkpoint) if checkpoint else None}
    if checkpoint and checkpoint.get("model_ema"):
        entries["moving average"] = find_weights(checkpoint["model_ema"])
    for name, weights in entries.items():
        for note in load_weights(model, weights) if weights is not None else ():
            log(f"warning: {note}")
        dense = teacher.vit if teacher is not None else None
        stats = evaluate(model, loader, transform, device, pick_amp(args.amp, device), args.dist_eval, dense)
        report_accuracy(name, stats)
    list_bad_images(loader.dataset.bad_images())


def train(
    args: Namespace,
    model: nn.Module,
    teacher: Teacher | None,
    sources: dict[str, Dataset],
    gflops: dict[str, float],
    device: torch.device,
    stop: StopSignal,
    earlier: dict[str, Any] | None,
) -> None:
    recipe, augmentation = options.recipe(args), options.augmentation(args)
    transform = train_transform(model.spec.img_size, augmentation, args.data_set)
    train_set = AugmentedDataset(sources["training"], transform, train=True, skip_bad=args.skip_bad_images)
    repeats = 3 if args.repeated_aug else 1
    loader, steps = build_train_loader(
        train_set, args.batch_size, args.num_workers, device.type == "cuda", args.seed, repeats, args.update_freq
    )
    val_loader = build_validation(args, model.spec, sources["validation"], device)
    trainer = build_trainer(recipe, model, teacher, device, augmentation, steps, args.print_freq)
    state = RunState.from_content(earlier) if earlier else None
    run = Run(options.run_options(args, recipe, steps), trainer, teacher, loader, val_loader, gflops, stop, state)
    best = run.to_the_end()
    print_summary(model.spec, gflops, run.progress.dense, best)
    list_bad_images(run.progress.bad_images)


def build_validation(args: Namespace, spec: ModelSpec, source: Dataset, device: torch.device) -> DataLoader:
    transform = eval_transform(spec.img_size, spec.preprocessing, args.data_set)
    val_set = AugmentedDataset(source, transform, train=False, skip_bad=args.skip_bad_images)
    return build_val_loader(val_set, 2 * args.batch_size, args.num_workers, device.type == "cuda", args.dist_eval)


def command(argv: list[str] | None = None) -> None:
    main(options.parse_args(argv))
    if dist.is_initialized():  # not after an error: it would wait for processes that know nothing of it
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(command))
