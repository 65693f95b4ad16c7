"""The report on a faster model: report.json, which can be read again, and report.html, a single page."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import torch
from dynamicvit.datasets import class_names
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec
from dynamicvit.models.pictures import feature_strip, prune, stage_panel
from dynamicvit.runs.whole import write_whole
from dynamicvit.tools.comparison import DENSE, MERGED, NAMES, Comparison, Row, in_words, likeness_of
from dynamicvit.tools.splits import Decoded
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

NUM_MERGED, NUM_DIFFERENT = 6, 8  # photos in the report
FEATURES = "features"  # in the settings: the purpose where every patch's feature is what counts
MOST_BYTES = 10 * 2**20  # of a report.json


@dataclass
class Report:
    """What is known about a faster model; what is not known yet is empty. Names no folder of the machine."""

    settings: dict[str, Any]  # what was asked for; a run is resumed only with the same settings
    arch: str = ""
    model: dict[str, Any] = field(default_factory=dict)  # the faster one's description (ModelSpec.to_dict)
    schedule: list[int] = field(default_factory=list)  # of fine-tuning: epochs, and steps in each
    use: str = ""  # batch, precision and hardware that its speed is for
    batch_sizes: list[int] = field(default_factory=list)  # that speed was measured at, the one of the use first
    images_held_back: int = 0
    rows: dict[str, Row] = field(default_factory=dict)  # by model, the dense one first
    saved: str = ""  # the row whose model was saved
    history: list[dict[str, float]] = field(default_factory=list)  # of fine-tuning, by epoch
    notes: list[str] = field(default_factory=list)  # what was adapted or assumed

    @property
    def for_features(self) -> bool:
        return self.settings.get("purpose") == FEATURES

    @property
    def speedups(self) -> dict[int, float]:
        """Times as fast as the dense model, by batch size."""
        if not self.saved:
            return {}
        dense, row = self.rows[DENSE], self.rows[self.saved]
        names = {size: f"images_per_s_{size}" for size in self.batch_sizes}
        return {size: row[name] / dense[name] for size, name in names.items() if name in row and name in dense}

    def __str__(self) -> str:
        """The result in a few sentences, bad news first."""
        dense, row = self.rows[DENSE], self.rows[self.saved]
        sentences = []
        if self.speedups:
            of_use, *others = self.speedups.items()
            sentences += ["This model is SLOWER than the dense one"] if of_use[1] < 1 else []
            also = "".join(f" ({ratio:.2f} times at batch {size})" for size, ratio in others)
            sentences.append(f"{of_use[1]:.2f} times as fast as the dense model at {self.use}{also}")
        sentences.append(f"{dense['gflops'] / row['gflops']:.2f} times fewer multiply-adds")
        figures = {name: in_words(row, name) for name in NAMES if name in row}
        spec = ModelSpec.from_dict(self.model)
        sentences.append(likeness_of(spec, self.for_features).sentence.format(images=row["images"], **figures))
        sentences[-1] += " that it was never trained on"
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Raises UserError for a file that is not a report, or that is damaged."""
        try:
            with open(path, "rb") as file:
                content = json.loads(file.read(MOST_BYTES))
            if not isinstance(content, dict):
                raise TypeError("it holds no report")
            report = cls(**content)
            report.check()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged or no report of this program ({error}); choose another output"
            ) from error
        return report

    def check(self) -> None:
        """Raises TypeError or ValueError unless all values are of their kind."""
        for entry in fields(self):
            kind = get_origin(entry.type) or entry.type
            if not isinstance(getattr(self, entry.name), kind):
                raise TypeError(f"{entry.name} is no {kind.__name__}")
        numbers = [*self.schedule, *self.batch_sizes]
        for row in (*self.rows.values(), *self.history):
            numbers += row.values() if isinstance(row, dict) else [None]
        if not all(isinstance(number, (int, float)) for number in numbers) or len(self.schedule) not in (0, 2):
            raise TypeError("not a number where one must be")
        if self.model:
            ModelSpec.from_dict(self.model)
        if self.saved and not {DENSE, self.saved} <= self.rows.keys():
            raise ValueError("no row of the model that was saved")


def report_page(report: Report, comparison: Comparison, images: Decoded, fast: nn.Module, folder: str) -> str:
    """A page of HTML that needs no other file. fast: the model that was saved, in `folder`."""
    parts = [
        f"<h1>{html.escape(report.arch)}, faster</h1>",
        f'<p class="lead">{html.escape(str(report)).replace("+-", "±")}</p>',
        table(report),
        f'<p class="note">{html.escape(comparison.likeness.explanation)}</p>',
        "".join(f'<p class="note">{html.escape(note)}</p>' for note in report.notes),
        curve(report, comparison.likeness.measure),
        feature_photos(comparison, report.saved, images, fast) if report.for_features else "",
        merged_photos(images, fast),
        different_photos(comparison, report.saved, images, fast.spec),
        usage(fast.spec, folder, report.for_features),
    ]
    body = "\n".join(part for part in parts if part)
    return PAGE.format(title=html.escape(report.arch), body=body)


