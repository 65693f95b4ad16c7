"""One epoch of training, and evaluation. Knows no architecture."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dynamicvit.datasets import IGNORED_LABEL
from dynamicvit.errors import UserError
from dynamicvit.losses import cosine_distance, kl_divergence
from dynamicvit.models import gives_embeddings
from dynamicvit.models.features import FeatureExtractor
from dynamicvit.models.huggingface import answer_of
from dynamicvit.optim import Trainer, set_rates
from dynamicvit.runs.clocks import Eta
from dynamicvit.utils import derive_seed, gather, get_rank, get_world_size, log, set_seed, sum_over_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MAX_BAD_STEPS = 20  # in a row, before a run gives up


def train_one_epoch(
    trainer: Trainer,
    loader: Iterable,
    epoch: int,
    steps: range,
    eta: Eta,
    sums: "RunningMeans",
    after_step: Callable[[int], None],
) -> tuple[dict[str, float], float]:
    """Returns the means of the loss and its parts, and the pace in images/s, over all processes.

    loader: batches of (B, 3, H, W) uint8 images and (B,) labels, of which update_freq make a step.
    steps: those to do, from 0 unless the epoch is resumed; sums are then those of its first part.
    after_step gets the number of the epoch's steps that are done.
    """
    trainer.model.train()
    started, images_seen, pace = time.monotonic(), 0, 0.0
    batches = iter(loader)
    for step in steps:
        set_rates(trainer.optimizer, trainer.schedule(epoch + step / steps.stop))
        statistics = copy_statistics(trainer.model)
        for micro_step in range(trainer.update_freq):
            images, labels = next(batches)
            images_seen += len(images)
            # Erasing, mixup and keep decisions follow from the place in the run alone, so that a
            # resumed run draws the same.
            set_seed(derive_seed(trainer.seed, epoch, step, micro_step, get_rank()))
            sums.update(accumulate_gradients(trainer, images, labels, last=micro_step == trainer.update_freq - 1))
        sums.add_to_total("skipped_steps", update_weights(trainer, statistics))
        eta.advance()
        done = step + 1
        if done % trainer.print_freq == 0 or done == steps.stop:
            stop_if_diverged(trainer)
            pace = images_seen * get_world_size() / (time.monotonic() - started)
            log(f"epoch {epoch}  step {done}/{steps.stop}  {sums}  {pace:.0f} images/s  ETA {eta}")
        after_step(done)
    return sums.means(), pace


def accumulate_gradients(trainer: Trainer, images: Tensor, labels: Tensor, last: bool) -> dict[str, Tensor]:
    """Forward and backward of one batch; processes exchange gradients on the last of a step only."""
    images = trainer.batch_transform(images)
    labels = labels.to(trainer.device, non_blocking=True)
    if trainer.mixup is not None:
        # an image without a label has IGNORED_LABEL, which is never looked at but cannot be mixed
        images, labels = trainer.mixup(images, labels.clamp(0, trainer.mixup.num_classes - 1))
    exchange_later = isinstance(trainer.model, DistributedDataParallel) and not last
    with trainer.model.no_sync() if exchange_later else nullcontext():
        with autocast(trainer.device, trainer.amp_dtype):
            outputs = trainer.model(images)
            loss, parts = trainer.criterion(images, outputs, labels)
        trainer.scaler.scale(loss / trainer.update_freq).backward()
    return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}


def copy_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """BatchNorm's (LV-ViT's stem has some), which a forward pass changes: each one with a copy of it."""
    return [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]


def update_weights(trainer: Trainer, statistics: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One optimizer step; returns 1 where it was skipped for a gradient that is not finite, else 0.

    statistics: copy_statistics from before the step's forward passes, to return to where it is
    skipped. The scaler's check and the fused optimizer keep all of it on the device. Gradients are
    equal in all processes, so all skip together.
    """
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trainer.scaler.unscale_(trainer.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if trainer.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, trainer.clip_grad, norm)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    is_bad = ~norm.isfinite()
    for buffer, before in statistics:
        buffer.copy_(torch.where(is_bad, before, buffer))
    if trainer.ema is not None:
        trainer.ema.update(unwrap(trainer.model))
    bad = is_bad.float()
    trainer.bad_steps_in_a_row = (trainer.bad_steps_in_a_row + bad) * bad
    trainer.most_bad_steps_in_a_row = torch.maximum(trainer.most_bad_steps_in_a_row, trainer.bad_steps_in_a_row)
    return bad


class Diverged(Exception):
    """Training cannot recover."""


def stop_if_diverged(trainer: Trainer) -> None:
    if trainer.most_bad_steps_in_a_row.item() >= MAX_BAD_STEPS:
        raise Diverged(f"{MAX_BAD_STEPS} steps in a row or more had gradients that are not finite")


class NotFinite(UserError):
    """Outputs from which no figure can be computed."""

    def __init__(self, finding: str) -> None:
        super().__init__(
            f"{finding}: its weights are damaged, or float16 is too narrow for them (try --amp off or bf16)"
        )
        self.finding = finding


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    batch_transform: Callable[[Tensor], Tensor],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    sharded: bool,
    dense: nn.Module | None = None,
) -> dict[str, float]:
    """Returns the number of images and means over them, images labelled IGNORED_LABEL left out of the first:

    - loss, top1 and top5 (in percent), where there are labels;
    - with a dense model to compare with: agreement (percent of equal top-1 answers) and kl (dense || model),
      or for a model without a classifier the cosine of the two embeddings; for a FeatureExtractor beside another
      the mean cosine over all tokens.

    sharded: each process's loader holds its own part of the images, so sums are added up.
    Raises NotFinite where answers are not, as every figure would be wrong.
    """
    broadcast_buffers(model)
    model.eval()
    gives_features = isinstance(model, FeatureExtractor)
    embeddings = gives_features or gives_embeddings(model.spec)
    totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    for images, labels in loader:
        labels, images = labels.to(device, non_blocking=True), batch_transform(images)
        with autocast(device, amp_dtype):
            outputs = answer_of(model(images)).float()
            dense_outputs = None if dense is None else answer_of(dense(images)).float()
        sums_of = feature_sums if gives_features else batch_sums
        totals += sums_of(outputs, labels, dense_outputs)
    sums = dict(zip(SUMS, (sum_over_processes(totals) if sharded else totals).tolist(), strict=True))
    return means_over_images(sums, with_dense=dense is not None, embeddings=embeddings)


