"""A training run: the epoch loop around engine.py, and resuming, stopping, validating and saving it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dynamicvit.datasets import BatchTransform, fingerprint
from dynamicvit.engine import Diverged, NotFinite, RunningMeans, evaluate, train_one_epoch, unwrap
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec, Teacher, load_weights
from dynamicvit.models.features import FeatureExtractor
from dynamicvit.models.huggingface import PreTrainedVisionModel
from dynamicvit.models.pretrained import BEST, LAST
from dynamicvit.optim import Trainer
from dynamicvit.runs.checkpoints import Place, Progress, RunState
from dynamicvit.runs.clocks import Eta, SaveClock
from dynamicvit.runs.output import Output
from dynamicvit.runs.tables import Column, Table
from dynamicvit.signals import Stopped, StopSignal
from dynamicvit.utils import get_world_size, is_main_process, log, max_over_processes, start_max_over_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

Record = dict[str, float]  # what log.txt says about an epoch
COLUMNS = {  # of the summary
    "top1": Column("top-1 %", ".2f", 9),
    "top5": Column("top-5 %", ".2f", 9),
    "agreement": Column("agree %", ".2f", 9),
    "kl": Column("KL", ".4f", 9),
    "cosine": Column("cosine", ".4f", 9),
}


@dataclass(frozen=True)
class RunOptions:
    """A run's settings other than its recipe."""

    place: Place
    epochs: int
    steps_per_epoch: int
    step_images: int  # images that all processes together make a step from
    save_freq: str
    dist_eval: bool
    compare_with_dense: bool  # validate by agreement with the dense model, for runs without labels
    settings: dict[str, Any]  # the command's flags, kept in checkpoints and TensorBoard


