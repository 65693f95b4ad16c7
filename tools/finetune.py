"""Label-free fine-tuning: the faster model learns its own dense answers, by the engine that trains everything else."""

import copy
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from dynamicvit.datasets import AugmentedDataset, build_train_loader, train_transform
from dynamicvit.engine import accumulate_gradients, copy_statistics, update_weights
from dynamicvit.errors import UserError
from dynamicvit.models import Teacher, load_weights
from dynamicvit.models.pretrained import BEST
from dynamicvit.optim import Trainer, build_trainer, pick_amp, precision_name
from dynamicvit.recipe import Recipe, build_augmentation
from dynamicvit.runs.checkpoints import Place, RunState, read_run
from dynamicvit.runs.run import Run, RunOptions, list_bad_images
from dynamicvit.signals import Stopped, StopSignal
from dynamicvit.tools.splits import RECIPE, Source
from dynamicvit.utils import log
from torch import nn
from torch.utils.data import DataLoader

MINUTES = 5.0  # of fine-tuning, by default
SAVE_FREQ = "1m"
VALIDATION_SHARE = 0.25  # of the minutes, at most: with many images held back there are fewer epochs
VALIDATION_COST = 3  # times that of measuring the faster model alone, as the dense one is measured too
TRIAL_STEPS, FEWEST_TRIAL_STEPS, TRIAL_SECONDS = 32, 6, 8.0  # from which the time of a step is known
CHECKPOINT_COPIES = 3  # the last, the best and one that is being written
CHECKPOINT_SIZE = 3  # times the weights: with the two moments of each

Schedule = tuple[int, int]  # epochs, and steps in each


@dataclass(frozen=True)
class Budget:
    """How long to fine-tune: in minutes, or (exactly repeatable) in steps. UserError for both."""

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError("minutes and steps exclude each other: give one of them")

    def or_usual(self) -> "Budget":
        return Budget(MINUTES) if self.minutes is None and self.steps is None else self

    @property
    def is_none(self) -> bool:
        return (self.minutes if self.steps is None else self.steps) == 0


class Outcome(NamedTuple):
    """The result of fine-tuning."""

    is_tuned: bool  # whether the model now has fine-tuned weights
    history: list[dict[str, float]]  # by epoch
    stopped: Stopped | None  # by the signal that ended it


class NoSignal:
    """For a library: signals are the caller's."""

    name, received = "", False