def broadcast_buffers(model: nn.Module) -> None:
    """LV-ViT's BatchNorm statistics differ from process to process; all evaluate with rank 0's."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


SUMS = ("loss", "top1", "top5", "labelled", "images", "not_finite", "agreement", "kl", "cosine", "dense_not_finite")


def batch_sums(logits: Tensor, labels: Tensor, dense_logits: Tensor | None) -> Tensor:
    """Sums over a batch, in SUMS' order, of what evaluate gives the means of."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    labelled = (labels >= 0) & (labels < logits.shape[1])
    loss = F.cross_entropy(logits, labels.where(labelled, IGNORED_LABEL), reduction="sum")
    sums = [loss, hits[:, 0].sum(), hits.sum(), labelled.sum(), torch.full_like(loss, len(labels))]
    sums.append(count_not_finite(logits))
    if dense_logits is None:
        sums += [torch.zeros_like(loss)] * 4
    else:
        agreement = (logits.argmax(dim=1) == dense_logits.argmax(dim=1)).sum()
        cosine = 1 - cosine_distance(logits, dense_logits)
        sums += [agreement, kl_divergence(logits, dense_logits).sum(), cosine.sum(), count_not_finite(dense_logits)]
    return torch.stack([value.double() for value in sums])


def feature_sums(features: Tensor, labels: Tensor, dense_features: Tensor) -> Tensor:
    """As batch_sums, for (B, T, C) features; only these sums make sense for both features and logits."""
    sums = {"images": torch.tensor(len(features), device=features.device)}
    sums["not_finite"], sums["dense_not_finite"] = count_not_finite(features), count_not_finite(dense_features)
    sums["cosine"] = (1 - cosine_distance(features, dense_features)).mean(dim=1).sum()
    none = torch.zeros((), device=features.device)
    return torch.stack([sums.get(name, none).double() for name in SUMS])


def count_not_finite(outputs: Tensor) -> Tensor:
    """Number of images, of (B, classes) logits or (B, T, C) features."""
    return (~outputs.isfinite()).flatten(1).any(dim=1).sum()


def means_over_images(sums: dict[str, float], with_dense: bool, embeddings: bool) -> dict[str, float]:
    labelled, images = sums["labelled"], sums["images"]
    if images == 0:
        raise UserError("there are no images to validate on")
    for whose, name in (("the model's", "not_finite"), ("the dense model's", "dense_not_finite")):
        if sums[name] > 0:
            raise NotFinite(f"{whose} answers to {sums[name]:.0f} of {images:.0f} images are not finite numbers")
    if not with_dense and (labelled == 0 or embeddings):
        why = "the model gives embeddings" if embeddings else "no validation image has a label"
        raise UserError(f"{why}: to compare with the dense model, add --pretrained FILE")
    stats = {}
    if labelled > 0 and not embeddings:
        stats = {"loss": sums["loss"] / labelled, "top1": 100 * sums["top1"] / labelled}
        stats |= {"top5": 100 * sums["top5"] / labelled}
    if with_dense and embeddings:
        stats["cosine"] = sums["cosine"] / images
    elif with_dense:
        stats |= {"agreement": 100 * sums["agreement"] / images, "kl": sums["kl"] / images}
    return stats | {"images": int(images if with_dense else labelled)}


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers that it is trained in."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.model if isinstance(model, FeatureExtractor) else model


class RunningMeans:
    """Means and totals of named scalars, kept on the device so that no step has to wait for them.

    Values that are not finite are left out, as their steps are skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.entries: dict[str, Tensor] = {}  # by name: sum and count

    def update(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            entry = torch.stack([value, torch.ones_like(value)]).where(value.isfinite(), 0.0)
            self.entries[name] = self.entries[name] + entry if name in self.entries else entry

    def add_to_total(self, name: str, value: Tensor) -> None:
        total = self.entries[name][0] + value if name in self.entries else value
        self.entries[name] = torch.stack([total, torch.ones_like(total)])

    def __str__(self) -> str:
        """For the screen: leaves out a part that is the whole loss, and counts that are 0."""
        means = {name: (total / count).item() for name, (total, count) in self.entries.items()}
        hidden = {name for name, value in means.items() if name != "loss" and value == means.get("loss")}
        if means.get("skipped_steps") == 0:
            hidden.add("skipped_steps")
        return "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name not in hidden)

    def gather(self) -> list[dict[str, Tensor]]:
        """Every process's state, for load()."""
        return gather({name: entry.cpu() for name, entry in self.entries.items()})

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """What gather() gave, of this many processes or of another number of them."""
        if len(states) == get_world_size():
            states = [states[get_rank()]]
        self.entries = {
            name: (sum(state[name] for state in states) / len(states)).to(self.device) for name in states[0]
        }

    def means(self) -> dict[str, float]:
        """Means over all processes; totals, which are the same in all of them, are returned as they are."""
        totals, counts = sum_over_processes(torch.stack([*self.entries.values()]).double()).unbind(dim=1)
        return dict(zip(self.entries, (totals / counts).tolist(), strict=True))
