"""The main job in minutes, on generated images: a dense ViT, made dynamic, and the two compared.

    python -m tools.demo

Both trainings are main_dynamic_vit.py itself; what is here only calls it and measures.

Measured with three seeds, one thread each (AMD EPYC): dense 96.95 to 97.80 % top-1, dynamic 96.10 to 96.65 %;
both trainings of a seed take 192 s of processor time. Merged was measured with one of them only: 95.30 %.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from dynamicvit.data.shapes import Shapes
from dynamicvit.datasets import BatchTransform
from dynamicvit.engine import evaluate
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import build_model, from_pretrained, load_weights, read_checkpoint
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.pictures import contact_sheet, enlarge, prune, save_png, strip
from dynamicvit.models.pretrained import LAST
from dynamicvit.signals import Stopped, StopSignal, die_of_stop_signals
from dynamicvit.tools.timing import hardware, interleave
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

ROOT = Path(__file__).parents[1]
OUTPUT = Path("logs/demo")
MODEL = [
    *("--arch", "deit_tiny", "--input-size", "64", "--patch-size", "8"),
    *("--embed-dim", "64", "--depth", "8", "--num-heads", "4", "--mlp-ratio", "2"),
]
# The recipe is for long runs on photos; these images need neither strong augmentation nor an average.
COMMON = [
    *("--data-set", "SHAPES", *MODEL, "--num-workers", "0", "--amp", "off", "--print-freq", "20"),
    *("--aa", "none", "--color-jitter", "0", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--smoothing", "0"),
    *("--no-repeated-aug", "--no-model-ema"),
]
EPOCHS = {"dense": 4, "dynamic": 3}
# A plateau comes first, on which a model knows colours but no outlines. With few and large steps, the end of the run
# found it at any point of the climb that follows (77 to 95 %); 1,500 small ones, of a gradient whose norm is held,
# leave it in the first of four epochs, and end where the rate has come down.
DENSE = [
    *("--dense", "--epochs", "4", "--batch-size", "16", "--lr", "0.032", "--warmup-epochs", "0.5", "--clip-grad", "1"),
    *("--output-dir", str(OUTPUT / "dense")),
]
DYNAMIC = [
    *("--distill", "--pretrained", str(OUTPUT / "dense/checkpoint_best.pth"), "--output-dir", str(OUTPUT / "dynamic")),
    *("--base-rate", "0.65", "--pruning-loc", "2", "4", "6", "--epochs", "3", "--warmup-epochs", "0"),
    # three epochs and not thirty: everything learns faster, the gradient's norm is held to keep it steady
    *("--batch-size", "32", "--lr", "0.016", "--backbone-lr-scale", "0.1", "--ratio-weight", "8", "--clip-grad", "1"),
]
OBJECT_SHARE = 0.25  # a patch with at least this share of object pixels is one of the object's
NUM_PICTURES = 3
BATCH_SIZE, ROUNDS = 64, 15
# Merging needs no training. One stage, and a late one: stages before 2 to 7 lost 5.9 points instead of 2.5 here, and
# each stage has a cost in time that a model as small as this one feels.
MERGED = {"scorer": "attention", "reducer": "merge", "pruning_loc": (5,), "base_rate": 0.3}


def main() -> None:
    argparse.ArgumentParser(prog="demo", description=(__doc__ or "").split("\n")[0]).parse_args()
    started, stop = time.monotonic(), StopSignal()
    for name, title, flags in (("dense", "1. A dense ViT", DENSE), ("dynamic", "2. The same, made dynamic", DYNAMIC)):
        print(f"\n{title}: main_dynamic_vit.py {' '.join(flags)}\n", flush=True)
        status = train([*COMMON, *flags], stop)
        advice = f"the demo stops here; run it again to continue, or remove {OUTPUT} to start again"
        if stop.received:
            raise Stopped(advice)
        if status or read_checkpoint(OUTPUT / name / LAST)["epoch"] < EPOCHS[name]:
            raise UserError(advice)
    die_of_stop_signals()  # there is nothing left to save
    report(*(load_run(OUTPUT / name) for name in EPOCHS))
    print(f"all of it in {time.monotonic() - started:.0f} s")


def train(flags: list[str], stop: StopSignal) -> int:
    """Returns main_dynamic_vit.py's exit status. At a signal, or if this process dies, it saves and ends, too."""
    script, leash = ROOT / "main_dynamic_vit.py", ROOT / "tools/leash.py"
    training = subprocess.Popen([sys.executable, leash, script, *flags], stdin=subprocess.PIPE)
    try:
        while training.poll() is None and not stop.received:
            time.sleep(0.1)
    finally:
        training.stdin.close()
    return training.wait()


def load_run(folder: Path) -> tuple[nn.Module, float]:
    """A trained model in eval mode, and the best epoch's top-1 in percent."""
    return from_pretrained(folder), max(record["val/top1"] for record in read_checkpoint(folder)["history"])


