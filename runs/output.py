"""What a run leaves in --output-dir: checkpoints, log.txt and TensorBoard events."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dynamicvit.datasets import AugmentedDataset
from dynamicvit.errors import UserError
from dynamicvit.models import pictures
from dynamicvit.runs.checkpoints import CheckpointWriter, Progress, RunState
from dynamicvit.runs.whole import write_whole
from dynamicvit.utils import is_main_process, warn
from torch import nn
from torch.utils.tensorboard import SummaryWriter

NUM_PICTURES, NUM_HISTOGRAM_IMAGES = 4, 32  # validation images, the same ones every epoch


class Output:
    """Written by rank 0 only; not written without an --output-dir."""

    def __init__(self, output_dir: str, progress: Progress, val_set: AugmentedDataset) -> None:
        self.folder = Path(output_dir)
        self.active = bool(output_dir) and is_main_process()
        if not self.active:
            return
        try:
            self.checkpoints = CheckpointWriter(self.folder)
            self.events: SummaryWriter | None = SummaryWriter(output_dir, purge_step=progress.epoch)
            self.write_log(progress.history)
        except OSError as error:
            raise UserError(f"cannot write to --output-dir {output_dir} ({error.strerror})") from error
        # spread over the set, as its first images are often of one class
        spread = range(0, len(val_set), -(-len(val_set) // NUM_HISTOGRAM_IMAGES))
        self.sample = torch.stack([val_set[i][0] for i in spread])

    def save(self, state: RunState, names: tuple[str, ...]) -> None:
        if self.active:
            self.checkpoints.save(state, names)

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """A line of JSON per epoch; whole at any moment, and written anew each time, so that a run killed in
        between leaves no line twice."""
        write_whole(self.folder / "log.txt", "".join(json.dumps(record) + "\n" for record in history))

    def write_epoch(self, history: list[dict[str, Any]], pace: float, model: nn.Module) -> None:
        """log.txt, and the same in TensorBoard with pictures and the pace, which differs from run to run."""
        self.warn_if_disk_full(self._write_epoch, history, pace, model)

    def write_summary(self, settings: dict[str, Any], gflops: dict[str, float], best: dict[str, float]) -> None:
        """For TensorBoard's HParams tab: the command's flags with the best epoch's accuracy and the cost."""
        self.warn_if_disk_full(self._write_summary, settings, gflops, best)

    def warn_if_disk_full(self, write: Callable, *arguments: object) -> None:
        """Writes; a disk that is full costs an epoch's events, not the run."""
        if not self.active:
            return
        try:
            if self.events is None:
                self.events = SummaryWriter(self.folder)
            write(*arguments)
        except OSError as error:
            warn(f"cannot write to {self.folder} ({error.strerror})")
            self.events = None  # a writer that has failed stays broken

    def _write_epoch(self, history: list[dict[str, Any]], pace: float, model: nn.Module) -> None:
        self.write_log(history)
        record = {**history[-1], "train/images_per_second": pace}
        epoch = record.pop("epoch")
        for name, value in record.items():
            self.events.add_scalar(name, value, epoch)
        if not model.spec.dense:
            self._try_pictures(model, epoch)
        self.events.flush()

    def _try_pictures(self, model: nn.Module, epoch: int) -> None:
        """Pictures that fail cost a warning, never the run; warn_if_disk_full handles a full disk."""
        try:
            self._write_pictures(model, epoch)
        except OSError:
            raise
        except Exception as error:  # a user's own scorer may give anything
            reason = (str(error).splitlines() or [""])[0]
            warn(f"no pictures of epoch {epoch} ({type(error).__name__}: {reason})")

    def _write_pictures(self, model: nn.Module, epoch: int) -> None:
        trace = pictures.prune(model, self.sample)
        shown = self.sample[:NUM_PICTURES]
        strips = pictures.sheet_of_strips(shown, trace, pictures.has_fast_path(model))
        heat_maps = pictures.sheet_of_heat_maps(shown, trace)
        lines = [f"epoch {epoch}", *pictures.stage_lines(model, trace)]
        self.events.add_image("kept patches", pictures.caption(strips, [*lines, pictures.legend(model)]), epoch)
        self.events.add_image("keep scores", pictures.caption(heat_maps, [*lines, pictures.HEAT_LEGEND]), epoch)
        if not model.scorer.probability:
            return
        # as training draws them, the mean probability to be kept; 0 for a token dropped at an earlier stage,
        # and a merged token counts as the patches in it
        expected_share = trace.scores.nan_to_num(0.0).mean(dim=2)
        for stage, shares in enumerate(expected_share.unbind(dim=1)):
            self.events.add_histogram(f"kept share per image/stage {stage}", shares, epoch)

    def _write_summary(self, settings: dict[str, Any], gflops: dict[str, float], best: dict[str, float]) -> None:
        hparams = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in settings.items()
        }
        metrics = {f"best/{name}": value for name, value in best.items() if name.startswith("val")}
        metrics |= {f"gflops/{name}": value for name, value in gflops.items()}
        self.events.add_hparams(hparams, metrics, run_name=".")

    def close(self) -> None:
        """Raises UserError if the last checkpoint could not be written."""
        if self.active:
            if self.events is not None:
                self.warn_if_disk_full(self.events.close)
            self.checkpoints.wait()
