"""How a faster model's answers compare with its dense self's, and the report of it: report.json and report.html."""

import base64
import html
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from dynamicvit.datasets import AugmentedDataset, class_names
from dynamicvit.engine import SUMS, batch_sums, means_over_images
from dynamicvit.losses import cosine_distance, kl_divergence
from dynamicvit.models import ModelSpec, gives_embeddings
from dynamicvit.models.pictures import prune, stage_panel
from dynamicvit.models.pruning import choose_attention
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

DENSE, MERGED, TUNED = "dense", "merged", "fine-tuned"
BATCH_SIZES = (1, 32)
SPEED_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 10.0, 5, 30  # of measuring, for each batch size
NUM_MERGED, NUM_DIFFERENT = 6, 8  # photos in the report
COLUMNS = {  # of the table: heading, unit, decimals
    "agreement": ("agreement", " %", 1),
    "kl": ("KL", "", 4),
    "cosine": ("mean cosine", "", 4),
    "neighbour": ("same nearest neighbour", " %", 1),
    "top1": ("top-1", " %", 1),
    "gflops": ("GFLOPs", "", 3),
    "images_per_s_1": ("images/s, batch 1", "", 1),
    "images_per_s_32": ("images/s, batch 32", "", 1),
}


class Answers(NamedTuple):
    """A model's outputs for the images held back."""

    outputs: Tensor  # (N, classes) logits or (N, C) embeddings, float32
    labels: Tensor  # (N,), IGNORED_LABEL where there are none


@dataclass
class Comparison:
    """The dense model's answers beside those of the faster ones, on the images held back."""

    spec: ModelSpec  # of the faster model
    images: AugmentedDataset
    gflops: dict[str, float]  # by "dense" and "dynamic"
    answers: dict[str, Answers] = field(default_factory=dict)  # by name, the dense model's first
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)  # the training run's, by epoch

    def add(self, name: str, answers: Answers) -> str:
        """Returns what the comparison says, in words."""
        self.answers[name] = answers
        dense = self.answers[DENSE].outputs
        embeddings = gives_embeddings(self.spec)
        sums = dict(zip(SUMS, batch_sums(*answers, dense).tolist(), strict=True))
        row = means_over_images(sums, with_dense=True, embeddings=embeddings)
        if embeddings:
            row["neighbour"] = 100 * same_neighbour(answers.outputs, dense)
        self.rows[name] = row | {"gflops": self.gflops["dense" if name == DENSE else "dynamic"]}
        return f"{name}: " + ", ".join(
            f"{COLUMNS[key][0]} {number(key, value)}" for key, value in row.items() if key in COLUMNS
        )

    def better_of(self, name: str, other: str) -> str:
        """Of two names, the one more like the dense model; one that was not measured never wins."""
        measure, sign = ("cosine", 1) if gives_embeddings(self.spec) else ("kl", -1)
        known = [candidate for candidate in (name, other) if candidate in self.rows]
        return max(known, key=lambda candidate: sign * self.rows[candidate][measure])

    def measure_speed(self, dense: nn.Module, fast: nn.Module) -> None:
        """Images/s of both models, alternately, so that a busy machine is equally busy for both."""
        for batch_size in BATCH_SIZES:
            pace = images_per_second({DENSE: dense, MERGED: fast}, self.images[0][0], batch_size)
            for name, row in self.rows.items():
                row[f"images_per_s_{batch_size}"] = pace[DENSE if name == DENSE else MERGED]


def same_neighbour(outputs: Tensor, dense: Tensor) -> float:
    """(N, C) embeddings, twice -> the share of images whose nearest other image is the same one, by cosine."""
    nearest = []
    for embeddings in (outputs, dense):
        embeddings = F.normalize(embeddings, dim=1)
        nearest.append((embeddings @ embeddings.T).fill_diagonal_(-math.inf).argmax(dim=1))
    return (nearest[0] == nearest[1]).float().mean().item()


