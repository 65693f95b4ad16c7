"""Trains and evaluates DynamicViT models, and the dense backbones that they start from."""

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import options
import utils
from checkpoints import RunState, read_run, spec_of
from datasets import (
    AugmentedDataset,
    BatchTransform,
    build_source,
    build_train_loader,
    build_val_loader,
    eval_transform,
    train_transform,
)
from engine import evaluate
from errors import UserError, exit_status
from flops import count_gflops
from models import ModelSpec, Teacher, build_model, find_weights, load_weights, read_checkpoint
from models.pretrained import StateDict, num_classes_of, read_dense_weights
from recipe import build_trainer, pick_amp
from run import Run, list_bad_images, print_summary, report_accuracy
from signals import StopSignal
from utils import log


def main(args: Namespace) -> None:
    stop = None if args.eval else StopSignal()
    device = utils.pick_device(args.device)
    utils.init_distributed(device)
    utils.set_seed(args.seed)

    # The model is as its checkpoint says, but for what the flags say.
    earlier = read_run(options.place(args), partial(options.changes, args))
    base = spec_of(earlier or (read_checkpoint(args.pretrained) if args.pretrained else {}))
    spec = options.model_spec(args, base, resumed=earlier is not None)
    args = options.with_recipe(args, spec)
    weights = read_weights(args, spec, resumed=earlier is not None)

    source, train_source = build_sources(args, spec, base)
    num_classes = count_classes(args, len(source.classes), base if earlier else None, weights)
    model = build_model(replace(spec, num_classes=num_classes), args.drop_path)
    spec = model.spec  # with nothing left open
    if weights is not None and earlier is None:
        for note in load_weights(model, weights, new_head=spec.dense and not args.eval):
            log(note)
    teacher = build_teacher(spec, weights).to(device) if weights is not None and not spec.dense else None
    model.to(device)
    gflops = count_costs(model)
    val_set = AugmentedDataset(
        source, eval_transform(spec.img_size, spec.preprocessing, args.data_set), False, args.skip_bad_images
    )
    log_setup(args, model, gflops, train_source, source, device)
    if args.eval:
        evaluate_only(args, model, teacher, val_set, device, earlier)
    else:
        train_set = AugmentedDataset(
            train_source,
            train_transform(spec.img_size, options.augmentation(args), args.data_set),
            True,
            args.skip_bad_images,
        )
        train(args, model, teacher, train_set, val_set, gflops, device, stop, earlier)


def read_weights(args: Namespace, spec: ModelSpec, resumed: bool) -> StateDict | None:
    """The dense model's, for a student that starts from them or a teacher; None where neither needs them."""
    from_scratch = spec.dense and not args.pretrained and not args.eval
    needs_teacher = args.distill and not args.eval
    if from_scratch or (resumed and not needs_teacher):
        return None
    return read_dense_weights(spec, args.pretrained)


def build_sources(args: Namespace, spec: ModelSpec, base: ModelSpec | None) -> tuple[Dataset, Dataset | None]:
    """Images and labels to validate on, and those to train on."""
    data = options.data_options(args, base.num_classes if base is not None and not args.dense else None)
    labelled = args.cls_weight > 0 and not args.eval
    size = spec.img_size or 224
    val, train = build_source(False, data, size, labelled), None
    if not args.eval:
        train = build_source(True, data, size, labelled)
    for name, source in (("validation", val), ("training", train)):
        if source is not None and len(source) == 0:
            raise UserError(f"no images found for {name} in {args.data_path}")
    return val, train


def count_classes(args: Namespace, known: int, trained: ModelSpec | None, weights: StateDict | None) -> int:
    """Of the model. known: classes of the data, 0 without labels. trained: the checkpoint's model."""
    in_weights = None
    if weights is not None and (args.eval or not args.dense):
        in_weights = num_classes_of(weights) or 0
    fixed = trained.num_classes if trained is not None else in_weights
    wanted = args.num_classes or known or fixed
    if wanted is None:
        raise UserError("the images have no class folders: a dense model needs labels, or --num-classes")
    if wanted < known:
        raise UserError(f"--num-classes {wanted} is less than the {known} classes of the data set")
    if fixed == 0:
        return 0  # no classifier: embeddings, which need no labels
    if fixed is not None and fixed != wanted:
        raise UserError(
            f"{args.pretrained or 'the checkpoint'} knows {fixed} classes, the data set has {wanted}: "
            "train a dense model on it first (--dense --pretrained FILE) and start from that"
        )
    return wanted