class Run:
    """The epoch loop, and what it leaves in --output-dir."""

    def __init__(
        self,
        options: RunOptions,
        trainer: Trainer,
        teacher: Teacher | None,
        train_loader: DataLoader,
        val_loader: DataLoader,
        gflops: dict[str, float],
        stop: StopSignal,
        earlier: RunState | None = None,
    ) -> None:
        """gflops: by "dense" and "dynamic". earlier: the run to resume."""
        self.options, self.trainer, self.gflops, self.stop = options, trainer, gflops, stop
        self.model = unwrap(trainer.model)
        self.dense = teacher.vit if teacher is not None else None
        self.train_loader, self.val_loader = train_loader, val_loader
        self.save_clock = SaveClock(options.save_freq)
        self.progress = earlier.progress if earlier is not None else Progress()
        self.note_data(training=train_loader.dataset, validation=val_loader.dataset)
        self.sums = restore(trainer, earlier) if earlier is not None else RunningMeans(trainer.device)
        preprocessing = self.model.spec.preprocessing
        self.val_transform = BatchTransform(trainer.device, preprocessing.mean, preprocessing.std)
        if earlier is not None:
            finished = self.progress.epoch >= options.epochs
            log(f"resumed at epoch {self.progress.epoch}, step {self.first_step}{', its end' if finished else ''}")
        self.saved = bool(earlier and options.place.output_dir)
        self.output = Output(options.place.output_dir, self.progress, val_loader.dataset)
        self.agreed_to_stop: Callable[[], Tensor] = lambda: torch.zeros(2, dtype=torch.uint8)

    @property
    def first_step(self) -> int:
        """Of the epoch, where an earlier run has begun it."""
        return min(self.progress.images // self.options.step_images, self.options.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.options.epochs * self.options.steps_per_epoch

    def note_data(self, **data_sets: Any) -> None:
        """Says what has changed since the checkpoint."""
        if is_main_process():
            now = {name: fingerprint(data_set.source) for name, data_set in data_sets.items()}
            for name, before in self.progress.data.items():
                if before != now[name]:
                    log(f"warning: the {name} data has changed since the checkpoint ({before} -> {now[name]})")
            self.progress.data = now

    def to_the_end(self) -> Record:
        """Trains, and returns the best epoch's record. Raises Stopped at a signal, with all saved."""
        try:
            if self.dense is not None and self.progress.dense is None:
                # with itself, as without labels there is nothing else to compare it with
                self.progress.dense = self.evaluate(self.dense, self.dense if self.options.compare_with_dense else None)
                report_accuracy("dense teacher", self.progress.dense)
            eta = Eta(self.num_steps - self.progress.epoch * self.options.steps_per_epoch - self.first_step)
            while self.progress.epoch < self.options.epochs:
                record, pace = self.train_epoch(eta)
                record |= self.validate()
                self.finish_epoch(record, pace)
            if sum(record["train/skipped_steps"] for record in self.progress.history) >= self.num_steps:
                raise Diverged("every step of the run was skipped, as its gradients were not finite")
            best = max(self.progress.history, key=quality)
            self.output.write_summary(self.options.settings, self.gflops, best)
            return best
        except Diverged as error:
            last = Path(self.options.place.output_dir) / LAST
            advice = f"resume from {last} or {BEST} (--resume, another --output-dir)" if self.saved else "start again"
            raise UserError(f"{error}; {advice} with --clip-grad 1, a lower --lr or another --seed") from error
        finally:
            self.output.close()

    def train_epoch(self, eta: Eta) -> tuple[Record, float]:
        """Returns what log.txt says about the epoch's training, and the pace in images/s."""
        epoch, steps = self.progress.epoch, range(self.first_step, self.options.steps_per_epoch)
        step_images = self.train_loader.batch_size * self.trainer.update_freq
        self.train_loader.sampler.set_epoch(epoch, start=steps.start * step_images)
        stats, pace = train_one_epoch(self.trainer, self.train_loader, epoch, steps, eta, self.sums, self.after_step)
        if not math.isfinite(stats["loss"]):
            raise Diverged(f"no step of epoch {epoch} had a finite loss")
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizer.param_groups}
        return {"epoch": epoch} | rates | {f"train/{name}": value for name, value in stats.items()}, pace

    def after_step(self, done: int) -> None:
        """Saves and stops when asked to. Processes agree on it while the next step runs, so that none
        waits for the others."""
        self.progress.images = done * self.options.step_images
        is_last = done == self.options.steps_per_epoch
        stopping, saving = self.agreed_to_stop().tolist()
        asked = torch.tensor([self.stop.received, self.save_clock.is_due(done)], dtype=torch.uint8)
        self.agreed_to_stop = start_max_over_processes(asked)
        if is_last:
            stopping = self.agreed_to_stop()[0].item() or stopping
        if stopping or saving or is_last:
            self.save()
        if stopping:
            self.raise_stopped(f"at epoch {self.progress.epoch}, step {done}")

    def raise_stopped(self, where: str) -> None:
        if self.saved:
            outcome = f"saved {where}; the same command resumes there"
        elif self.options.place.output_dir:
            outcome = "there is nothing to save yet; the same command starts again"
        else:
            outcome = "without --output-dir nothing is saved"
        raise Stopped(f"{self.stop.name or 'a signal'} received: {outcome}")

    def validate(self) -> Record:
        """Returns what log.txt says about it, for the weights and for their moving average."""
        record = {}
        for name, weights in (("val", self.model), ("val_ema", self.trainer.ema and self.trainer.ema.module)):
            if weights is not None:
                try:
                    stats = self.evaluate(weights, self.dense if self.options.compare_with_dense else None)
                except NotFinite as error:
                    raise Diverged(error.finding) from error
                report_accuracy(f"epoch {self.progress.epoch} {name}", stats)
                record |= {f"{name}/{key}": value for key, value in stats.items()}
        return record

    def evaluate(self, model: nn.Module, dense: nn.Module | None = None) -> Record:
        if isinstance(self.trainer.model, FeatureExtractor):  # then features are what counts
            model, dense = FeatureExtractor(model), dense and FeatureExtractor(dense)
        batches, device, sharded = self.until_stopped(self.val_loader), self.trainer.device, self.options.dist_eval
        return evaluate(model, batches, self.val_transform, device, self.trainer.amp_dtype, sharded, dense)

    def until_stopped(self, batches: DataLoader) -> Iterator:
        """The batches; ends the run at one that all processes agree on, where one of them has got a signal."""
        shortest = -max_over_processes(torch.tensor(-len(batches))).item()  # shards differ by an image
        for number, batch in enumerate(batches):
            if number < shortest and max_over_processes(torch.tensor(int(self.stop.received))):
                self.raise_stopped(f"before the validation of epoch {self.progress.epoch}")
            yield batch

    def finish_epoch(self, record: Record, pace: float) -> None:
        is_best = all(quality(record) > quality(earlier) for earlier in self.progress.history)
        self.progress.history.append(record)
        self.progress.epoch, self.progress.images = self.progress.epoch + 1, 0
        self.sums = RunningMeans(self.trainer.device)
        self.save((BEST, LAST) if is_best else (LAST,))
        self.output.write_epoch(self.progress.history, pace, self.model)

    def save(self, names: tuple[str, ...] = (LAST,)) -> None:
        known = set(self.progress.bad_images)
        for data_set in (self.train_loader.dataset, self.val_loader.dataset):
            known.update(data_set.bad_images())
        self.progress.bad_images = sorted(known)
        self.output.save(run_state(self.trainer, self.sums, self.progress, self.options.settings), names)
        self.save_clock.restart()
        self.saved = bool(self.options.place.output_dir)


