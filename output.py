"""What a run leaves in --output-dir: checkpoints, log.txt and TensorBoard events."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.tensorboard import SummaryWriter

import utils
from checkpoints import CheckpointWriter
from datasets import AugmentedDataset
from pictures import prune, sheet_of_heat_maps, sheet_of_strips
from utils import UserError

NUM_PICTURES, NUM_HISTOGRAM_IMAGES = 4, 32  # validation images, the same ones every epoch


class Output:
    """Written by rank 0 only; by nobody where there is no --output-dir."""

    def __init__(self, args: argparse.Namespace, progress: dict, val_set: AugmentedDataset) -> None:
        self.folder = Path(args.output_dir)
        self.active = bool(args.output_dir) and utils.is_main_process()
        if not self.active:
            return
        try:
            self.checkpoints = CheckpointWriter(self.folder)
            self.events: SummaryWriter | None = SummaryWriter(args.output_dir, purge_step=progress["epoch"])
            self.write_log(progress["history"])
        except OSError as error:
            raise UserError(f"cannot write to --output-dir {args.output_dir} ({error.strerror})") from error
        # from all over the set, as its first images are often of one class
        spread = range(0, len(val_set), -(-len(val_set) // NUM_HISTOGRAM_IMAGES))
        self.sample = torch.stack([val_set[i][0] for i in spread])

    def save(self, content: dict, names: tuple[str, ...]) -> None:
        if self.active:
            self.checkpoints.save(content, names)

    def write_log(self, history: list[dict]) -> None:
        # written anew from the checkpoint's history, so that a run killed in between leaves no line twice
        utils.write_json_lines(self.folder / "log.txt", history)

    def write_epoch(self, history: list[dict], pace: float, model: VisionTransformer) -> None:
        """log.txt, and the same in TensorBoard with pictures and the pace, which differs from run to run."""
        self.tolerate(self._write_epoch, history, pace, model)

    def write_summary(self, args: argparse.Namespace, gflops: dict[str, float], best: dict) -> None:
        """For TensorBoard's HParams tab: the arguments with the best epoch's accuracy and the cost."""
        self.tolerate(self._write_summary, args, gflops, best)

    def tolerate(self, write: Callable, *arguments: object) -> None:
        """Lets it write; a disk that is full costs an epoch's events, not the run."""
        if not self.active:
            return
        try:
            if self.events is None:
                self.events = SummaryWriter(self.folder)
            write(*arguments)
        except OSError as error:
            print(f"warning: cannot write to {self.folder} ({error.strerror})", file=sys.stderr, flush=True)
            self.events = None  # a writer that has failed stays broken

    def _write_epoch(self, history: list[dict], pace: float, model: VisionTransformer) -> None:
        self.write_log(history)
        record = {**history[-1], "train/images_per_second": pace}
        epoch = record.pop("epoch")
        for name, value in record.items():
            self.events.add_scalar(name, value, epoch)
        if hasattr(model, "score_predictor"):
            self._write_pictures(model, epoch)
        self.events.flush()

    def _write_pictures(self, model: VisionTransformer, epoch: int) -> None:
        pruning, grid = prune(model, self.sample), model.patch_embed.grid_size
        shown = self.sample[:NUM_PICTURES]
        self.events.add_image("kept patches", sheet_of_strips(shown, pruning, grid), epoch)
        self.events.add_image("keep scores", sheet_of_heat_maps(shown, pruning, grid), epoch)
        # as training draws them, the mean probability to be kept; 0 for a token dropped at an earlier stage
        expected_share = pruning.scores.nan_to_num(0.0).mean(dim=2)
        for stage, shares in enumerate(expected_share.unbind(dim=1)):
            self.events.add_histogram(f"kept share per image/stage {stage}", shares, epoch)

    def _write_summary(self, args: argparse.Namespace, gflops: dict[str, float], best: dict) -> None:
        hparams = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in vars(args).items()
        }
        metrics = {f"best/{name}": value for name, value in best.items() if name.startswith("val")}
        metrics |= {f"gflops/{name}": value for name, value in gflops.items()}
        self.events.add_hparams(hparams, metrics, run_name=".")

    def close(self) -> None:
        """Raises UserError if the last checkpoint could not be written."""
        if self.active:
            if self.events is not None:
                self.tolerate(self.events.close)
            self.checkpoints.wait()