@torch.inference_mode()
def images_per_second(models: dict[str, nn.Module], image: Tensor, batch_size: int) -> dict[str, float]:
    """Median over rounds, in each of which every model has its turn."""
    device = next(next(iter(models.values())).parameters()).device
    batch = torch.randn(batch_size, *image.shape, device=device)
    for model in models.values():
        choose_attention(model, batch)  # training in bfloat16 has left the dense one with the slower kernel
    seconds: dict[str, list[float]] = {name: [] for name in models}
    end = time.monotonic() + SPEED_SECONDS
    for done in range(MOST_ROUNDS + 1):
        if done > FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name, model in models.items():
            started = time.perf_counter()
            model(batch).sum().item()  # waits for a GPU
            seconds[name].append(time.perf_counter() - started)
    return {name: batch_size / float(np.median(values[1:])) for name, values in seconds.items()}  # 1st: warm-up


# --- The report


def report_content(comparison: Comparison, kept: str) -> dict[str, Any]:
    """What report.json says beside the command's settings. kept: the row whose model was saved."""
    spec = comparison.spec
    return {
        "arch": spec.arch,
        "pruning_loc": spec.pruning_loc,
        "keep_rates": spec.keep_rates,
        "images_held_back": len(comparison.images),
        "rows": comparison.rows,
        "saved": kept,
        "history": comparison.history,
    }


def report_page(comparison: Comparison, fast: nn.Module, kept: str, folder: str) -> str:
    """A page of HTML that needs no other file. fast: the model that was saved, in `folder`."""
    parts = [
        f"<h1>{html.escape(comparison.spec.arch)}, faster</h1>",
        summary(comparison, kept),
        table(comparison, kept),
        curve(comparison),
        merged_photos(comparison, fast),
        different_photos(comparison, kept),
        usage(comparison, folder),
    ]
    body = "\n".join(part for part in parts if part)
    return PAGE.format(title=html.escape(comparison.spec.arch), body=body)


def summary(comparison: Comparison, kept: str) -> str:
    dense, row = comparison.rows[DENSE], comparison.rows[kept]
    speed = f"<b>{dense['gflops'] / row['gflops']:.2f}</b> times fewer multiply-adds"
    if "images_per_s_32" in row:
        ratios = [row[f"images_per_s_{size}"] / dense[f"images_per_s_{size}"] for size in BATCH_SIZES]
        speed += f", measured <b>{ratios[1]:.2f}</b> times faster at batch 32 and {ratios[0]:.2f} times at batch 1"
    if "agreement" in row:
        same = f"Its answer is the dense model's on <b>{row['agreement']:.1f} %</b>"
    else:
        same = f"Its embeddings have a mean cosine of <b>{row['cosine']:.4f}</b> to the dense model's"
    count = f"{row['images']:.0f} images that it was never trained on"
    return f'<p class="lead">{speed}. {same} of {count}.</p>'.replace("model's of", "model's on")


def table(comparison: Comparison, kept: str) -> str:
    columns = [name for name in COLUMNS if any(name in row for row in comparison.rows.values())]
    head = "".join(f"<th>{COLUMNS[name][0]}</th>" for name in columns)
    lines = []
    for name, row in comparison.rows.items():
        cells = "".join(f"<td>{number(column, row[column]) if column in row else ''}</td>" for column in columns)
        chosen = ' class="saved"' if name == kept else ""
        lines.append(f"<tr{chosen}><th>{name}{' (saved)' if name == kept else ''}</th>{cells}</tr>")
    note = (
        "Agreement, KL (dense || faster) and top-1 on the images held back; speed in float32, both models alternately."
    )
    return f'<table><tr><th></th>{head}</tr>{"".join(lines)}</table><p class="note">{note}</p>'


def number(column: str, value: float) -> str:
    _, unit, decimals = COLUMNS[column]
    return f"{value:.{decimals}f}{unit}"


def curve(comparison: Comparison) -> str:
    """The measure of likeness on the images held back, over the epochs."""
    measure = "val/cosine" if gives_embeddings(comparison.spec) else "val/kl"
    start = comparison.rows[MERGED][measure.removeprefix("val/")]
    values = [start, *(record[measure] for record in comparison.history)]
    if len(values) < 2:
        return ""
    width, height, left, bottom = 640, 220, 70, 30
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    x = [left + i * (width - left - 20) / (len(values) - 1) for i in range(len(values))]
    y = [15 + (high - value) / span * (height - bottom - 25) for value in values]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in zip(x, y, strict=True))
    labels = "".join(f'<text x="{a:.1f}" y="{height - 8}" text-anchor="middle">{i}</text>' for i, a in enumerate(x))
    scale = "".join(
        f'<text x="{left - 10}" y="{b + 4:.1f}" text-anchor="end">{value:.4f}</text>'
        for value, b in ((high, 15), (low, height - bottom - 10))
    )
    name = "Mean cosine" if measure == "val/cosine" else "KL"
    return (
        f"<h2>Fine-tuning</h2><p>{name} on the images held back, before training and after each epoch.</p>"
        f'<svg viewBox="0 0 {width} {height}"><polyline points="{points}"/>{dots}{labels}{scale}</svg>'
    )