class FineTuning:
    """A training run of the faster model, from the images that are not held back."""

    def __init__(
        self,
        recipe: Recipe,
        num_workers: int,
        model: nn.Module,
        teacher: Teacher,
        training: Source,
        val_loader: DataLoader,
        features: bool = False,
    ) -> None:
        """features: the model learns the teacher's features instead of its answers."""
        self.features = features
        self.recipe, self.num_workers, self.val_loader = recipe, num_workers, val_loader
        self.model, self.teacher, self.training = model, teacher, training
        self.device = next(model.parameters()).device
        self.augmentation = build_augmentation(RECIPE)

    def loader(self, steps: int) -> DataLoader:
        """Training images for this many steps, each image as often as it takes."""
        images = self.training.repeated(math.ceil(steps * self.recipe.batch_size / len(self.training)))
        size = self.model.spec.img_size
        transform = nn.Identity() if images.are_tensors else train_transform(size, self.augmentation)
        data_set = AugmentedDataset(images, transform, train=True, skip_bad=True)
        pinned = self.device.type == "cuda"
        loader, _ = build_train_loader(data_set, self.recipe.batch_size, self.num_workers, pinned, self.recipe.seed)
        return loader

    def trainer(self, recipe: Recipe, model: nn.Module, steps: int) -> Trainer:
        every = max(1, steps // 2)
        return build_trainer(
            recipe, model, self.teacher, self.device, self.augmentation, steps, every, features=self.features
        )

    def schedule(self, budget: Budget, seconds: float) -> Schedule:
        """The budget's steps, or as many as its minutes allow on this machine.

        seconds: what it takes to measure the model on the images held back, which every epoch ends with.
        """
        epochs, steps = self.recipe.epochs, budget.steps
        if steps is None:
            validation = VALIDATION_COST * seconds
            total = 60 * budget.minutes
            epochs = max(1, min(epochs, int(total * VALIDATION_SHARE / validation)))
            seconds_a_step = self.seconds_a_step()
            steps = max(epochs, int((total - epochs * validation) / seconds_a_step))
            log(f"{seconds_a_step:.2g} s a step: {steps} steps in {budget.minutes:g} minutes")
        epochs = min(epochs, steps)
        return epochs, math.ceil(steps / epochs)

    def seconds_a_step(self) -> float:
        """Median over a few steps of a copy, from the half in which the loader has its first batches ready: it shares
        the cores with training, and begins by filling a queue."""
        log(f"timing training steps of {self.recipe.batch_size} images")
        trainer = self.trainer(self.recipe, copy.deepcopy(self.model), TRIAL_STEPS)
        trainer.model.train()
        ends = []
        for images, labels in islice(self.loader(TRIAL_STEPS), TRIAL_STEPS):
            before_step = copy_statistics(trainer.model)
            accumulate_gradients(trainer, images, labels, last=True)["loss"].item()  # waits for a GPU
            update_weights(trainer, before_step)
            ends.append(time.monotonic())
            if len(ends) >= FEWEST_TRIAL_STEPS and ends[-1] - ends[0] > TRIAL_SECONDS:
                break
        seconds = [after - before for before, after in pairwise(ends)]
        return statistics.median(seconds[len(seconds) // 2 :])

    def train(
        self, folder: Path | None, schedule: Schedule, gflops: dict[str, float], stop: StopSignal | NoSignal
    ) -> Outcome:
        """Trains in the folder, or resumes what was begun there; None: nothing is saved on the way.

        At the end the model has the last epoch's weights: the learning rate has come down to 0, which is a better
        reason than a few images, on which an earlier epoch may look better by chance. After a signal it has the best
        epoch's. Any other failure is logged, and costs no more than the training.
        """
        run = self.run(folder if folder and checkpoints_fit(folder, self.model) else None, schedule, gflops, stop)
        stopped = None
        try:
            run.to_the_end()
        except Stopped as error:
            stopped = error
        except UserError as error:  # it diverged, or the last checkpoint could not be written
            log(f"warning: {error}")
            stopped = Stopped(f"{stop.name} received") if stop.received else None
        list_bad_images(run.progress.bad_images)
        finished = run.progress.epoch == schedule[0]
        best = folder / BEST if folder else None
        if not finished and best is not None and best.is_file():
            load_weights(self.model, best)
            finished = True
        return Outcome(finished, run.progress.history, stopped)

    def run(
        self, folder: Path | None, schedule: Schedule, gflops: dict[str, float], stop: StopSignal | NoSignal
    ) -> Run:
        epochs, steps = schedule
        place = Place(str(folder or ""), "auto", evaluating=False)
        earlier = read_run(place, lambda content: []) if folder else None  # the caller has compared the settings
        recipe = replace(self.recipe, epochs=epochs)
        options = RunOptions(
            place=place,
            epochs=epochs,
            steps_per_epoch=steps,
            step_images=recipe.step_images,
            save_freq=SAVE_FREQ,
            dist_eval=False,
            compare_with_dense=True,
            settings={},
        )
        trainer = self.trainer(recipe, self.model, steps)
        log(f"{epochs} epochs of {steps} steps in {precision_name(pick_amp(recipe.amp, self.device))}")
        state = RunState.from_content(earlier) if earlier else None
        return Run(options, trainer, self.teacher, self.loader(steps), self.val_loader, gflops, stop, state)


def checkpoints_fit(folder: Path, model: nn.Module) -> bool:
    """Whether there is room for checkpoints beside the model itself; logs it if there is not."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    needed = weights * (1 + CHECKPOINT_COPIES * CHECKPOINT_SIZE)
    free = shutil.disk_usage(folder.parent).free + sum(p.stat().st_size for p in folder.glob("*") if p.is_file())
    if free >= needed:
        return True
    log(
        f"warning: the disk has {free / 1e6:.0f} MB left, the model and checkpoints take up to {needed / 1e6:.0f}: "
        "none are saved on the way, so that this run cannot be resumed"
    )
    return False
