"""What a model is, apart from its weights: enough to build it again."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

StateDict = dict[str, Tensor]


class ModelError(ValueError):
    """A model that cannot be built or used as asked for; the message is for the user."""


class CheckpointError(ModelError):
    """A file that is not a usable checkpoint, or weights that do not fit; the message is for the user."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects to be done to an image: timm's names and units.

    crop_pct: the side of the central crop over the shorter side of the resized image.
    """

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    crop_pct: float = 224 / 256
    interpolation: str = "bicubic"

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 images -> float32, as the model takes them."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)


# Largest sizes that a description may ask for. Beyond any model that exists, and small enough that a
# typing error or a hostile file is refused before memory is asked for.
LARGEST = {
    "num_classes": 1_000_000,
    "img_size": 8192,
    "patch_size": 1024,
    "embed_dim": 16384,
    "depth": 256,
    "depths": 256,
    "num_heads": 1024,
    "mlp_ratio": 64,
    "window_size": 1024,
}
NEWER = ("place", "global_pool")  # fields that older versions do not know, saved only where they say something
SIZES = tuple(name for name in LARGEST if name not in ("num_classes", "img_size"))


@dataclass(frozen=True)
class ModelSpec:
    """Builds a model (see factory.build_model); saved in every checkpoint and beside every saved model.

    None stands for the architecture's own value; the spec of a model that is built has none of them
    left but class_names. sizes holds what differs from the architecture: embed_dim, depth(s), num_heads,
    mlp_ratio, patch_size, window_size. keep_rates, if given, go before base_rate. place: of the stages, before their
    blocks or inside. global_pool: timm's name of a pooling that reset_classifier has chosen, None for the
    architecture's own.
    Raises ModelError where a value cannot be.
    """

    arch: str = "deit_small"
    base_rate: float = 0.7
    num_classes: int | None = None
    img_size: int | tuple[int, int] | None = None
    dense: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)
    pruning_loc: tuple[int, ...] | None = None
    keep_rates: tuple[float, ...] | None = None
    scorer: str = "predictor"
    reducer: str = "drop"
    merge_streams: bool = False
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    place: str = "before"
    global_pool: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.arch, str) or not re.fullmatch(r"[\w.\-]+", self.arch):
            raise ModelError(f"not the name of an architecture: {self.arch!r}")
        if not 0 < self.base_rate <= 1:
            raise ModelError(f"keep rates must lie in (0, 1], got base rate {self.base_rate}")
        for name, value in {"num_classes": self.num_classes, "img_size": self.img_size, **self.sizes}.items():
            if name not in LARGEST:
                raise ModelError(f"a model has no size called {name}")
            for number in value if isinstance(value, (tuple, list)) else (value,):
                lowest = 0 if name == "num_classes" else 1e-9  # no classes: the model gives embeddings
                if number is not None and not (math.isfinite(number) and lowest <= number <= LARGEST[name]):
                    limits = "positive" if number <= LARGEST[name] else f"at most {LARGEST[name]}"
                    raise ModelError(f"{name} must be {limits}, got {number}")

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only, for JSON and for checkpoints."""
        content = plain(asdict(self))
        for name in NEWER:
            if content[name] == getattr(type(self), name):
                del content[name]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ModelSpec":
        """What to_dict gave. Raises ModelError for unknown fields and for values of another kind."""
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise ModelError(f"a model's description has no field {', '.join(sorted(unknown))}")
        try:
            values = {name: as_tuples(value) for name, value in content.items()}
            if values.get("preprocessing") is not None:
                values["preprocessing"] = Preprocessing(**values["preprocessing"])
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"a model's description cannot be read ({error})") from error

    def differences(self, other: "ModelSpec") -> list[str]:
        """What the other one has otherwise, as "name ours -> theirs"; what it leaves open is not among them."""
        return [
            f"{f.name} {getattr(self, f.name)} -> {getattr(other, f.name)}"
            for f in fields(self)
            if getattr(other, f.name) is not None and getattr(self, f.name) != getattr(other, f.name)
        ]

    def as_dense(self) -> "ModelSpec":
        """The plain backbone of a dynamic model."""
        return replace(self, dense=True)


def one_side(size: Sequence[int]) -> int | tuple[int, int]:
    """(height, width), or one number where they are equal."""
    height, width = size
    return height if height == width else (height, width)


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def as_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: as_tuples(entry) for name, entry in value.items()}
    return tuple(as_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value
