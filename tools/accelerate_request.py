"""What tools.accelerate is asked for, checked and with its defaults."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamicvit.errors import UserError
from dynamicvit.optim import precision_name
from dynamicvit.tools.accelerate_report import FEATURES
from dynamicvit.tools.dense import Own, label
from dynamicvit.tools.finetune import Budget
from dynamicvit.tools.speedup import Deployment, Wish
from dynamicvit.tools.splits import Images
from torch import nn

PURPOSES = ("answers", FEATURES)
MAX_WORKERS = {"cpu": 4, "cuda": 16}


def as_tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


@dataclass(frozen=True)
class Request:
    """What is asked for; see accelerate."""

    model: nn.Module | str
    images: Images
    wish: Wish
    budget: Budget
    own: Own
    use: Deployment
    batch_size: int | None
    num_workers: int | None
    seed: int
    purpose: str = "answers"  # one of PURPOSES: what of the model is to stay as it was

    def __post_init__(self) -> None:
        if self.purpose not in PURPOSES:
            raise UserError(f"a model is accelerated for its {' or its '.join(PURPOSES)}, not for {self.purpose!r}")
        mixes = not self.features and not self.budget.is_none
        if mixes and self.batch_size is not None and self.batch_size % 2:
            raise UserError(f"fine-tuning mixes pairs of images: the batch size must be even, got {self.batch_size}")

    @property
    def features(self) -> bool:
        return self.purpose == FEATURES

    def settings(self) -> dict[str, Any]:
        """For the report, without this machine's folders, and without what may differ in a resumed run."""
        names = self.own.class_names  # a file, or the names themselves
        names = label(names) if names is None or isinstance(names, (str, Path)) else list(names)
        own = asdict(self.own) | {"weights": label(self.own.weights), "class_names": names}
        values = {"model": label(self.model), "images": label(self.images), "purpose": self.purpose}
        values |= asdict(self.wish) | own
        values |= asdict(self.budget) | {"batch_size": self.batch_size, "seed": self.seed}
        values |= {"for_batch": self.use.batch_size, "amp": precision_name(self.use.amp_dtype)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def workers(self) -> int:
        most = MAX_WORKERS[self.use.device.type]
        return min(most, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
