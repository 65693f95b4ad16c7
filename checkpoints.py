"""A run's checkpoints: which one to go on from, what is in it, and writing it so that nothing is lost."""

import argparse
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from engine import RunningMeans, Trainer, unwrap
from models import CheckpointError, find_weights, load_weights, read_checkpoint
from utils import UserError, get_world_size, is_main_process, log

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
# Arguments about where and how a run is executed: it may be resumed with other values of these.
MAY_CHANGE = {
    *("resume", "eval", "dist_eval", "output_dir", "data_path", "num_classes"),
    *("device", "num_workers", "print_freq", "save_freq"),
}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The file to go on from, by --resume.

    An earlier run in --output-dir is gone on with or left alone, never overwritten: UserError.
    """
    last = Path(args.output_dir) / LAST if args.output_dir else None
    held = last is not None and last.is_file()
    if args.resume not in ("auto", "none"):
        path = Path(args.resume)
        if held and not args.eval and path.resolve().parent != last.resolve().parent:
            raise UserError(f"{args.output_dir} holds another run; choose another --output-dir for this one")
        return path
    if not held or (args.eval and args.resume == "none"):
        return None
    if args.resume == "none":
        raise UserError(f"{args.output_dir} holds an earlier run; choose another --output-dir, or --resume auto")
    return last


def read_run(args: argparse.Namespace) -> dict | None:
    """The content of the checkpoint to go on from, in every process.

    Only rank 0 reads it: other machines may not share its file system.
    """
    found = [None]
    if is_main_process():
        try:
            path = find_checkpoint(args)
            if path is not None:
                found = [read_checkpoint(path)]
                if args.resume == "auto" and not args.eval:
                    check_same_run(args, found[0], path)
                log(f"checkpoint: {path}")
        except (UserError, CheckpointError) as error:
            found = [error]  # for all processes to end on, and not for a lost peer
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def check_same_run(args: argparse.Namespace, content: dict, path: Path) -> None:
    earlier = content.get("args", {})
    changed = [k for k, v in vars(args).items() if k not in MAY_CHANGE and k in earlier and earlier[k] != v]
    if changed:
        changes = ", ".join(f"--{k.replace('_', '-')} {earlier[k]} -> {getattr(args, k)}" for k in changed)
        raise UserError(
            f"{args.output_dir} holds a run of other arguments ({changes}); "
            f"choose another --output-dir, or go on from it with --resume {path}"
        )


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
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
    except ValueError as error:
        raise UserError("the run to resume trained another kind of model; start from it with --pretrained") from error
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
    """Writes checkpoints in the background; training waits for the copy only. Used by rank 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def save(self, content: dict, names: tuple[str, ...] = (LAST,)) -> None:
        self.wait()
        self.pending = self.thread.submit(self._write, copy_to_cpu(content), names)

    def _write(self, content: dict, names: tuple[str, ...]) -> None:
        for name in names:
            write_checkpoint(content, self.folder / name)

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises what went wrong with it."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the checkpoint before it is untouched") from error
