"""How much a segmentation loses when the features come from a faster model: a linear head on frozen features.

python -m tools.dense_probe deit_tiny --weights deit_tiny.pth --input-size 352 480 --classes 11 --ignore 11 \
    --images camvid/train --masks camvid/trainannot --val-images camvid/val --val-masks camvid/valannot

The head (batch norm and a 1 x 1 convolution) learns on the dense model's features of --images, and is used unchanged
on those of models that need --speedups times fewer multiply-adds, of which none is trained: copy gives each patch the
token of its group, residual adds what the patch lost by joining (models.restoring), ToMe is the published merging, its
tokens copied. With --own-heads a second table follows, in which each model has a head that learned on its own features.
A mask is an image of one channel with the pixels' classes, of the same name as its image but for the ending.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dynamicvit.errors import UserError, exit_status
from dynamicvit.image_files import list_images, open_image
from dynamicvit.models import (
    Preprocessing,
    from_pretrained,
    make_dynamic,
    pictures,
)
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.spec import one_side
from dynamicvit.options import NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number
from dynamicvit.runs.tables import Column, Row, Table
from dynamicvit.tools import rivals
from dynamicvit.tools.dense import Own, build_by_name
from dynamicvit.tools.timing import hardware, interleave, times_as_fast
from dynamicvit.utils import log, pick_device, set_seed
from PIL import Image
from torch import Tensor, nn

DENSE = "dense"
PIXELS_OF_A_FRAME = 8192  # that the head's loss is computed on, drawn anew each time
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


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="dense_probe", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("model", help="one of our names or timm's, of a ViT")
    add("--weights", help="file with the dense model's weights (default: the published ones)")
    add("--input-size", type=number(int, POSITIVE), nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")
    for part, what in (("", "to learn from"), ("val-", "to measure on")):
        add(f"--{part}images", type=Path, required=True, help=f"folder of images {what}")
        add(f"--{part}masks", type=Path, required=True, help="folder of their masks")
    add("--classes", type=number(int, POSITIVE), required=True, help="0 to this number - 1 are the classes in masks")
    add("--ignore", type=number(int, NOT_NEGATIVE), default=255, help="what in masks is no class and not counted")
    add("--speedups", type=number(float, POSITIVE), nargs="+", default=[1.3, 1.6, 2.0], help="in multiply-adds")
    add("--also", nargs="*", default=[], metavar="FOLDER", help="saved models, for instance fine-tuned ones")
    add("--own-heads", action="store_true", help="a second table: each model's head learned on its own features")
    add("--steps", type=number(int, POSITIVE), default=600, help=f"of a head, {FRAMES_OF_A_STEP} images each")
    add("--batch-size", type=number(int, POSITIVE), default=8, help="images at a time, also for the times")
    add("--rounds", type=number(int, NOT_NEGATIVE), default=12, help="of timing, all models in turn; 0: no times")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=number(int, SEED), default=0)
    add("--output", type=Path, help="a file for the tables, in markdown")
    add("--photos", type=Path, nargs="+", default=[], help="to be drawn with the features of dense and residual")
    add("--picture", type=Path, help="the PNG for these")
    return parser


def main(args: argparse.Namespace) -> None:
    if bool(args.photos) != (args.picture is not None):
        raise UserError("--photos and --picture belong together")
    set_seed(args.seed)
    device = pick_device(args.device)
    dense = build_dense(args.model, args.weights, args.input_size).to(device)
    size, how = as_pair(dense.spec.img_size), dense.spec.preprocessing
    training, held_out = (
        read_frames(images, masks, size, args.classes, args.ignore)
        for images, masks in ((args.images, args.masks), (args.val_images, args.val_masks))
    )
    log(f"{len(training)} images to learn from, {len(held_out)} to measure on, {size[0]} x {size[1]} pixels")
    contenders = [Contender(DENSE, dense), *faster_models(dense, args.speedups), *saved_models(args.also, size, device)]
    probe = Probe(training, held_out, how, args.classes, args.steps, args.batch_size, args.seed)
    texts = [probe.with_dense_head(contenders, args.rounds)]
    if args.own_heads:
        texts.append(probe.with_own_heads(contenders))
    text = "\n\n".join([*texts, f"Times: batch {args.batch_size}, {hardware(device.type)}."]) + "\n"
    print(text, end="", flush=True)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    if args.picture:
        pictures.save_png(draw_features(args.photos, contenders, how), args.picture)


# --- Models


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


def build_dense(name: str, weights: str | None, size: Sequence[int] | None) -> nn.Module:
    """With its trained weights, in eval mode, for images of (height, width) pixels."""
    model, notes = build_by_name(name, Own(weights, None if size is None else one_side(size)))
    for note in notes:
        log(note)
    return model.eval()


def faster_models(dense: nn.Module, speedups: Sequence[float]) -> Iterator[Contender]:
    """Ours with either way to restore, and ToMe where the backbone has a place for it. Nothing is trained."""
    for speedup in speedups:
        try:
            ours = make_dynamic(copy.deepcopy(dense), speedup=speedup, for_features=True)
        except ValueError as error:
            raise UserError(str(error)) from error
        yield Contender(f"residual, {speedup:g}", ours, "residual")
        yield Contender(f"copy, {speedup:g}", ours, "copy")
        gflops = count_gflops(dense, dense.spec.img_size) / speedup
        try:
            rival = rivals.nearest("tome", dense.spec, gflops)
            yield Contender(f"ToMe, {speedup:g}", rivals.make_rival(copy.deepcopy(dense), rival).eval(), "copy")
        except (ValueError, AttributeError) as error:
            log(f"no ToMe: {error}")


def saved_models(folders: Sequence[str], size: tuple[int, int], device: torch.device) -> Iterator[Contender]:
    for folder in folders:
        model = from_pretrained(folder)
        if as_pair(model.spec.img_size) != size:
            model.set_input_size(img_size=size)
        yield Contender(Path(folder).name, model.to(device))


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def draw_features(photos: Sequence[Path], contenders: Sequence[Contender], preprocessing: Preprocessing) -> Tensor:
    """A row for each photo: itself, and what the dense and the restored features tell apart, as colours."""
    shown = [contender for contender in contenders if contender.restore in (None, "residual")]
    size, rows = as_pair(shown[0].model.spec.img_size), []
    for photo in photos:
        image = as_tensor(cover(open_image(photo), size, Image.Resampling.BICUBIC))
        prepared = preprocessing.normalise(image[None].to(next(shown[0].model.parameters()).device))
        maps = {contender.name: contender.features(prepared)[0] for contender in shown}
        grid = tuple(maps[shown[0].name].shape[1:])
        rows.append(pictures.feature_strip(image, {name: each.flatten(1).T for name, each in maps.items()}, grid))
    return torch.cat(rows, dim=1)


# --- Images and masks


@dataclass
class Frames:
    """Images and their masks, all of one size."""

    images: Tensor  # (N, 3, H, W) uint8
    masks: Tensor  # (N, H, W) uint8; the number of classes where nothing is counted

    def __len__(self) -> int:
        return len(self.images)


def read_frames(images: Path, masks: Path, size: tuple[int, int], classes: int, ignore: int) -> Frames:
    """Scaled to cover (height, width) and cut to it about the centre. Raises UserError for what does not fit."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
    by_stem = {Path(path).stem: path for path in list_images(masks)}
    paths = list_images(images)
    if not paths:
        raise UserError(f"no images in {images}")
    frames, labels = [], []
    for path in paths:
        if Path(path).stem not in by_stem:
            raise UserError(f"no mask {Path(path).stem}.* in {masks} for {path}")
        mask = Image.open(by_stem[Path(path).stem])
        if mask.mode not in ("L", "P"):
            raise UserError(f"{mask.filename} is no mask: it needs one channel of 8 bits, with a class in each pixel")
        image = open_image(path, upright=False)
        if image.size != mask.size:
            raise UserError(f"{path} has {image.size} pixels, its mask has {mask.size}")
        frames.append(as_tensor(cover(image, size, Image.Resampling.BICUBIC)))
        labels.append(check_mask(cover(mask, size, Image.Resampling.NEAREST), classes, ignore, mask.filename))
    return Frames(torch.stack(frames), torch.stack(labels))