def quality(record: Record) -> float:
    """The best epoch has the largest: top-1, or without labels the likeness to the dense model."""
    if "val/kl" in record:
        return -record["val/kl"]
    return record["val/cosine"] if "val/cosine" in record else record["val/top1"]


def run_state(trainer: Trainer, sums: RunningMeans, progress: Progress, settings: dict[str, Any]) -> RunState:
    """A collective call: every process's sums are in it."""
    model = unwrap(trainer.model)
    return RunState(
        model=model.state_dict(),
        model_ema=trainer.ema.module.state_dict() if trainer.ema else None,
        optimizer=trainer.optimizer.state_dict(),
        scaler=trainer.scaler.state_dict(),
        sums=sums.gather(),
        amp=str(trainer.amp_dtype),
        args=settings,
        spec=None if isinstance(model, PreTrainedVisionModel) else model.spec,  # which would not build it
        progress=progress,
    )


def restore(trainer: Trainer, state: RunState) -> RunningMeans:
    """Puts a run's state into the trainer; returns the sums of the epoch that it stopped in."""
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    try:
        trainer.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever the file holds instead
        raise UserError(
            "the run to resume trained a different kind of model, or other parts of it as another version did; "
            "pass its checkpoint as --pretrained instead"
        ) from error
    for group, decay in zip(trainer.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # as this command asks for; the learning rates are set anew at every step
    load_weights(unwrap(trainer.model), state.model)
    if trainer.ema is not None:
        load_weights(trainer.ema.module, state.model_ema or state.model)
    if state.amp == str(trainer.amp_dtype):  # another precision needs another scale
        trainer.scaler.load_state_dict(state.scaler)
    before, now = len(state.sums), get_world_size()
    if before != now:
        log(
            f"resumed with {now} process(es) instead of {before}: the global batch and the learning rate change with it"
        )
    sums = RunningMeans(trainer.device)
    sums.load(state.sums)
    return sums


def report_accuracy(what: str, stats: Record) -> None:
    parts = []
    if "top1" in stats:
        parts.append(f"top-1 {stats['top1']:.2f} %, top-5 {stats['top5']:.2f} %, loss {stats['loss']:.4f}")
    if "agreement" in stats:
        parts.append(f"agreement with dense {stats['agreement']:.2f} %, KL {stats['kl']:.4f}")
    if "cosine" in stats:
        parts.append(f"cosine to dense {stats['cosine']:.4f}")
    log(f"{what}: {', '.join(parts)} on {stats['images']} images")


def log_model(model: nn.Module, gflops: dict[str, float]) -> None:
    """gflops: by "dense" and "dynamic"."""
    spec = model.spec
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    kind = "dense" if spec.dense else "dynamic"
    log(f"{spec.arch} {kind}: {millions:.2f} M parameters, {gflops[kind]:.4g} GFLOPs")
    if not spec.dense:
        log(
            f"{gflops['dynamic'] / gflops['dense']:.1%} of the dense model's {gflops['dense']:.4g} GFLOPs: "
            f"{spec.scorer} + {spec.reducer} {spec.place} blocks {', '.join(map(str, spec.pruning_loc))} keep "
            f"{', '.join(f'{rate:.1%}' for rate in spec.keep_rates)} of the tokens"
        )


def print_summary(spec: ModelSpec, gflops: dict[str, float], dense: Record | None, best: Record) -> None:
    """dense: the teacher's validation, where there was one."""
    kind = "dense" if spec.dense else "dynamic"
    rows = [("dense", gflops["dense"], dense)] if dense else []
    rows.append((f"{kind}, epoch {best['epoch']} (best)", gflops[kind], of_set(best, "val/")))
    if any(name.startswith("val_ema/") for name in best):
        rows.append((f"{kind}, moving average", gflops[kind], of_set(best, "val_ema/")))
    measured = {name: column for name, column in COLUMNS.items() if any(name in stats for _, _, stats in rows)}
    table = Table({"model": Column(spec.arch, width=30), "gflops": Column("GFLOPs", ".4g", 9)} | measured)
    log("", table.heading())
    for label, cost, stats in rows:
        log(table.line({"model": label, "gflops": cost, **stats}))


def of_set(record: Record, prefix: str) -> Record:
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def list_bad_images(paths: list[str]) -> None:
    if paths:
        log("", f"skipped {len(paths)} image(s) that cannot be read:", *paths)
