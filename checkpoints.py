"""A run's checkpoints: which one to go on from, what is in it, and writing it so that nothing is lost."""

import argparse
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from engine import RunningMeans, Trainer, unwrap
from models import CheckpointError, find_weights, load_weights, read_checkpoint
from utils import UserError, gather, get_rank, get_world_size, is_main_process, log, temporary_path

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
# Arguments about where and how a run is executed: it may be resumed with other values of these.
# num_classes is among them as the data tells it only later; weights that do not fit are refused anyway.
MAY_CHANGE = {
    *("resume", "eval", "dist_eval", "output_dir", "data_path", "num_classes"),
    *("device", "num_workers", "print_freq", "save_freq", "skip_bad_images"),
}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The file to go on from, by --resume, as this machine's file system has it.

    An earlier run in --output-dir is gone on with or left alone, never overwritten: UserError.
    """
    last = Path(args.output_dir) / LAST if args.output_dir else None
    held = last is not None and last.is_file()
    if args.resume == "auto":
        return last if held else None
    if args.resume == "none":
        if held and not args.eval:
            raise UserError(f"{args.output_dir} holds an earlier run; choose another --output-dir, or --resume auto")
        return None
    path = Path(args.resume)
    if path.is_dir():
        path /= LAST
    if args.eval or not held:
        return path
    if not changed_arguments(args, read_checkpoint(last), may_change=MAY_CHANGE - {"resume"}):
        return last  # this very command was begun before
    if path.resolve().parent != last.resolve().parent:
        raise UserError(f"{args.output_dir} holds another run; choose another --output-dir for this one")
    return path


def read_run(args: argparse.Namespace) -> dict | None:
    """The content of the checkpoint to go on from, in every process.

    Machines need not share a file system, and after a restart rank 0 may be on another one than
    before: the newest file that any of them holds is read, by one process for all.
    """
    _, unwritable = attempt(make_writable, args)
    path, error = attempt(find_checkpoint, args)
    ages, errors = zip(*gather((modification_time(path), unwritable or error)), strict=True)
    raise_first(errors)  # all processes, so that none waits for a lost peer
    if max(ages) < 0:
        return None
    reader = ages.index(max(ages))
    shared = list(attempt(read_and_check, args, path)) if get_rank() == reader else [None, None]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=reader)
    content, error = shared
    raise_first([error])
    return content


def attempt(action: Callable, *arguments: object) -> tuple[object, Exception | None]:
    """The action's result, or the error that it ended in."""
    try:
        return action(*arguments), None
    except (UserError, CheckpointError, OSError) as error:
        return None, error


def check_sums(path: Path) -> None:
    """torch.load compares no checksums. For our own files only, as other programs may leave them out."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except Exception:  # what a damaged directory leads to
        damaged = True
    if damaged:
        raise CheckpointError(f"{path} is damaged")


def raise_first(errors: Iterable[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def modification_time(path: Path | None) -> float:
    """In seconds; 0 for a file that is not there, -1 for None."""
    if path is None:
        return -1
    return path.stat().st_mtime if path.is_file() else 0


def read_and_check(args: argparse.Namespace, path: Path) -> dict:
    best = path.with_name(BEST)
    try:
        content = read_checkpoint(path)
        if not {"history", "optimizer"}.isdisjoint(content):
            check_sums(path)
    except CheckpointError as error:
        if path.name == LAST and best.is_file():
            raise CheckpointError(f"{error}; to go on from the best epoch: cp {best} {path}") from error
        raise
    if args.resume == "auto" and not args.eval:
        check_same_run(args, content, path)
    print(f"checkpoint: {path}", flush=True)
    return content


def make_writable(args: argparse.Namespace) -> None:
    """Makes the --output-dir of a training run. UserError if nothing can be written there."""
    if not args.output_dir or args.eval or not is_main_process():
        return
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output-dir {folder} ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to --output-dir {folder}")


def check_same_run(args: argparse.Namespace, content: dict, path: Path) -> None:
    changes = changed_arguments(args, content, MAY_CHANGE)
    if changes:
        raise UserError(
            f"{args.output_dir} holds a run of other arguments ({', '.join(changes)}); "
            f"choose another --output-dir, or go on from it with --resume {path}"
        )


def changed_arguments(args: argparse.Namespace, content: dict, may_change: set[str]) -> list[str]:
    """What differs from the arguments that a checkpoint was written with."""
    earlier = content.get("args", {})
    return [
        f"--{name.replace('_', '-')} {earlier[name]} -> {value}"
        for name, value in vars(args).items()
        if name not in may_change and name in earlier and earlier[name] != value
    ]


def run_state(trainer: Trainer, sums: RunningMeans) -> dict:
    """What a trainer needs to go on exactly here. A collective call: every process's sums are in it.

    Random states are not: all draws follow from the seed and the position in the run.
    """
    return {
        "model": unwrap(trainer.model).state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "sums": sums.gather(),
        "amp": str(trainer.amp_dtype),
    }


def restore(trainer: Trainer, content: dict) -> RunningMeans:
    """Puts a checkpoint's state into the trainer; returns the sums of the epoch that it stopped in."""
    if "optimizer" not in content or "history" not in content:
        raise UserError("the file to resume holds no run of this program; start from its weights with --pretrained")
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
    except ValueError as error:
        raise UserError("the run to resume trained another kind of model; start from it with --pretrained") from error
    for group, decay in zip(trainer.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # as asked for now; the rates are set anew at every step
    load_weights(unwrap(trainer.model), find_weights(content))
    if trainer.ema is not None:
        load_weights(trainer.ema.module, find_weights({"model": content["model_ema"] or content["model"]}))
    if content["amp"] == str(trainer.amp_dtype):  # another precision needs another scale
        trainer.scaler.load_state_dict(content["scaler"])
    before, now = len(content["sums"]), get_world_size()
    if before != now:
        log(f"resumed with {now} process(es) instead of {before}: the global batch and the learning rate follow")
    sums = RunningMeans(trainer.device)
    sums.load(content["sums"])
    return sums


class CheckpointWriter:
    """Writes checkpoints in the background; training waits for the copy and the write before it. Used by rank 0.

    One that cannot be written leaves the file before it as it is, and is tried again with the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None
        self.owed: dict[str, dict] = {}  # by file name: the content that has to be written yet
        for name in (LAST, BEST):  # of a run that was killed
            temporary_path(folder / name).unlink(missing_ok=True)

    def save(self, content: dict, names: tuple[str, ...]) -> None:
        if self.pending is not None:
            self.pending.result()
        self.owed |= dict.fromkeys(names, copy_to_cpu(content))
        self.pending = self.thread.submit(self._write)

    def _write(self) -> None:
        for name, content in list(self.owed.items()):
            try:
                write_checkpoint(content, self.folder / name)
                del self.owed[name]
            except UserError as error:
                print(f"warning: {error}; training goes on", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Until all is on disk; raises UserError if that cannot be."""
        if self.pending is not None:
            self.pending.result()
        for name, content in self.owed.items():
            write_checkpoint(content, self.folder / name)


def copy_to_cpu(value: object) -> object:
    """A copy that later training steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(entry) for entry in value]
    return value


def write_checkpoint(content: dict, path: Path) -> None:
    """Writes aside, flushes and renames: path is whole at any moment, even if the disk is full."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path} ({reason}); the checkpoint before it is untouched") from error
