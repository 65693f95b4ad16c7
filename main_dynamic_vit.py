"""Trains and evaluates DynamicViT models, and the dense backbones that they start from."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from checkpoints import BEST, LAST, read_run, restore, run_state
from datasets import DATA_SETS, AugmentedDataset, BatchTransform, build_dataset, fingerprint
from engine import Diverged, RunningMeans, Trainer, evaluate, train_one_epoch
from flops import count_gflops
from losses import DiffPruningLoss, DistillDiffPruningLoss, LabelLoss
from models import (
    ARCHS,
    Teacher,
    combine_heads,
    create_model,
    find_weights,
    load_weights,
    read_checkpoint,
)
from optim import dense_rates, dynamic_rates, param_groups
from output import Output
from samplers import TrainSampler
from utils import UserError, log

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none or tell it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DefaultsHelp)
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction

    add("--arch", default="deit_small", help=f"one of {', '.join(ARCHS)}")
    add("--dense", action="store_true", help="the plain backbone, without pruning: a teacher for your own data")
    add("--base-rate", type=float, default=0.7, help="stage s keeps base_rate^s of the original tokens")
    add("--keep-rates", type=float, nargs="+", help="instead, the share of the original tokens kept after each stage")
    add("--pruning-loc", type=int, nargs="+", help="blocks before which tokens are dropped (default: the arch's)")
    add("--input-size", type=int, default=224, help="pixels")
    add("--patch-size", type=int, default=16, help="pixels")
    for name, kind in (("embed-dim", int), ("depth", int), ("num-heads", int), ("mlp-ratio", float)):
        add(f"--{name}", type=kind, help="(default: the arch's)")
    add("--pretrained", help="dense weights to start from (default: the arch's file in pretrained/)")

    add(
        "--data-set",
        default="IMNET",
        choices=DATA_SETS,
        help="IMNET is any folder of train/<class> and val/<class>, CIFAR is CIFAR-100",
    )
    add("--data-path", default="", help="the data set's folder")
    add("--num-classes", type=int, help="of the model (default: the data set's; 1000 for folders of WordNet ids)")
    add(
        "--num-workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="loader processes for each training process",
    )
    add(
        "--skip-bad-images",
        action="store_true",
        help="go on without images that cannot be read, and list them at the end",
    )
    add("--dist-eval", action="store_true", help="share the validation images out among the processes")

    add("--output-dir", default="", help="where checkpoints, log.txt and TensorBoard events go (default: nowhere)")
    add("--resume", default="auto", help="a checkpoint; 'auto': the run in --output-dir, if it is this one; 'none'")
    add("--eval", action="store_true", help="evaluate only")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=int, default=0)
    add("--print-freq", type=int, default=50, help="steps between progress lines")
    add("--save-freq", default="0", help="steps (500) or minutes (15m) between checkpoints; 0: ends of epochs only")

    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64, help="images for each process and forward pass")
    add("--update-freq", type=int, default=1, help="forward passes to an optimizer step")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile student and teacher in training")
    add("--lr", type=float, default=5e-4, help="for 512 images a step; scales with them")
    add("--min-lr", type=float, default=1e-5)
    add("--backbone-lr-scale", type=float, default=0.01, help="the backbone's largest share of the learning rate")
    add("--warmup-epochs", type=float, default=5, help="epochs with the backbone frozen (dense: of linear warm-up)")
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, help="largest gradient norm")
    add("--model-ema", action=flag, default=True, help="also keep and evaluate the weights' moving average")
    add("--model-ema-decay", type=float, default=0.99996)

    add("--distill", action="store_true", help="learn from the dense backbone")
    add("--ratio-weight", type=float, default=2.0, help="of the keep rates' loss")
    add("--distill-weight", type=float, default=0.5, help="of each of the two distillation losses")
    add("--smoothing", type=float, default=0.1, help="label smoothing")

    add("--color-jitter", type=float, default=0.4, help="where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy, or none")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    add("--repeated-aug", action=flag, default=True, help="each image three times an epoch, in a third of the images")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased pixels become")
    add("--mixup", type=float, default=0.8, help="alpha; 0 is off")
    add("--cutmix", type=float, default=1.0, help="alpha; 0 is off")
    add("--mixup-prob", type=float, default=1.0, help="of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, help="of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    return parser.parse_args(dashed(sys.argv[1:] if argv is None else argv))


def dashed(argv: list[str]) -> list[str]:
    """Lets every flag be written with _ as well as with -."""
    dashed_argv = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed_argv.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return dashed_argv


def main(args: argparse.Namespace) -> None:
    device = utils.pick_device(args.device)
    check_args(args)
    utils.init_distributed(device)
    utils.set_seed(args.seed)
    earlier = read_run(args)

    val_set = build_dataset(train=False, args=args)
    train_set = None if args.eval else build_dataset(train=True, args=args)
    known = len(val_set.source.classes)
    if args.num_classes is None:
        args.num_classes = known
    if args.num_classes < known:
        raise UserError(f"--num-classes {args.num_classes} is less than the {known} classes of the data set")
    model, teacher = build_models(args, load_student=earlier is None)
    model.to(device)
    val_loader = build_val_loader(val_set, args)
    dense = model if args.dense else build_model(args, dense=True)
    gflops = {"dense": count_gflops(dense, args.input_size)}
    if not args.dense:
        gflops["dynamic"] = count_gflops(model, args.input_size)
    describe(args, dense, model, gflops, train_set, val_set, device)

    if args.eval:
        evaluate_only(args, model, val_loader, device, earlier)
        list_bad_images(val_set.bad_images())
        return
    run = Run(args, model, teacher, gflops, train_set, val_loader, device, earlier)
    del earlier  # all of a run, in memory
    best = run.to_the_end()
    print_summary(args, gflops, run.progress["dense"], best)
    list_bad_images(run.progress["bad_images"])


def evaluate_only(
    args: argparse.Namespace, model: nn.Module, val_loader: DataLoader, device: torch.device, checkpoint: dict | None
) -> None:
    if checkpoint:
        for note in load_weights(model, find_weights(checkpoint)):
            log(f"warning: {note}")
    report_accuracy("evaluated", run_evaluation(args, model, val_loader, device))
    if checkpoint and checkpoint.get("model_ema"):
        load_weights(model, find_weights({"model": checkpoint["model_ema"]}))
        report_accuracy("moving average", run_evaluation(args, model, val_loader, device))


def check_args(args: argparse.Namespace) -> None:
    """What would otherwise surface late, or as somebody else's traceback."""
    for name in ("input_size", "patch_size", "epochs", "batch_size", "update_freq", "print_freq", "lr", "min_lr"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("seed", "num_workers", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} cannot be negative, got {getattr(args, name)}")
    if args.clip_grad is not None and args.clip_grad <= 0:
        raise UserError(f"--clip-grad must be positive, got {args.clip_grad}")
    utils.SaveClock(args.save_freq)
    if not 0 <= args.smoothing < 1:
        raise UserError(f"--smoothing must lie in [0, 1), got {args.smoothing}")
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2 and not args.eval:
        raise UserError(
            f"mixup pairs images: --batch-size must be even, got {args.batch_size} (or --mixup 0 --cutmix 0)"
        )
    if args.dense and args.distill:
        raise UserError("--distill teaches a dynamic model; leave it out with --dense")


def build_models(args: argparse.Namespace, load_student: bool) -> tuple[nn.Module, Teacher | None]:
    """The model to train or evaluate and, to distil from, its dense backbone; both with dense weights."""
    model = build_model(args, dense=args.dense)
    from_scratch = args.dense and not args.pretrained and not args.eval
    needs_teacher = args.distill and not args.eval
    if from_scratch or not (load_student or needs_teacher):
        return model, None
    weights = read_pretrained(args)
    for note in load_weights(model, weights, new_head=args.dense and not args.eval):
        log(note)
    if not needs_teacher:
        return model, None
    dense = build_model(args, dense=True)
    load_weights(dense, weights)
    return model, Teacher(dense)


def build_model(args: argparse.Namespace, dense: bool) -> nn.Module:
    overrides = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "pruning_loc", "keep_rates")
    try:
        return create_model(
            args.arch,
            args.base_rate,
            args.num_classes,
            args.input_size,
            dense=dense,
            **{name: getattr(args, name) for name in overrides},
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def read_pretrained(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Dense weights from --pretrained or pretrained/, checked to know as many classes as the data set."""
    path = args.pretrained
    if not path:
        name = ARCHS[args.arch].weights
        if name is None:
            raise UserError(
                f"no weights are published for {args.arch}: train it with --dense, then give --pretrained FILE"
            )
        path = Path(__file__).parent / "pretrained" / name
        if not path.is_file():
            raise UserError(
                f"no dense weights {path}; get them: sh download_pretrain.sh {args.arch} (or --pretrained FILE)"
            )
    weights = find_weights(read_checkpoint(path))
    classes = len(weights["head.bias"]) if "head.bias" in weights else args.num_classes
    if classes != args.num_classes and (args.eval or not args.dense):
        raise UserError(
            f"{path} knows {classes} classes, the data set has {args.num_classes}: "
            "train a dense model on it first (--dense --pretrained FILE) and start from that"
        )
    return weights


def build_val_loader(val_set: AugmentedDataset, args: argparse.Namespace) -> DataLoader:
    rank, world_size = (utils.get_rank(), utils.get_world_size()) if args.dist_eval else (0, 1)
    shard = range(rank, len(val_set), world_size)  # shards differ in length by at most one; no image is in two
    return DataLoader(val_set, 2 * args.batch_size, sampler=shard, **loader_options(args))


def loader_options(args: argparse.Namespace) -> dict:
    return {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": utils.ignore_stop_signals,
        "pin_memory": utils.pick_device(args.device).type == "cuda",
    }


def describe(
    args: argparse.Namespace,
    dense: nn.Module,
    model: nn.Module,
    gflops: dict[str, float],
    train_set: AugmentedDataset | None,
    val_set: AugmentedDataset,
    device: torch.device,
) -> None:
    log(f"{args.arch} dense: {megas(dense):.2f} M parameters, {gflops['dense']:.4g} GFLOPs")
    if not args.dense:
        patches = model.patch_embed.num_patches
        log(
            f"{args.arch} dynamic: {megas(model):.2f} M parameters, {gflops['dynamic']:.4g} GFLOPs "
            f"({gflops['dynamic'] / gflops['dense']:.1%} of dense); before blocks {list(model.pruning_loc)} "
            f"{model.tokens_kept(patches)} of {patches} tokens are kept"
        )
    training = f"{len(train_set)} training and " if train_set else ""
    counts = f"{training}{len(val_set)} validation images"
    log(f"{args.data_set} {args.data_path}: {counts}, {args.num_classes} classes")
    amp = next(name for name, dtype in AMP_DTYPES.items() if dtype == pick_amp(args, device))
    log(f"{utils.get_world_size()} process(es) on {device.type}, {args.batch_size} images each, amp {amp}")


def megas(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def pick_amp(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """'auto': bfloat16 where the hardware has it, float16 on older GPUs, float32 on older CPUs."""
    if args.amp != "auto":
        return AMP_DTYPES[args.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def run_evaluation(
    args: argparse.Namespace, model: nn.Module, batches: Iterable, device: torch.device
) -> dict[str, float]:
    if dist.is_initialized():
        for buffer in model.buffers():  # LV-ViT's BatchNorm statistics differ from process to process
            dist.broadcast(buffer, src=0)
    return evaluate(model, batches, BatchTransform(device), device, pick_amp(args, device), args.dist_eval)


def report_accuracy(what: str, stats: dict[str, float]) -> None:
    log(
        f"{what}: top-1 {stats['top1']:.2f} %, top-5 {stats['top5']:.2f} %, loss {stats['loss']:.4f} "
        f"on {stats['images']} images"
    )


class Run:
    """A training run: the epoch loop, and what it leaves in --output-dir."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        teacher: Teacher | None,
        gflops: dict[str, float],
        train_set: AugmentedDataset,
        val_loader: DataLoader,
        device: torch.device,
        earlier: dict | None,
    ) -> None:
        """earlier: the content of a checkpoint to go on from."""
        self.args, self.model, self.gflops, self.device = args, model, gflops, device
        self.save_clock = utils.SaveClock(args.save_freq)
        self.train_loader, self.steps_per_epoch = build_train_loader(train_set, args)
        self.val_loader = val_loader
        self.step_images = args.batch_size * args.update_freq * utils.get_world_size()
        self.trainer = build_trainer(args, model, teacher, device)
        self.sums = RunningMeans(device)
        self.progress = {"epoch": 0, "images": 0, "history": [], "dense": None, "bad_images": [], "data": {}}
        if earlier:
            self.sums = restore(self.trainer, earlier)
            self.progress |= {key: earlier[key] for key in self.progress if key in earlier}
            finished = self.progress["epoch"] >= args.epochs
            log(f"resumed at epoch {self.progress['epoch']}, step {self.first_step}{', its end' if finished else ''}")
        self.note_data(training=train_set, validation=val_loader.dataset)
        self.output = Output(args, self.progress, val_loader.dataset)
        if teacher is not None and self.progress["dense"] is None:
            self.progress["dense"] = run_evaluation(args, teacher.vit, val_loader, device)
            report_accuracy("dense teacher", self.progress["dense"])
        self.saved = bool(earlier and args.output_dir)
        self.stop = utils.StopSignal()

    @property
    def first_step(self) -> int:
        """Of the epoch, where an earlier run has begun it."""
        return min(self.progress["images"] // self.step_images, self.steps_per_epoch)

    def note_data(self, **data_sets: AugmentedDataset) -> None:
        """Says what has changed since the checkpoint."""
        if utils.is_main_process():
            now = {name: fingerprint(data_set.source) for name, data_set in data_sets.items()}
            for name, before in self.progress["data"].items():
                if before != now[name]:
                    log(f"warning: the {name} data has changed since the checkpoint ({before} -> {now[name]})")
            self.progress["data"] = now

    def to_the_end(self) -> dict[str, float]:
        """Trains, and returns the best epoch's record. Raises Stopped at a signal, with all saved."""
        epochs_left = self.args.epochs - self.progress["epoch"]
        eta = utils.Eta(epochs_left * self.steps_per_epoch - self.first_step)
        try:
            while self.progress["epoch"] < self.args.epochs:
                record, pace = self.train_epoch(eta)
                record |= self.validate()
                self.finish_epoch(record, pace)
            best = max(self.progress["history"], key=lambda record: record["val/top1"])
            self.output.write_summary(self.args, self.gflops, best)
            return best
        except Diverged as error:
            last = Path(self.args.output_dir) / LAST
            advice = f"go on from {last} or {BEST} (--resume, another --output-dir)" if self.saved else "start again"
            raise UserError(f"{error}; {advice} with --clip-grad 1, a lower --lr or another --seed") from error
        finally:
            self.output.close()

    def train_epoch(self, eta: utils.Eta) -> tuple[dict[str, float], float]:
        """Returns what log.txt says of the epoch's training, and the pace in images/s."""
        epoch, steps = self.progress["epoch"], range(self.first_step, self.steps_per_epoch)
        self.train_loader.sampler.set_epoch(epoch, start=steps.start * self.args.batch_size * self.args.update_freq)
        stats, pace = train_one_epoch(self.trainer, self.train_loader, epoch, steps, eta, self.sums, self.after_step)
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizer.param_groups}
        return {"epoch": epoch} | rates | {f"train/{name}": value for name, value in stats.items()}, pace

    def after_step(self, done: int) -> None:
        self.progress["images"] = done * self.step_images
        wishes = torch.tensor([self.stop.received, self.save_clock.is_due(done), done == self.steps_per_epoch])
        stopping, *saving = utils.max_over_processes(wishes.byte()).tolist()
        if stopping or any(saving):
            self.save()
        if stopping:
            self.raise_stopped(f"saved at epoch {self.progress['epoch']}, step {done}")

    def raise_stopped(self, where: str) -> None:
        if self.args.output_dir:
            outcome = f"{where}; the same command goes on from there"
        else:
            outcome = "without --output-dir nothing is saved"
        raise Stopped(f"{self.stop.name or 'a signal'} received: {outcome}")

    def validate(self) -> dict[str, float]:
        """Returns what log.txt says of it, for the weights and for their moving average."""
        record = {}
        for name, weights in (("val", self.model), ("val_ema", self.trainer.ema and self.trainer.ema.module)):
            if weights is not None:
                stats = run_evaluation(self.args, weights, self.until_stopped(self.val_loader), self.device)
                report_accuracy(f"epoch {self.progress['epoch']} {name}", stats)
                record |= {f"{name}/{key}": value for key, value in stats.items()}
        return record

    def until_stopped(self, batches: DataLoader) -> Iterator:
        """The batches; ends the run at one that all processes agree on, where one of them has got a signal."""
        shortest = -utils.max_over_processes(torch.tensor(-len(batches))).item()  # shards differ by an image
        for number, batch in enumerate(batches):
            if number < shortest and utils.max_over_processes(torch.tensor(int(self.stop.received))):
                self.raise_stopped(f"saved before the validation of epoch {self.progress['epoch']}")
            yield batch

    def finish_epoch(self, record: dict[str, float], pace: float) -> None:
        is_best = record["val/top1"] > max((r["val/top1"] for r in self.progress["history"]), default=-1)
        self.progress["history"].append(record)
        self.progress |= {"epoch": self.progress["epoch"] + 1, "images": 0}
        self.sums = RunningMeans(self.device)
        self.save((BEST, LAST) if is_best else (LAST,))
        self.output.write_epoch(self.progress["history"], pace, self.model)

    def save(self, names: tuple[str, ...] = (LAST,)) -> None:
        known = set(self.progress["bad_images"])
        for data_set in (self.train_loader.dataset, self.val_loader.dataset):
            known.update(data_set.bad_images())
        self.progress["bad_images"] = sorted(known)
        self.output.save({**run_state(self.trainer, self.sums), **self.progress, "args": vars(self.args)}, names)
        self.save_clock.restart()
        self.saved = bool(self.args.output_dir)


def build_train_loader(train_set: AugmentedDataset, args: argparse.Namespace) -> tuple[DataLoader, int]:
    """Returns the loader and the number of optimizer steps in an epoch."""
    repeats = 3 if args.repeated_aug else 1
    sampler = TrainSampler(train_set, utils.get_rank(), utils.get_world_size(), args.seed, repeats)
    steps = len(sampler) // (args.batch_size * args.update_freq)
    if steps == 0:
        raise UserError(
            f"--batch-size {args.batch_size} times --update-freq {args.update_freq} is more than the "
            f"{len(sampler)} training images of a process; make it smaller"
        )
    return DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **loader_options(args)), steps


