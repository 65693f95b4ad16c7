"""Evaluates one checkpoint over a range of base rates: accuracy against cost, as a table and a plot.

    python -m tools.sweep --resume logs/my_run --data-path imagenet --output logs/sweep

Beside the learned scores it evaluates two baselines, the same backbone with random scores and with
the class token's attention as the score. Speed is that of the forward pass alone.
"""

import argparse
import csv
import sys
import time
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import utils
from datasets import BatchTransform, build_dataset
from engine import autocast
from flops import count_gflops
from main_dynamic_vit import loader_options, pick_amp
from models import geometric_keep_rates
from tools.visualize import RUNS, add_model_options, load_model
from utils import UserError, log

try:
    from matplotlib.figure import Figure
except ImportError:  # needed for development only, so not installed everywhere
    Figure = None

BASE_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
LEARNED, UNTRAINED, RANDOM, CLASS_ATTENTION = "learned", "untrained", "random", "class attention"
COLUMNS = ("method", "base_rate", "gflops", "top1", "images_per_s")  # top1 in percent


class RandomScores(nn.Module):
    """Stands where a predictor does, and keeps tokens by lot."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 1)."""
        return torch.rand(*tokens.shape[:2], 1, device=tokens.device)


class ClassAttention(nn.Module):
    """Stands where a predictor does; scores tokens by the class token's attention to them in the block before.

    Attention is recomputed from that block's queries and keys, as fused attention does not give it away.
    """

    def __init__(self, block: nn.Module, num_prefix: int) -> None:
        super().__init__()
        self.attn = block.attn
        self.num_prefix = num_prefix
        self.attn.qkv.register_forward_hook(self.remember)

    def remember(self, _module: nn.Module, _inputs: tuple, qkv: Tensor) -> None:
        self.qkv = qkv

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 1), the mean over the heads."""
        heads = self.attn.num_heads
        queries, keys, _ = self.qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        del self.qkv  # before a copy of the model is made to count its GFLOPs
        query, keys = self.attn.q_norm(queries[:, 0]), self.attn.k_norm(keys)
        attention = torch.einsum("bhc,bmhc->bmh", query, keys) * self.attn.scale
        return attention.softmax(dim=1)[:, self.num_prefix :].mean(dim=-1, keepdim=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--data-path", help="the data set's folder (default: as trained)")
    parser.add_argument("--base-rates", type=float, nargs="+", default=BASE_RATES, help="(default: 1.0 0.9 ... 0.3)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a forward pass (default: 64)")
    parser.add_argument("--num-workers", type=int, default=8, help="loader processes (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--output", type=Path, default=RUNS / "sweep", help="folder (default: logs/sweep)")
    return parser


def main(options: argparse.Namespace) -> None:
    if Figure is None:
        raise UserError("the plot needs matplotlib; get it: pip install -r requirements-dev.txt")
    device = utils.pick_device(options.device)
    model, args, trained = load_model(options)
    vars(args).update(num_workers=options.num_workers, device=options.device, skip_bad_images=False)
    if options.data_path is not None:
        args.data_path = options.data_path
    check(options, model)
    val_set = build_dataset(train=False, args=args)
    loader = DataLoader(val_set, options.batch_size, **loader_options(args))
    options.output.mkdir(parents=True, exist_ok=True)

    variants = {name: variant.to(device) for name, variant in make_variants(model, trained).items()}
    rows = []
    with open(options.output / "sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for base_rate in options.base_rates:
            for row in evaluate_at(base_rate, variants, loader, device, pick_amp(args, device), args.input_size):
                log(
                    "{method:<16} rate {base_rate:.2f}  {gflops:7.3f} GFLOPs  top-1 {top1:6.2f} %  "
                    "{images_per_s:8.1f} images/s".format(**row)
                )
                writer.writerow(row)
                rows.append(row)
            file.flush()  # a sweep that is cut short leaves the rates that it got to
    title = f"{args.arch}, {len(val_set)} images; speed on {device.type}, batches of {options.batch_size}"
    plot(rows, title).savefig(options.output / "sweep.png", dpi=150)


def check(options: argparse.Namespace, model: VisionTransformer) -> None:
    """Before the first of many passes, what would stop a later one."""
    if options.batch_size < 1 or options.num_workers < 0:
        raise UserError("--batch-size must be at least 1, and --num-workers not negative")
    for base_rate in options.base_rates:
        try:
            model.set_keep_rates(geometric_keep_rates(base_rate, len(model.pruning_loc)))
        except ValueError as error:
            raise UserError(f"--base-rates: {error}") from error


def make_variants(model: VisionTransformer, trained: bool) -> dict[str, VisionTransformer]:
    """By method: the model, and copies of it with the baselines in place of its predictors."""
    variants = {LEARNED if trained else UNTRAINED: model, RANDOM: deepcopy(model)}
    variants[RANDOM].score_predictor = nn.ModuleList(RandomScores() for _ in model.pruning_loc)
    if model.pruning_loc[0] == 0:
        log(f"no {CLASS_ATTENTION} baseline: no block comes before the first stage")
        return variants
    variants[CLASS_ATTENTION] = attentive = deepcopy(model)
    attentive.score_predictor = nn.ModuleList(
        ClassAttention(attentive.blocks[i - 1], model.num_prefix_tokens) for i in model.pruning_loc
    )
    return variants


@torch.inference_mode()
def evaluate_at(
    base_rate: float,
    variants: dict[str, VisionTransformer],
    loader: DataLoader,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    input_size: int,
) -> list[dict]:
    """A row of COLUMNS for each variant, from one pass over the loader; they take turns at each batch."""
    for model in variants.values():
        model.set_keep_rates(geometric_keep_rates(base_rate, len(model.pruning_loc)))
    gflops = {name: count_gflops(model, input_size) for name, model in variants.items()}
    utils.set_seed(0)  # random scores that a second sweep draws again
    hits, paces = dict.fromkeys(variants, 0), {name: [] for name in variants}
    batch_transform = BatchTransform(device)
    turns = deque(variants.items())
    for batch, (images, labels) in enumerate(loader):
        images, labels = batch_transform(images), labels.to(device)
        turns.rotate()  # the first of a turn shares the cores with loader processes that read the next batch
        for name, model in turns:
            with autocast(device, amp_dtype):
                if batch == 0:
                    model(images)  # the first pass of a kind is slow, and not measured
                logits, seconds = timed(model, images)
            hits[name] += (logits.argmax(dim=1) == labels).sum().item()
            paces[name].append(len(images) / seconds)
    total = len(loader.dataset)
    return [
        dict(zip(COLUMNS, (n, base_rate, gflops[n], 100 * hits[n] / total, np.median(paces[n])), strict=True))
        for n in variants
    ]


def timed(model: VisionTransformer, images: Tensor) -> tuple[Tensor, float]:
    """The logits, and the seconds until they are there."""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    logits = model(images)
    wait()
    return logits, time.perf_counter() - started


def plot(rows: Sequence[dict], title: str) -> "Figure":
    """Accuracy against GFLOPs and against measured speed, a line for each method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in zip(axes, ("gflops", "images_per_s"), ("GFLOPs", "images/s"), strict=True):
        for method, style in zip(dict.fromkeys(row["method"] for row in rows), ("o-", "s--", "^--"), strict=False):
            points = sorted((r for r in rows if r["method"] == method), key=lambda row: row["base_rate"])
            axis.plot([p[column] for p in points], [p["top1"] for p in points], style, label=method)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy (%)")
    axes[0].legend(title="score")
    return figure


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(utils.exit_status(command))