def build_teacher(spec: ModelSpec, weights: StateDict) -> Teacher:
    dense = build_model(spec.as_dense())
    load_weights(dense, weights)
    return Teacher(dense)


def count_costs(model: nn.Module) -> dict[str, float]:
    """GFLOPs by "dense" and "dynamic"."""
    with torch.device("meta"):
        dense = build_model(model.spec.as_dense())
    gflops = {"dense": count_gflops(dense, model.spec.img_size)}
    return gflops if model.spec.dense else gflops | {"dynamic": count_gflops(model, model.spec.img_size)}


def log_setup(
    args: Namespace,
    model: nn.Module,
    gflops: dict[str, float],
    train: Dataset | None,
    val: Dataset,
    device: torch.device,
) -> None:
    spec = model.spec
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    kind = "dense" if spec.dense else "dynamic"
    log(f"{spec.arch} {kind}: {millions:.2f} M parameters, {gflops[kind]:.4g} GFLOPs")
    if not spec.dense:
        places = f"{spec.scorer} + {spec.reducer} before blocks {list(spec.pruning_loc)}"
        log(
            f"{gflops['dynamic'] / gflops['dense']:.1%} of the dense model's {gflops['dense']:.4g} GFLOPs: {places} "
            f"keep {model.tokens_kept(patches)} of {patches} tokens"
        )
    counts = f"{len(train)} training and {len(val)}" if train is not None else str(len(val))
    log(f"{args.data_set} {args.data_path}: {counts} validation images, {spec.num_classes} classes")
    amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[pick_amp(args.amp, device)]
    log(f"{utils.get_world_size()} process(es) on {device.type}, {args.batch_size} images each, amp {amp}")


def evaluate_only(
    args: Namespace,
    model: nn.Module,
    teacher: Teacher | None,
    val_set: AugmentedDataset,
    device: torch.device,
    checkpoint: dict[str, Any] | None,
) -> None:
    """Of the checkpoint's weights and their moving average, or of dense weights: then beside the dense model."""
    pinned = device.type == "cuda"
    loader = build_val_loader(val_set, 2 * args.batch_size, args.num_workers, pinned, sharded=args.dist_eval)
    preprocessing = model.spec.preprocessing
    transform = BatchTransform(device, preprocessing.mean, preprocessing.std)
    entries = {"evaluated": find_weights(checkpoint) if checkpoint else None}
    if checkpoint and checkpoint.get("model_ema"):
        entries["moving average"] = find_weights({"model": checkpoint["model_ema"]})
    for name, weights in entries.items():
        for note in load_weights(model, weights) if weights is not None else ():
            log(f"warning: {note}")
        dense = teacher.vit if teacher is not None else None
        stats = evaluate(model, loader, transform, device, pick_amp(args.amp, device), args.dist_eval, dense)
        report_accuracy(name, stats)
    list_bad_images(val_set.bad_images())


def train(
    args: Namespace,
    model: nn.Module,
    teacher: Teacher | None,
    train_set: AugmentedDataset,
    val_set: AugmentedDataset,
    gflops: dict[str, float],
    device: torch.device,
    stop: StopSignal,
    earlier: dict[str, Any] | None,
) -> None:
    recipe, augmentation = options.recipe(args), options.augmentation(args)
    pinned = device.type == "cuda"
    loader, steps = build_train_loader(
        train_set, args.batch_size, args.num_workers, pinned, args.seed, 3 if args.repeated_aug else 1, args.update_freq
    )
    val_loader = build_val_loader(val_set, 2 * args.batch_size, args.num_workers, pinned, sharded=args.dist_eval)
    trainer = build_trainer(
        recipe, model, teacher if args.distill else None, device, augmentation, steps, args.print_freq
    )
    state = RunState.from_content(earlier) if earlier else None
    run = Run(options.run_options(args, recipe, steps), trainer, teacher, loader, val_loader, gflops, stop, state)
    best = run.to_the_end()
    print_summary(model.spec.arch, "dense" if model.spec.dense else "dynamic", gflops, run.progress.dense, best)
    list_bad_images(run.progress.bad_images)


def command(argv: list[str] | None = None) -> None:
    main(options.parse_args(argv))
    if dist.is_initialized():  # not after an error: it would wait for processes that know nothing of it
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(command))