def build_trainer(args: argparse.Namespace, model: nn.Module, teacher: Teacher | None, device: torch.device) -> Trainer:
    amp_dtype = pick_amp(args, device)
    mixup = None
    if args.mixup > 0 or args.cutmix > 0:
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    groups = param_groups(model, args.weight_decay)
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    criterion = build_criterion(args, model, teacher, mixed_labels=mixup is not None).to(device)
    if args.compile:
        for module in (model, teacher):
            if module is not None:
                module.compile()
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=torch.optim.AdamW(groups, lr=args.lr, fused=True),
        scaler=build_scaler(device, amp_dtype),
        batch_transform=BatchTransform(device, args.reprob, args.remode),
        device=device,
        amp_dtype=amp_dtype,
        schedule=partial(learning_rates, args),
        mixup=mixup,
        ema=ema,
        clip_grad=args.clip_grad,
        update_freq=args.update_freq,
        seed=args.seed,
        print_freq=args.print_freq,
    )


def build_scaler(device: torch.device, amp_dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Only float16 needs its loss scaled; elsewhere the scale stays 1 and only the scaler's check
    for gradients that are not finite is used."""
    if amp_dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    never, unchanged = 2**31 - 1, 1 - 1e-12
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=never, backoff_factor=unchanged)


def build_criterion(
    args: argparse.Namespace, model: nn.Module, teacher: Teacher | None, mixed_labels: bool
) -> nn.Module:
    labels = SoftTargetCrossEntropy() if mixed_labels else LabelSmoothingCrossEntropy(args.smoothing)
    has_aux_head = hasattr(model, "aux_head")
    if args.dense:
        return LabelLoss(labels)
    if teacher is None:
        predict = combine_heads if has_aux_head else None
        return DiffPruningLoss(labels, model.keep_rates, args.ratio_weight, predict)
    return DistillDiffPruningLoss(
        teacher, labels, model.keep_rates, args.ratio_weight, args.distill_weight, mse_token=not has_aux_head
    )


def learning_rates(args: argparse.Namespace, epoch: float) -> dict[str, float]:
    lr = args.lr * args.batch_size * args.update_freq * utils.get_world_size() / 512
    if args.dense:
        return dense_rates(lr, args.min_lr, epoch, args.epochs, args.warmup_epochs)
    return dynamic_rates(lr, args.min_lr, epoch, args.epochs, args.warmup_epochs, args.backbone_lr_scale)


def print_summary(args: argparse.Namespace, gflops: dict[str, float], dense: dict | None, best: dict) -> None:
    kind = "dense" if args.dense else "dynamic"
    rows = [("dense", gflops["dense"], dense["top1"], dense["top5"])] if dense else []
    rows.append((f"{kind}, epoch {best['epoch']} (best)", gflops[kind], best["val/top1"], best["val/top5"]))
    if "val_ema/top1" in best:
        rows.append((f"{kind}, moving average", gflops[kind], best["val_ema/top1"], best["val_ema/top5"]))
    log(f"\n{args.arch:<30}{'GFLOPs':>10}{'top-1 %':>10}{'top-5 %':>10}")
    for name, *numbers in rows:
        log(f"{name:<30}{numbers[0]:>10.4g}{numbers[1]:>10.2f}{numbers[2]:>10.2f}")


def list_bad_images(paths: list[str]) -> None:
    if paths:
        log("\n".join([f"\nskipped {len(paths)} image(s) that cannot be read:", *paths]))


class Stopped(Exception):
    """A signal has ended the run, and all of it is saved."""


def command(argv: list[str] | None = None) -> None:
    try:
        main(parse_args(argv))
    except Stopped as stopped:
        utils.ignore_stop_signals()
        log(str(stopped))
    if dist.is_initialized():  # not after an error: it would wait for processes that know nothing of it
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(utils.exit_status(command))