def cover(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Scaled so that the smaller side fits, and cut to (height, width) about the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        image = image.resize(
            (max(width, round(image.width * scale)), max(height, round(image.height * scale))), resampling
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_mask(mask: Image.Image, classes: int, ignore: int, path: str) -> Tensor:
    """(H, W) uint8, with `classes` where nothing is counted."""
    values = np.array(mask)
    counted = values != ignore
    if (values[counted] >= classes).any():
        found = values[counted].max()
        raise UserError(f"{path} has class {found}; those that --classes and --ignore name are 0 to {classes - 1}")
    return torch.from_numpy(np.where(counted, values, classes).astype(np.uint8))


# --- The probe


class Probe:
    """Trains heads on features, and compares models by what the heads make of theirs."""

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
            row |= {"cosine": cosine.mean().item(), "worst": worst_tenth(cosine)}
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
    """(classes, classes): how many pixels of a class got which answer; of those of no class none is counted."""
    counted = labels < classes
    pairs = labels[counted] * classes + answers[counted]
    return torch.bincount(pairs, minlength=classes * classes).unflatten(0, (classes, classes)).float()


def scores(confusion: Tensor) -> dict[str, float]:
    """In percent: mean intersection over union of the classes that there are, and the pixels that are right."""
    right = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
    there = union > 0
    miou = (right[there] / union[there]).mean().item()
    return {"miou": PERCENT * miou, "accuracy": PERCENT * (right.sum() / confusion.sum()).item()}


def worst_tenth(cosine: Tensor) -> float:
    """(N, patches) -> the mean over each image's tenth of patches with the least."""
    count = max(1, cosine.shape[1] // 10)
    return cosine.topk(count, dim=1, largest=False).values.mean().item()


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
