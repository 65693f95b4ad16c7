"""What tools.accelerate is asked for, checked and with its defaults."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamicvit.errors import UserError
from dynamicvit.optim import AMP_DTYPES, precision_name
from dynamicvit.options import KEEP_RATE, NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number, path
from dynamicvit.tools.accelerate_report import FEATURES
from dynamicvit.tools.dense import Own, label
from dynamicvit.tools.finetune import MINUTES, Budget
from dynamicvit.tools.speedup import USUAL_SPEEDUP, Deployment, Wish
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


def build_parser(description: str) -> OneLineParser:
    """The command's flags: the arguments of accelerate, by their names."""
    parser = OneLineParser(prog="accelerate", description=description)
    add, share = parser.add_argument, number(float, KEEP_RATE)
    add("model", help="timm's name or ours (deit_small, ...), user/name on the hub, or a folder of save_pretrained's")
    add("--images", type=path, required=True, help="a folder of images; class folders are used only for the report")
    add("--output", type=path, required=True, help="a new folder for the model and the report")
    add(
        "--speedup",
        type=number(float, POSITIVE),
        help=f"how many times as fast, measured here (default: {USUAL_SPEEDUP:g})",
    )
    add("--flops-speedup", type=number(float, POSITIVE), help="instead: how many times fewer multiply-adds")
    add("--base-rate", type=share, help="instead: share of its tokens that each stage keeps")
    add("--keep-rates", type=share, nargs="+", help="instead: shares of all tokens, by stage")
    add(
        "--pruning-loc",
        type=number(int, NOT_NEGATIVE),
        nargs="+",
        help="blocks in or before which tokens merge",
    )
    add(
        "--for",
        dest="purpose",
        choices=PURPOSES,
        default="answers",
        help="what has to stay as it was (default: answers)",
    )
    add(
        "--for-batch",
        type=number(int, POSITIVE),
        help="batch size that it will be used with (default: 8, or 256 on a GPU)",
    )
    add(
        "--amp",
        choices=("auto", *AMP_DTYPES),
        default="auto",
        help="precision that it will be used in; auto: bf16 on a GPU",
    )
    add("--minutes", type=number(float, NOT_NEGATIVE), help=f"roughly, of fine-tuning (default: {MINUTES:g}; 0: none)")
    add(
        "--steps",
        type=number(int, NOT_NEGATIVE),
        help="instead: fine-tuning steps, exactly repeatable (10 or more are rounded up to tens)",
    )
    add("--weights", type=path, help="file or folder of the dense model's weights (default: the published ones)")
    add(
        "--input-size", type=number(int, POSITIVE), nargs="+", help="pixels, or height and width (default: the model's)"
    )
    add("--class-names", type=path, help="a file with the name of a class on each line")
    for name in ("--mean", "--std"):
        add(name, type=number(float, POSITIVE), nargs=3, help="of each channel, as the weights expect it, from 0 to 1")
    add("--crop-pct", type=number(float, KEEP_RATE), help="share of an image's side that the model sees")
    add("--batch-size", type=number(int, POSITIVE), help="of training (default: 16, or 128 on a GPU)")
    add("--num-workers", type=number(int, NOT_NEGATIVE), help="loader processes (default: depends on the cores)")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=number(int, SEED), default=0)
    return parser