def table(report: Report) -> str:
    columns = [name for name in NAMES if any(name in row for row in report.rows.values())]
    speeds = [size for size in report.batch_sizes if f"images_per_s_{size}" in report.rows[DENSE]]
    heads = [NAMES[name] for name in columns] + ["GFLOPs"] + [f"images/s, batch {size}" for size in speeds]
    lines = []
    for name, row in report.rows.items():
        cells = [in_words(row, column).replace("+-", "±") if column in row else "" for column in columns]
        cells.append(f"{row['gflops']:.3f}")
        cells += [f"{row[f'images_per_s_{size}']:.1f}" for size in speeds]
        saved = name == report.saved
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr{' class=saved' if saved else ''}><th>{name}{' (saved)' if saved else ''}</th>{cells}</tr>")
    head = "".join(f"<th>{head}</th>" for head in heads)
    note = f"On the images held back, ± standard error. Speed: {html.escape(report.use)}; both models alternately."
    return f'<table><tr><th></th>{head}</tr>{"".join(lines)}</table><p class="note">{note}</p>'


def curve(report: Report, measure: str) -> str:
    """The measure of likeness on the images held back, over the epochs."""
    values = [report.rows[MERGED][measure], *(record[f"val/{measure}"] for record in report.history)]
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
    return (
        f"<h2>Fine-tuning</h2><p>{NAMES[measure]} on the images held back, before training and after each epoch.</p>"
        f'<svg viewBox="0 0 {width} {height}"><polyline points="{points}"/>{dots}{labels}{scale}</svg>'
    )


def merged_photos(held_back: Decoded, fast: nn.Module) -> str:
    count = len(held_back)
    chosen = range(0, count, math.ceil(count / NUM_MERGED))
    images = torch.stack([pixels(held_back, i) for i in chosen])
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


def feature_photos(comparison: Comparison, saved: str, images: Decoded, fast: nn.Module) -> str:
    """The features of some photos as colours."""
    outputs, dense = (comparison.answers[name].outputs[:, fast.num_prefix_tokens :] for name in (saved, DENSE))
    strips = []
    for i in range(0, len(images), math.ceil(len(images) / NUM_MERGED)):
        picture = pixels(images, i)
        strip = feature_strip(picture, {"dense": dense[i], "faster": outputs[i]}, fast.grid(picture[None]))
        strips.append(f"<img src='{embed(strip)}'>")
    return (
        "<h2>Features</h2><p>The first three principal components of the dense model's patch features as colours, and "
        f"the faster model's in the same directions.</p><div class='strips'>{''.join(strips)}</div>"
    )


def different_photos(comparison: Comparison, saved: str, images: Decoded, spec: ModelSpec) -> str:
    """The photos on which both models differ most, with both answers."""
    outputs, dense = (comparison.answers[name].outputs for name in (saved, DENSE))
    worst = comparison.likeness.distance(outputs, dense).topk(min(NUM_DIFFERENT, len(outputs)))
    names = class_names(spec, images.source.classes) if comparison.likeness.measure == "kl" else None
    figures = []
    for value, i in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
        if names is None:
            text = f"cosine {1 - value:.3f}"
        else:
            text = f"dense: {answer(dense[i], names)}<br>fast: {answer(outputs[i], names)}"
        figures.append(f"<figure><img src='{embed(pixels(images, i))}'><figcaption>{text}</figcaption></figure>")
    return f"<h2>Where the answers differ most</h2><div class='photos'>{''.join(figures)}</div>"


def pixels(images: Decoded, index: int) -> Tensor:
    """(3, H, W) uint8; a loader's pixels need not be whole numbers."""
    return images[index][0].float().round().clamp(0, 255).to(torch.uint8)


def answer(logits: Tensor, names: Sequence[str]) -> str:
    probability, index = logits.softmax(dim=-1).max(dim=-1)
    return f"<b>{html.escape(names[index])}</b> {probability:.0%}"


def embed(picture: Tensor) -> str:
    """A (3, H, W) uint8 picture as the address of an <img>."""
    file = io.BytesIO()
    to_pil_image(picture).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def usage(spec: ModelSpec, folder: str, features: bool) -> str:
    stages = ", ".join(map(str, spec.pruning_loc))
    rates = ", ".join(f"{rate:.1%}" for rate in spec.keep_rates)
    what, call = ("features", "model.forward_features") if features else ("outputs", "model")
    code = (
        f"import dynamicvit, timm\nmodel = dynamicvit.from_pretrained({folder!r})\n"
        f"transform = timm.data.create_transform(**model.data_config)\n{what} = {call}(transform(photo)[None])"
    )
    return (
        f"<h2>Use it</h2><pre>{html.escape(code)}</pre>"
        f'<p class="note">Tokens merge {spec.place} blocks {stages}, after which {rates} of them are left.</p>'
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
