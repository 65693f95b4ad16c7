"""What a sweep leaves: a table, sweep.csv, sweep.png and sweep.npz (the values of every image)."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dynamicvit.runs.tables import Column, Row, Table
from dynamicvit.runs.whole import whole_file
from dynamicvit.utils import log

try:
    from matplotlib.figure import Figure
except ImportError:  # needed for development only, so not installed everywhere
    Figure = None

DENSE = "dense"
# Top-1 and agreement in percent; se is the standard error.
COLUMNS = {
    "method": Column("method", width=22),
    "place": Column("stages", width=6),  # before their blocks or inside
    "base_rate": Column("rate", ".4f", 6),
    "gflops": Column("GFLOPs", ".3f", 7),
    "top1": Column("top-1", ".2f", 6),
    "top1_se": Column("se", ".2f", 5),
    "top1_change": Column("change", ".2f", 7),  # to the dense model on the same images, so paired
    "top1_change_se": Column("se", ".2f", 5),
    "agreement": Column("agree", ".2f", 6),
    "agreement_se": Column("se", ".2f", 5),
    "kl": Column("KL", ".4f", 7),
    "kl_se": Column("se", ".4f", 7),
    "images_per_s": Column("img/s", ".1f", 8),
    "speedup": Column("speedup", ".2f", 7),
}
TABLE = Table(COLUMNS)


class Answers(NamedTuple):
    """What a model answered, by image, and how long it took, by batch."""

    correct: np.ndarray | None  # 0 or 1; None without labels
    agrees: np.ndarray  # 0 or 1: the dense model's top-1
    kl: np.ndarray  # KL(dense || model)
    seconds: np.ndarray  # an image


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error (NaN for a single value)."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def summarize(answers: Answers, dense: Answers) -> dict[str, float]:
    """The columns that follow from what was said; speed by medians over the batches."""
    row = {}
    if answers.correct is not None:
        row["top1"], row["top1_se"] = mean_and_error(100 * answers.correct)
        row["top1_change"], row["top1_change_se"] = mean_and_error(100 * (answers.correct - dense.correct))
    row["agreement"], row["agreement_se"] = mean_and_error(100 * answers.agrees)
    row["kl"], row["kl_se"] = mean_and_error(answers.kl)
    row["images_per_s"] = float(np.median(1 / answers.seconds))
    row["speedup"] = float(np.median(dense.seconds / answers.seconds))
    return row


class Report:
    """Renewed with every row: a sweep cut short leaves what it had."""

    def __init__(self, folder: Path, title: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.title = folder, title
        self.rows: list[Row] = []
        self.images: dict[str, np.ndarray] = {}  # by "method rate column", or "method cost GFLOPs column"
        log(TABLE.heading())

    def add(self, name: str, about: Row, answers: Answers, dense: Answers) -> None:
        """about: method, place, base rate (None where a cost was asked for) and GFLOPs; name: the method without its
        settings."""
        row = dict.fromkeys(COLUMNS) | summarize(answers, dense) | about
        self.rows.append(row)
        log(TABLE.line(row))
        level = f"{row['gflops']:.3f} GFLOPs" if row["base_rate"] is None else row["base_rate"]
        for column in ("correct", "agrees", "kl"):
            value = getattr(answers, column)
            if value is not None:
                self.images[f"{name} {level} {column}"] = value.astype(np.float32)

    def write(self) -> None:
        with whole_file(self.folder / "sweep.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        with whole_file(self.folder / "sweep.npz") as temporary:
            np.savez_compressed(temporary, **self.images)
        with whole_file(self.folder / "sweep.png") as temporary:
            plot(self.rows, self.title).savefig(temporary, dpi=150)


def plot(rows: Sequence[Row], title: str) -> "Figure":
    """KL and top-1 (without labels: agreement) against GFLOPs, a line for each method, with standard errors."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    answer = "top1" if rows[0]["top1"] is not None else "agreement"
    panels = {"kl": "KL(dense || model)", answer: "top-1 accuracy (%)" if answer == "top1" else "agreement (%)"}
    lines: dict[str, list[Row]] = {}
    for row in rows[1:]:
        lines.setdefault(f"{row['method'].partition(',')[0]}, {row['place']}", []).append(row)
    for axis, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number_of_line, (method, points) in enumerate(lines.items()):
            points = sorted((p for p in points if column != "kl" or p["kl"] > 0), key=lambda row: row["gflops"])
            x, y, error = ([p[c] for p in points] for c in ("gflops", column, f"{column}_se"))
            style = ("-" if "drop" not in method else "--") + "os^vDPX"[number_of_line % 7]
            axis.errorbar(x, y, yerr=error, fmt=style, markersize=4, capsize=2, linewidth=1.2, label=method)
        if column == "kl":
            axis.set_yscale("log")
        else:
            axis.axhline(rows[0][column], color="gray", linewidth=1, label=f"{DENSE}, {rows[0]['gflops']:.3f} GFLOPs")
        axis.set_xlabel("GFLOPs")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    figure.axes[1].legend(fontsize="small")
    return figure