def report(dense_run: tuple[nn.Module, float], dynamic_run: tuple[nn.Module, float]) -> None:
    """The table and the picture."""
    (dense, dense_top1), (dynamic, dynamic_top1) = dense_run, dynamic_run
    val_set = Shapes(train=False)
    merged, merged_top1 = merge_untrained(dense, val_set)
    images = torch.stack([pil_to_tensor(val_set[i][0]) for i in range(256)])
    models = {"dense": dense, "merged": merged, "dynamic": dynamic}
    traces = {name: prune(models[name], images) for name in ("merged", "dynamic")}
    patches, grid = dense.patch_embed.num_patches, dense.patch_embed.grid_size
    tokens = {name: [indices.shape[1] for indices in trace.kept] for name, trace in traces.items()}
    dense_speed, merged_speed, dynamic_speed = images_per_second(models, images[:BATCH_SIZE])
    dense_gflops, merged_gflops, dynamic_gflops = (count_gflops(model, val_set.size) for model in models.values())

    print(f"\non {hardware('cpu')}\n\n{'':<30}{'dense':>8}{'merged, not trained':>22}{'dynamic':>18}")
    kept = traces["dynamic"].kept[-1]
    rows = [
        (
            "top-1 on 2000 new images, %",
            f"{dense_top1:.2f}",
            f"{merged_top1:.2f} ({merged_top1 - dense_top1:+.2f})",
            f"{dynamic_top1:.2f} ({dynamic_top1 - dense_top1:+.2f})",
        ),
        (
            "GFLOPs",
            f"{dense_gflops:.4f}",
            f"{merged_gflops:.4f} ({merged_gflops / dense_gflops:.1%})",
            f"{dynamic_gflops:.4f} ({dynamic_gflops / dense_gflops:.1%})",
        ),
        (
            "images/s, alternately",
            f"{dense_speed:.0f}",
            f"{merged_speed:.0f} ({merged_speed / dense_speed:.2f} x)",
            f"{dynamic_speed:.0f} ({dynamic_speed / dense_speed:.2f} x)",
        ),
        ("tokens after each stage", str(patches), *(" ".join(map(str, counts)) for counts in tokens.values())),
        ("object patches kept", "100.0 %", "all, merged", f"{object_coverage(val_set, kept, grid):.1%}"),
        ("  if kept at random", "", "", f"{tokens['dynamic'][-1] / patches:.1%}"),
    ]
    for name, *cells in rows:
        print(f"{name:<30}{cells[0]:>8}{cells[1]:>22}{cells[2]:>18}")

    groups = traces["dynamic"].groups
    strips = [strip(enlarge(images[i], 2), groups[i], grid) for i in range(NUM_PICTURES)]
    save_png(contact_sheet(strips), OUTPUT / "kept_tokens.png")
    print(f"\nimages losing their tokens, stage by stage: {OUTPUT / 'kept_tokens.png'}")


def merge_untrained(dense: nn.Module, val_set: Shapes) -> tuple[nn.Module, float]:
    """The dense model with its tokens merged, and its top-1 in percent."""
    merged = build_model(replace(dense.spec, dense=False, keep_rates=None, **MERGED)).eval()
    load_weights(merged, dense.state_dict())
    preprocessing = dense.spec.preprocessing
    transform = BatchTransform(torch.device("cpu"), preprocessing.mean, preprocessing.std)
    loader = DataLoader([(pil_to_tensor(image), label) for image, label in val_set], BATCH_SIZE)
    return merged, evaluate(merged, loader, transform, torch.device("cpu"), None, sharded=False)["top1"]


def images_per_second(models: dict[str, nn.Module], images: torch.Tensor) -> list[float]:
    preprocessing = models["dense"].spec.preprocessing
    batch = BatchTransform(torch.device("cpu"), preprocessing.mean, preprocessing.std)(images)
    steps = {name: lambda images, _, model=model: model(images) for name, model in models.items()}
    with torch.inference_mode():
        seconds = interleave(steps, batch, batch, ROUNDS, steps_per_turn=1)
    return [len(batch) / float(np.median(seconds[name])) for name in models]


def object_coverage(val_set: Shapes, kept: torch.Tensor, grid: tuple[int, int]) -> float:
    """Share of the object's patches that are among the (B, K) kept ones of the first B images."""
    held, total = 0, 0
    for i, indices in enumerate(kept):
        mask = torch.from_numpy(val_set.object_mask(i)).float()
        shares = nn.functional.avg_pool2d(mask[None], val_set.size // grid[0]).flatten()
        is_object = shares >= OBJECT_SHARE
        held += is_object[indices].sum().item()
        total += is_object.sum().item()
    return held / total


if __name__ == "__main__":
    sys.exit(exit_status(main))