def merged_photos(comparison: Comparison, fast: nn.Module) -> str:
    count = len(comparison.images)
    chosen = range(0, count, math.ceil(count / NUM_MERGED))
    images = torch.stack([comparison.images[i][0] for i in chosen])
    trace = prune(fast, images)
    figures = []
    for image, groups in zip(images, trace.groups.cpu(), strict=True):
        stages = ((len(groups) - 1) // 2, len(groups) - 1)
        drawn = [stage_panel(image, groups[stage], trace.grid) for stage in stages]
        cells = "".join(f"<img src='{embed(picture)}'>" for picture in (image, *drawn))
        figures.append(f"<div class='strip'>{cells}</div>")
    left = trace.kept[-1].shape[1]
    return (
        "<h2>Which patches became one token</h2>"
        f"<p>The image, the tokens after half of the stages, and the {left} of {math.prod(trace.grid)} at the end: "
        "patches within a white border are one token.</p>" + f"<div class='strips'>{''.join(figures)}</div>"
    )


def different_photos(comparison: Comparison, kept: str) -> str:
    """The photos on which both models differ most, with both answers."""
    outputs, dense = comparison.answers[kept].outputs, comparison.answers[DENSE].outputs
    embeddings = gives_embeddings(comparison.spec)
    distance = (cosine_distance if embeddings else kl_divergence)(outputs, dense)
    worst = distance.topk(min(NUM_DIFFERENT, len(distance)))
    names = None if embeddings else class_names(comparison.spec, comparison.images.source.classes)
    figures = []
    for value, i in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
        if names is None:
            text = f"cosine {1 - value:.3f}"
        else:
            text = f"dense: {answer(dense[i], names)}<br>fast: {answer(outputs[i], names)}"
        figures.append(f"<figure><img src='{embed(comparison.images[i][0])}'><figcaption>{text}</figcaption></figure>")
    return f"<h2>Where the answers differ most</h2><div class='photos'>{''.join(figures)}</div>"


def answer(logits: Tensor, names: Sequence[str]) -> str:
    probability, index = logits.softmax(dim=-1).max(dim=-1)
    return f"<b>{html.escape(names[index])}</b> {probability:.0%}"


def embed(picture: Tensor) -> str:
    """A (3, H, W) uint8 picture as the address of an <img>."""
    file = io.BytesIO()
    to_pil_image(picture).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def usage(comparison: Comparison, folder: str) -> str:
    spec = comparison.spec
    stages = ", ".join(map(str, spec.pruning_loc))
    rates = ", ".join(f"{rate:.1%}" for rate in spec.keep_rates)
    code = f"import models\nmodel = models.from_pretrained({folder!r})\noutputs = model(images)"
    return (
        f"<h2>Use it</h2><pre>{html.escape(code)}</pre>"
        f'<p class="note">Tokens merge before blocks {stages}, after which {rates} of them are left.</p>'
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}, faster</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.7em; margin-bottom: 0.2em; }} h2 {{ font-size: 1.2em; margin-top: 2em; }}
.lead {{ font-size: 1.15em; }} .note {{ color: #777; font-size: 0.85em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: 0.45em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }}
td {{ font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; }} tr > th:first-child {{ text-align: left; white-space: nowrap; }}
tr.saved {{ background: #eef6ee; }}
svg {{ max-width: 640px; width: 100%; font-size: 12px; fill: #555; }}
svg polyline {{ fill: none; stroke: #2a7; stroke-width: 2; }} svg circle {{ fill: #2a7; }}
img {{ width: 100%; display: block; border-radius: 3px; }}
.strips {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 14px; }}
.strip {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; }}
.photos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }}
figure {{ margin: 0; }} figcaption {{ font-size: 0.85em; margin-top: 0.3em; }}
pre {{ background: #f4f4f4; padding: 0.8em 1em; border-radius: 3px; }}
</style></head><body>
{body}
</body></html>
"""
