"""A linear head on frozen features, and how well it reads other models' features: what tools.dense_probe measures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from dynamicvit.models import Preprocessing
from dynamicvit.models.flops import count_gflops
from dynamicvit.runs.tables import Column, Row, Table
from dynamicvit.tools.comparison import worst_tenth
from dynamicvit.tools.frames import Frames
from dynamicvit.tools.timing import interleave, times_as_fast
from dynamicvit.utils import log
from torch import Tensor, nn

DENSE = "dense"
PIXELS_OF_A_FRAME = 8192  # that the head's loss is computed on, new ones each time
LEARNING_RATE, WEIGHT_DECAY, FRAMES_OF_A_STEP = 1e-2, 1e-4, 8
PERCENT = 100
SECONDS_OF_TIMING = 120.0

COLUMNS = {
    "name": Column("features of"),
    "gflops": Column("GFLOPs", ".2f"),
    "fewer": Column("times fewer", ".2f"),
    "images_per_s": Column("images/s", ".1f"),
    "faster": Column("times as fast", ".2f"),
    "cosine": Column("cosine", ".3f"),
    "worst": Column("worst tenth", ".3f"),
    "miou": Column("mIoU", ".2f"),
    "lost": Column("lost", ".2f"),
    "accuracy": Column("pixel accuracy", ".2f"),
}


@dataclass
class Contender:
    """A model, and how every patch gets a feature."""

    name: str
    model: nn.Module
    restore: str | None = None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) prepared images -> (B, C, rows, columns), float32."""
        kind = {} if self.restore is None else {"restore": self.restore}
        tokens = self.model.forward_features(images, **kind)[:, self.model.num_prefix_tokens :]
        grid = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, grid).float()


class Probe:
    """Trains heads on features, and compares models by how well the heads read theirs."""

    def __init__(
        self,
        training: Frames,
        held_out: Frames,
        preprocessing: Preprocessing,
        classes: int,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.training, self.held_out, self.prepare = training, held_out, preprocessing.normalise
        self.classes, self.steps, self.batch_size, self.seed = classes, steps, batch_size, seed

    def with_dense_head(self, contenders: Sequence[Contender], rounds: int) -> str:
        """The dense model's head on everybody's features."""
        head = self.train(contenders[0])
        rows = [self.row(contender, contenders[0], head) for contender in contenders]
        if rounds:
            self.add_times(rows, contenders, rounds)
        return self.table(rows)

    def with_own_heads(self, contenders: Sequence[Contender]) -> str:
        rows = [self.row(contender, contenders[0], self.train(contender)) for contender in contenders]
        return "Each with a head of its own:\n\n" + self.table(rows)

    def table(self, rows: Sequence[Row]) -> str:
        for row in rows:
            row["lost"] = rows[0]["miou"] - row["miou"]
        shown = {name: column for name, column in COLUMNS.items() if any(name in row for row in rows)}
        return Table(shown).markdown(rows)

    def batches(self, frames: Frames, contender: Contender) -> Iterator[Tensor]:
        device = next(contender.model.parameters()).device
        for start in range(0, len(frames), self.batch_size):
            yield self.prepare(frames.images[start : start + self.batch_size].to(device))

    @torch.no_grad()
    def train_features(self, contender: Contender) -> Tensor:
        """(N, C, rows, columns) of the images to learn from, in half the bytes."""
        return torch.cat([contender.features(batch).half() for batch in self.batches(self.training, contender)])

    def train(self, contender: Contender) -> nn.Module:
        """A head for the model's features; it is not trained itself."""
        log(f"head on the features of: {contender.name}")
        features = self.train_features(contender)
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        head = nn.Sequential(nn.BatchNorm2d(features.shape[1]), nn.Conv2d(features.shape[1], self.classes, 1))
        head.to(features.device)
        optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(2, self.steps))
        for _ in range(self.steps):
            chosen = torch.randint(len(features), (FRAMES_OF_A_STEP,), generator=generator)
            where, labels = draw_pixels(self.training.masks[chosen], generator)
            logits = head(features[chosen].float())
            logits = F.grid_sample(logits, where.to(logits), padding_mode="border", align_corners=False)[:, :, 0]
            loss = F.cross_entropy(logits, labels.to(logits.device), ignore_index=self.classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return head.eval()

    @torch.no_grad()
    def row(self, contender: Contender, dense: Contender, head: nn.Module) -> Row:
        """The model's figures on the held-out images."""
        log(f"measuring: {contender.name}")
        confusion = torch.zeros(self.classes, self.classes)
        cosines = []
        pairs = zip(self.batches(self.held_out, contender), self.held_out.masks.split(self.batch_size), strict=True)
        for i, (batch, masks) in enumerate(pairs):
            features = contender.features(batch)
            if contender is not dense:
                cosines.append(F.cosine_similarity(features, self.dense_features[i].float(), dim=1).flatten(1).cpu())
            elif i == 0:
                self.dense_features = [features.half()]
            else:
                self.dense_features.append(features.half())
            logits = F.interpolate(head(features), masks.shape[-2:], mode="bilinear", align_corners=False)
            confusion += count_pairs(masks.long(), logits.argmax(dim=1).cpu(), self.classes)
        size = tuple(self.held_out.images.shape[-2:])
        gflops = count_gflops(contender.model, size, features=True)
        row = {"name": contender.name, "gflops": gflops, **scores(confusion)}
        if cosines:
            cosine = torch.cat(cosines)
            row |= {"fewer": count_gflops(dense.model, size, features=True) / gflops}
            row |= {"cosine": cosine.mean().item(), "worst": worst_tenth(cosine).mean().item()}
        return row

    @torch.no_grad()
    def add_times(self, rows: Sequence[Row], contenders: Sequence[Contender], rounds: int) -> None:
        """All models in turn, on as many images as a batch has."""
        log("timing")
        chosen = torch.arange(self.batch_size) % len(self.held_out)
        device = next(contenders[0].model.parameters()).device
        images = self.prepare(self.held_out.images[chosen].to(device))

        def step(features: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return features(images)

        steps = {contender.name: partial(step, contender.features) for contender in contenders}
        seconds = interleave(steps, images, torch.empty(0), rounds, seconds_at_most=SECONDS_OF_TIMING)
        for row in rows:
            row["images_per_s"] = self.batch_size / float(np.median(seconds[row["name"]]))
            row["faster"] = times_as_fast(seconds, row["name"], DENSE)


def draw_pixels(masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, H, W) masks -> (B, 1, M, 2) places of random pixels as grid_sample takes them, (B, M) their classes."""
    batch, height, width = masks.shape
    rows, columns = (torch.randint(side, (batch, PIXELS_OF_A_FRAME), generator=generator) for side in (height, width))
    where = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return where[:, None], masks[torch.arange(batch)[:, None], rows, columns].long()


def count_pairs(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """(classes, classes): how many pixels of a class got which answer; pixels of no class are not counted."""
    counted = labels < classes
    pairs = labels[counted] * classes + answers[counted]
    return torch.bincount(pairs, minlength=classes * classes).unflatten(0, (classes, classes)).float()


def scores(confusion: Tensor) -> dict[str, float]:
    """In percent: mean intersection over union of the classes that occur, and the pixels that are right."""
    right = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
    there = union > 0
    miou = (right[there] / union[there]).mean().item()
    return {"miou": PERCENT * miou, "accuracy": PERCENT * (right.sum() / confusion.sum()).item()}
