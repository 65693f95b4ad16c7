"""The folder that tools.accelerate leaves: the model, the report, and a training run that can be resumed."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynamicvit.datasets import IMAGENET_CLASSES
from dynamicvit.errors import UserError
from dynamicvit.models import CheckpointError, ModelSpec, save_pretrained
from dynamicvit.models.spec import is_printable
from dynamicvit.runs.whole import try_to_write, write_whole
from dynamicvit.tools.accelerate_report import FEATURES, NUM_DIFFERENT, NUM_MERGED, Report, report_page
from dynamicvit.tools.comparison import Comparison
from dynamicvit.tools.splits import Decoded
from dynamicvit.utils import log
from torch import nn

REPORT, PAGE, TRAINING = "report.json", "report.html", "training"


class OutputFolder:
    """Writes everything, or nothing if there is no folder."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        """Checks the folder before any work; creates nothing yet. settings: those of an earlier run must be the same.

        Raises UserError if nothing can be written there, or if it holds anything else.
        """
        if folder is not None and not str(folder):
            raise UserError("the output's name is empty; give a new folder")
        self.folder, self.earlier = None if folder is None else Path(folder), None
        if self.folder is None:
            return
        folder = self.folder
        if (folder / REPORT).is_file():
            self.earlier = Report.read(folder / REPORT)
            before = self.earlier.settings
            if changed := [name for name in settings if before.get(name) != settings[name]]:
                flags = ", ".join(f"{name.replace('_', '-')} {before.get(name)}" for name in changed)
                raise UserError(f"{folder} holds the output of another command ({flags}); choose another output")
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose a new folder for the output")
        check_folder(folder)

    @property
    def training(self) -> Path | None:
        return self.folder and self.folder / TRAINING

    @property
    def spec(self) -> ModelSpec | None:
        """The description of the faster model that an earlier run has chosen."""
        return ModelSpec.from_dict(self.earlier.model) if self.earlier and self.earlier.model else None

    def write(self, report: Report) -> None:
        """Writes what is known so far. Makes the folder."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            report.write(self.folder / REPORT)

    def finish(self, report: Report, fast: nn.Module, comparison: Comparison, images: Decoded) -> None:
        """Writes the model first, then the report, and says what lies there."""
        if self.folder is None:
            return
        self.save(fast, report, images.source.classes)
        try:
            report.write(self.folder / REPORT)
            page = report_page(report, comparison, images, fast, self.folder.name)
            write_whole(self.folder / PAGE, page)
        except OSError as error:
            log(f"warning: the model is saved, but its report cannot be written ({error.strerror})")
        self.say_what_is_there()

    def save(self, fast: nn.Module, report: Report, classes: list[str]) -> None:
        """On a full disk it replaces the training run, which is no longer needed."""
        unnamed = fast.spec.class_names is None and fast.spec.num_classes != IMAGENET_CLASSES
        row = report.rows[report.saved]
        notes = {name: value for name, value in row.items() if not name.startswith("images_per_s")}
        notes |= {"speedup": next(iter(report.speedups.values()), None), "measured at": report.use}
        purpose = {"purpose": FEATURES} if report.for_features else {}
        printable = unnamed and all(map(is_printable, classes))
        names = fast.spec.class_names or (printable and classes) or None
        try:
            save_pretrained(fast, self.folder, names, accelerated=notes, **purpose)
        except CheckpointError as error:
            if error.__cause__ is None or not self.training.is_dir():  # it was refused, and not for want of space
                raise
            shutil.rmtree(self.training, ignore_errors=True)
            log(f"warning: the disk is full; {self.training} was removed to save the model")
            save_pretrained(fast, self.folder, names, accelerated=notes, **purpose)

    def say_what_is_there(self) -> None:
        """Logs sizes, and what may be deleted or should not be published."""
        sizes = {path.name: size_of(path) for path in self.folder.iterdir()}
        model = sizes.get("model.safetensors", 0) + sizes.get("config.json", 0)
        log(f"{self.folder}: model.safetensors and config.json ({megabytes(model)}) are the model")
        log(
            f"{self.folder / PAGE} ({megabytes(sizes.get(PAGE, 0))}) shows up to {NUM_MERGED + NUM_DIFFERENT} of the "
            "photos: look before you publish it"
        )
        if TRAINING in sizes:
            log(f"{self.training} ({megabytes(sizes[TRAINING])}) is only for resuming: it may be deleted")


def check_folder(folder: Path) -> None:
    """Raises UserError if nothing can be written there; leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder / "probe")
    except OSError as error:
        raise UserError(f"cannot write to the output {folder} ({error.strerror})") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
